"""The training of a fine-tuning: a copy of an encoder's network and a linear head learn from batches of views.

    encoder -> copy_network -> (network, head) -- views, labels --> mixing -> cross-entropy -> optimizer -> the same two

The protocol `finetune` and `panfm adapt --method lora` train by it; they differ in where their images come from.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfm.data.transforms import AugmentConfig
from panfm.encoder.load import Encoder
from panfm.encoder.network import EncoderNetwork
from panfm.errors import UserError
from panfm.evaluation.finetune_images import mix_batch
from panfm.evaluation.finetune_network import build_optimizer, choose_trained, set_drop_path, set_train_mode
from panfm.evaluation.finetune_recipes import FinetuneConfig
from panfm.measures.probe import Probe
from panfm.progress import progress_bar

STAIRCASE_EPOCHS, STAIRCASE_FACTOR = 30, 16.0  # Esteva et al. 2017


@dataclass(frozen=True)
class Stream:
    """Batches of views, uint8 [B, 3, S, S], and their labels, int64 [B]; num_batches in all.

    seed: of the mixing. description: what the progress bar says. name, way_out: for the error of a loss that is not
    finite: what was trained, and what to change.
    """

    batches: Iterable[tuple[Tensor, Tensor]]
    num_batches: int
    seed: int
    description: str
    name: str
    way_out: str


def copy_network(encoder: Encoder, config: FinetuneConfig) -> EncoderNetwork:
    """Copy the network in float32, such that what the recipe trains learns; LoRA's factors are drawn by torch.

    Raises UserError for a recipe that the architecture does not allow.
    """
    network = copy.deepcopy(encoder.module).float()
    choose_trained(
        network,
        config.train,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        num_last_blocks=config.num_last_blocks,
    )
    set_drop_path(network, config.drop_path)
    return network


def build_head(probe: Probe) -> nn.Linear:
    """Write a probe on standardised features as a linear head on the features themselves."""
    weight = probe.weight / probe.scale  # [K, D]
    # A class without a labelled image has bias -inf there; here it starts well below the least likely class.
    finite = np.isfinite(probe.bias)
    bias = np.where(finite, probe.bias, probe.bias[finite].min() - 5.0) - weight @ probe.mean
    head = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return head


def train_network(
    network: EncoderNetwork,
    head: nn.Linear,
    stream: Stream,
    encoder: Encoder,
    config: FinetuneConfig,
    class_weight: Tensor | None = None,
) -> dict[str, Any]:
    """Train network and head in place; returns what a reader of the Result should know.

    encoder: whose normalisation and device it is. class_weight: float32 [K]. Raises UserError if the loss is no longer
    finite.
    """
    device, autocast = encoder.device, choose_autocast(config.precision, encoder.device)
    rates = list_lr_shares(stream.num_batches, config)
    optimizer = build_optimizer(
        network,
        head,
        optimizer=config.optimizer,
        base_lr=config.base_lr,
        layer_decay=config.layer_decay,
        weight_decay=config.weight_decay,
    )
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = torch.zeros(())
    with progress_bar(stream.description, stream.num_batches, unit="steps") as advance:
        set_train_mode(network, config.batch_norm)
        for step, (views, labels) in enumerate(stream.batches):
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = peak_lr * rates[step]
            batch = mix_batch(
                encoder.transform.normalise(views.to(device)),
                labels.to(device),
                mixup=config.mixup,
                cutmix=config.cutmix,
                seed=stream.seed,
                step=step,
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = head(network(batch.images)).float()  # [B, K]
            loss = batch.share * F.cross_entropy(logits, batch.labels, weight=class_weight)
            if batch.share < 1:
                loss = loss + (1 - batch.share) * F.cross_entropy(logits, batch.partner_labels, weight=class_weight)
            if not torch.isfinite(loss):
                raise UserError(f"{stream.name}: the loss is {loss.item()} at step {step}; {stream.way_out}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            advance(note=f"loss {loss.item():.3f}")
    return {
        "precision": "bf16" if autocast else "fp32",
        "num_steps": stream.num_batches,
        "final_loss": round(loss.item(), 4),
        "num_trained_parameters": sum(parameter.numel() for parameter in parameters),
    }


def list_lr_shares(num_steps: int, config: FinetuneConfig) -> list[float]:
    """Share of the peak rate at each step: linear from 1 / warm-up steps to 1, then as the schedule says."""
    warmup = round(config.warmup_epochs * num_steps / config.epochs)
    shares = [(step + 1) / warmup for step in range(min(warmup, num_steps))]
    for step in range(len(shares), num_steps):
        if config.schedule == "staircase":
            epoch = step * config.epochs // num_steps
            shares.append(STAIRCASE_FACTOR ** -(epoch // STAIRCASE_EPOCHS))
        else:
            shares.append(0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1))))
    return shares


def choose_autocast(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16."""
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def build_augment(encoder: Encoder, config: FinetuneConfig) -> AugmentConfig:
    """The encoder's own image size, with the pretraining's mild colour and stain jitter and right-angle turns."""
    return AugmentConfig(
        image_size=encoder.image_size, crop_scale=config.crop_scale, histopathology_crop_scale=config.crop_scale
    )
