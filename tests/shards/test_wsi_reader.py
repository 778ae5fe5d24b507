"""Open slides: one cache and a few handles a process, none over a fork; slides of many files; exact copies."""

import multiprocessing
import shutil
import threading
from pathlib import Path

import numpy as np
import openslide
import pytest

from panfm.files import compute_file_sha256
from panfm.shards import wsi_reader
from panfm.shards.wsi import SlideError, SlideSettings, judge_plan, plan_tiles, read_tiles
from panfm.shards.wsi_reader import (
    NUM_HANDLES,
    compute_slide_sha256,
    count_slide_bytes,
    find_slide_file,
    list_slide_files,
    open_slide,
)
from tests.shards.wsi_pyramids import draw_tissue, write_pyramid


def open_in_child(path: Path, parent: int) -> tuple[bool, bytes]:
    """Whether the handle is another object than the parent's, and what it reads."""
    slide = open_slide(path)
    picture = slide.read_box(0, (0, 0), (64, 64), (64, 64))
    assert picture is not None
    return id(slide) != parent, picture.image.tobytes()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_handles_do_not_cross_a_fork(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(256, 256), mpp=0.5, factors=(1,))
    slide = open_slide(path)
    assert open_slide(path) is slide
    with multiprocessing.get_context("fork").Pool(1) as pool:
        is_new, pixels = pool.apply(open_in_child, (path, id(slide)))
    assert is_new and pixels == draw_tissue(256, 256)[:64, :64].tobytes()
    assert open_slide(path) is slide  # and the parent keeps its own


def test_each_thread_has_its_own_handles(tmp_path: Path) -> None:
    """An error latches a handle: another thread's good region must not be lost by it."""
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(256, 256), mpp=0.5, factors=(1,))
    slides = [open_slide(path)]
    thread = threading.Thread(target=lambda: slides.append(open_slide(path)))
    thread.start()
    thread.join()
    assert slides[0] is not slides[1]


def test_few_slides_stay_open(tmp_path: Path) -> None:
    first = write_pyramid(tmp_path / "0.tiff", draw_tissue(64, 64), mpp=0.5, factors=(1,))
    slide = open_slide(first)
    for number in range(1, NUM_HANDLES + 1):
        path = tmp_path / f"{number}.tiff"
        shutil.copy(first, path)
        if number == 2:
            assert open_slide(first) is slide
        open_slide(path)
    assert open_slide(first) is slide  # slide 1 went, the least recently used
    assert len(wsi_reader._get_slides()) == NUM_HANDLES
    second = open_slide(tmp_path / "2.tiff")
    for number in range(3, NUM_HANDLES + 1):
        open_slide(tmp_path / f"{number}.tiff")
    open_slide(tmp_path / "1.tiff")
    assert open_slide(first) is not slide
    assert second.read_box(0, (0, 0), (64, 64), (64, 64)) is not None  # who still holds a slide can read it


def test_a_replaced_file_is_another_slide(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "slide.tiff", draw_tissue(256, 256), mpp=0.5, factors=(1,))
    before = open_slide(path)
    write_pyramid(tmp_path / "new.tiff", 255 - draw_tissue(256, 256), mpp=0.5, factors=(1,)).replace(path)
    picture = open_slide(path).read_box(0, (0, 0), (64, 64), (64, 64))
    assert open_slide(path) is not before and picture is not None
    assert np.array_equal(np.asarray(picture.image), 255 - draw_tissue(256, 256)[:64, :64])


def test_what_a_level_stores_is_copied_and_not_resampled(tmp_path: Path) -> None:
    """Also where the stated resolution is off in the fourth digit, as rational numbers in TIFF tags are."""
    image = np.random.default_rng(0).integers(0, 256, (448, 896, 3), dtype=np.uint8)
    path = write_pyramid(tmp_path / "slide.tiff", image, mpp=0.2501, factors=(1, 2))
    with openslide.OpenSlide(path) as slide:
        stored = np.asarray(slide.read_region((0, 0), 1, (448, 224)).convert("RGB"))
    tiles = list(read_tiles(plan_tiles(path, SlideSettings(tile_um=56, mpp=0.5, min_tissue=0.0))))
    assert len(tiles) == 8 and tiles[0].level == 1
    for tile in tiles:
        assert tile.image is not None
        x, y = tile.x0 // 2, tile.y0 // 2
        assert np.array_equal(tile.image, stored[y : y + 112, x : x + 112])


def test_the_files_of_a_slide(tmp_path: Path) -> None:
    single = tmp_path / "a.svs"
    single.write_bytes(b"slide")
    assert list_slide_files(single) == (single,) and count_slide_bytes(single) == 5
    assert compute_slide_sha256(single) == compute_file_sha256(single)
    mrxs, companions = tmp_path / "b.mrxs", tmp_path / "b"
    mrxs.write_bytes(b"head")
    companions.mkdir()
    (companions / "Data0000.dat").write_bytes(b"data")
    assert list_slide_files(mrxs) == (mrxs, companions / "Data0000.dat") and count_slide_bytes(mrxs) == 8
    before = compute_slide_sha256(mrxs)
    (companions / "Data0000.dat").write_bytes(b"Data")
    assert compute_slide_sha256(mrxs) != before
    with pytest.raises(SlideError, match="a folder without a DICOM slide"):
        find_slide_file(companions)
    with pytest.raises(OSError, match=r"none\.svs"):
        count_slide_bytes(tmp_path / "none.svs")


@pytest.mark.real
def test_a_dicom_slide_is_named_by_a_file_or_its_folder(real_data: Path, tmp_path: Path) -> None:
    fixtures, folder = real_data / "slides/openslide_python_fixtures", tmp_path / "slide"
    folder.mkdir()
    for number, name in enumerate(("boxes_0.dcm", "boxes_1.dcm")):
        shutil.copy(fixtures / name, folder / f"IM{number}")  # as archives export them
    (folder / "README.txt").write_text("not DICOM")
    (folder / "DICOMDIR").write_bytes(b"an index, no slide")
    settings = SlideSettings(tile_um=7.984, mpp=0.499, min_tissue=0.0)
    plans = [plan_tiles(path, settings) for path in (folder / "IM0", folder / "IM1", folder)]
    assert [len(plan.places) for plan in plans] == [1, 1, 1] and plans[2].path == folder / "IM0"
    assert plans[0].series is not None and len({plan.series for plan in plans}) == 1  # so a table's repeats are found
    pixels = [next(read_tiles(plan)).image for plan in plans]
    assert all(image is not None and np.array_equal(image, pixels[0]) for image in pixels)
    assert {plan.colour for plan in plans} == {"srgb"}
    assert len(list_slide_files(folder)) == 3
    shutil.copy(real_data / "slides/highdicom/sm_image.dcm", folder / "another.dcm")
    with pytest.raises(SlideError, match=r"holds 2 slides \(DICOM series\); give each its own folder") as caught:
        plan_tiles(folder, settings)
    assert caught.value.reason == "several_slides"


@pytest.mark.real
def test_a_dicom_slide_becomes_tiles(real_data: Path) -> None:
    settings = SlideSettings(tile_um=7.984, mpp=0.499, min_tissue=0.0)
    plan = plan_tiles(real_data / "slides/highdicom/sm_image.dcm", settings)
    tiles = list(read_tiles(plan))
    assert judge_plan(plan) is None and plan.slide_mpp == (0.499, 0.499) and len(tiles) == 9  # 50 px of 16
    assert all(tile.image is not None and tile.image.shape == (16, 16, 3) for tile in tiles)
    for name in ("sm_image_grayscale.dcm", "sm_image_jpegls.dcm"):
        with pytest.raises(SlideError, match=f"{name}: OpenSlide cannot open it"):
            plan_tiles(real_data / "slides/highdicom" / name, settings)
