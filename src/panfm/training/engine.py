"""One optimizer step on one process or a thousand: the only file that imports DeepSpeed.

    EngineConfig + OptimConfig  ->  DeepSpeed's dict (computed, never written by hand)  ->  Engine
    Engine.step(micro batches of this rank, lr)  ->  StepOutput (means over micro batches and ranks)

The parameters stay fp32 at every precision; bf16 and fp16 mean that the forward pass runs under autocast. ZeRO 0 keeps
the whole optimizer on every rank, 1 shards its state, 2 also the gradients, 3 also the parameters, which DeepSpeed then
gathers around each module's forward and backward. Only the student and its heads are wrapped: a teacher is no part of
the module tree.

What ZeRO 3 asks of a model. Weights used outside of their own module's forward (the encoder's embedding, of which only
visible patches are made; CLS; positions) DeepSpeed gathers when they are asked for by name during a forward, and keeps
for the module that asked: `encoder.pos_embed`, not a loop over `parameters()`. And every module must return tensors in
tuples or dicts: in an object of another kind DeepSpeed does not find the loss, so that in the backward pass nothing
gathers the weights again (tried: it meets an empty position embedding). Whoever reads weights between steps, or
computes with a part of the model, does so inside of `Engine.gather` or `Engine.whole`.
"""

import ctypes
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.data.batch import Batch
from panfm.distributed import (
    all_reduce_mean,
    get_local_rank,
    get_rank,
    get_world_size,
)
from panfm.errors import UserError
from panfm.files import compute_sha256
from panfm.objectives.interface import Mean, Metric
from panfm.optim import OptimConfig, build_optimizer, build_param_groups, set_lr
from panfm.training.checkpoint_state import StatePart, copy_part, load_state
from panfm.training.engine_config import (
    AUTOCAST,
    EngineConfig,
    compute_deepspeed_config,
    compute_num_micro_batches,
    compute_num_threads,
)
from panfm.training.loss_scale import SMALLEST, LossScale, compute_next_loss_scale

__all__ = ["Engine", "EngineConfig", "StepOutput", "compute_num_micro_batches", "compute_num_threads"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class StepOutput:
    """What one step says: means over its micro batches and all ranks; None: a mean of no example at all.

    `applied` is False where the loss or the gradient was not finite and the weights were therefore left alone;
    grad_norm (before clipping) is None where it was not finite. `skipped_by_scaler`: only fp16's loss scale was too
    large, as happens now and then: it is smaller from the next step on, and nothing is wrong with the run.
    """

    loss: float
    metrics: dict[str, float | None]
    grad_norm: float | None
    applied: bool
    skipped_by_scaler: bool = False


def compute_step_seed(seed: int, step: int, rank: int) -> int:
    """63-bit seed of the random numbers (stochastic depth, dropout) of one step on one rank."""
    return int(compute_sha256(f"{seed}/{step}/{rank}".encode())[:15], 16)


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a step on the CPU frees, for the next step; no other C library is touched.

    Large tensors otherwise go back to the system when they are freed, and are mapped and zeroed anew: 105,000 page
    faults a step of ViT-Small with 32 images, some 8 % of its time. What the process holds at most stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)  # bytes: smaller blocks come from the heap, which is kept
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Engine:
    """A model, its optimizer and DeepSpeed: step; copy_part and load; gather, whole and copy_state to read weights."""

    def __init__(
        self, model: nn.Module, encoder: nn.Module, config: EngineConfig, optim: OptimConfig, extra: Mapping[str, Any]
    ) -> None:
        """Wrap `model`; `encoder` is the part of it whose learning rates may decay by layer.

        The process group must stand. The model's forward takes a Batch and returns a named tuple, in which DeepSpeed
        looks for tensors, of .loss (a scalar) and .metrics.
        """
        self.config = config
        self.num_micro_batches = compute_num_micro_batches(config, get_world_size())
        settings = compute_deepspeed_config(config, get_world_size(), extra)
        self.zero_stage: int = settings["zero_optimization"]["stage"]
        groups = build_param_groups(model, encoder, optim)
        # Counted before ZeRO 3 leaves empty tensors in their places.
        self.num_parameters, self.num_encoder_parameters = (
            sum(p.numel() for p in module.parameters()) for module in (model, encoder)
        )
        self._linear = functional.linear
        self._engine = _initialise_deepspeed(model, build_optimizer(groups, optim), settings)
        # Its own loss scaler, if it made one, spoils updates under ZeRO: see loss_scale.py, which does the work here.
        self._engine.torch_autocast_z0_gradscaler = self._engine.optimizer.torch_autocast_gradscaler = None
        self.loss_scale: LossScale | None = LossScale() if config.precision == "fp16" else None
        if get_world_size() == 1 and self.zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # else every gradient is copied to be summed over one rank
        self.model = model
        self.encoder = encoder
        self._has_leftovers = False  # gradients of a step that was not applied
        self.device: torch.device = self._engine.device
        if self.device.type == "cpu":
            keep_freed_memory()

    def step(self, micro_batches: Sequence[Batch], *, step: int, lr: float, freeze_encoder: bool = False) -> StepOutput:
        """Run forward and backward over this rank's micro batches and update the weights once.

        The random state of every step is set from (seed, step, rank): the generators need no place in a checkpoint,
        and a resumed run draws what the first would have drawn. A loss that is not finite on any rank leaves the
        weights alone on all of them, and nothing of the step stays.
        """
        assert len(micro_batches) == self.num_micro_batches, (len(micro_batches), self.num_micro_batches)
        self._seed(step)
        set_lr(self._engine.optimizer.param_groups, lr, freeze_encoder=freeze_encoder)
        rows: list[Tensor] = []
        names: list[str] = []
        caches = self._cache_gradients(micro_batches, step)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        if self.loss_scale is not None and self.zero_stage > 0:
            self._engine.optimizer.override_loss_scale(scale)  # takes it off again where it measures, clips and updates
        for number, batch in enumerate(micro_batches, start=1):
            if caches:
                self._seed(step, number)
            output = self._engine(batch.to(self.device), *caches[number - 1 : number])
            self._engine.backward(output.loss * scale if self.zero_stage == 0 and scale != 1.0 else output.loss)
            names = sorted(output.metrics)
            rows.append(stack_sums(output.loss, [output.metrics[name] for name in names]))
            if number < len(micro_batches):
                self._engine.step()  # only counts: DeepSpeed updates at the last micro batch
        loss, *means = compute_means(all_reduce_mean(torch.stack(rows).mean(dim=0)))
        assert loss is not None
        metrics = dict(zip(names, means, strict=True))
        self._has_leftovers = True
        if not math.isfinite(loss):
            self.discard()
            return StepOutput(loss, metrics, grad_norm=None, applied=False)
        norm = self._update_whole(scale) if self.zero_stage == 0 else self._update_shards()
        skipped = False
        if self.loss_scale is not None:
            metrics["loss_scale"] = scale
            skipped = norm is None and scale > SMALLEST
            self.loss_scale = compute_next_loss_scale(self.loss_scale, overflowed=norm is None)
        return StepOutput(loss, metrics, norm, applied=norm is not None, skipped_by_scaler=skipped)

    def _update_whole(self, scale: float) -> float | None:
        """Update from gradients that are whole and summed over ranks -> their norm; None: not finite, no update."""
        # clip_grad_norm_ would rewrite the gradients even where the norm is below the limit.
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm, limit = float(total) / scale, self.config.clip_grad_norm or math.inf
        if not math.isfinite(norm):
            self.discard()
            return None
        if norm > limit:
            nn.utils.clip_grads_with_norm_(parameters, limit * scale, total)
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1 / scale)
        self._finish_step()
        return norm

    def _update_shards(self) -> float | None:
        """The same where DeepSpeed measures and clips; it drops a gradient that is not finite by itself."""
        self._finish_step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if self._engine.was_step_applied() and norm >= 0 and math.isfinite(norm) else None

    def discard(self) -> None:
        """Drop what is left of a step that was not applied, so that the next one begins clean; every rank must call it.

        Weights and optimizer stay as they are, its own count of steps too.
        """
        if not self._has_leftovers:
            return
        if self.zero_stage == 0:
            self.model.zero_grad(set_to_none=True)  # AdamW passes over parameters without a gradient
        else:  # DeepSpeed drops a gradient that is not finite; that of a loss that is not may yet be
            for parts in self._engine.optimizer.averaged_gradients.values():
                for part in parts or ():
                    part.fill_(math.nan)
        self._finish_step()

    def _finish_step(self) -> None:
        self._engine.step()
        self._has_leftovers = False

    def _seed(self, step: int, micro_batch: int = 0) -> None:
        torch.manual_seed(compute_step_seed(self.config.seed, step, get_rank()) + micro_batch)

    def _cache_gradients(self, micro_batches: Sequence[Batch], step: int) -> list[Any]:
        """What the model's forward must know of the other micro batches (objectives/gradient_cache.py); []: nothing."""
        model: Any = self.model
        if len(micro_batches) == 1 or not getattr(model, "comparing", None):
            return []
        represented, numbers = [], []
        dtype = AUTOCAST[self.config.precision]
        with self.whole(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            for number, batch in enumerate(micro_batches, start=1):
                self._seed(step, number)  # as in the pass with gradients
                there = batch.to(self.device)
                represented.append(model.represent(there))
                numbers.append(replace(there, views=(), masks=None, texts=None))  # pixels do not stay
            caches: list[Any] = model.cache_gradients(represented, numbers)
        return caches

    @contextmanager
    def gather(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Hold the weights of `modules` whole on every rank for the length of a `with`: to read, not to compute with.

        Every rank must enter and leave. Below ZeRO 3 weights are always whole, and so is what is not in the engine.
        """
        parameters = chain.from_iterable(module.parameters() for module in modules)
        with self._gather(parameters if self.zero_stage == 3 else ()):
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold all weights whole on every rank for the length of a `with`: each may run any part of the model, or none.

        Without gradients, and not in the middle of a step. Every rank must enter and leave, and have room for all
        weights. Below ZeRO 3 it does nothing.
        """
        if self.zero_stage < 3:
            yield
            return
        offload = self._engine.optimizer.parameter_offload
        offload.partition_all_parameters()  # one state to begin with, whatever the last step left whole
        with self.gather([self.model]):
            # Its hooks would shard each module's weights after its forward, and meet the other ranks to gather them.
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def copy_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict of a part of the model as CPU copies, whole on every rank; every rank must call it.

        Under ZeRO 3 one tensor is gathered after the other: the device need not have room for all of them.
        """
        state: dict[str, Tensor] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            with self._gather([tensor] if self.zero_stage == 3 else ()):
                state[name] = tensor.detach().cpu().clone().contiguous()
        return state

    def _gather(self, tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
        """DeepSpeed's context for those of `tensors` that are sharded now."""
        import deepspeed

        # Small ones stay whole between steps; leaving the context would shard them too. Buffers never are sharded.
        sharded = [t for t in tensors if hasattr(t, "ds_status") and t.ds_status.name == "NOT_AVAILABLE"]
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
        return context

    def copy_part(self) -> StatePart:
        """This rank's part of weights, optimizer and loss scale, as copies that the next step leaves alone."""
        return copy_part(
            self.model,
            self._engine.optimizer,
            self.zero_stage,
            rank=get_rank(),
            world_size=get_world_size(),
            loss_scale=None if self.loss_scale is None else asdict(self.loss_scale),
        )

    def load(self, folder: Path) -> None:
        """Read the checkpoint `folder`, written by any number of ranks under any ZeRO stage; every rank must call it.

        Also after a step that was not applied: nothing of it stays.
        """
        self.discard()
        loss_scale = load_state(folder, self.model, self._engine.optimizer, self.zero_stage, get_rank())
        self.loss_scale = None if loss_scale is None else LossScale(**loss_scale)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers and end the process group.

        DeepSpeed keeps subgroups of its own; only its own way of ending the group forgets them, and a second run in
        this process would else talk to groups that are gone.
        """
        import deepspeed

        self._engine.destroy()
        functional.linear = self._linear
        deepspeed.comm.destroy_process_group()


def stack_sums(loss: Tensor, metrics: Sequence[Metric]) -> Tensor:
    """Loss and metrics of one micro batch as float32 [1 + num_metrics, 2]: sum and count, to be added up."""
    one = torch.ones((), device=loss.device)
    means = [metric if isinstance(metric, Mean) else Mean(metric, one) for metric in (loss, *metrics)]
    return torch.stack([part.detach().float() for mean in means for part in (mean.total, mean.count)]).view(-1, 2)


def compute_means(sums: Tensor) -> list[float | None]:
    """Sums and counts [N, 2], added up over micro batches and ranks (or averaged: that cancels) -> N means."""
    return [total / count if count else None for total, count in sums.tolist()]


def _initialise_deepspeed(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    with _quiet_deepspeed():
        import deepspeed
        import deepspeed.ops

        # On CPU DeepSpeed compiles a shared-memory all-reduce at its first start, and crashes where ninja or a C++
        # compiler is missing. It skips an operator that is marked as not compatible; gloo does the work instead.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed reads LOCAL_RANK, at its start and in ZeRO-3's steps; only launchers set it.
        os.environ.setdefault("LOCAL_RANK", str(get_local_rank()))
        try:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        except (ValueError, TypeError) as error:  # pydantic's errors are ValueErrors: a key that DeepSpeed refuses
            raise UserError(f"deepspeed: {' '.join(str(error).split())}") from error
    return engine


@contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed greets with a page of warnings (on stdout); errors still come through."""
    # Its calls into torch.distributed use names that torch 2.14 deprecates: theirs to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
