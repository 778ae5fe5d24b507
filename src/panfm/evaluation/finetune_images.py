"""The images of a fine-tuning: in which order they are learned, how they are augmented and mixed, how they are scored.

    trial -> plan_batches -> (position, place) -> TrainImages: augmented uint8 [3, S, S], label -> mix_batch (on device)
    trial -> TestImages: the encoder's own evaluation transform -> turn_views: the image itself, or its eight views

All that is drawn depends on the seed and the place in the stream alone: neither on workers nor on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from panfm.data.transforms import AugmentConfig, augment_view
from panfm.encoder.load import Encoder
from panfm.evaluation.protocol import Trial
from panfm.shards.index import ShardSet

MIX_STREAM = 1  # keeps the draws of the mixing apart from those of the crops and of the order


class TrainImages(Dataset[tuple[Tensor, int]]):
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


class TestImages(Dataset[Tensor]):
    """Item: place in test -> uint8 [3, S, S] as the encoder's evaluation transform delivers it."""

    __test__ = False  # not a test of pytest's

    def __init__(self, trial: Trial, shard_set: ShardSet, encoder: Encoder) -> None:
        self.rows = trial.split.rows[trial.test]
        self.shard_set, self.transform = shard_set, encoder.transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Tensor:
        return torch.from_numpy(self.transform.apply(self.shard_set.read_image(int(self.rows[place]))))


def plan_batches(
    trial: Trial, *, epochs: int, batch_size: int, balanced: bool, min_batch: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """Yield the batches of the whole training, each a list of (position in the stream, place in train).

    balanced: classes are drawn equally often, with replacement; else every image once an epoch. A last batch of an
    epoch with fewer than `min_batch` images joins the one before it.
    """
    labels = trial.split.labels[trial.train]
    rng = np.random.Generator(np.random.PCG64([trial.seed, len(labels)]))
    share = 1 / np.bincount(labels, minlength=trial.num_classes)[labels]
    position = 0
    for _ in range(epochs):
        if balanced:
            order = rng.choice(len(labels), size=len(labels), p=share / share.sum())
        else:
            order = rng.permutation(len(labels))
        starts = list(range(0, len(order), batch_size))
        if len(starts) > 1 and len(order) - starts[-1] < min_batch:
            starts.pop()
        for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
            places = order[start:end].tolist()
            yield [(position + offset, place) for offset, place in enumerate(places)]
            position += len(places)


@dataclass(frozen=True)
class MixedBatch:
    """Images [B, 3, S, S], each `share` of its own and 1 - share of a partner: labels and partner_labels int64 [B]."""

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    share: float


def mix_batch(images: Tensor, labels: Tensor, *, mixup: float, cutmix: float, seed: int, step: int) -> MixedBatch:
    """Mix normalised images [B, 3, S, S] with those of the batch in another order; with both 0 nothing is changed.

    mixup (Zhang 2018, arXiv 1710.09412): the weighted mean of two images, share ~ Beta(mixup, mixup). cutmix (Yun 2019,
    arXiv 1905.04899): a rectangle of the partner in the image, share = the area that is left, its aim drawn from
    Beta(cutmix, cutmix). With both, each batch takes one of the two at even odds.
    """
    if mixup == 0 and cutmix == 0:
        return MixedBatch(images, labels, labels, 1.0)
    rng = np.random.Generator(np.random.PCG64([seed, step, MIX_STREAM]))
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup))
    partner = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    if cut:
        top, bottom, left, right = _draw_box(images.shape[2], images.shape[3], 1 - share, rng)
        images = images.clone()
        images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        images = share * images + (1 - share) * images[partner]
    return MixedBatch(images, labels, labels[partner], share)


def _draw_box(height: int, width: int, area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of this share of the area around a uniform middle, clipped to the image: (top, bottom, left, right)."""
    half_height, half_width = height * area**0.5 / 2, width * area**0.5 / 2
    y, x = rng.random() * height, rng.random() * width
    top, bottom = max(round(y - half_height), 0), min(round(y + half_height), height)
    left, right = max(round(x - half_width), 0), min(round(x + half_width), width)
    return top, bottom, left, right


def turn_views(images: Tensor, num_views: Literal[1, 8]) -> Iterator[Tensor]:
    """Yield the views of images [B, 3, S, S] whose scores are averaged: itself, or its turns and their mirror images.

    Skin has no up and no left, and right angles cost no interpolation (see data.transforms).
    """
    yield images
    if num_views == 8:
        for turns in range(1, 4):
            yield torch.rot90(images, turns, (2, 3))
        mirrored = images.flip(3)
        for turns in range(4):
            yield torch.rot90(mirrored, turns, (2, 3))
