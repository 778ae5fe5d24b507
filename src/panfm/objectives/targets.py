"""What a masked-image objective predicts: pixels, or the tokens of a teacher.

    images [B, 3, H, W]        ->  compute_pixel_targets    ->  [B, hidden, p * p * 3]
    images uint8, Teacher      ->  compute_teacher_targets  ->  TeacherTargets: whole image [B, D], patches [B, N, D]

No gradient flows into a target. Targets are float32 (or wider), whatever the autocast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from panfm.config import config_class
from panfm.models.vit import take_patches

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


class Teacher(Protocol):
    """What a teacher must be able to do; `panfm.encoder.Encoder` does. It resizes and normalises images itself."""

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Map images uint8 [B, 3, S, S] to [B, rows * columns, D] by rows; prefix tokens may come before, CLS first."""

    def token_grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of the tokens that an image of `image_size` pixels a side gets."""


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's view of a batch, on the student's grid."""

    whole: Tensor  # [B, D]: the teacher's CLS token, or the mean of its map where it has none
    patches: Tensor  # [B, N, D]


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
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + NORM_EPS).rsqrt()


def compute_teacher_targets(
    teacher: Teacher, images: Tensor, grid: tuple[int, int], normalise: Literal["none", "layer_norm"]
) -> TeacherTargets:
    """Run the teacher on images uint8 [B, 3, S, S] and bring its tokens to the student's grid (rows, columns).

    A teacher of another grid is resampled bilinearly (antialiased where it is the finer one).
    """
    with torch.inference_mode():
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
        width = (tokens.shape[-1],)
        whole, patches = F.layer_norm(whole, width, eps=NORM_EPS), F.layer_norm(patches, width, eps=NORM_EPS)
    return TeacherTargets(whole=whole, patches=patches)


def widen(tensor: Tensor) -> Tensor:
    """Float32, or the tensor itself where it is wider: losses and targets never run in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
