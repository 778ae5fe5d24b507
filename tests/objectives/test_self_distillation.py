"""DINO, iBOT, KoLeo, centring and Sinkhorn-Knopp against DINOv2's numbers; then the objective in its corners."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightly.loss import KoLeoLoss
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from panfm.errors import UserError
from panfm.models.heads import PrototypeHead
from panfm.models.vit import Vit
from panfm.objectives.centring import Centre, compute_sinkhorn
from panfm.objectives.demands import find_coupling, get_mask_config
from panfm.objectives.interface import Mean
from panfm.objectives.koleo import compute_koleo
from panfm.objectives.pretraining import PretrainingModel, RunLength, build_pretraining_model
from panfm.objectives.self_distillation import (
    SelfDistillationConfig,
    compute_dino_loss,
    compute_ibot_loss,
    compute_teacher_temperature,
)
from tests.objectives.conftest import EMA_LATENTS, SELF_DISTILLATION, get_scalars, read, train

ATOL = 1e-9
CENTRINGS = ("centering", "sinkhorn_knopp")  # as the golden files name them


def read_golden(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}, config


def assign(centring: str, logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    if centring == "sinkhorn_knopp":
        return compute_sinkhorn(logits, temperature)
    module = Centre(logits.shape[1], momentum=0.9).to(logits.dtype)
    module.value.copy_(centre.flatten())
    return module(logits, temperature)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("centring", CENTRINGS)
def test_dino_is_the_originals(golden: Path, centring: str) -> None:
    tensors, config = read_golden(golden / "dinov2_dino_loss.safetensors")
    probabilities = assign(centring, tensors["in.teacher_logits"], tensors["in.center"], config["teacher_temp"])
    close(probabilities, tensors[f"out64.teacher_probs.{centring}"])
    students = {name: tensors[f"in.student_{name}_logits"].requires_grad_() for name in ("global", "local")}
    size = int(config["batch_size"])
    views = torch.cat(list(students.values())).unflatten(0, (-1, size))  # [2 + 4, 6, 48]
    losses = compute_dino_loss(views, probabilities.unflatten(0, (2, size)), config["student_temp"])
    close(losses.mean(), tensors[f"out64.loss_dino_total.{centring}"])
    losses.mean().backward()
    for name, logits in students.items():
        close(logits.grad, tensors[f"grad64.{centring}.student_{name}_logits"])


def test_dino_without_local_views_is_the_mean_of_the_two_pairs(golden: Path) -> None:
    tensors, config = read_golden(golden / "dinov2_dino_loss.safetensors")
    size = int(config["batch_size"])
    views = tensors["in.student_global_logits"].unflatten(0, (2, size))
    teacher = tensors["out64.teacher_probs.centering"].unflatten(0, (2, size))
    close(compute_dino_loss(views, teacher, config["student_temp"]).mean(), tensors["out64.loss_global_raw.centering"])


@pytest.mark.parametrize("centring", CENTRINGS)
def test_ibot_is_the_originals(golden: Path, centring: str) -> None:
    tensors, config = read_golden(golden / "dinov2_ibot_loss.safetensors")
    mask = tensors["in.masks"]
    probabilities = assign(centring, tensors["in.teacher_logits"], tensors["in.center"], config["teacher_temp"])
    close(probabilities, tensors[f"out64.teacher_probs.{centring}"])
    hidden = mask.flatten().nonzero().squeeze(1)
    logits = tensors["in.student_logits"][: len(hidden)].requires_grad_()  # the original pads behind them
    losses = compute_ibot_loss(logits, probabilities, hidden, mask, config["student_temp"])
    assert float(losses.detach()[1]) == 0.0  # the image that hides nothing counts in the mean
    close(losses.mean(), tensors[f"out64.loss.{centring}"])
    losses.mean().backward()
    close(logits.grad, tensors[f"grad64.{centring}.student_logits"][: len(hidden)])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("centring", CENTRINGS)
def test_the_originals_numbers_in_float32_and_under_autocast(golden: Path, centring: str, autocast: bool) -> None:
    dino, config = read_golden(golden / "dinov2_dino_loss.safetensors")
    ibot, _ = read_golden(golden / "dinov2_ibot_loss.safetensors")
    koleo, _ = read_golden(golden / "dinov2_koleo_loss.safetensors")
    size, hidden = int(config["batch_size"]), ibot["in.masks"].flatten().nonzero().squeeze(1)
    students = torch.cat([dino["in.student_global_logits"], dino["in.student_local_logits"]]).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        teachers = [
            assign(centring, case["in.teacher_logits"].float(), case["in.center"].float(), config["teacher_temp"])
            for case in (dino, ibot)
        ]
        losses = [
            compute_dino_loss(
                students.unflatten(0, (-1, size)), teachers[0].unflatten(0, (2, size)), config["student_temp"]
            ),
            compute_ibot_loss(
                ibot["in.student_logits"][: len(hidden)].float(),
                teachers[1],
                hidden,
                ibot["in.masks"],
                config["student_temp"],
            ),
            compute_koleo(koleo["in.features"].float()),
        ]
    expected = (dino[f"out64.loss_dino_total.{centring}"], ibot[f"out64.loss.{centring}"], koleo["out64.loss"])
    for loss, original in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.mean(), original.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["dino", "ibot"])
def test_the_centre_moves_as_the_originals_after_the_step(golden: Path, case: str) -> None:
    tensors, _ = read_golden(golden / f"dinov2_{case}_loss.safetensors")
    centre = Centre(48, momentum=0.9).double()
    centre.value.copy_(tensors["in.center"].flatten())
    logits = tensors["in.teacher_logits"]
    centre(logits[:5], 0.05)
    close(centre.value, tensors["in.center"].flatten())  # a step is never centred by itself
    centre.begin_step()  # what was seen in a step that was not applied is forgotten
    centre(logits[:4], 0.05)
    centre(logits[4:], 0.05)  # two micro batches, not of one size
    centre.after_step()
    close(centre.value, tensors["out64.center_after_update"].flatten())
    centre(logits[:0], 0.05)
    centre.after_step()  # a step without a row
    close(centre.value, tensors["out64.center_after_update"].flatten())


def test_koleo_is_the_originals(golden: Path) -> None:
    tensors, _ = read_golden(golden / "dinov2_koleo_loss.safetensors")
    features = tensors["in.features"].requires_grad_()
    loss = compute_koleo(features).mean()
    close(loss, tensors["out64.loss"])
    close(loss, KoLeoLoss()(features))  # lightly's is the same on one process
    loss.backward()
    close(features.grad, tensors["grad64.features"])
    features.grad = None
    two_views = compute_koleo(features[:5]).mean() + compute_koleo(features[5:]).mean()
    close(two_views, tensors["out64.loss_two_views_sum"])
    two_views.backward()
    close(features.grad, tensors["grad64.two_views.features"])


def test_koleo_of_the_same_image_twice_and_of_one_image_is_finite() -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 16)
    features[3:] = features[0]  # four times the same
    features.requires_grad_()
    losses = compute_koleo(features)
    losses.sum().backward()
    assert losses.isfinite().all() and float(losses[0].detach()) > 15
    assert not features.grad[3:].any() and float(features.grad[1:3].abs().max()) < 100
    alone = torch.randn(1, 16, requires_grad=True)
    loss = compute_koleo(alone).mean()
    loss.backward()
    assert float(loss.detach()) == 0.0 and not alone.grad.any()


def sinkhorn_as_written(logits: Tensor, temperature: float) -> Tensor:
    """The definition, in the logarithm and in float64."""
    q = logits.double() / temperature
    for _ in range(3):
        q = q - q.logsumexp(dim=0, keepdim=True)
        q = q - q.logsumexp(dim=1, keepdim=True)
    return q.exp()


def test_sinkhorn_survives_what_overflows_the_original() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 40) * 20  # up to exp(60 / 0.04)
    logits[3] -= 500  # a row far below all others: with one common maximum it would be 0 / 0
    logits[5] += 500
    ours = compute_sinkhorn(logits, 0.04)
    assert not torch.isfinite(torch.exp(logits / 0.04)).all()
    torch.testing.assert_close(ours.double(), sinkhorn_as_written(logits, 0.04), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.sum(dim=1), torch.ones(12))
    assert compute_sinkhorn(logits[:0], 0.04).shape == (0, 40)
    assert torch.equal(compute_sinkhorn(torch.zeros(1, 4), 0.04), torch.full((1, 4), 0.25))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compute_sinkhorn(logits, 0.04), ours)


KINDS = {
    "Sinkhorn": {},
    "centred, two heads, both views": {"centring": "mean", "separate_heads": True, "masked_views": 2},
    "DINO alone": {"ibot_weight": 0.0, "koleo_weight": 0.0},
    "nothing hidden": {"ibot_weight": 0.0, "mask": None, "centring": "mean"},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest, build) -> PretrainingModel:
    return build(SELF_DISTILLATION | request.param, num_local=2)


def read_mean(metric: Tensor | Mean) -> float | None:
    if isinstance(metric, Tensor):
        return float(metric)
    return float(metric.total / metric.count) if metric.count else None


@pytest.mark.parametrize("kind", ["Sinkhorn", "centred, two heads, both views"])
def test_what_a_resting_teacher_says_is_learned_by_heart(build, make_batch, kind: str) -> None:
    """The least that the losses can be is the teacher's own entropy: what is above it goes."""
    config = SELF_DISTILLATION | KINDS[kind] | {"ema": {"momentum": 1.0}, "koleo_weight": 0.0}
    excesses = []
    for output in train(build(config, num_local=1), make_batch(4, num_local=1), num_steps=40):
        values = {name.partition("/")[2]: read_mean(metric) for name, metric in output.metrics.items()}
        ibot_share = 1.0 if "both" in kind else 0.5  # an unmasked view counts as 0
        excess = values["dino_loss"] - np.log(32) * values["teacher_entropy"]
        excesses.append(excess + values["ibot_loss"] / ibot_share - np.log(32) * values["ibot_teacher_entropy"])
    assert excesses[-1] < 0.25 * excesses[0], excesses[::10]


def test_images_spread_and_the_teacher_follows(build, make_batch) -> None:
    """A moving teacher on one batch: KoLeo parts the images, and the teacher comes to tell them apart."""
    config = SELF_DISTILLATION | {"ema": {"momentum": 0.9, "final_momentum": 0.9}, "koleo_weight": 1.0}
    model = build(config, num_local=1)
    before = {name: tensor.clone() for name, tensor in model.copy_extra_state().items()}
    outputs = train(model, make_batch(6, num_local=1), num_steps=25)
    koleo = [float(output.metrics["self_distillation/koleo_loss"]) for output in outputs]
    assert koleo[-1] < koleo[0] - 2.0, koleo
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.copy_extra_state().items())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("size", "ratio"), [(1, 0.5), (4, 0.0), (1, 0.0), (3, 0.9375)])
def test_corners_of_a_batch_are_finite_and_reach_every_parameter(
    model, make_batch, size: int, ratio: float, autocast: bool
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(make_batch(size, ratio, num_local=2))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(value.isfinite() for value in (output.loss, *get_scalars(output)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.after_step(0)
    assert all(tensor.isfinite().all() for tensor in model.copy_extra_state().values())
    if ratio == 0 and "self_distillation/ibot_loss" in output.metrics:
        assert float(output.metrics["self_distillation/ibot_loss"]) == 0.0
        assert read_mean(output.metrics["self_distillation/ibot_teacher_entropy"]) is None


def test_the_same_image_in_every_place_is_finite(model, make_batch) -> None:
    batch = make_batch(4, num_local=2)
    batch = replace(batch, views=tuple(view[:1].repeat(4, 1, 1, 1) for view in batch.views))
    batch = replace(batch, masks=batch.masks[:, :1].repeat(1, 4, 1))
    output = model(batch)
    output.loss.backward()
    assert all(value.isfinite() for value in (output.loss, *get_scalars(output)))
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    assert largest < 100, largest  # KoLeo has nothing to push apart


def vary(mask: Tensor) -> Tensor:
    """Masks of 0, 1, 2, ... patches."""
    counts = torch.arange(len(mask)) % mask.shape[1]
    return torch.arange(mask.shape[1]).flip(0) < counts.unsqueeze(1)


def test_images_may_hide_different_numbers_of_patches(build, make_batch) -> None:
    model, batch = build(SELF_DISTILLATION), make_batch(6)
    batch = replace(batch, masks=torch.stack([vary(mask) for mask in batch.masks]))
    whole = model(batch).metrics["self_distillation/ibot_loss"]
    hidden = batch.masks[0].flatten().nonzero().squeeze(1)
    objective = model.objectives["self_distillation"]
    logits = {}
    for name, head in (("student", objective.head), ("teacher", objective.teacher_heads[0])):
        calls: list[Tensor] = []
        handle = head.register_forward_hook(lambda module, args, output, calls=calls: calls.append(output.detach()))
        model(batch)
        handle.remove()
        logits[name] = calls[1]  # the second call is for patches
    assert len(logits["student"]) == len(hidden) == 0 + 1 + 2 + 3 + 4 + 5
    probabilities = compute_sinkhorn(logits["teacher"], 0.04)
    losses = -(probabilities * (logits["student"] / 0.1).log_softmax(dim=1)).sum(dim=1)
    by_image = [part.mean() for part in losses.split([0, 1, 2, 3, 4, 5])[1:]]
    torch.testing.assert_close(whole, torch.stack(by_image).sum() / 12, rtol=1e-5, atol=0)  # of twelve large views


def test_the_loss_is_the_sum_of_its_parts_and_the_mean_over_modalities(model, make_batch) -> None:
    output = model(make_batch(6, num_local=2))  # two modalities have two images, two have one
    values = {name.partition("/")[2]: metric for name, metric in output.metrics.items()}
    config = model.objectives["self_distillation"].config
    expected = values["dino_loss"] + config.ibot_weight * values.get("ibot_loss", 0.0)
    torch.testing.assert_close(output.loss.detach(), expected + config.koleo_weight * values.get("koleo_loss", 0.0))
    parts = [metric for name, metric in values.items() if name.startswith("loss/")]
    assert [float(part.count) for part in parts] == [2, 2, 1, 1]
    torch.testing.assert_close(output.loss.detach(), sum(part.total for part in parts) / 6)


def test_losses_are_float32_under_autocast_and_close_to_double(build, make_batch, small_vit) -> None:
    model, batch = build(SELF_DISTILLATION, num_local=2), make_batch(4, num_local=2)
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, PrototypeHead):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch)
    assert [logits.dtype for logits in seen] == [torch.float32] * 2
    exact = model.double()(batch)
    for name in ("dino_loss", "ibot_loss", "koleo_loss"):
        ours, expected = (float(output.metrics[f"self_distillation/{name}"]) for output in (half, exact))
        assert ours == pytest.approx(expected, rel=0.03), name
        assert ours != pytest.approx(expected, rel=1e-9)  # autocast was on


def test_the_student_sees_a_mask_token_where_the_teacher_sees_the_patch(build, make_batch) -> None:
    model, batch = build(SELF_DISTILLATION), make_batch(3)
    mask = batch.masks[0]
    tokens: list[Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].detach()))
    with torch.no_grad():
        model.mask_token.fill_(3.0)
        model(batch)
        embedded = model.encoder.patch_embed(model.normalise(batch.views[0]))  # [B, N, D]
    positions = model.encoder.pos_embed[:, 1:].detach()
    expected = torch.where(mask.unsqueeze(2), torch.tensor(3.0), embedded) + positions
    torch.testing.assert_close(tokens[0][:, 1:], expected, rtol=1e-5, atol=1e-5)


SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
ROTARY = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "dynamic_img_size": True}
ENCODERS: dict[str, Callable[[], Vit]] = {
    "rotary, registers": lambda: Eva(**SHAPE, **ROTARY, num_reg_tokens=2, global_pool="avg", use_fc_norm=False),
    "no class token": lambda: VisionTransformer(
        **SHAPE, class_token=False, reg_tokens=2, global_pool="avg", fc_norm=False, drop_path_rate=0.2
    ),
}


@pytest.mark.parametrize("make_vit", ENCODERS.values(), ids=ENCODERS)
def test_encoders_of_other_kinds_learn_too(make_batch, make_vit: Callable[[], Vit]) -> None:
    vit = make_vit()
    vit.set_grad_checkpointing(True)
    model = build_pretraining_model(
        vit,
        read(SELF_DISTILLATION, EMA_LATENTS),
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        teachers={},
        local_views=(2, 3),
        length=RunLength(num_steps=3, global_batch_size=4),
    )
    train(model, make_batch(4, num_local=2), num_steps=2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not torch.equal(model.exported_encoder.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)


def test_nothing_of_the_teacher_is_in_the_tree_or_gets_a_gradient(build, make_batch) -> None:
    model = build(SELF_DISTILLATION | {"separate_heads": True}, num_local=1)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"encoder", "objectives", "mask_token"}
    heads = {".".join(name.split(".")[:3]) for name in model.state_dict() if name.startswith("objectives.")}
    assert heads == {f"objectives.self_distillation.{head}" for head in ("head", "patch_head")}
    assert {name.partition(".")[0] for name in model.copy_extra_state()} == {"teacher"}
    model(make_batch(4, num_local=1)).loss.backward()
    teachers = [*model.teacher_encoder, *model.objectives["self_distillation"].teacher_heads]
    assert len(teachers) == 3
    for teacher in teachers:
        assert not teacher.training
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_the_teachers_temperature_rises_linearly() -> None:
    config = SelfDistillationConfig(teacher_temperature=0.07, warmup_teacher_samples=100)
    values = [compute_teacher_temperature(config, step, global_batch_size=25) for step in (0, 1, 2, 4, 100)]
    assert values == pytest.approx([0.04, 0.0475, 0.055, 0.07, 0.07])
    assert compute_teacher_temperature(SelfDistillationConfig(), 0, 25) == 0.04


def test_a_config_that_cannot_be_is_named(build) -> None:
    with pytest.raises(
        UserError, match=r"ibot_weight 1\.0 predicts hidden patches, and its mask is null; give it a mask"
    ):
        build(SELF_DISTILLATION | {"mask": None})
    with pytest.raises(UserError, match=r"self_distillation has the mask .* and masked_image has"):
        get_mask_config(
            read(SELF_DISTILLATION, {"kind": "masked_image", "mask": {"ratio": 0.75}, "target": {"kind": "pixels"}})
        )
    with pytest.raises(UserError, match=r"one teacher follows with .*0\.994.*, another with .*0\.9,"):
        build(SELF_DISTILLATION, EMA_LATENTS | {"target": EMA_LATENTS["target"] | {"ema": {"momentum": 0.9}}})
    assert get_mask_config(read(SELF_DISTILLATION | {"mask": None, "ibot_weight": 0.0})) is None
    accumulates = {"centring": "mean", "koleo_weight": 0.0}
    assert find_coupling(read(SELF_DISTILLATION | accumulates)) is None
    assert "KoLeo" in find_coupling(read(SELF_DISTILLATION | {"centring": "mean"}))
    assert "centring: mean" in find_coupling(read(SELF_DISTILLATION))
