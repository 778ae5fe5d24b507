"""Small real things that the tests of objectives share: a two-layer ViT, a batch, a frozen teacher."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.data.batch import NO_GROUP, Batch
from panfm.data.masking import MaskConfig, sample_mask


class ConvTeacher(nn.Module):
    """A frozen random CNN of 12 channels without CLS; stride 8 is the student's, 4 makes a finer grid."""

    def __init__(self, stride: int = 4) -> None:
        super().__init__()
        self.stride = stride
        weight = torch.randn(12, 3, stride, stride, generator=torch.Generator().manual_seed(5))
        self.weight = nn.Parameter(weight * 0.8 / stride, requires_grad=False)

    def forward_tokens(self, images: Tensor) -> Tensor:
        feature_map = torch.nn.functional.conv2d(images.float() / 255 - 0.5, self.weight, stride=self.stride).tanh()
        return feature_map.flatten(2).transpose(1, 2)

    def token_grid(self, image_size: int) -> tuple[int, int]:
        return image_size // self.stride, image_size // self.stride


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def teacher() -> ConvTeacher:
    return ConvTeacher()


@pytest.fixture
def teacher_of_stride_8() -> ConvTeacher:
    return ConvTeacher(stride=8)


@pytest.fixture
def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0, global_pool="avg", fc_norm=False
    )


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """batch(size, ratio): smooth random images of two views, lesions of two images, patients of four; half hidden."""

    def build(size: int = 8, ratio: float = 0.5, lesions: list[int] | None = None) -> Batch:
        rng = np.random.default_rng(3)
        coarse = torch.from_numpy(rng.uniform(0, 255, (2, size, 3, 4, 4)).astype(np.float32))
        views = [torch.nn.functional.interpolate(view, 32, mode="bicubic").clamp(0, 255) for view in coarse]
        mask = MaskConfig(kind="block", ratio=ratio)
        masks = np.stack([[sample_mask(mask, (4, 4), rng) for _ in range(size)] for _ in range(2)])
        numbers = torch.arange(size)
        groups = numbers // 2 if lesions is None else torch.tensor(lesions)
        return Batch(
            views=tuple(view.to(torch.uint8) for view in views),
            masks=torch.from_numpy(masks),
            positions=numbers,
            modalities=numbers % 4,
            sources=numbers * 0,
            lesions=groups,
            patients=groups // 2 if lesions is None else torch.full((size,), NO_GROUP),
            visits=torch.full((size,), NO_GROUP),
        )

    return build
