"""Protocol `finetune`: the encoder itself is trained on the labelled images, with a linear head.

    stored images -> light augmentation, mixing -> encoder (a copy) -> head -> cross-entropy -> optimizer -> the copy
    test images -> the encoder's own evaluation transform -> softmax (mean over views) -> scores [M, K]

The number of epochs is fixed in advance: no epoch is picked on the val or test fold. The head starts as the linear
probe on the frozen features (LP-FT, Kumar et al. 2022, arXiv 2202.10054): with few labels a random head would first
distort the features that it is meant to refine.

One run measures several recipes, a variant on the board each: `variants` names them, `recipes` says in what each
differs from the settings beside it.
"""

import copy
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader

from panfm.config import config_class, to_plain, validate
from panfm.data.transforms import AugmentConfig, Scale
from panfm.encoder.load import Encoder
from panfm.encoder.network import EncoderNetwork
from panfm.errors import UserError
from panfm.evaluation.finetune_images import TestImages, TrainImages, mix_batch, plan_batches, turn_views
from panfm.evaluation.finetune_network import (
    Trained,
    build_optimizer,
    choose_trained,
    merge_lora,
    set_drop_path,
    set_train_mode,
)
from panfm.evaluation.linear_probe import LinearProbeConfig, describe_fit, fit_linear_probe
from panfm.evaluation.protocol import Scored, Trial
from panfm.measures.probe import Probe
from panfm.progress import progress_bar
from panfm.shards.index import ShardSet

# What a shipped recipe changes. LoRA's factors begin at nothing and are few: they take a higher rate, and no decay.
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"train": "lora", "base_lr": 2e-3, "layer_decay": 1.0, "weight_decay": 0.0},
    "last_blocks": {"train": "last_blocks"},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "sampler": {"balance": "sampler"},
    "tta": {"test_views": 8},
}
STAIRCASE_EPOCHS, STAIRCASE_FACTOR = 30, 16.0  # Esteva et al. 2017


@config_class
class FinetuneConfig:
    """Settings of fine-tuning."""

    variants: tuple[str, ...] = ("default",)
    """Recipes to measure, a section on the board each: default = the settings below, else a name in `recipes`."""
    recipes: dict[str, dict[str, Any]] = Field(default_factory=lambda: copy.deepcopy(RECIPES))
    """Name -> what the recipe changes of the settings below: {lora: {train: lora, base_lr: 2.0e-3}}."""
    epochs: int = Field(default=15, ge=1)
    """Passes over the labelled images; fixed, nothing is picked on held-out images."""
    batch_size: int = Field(default=32, ge=1)
    """Images a step."""
    train: Trained = "full"
    """full = every weight; lora = a low-rank change of the projections (of a CNN's convolutions), merged for scoring;
    last_blocks = the last blocks alone. The head learns in each."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank of that change; the lower, the fewer numbers are learned."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """The change counts alpha / rank times, so that another rank needs no other rate."""
    num_last_blocks: int = Field(default=2, ge=1)
    """Blocks that learn with last_blocks, counted as timm counts layers."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """rmsprop = TensorFlow's, with the constants of Esteva et al. 2017."""
    base_lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate of the head and the last layer."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Each layer below the head learns at this share of the rate of the one above: early layers are already general."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decay of the weights: AdamW's decoupled one, rmsprop's as L2; none on norms and biases."""
    schedule: Literal["cosine", "staircase"] = "cosine"
    """After the warm-up: half a cosine to zero, or a 16th every 30 epochs (Esteva et al. 2017)."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Linear warm-up of the rate."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradient clipping by global norm; null = none."""
    batch_norm: Literal["frozen", "trained"] = "frozen"
    """frozen = batch norms keep the statistics of the pretraining: small batches of few images would spoil them.
    trained = they follow the batches; for large batches, and for random weights, which have no statistics."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of residual branches that are left out at random, in the last block; less in those before it."""
    mixup: float = Field(default=0.0, ge=0)
    """Mean of two images, their share from Beta(mixup, mixup); 0 = off."""
    cutmix: float = Field(default=0.0, ge=0)
    """A rectangle of one image in the other, its share from Beta(cutmix, cutmix); 0 = off. With both: either."""
    balance: Literal["none", "loss", "sampler"] = "none"
    """loss = weights of 1 / (images of the class); sampler = classes drawn equally often; none = calibrated scores."""
    head: Literal["linear_probe", "zero"] = "linear_probe"
    """How the head starts: as the linear probe on the frozen features, or at zero."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto = bf16 autocast on a GPU that has it, else fp32; bf16 also halves the time on CPUs with AVX512-BF16."""
    crop_scale: Scale = (0.5, 1.0)
    """Area share of the random crops. Light: a lesion must not leave the picture."""
    test_views: Literal[1, 8] = 1
    """8 = scores are the mean over an image's four turns and their mirror images: eight times the time of scoring."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode and augment; 0 = in this process. Scores do not depend on it."""


def resolve_recipe(config: FinetuneConfig, variant: str) -> FinetuneConfig:
    """Return the settings of one variant, without recipes of its own.

    Raises UserError for a variant that is not among the recipes, and for a setting that a recipe gets wrong.
    """
    if variant != "default" and variant not in config.recipes:
        known = ", ".join(["default", *config.recipes])
        raise UserError(f"finetune.variants ({variant}): no such recipe; known: {known}; add it to finetune.recipes")
    changes = {} if variant == "default" else config.recipes[variant]
    inner = sorted({"variants", "recipes"} & set(changes))
    if inner:
        raise UserError(f"finetune.recipes.{variant}: a recipe has no {inner[0]} of its own; name plain settings")
    values = {**to_plain(config), "variants": [variant], "recipes": {}, **changes}
    return validate(FinetuneConfig, values, where=f"finetune.recipes.{variant}")


def describe_recipe(config: FinetuneConfig, variant: str) -> dict[str, Any]:
    """The settings of one variant as plain values, `variant` among them: what a Result holds as its recipe."""
    settings: dict[str, Any] = to_plain(resolve_recipe(config, variant))
    del settings["variants"], settings["recipes"]
    return {**settings, "variant": variant}


def score_finetune(
    trial: Trial,
    features: NDArray[np.float32],
    encoder: Encoder,
    shard_set: ShardSet,
    config: FinetuneConfig,
) -> Scored:
    """Fine-tune a copy of the encoder on the trial's labelled images and score its test part.

    features: [N, D] frozen features of all images of the split, for the head's start. The same trial, config and
    number of threads give the same scores. Raises UserError if the loss is no longer finite, and for a recipe that the
    encoder's architecture does not allow.
    """
    config = resolve_recipe(config, trial.recipe["variant"])
    # Stochastic depth and the data loader draw from torch's own generator: seeded here, and put back afterwards.
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(trial.seed)
        network = copy.deepcopy(encoder.module).float()
        choose_trained(
            network,
            config.train,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            num_last_blocks=config.num_last_blocks,
        )
        set_drop_path(network, config.drop_path)
        head = nn.Linear(features.shape[1], trial.num_classes).to(encoder.device)
        chosen = _start_head(head, trial, features, config)
        chosen |= _train(network, head, trial, encoder, shard_set, config)
        merge_lora(network)
        scores = _score(network, head, trial, encoder, shard_set, config)
    return Scored(scores=scores, chosen=chosen)


def _start_head(head: nn.Linear, trial: Trial, features: NDArray[np.float32], config: FinetuneConfig) -> dict[str, Any]:
    if config.head == "linear_probe":
        fit = fit_linear_probe(trial, features, LinearProbeConfig())
        _copy_probe(fit.probe, head)
        return {"head": describe_fit(fit)}
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return {}


def _train(
    network: EncoderNetwork,
    head: nn.Linear,
    trial: Trial,
    encoder: Encoder,
    shard_set: ShardSet,
    config: FinetuneConfig,
) -> dict[str, Any]:
    """Train network and head in place; returns what a reader of the Result should know."""
    device, autocast = encoder.device, _choose_autocast(config.precision, encoder.device)
    batches = list(
        plan_batches(
            trial,
            epochs=config.epochs,
            batch_size=config.batch_size,
            balanced=config.balance == "sampler",
            min_batch=2 if config.batch_norm == "trained" else 1,  # one image has no spread to normalise by
        )
    )
    rates = _list_lr_shares(len(batches), config)
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
    class_weight = _compute_class_weight(trial).to(device) if config.balance == "loss" else None

    images = TrainImages(trial, shard_set, _build_augment(encoder, config))
    loader = DataLoader(images, batch_sampler=batches, num_workers=config.workers)
    loss = torch.zeros(())
    with progress_bar(f"fine-tune on {trial.card.name}", len(batches), unit="steps") as advance:
        set_train_mode(network, config.batch_norm)
        for step, (views, labels) in enumerate(loader):
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = peak_lr * rates[step]
            batch = mix_batch(
                encoder.transform.normalise(views.to(device)),
                labels.to(device),
                mixup=config.mixup,
                cutmix=config.cutmix,
                seed=trial.seed,
                step=step,
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = head(network(batch.images)).float()  # [B, K]
            loss = batch.share * F.cross_entropy(logits, batch.labels, weight=class_weight)
            if batch.share < 1:
                loss = loss + (1 - batch.share) * F.cross_entropy(logits, batch.partner_labels, weight=class_weight)
            if not torch.isfinite(loss):
                raise UserError(
                    f"fine-tuning {trial.encoder.name} on {trial.card.name}: the loss is {loss.item()} at step {step}; "
                    f"lower finetune.base_lr ({config.base_lr:g})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            advance(note=f"loss {loss.item():.3f}")
    return {
        "precision": "bf16" if autocast else "fp32",
        "num_steps": len(batches),
        "final_loss": round(loss.item(), 4),
        "num_trained_parameters": sum(parameter.numel() for parameter in parameters),
    }


@torch.inference_mode()
def _score(
    network: EncoderNetwork,
    head: nn.Linear,
    trial: Trial,
    encoder: Encoder,
    shard_set: ShardSet,
    config: FinetuneConfig,
) -> NDArray[np.float64]:
    """Return probabilities [M, K] of the trial's test part, under the encoder's evaluation transform."""
    device, autocast = encoder.device, _choose_autocast(config.precision, encoder.device)
    network.eval()
    images = TestImages(trial, shard_set, encoder)
    scores = []
    with progress_bar(f"score {trial.card.name}", len(images)) as advance:
        for views in DataLoader(images, batch_size=2 * config.batch_size, num_workers=config.workers):
            normalised = encoder.transform.normalise(views.to(device))
            probabilities = []
            for turned in turn_views(normalised, config.test_views):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    logits = head(network(turned))
                probabilities.append(logits.double().softmax(dim=1))
            scores.append(torch.stack(probabilities).mean(dim=0).cpu().numpy())
            advance(len(views))
    return np.concatenate(scores)


def _compute_class_weight(trial: Trial) -> torch.Tensor:
    """1 / (labelled images of the class), with mean 1 over the images; 0 for a class without any: float32 [K]."""
    counts = np.bincount(trial.split.labels[trial.train], minlength=trial.num_classes)
    inverse = np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / (counts > 0).sum(), 0.0)
    return torch.tensor(inverse, dtype=torch.float32)


def _list_lr_shares(num_steps: int, config: FinetuneConfig) -> list[float]:
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


def _copy_probe(probe: Probe, head: nn.Linear) -> None:
    """Write a probe on standardised features as a linear head on the features themselves."""
    weight = probe.weight / probe.scale  # [K, D]
    # A class without a labelled image has bias -inf there; here it starts well below the least likely class.
    finite = np.isfinite(probe.bias)
    bias = np.where(finite, probe.bias, probe.bias[finite].min() - 5.0) - weight @ probe.mean
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))


def _choose_autocast(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16."""
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _build_augment(encoder: Encoder, config: FinetuneConfig) -> AugmentConfig:
    """The encoder's own image size, with the pretraining's mild colour and stain jitter and right-angle turns."""
    return AugmentConfig(
        image_size=encoder.image_size, crop_scale=config.crop_scale, histopathology_crop_scale=config.crop_scale
    )
