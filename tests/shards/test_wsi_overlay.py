"""The picture of a plan: what was kept, what was lost, and nothing that names the slide."""

import io
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from panfm.shards.wsi import SlideSettings, plan_tiles, plan_tiles_with_map
from panfm.shards.wsi_overlay import CONTOUR, KEPT, LOST, PEN, draw_overlay
from tests.shards.wsi_pyramids import damage, draw_tissue, write_pyramid


def find_colour(data: bytes, colour: tuple[int, int, int]) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    return np.abs(image - np.array(colour)).max(axis=2) <= 12


def test_an_overlay_shows_tiles_tissue_ink_and_damage(tmp_path: Path) -> None:
    image = np.full((1792, 1792, 3), 243, dtype=np.uint8)
    image[:896, :896] = draw_tissue(896, 896)
    image[1344:, 1344:] = (51, 162, 141)
    path = write_pyramid(tmp_path / "slide.tiff", image, mpp=0.5, factors=(1, 8), compression="zlib")
    plan, tissue_map = plan_tiles_with_map(path, SlideSettings())
    data = draw_overlay(plan, tissue_map)
    assert data == draw_overlay(plan)  # found anew: the same
    assert Image.open(io.BytesIO(data)).size == (1024, 1024 + 26)
    assert not find_colour(data, LOST).any()
    half = np.s_[:512, :512]
    for colour, there in ((KEPT, half), (CONTOUR, np.s_[:520, :520]), (PEN, np.s_[760:1024, 760:])):
        found = find_colour(data, colour)[:1024]
        assert found[there].sum() > 500 and found.sum() == found[there].sum(), colour
    assert find_colour(data, KEPT)[half].sum() == pytest.approx(16 * 4 * 128, rel=0.1)  # 16 tiles of 128 px
    damage(path, 0)
    broken = plan_tiles(path, SlideSettings(max_bad_fraction=0.5))
    lost = find_colour(draw_overlay(broken), LOST)[:1024]
    assert lost[:256, :256].mean() == pytest.approx(1 / 3, abs=0.1) and not lost[260:].any()  # 2 of 6 pixels
    later = find_colour(draw_overlay(plan, unreadable=plan.places[:1]), LOST)[:1024]
    assert later[:128, :128].any() and not later[130:].any()


def test_what_the_small_copy_lacks_is_hatched(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(1792, 1792), mpp=0.5, factors=(1,), compression="zlib")
    damage(path, 0)
    plan = plan_tiles(path, SlideSettings())
    lost = find_colour(draw_overlay(plan), LOST)[:1024]
    assert plan.num_unmasked > 0 and lost[:146, :146].mean() > 0.25 and not lost[440:].any()  # a block of 256 um


def test_a_slide_that_is_left_out_has_an_overlay_too(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", np.full((448, 448, 3), 243, dtype=np.uint8), mpp=0.5)
    plan = plan_tiles(path, SlideSettings())
    assert plan.places == () and Image.open(io.BytesIO(draw_overlay(plan))).width >= 1024


def test_an_overlay_has_no_name_in_it(tmp_path: Path) -> None:
    first = write_pyramid(tmp_path / "Smith^John.tiff", draw_tissue(448, 448), mpp=0.5)
    (tmp_path / "other").mkdir()
    second = write_pyramid(tmp_path / "other" / "x.tiff", draw_tissue(448, 448), mpp=0.5)
    data = draw_overlay(plan_tiles(first, SlideSettings()))
    assert data == draw_overlay(plan_tiles(second, SlideSettings())) and b"Smith" not in data
    assert Image.open(io.BytesIO(data)).info == {}


@pytest.mark.real
def test_label_and_macro_images_are_never_read(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real slide with label, macro and thumbnail: planning, reading and drawing do without them."""
    path = real_data / "slides/openslide_testdata/CMU-1-Small-Region.svs"
    with openslide.OpenSlide(path) as slide:
        assert set(slide.associated_images) == {"label", "macro", "thumbnail"}

    def refuse(*arguments: object) -> None:
        raise AssertionError("an associated image was read")

    monkeypatch.setattr(openslide.lowlevel, "read_associated_image", refuse)
    monkeypatch.setattr(openslide.lowlevel, "get_associated_image_names", refuse)
    plan, tissue_map = plan_tiles_with_map(path, SlideSettings())
    data = draw_overlay(plan, tissue_map)
    assert find_colour(data, KEPT).sum() > 5000 and len(data) < 500_000
