"""The EMA teacher: how it moves, what it keeps, and its tokens as targets of hidden patches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfm.errors import UserError
from panfm.objectives.ema import EmaConfig, EmaTeacher, compute_momentum
from panfm.objectives.encoding import encode_by_teacher
from tests.objectives.conftest import EMA_LATENTS, SELF_DISTILLATION, get_scalars, train

TARGET = EMA_LATENTS["target"]


def test_momentum_rises_along_half_a_cosine() -> None:
    config = EmaConfig(momentum=0.9, final_momentum=1.0)
    values = [compute_momentum(config, step, num_steps=101) for step in (0, 25, 50, 100, 200)]
    assert values == pytest.approx([0.9, 0.9146446609, 0.95, 1.0, 1.0])
    assert compute_momentum(config, 0, num_steps=1) == 0.9


def test_an_update_is_the_weighted_mean_in_float32() -> None:
    """In bfloat16 a thousandth of the way is rounded away; here a thousand of them go most of it."""
    student = nn.BatchNorm1d(4).bfloat16()
    teacher = EmaTeacher(EmaConfig(momentum=0.999, final_momentum=0.999), num_steps=1000)
    average = teacher.follow("norm", student)
    nn.init.constant_(student.weight, 2.0)
    student.running_mean.fill_(7.0)
    for step in range(1000):
        teacher.update(step)
    assert average.weight.dtype == torch.float32 and not average.training
    torch.testing.assert_close(average.weight, torch.full((4,), 2 - 0.999**1000), rtol=1e-3, atol=0)
    assert torch.equal(average.running_mean, torch.full((4,), 7.0))  # buffers are copied
    assert torch.equal(student.weight.detach(), torch.full((4,), 2.0, dtype=torch.bfloat16))
    assert set(teacher.get_state()) == {f"norm.{name}" for name in student.state_dict()}


def test_extra_state_is_taken_back_to_the_bit_or_refused(build, make_batch) -> None:
    config = SELF_DISTILLATION | {"centring": "mean"}
    first, second = build(config, EMA_LATENTS), build(config, EMA_LATENTS, seed=1)
    train(first, make_batch(4), num_steps=2)
    saved = first.copy_extra_state()
    assert any(name.startswith("teacher.encoder.") for name in saved)
    assert {name for name in saved if not name.startswith("teacher.")} == {
        "objectives.self_distillation.centre.value",
        "objectives.self_distillation.patch_centre.value",
    }
    second.load_extra_state(saved, "here")
    again = second.copy_extra_state()
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    name = "objectives.self_distillation.centre.value"
    for changed, words in (
        ({}, "is missing"),
        ({key: value for key, value in saved.items() if key != name}, f"{name} is missing"),
        (saved | {name: torch.zeros(3)}, r"centre.value is \(3,\) where this run has \(32,\)"),
        (saved | {"more": torch.zeros(1)}, "more is unknown"),
    ):
        with pytest.raises(UserError, match=rf"step-1: .*{words}.*EMA teacher"):
            second.load_extra_state(changed, "step-1")
    pixels = build({"kind": "masked_image", "target": {"kind": "pixels"}})
    assert pixels.copy_extra_state() == {} and pixels.exported_encoder is pixels.encoder
    pixels.load_extra_state({}, "step-1")


def test_the_teacher_goes_where_the_model_goes_and_is_exported(build, make_batch) -> None:
    model = build(SELF_DISTILLATION)
    assert model.exported_encoder is model.teacher_encoder[0]
    assert build(SELF_DISTILLATION | {"ema": {"export": "student"}}).exported_encoder.training
    model.double()
    assert {tensor.dtype for tensor in model.copy_extra_state().values()} == {torch.float64}
    train_steps = [tensor.clone() for tensor in model.exported_encoder.parameters()]
    model.begin_step(0)
    model(make_batch(2)).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(train_steps, model.exported_encoder.parameters(), strict=True))


def test_the_target_is_the_mean_of_the_last_blocks(small_vit) -> None:
    vit, images = small_vit.double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    outputs: list[Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    tokens = encode_by_teacher(vit, images, None)
    torch.testing.assert_close(tokens, vit.forward_features(images).detach(), rtol=0, atol=1e-12)
    assert not tokens.requires_grad and not torch.is_inference(tokens)
    outputs.clear()
    both = encode_by_teacher(vit, images, None, num_blocks=2)
    normalised = [F.layer_norm(output, (64,), eps=1e-6) for output in outputs]
    torch.testing.assert_close(both, F.layer_norm(sum(normalised) / 2, (64,), eps=1e-6), rtol=0, atol=1e-12)
    last = encode_by_teacher(vit, images, None, num_blocks=1)
    assert (last - F.layer_norm(normalised[1], (64,), eps=1e-6)).abs().max() < 1e-5
    assert all(len(block._forward_hooks) == 1 for block in vit.blocks)  # its own are gone
    with torch.autocast("cpu", torch.bfloat16):
        assert encode_by_teacher(vit.float(), images.float(), None, num_blocks=2).dtype == torch.float32


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
@pytest.mark.parametrize("tokens", ["hidden", "all"])
@pytest.mark.parametrize(("size", "ratio"), [(3, 0.5), (1, 0.5), (4, 0.0), (2, 0.9375)])
def test_latents_are_compared_token_by_token(
    build, make_batch, loss: str, tokens: str, size: int, ratio: float
) -> None:
    mask = {"kind": "block", "ratio": ratio}
    model, batch = (
        build(EMA_LATENTS | {"mask": mask, "target": TARGET | {"loss": loss, "tokens": tokens}}),
        make_batch(size, ratio),
    )
    objective, seen = model.objectives["masked_image_ema_teacher"], {}
    objective.head.register_forward_hook(lambda module, args, output: seen.update(predictions=output.detach()))
    output = model(batch)
    output.loss.backward()
    assert all(value.isfinite() for value in (output.loss, *get_scalars(output)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    target = encode_by_teacher(model.teacher_encoder[0], batch.views[0], model.normalise, num_blocks=2)  # [B, 17, D]
    order = batch.masks[0].to(torch.uint8).argsort(dim=1, stable=True)
    num_hidden = int(batch.masks[0][0].sum())
    expected = torch.stack([row[1:][places] for row, places in zip(target, order, strict=True)])
    expected = expected[:, 16 - num_hidden :] if tokens == "hidden" else torch.cat([target[:, :1], expected], dim=1)
    assert seen["predictions"].shape == expected.shape
    if not expected.shape[1]:
        assert float(output.loss.detach()) == 0.0  # nothing hidden, nothing to predict
    elif loss == "smooth_l1":
        torch.testing.assert_close(output.loss.detach(), F.smooth_l1_loss(seen["predictions"], expected))
    else:
        cosines = F.cosine_similarity(seen["predictions"], expected, dim=-1)
        torch.testing.assert_close(output.loss.detach(), (1 - cosines).mean())
    assert ("masked_image_ema_teacher/cosine_visible" in output.metrics) == (tokens == "all")


def test_more_blocks_than_there_are_is_an_error(build) -> None:
    with pytest.raises(UserError, match=r"target.num_blocks \(6\) must not exceed the encoder's 2 blocks; try 1"):
        build(EMA_LATENTS | {"target": {"kind": "ema_teacher"}})
