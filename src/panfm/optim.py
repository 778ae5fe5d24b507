"""The optimizer's numbers: which parameter learns how fast, and the learning rate of every step as a pure function.

    model, OptimConfig                 ->  parameter groups (lr_scale, weight_decay)  ->  torch AdamW
    step, OptimConfig, ScheduleConfig  ->  learning rate (times each group's lr_scale)

Training and fine-tuning both build their optimizer here.
"""

import math
import re
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from panfm.config import config_class
from panfm.errors import UserError

REFERENCE_BATCH_SIZE = 256  # samples; base_lr is stated for it (Goyal et al. 2017, arXiv:1706.02677)
DECAYED_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.Bilinear)


@config_class
class OptimConfig:
    """AdamW and how its learning rate is spread over the layers."""

    base_lr: float = Field(default=1.5e-4, gt=0)
    """Learning rate for a global batch of 256 samples; the default is MAE's (arXiv:2111.06377)."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the rate grows with the global batch; linear is what MAE and DINO recipes state their base_lr for."""
    weight_decay: float = Field(default=0.05, ge=0)
    """On matrices and filters only; norms, biases, tokens, position embeddings and LayerScale get none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Memory of the gradient's mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Memory of its square; 0.95 instead of 0.999 forgets spikes sooner, as in MAE."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the rate from one encoder block to the one below; 1 from scratch, 0.65-0.85 from trained weights."""
    freeze_encoder_samples: int = Field(default=0, ge=0)
    """Samples at the start over which only the heads learn; 0 from scratch, 1000 to 2000 steps' worth from trained
    weights, which the gradients of random heads would pull apart. The encoder's rate is 0 meanwhile, and AdamW
    gathers its moments, so that its first step is as well measured as any."""


@config_class
class ScheduleConfig:
    """How long, and the shape of the learning rate over that length; lengths in samples, so that they survive a
    change of the batch size."""

    total_samples: int = Field(ge=1)
    """Samples drawn in the whole run; the number of steps is this over engine.global_batch_size, rounded up."""
    warmup_samples: int = Field(default=0, ge=0)
    """Samples over which the rate rises linearly from 0."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up."""
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate that is left at the last step (cosine and linear)."""


def compute_num_steps(schedule: ScheduleConfig, global_batch_size: int) -> int:
    """Number of optimizer steps of the run: total_samples / global_batch_size, rounded up."""
    return math.ceil(schedule.total_samples / global_batch_size)


def compute_peak_lr(optim: OptimConfig, global_batch_size: int) -> float:
    """The learning rate after the warm-up: base_lr scaled from 256 samples to the global batch."""
    ratio = global_batch_size / REFERENCE_BATCH_SIZE
    factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[optim.lr_scaling]
    return optim.base_lr * factor


def compute_lr(optim: OptimConfig, schedule: ScheduleConfig, step: int, global_batch_size: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then the schedule's shape.

    The warm-up's last step and the shape's first both have the peak rate; a rate of exactly 0 is never used in the
    warm-up, so that no step is wasted.
    """
    peak = compute_peak_lr(optim, global_batch_size)
    num_steps = compute_num_steps(schedule, global_batch_size)
    num_warmup_steps = math.ceil(schedule.warmup_samples / global_batch_size)
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    progress = min((step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1), 1.0)
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    if schedule.shape == "constant":
        return peak
    return peak * (schedule.final_lr_share + (1 - schedule.final_lr_share) * remaining[schedule.shape])


def is_encoder_frozen(optim: OptimConfig, step: int, global_batch_size: int) -> bool:
    """Whether only the heads learn at optimizer step `step` (0-based)."""
    return step * global_batch_size < optim.freeze_encoder_samples


def check_schedule(schedule: ScheduleConfig, optim: OptimConfig) -> None:
    """Refuse a warm-up that is longer than the run, of all weights or of the heads (UserError)."""
    if optim.freeze_encoder_samples >= schedule.total_samples:
        raise UserError(
            f"optim.freeze_encoder_samples ({optim.freeze_encoder_samples}) must be less than schedule.total_samples "
            f"({schedule.total_samples}), else the encoder never learns; 1 to 2 % of the run is usual"
        )
    if schedule.warmup_samples > schedule.total_samples:
        raise UserError(
            f"schedule.warmup_samples ({schedule.warmup_samples}) must not exceed schedule.total_samples "
            f"({schedule.total_samples}); shorten the warm-up, 5 to 10 % of the run is usual"
        )


def build_param_groups(model: nn.Module, encoder: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into AdamW groups {params, names, lr_scale, weight_decay, waits}.

    A group that waits has a rate of 0 while the heads warm up: the encoder's groups, if `optim` freezes it at all. The
    encoder's embeddings are layer 0, block i is layer i + 1, everything after the blocks and outside the encoder has
    lr_scale 1; a layer's lr_scale is layer_decay ** (distance from the top). Weight decay falls on the weights of
    linear layers and convolutions only. Groups come in a fixed order, from the bottom layer to the top.
    """
    num_layers = count_encoder_layers(encoder)
    encoder_names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    decayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, DECAYED_MODULES)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    }
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = get_layer(encoder_names[id(parameter)], num_layers) if id(parameter) in encoder_names else num_layers
        waits = optim.freeze_encoder_samples > 0 and id(parameter) in encoder_names
        key = (layer, waits, id(parameter) in decayed)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "lr_scale": optim.layer_decay ** (num_layers - layer),
                "weight_decay": optim.weight_decay if id(parameter) in decayed else 0.0,
                "waits": waits,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    ordered = [groups[key] for key in sorted(groups)]
    if optim.layer_decay == 1.0:
        return _merge_layers(ordered)
    return ordered


def count_encoder_layers(encoder: nn.Module) -> int:
    """Layers that layer decay counts: the embeddings, each block, and the top (final norm and heads)."""
    blocks = [int(found[1]) for name, _ in encoder.named_parameters() if (found := re.match(r"blocks\.(\d+)\.", name))]
    return max(blocks, default=-1) + 2


def get_layer(name: str, num_layers: int) -> int:
    """Layer of an encoder parameter by its timm name: embeddings and tokens 0, block i -> i + 1, the rest the top."""
    if found := re.match(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    at_the_bottom = name.startswith(("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre", "rope"))
    return 0 if at_the_bottom else num_layers


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups; fused, which updates each tensor in one pass on GPU and CPU alike."""
    without_names = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(
        without_names, lr=optim.base_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )


def set_lr(param_groups: list[dict[str, Any]], lr: float, *, freeze_encoder: bool = False) -> None:
    """Set every group's learning rate to `lr` times its own lr_scale; to 0 where it waits for the heads to warm up."""
    for group in param_groups:
        group["lr"] = 0.0 if freeze_encoder and group["waits"] else lr * group["lr_scale"]


def _merge_layers(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without layer decay fewer groups are enough: each is one launch of the optimizer and one ZeRO partition."""
    merged: dict[tuple[float, bool], dict[str, Any]] = {}
    for group in groups:
        known = merged.setdefault((group["weight_decay"], group["waits"]), {**group, "params": [], "names": []})
        known["params"] += group["params"]
        known["names"] += group["names"]
    return list(merged.values())
