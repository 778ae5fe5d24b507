"""What a masked-image objective predicts: pixels, or the tokens of a teacher, frozen or the student's own average.

    images [B, 3, H, W]         ->  compute_pixel_targets    ->  [B, hidden, p * p * 3]
    images uint8, Teacher       ->  compute_teacher_targets  ->  TeacherTargets: whole image [B, D], patches [B, N, D]
    EncodedView by EMA teacher  ->  EmaTargets.compute       ->  the same

No gradient flows into a target. Targets are float32 (or wider), whatever the autocast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from panfm.config import config_class
from panfm.models.vit import take_patches
from panfm.objectives.ema import EmaConfig
from panfm.objectives.interface import EncodedView, ViewKey

NORM_EPS = 1e-6


@config_class
class PixelTargetConfig:
    """Predict the pixels of hidden patches (MAE)."""

    kind: Literal["pixels"] = "pixels"
    normalise: bool = True
    """Standardise each patch by its own mean and deviation: the loss then asks for structure rather than for colour,
    which MAE found to make better features."""


@config_class
class FrozenTeacherConfig:
    """Predict the tokens that a frozen encoder gives for the whole image (CAE v2, PanDerm)."""

    kind: Literal["frozen_teacher"] = "frozen_teacher"
    address: str = Field(min_length=1)
    """Encoder address of the teacher, for example timm:tf_efficientnet_lite0."""
    normalise: Literal["none", "layer_norm"] = "layer_norm"
    """layer_norm: standardise each token over its dimensions, without weights, so that a mean common to all dimensions
    (as in a feature map after ReLU) cannot make every target look alike to the cosine. none: as published."""
    feature_weight: float = Field(default=0.0, ge=0.0)
    """Factor of a further term: the mean of the encoder's visible patches, which is the feature that evaluation reads,
    predicts the teacher's own pooled feature through a head of its own. It brings in what the teacher knows of the
    whole image, which a CNN's map of stride 16 lacks. 0: as published."""


@config_class
class EmaTeacherConfig:
    """Predict what a moving average of the encoder itself makes of the whole image (data2vec)."""

    kind: Literal["ema_teacher"] = "ema_teacher"
    num_blocks: int = Field(default=6, ge=1)
    """Blocks, from the last on, whose outputs are averaged into the target; data2vec found several to be better than
    the last alone. 6 are half of a Base encoder."""
    tokens: Literal["hidden", "all"] = "hidden"
    """Which tokens are predicted: those of hidden patches (data2vec), or also CLS and the visible ones."""
    loss: Literal["smooth_l1", "cosine"] = "smooth_l1"
    """smooth_l1: half the squared error, linear beyond 1, so that outliers among the targets weigh less (data2vec).
    cosine: 1 - cosine, which asks for the direction only."""
    ema: EmaConfig = EmaConfig()
    """How the teacher follows."""


class Teacher(Protocol):
    """What a teacher must be able to do; `panfm.encoder.Encoder` does. It resizes and normalises images itself."""

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Map images uint8 [B, 3, S, S] to [B, rows * columns, D] by rows; prefix tokens may come before, CLS first."""

    def forward_tokens_and_feature(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the pooled feature [B, F] of the same images."""

    def token_grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of the tokens that an image of `image_size` pixels a side gets."""


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's view of a batch, on the student's grid."""

    whole: Tensor  # [B, D]: the teacher's CLS token, or the mean of its map where it has none
    patches: Tensor  # [B, N, D]
    feature: Tensor | None = None  # [B, F]: the teacher's pooled feature, where it was asked for


@dataclass(frozen=True)
class FrozenTargets:
    """The tokens of a frozen teacher, which sees the images at its own size; `compute_teacher_targets`."""

    teacher: Teacher
    grid: tuple[int, int]  # rows and columns of the student
    normalise: Literal["none", "layer_norm"]
    with_feature: bool = False
    view_keys = (ViewKey(view=0, masked=True),)

    def compute(self, views: tuple[EncodedView, ...]) -> TeacherTargets:
        """Views as `view_keys` name them -> targets."""
        return compute_teacher_targets(
            self.teacher, views[0].images, self.grid, self.normalise, with_feature=self.with_feature
        )


@dataclass(frozen=True)
class EmaTargets:
    """The tokens of the EMA teacher, normalised: the mean of its last `num_blocks` blocks (see `encode_by_teacher`)."""

    num_blocks: int

    @property
    def view_keys(self) -> tuple[ViewKey, ...]:
        """What the student sees, and what the teacher does."""
        teacher = ViewKey(view=0, masked=False, encoder="teacher", num_blocks=self.num_blocks)
        return (ViewKey(view=0, masked=True), teacher)

    def compute(self, views: tuple[EncodedView, ...]) -> TeacherTargets:
        """Views as `view_keys` name them -> targets."""
        patches = views[1].tokens[:, views[1].num_prefix :]
        whole = views[1].tokens[:, 0] if views[1].num_prefix else patches.mean(dim=1)
        return TeacherTargets(whole=whole, patches=patches)


def compute_pixel_targets(
    images: Tensor,
    index: Tensor,
    patch_size: tuple[int, int],
    pixel_normalise: Callable[[Tensor], Tensor],
    *,
    patch_normalise: bool,
) -> Tensor:
    """Pixels of the patches at index [B, K] of images [B, C, H, W], as (row, column, channel) -> [B, K, p * p * C].

    pixel_normalise: what the encoder's input goes through, pixel by pixel; called for these patches only.
    patch_normalise: (patch - mean) / sqrt(variance + 1e-6) over all values of a patch, with the unbiased variance that
        the published MAE divides by.
    """
    patches: Tensor = widen(pixel_normalise(take_patches(images, index, patch_size)))  # [B * K, C, p, p]
    patches = patches.permute(0, 2, 3, 1).flatten(1).unflatten(0, index.shape)  # [B, K, p * p * C]
    if not patch_normalise or patches.numel() == 0:  # torch warns of the variance of nothing
        return patches
    # In one pass: a layer norm divides by the biased variance, which is smaller by this share.
    share = 1 - 1 / patches.shape[-1]
    return F.layer_norm(patches, patches.shape[-1:], eps=NORM_EPS * share).mul_(math.sqrt(share))


def compute_teacher_targets(
    teacher: Teacher,
    images: Tensor,
    grid: tuple[int, int],
    normalise: Literal["none", "layer_norm"],
    *,
    with_feature: bool = False,
) -> TeacherTargets:
    """Run the teacher on images uint8 [B, 3, S, S] and bring its tokens to the student's grid (rows, columns).

    A teacher of another grid is resampled bilinearly (antialiased where it is the finer one).
    """
    feature = None
    with torch.inference_mode():
        if with_feature:
            tokens, feature = teacher.forward_tokens_and_feature(images)
        else:
            tokens = teacher.forward_tokens(images)
    rows, columns = teacher.token_grid(images.shape[2])
    num_prefix = tokens.shape[1] - rows * columns
    assert num_prefix >= 0, f"the teacher gave {tokens.shape[1]} tokens for a grid of {rows} x {columns}"
    tokens = widen(tokens)
    patches = tokens[:, num_prefix:]
    whole = tokens[:, 0] if num_prefix else patches.mean(dim=1)
    if (rows, columns) != grid:
        squares = patches.transpose(1, 2).unflatten(2, (rows, columns))  # [B, D, rows, columns]
        squares = F.interpolate(squares, size=grid, mode="bilinear", antialias=True)
        patches = squares.flatten(2).transpose(1, 2)
    if normalise == "layer_norm":
        whole, patches = _standardise(whole), _standardise(patches)
        feature = None if feature is None else _standardise(widen(feature))
    return TeacherTargets(whole=whole, patches=patches, feature=None if feature is None else widen(feature))


def _standardise(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def widen(tensor: Tensor) -> Tensor:
    """Float32, or the tensor itself where it is wider: losses and targets never run in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
