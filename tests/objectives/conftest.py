"""Small real things that the tests of objectives share: a two-layer ViT, a batch, a frozen teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.config import config_class, validate
from panfm.data.batch import NO_GROUP, Batch
from panfm.data.masking import MaskConfig, sample_mask
from panfm.objectives.demands import ObjectiveConfig
from panfm.objectives.interface import Mean, ObjectiveOutput
from panfm.objectives.pretraining import PretrainingModel, RunLength, build_pretraining_model

SELF_DISTILLATION = {
    "kind": "self_distillation",
    "prototypes": {"num_prototypes": 32, "hidden_dim": 64, "bottleneck_dim": 64},
    "mask": {"kind": "block", "ratio": 0.5},
}
EMA_LATENTS = {"kind": "masked_image", "target": {"kind": "ema_teacher", "num_blocks": 2}, "predictor": {"depth": 2}}


@config_class
class Run:
    """The part of a run's config that lists objectives."""

    objectives: tuple[ObjectiveConfig, ...]


def read(*objectives: dict[str, Any]) -> tuple[ObjectiveConfig, ...]:
    """Objectives as a YAML file gives them, read as a run reads them."""
    return validate(Run, {"objectives": list(objectives)}, "run.yaml").objectives


def get_scalars(output: ObjectiveOutput) -> list[Tensor]:
    """Every number in the metrics, the sums and counts of means among them."""
    pairs = [
        (metric.total, metric.count) if isinstance(metric, Mean) else (metric,) for metric in output.metrics.values()
    ]
    return [scalar for parts in pairs for scalar in parts]


def train(model: PretrainingModel, batch: Batch, num_steps: int, lr: float = 3e-3) -> list[ObjectiveOutput]:
    """Steps on one batch under bf16 autocast, as the loop makes them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    outputs = []
    for step in range(num_steps):
        model.begin_step(step)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_step(step)
        outputs.append(output)
    return outputs


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

    def forward_tokens_and_feature(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.forward_tokens(images)
        return tokens, torch.cat([tokens.amax(dim=1), tokens.std(dim=1)], dim=1)  # [B, 24], no mean of the map

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
def build(small_vit: VisionTransformer, teacher: ConvTeacher) -> Callable[..., PretrainingModel]:
    """build(*objectives): the pretraining model of these objectives on the small ViT, for a run of 60 steps of 8."""

    def build_model(*objectives: dict[str, Any], seed: int = 0, num_local: int = 0) -> PretrainingModel:
        return build_pretraining_model(
            small_vit,
            read(*objectives),
            image_size=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            teachers={"timm:some": teacher},
            local_views=range(2, 2 + num_local),
            length=RunLength(num_steps=60, global_batch_size=8),
            seed=seed,
        )

    return build_model


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """batch(size, ratio): smooth random images of two views, lesions of two images, patients of four; half hidden.

    Local views, of half the size, come behind the two.
    """

    def build(size: int = 8, ratio: float = 0.5, lesions: list[int] | None = None, num_local: int = 0) -> Batch:
        rng = np.random.default_rng(3)
        coarse = torch.from_numpy(rng.uniform(0, 255, (2 + num_local, size, 3, 4, 4)).astype(np.float32))
        sides = [32, 32] + [16] * num_local
        views = [
            torch.nn.functional.interpolate(view, side, mode="bicubic").clamp(0, 255)
            for view, side in zip(coarse, sides, strict=True)
        ]
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
