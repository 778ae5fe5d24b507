"""Protocol `finetune`: the whole encoder is trained on the labelled images, with a linear head.

    stored images -> light augmentation -> encoder (a copy) -> head -> cross-entropy -> AdamW, layer-wise rates, cosine
    test images -> the encoder's own evaluation transform -> softmax -> scores [M, K]

The number of epochs is fixed in advance: no epoch is picked on the val or test fold. The head starts as the linear
probe on the frozen features (LP-FT, Kumar et al. 2022, arXiv 2202.10054): with few labels a random head would first
distort the features that it is meant to refine.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from panfm.config import config_class
from panfm.data.transforms import AugmentConfig, Scale, augment_view
from panfm.encoder.load import Encoder
from panfm.encoder.network import EncoderNetwork
from panfm.errors import UserError
from panfm.evaluation.linear_probe import LinearProbeConfig, describe_fit, fit_linear_probe
from panfm.evaluation.protocol import Scored, Trial
from panfm.measures.probe import Probe
from panfm.progress import progress_bar
from panfm.shards.index import ShardSet


@config_class
class FinetuneConfig:
    """Settings of fine-tuning."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""
    epochs: int = Field(default=15, ge=1)
    """Passes over the labelled images; fixed, nothing is picked on held-out images."""
    batch_size: int = Field(default=32, ge=1)
    """Images a step."""
    base_lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate of the head and the last layer."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Each layer below the head learns at this share of the rate of the one above: early layers are already general."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's decoupled decay; none on norms and biases."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Linear warm-up, then cosine to zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping by global norm."""
    balance: Literal["none", "loss", "sampler"] = "none"
    """loss = weights of 1 / (images of the class); sampler = classes drawn equally often; none = calibrated scores."""
    head: Literal["linear_probe", "zero"] = "linear_probe"
    """How the head starts: as the linear probe on the frozen features, or at zero."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto = bf16 autocast on a GPU that has it, else fp32; bf16 also halves the time on CPUs with AVX512-BF16."""
    crop_scale: Scale = (0.5, 1.0)
    """Area share of the random crops. Light: a lesion must not leave the picture."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode and augment; 0 = in this process. Scores do not depend on it."""


class _TrainImages(Dataset[tuple[Tensor, int]]):
    """Item (step position, place in train) -> (augmented uint8 [3, S, S], label); a pure function of the item."""

    def __init__(self, trial: Trial, shard_set: ShardSet, augment: AugmentConfig) -> None:
        self.rows = trial.split.rows[trial.train]  # [N]
        self.labels = trial.split.labels[trial.train]
        self.modalities = shard_set.table.column("modality").take(self.rows).to_pylist()
        self.shard_set, self.augment, self.seed = shard_set, augment, trial.seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        position, place = item
        rng = np.random.Generator(np.random.PCG64([self.seed, position]))
        data = self.shard_set.read_image(int(self.rows[place]))
        view = augment_view(data, self.modalities[place], rng, self.augment)
        return torch.from_numpy(view), int(self.labels[place])


class _TestImages(Dataset[Tensor]):
    def __init__(self, trial: Trial, shard_set: ShardSet, encoder: Encoder) -> None:
        self.rows = trial.split.rows[trial.test]
        self.shard_set, self.transform = shard_set, encoder.transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Tensor:
        return torch.from_numpy(self.transform.apply(self.shard_set.read_image(int(self.rows[place]))))


def score_finetune(
    trial: Trial,
    features: NDArray[np.float32],
    encoder: Encoder,
    shard_set: ShardSet,
    config: FinetuneConfig,
) -> Scored:
    """Fine-tune a copy of the encoder on the trial's labelled images and score its test part.

    features: [N, D] frozen features of all images of the split, for the head's start. The same trial, config and
    number of threads give the same scores. Raises UserError if the loss is no longer finite.
    """
    # Stochastic depth and the data loader draw from torch's own generator: seeded here, and put back afterwards.
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(trial.seed)
        network = copy.deepcopy(encoder.module).float().requires_grad_(True)
        head = nn.Linear(features.shape[1], trial.num_classes).to(encoder.device)
        chosen = _start_head(head, trial, features, config)
        chosen |= _train(network, head, trial, encoder, shard_set, config)
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
    batches = list(_plan_batches(trial, config))
    warmup_steps = round(config.warmup_epochs * len(batches) / config.epochs)
    optimizer = _build_optimizer(network, head, config)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = [*network.parameters(), *head.parameters()]
    class_weight = _compute_class_weight(trial).to(device) if config.balance == "loss" else None

    images = _TrainImages(trial, shard_set, _build_augment(encoder, config))
    loader = DataLoader(images, batch_sampler=batches, num_workers=config.workers)
    loss = torch.zeros(())
    with progress_bar(f"fine-tune on {trial.card.name}", len(batches), unit="steps") as advance:
        _set_train_mode(network)
        for step, (views, labels) in enumerate(loader):
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = peak_lr * _compute_lr_share(step, len(batches), warmup_steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = head(network(encoder.transform.normalise(views.to(device))))  # [B, K]
            loss = F.cross_entropy(logits.float(), labels.to(device), weight=class_weight)
            if not torch.isfinite(loss):
                raise UserError(
                    f"fine-tuning {trial.encoder.name} on {trial.card.name}: the loss is {loss.item()} at step {step}; "
                    f"lower finetune.base_lr ({config.base_lr:g})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            advance(note=f"loss {loss.item():.3f}")
    precision = "bf16" if autocast else "fp32"
    return {"precision": precision, "num_steps": len(batches), "final_loss": round(loss.item(), 4)}


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
    images = _TestImages(trial, shard_set, encoder)
    scores = []
    with progress_bar(f"score {trial.card.name}", len(images)) as advance:
        for views in DataLoader(images, batch_size=2 * config.batch_size, num_workers=config.workers):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = head(network(encoder.transform.normalise(views.to(device))))
            scores.append(logits.double().softmax(dim=1).cpu().numpy())
            advance(len(views))
    return np.concatenate(scores)


def _compute_class_weight(trial: Trial) -> Tensor:
    """1 / (labelled images of the class), with mean 1 over the images; 0 for a class without any: float32 [K]."""
    counts = np.bincount(trial.split.labels[trial.train], minlength=trial.num_classes)
    inverse = np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / (counts > 0).sum(), 0.0)
    return torch.tensor(inverse, dtype=torch.float32)


def _plan_batches(trial: Trial, config: FinetuneConfig) -> Iterator[list[tuple[int, int]]]:
    """Yield the batches of the whole training, each a list of (position in the stream, place in train)."""
    labels = trial.split.labels[trial.train]
    rng = np.random.Generator(np.random.PCG64([trial.seed, len(labels)]))
    counts = np.bincount(labels, minlength=trial.num_classes)
    share = 1 / counts[labels]
    position = 0
    for _ in range(config.epochs):
        if config.balance == "sampler":
            order = rng.choice(len(labels), size=len(labels), p=share / share.sum())
        else:
            order = rng.permutation(len(labels))
        for start in range(0, len(order), config.batch_size):
            places = order[start : start + config.batch_size].tolist()
            yield [(position + offset, place) for offset, place in enumerate(places)]
            position += len(places)


def _build_optimizer(network: EncoderNetwork, head: nn.Linear, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW with one group a layer: base_lr for the head, times layer_decay for each layer further down."""
    groups = param_groups_layer_decay(network.model, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    for group in groups:
        # timm counts its own (absent) classifier as the last layer, so the last block is one decay below the head.
        group["lr"] = config.base_lr * group.pop("lr_scale")
    groups.append({"params": [head.weight], "lr": config.base_lr, "weight_decay": config.weight_decay})
    groups.append({"params": [head.bias], "lr": config.base_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999))


def _compute_lr_share(step: int, num_steps: int, warmup_steps: int) -> float:
    """Share of the peak rate at a step: linear from 1 / warmup_steps to 1, then half a cosine towards 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(num_steps - warmup_steps, 1)))


def _set_train_mode(network: nn.Module) -> None:
    """Train mode, but batch norms keep their statistics: small batches of few images would spoil them."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


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
