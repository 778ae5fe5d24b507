from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from panfm.data.loader import DataConfig, Loader, build_loader
from panfm.data.masking import MaskConfig
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig, EvalTransform
from panfm.models.vit import EncoderConfig, TokenSplit, build_vit
from panfm.objectives.demands import ObjectiveConfig
from panfm.objectives.masked_image import MaskedImageConfig, MaskedPixels, PredictorConfig
from panfm.objectives.pretraining import PretrainingModel, build_pretraining_model
from panfm.objectives.targets import PixelTargetConfig, compute_pixel_targets
from panfm.training.pictures import (
    GAP,
    GREY,
    HEADER,
    HEAT,
    MARGIN,
    Examples,
    choose_examples,
    compute_panels,
    compute_token_colours,
    draw_sheet,
    fill_in,
    hide,
    lay_over,
)
from tests.training.conftest import build_labelled

PIXELS = MaskedImageConfig(
    mask=MaskConfig(kind="random", ratio=0.5),
    target=PixelTargetConfig(),
    predictor=PredictorConfig(depth=1, width=32, num_heads=2),
)


def build_model(*objectives: ObjectiveConfig) -> PretrainingModel:
    vit = build_vit(EncoderConfig(name="test_vit", image_size=32, patch_size=8), seed=0)
    return build_pretraining_model(
        vit, objectives, image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.2), teachers={}
    )


def open_loader(*shards: Path, mask: MaskConfig | None = PIXELS.mask) -> Loader:
    return build_loader(
        DataConfig(shards=tuple(map(str, shards)), workers=0),
        MixtureConfig(),
        AugmentConfig(image_size=32),
        mask=mask,
        mask_grid=(4, 4),
        seed=0,
        global_batch_size=8,
        micro_batch_size=8,
        excluded={},
    )


def draw_images(count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_mask(*hidden: int) -> Tensor:
    mask = torch.zeros(16, dtype=torch.bool)
    mask[list(hidden)] = True
    return mask


def test_hidden_patches_are_grey_and_visible_ones_untouched() -> None:
    images, masks = draw_images(), torch.stack([make_mask(0, 5), make_mask(3, 14)])
    shown = hide(images, masks, (8, 8))
    for image, mask, seen in zip(images, masks, shown, strict=True):
        for place in range(16):
            rows, columns = slice(8 * (place // 4), 8 * (place // 4) + 8), slice(8 * (place % 4), 8 * (place % 4) + 8)
            if mask[place]:
                assert bool((seen[:, rows, columns] == GREY).all())
            else:
                assert torch.equal(seen[:, rows, columns], image[:, rows, columns])


class Oracle(nn.Module):
    """A decoder that predicts the targets of these images exactly."""

    def __init__(self, images: Tensor, model: PretrainingModel, patch_normalise: bool) -> None:
        super().__init__()
        self.compute = lambda hidden: compute_pixel_targets(
            images, hidden, (8, 8), model.normalise, patch_normalise=patch_normalise
        )

    def forward(self, tokens: Tensor, split: TokenSplit) -> Tensor:
        return self.compute(split.hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("patch_normalise", [True, False])
def test_a_perfect_prediction_restores_the_image(patch_normalise: bool) -> None:
    model, images = build_model(PIXELS), draw_images()
    masks = torch.stack([make_mask(0, 5, 6), make_mask(3, 14, 15)])
    oracle = Oracle(images, model, patch_normalise)
    objective = MaskedPixels(oracle, (8, 8), model.normalise, patch_normalise=patch_normalise)  # type: ignore[arg-type]
    assert torch.equal(fill_in(model, objective, images, masks), images)


def test_a_prediction_stays_out_of_visible_patches() -> None:
    model, images = build_model(PIXELS), draw_images()
    (objective,) = model.objectives.values()
    assert isinstance(objective, MaskedPixels)
    masks = torch.stack([make_mask(0, 5), make_mask(3, 14)])
    filled = fill_in(model, objective, images, masks)
    visible = hide(images, ~masks, (8, 8)) == GREY
    assert torch.equal(hide(filled, masks, (8, 8)), hide(images, masks, (8, 8)))
    assert bool((filled != images)[visible.logical_not().expand_as(images)].any())  # and something was pasted


def test_token_colours_do_not_depend_on_the_signs_of_components() -> None:
    """Mirroring and turning the token space moves no token to another colour."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(64, 12, generator=generator) * torch.arange(12, 0, -1)
    tokens[:6] += 40 * torch.randn(1, 12, generator=generator)  # a lesion: few tokens, unlike the others
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    colours = compute_token_colours(tokens, rows=8).astype(int)
    for other in (-tokens, tokens @ turn, tokens @ -turn + 3):
        assert np.abs(compute_token_colours(other, rows=8) - colours).max() <= 1
    assert colours.shape == (8, 8, 3)
    first = colours.reshape(64, 3)[:, 0]
    assert first[:6].min() > first[6:].max()  # what is rare is bright


def test_attention_that_is_even_gives_one_colour_and_a_peak_the_brightest() -> None:
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    even = lay_over(image, torch.full((4, 4), 1 / 16))
    assert len(np.unique(even.reshape(-1, 3), axis=0)) == 1
    peak = torch.full((4, 4), 0.01)
    peak[1, 2] = 0.85
    shown = lay_over(image, peak)
    assert shown[12, 20].tolist() == [round(0.35 * 100 + 0.65 * channel) for channel in HEAT[-1]]
    assert int(shown[28, 4].sum()) < int(even[28, 4].sum()) < int(shown[12, 20].sum())  # below, at and above the mean


def test_examples_are_one_of_each_modality_and_the_same_again(shards: Path, held_out: Path) -> None:
    transform = EvalTransform(image_size=32, resize_size=36)
    examples = choose_examples(open_loader(shards, held_out), transform)
    assert examples.modalities == ("clinical", "dermoscopic") and examples.are_open
    assert examples.masks is not None and examples.masks.shape == (2, 16) and examples.masks.sum().item() == 16
    again = choose_examples(open_loader(shards, held_out), transform)
    assert torch.equal(again.images, examples.images) and torch.equal(again.masks, examples.masks)
    assert choose_examples(open_loader(shards, mask=None), transform).masks is None


def test_examples_of_a_private_source_are_not_open(shards: Path, tmp_path: Path) -> None:
    """wandb does not get their pictures unless it is asked for."""
    rows = [{"patient": f"{n}", "modality": "clinical", "diagnosis": "nevus"} for n in range(8)]
    private = build_labelled(tmp_path, "private", rows, access="private")
    assert not choose_examples(open_loader(shards, private), EvalTransform(image_size=32, resize_size=36)).are_open


def test_a_sheet_holds_every_panel_at_its_place() -> None:
    model, images = build_model(PIXELS), draw_images()
    model.train()
    state = torch.get_rng_state()
    examples = Examples(("clinical", "total_body"), images, torch.stack([make_mask(0), make_mask(15)]), are_open=True)
    panels = compute_panels(model, examples)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.encoder.training
    titles = ["image", "visible", "filled in", "tokens, PCA as RGB", "attention, 0 to 4 x its mean"]
    assert [list(one) for one in panels] == [titles, titles]
    assert all(panel.shape == (32, 32, 3) and panel.dtype == np.uint8 for one in panels for panel in one.values())

    side, label = 192, 118  # 32 px enlarged six times
    sheet = draw_sheet(panels, examples.modalities, "run, step 1")
    assert sheet.size == (2 * MARGIN + label + 5 * side + 4 * GAP, HEADER + 2 * side + GAP + MARGIN)
    pixels = np.asarray(sheet)
    for row, one in enumerate(panels):
        for column, panel in enumerate(one.values()):
            top, left = HEADER + row * (side + GAP), MARGIN + label + column * (side + GAP)
            assert np.array_equal(pixels[top + 3 : top + side : 6, left + 3 : left + side : 6], panel)
    left = MARGIN + label + side + GAP  # the second column: what is visible
    assert (pixels[HEADER : HEADER + 48, left : left + 48] == GREY).all()  # the first patch of the first image


def test_without_masks_or_pixels_there_are_no_such_panels() -> None:
    from panfm.objectives.contrastive import ContrastiveConfig

    panels = compute_panels(
        build_model(ContrastiveConfig(hidden_dim=8, output_dim=8)),
        Examples(("clinical",), draw_images(1), None, are_open=True),
    )
    assert [title.split(",")[0] for title in panels[0]] == ["image", "tokens", "attention"]
