"""Weights and optimizer in a checkpoint, as fragments: what one set of ranks wrote, any other can read.

    Engine  ->  find_fragments  ->  copy_part  ->  StatePart.write  ->  state/part-00000-of-00002.safetensors, each rank
    state/  ->  load_state: whole weights, and of the optimizer the fragments that this rank holds now

A fragment is a run of one parameter's numbers that one rank's optimizer keeps: under ZeRO 0 the whole parameter, under
1 and 2 what falls into this rank's part of a flat group, under 3 this rank's part of every parameter. It is written
under the parameter's name with its place in it, so neither the number of ranks nor the stage is part of the format:
reading asks for a run and gets it from whichever files hold it. DeepSpeed's universal checkpoint does the same in a
second step, by a script that writes everything once more, as pickles; these are safetensors, which hold numbers only.

A parameter that never had a gradient has no moments under ZeRO 0: its step is null. What does not learn (frozen
parameters) is not kept: it is what the config and the seed make of it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from panfm.errors import UserError

STATE = "state"  # the folder inside a checkpoint
HEADER = "panfm"  # one key of safetensors' metadata: several would be written in any order
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
WAY_OUT = "it was written by another model: use the panfm and the config that wrote it"


@dataclass(frozen=True)
class Fragment:
    """A run of a parameter's numbers, and where this rank's optimizer keeps it.

    owner: the tensor that the optimizer updates: the parameter itself under ZeRO 0, else a flat fp32 partition.
    """

    name: str  # of the parameter
    numel: int  # of the whole parameter
    start: int  # of the run, in the flattened parameter
    size: int
    owner: Tensor
    offset: int  # of the run, in the flattened owner

    def cut(self, tensor: Tensor) -> Tensor:
        """The run in its owner, or in a moment of the owner's shape, as a view [size]."""
        run = tensor.detach().view(-1)[self.offset : self.offset + self.size]
        assert len(run) == self.size, (self.name, tensor.shape)  # DeepSpeed swapped it out, to NVMe
        return run


@dataclass(frozen=True)
class StatePart:
    """What one rank writes of weights and optimizer: CPU copies, which training does not change any more."""

    file: str  # its name, relative to the checkpoint
    tensors: dict[str, Tensor]  # "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" [size]; "buffer/NAME"
    header: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """Write it into the checkpoint `folder`, not yet flushed; returns the file."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, path, {HEADER: json.dumps(self.header, sort_keys=True)})
        return path


def find_fragments(model: nn.Module, optimizer: Any, zero_stage: int, rank: int) -> list[Fragment]:
    """The fragments that rank `rank` holds, at most one of each trainable parameter; optimizer: DeepSpeed's."""
    parameters = list_parameters(model)
    if zero_stage == 0:
        return [Fragment(name, p.numel(), 0, p.numel(), p, 0) for name, p in parameters.items()]
    fragments = []
    if zero_stage == 3:
        for name, parameter in parameters.items():
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]  # size is padded
            numel = int(parameter.ds_numel)
            start, stop = rank * size, min((rank + 1) * size, numel)
            if start < stop:
                owner = optimizer.fp32_partitioned_groups_flat[group]
                fragments.append(Fragment(name, numel, start, stop - start, owner, offset))
        return fragments
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = zip(
        optimizer.bit16_groups, optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, strict=True
    )
    for members, flat, owner in groups:
        first, last = rank * owner.numel(), (rank + 1) * owner.numel()
        for parameter in members:
            # DeepSpeed makes each parameter a view of its group; in which order is a matter of its settings.
            position, numel = parameter.storage_offset() - flat.storage_offset(), parameter.numel()
            start, stop = max(position, first), min(position + numel, last)
            if start < stop:
                name = names[id(parameter)]
                fragments.append(Fragment(name, numel, start - position, stop - start, owner, start - first))
    return fragments


def copy_part(
    model: nn.Module,
    optimizer: Any,
    zero_stage: int,
    *,
    rank: int,
    world_size: int,
    loss_scale: Mapping[str, Any] | None,
) -> StatePart:
    """Copy rank `rank`'s part to the CPU; loss_scale: fp16's, the same on every rank, None at the other precisions."""
    fragments = find_fragments(model, optimizer, zero_stage, rank)
    if zero_stage == 0:  # every rank holds everything
        fragments = fragments[rank::world_size]
    states = get_base_optimizer(optimizer, zero_stage).state
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, int | None]] = {}
    for fragment in fragments:
        state = states.get(fragment.owner, {})
        tensors[f"weight/{fragment.name}"] = _copy(fragment.cut(fragment.owner))
        for moment in MOMENTS if state else ():
            tensors[f"{moment}/{fragment.name}"] = _copy(fragment.cut(state[moment]))
        step = int(state["step"]) if state else None
        entries[fragment.name] = {"numel": fragment.numel, "start": fragment.start, "size": fragment.size, "step": step}
    if rank == 0:
        tensors |= {f"buffer/{name}": _copy(buffer) for name, buffer in list_buffers(model).items()}
    file = f"{STATE}/part-{rank:05d}-of-{world_size:05d}.safetensors"
    return StatePart(file, tensors, {"fragments": entries, "loss_scale": loss_scale})


@torch.no_grad()
def load_state(folder: Path, model: nn.Module, optimizer: Any, zero_stage: int, rank: int) -> dict[str, Any] | None:
    """Read the weights, and what rank `rank` holds of the optimizer; returns the loss scale that was saved.

    folder: of a whole checkpoint. UserError where it is one of another model.
    """
    fragments = {fragment.name: fragment for fragment in find_fragments(model, optimizer, zero_stage, rank)}
    states = get_base_optimizer(optimizer, zero_stage).state
    with _open_parts(folder / STATE) as parts:
        for owner, steps in _collect_steps(fragments.values(), parts):
            if steps:
                _prepare_state(states[owner], owner, max(steps))
            else:
                states.pop(owner, None)
        for name, parameter in list_parameters(model).items():
            whole = parts.read("weight", name, 0, int(getattr(parameter, "ds_numel", parameter.numel())))
            fragment = fragments.get(name)
            if fragment is not None:
                run = slice(fragment.start, fragment.start + fragment.size)
                fragment.cut(fragment.owner).copy_(whole[run])
                if zero_stage == 3:  # what of the parameter stays here between two uses
                    parameter.ds_tensor.detach().view(-1)[: fragment.size].copy_(whole[run])
                for moment in MOMENTS if fragment.owner in states else ():
                    fragment.cut(states[fragment.owner][moment]).copy_(
                        parts.read(moment, name, fragment.start, fragment.size)
                    )
            if parameter.numel() == whole.numel():  # under ZeRO 3 only small ones are whole between two steps
                parameter.detach().view(-1).copy_(whole)
        for name, buffer in list_buffers(model).items():
            buffer.copy_(parts.read_buffer(name))
        return parts.loss_scale


def list_parameters(model: nn.Module) -> dict[str, Any]:
    """What learns, by name; DeepSpeed hangs attributes of its own on parameters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def list_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What belongs to the model's state and is no parameter, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def get_base_optimizer(optimizer: Any, zero_stage: int) -> torch.optim.Optimizer:
    """The torch optimizer inside of DeepSpeed's."""
    base: torch.optim.Optimizer = optimizer if zero_stage == 0 else optimizer.optimizer
    return base


class _Parts:
    """The parts of a state, opened: any run of any parameter, whichever ranks wrote it."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        headers = {path: json.loads(file.metadata()[HEADER]) for path, file in files.items()}
        self.loss_scale: dict[str, Any] | None = next(iter(headers.values()))["loss_scale"]
        self._buffers = next(iter(files.values()))  # rank 0's
        self._runs: dict[str, list[tuple[int, int, int | None, Any]]] = {}  # start, size, step, file; by parameter
        self._numels: dict[str, int] = {}
        for path, header in headers.items():
            for name, entry in header["fragments"].items():
                self._numels[name] = entry["numel"]
                self._runs.setdefault(name, []).append((entry["start"], entry["size"], entry["step"], files[path]))

    def get_step(self, name: str) -> int | None:
        """How often the optimizer updated a parameter; None: never."""
        self._check(name)
        return max((step for _, _, step, _ in self._runs[name] if step is not None), default=None)

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Numbers `start` to `start + size` of a weight or moment, flattened; a moment that never was is 0."""
        self._check(name)
        numbers = torch.zeros(size)
        num_read = 0
        for first, length, step, file in self._runs[name]:
            low, high = max(first, start), min(first + length, start + size)
            if low < high:
                num_read += high - low
                if kind == "weight" or step is not None:
                    piece = file.get_slice(f"{kind}/{name}")[low - first : high - first]
                    numbers[low - start : high - start] = piece
        if num_read != size or (kind == "weight" and size != self._numels[name]):
            raise UserError(f"state: {kind} of {name} has not the {size} numbers that this run's has; {WAY_OUT}")
        return numbers

    def read_buffer(self, name: str) -> Tensor:
        tensor: Tensor = self._buffers.get_tensor(f"buffer/{name}")
        return tensor

    def _check(self, name: str) -> None:
        if name not in self._runs:
            raise UserError(f"state: it holds no parameter {name}; {WAY_OUT}")


@contextmanager
def _open_parts(folder: Path) -> Iterator[_Parts]:
    with ExitStack() as stack:
        paths = sorted(folder.glob("part-*.safetensors"))
        yield _Parts({path: stack.enter_context(safe_open(path, framework="pt")) for path in paths})


def _collect_steps(fragments: Any, parts: _Parts) -> list[tuple[Tensor, list[int]]]:
    """Each owner once, with the steps that its fragments were updated."""
    owners: dict[int, tuple[Tensor, list[int]]] = {}
    for fragment in fragments:
        step = parts.get_step(fragment.name)
        owners.setdefault(id(fragment.owner), (fragment.owner, []))[1].extend([] if step is None else [step])
    return list(owners.values())


def _prepare_state(state: dict[str, Any], owner: Tensor, step: int) -> None:
    """Make AdamW's state of `owner` as its first step would, and set its step; what DeepSpeed links to stays."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)  # there for the fused AdamW
        state |= {moment: torch.zeros_like(owner, memory_format=torch.preserve_format) for moment in MOMENTS}
    state["step"].fill_(step)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
