"""How a step is computed, as a document, and what DeepSpeed is told about it.

    EngineConfig, number of ranks, the `deepspeed:` section  ->  compute_deepspeed_config  ->  DeepSpeed's dict
                                                             ->  compute_num_micro_batches, compute_num_threads

DeepSpeed's dict is computed, never written by hand: a number has one home, and a key that two places decide is an
error. engine.py does the rest.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from panfm.config import config_class, merge
from panfm.distributed import get_local_world_size, is_launched
from panfm.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}

# A number has one home: the DeepSpeed keys that our sections own, and the key to set instead.
OWNED_KEYS = {
    "train_batch_size": "engine.global_batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "engine.global_batch_size and engine.micro_batch_size",
    "managed_gradient_accumulation": "engine.global_batch_size and engine.micro_batch_size",
    "gradient_clipping": "engine.clip_grad_norm",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.compute_grad_norm": "engine.clip_grad_norm (the norm is always measured)",
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
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16, fp16: autocast with fp32 parameters, gradients and optimizer; fp32: everything in fp32. fp16 is for GPUs
    that lack bf16: the loss is scaled up while gradients do not overflow, and steps at which they do are skipped."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """1 shares the optimizer state among ranks, for half as much communication again, 2 also the gradients, 3 also the
    parameters (both send them after every micro batch): for models that do not fit otherwise. An EMA teacher stays
    whole at every stage. On one rank, where there is nothing to share, all run as 0. See docs/parallelism.md."""
    clip_grad_norm: float | None = Field(default=3.0, gt=0)
    """Largest L2 norm of the whole gradient; null leaves it alone (the norm is measured either way)."""
    compile: bool = False
    """torch.compile every encoder block: faster on GPUs after a minute's wait; on CPUs it needs a C++ compiler."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights, the sample stream, the masks, the augmentation and stochastic depth."""
    world_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of ranks that an elastic run may come to (launch/torchrun.sh sets them): the sizes above must divide for
    each of them, or the run is refused before it begins. Empty: the number that it begins with."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads a rank; null: OMP_NUM_THREADS where you set it, else this machine's cores over its ranks."""


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
    section = extra.get("zero_optimization")
    for key in section if isinstance(section, Mapping) and config.zero_stage < 3 else ():
        if key.startswith("stage3_") or key == "offload_param":
            raise UserError(
                f"deepspeed.zero_optimization.{key}: only ZeRO 3 looks at it and engine.zero_stage is "
                f"{config.zero_stage}; set engine.zero_stage=3, or remove the key"
            )
    for key in ("offload_optimizer", "offload_param"):
        if _has_path(extra, f"zero_optimization.{key}.device") and extra["zero_optimization"][key]["device"] == "nvme":
            raise UserError(
                f"deepspeed.zero_optimization.{key}.device: nvme keeps numbers where a checkpoint does not find them; "
                "use device: cpu"
            )
    dtype = AUTOCAST[config.precision]
    zero_stage = compute_zero_stage(config, world_size, extra)
    if config.compile and zero_stage == 3:
        raise UserError(
            "engine.compile=true with engine.zero_stage=3: DeepSpeed gathers a block's weights in hooks that would be "
            "compiled with it, which was never shown to be right; set engine.compile=false, or engine.zero_stage=2"
        )
    computed: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": compute_num_micro_batches(config, world_size),
        # Stage 0 clips in Engine.step: DeepSpeed's own clipping there does not say what the norm was.
        "gradient_clipping": (config.clip_grad_norm or 0.0) if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW is elementwise, so it may work on flat partitions
        "torch_autocast": {
            "enabled": dtype is not None,
            "dtype": str(dtype or torch.bfloat16).removeprefix("torch."),
            # DeepSpeed would sum the gradients of these modules over ranks in bf16; an empty list keeps fp32 sums,
            # so that the loss does not depend on the number of ranks beyond rounding.
            "lower_precision_safe_modules": [],
        },
    }
    return merge(extra, computed)


def compute_zero_stage(config: EngineConfig, world_size: int, extra: Mapping[str, Any]) -> int:
    """The ZeRO stage that runs: on one rank 1 to 3 shard nothing and cost copies (15 % of a ViT-Small step on CPU).

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


def _has_path(values: Mapping[str, Any], path: str) -> bool:
    node: Any = values
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
