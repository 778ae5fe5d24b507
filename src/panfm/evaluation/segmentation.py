"""Protocol `segmentation`: where is the lesion, told from the frozen features of places by a small head.

    image -> maps of places (dense) -> head -> logits of the grid --bilinear--> the mask's own resolution -> pixels
    mask -> share of each structure in the cells of a coarse grid -> cross-entropy + Dice loss -> head

The encoder is frozen. Scores are counts of pixels at the resolution of the mask, whatever the encoder saw: the metrics
(Dice, Jaccard) are computed from them. The number of steps is fixed in advance; nothing is picked on held-out images.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.dense import Depths, PlaceMaps, open_maps
from panfm.evaluation.families import SegmentationTarget
from panfm.evaluation.masks import read_regions
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.segmentation_heads import GROUPS, LinearHead, PyramidHead
from panfm.progress import progress_bar

Head = Literal["linear", "upernet"]
PYRAMID_STRIDE = 8  # pixels of the encoder's image a place of the pyramid's grid
WARMUP_SHARE = 0.05  # of the steps, linear


@config_class
class SegmentationConfig:
    """Settings of segmentation."""

    variants: tuple[Head, ...] = ("linear", "upernet")
    """linear = one linear layer on the last places (says what the features hold, ranked); upernet = a small head over
    several depths (what a user would train on top)."""
    num_steps: int = Field(default=600, ge=1)
    """Steps of training, for every label fraction the same: few labels are seen more often, not shorter."""
    batch_size: int = Field(default=16, ge=2)
    """Images a step."""
    linear_rate: float = Field(default=3e-2, gt=0)
    """Peak rate of AdamW for the linear head, after a warm-up; a cosine takes it to 0. Its few weights, of standardised
    features, move by the rate a step at most: at 2e-3, 600 steps ended far from the optimum (Dice 0.72, not 0.87)."""
    upernet_rate: float = Field(default=2e-3, gt=0)
    """The same for the upernet head."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's decoupled decay, of weights and not of biases and norms."""
    width: int = Field(default=32, ge=GROUPS, multiple_of=GROUPS)
    """Channels of the upernet head; the publication's 512 serve 150 classes."""
    target_size: int = Field(default=56, ge=4)
    """Side of the grid on which the loss is computed: cells that a border cuts have a share, so it need not be fine."""
    cache_mib: int = Field(default=1024, ge=0)
    """Memory for maps that several steps and trials need, MiB; what does not fit is computed again each time."""


def score_segmentation(trial: Trial, material: Material, config: SegmentationConfig) -> Scored:
    """Train the head on the trial's labelled images; scores [M, 2S]: pixels shared with the mask, pixels predicted.

    targets of the answer [M, S]: pixels of the mask. The same trial, config and number of threads give the same counts.
    Raises UserError if the loss is no longer finite, and for masks that are not those of the card.
    """
    target = trial.card.target
    assert isinstance(target, SegmentationTarget)
    encoder = material.encoder
    depths: Depths = "last" if trial.recipe["variant"] == "linear" else "several"
    maps = open_maps(encoder, material.shard_set, depths, config.cache_mib << 20)
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the head's first weights are drawn from torch's own generator
        torch.manual_seed(trial.seed)
        first = maps.read(encoder, trial.split.rows[trial.train[:1]])
        head = _build_head(
            trial.recipe["variant"], [values.shape[1] for values in first], target, encoder.image_size, config
        )
        head = head.to(encoder.device)
        final_loss = _train(head, maps, trial, material, target, config)
    shared, predicted, true = _count_pixels(head.eval(), maps, trial, material, target, config)
    chosen = {
        "num_steps": config.num_steps,
        "final_loss": round(final_loss, 4),
        "grids": [list(values.shape[-2:]) for values in first],
        "num_parameters": sum(parameter.numel() for parameter in head.parameters()),
    }
    return Scored(scores=np.hstack([shared, predicted]), targets=true, chosen=chosen)


def _build_head(
    variant: Head, num_channels: list[int], target: SegmentationTarget, image_size: int, config: SegmentationConfig
) -> nn.Module:
    """Structures that exclude each other share a softmax with the background; others have a sigmoid each."""
    num_outputs = len(target.structures) + int(_is_exclusive(target))
    if variant == "linear":
        return LinearHead(num_channels, num_outputs)
    return PyramidHead(num_channels, num_outputs, config.width, max(1, image_size // PYRAMID_STRIDE))


def _is_exclusive(target: SegmentationTarget) -> bool:
    return len(target.structures) > 1 and not target.overlapping


def _train(
    head: nn.Module,
    maps: PlaceMaps,
    trial: Trial,
    material: Material,
    target: SegmentationTarget,
    config: SegmentationConfig,
) -> float:
    """Train the head in place; returns the mean loss of the last tenth of the steps."""
    variant: Head = trial.recipe["variant"]
    peak_rate = config.linear_rate if variant == "linear" else config.upernet_rate
    rows = trial.split.rows[trial.train]
    truth = _read_targets(rows, material, target, config.target_size)  # uint8 [N, S, G, G]
    weights = [parameter for parameter in head.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=peak_rate,
    )
    warmup = max(1, round(WARMUP_SHARE * config.num_steps))
    head.train()
    losses = []
    with progress_bar(f"segmentation head on {trial.card.name}", config.num_steps, unit="steps") as advance:
        for step, places in enumerate(_draw_batches(len(rows), trial.seed, config)):
            share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / config.num_steps))
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * share
            logits = _resize(head(maps.read(material.encoder, rows[places])), (config.target_size, config.target_size))
            loss = compute_loss(logits, truth[places].to(logits.device).float() / 255, exclusive=_is_exclusive(target))
            if not torch.isfinite(loss):
                raise UserError(
                    f"segmentation with {trial.encoder.name} on {trial.card.name}: the loss is {loss.item()} at step "
                    f"{step}; lower segmentation.{variant}_rate ({peak_rate:g})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            advance(note=f"loss {losses[-1]:.3f}")
    return float(np.mean(losses[-max(1, config.num_steps // 10) :]))


def compute_loss(logits: Tensor, truth: Tensor, *, exclusive: bool) -> Tensor:
    """Cross-entropy of the cells + 1 - Dice of the batch, the mean over structures (Milletari et al. 2016).

    logits: [B, O, G, G]. truth: [B, S, G, G], the share of each structure in a cell. exclusive: O = 1 + S, background
    first; else O = S. The Dice part weighs small structures as much as large ones, which the cells do not.
    """
    if exclusive:
        shares = torch.cat([1 - truth.sum(dim=1, keepdim=True), truth], dim=1)
        entropy = F.cross_entropy(logits, shares)
        predicted = logits.softmax(dim=1)[:, 1:]
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, truth)
        predicted = logits.sigmoid()
    shared = (predicted * truth).sum(dim=(0, 2, 3))
    both = predicted.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    # One more cell on both sides: a batch that lacks the structure is right where nothing is predicted.
    return entropy + (1 - (2 * shared + 1) / (both + 1)).mean()


def _draw_batches(num_images: int, seed: int, config: SegmentationConfig) -> Iterator[NDArray[np.int64]]:
    """Yield the places of each step's images; every image comes once before one comes twice."""
    rng = np.random.Generator(np.random.PCG64([seed, num_images]))
    waiting = np.zeros(0, dtype=np.int64)
    for _ in range(config.num_steps):
        while len(waiting) < config.batch_size:
            waiting = np.concatenate([waiting, rng.permutation(num_images)])
        yield waiting[: config.batch_size]
        waiting = waiting[config.batch_size :]


def _read_targets(rows: NDArray[np.int64], material: Material, target: SegmentationTarget, side: int) -> Tensor:
    """The share of each structure in the cells of a grid, in steps of 1 / 255: uint8 [N, S, side, side]."""
    truth = torch.empty((len(rows), len(target.structures), side, side), dtype=torch.uint8)
    for place, row in enumerate(rows):
        regions = torch.from_numpy(read_regions(material.shard_set, int(row), target)).float()
        truth[place] = (F.adaptive_avg_pool2d(regions, side) * 255).round().to(torch.uint8)
    return truth


@torch.inference_mode()
def _count_pixels(
    head: nn.Module,
    maps: PlaceMaps,
    trial: Trial,
    material: Material,
    target: SegmentationTarget,
    config: SegmentationConfig,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Pixels shared with the mask, predicted, and of the mask, of each test image and structure: each [M, S]."""
    rows = trial.split.rows[trial.test]
    counts = np.empty((3, len(rows), len(target.structures)))
    with progress_bar(f"score {trial.card.name}", len(rows)) as advance:
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            logits = head(maps.read(material.encoder, part))
            for place, row in enumerate(part):
                regions = read_regions(material.shard_set, int(row), target)  # [S, H, W]
                found = find_regions(logits[place], regions.shape[1:], exclusive=_is_exclusive(target))
                counts[:, start + place] = (found & regions).sum((1, 2)), found.sum((1, 2)), regions.sum((1, 2))
            advance(len(part))
    shared, predicted, true = counts
    return shared, predicted, true


def find_regions(logits: Tensor, size: tuple[int, ...], *, exclusive: bool) -> NDArray[np.bool_]:
    """Turn the logits of a grid [O, g, g] into regions bool [S, H, W] of `size` (H, W): the likelier answer a pixel."""
    fine = _resize(logits[None], (size[0], size[1]))[0]
    if not exclusive:
        return (fine > 0).cpu().numpy()
    best = fine.argmax(dim=0)
    return torch.stack([best == number for number in range(1, len(fine))]).cpu().numpy()


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
