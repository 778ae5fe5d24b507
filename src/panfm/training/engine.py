"""One optimizer step on one process or a thousand: the only file that imports DeepSpeed.

    EngineConfig + OptimConfig  ->  DeepSpeed's dict (computed, never written by hand)  ->  Engine
    Engine.step(micro batches of this rank, lr)  ->  StepOutput (means over micro batches and ranks)

The parameters stay fp32 at every precision; bf16 means that the forward pass runs under autocast. ZeRO 0 keeps the
whole optimizer on every rank, 1 shards its state, 2 also the gradients. ZeRO 3, which shards the parameters too, is not
offered: the encoder looks at visible patches only and for that uses its embedding's weights outside of the embedding's
forward, where DeepSpeed does not gather them (tried: the backward pass meets an empty position embedding). Only the
student and its heads are wrapped: a frozen teacher is no part of the module tree.
"""

import ctypes
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class, merge
from panfm.data.batch import Batch
from panfm.distributed import (
    all_reduce_mean,
    get_local_rank,
    get_local_world_size,
    get_rank,
    get_world_size,
    is_launched,
)
from panfm.errors import UserError
from panfm.files import compute_sha256
from panfm.objectives.interface import Mean, Metric
from panfm.optim import OptimConfig, build_optimizer, build_param_groups, set_lr

STATE_TAG = "state"  # DeepSpeed's folder inside a checkpoint
MASKED_NORM = -1.0  # what DeepSpeed's ZeRO optimizers report instead of a norm that is not finite

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

# What DeepSpeed's own checkpoint files hold besides tensors and plain values. Everything else is refused at loading.
SAFE_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

# A number has one home: the DeepSpeed keys that our sections own, and the key to set instead.
OWNED_KEYS = {
    "train_batch_size": "engine.global_batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "engine.global_batch_size and engine.micro_batch_size",
    "gradient_clipping": "engine.clip_grad_norm",
    "zero_optimization.stage": "engine.zero_stage",
    "torch_autocast": "engine.precision",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "optimizer": "optim",
    "scheduler": "schedule",
    "zero_allow_untested_optimizer": "optim",
    "wandb": "tracking",
    "tensorboard": "tracking",
    "csv_monitor": "tracking",
}


@config_class
class EngineConfig:
    """How a step is computed: sizes, precision, sharding."""

    global_batch_size: int = Field(default=1024, ge=1)
    """Samples an optimizer step, over all ranks and micro batches."""
    micro_batch_size: int = Field(default=64, ge=1)
    """Samples a forward pass on one rank: what fits into memory; the rest is gradient accumulation."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast with fp32 parameters, gradients and optimizer; fp32: everything in fp32."""
    zero_stage: Literal[0, 1, 2] = 1
    """1 shards the optimizer state over ranks at no extra communication, 2 also the gradients. On one rank, where there
    is nothing to share, both run as 0."""
    clip_grad_norm: float | None = Field(default=3.0, gt=0)
    """Largest L2 norm of the whole gradient; null leaves it alone (the norm is measured either way)."""
    compile: bool = False
    """torch.compile every encoder block: faster on GPUs after a minute's wait; on CPUs it needs a C++ compiler."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights, the sample stream, the masks, the augmentation and stochastic depth."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads a rank; null: OMP_NUM_THREADS where you set it, else this machine's cores over its ranks."""


@dataclass(frozen=True)
class StepOutput:
    """What one step says: means over its micro batches and all ranks; None: a mean of no example at all.

    `applied` is False where the loss or the gradient was not finite and the weights were therefore left alone;
    grad_norm (before clipping) is None where it was not finite or not measured.
    """

    loss: float
    metrics: dict[str, float | None]
    grad_norm: float | None
    applied: bool


def compute_num_micro_batches(config: EngineConfig, world_size: int) -> int:
    """Micro batches a step on each rank; UserError where the sizes do not divide."""
    share = config.micro_batch_size * world_size
    if config.global_batch_size % share:
        better = max(round(config.global_batch_size / share), 1) * share
        raise UserError(
            f"engine.global_batch_size ({config.global_batch_size}) must be divisible by engine.micro_batch_size "
            f"({config.micro_batch_size}) x world_size ({world_size}); try engine.global_batch_size={better}"
        )
    return config.global_batch_size // share


def compute_deepspeed_config(config: EngineConfig, world_size: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Compute DeepSpeed's dict from ours and lay `extra` (the `deepspeed:` section) under it.

    A key of `extra` that one of our own sections decides is a UserError that names the key to set instead.
    """
    for key, ours in OWNED_KEYS.items():
        if _has_path(extra, key):
            raise UserError(f"deepspeed.{key}: this is computed from {ours}; set that and remove the deepspeed key")
    zero_stage = compute_zero_stage(config, world_size, extra)
    computed: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": compute_num_micro_batches(config, world_size),
        # Stage 0 clips in Engine.step: DeepSpeed's own clipping there does not say what the norm was.
        "gradient_clipping": (config.clip_grad_norm or 0.0) if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW is elementwise, so it may work on flat partitions
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            # DeepSpeed would sum the gradients of these modules over ranks in bf16; an empty list keeps fp32 sums,
            # so that the loss does not depend on the number of ranks beyond rounding.
            "lower_precision_safe_modules": [],
        },
    }
    return merge(extra, computed)


def compute_zero_stage(config: EngineConfig, world_size: int, extra: Mapping[str, Any]) -> int:
    """The ZeRO stage that runs: on one rank 1 and 2 shard nothing and cost copies (15 % of a ViT-Small step on CPU).

    A `deepspeed.zero_optimization` section (offloading, for example) keeps the stage as it is configured.
    """
    return 0 if world_size == 1 and "zero_optimization" not in extra else config.zero_stage


def compute_num_threads(config: EngineConfig) -> int:
    """CPU threads for this rank.

    torchrun sets OMP_NUM_THREADS=1 for its children where the user set nothing, which leaves most cores idle; so under
    torchrun a 1 is taken for torchrun's. `engine.num_threads=1` asks for one thread there.
    """
    if config.num_threads is not None:
        return config.num_threads
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and not (is_launched() and get_local_world_size() > 1 and asked == "1"):
        return int(asked)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    return max(num_cores // get_local_world_size(), 1)


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
    """A model, its optimizer and DeepSpeed behind four verbs: step, copy_state, save, load."""

    def __init__(
        self, model: nn.Module, encoder: nn.Module, config: EngineConfig, optim: OptimConfig, extra: Mapping[str, Any]
    ) -> None:
        """Wrap `model`; `encoder` is the part of it whose learning rates may decay by layer.

        The process group must stand. The model's forward takes a Batch and returns .loss (a scalar) and .metrics.
        """
        self.config = config
        self.num_micro_batches = compute_num_micro_batches(config, get_world_size())
        settings = compute_deepspeed_config(config, get_world_size(), extra)
        self.zero_stage: int = settings["zero_optimization"]["stage"]
        groups = build_param_groups(model, encoder, optim)
        self._engine = _initialise_deepspeed(model, build_optimizer(groups, optim), settings)
        if get_world_size() == 1 and self.zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # else every gradient is copied to be summed over one rank
        self._checkpoints = _build_checkpoint_engine()
        self._engine.checkpoint_engine = self._checkpoints
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
        weights alone on all of them.
        """
        assert len(micro_batches) == self.num_micro_batches, (len(micro_batches), self.num_micro_batches)
        self._seed(step)
        set_lr(self._engine.optimizer.param_groups, lr, freeze_encoder=freeze_encoder)
        rows: list[Tensor] = []
        names: list[str] = []
        caches = self._cache_gradients(micro_batches, step)
        for number, batch in enumerate(micro_batches, start=1):
            if caches:
                self._seed(step, number)
            output = self._engine(batch.to(self.device), *caches[number - 1 : number])
            self._engine.backward(output.loss)
            names = sorted(output.metrics)
            rows.append(stack_sums(output.loss, [output.metrics[name] for name in names]))
            if number < len(micro_batches):
                self._engine.step()  # only counts: DeepSpeed updates at the last micro batch
        loss, *means = compute_means(all_reduce_mean(torch.stack(rows).mean(dim=0)))
        assert loss is not None
        metrics = dict(zip(names, means, strict=True))
        self._has_leftovers = True
        if not math.isfinite(loss):
            return StepOutput(loss, metrics, grad_norm=None, applied=False)

        if self.zero_stage == 0:
            # The gradients are whole and summed over ranks here. clip_grad_norm_ would rewrite them all even where the
            # norm is below the limit.
            parameters = list(self.model.parameters())
            total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norm = float(total)
            if not math.isfinite(norm):
                return StepOutput(loss, metrics, grad_norm=None, applied=False)
            if norm > (self.config.clip_grad_norm or math.inf):
                nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad_norm or math.inf, total)
            self._finish_step()
            return StepOutput(loss, metrics, norm, applied=True)
        self._finish_step()
        measured = self._engine.get_global_grad_norm()
        norm = MASKED_NORM if measured is None else float(measured)
        return StepOutput(loss, metrics, norm if norm >= 0 and math.isfinite(norm) else None, applied=True)

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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            for number, batch in enumerate(micro_batches, start=1):
                self._seed(step, number)  # as in the pass with gradients
                there = batch.to(self.device)
                represented.append(model.represent(there))
                numbers.append(replace(there, views=(), masks=None, texts=None))  # pixels do not stay
            caches: list[Any] = model.cache_gradients(represented, numbers)
        return caches

    def copy_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict of a part of the model as CPU copies (whole on every rank at every ZeRO stage offered)."""
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}

    def save(self, folder: Path) -> str | None:
        """Write every rank's part of model and optimizer into `folder`/state; every rank must call it.

        Returns what went wrong on this rank (a full disk), or None: an exception on one rank only would leave the
        others waiting inside DeepSpeed.
        """
        self._checkpoints.failure = None
        self._engine.save_checkpoint(str(folder), tag=STATE_TAG, save_latest=False)
        if get_rank() == 0:
            for script in folder.glob("zero_to_*.py"):
                script.unlink()  # DeepSpeed adds conversion scripts; a checkpoint holds data only
        failure: str | None = self._checkpoints.failure
        return failure

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, at the same world size and ZeRO stage; every rank must call it.

        Also after a step that was not applied: nothing of it stays.
        """
        if self._has_leftovers:
            # DeepSpeed holds its gradients and counts its micro batches; applying them now spoils what is read next.
            self._finish_step()
        path, _ = self._engine.load_checkpoint(str(folder), tag=STATE_TAG)
        assert path is not None, folder

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers and end the process group.

        DeepSpeed keeps subgroups of its own; only its own way of ending the group forgets them, and a second run in
        this process would else talk to groups that are gone.
        """
        import deepspeed

        self._engine.destroy()
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


def _build_checkpoint_engine() -> Any:
    """DeepSpeed's torch checkpoint engine, made safe: loading runs no code, files reach the disk, failures are kept."""
    from importlib import import_module

    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    names = [name.rpartition(".") for name in SAFE_CLASSES]
    safe = [getattr(import_module(module), name) for module, _, name in names]

    class SafeCheckpointEngine(TorchCheckpointEngine):
        failure: str | None = None

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            try:
                with Path(path).open("wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
                self.failure = f"{path}: {' '.join(str(error).split())}"

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(safe):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpointEngine()


def _has_path(values: Mapping[str, Any], path: str) -> bool:
    node: Any = values
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
