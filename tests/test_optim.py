import itertools
import math

import pytest
import timm
import torch
from torch import nn

from panfm.config import validate
from panfm.errors import UserError
from panfm.optim import (
    OptimConfig,
    ScheduleConfig,
    build_optimizer,
    build_param_groups,
    check_schedule,
    compute_lr,
    compute_num_steps,
    is_encoder_frozen,
    set_lr,
)


class Student(nn.Module):
    """An encoder and a head with a bare token, as a pretraining model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, num_classes=0, depth=3, init_values=1e-5, reg_tokens=2
        )
        self.head = nn.Linear(192, 8)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 192))


def test_layer_decay_and_weight_decay_of_every_parameter() -> None:
    model = Student()
    model.encoder.norm.bias.requires_grad_(False)
    groups = build_param_groups(model, model.encoder, OptimConfig(layer_decay=0.5, weight_decay=0.1))
    of = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert set(of) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert of["encoder.patch_embed.proj.weight"] == (0.5**4, 0.1)
    assert of["encoder.pos_embed"] == of["encoder.cls_token"] == of["encoder.reg_token"] == (0.5**4, 0.0)
    assert of["encoder.blocks.0.attn.qkv.weight"] == (0.5**3, 0.1)
    assert of["encoder.blocks.0.attn.qkv.bias"] == of["encoder.blocks.0.ls1.gamma"] == (0.5**3, 0.0)
    assert of["encoder.blocks.2.mlp.fc1.weight"] == (0.5, 0.1)
    assert of["encoder.norm.weight"] == (1.0, 0.0)
    assert of["head.weight"] == (1.0, 0.1)
    assert of["head.bias"] == of["mask_token"] == (1.0, 0.0)


def test_a_rotary_encoder_decays_by_its_own_names() -> None:
    encoder = timm.create_model(
        "vit_tiny_patch16_dinov3_qkvb", img_size=32, num_classes=0, depth=3, rope_type="mixed", rope_rotate_half=False
    )
    groups = build_param_groups(encoder, encoder, OptimConfig(layer_decay=0.5, weight_decay=0.1))
    of = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert set(of) == {name for name, _ in encoder.named_parameters()}
    assert of["cls_token"] == of["reg_token"] == of["rope.freqs"] == of["patch_embed.proj.bias"] == (0.5**4, 0.0)
    assert of["patch_embed.proj.weight"] == (0.5**4, 0.1)
    assert of["blocks.0.attn.q_bias"] == of["blocks.0.gamma_1"] == of["blocks.0.norm1.weight"] == (0.5**3, 0.0)
    assert of["blocks.0.attn.qkv.weight"] == of["blocks.0.mlp.fc2.weight"] == (0.5**3, 0.1)
    assert of["norm.weight"] == of["norm.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_a_frozen_encoder_stays_to_the_bit_and_learns_at_once_afterwards(layer_decay: float) -> None:
    torch.manual_seed(0)
    optim = OptimConfig(layer_decay=layer_decay, weight_decay=0.1, freeze_encoder_samples=20)
    assert [is_encoder_frozen(optim, step, 8) for step in range(5)] == [True, True, True, False, False]
    assert not is_encoder_frozen(OptimConfig(), 0, 8)
    model = Student()
    groups = build_param_groups(model, model.encoder, optim)
    inside = {name for group in groups if group["waits"] for name in group["names"]}
    assert inside == {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    optimizer = build_optimizer(groups, optim)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step(freeze_encoder: bool) -> set[str]:
        """Names of what an optimizer step with gradients of one changed."""
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_lr(optimizer.param_groups, 0.1, freeze_encoder=freeze_encoder)
        optimizer.step()
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    assert step(freeze_encoder=True) == {"head.weight", "head.bias", "mask_token"}
    assert step(freeze_encoder=False) == set(before)


def test_without_layer_decay_there_are_two_groups() -> None:
    model = Student()
    groups = build_param_groups(model, model.encoder, OptimConfig())
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_lr_is_warmed_up_linearly_and_ends_where_it_should() -> None:
    optim = OptimConfig(base_lr=0.1)
    schedule = ScheduleConfig(total_samples=100 * 64, warmup_samples=10 * 64, final_lr_share=0.01)
    lrs = [compute_lr(optim, schedule, step, 64) for step in range(100)]
    peak = 0.1 * 64 / 256
    assert lrs[0] == pytest.approx(peak / 10)
    assert lrs[9] == lrs[10] == max(lrs) == pytest.approx(peak)
    assert lrs[55] == pytest.approx(peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert compute_lr(optim, schedule, 100, 64) == pytest.approx(peak * 0.01)
    assert all(later < earlier for earlier, later in itertools.pairwise(lrs[10:]))


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 0.4), ("sqrt", 0.2), ("none", 0.1)])
def test_lr_scales_with_the_global_batch(scaling: str, expected: float) -> None:
    optim = validate(OptimConfig, {"base_lr": 0.1, "lr_scaling": scaling}, "test")
    constant = ScheduleConfig(total_samples=10_000, shape="constant")
    assert compute_lr(optim, constant, 3, 1024) == pytest.approx(expected)


def test_num_steps_rounds_up() -> None:
    assert compute_num_steps(ScheduleConfig(total_samples=1000), 64) == 16


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"schedule.warmup_samples \(11\) must not exceed schedule.total_samples \(10\)"
    ):
        check_schedule(ScheduleConfig(total_samples=10, warmup_samples=11), OptimConfig())
    with pytest.raises(UserError, match=r"freeze_encoder_samples \(10\) must be less than .* \(10\)"):
        check_schedule(ScheduleConfig(total_samples=10), OptimConfig(freeze_encoder_samples=10))


def test_set_lr_respects_each_groups_scale() -> None:
    model = Student()
    groups = build_param_groups(model, model.encoder, OptimConfig(layer_decay=0.5))
    optimizer = build_optimizer(groups, OptimConfig(layer_decay=0.5, beta2=0.9))
    set_lr(optimizer.param_groups, 0.8)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])
    assert optimizer.defaults["betas"] == (0.9, 0.9)
