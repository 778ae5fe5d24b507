"""Slides to tiles: the physical size is exact, nothing is guessed, what cannot be read is counted and never drawn."""

import json
from pathlib import Path

import numpy as np
import openslide
import pytest

from panfm.errors import UserError
from panfm.shards.synthetic_patients import draw_patient
from panfm.shards.tissue import SLIDE_MPP, SLIDE_SIZE, Stain, draw_section, write_slide
from panfm.shards.wsi import (
    SlideError,
    SlidePlan,
    SlideSettings,
    compute_tissue,
    count_tiles,
    is_bad_slide,
    judge_plan,
    plan_tiles,
    read_slide_tiles,
    read_tiles,
)
from tests.shards.wsi_pyramids import PINK, damage, draw_stripes, draw_tissue, empty, write_pyramid


def test_tile_size_is_whole_pixels() -> None:
    assert SlideSettings().tile_side == 224
    with pytest.raises(ValueError, match=r"tile_um \(113.3\) must be a whole number of pixels.*try 113.5"):
        SlideSettings(tile_um=113.3, mpp=0.5)


def test_tiles_of_the_stored_resolution_are_the_stored_pixels(tmp_path: Path) -> None:
    image = draw_tissue(448, 224)
    path = write_pyramid(tmp_path / "slide.tiff", image, mpp=0.5)
    tiles = list(read_slide_tiles(path, SlideSettings(tile_um=56, mpp=0.5)))
    assert [(tile.x0, tile.y0) for tile in tiles] == [(x, y) for y in (0, 112) for x in (0, 112, 224, 336)]  # row-major
    for tile in tiles:
        assert (tile.level, tile.mpp, tile.tissue_fraction) == (0, 0.5, 1.0)
        assert np.array_equal(tile.image, image[tile.y0 : tile.y0 + 112, tile.x0 : tile.x0 + 112])


@pytest.mark.parametrize(("stated", "level"), [(0.25, 1), (0.251, 1), (0.13, 1), (0.3, 0), (0.12, 2), (0.499, 0)])
def test_a_tile_has_its_microns_whatever_the_scan(tmp_path: Path, stated: float, level: int) -> None:
    """Stripes of 10 um tell where every pixel came from, to a tenth of a micron."""
    width, height = round(150 / stated), round(60 / stated)  # 150 x 60 um
    path = write_pyramid(tmp_path / "slide.tiff", draw_stripes(width, height, stated), mpp=stated)
    settings = SlideSettings(tile_um=50, mpp=0.5, min_tissue=0.0)
    plan = plan_tiles(path, settings)
    assert plan.level == level and plan.slide_mpp == pytest.approx((stated, stated), rel=1e-4)
    assert len(plan.places) == 3
    for tile in read_tiles(plan):
        assert tile.image is not None and tile.image.shape == (100, 100, 3) and tile.mpp == 0.5
        microns = tile.x0 * stated + (np.arange(100) + 0.5) * 0.5
        expected = 150 + 70 * np.sin(2 * np.pi * microns / 10)
        assert np.abs(tile.image[50, 4:-4, 0] - expected[4:-4]).max() < 4.4  # the slope is 44 grey levels a micron


def test_a_coarse_scan_is_refused(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(300, 300), mpp=1.0)
    with pytest.raises(SlideError, match=r"slide.tiff: was scanned at 1 microns per pixel, coarser than the 0.5"):
        plan_tiles(path, SlideSettings())
    assert count_tiles(path, SlideSettings(tile_um=112, mpp=1.0)) == 4


@pytest.mark.parametrize(
    ("stated", "reason"), [(None, "no_mpp"), (352.8, "implausible_mpp"), (0.01, "implausible_mpp")]
)
def test_resolution_is_never_guessed(tmp_path: Path, stated: float | None, reason: str) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(448, 448), mpp=stated)
    with pytest.raises(UserError, match=r"slide.tiff.*fallback_mpp in the source card") as caught:
        plan_tiles(path, SlideSettings())
    assert isinstance(caught.value, SlideError) and caught.value.reason == reason
    assert plan_tiles(path, SlideSettings(fallback_mpp=0.25)).slide_mpp == (0.25, 0.25)


def test_glass_and_dust_are_not_tissue(tmp_path: Path) -> None:
    image = np.full((896, 896, 3), 243, dtype=np.uint8)
    image[:448, :448] = draw_tissue(448, 448)
    image[700:712, 700:712] = PINK  # a speck of 6 um
    image[500:896, :300] = (14, 3, 9)  # the scanner's black fill
    path = write_pyramid(tmp_path / "slide.tiff", image, mpp=0.5)
    plan = plan_tiles(path, SlideSettings())
    assert [(place.x0, place.y0) for place in plan.places] == [(0, 0), (224, 0), (0, 224), (224, 224)]
    assert all(place.tissue_fraction > 0.9 for place in plan.places)
    assert count_tiles(path, SlideSettings(min_tissue=0.0)) == 16


def test_tissue_of_a_blank_slide_is_nowhere() -> None:
    assert not compute_tissue(np.full((40, 40, 3), 240, dtype=np.uint8), 8.0).any()
    assert compute_tissue(draw_tissue(40, 40), 8.0).mean() > 0.9


def test_a_damaged_region_is_a_tile_without_an_image(tmp_path: Path) -> None:
    """Bytes of one stored TIFF tile are overwritten: its tiles have no image, their neighbours are untouched."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(896, 448), mpp=0.5, factors=(1, 8), compression="zlib")
    settings = SlideSettings(tile_um=56, mpp=0.5)
    whole = list(read_slide_tiles(path, settings))
    damage(path, 0)
    plan = plan_tiles(path, settings)
    assert plan.num_unmasked == 0 and len(plan.places) == len(whole) == 32
    tiles = list(read_tiles(plan))
    lost = {(tile.x0, tile.y0) for tile in tiles if tile.image is None}
    assert lost == {(x, y) for x in (0, 112, 224) for y in (0, 112, 224)}  # the stored tile is 256 px wide
    for tile, before in zip(tiles, whole, strict=True):
        if tile.image is not None:
            assert np.array_equal(tile.image, before.image)


def test_a_stored_plan_is_the_plan(tmp_path: Path) -> None:
    """Through JSON and back, with damage in it and without the slide's path: a resumed build need not plan again."""
    path = write_pyramid(tmp_path / "P123.tiff", draw_tissue(896, 448), mpp=0.5, factors=(1, 8), compression="zlib")
    damage(path, 0)
    settings = SlideSettings(tile_um=56, mpp=0.5)
    plan = plan_tiles(path, settings)
    assert len(plan.unreadable) == 9
    text = json.dumps(plan.to_json())
    assert "P123" not in text
    assert SlidePlan.from_json(json.loads(text), path, settings) == plan == plan_tiles(path, settings)


def test_a_slide_with_too_much_damage_is_left_out_whole(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(896, 448), mpp=0.5, factors=(1, 8), compression="zlib")
    damage(path, 0)
    plan = plan_tiles(path, SlideSettings(tile_um=56, mpp=0.5))  # 9 of 32 tiles
    error = judge_plan(plan)
    assert error is not None and error.reason == "bad_slide"
    assert "slide.tiff: 9 of 32 regions cannot be read, more than slides.max_bad_fraction (0.1); copy the" in str(error)
    with pytest.raises(SlideError, match="9 of 32 regions"):
        next(read_slide_tiles(path, plan.settings))
    assert judge_plan(plan_tiles(path, SlideSettings(tile_um=56, mpp=0.5, max_bad_fraction=0.3))) is None
    settings = SlideSettings(max_bad_fraction=0.1)
    assert [is_bad_slide(num, 100, settings) for num in (0, 10, 11)] == [False, False, True]
    assert not is_bad_slide(0, 0, settings)


def test_damage_that_the_small_copy_hides_is_found_by_planning(tmp_path: Path) -> None:
    """A copy that broke off: level 1 came whole, the second half of level 0 did not."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(4480, 896), mpp=0.5, factors=(1, 8), compression="zlib")
    damage(path, *range(36, 72))
    plan = plan_tiles(path, SlideSettings())
    assert plan.num_unmasked == 0 and len(plan.places) == 80
    assert {place.y0 for place in plan.unreadable} == {448, 672} and len(plan.unreadable) == 40
    error = judge_plan(plan)
    assert error is not None and error.reason == "bad_slide"


def test_a_slide_smaller_than_a_tile_says_so(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(200, 200), mpp=0.5)
    error = judge_plan(plan_tiles(path, SlideSettings()))
    assert error is not None and error.reason == "too_small" and "smaller than one tile of 112 um" in str(error)


def test_a_tile_that_the_small_copy_lacks_is_counted(tmp_path: Path) -> None:
    """A single-level slide: where its bytes are gone, the tissue mask cannot know, and no tile is planned."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(4480, 448), mpp=0.5, factors=(1,), compression="zlib")
    damage(path, 0)
    plan = plan_tiles(path, SlideSettings())
    # The stored tile is 128 um wide; blocks that cannot be read are halved down to 256 um.
    assert 4 <= plan.num_unmasked <= 9 and plan.num_unmasked + len(plan.places) == 40
    assert all(tile.image is not None for tile in read_tiles(plan))


def test_what_was_never_scanned_is_white(tmp_path: Path) -> None:
    """Scanners leave out tiles of bare glass; OpenSlide answers transparent black there."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(512, 256), mpp=0.5, factors=(1,), compression="zlib")
    empty(path, 1)
    tiles = list(read_slide_tiles(path, SlideSettings(tile_um=64, mpp=0.5, min_tissue=0.0)))
    means = [tile.image.mean() for tile in tiles]
    assert means[3] == 255 and means[0] == pytest.approx(np.mean(PINK), abs=3)
    assert (tiles[0].tissue_fraction, tiles[3].tissue_fraction) == (1.0, 0.0)


def test_a_synthetic_slide_opens_with_its_resolution(tmp_path: Path) -> None:
    lesion = draw_patient(0, 0).lesions[0]
    images = [
        draw_section(lesion.visits[-1].traits, Stain(1.0, 1.0), lesion.seed, np.random.default_rng(2)) for _ in range(2)
    ]
    assert np.array_equal(*images)
    for name in ("a.tiff", "b.tiff"):
        write_slide(tmp_path / name, images[0])
    assert (tmp_path / "a.tiff").read_bytes() == (tmp_path / "b.tiff").read_bytes()
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert slide.dimensions == SLIDE_SIZE and slide.level_downsamples == (1.0, 2.0, 4.0)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(SLIDE_MPP)
        assert np.array_equal(np.asarray(slide.read_region((0, 0), 0, SLIDE_SIZE))[..., :3], images[0])
    tiles = list(read_slide_tiles(tmp_path / "a.tiff", SlideSettings()))
    assert 6 <= len(tiles) <= 15 and all(tile.image.shape == (224, 224, 3) for tile in tiles)


def test_what_is_no_slide(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"none.svs: no such file"):
        plan_tiles(tmp_path / "none.svs", SlideSettings())
    (tmp_path / "text.svs").write_text("not a slide")
    with pytest.raises(SlideError, match=r"text.svs: OpenSlide cannot open it") as caught:
        plan_tiles(tmp_path / "text.svs", SlideSettings())
    assert caught.value.reason == "unreadable_slide"


@pytest.mark.real
def test_real_slides(real_data: Path) -> None:
    slides = real_data / "slides"
    tiles = list(read_slide_tiles(slides / "openslide_testdata/CMU-1-Small-Region.svs", SlideSettings()))
    assert len(tiles) == 47  # of 9 x 13 at 0.499 microns per pixel
    assert all(tile.image is not None and tile.image.shape == (224, 224, 3) and tile.mpp == 0.5 for tile in tiles)
    assert np.mean([tile.image.mean() for tile in tiles]) < 215  # tissue, not glass
    tcga = slides / "tcga/TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(SlideError, match="states no resolution"):
        plan_tiles(tcga, SlideSettings())
    assert plan_tiles(tcga, SlideSettings(fallback_mpp=0.25)).level == 1
    with pytest.raises(SlideError, match=r"broken.svs: OpenSlide cannot open it"):
        plan_tiles(slides / "histolab/broken.svs", SlideSettings())
    with pytest.raises(SlideError, match=r"352.778 x 352.778 microns per pixel, outside"):
        plan_tiles(slides / "openslide_python_fixtures/boxes.tiff", SlideSettings())
    small = SlideSettings(tile_um=7.984, mpp=0.499)
    assert judge_plan(plan_tiles(slides / "openslide_python_fixtures/small.svs", small)).reason == "no_tissue"  # 8 um
    damaged = plan_tiles(slides / "openslide_python_fixtures/unreadable.svs", small)
    assert (damaged.num_unmasked, damaged.places, judge_plan(damaged).reason) == (1, (), "bad_slide")
    with pytest.raises(SlideError, match="OpenSlide cannot open it"):
        plan_tiles(slides / "openslide_python_fixtures/unopenable.tiff", small)
