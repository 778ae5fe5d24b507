"""Counted operations: what is counted on shapes is what torch's own counter sees in a real step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from panfm.config import validate
from panfm.encoder import load_encoder
from panfm.models.flops import count_flops
from panfm.models.vit import build_vit, encode_visible, get_patch_grid
from panfm.objectives.demands import get_teacher_addresses
from panfm.objectives.pretraining import RunLength, build_pretraining_model
from panfm.training import flops
from panfm.training.flops import compute_hours, compute_run_cost
from panfm.training.plan import PretrainConfig

TEACHER = "timm:test_vit@random:0?image_size=32"
MASKED = {"kind": "masked_image", "predictor": {"depth": 1, "width": 64}}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "pixels": [{**MASKED, "mask": {"kind": "random", "ratio": 0.75}, "target": {"kind": "pixels"}}],
    "frozen_teacher": [{**MASKED, "target": {"kind": "frozen_teacher", "address": TEACHER}}],
    "ema_teacher": [{**MASKED, "target": {"kind": "ema_teacher", "num_blocks": 2}}],
    "pairs": [
        {**MASKED, "target": {"kind": "frozen_teacher", "address": TEACHER}},
        {"kind": "contrastive", "num_views": 2, "hidden_dim": 64, "output_dim": 16},
    ],
    "self_distillation": [
        {
            "kind": "self_distillation",
            "mask": {"kind": "block", "ratio": 0.3},
            "prototypes": {"num_prototypes": 48, "hidden_dim": 64, "bottleneck_dim": 16},
        }
    ],
}


def make_config(objectives: list[dict[str, Any]], **encoder: Any) -> PretrainConfig:
    distils = objectives[0]["kind"] == "self_distillation"
    views = 2 if distils or any(objective.get("num_views") == 2 for objective in objectives) else 1
    values = {
        "data": {"shards": ["shards"]},
        "augment": {"image_size": 32, "views": views, "local_views": 2 if distils else 0, "local_size": 16},
        "encoder": {"name": "test_vit", "image_size": 32, "patch_size": 8, **encoder},
        "objectives": objectives,
        "schedule": {"total_samples": 1000},
    }
    return validate(PretrainConfig, values, where="test")


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_count_is_that_of_a_real_step(kind: str) -> None:
    config = make_config(OBJECTIVES[kind], grad_checkpointing=kind == "pixels")
    vit = build_vit(config.encoder, seed=0)
    model = build_pretraining_model(
        vit,
        config.objectives,
        image_size=config.encoder.image_size,
        mean=config.augment.mean,
        std=config.augment.std,
        teachers={address: load_encoder(address) for address in get_teacher_addresses(config.objectives)},
        local_views=range(config.augment.views, config.augment.num_views),
        length=RunLength(num_steps=10, global_batch_size=100),
    )
    batch = flops._make_batch(config, get_patch_grid(vit))
    model(batch)  # the teacher asks for its grid once
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    cost = compute_run_cost(config)
    assert cost.sample_flops == counter.get_total_flops() / flops.NUM_IMAGES
    assert cost.num_encoder == sum(parameter.numel() for parameter in vit.parameters())
    assert cost.num_encoder + cost.num_heads == sum(parameter.numel() for parameter in model.parameters())


def test_nothing_is_computed() -> None:
    """A parameter that takes part has a gradient of its shape, in memory that nobody filled or read."""
    config = make_config(OBJECTIVES["pixels"])
    with torch.device("meta"):
        vit = build_vit(replace(config.encoder, name="vit_huge_patch14_224", patch_size=16, image_size=224), seed=0)
    vit.to_empty(device="cpu")
    count = count_flops(lambda: encode_visible(vit, torch.zeros(1, 3, 224, 224), None).sum().backward())
    # 630 M parameters in matrices, two operations each for 197 tokens, three times; attention adds a tenth.
    assert 6 * 0.63e9 * 197 < count < 1.15 * 6 * 0.63e9 * 197
    assert vit.blocks[0].mlp.fc1.weight.grad is not None


def test_inference_mode_is_counted_too() -> None:
    layer = torch.nn.Linear(16, 32)

    def infer() -> None:
        with torch.inference_mode():
            layer(torch.zeros(5, 16))

    assert count_flops(infer) == 2 * 5 * 16 * 32


def test_fused_attention_counts_like_its_matrix_products() -> None:
    q, k, v = (torch.zeros(2, 3, 40, 16, requires_grad=True) for _ in range(3))

    def attend(fused: bool) -> None:
        result = F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.transpose(-2, -1)).softmax(-1) @ v
        result.sum().backward()

    one_product = 2 * 2 * 3 * 40 * 40 * 16
    assert count_flops(lambda: attend(fused=False)) == 6 * one_product
    # The fused backward computes the scores again.
    assert count_flops(lambda: attend(fused=True)) == 7 * one_product


def test_hours() -> None:
    assert compute_hours(7200e12, num_devices=2, peak_flops=2e12, utilisation=0.5) == pytest.approx(1.0)
