"""What a rank's memory holds while it trains: model states per ZeRO stage (computed), activations (watched).

    trained parameters, stage, ranks              ->  compute_state_bytes  ->  StateBytes
    forward and backward inside `SavedTensors()`  ->  its peak: bytes that autograd keeps for the backward pass

Parameters, gradients and AdamW's two moments are fp32 here at every precision, and ZeRO 1 and 2 keep an fp32 copy of
the weights that a rank updates. The gradients' bucket, weights that ZeRO 3 gathers, and what an operation needs for
itself come on top.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

FP32 = 4  # bytes
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float  # two moments and, at stages 1 and 2, a copy of the weights that this rank updates

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def compute_state_bytes(num_parameters: int, stage: int, world_size: int) -> StateBytes:
    """What `num_parameters` trained parameters take on a rank: a stage shards one thing more than the one before it.

    One rank has nothing to share, and runs every stage as stage 0.
    """
    whole = FP32 * num_parameters
    if world_size == 1 or stage == 0:
        return StateBytes(whole, whole, 2 * whole)
    share = whole / world_size
    # Below stage 3 DeepSpeed copies the weights that a rank updates; at 3 its part of them is all that it has.
    return StateBytes(whole if stage < 3 else share, whole if stage < 2 else share, (3 if stage < 3 else 2) * share)


def compute_checkpoint_bytes(num_parameters: int, others: int) -> int:
    """Bytes of a checkpoint of all ranks: weights, two moments, `others` (encoder, EMA teacher, texts).

    Each number is written once, by the rank that updates it: at every stage and number of ranks the same.
    """
    return 3 * FP32 * num_parameters + others


class SavedTensors:
    """Watches what autograd saves inside a `with`: `peak` is the most that it held at one time, in bytes.

    Each memory is counted once, however many operations saved it; what belongs to a parameter of `model` is not
    counted, being there anyway. Parameters that ZeRO 3 gathers are counted: then they take memory too.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.peak = 0
        self._live = 0
        self._holders: dict[int, int] = {}  # address of a memory -> saved tensors in it
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()} if model is not None else set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._own or not size:
            return tensor
        return _Saved(self, tensor, address, size)

    def _unpack(self, packed: Any) -> Tensor:
        tensor: Tensor = packed.tensor if isinstance(packed, _Saved) else packed
        return tensor

    def hold(self, address: int, size: int) -> None:
        """Count one more tensor in the memory at `address`."""
        self._holders[address] = self._holders.get(address, 0) + 1
        if self._holders[address] == 1:
            self._live += size
            self.peak = max(self.peak, self._live)

    def release(self, address: int, size: int) -> None:
        """Count one less: autograd let go of it."""
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self._live -= size


class _Saved:
    """What autograd keeps instead of a tensor; it goes when autograd lets go."""

    def __init__(self, watch: SavedTensors, tensor: Tensor, address: int, size: int) -> None:
        self.tensor = tensor
        self._watch, self._address, self._size = watch, address, size
        watch.hold(address, size)

    def __del__(self) -> None:
        self._watch.release(self._address, self._size)
