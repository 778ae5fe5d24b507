"""The pretraining model: what it encodes, sums and reports, and that every objective can learn a batch by heart."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from panfm.config import to_plain, validate
from panfm.data.masking import MaskConfig
from panfm.errors import UserError
from panfm.objectives.demands import get_mask_config, get_num_views, get_teacher_addresses
from panfm.objectives.pretraining import PixelNormaliser, PretrainingModel
from tests.objectives.conftest import EMA_LATENTS, SELF_DISTILLATION, Run, get_scalars, read, train

PIXELS = {"kind": "masked_image", "target": {"kind": "pixels"}, "predictor": {"width": 32, "depth": 2, "num_heads": 2}}
LATENTS = {"kind": "masked_image", "target": {"kind": "frozen_teacher", "address": "timm:some"}, "weight": 2.0}
VIEWS = {"kind": "contrastive", "positives": "views", "hidden_dim": 64, "output_dim": 16}
LESION = {"kind": "contrastive", "positives": "lesion", "num_views": 1, "hidden_dim": 64, "output_dim": 16}


RESTING = {"ema": {"momentum": 1.0}}  # a teacher that moves away is no fixed thing to learn
COSINE = {"target": {"kind": "ema_teacher", "num_blocks": 1, "loss": "cosine", "tokens": "all", **RESTING}}
BY_HEART = {
    "pixels": (PIXELS, 0.5),
    "latents": (LATENTS, 0.4),
    "latents and the teacher's feature": (LATENTS | {"target": LATENTS["target"] | {"feature_weight": 1.0}}, 0.4),
    "ema latents": (EMA_LATENTS | {"target": EMA_LATENTS["target"] | RESTING}, 0.5),
    "ema latents, cosine": (EMA_LATENTS | COSINE, 0.3),
    "views": (VIEWS, 0.1),
    "lesion": (LESION, 0.1),
}


@pytest.mark.parametrize(("objective", "goal"), BY_HEART.values(), ids=BY_HEART)
def test_every_objective_learns_a_fixed_batch_by_heart(
    build, make_batch, objective: dict[str, Any], goal: float
) -> None:
    size = 8 if objective["kind"] == "contrastive" else 4  # four images are of one patient: nothing to push apart
    outputs = train(build(objective | {"weight": 1.0}), make_batch(size), num_steps=40)
    losses = [float(output.loss.detach()) for output in outputs]
    assert losses[-1] < goal * losses[0], losses[::10]


def test_loss_is_the_weighted_sum_and_metrics_are_named(build, make_batch) -> None:
    output = build(PIXELS, LATENTS, VIEWS, LESION, LESION)(make_batch(8))
    parts = {name: float(value) for name, value in output.metrics.items() if name.endswith("/loss")}
    assert list(parts) == [
        "masked_image_pixels/loss",
        "masked_image_frozen_teacher/loss",
        "contrastive_views/loss",
        "contrastive_lesion/loss",
        "contrastive_lesion_2/loss",
    ]
    total = sum((2.0 if "teacher" in name else 1.0) * value for name, value in parts.items())
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-6)
    assert output.loss.dtype == torch.float32 and output.loss.ndim == 0
    assert not any(scalar.requires_grad or scalar.ndim for scalar in get_scalars(output))


def count_encodings(model: PretrainingModel, batch: Any) -> list[tuple[int, int]]:
    """Number of images, and of tokens of each, in every pass through the encoders, the teacher's last."""
    passes: list[tuple[int, int]] = []
    for encoder in (model.encoder, *model.teacher_encoder):
        encoder.norm.register_forward_hook(lambda module, args, output: passes.append(tuple(output.shape[:2])))
    model(batch)
    return passes


def test_an_encoding_is_shared_by_all_who_ask_for_it(build, make_batch) -> None:
    def count(*objectives: dict[str, Any]) -> list[tuple[int, int]]:
        return count_encodings(build(*objectives, num_local=3), make_batch(4, num_local=3))

    half, whole, local = 1 + 8, 1 + 16, 1 + 4
    assert count(PIXELS, LATENTS) == [(4, half)]
    assert count(PIXELS, LATENTS, VIEWS, LESION) == [(8, half)]  # view 0 and view 1, in one pass
    assert count(PIXELS, LESION | {"visible_only": False}) == [(4, half), (4, whole)]
    # View 0 with mask tokens, view 1 whole, three local views; the teacher sees views 0 and 1.
    assert count(SELF_DISTILLATION) == [(4, whole), (4, whole), (12, local), (8, whole)]
    both = SELF_DISTILLATION | {"masked_views": 2}
    assert count(both, EMA_LATENTS) == [(8, whole), (12, local), (8, whole), (4, half), (4, whole)]
    alone = SELF_DISTILLATION | {"ibot_weight": 0.0}  # shares the visible patches of view 0
    assert count(alone, EMA_LATENTS) == [(4, half), (4, whole), (12, local), (8, whole), (4, whole)]


def test_each_view_has_its_own_mask(build, make_batch) -> None:
    model, batch = build(PIXELS, VIEWS), make_batch(4, lesions=[1, 2, 3, 4])
    changed = replace(batch, masks=torch.stack([batch.masks[0], ~batch.masks[1]]))  # half are hidden either way
    before, after = model(batch).metrics, model(changed).metrics
    assert float(before["masked_image_pixels/loss"]) == float(after["masked_image_pixels/loss"])
    assert float(before["contrastive_views/loss"]) != float(after["contrastive_views/loss"])


@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_gradient_in_every_step(build, make_batch, autocast: bool) -> None:
    model = build(PIXELS, LATENTS, VIEWS, LESION)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(make_batch(4, lesions=[1, 2, 3, 4])).loss
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_heads_are_a_function_of_the_seed_and_leave_the_global_state(build) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(LATENTS, VIEWS, seed=seed).objectives.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    key = "contrastive_views.head.layers.0.weight"
    assert not torch.equal(first[key], other[key])


def test_state_dict_holds_encoder_and_heads_and_nothing_else(build) -> None:
    model = build(LATENTS, VIEWS)
    own = {name.removeprefix("encoder."): value for name, value in model.state_dict().items() if "encoder." in name}
    assert own.keys() == model.encoder.state_dict().keys()
    others = {".".join(name.split(".")[:3]) for name in model.state_dict() if not name.startswith("encoder.")}
    assert others == {
        "objectives.masked_image_frozen_teacher.regressor",
        "objectives.masked_image_frozen_teacher.head",
        "objectives.contrastive_views.head",
        "objectives.contrastive_views.log_scale",
    }


def test_pixels_are_normalised_by_channel() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 1, 3)
    ours = PixelNormaliser(mean=(0.5, 0.4, 0.0), std=(0.5, 0.2, 1.0))(images)
    expected = torch.tensor([[-1.0, -0.6, 1.0], [-2.0, -1.0, 3.0], [0.0, 0.2, 1.0]])
    torch.testing.assert_close(ours, expected.view(1, 3, 1, 3).expand(2, 3, 1, 3), rtol=0, atol=1e-6)


def test_a_pixel_target_is_taken_from_the_normalised_image(build, make_batch) -> None:
    model = build(PIXELS | {"target": {"kind": "pixels", "normalise": False}})
    objective = model.objectives["masked_image_pixels"]
    torch.nn.init.zeros_(objective.decoder.predict.weight)  # predictions are 0: the loss is the targets' mean square
    batch = make_batch(2)
    squares = (batch.views[0].float() / 255 - 0.5).div(0.25).square().mean(dim=1)  # [B, 32, 32]
    patches = squares.unflatten(2, (4, 8)).unflatten(1, (4, 8)).mean(dim=(2, 4)).flatten(1)  # [B, 16]
    expected = patches[batch.masks[0]].mean()
    assert float(model(batch).loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_loader_is_told_masks_teachers_and_views() -> None:
    objectives = read(PIXELS, LATENTS, LATENTS, VIEWS)
    assert get_mask_config(objectives) == MaskConfig(kind="block", ratio=0.5)
    assert get_teacher_addresses(objectives) == ("timm:some",)
    assert get_num_views(objectives) == 2
    assert get_mask_config(read(VIEWS)) is None and get_num_views(read(LESION)) == 1


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"kind": "masked"}, "masked_image"),
        (PIXELS | {"target": {"kind": "own_teacher"}}, "ema_teacher"),
        (PIXELS | {"mask": {"ratio": 1.0}}, "ratio"),
        (VIEWS | {"temperature": 0.0}, "temperature"),
        (VIEWS | {"temprature": 0.1}, "temprature"),
        ({"kind": "masked_image", "target": {"kind": "frozen_teacher"}}, "address is missing"),
    ],
)
def test_a_wrong_objective_is_one_clear_line(objective: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read(objective)
    assert "\n" not in str(error.value)


def test_sizes_and_masks_that_do_not_fit_are_named(build) -> None:
    with pytest.raises(UserError, match=r"predictor.width \(30\) .*num_heads \(2\); try 32"):
        build(PIXELS | {"predictor": {"width": 30, "num_heads": 2}})
    with pytest.raises(UserError, match="all must be the same"):
        build(PIXELS, LATENTS | {"mask": {"kind": "random", "ratio": 0.75}})


def test_a_config_survives_writing_and_reading() -> None:
    run = validate(Run, {"objectives": [PIXELS, LATENTS, LESION]}, "run.yaml")
    assert validate(Run, to_plain(run), "config.yaml") == run


def test_a_step_leaves_the_batch_as_it_was(build, make_batch) -> None:
    batch = make_batch(4)
    before: list[Tensor] = [view.clone() for view in batch.views]
    build(PIXELS, LATENTS)(batch).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(batch.views, before, strict=True))
