"""The ways in which other tile cutters get slides wrong, each with the slide that shows it (named in each test)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from panfm.shards.wsi import SlideError, SlideSettings, judge_plan, plan_tiles, read_slide_tiles, read_tiles
from tests.shards.wsi_pyramids import (
    PINK,
    damage,
    draw_stripes,
    draw_tissue,
    empty,
    make_profile,
    write_pyramid,
)


def measure_field_um(image: np.ndarray, period_um: float = 10.0) -> float:
    """The microns that a tile shows from side to side, from the upward crossings of its stripes."""
    row = image[:, :, 0].mean(axis=0) - 150
    up = np.flatnonzero((row[:-1] < 0) & (row[1:] >= 0))
    crossings = up + row[up] / (row[up] - row[up + 1])
    return period_um * (len(up) - 1) / (crossings[-1] - crossings[0]) * image.shape[1]


@pytest.mark.parametrize(
    ("scan", "asked"), [(0.2001, 0.5), (0.299, 0.5), (0.301, 0.5), (0.499, 0.5), (0.505, 0.5), (0.599, 0.6)]
)
def test_magnification_buckets(tmp_path: Path, scan: float, asked: float) -> None:
    """Buckets of 20x and 40x deliver 0.40, 0.598, 0.301 and 0.599 um a pixel for 0.5; here the field is the one asked.

    (TRIDENT#119; CLAM knows levels only.)
    """
    path = write_pyramid(tmp_path / "slide.tiff", draw_stripes(round(400 / scan), round(140 / scan), scan), mpp=scan)
    settings = SlideSettings(tile_um=asked * 224, mpp=asked)
    tiles = list(read_slide_tiles(path, settings))
    assert len(tiles) >= 2
    for tile in tiles:
        assert tile.image is not None and tile.image.shape == (224, 224, 3) and tile.mpp == asked
        assert measure_field_um(tile.image) == pytest.approx(settings.tile_um, rel=0.01)


def test_a_scan_between_the_buckets_is_not_passed_off_as_another(tmp_path: Path) -> None:
    """0.599 is no 0.5: it is refused, for enlarging would pretend to detail."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_stripes(600, 300, 0.599), mpp=0.599)
    with pytest.raises(SlideError, match=r"scanned at 0.599 microns per pixel, coarser than the 0.5 asked for"):
        plan_tiles(path, SlideSettings())


@pytest.mark.parametrize(("width", "downsample"), [(3999, 3.999), (4001, 4.001), (4015, 4.015)])
def test_integer_truncation_of_downsamples(tmp_path: Path, width: int, downsample: float) -> None:
    """int(3.9999) is 3, a field 1.33 times too wide; 4.0001 > 4 reads level 0 at 16 times the cost (openslide#274)."""
    path = write_pyramid(
        tmp_path / "slide.tiff", draw_stripes(width, 4 * round(width / 16), 0.125), mpp=0.125, factors=(1, 4),
        round_size=lambda size: 1000 if size == width / 4 else round(size),
    )  # fmt: skip
    settings = SlideSettings(tile_um=112, mpp=0.5)
    plan = plan_tiles(path, settings)
    assert plan.level == 1, downsample
    tiles = list(read_tiles(plan))
    assert len(tiles) == 4
    for tile in tiles:
        assert tile.image is not None and measure_field_um(tile.image) == pytest.approx(112, rel=0.01)


def test_absurd_resolution_of_tiff_tags(tmp_path: Path) -> None:
    """72 dots per inch, what a TIFF writer states that knows nothing, is 352.8 um a pixel (slideflow#258)."""
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(
        path, draw_tissue(512, 512), tile=(256, 256), photometric="rgb", metadata=None, resolution=(72, 72),
        resolutionunit="INCH",
    )  # fmt: skip
    with pytest.raises(SlideError, match=r"states 352.778 x 352.778 .*outside 0.1-4.0; set slides.fallback_mpp") as bad:
        plan_tiles(path, SlideSettings())
    assert bad.value.reason == "implausible_mpp"
    assert plan_tiles(path, SlideSettings(fallback_mpp=0.5)).level == 0


@pytest.mark.parametrize("spoil", [damage, empty])
def test_corrupt_regions_never_become_white_tiles(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    """White in place of what could not be read enters the bag as data (TRIDENT#92, #207); so do data that are gone."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(1792, 448), mpp=0.5, factors=(1, 8), compression="zlib")
    spoil(path, 0, 1)
    plan = plan_tiles(path, SlideSettings(tile_um=56, mpp=0.5, max_bad_fraction=0.5))
    tiles = list(read_tiles(plan))
    assert len(tiles) == 64 and judge_plan(plan) is None
    lost = [tile for tile in tiles if tile.image is None]
    assert len(lost) == len(plan.unreadable) and {(tile.x0, tile.y0) for tile in lost} >= {(0, 0), (112, 0), (224, 0)}
    for tile in tiles:
        if tile.image is not None:
            assert np.abs(tile.image.mean(axis=(0, 1)) - PINK).max() < 20  # never a share of white


def test_glass_that_was_never_scanned_is_not_counted_as_damage(tmp_path: Path) -> None:
    """The other side of the test above: empty on every level is glass."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(1792, 768), mpp=0.5, factors=(1,), compression="zlib")
    empty(path, 0, 1, 10)  # a strip at the edge, and a hole that is small enough to be filled were it scanned
    plan = plan_tiles(path, SlideSettings(tile_um=56, mpp=0.5))
    assert plan.unreadable == () and judge_plan(plan) is None
    assert all(tile.image is not None for tile in read_tiles(plan))


def test_quality_control_that_rejects_everything_says_so(tmp_path: Path) -> None:
    """A filter that finds nothing gave slides without tiles and no word about it (TRIDENT PR #219)."""
    green = np.zeros((448, 448, 3), dtype=np.uint8) + np.array([70, 170, 150], dtype=np.uint8)
    path = write_pyramid(tmp_path / "slide.tiff", green, mpp=0.5)
    with pytest.raises(SlideError, match=r"none of its 4 tiles has slides.min_tissue.*100.0% has the colours of pens"):
        next(read_slide_tiles(path, SlideSettings()))
    assert len(list(read_slide_tiles(path, SlideSettings(reject_pen=False)))) == 4


def test_transparent_pixels_are_white_and_not_black(tmp_path: Path) -> None:
    """RGBA: what is transparent is drawn on white, half of it half (and not left as the black below)."""
    tissue = draw_tissue(512, 256)
    alpha = np.full((256, 512, 1), 255, dtype=np.uint8)
    alpha[:, 384:] = 0
    alpha[:, 256:384] = 128
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(
        path, np.concatenate([tissue, alpha], axis=2), tile=(256, 256), photometric="rgb", extrasamples=["unassalpha"],
        metadata=None, resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    tiles = list(read_slide_tiles(path, SlideSettings(tile_um=64, mpp=0.5, min_tissue=0.0)))
    means = [tile.image.mean(axis=(0, 1)) for tile in tiles if tile.image is not None]
    assert means[0] == pytest.approx(PINK, abs=3)
    assert means[2] == pytest.approx((np.array(PINK) + 255) / 2, abs=3)
    assert means[3] == pytest.approx((255, 255, 255))


def test_colours_are_those_of_the_profile(tmp_path: Path) -> None:
    """A scanner whose curve is a power of 1.8 looks too dark if its numbers are taken for sRGB."""
    image = draw_tissue(448, 448)
    tiles, stated = {}, {}
    for name, icc in {
        "none": None, "scanner": make_profile(1.8), "grey": make_profile(1.8, b"GRAY"), "damaged": b"no profile" * 20,
    }.items():  # fmt: skip
        path = write_pyramid(tmp_path / f"{name}.tiff", image, mpp=0.5, icc=icc)
        plan = plan_tiles(path, SlideSettings())
        tile = next(read_tiles(plan))
        assert tile.colour == plan.colour and tile.image is not None
        tiles[name], stated[name] = tile.image, plan.colour
    assert stated == {
        "none": "untagged", "scanner": "converted", "grey": "unconvertible", "damaged": "unconvertible",
    }  # fmt: skip
    linear = (image[:224, :224] / 255.0) ** 1.8
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(tiles["scanner"] - expected).max() <= 1.5
    for name in ("none", "grey", "damaged"):
        assert np.array_equal(tiles[name], image[:224, :224])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_open_slides_share_one_cache(tmp_path: Path) -> None:
    """A private cache a handle holds the memory as often as slides are open (openslide#38): here one for all."""
    for number in range(6):
        image = np.full((2048, 2048, 3), 40 * number, dtype=np.uint8)  # 16 MiB decoded
        write_pyramid(tmp_path / f"{number}.tiff", image, mpp=0.5, factors=(1,), compression="zlib")
    code = """
import os, sys
from pathlib import Path
from panfm.shards import wsi_reader
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
wsi_reader.CACHE_BYTES = 16 * 2**20
slides = []
for path in sorted(Path(sys.argv[1]).glob("*.tiff")):
    slides.append(wsi_reader.open_slide(path))
    for y in range(0, 2048, 256):
        for x in range(0, 2048, 256):
            assert slides[-1].read_box(0, (x, y), (256, 256), (256, 256))
    if len(slides) == 1:
        first = held()
print(held() - first)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert float(answer.stdout) < 40  # five more caches of 16 MiB would be 80
