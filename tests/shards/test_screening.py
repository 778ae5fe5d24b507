"""The screening finds print pasted on skin-like pictures and leaves plain ones alone; a face is only schematic here."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from panfm.errors import UserError
from panfm.shards import screening
from panfm.shards.index import open_shard_set
from panfm.shards.screening import find_faces, find_text, screen_images
from panfm.shards.writer import BuildOptions, build_shards

cv2 = pytest.importorskip("cv2", reason="the extra screen (OpenCV) is not installed")


def draw_skin(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Skin-coloured smooth noise with a dark mole and a few hairs, drawn large and shrunk as optics would."""
    generator = np.random.default_rng(seed)
    width, height = large = (4 * size[0], 4 * size[1])
    coarse = generator.integers(170, 215, (6, 8), dtype=np.uint8)
    grey = Image.fromarray(coarse).resize(large, Image.Resampling.BICUBIC)
    picture = ImageOps.colorize(grey, (120, 60, 40), (250, 205, 180))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width * 0.4, height * 0.35, width * 0.55, height * 0.6), fill=(95, 55, 40))
    for _ in range(5):
        draw.line(generator.integers(0, width, 4).tolist(), fill=(90, 60, 45), width=5)
    return picture.resize(size, Image.Resampling.LANCZOS)


def write_on(picture: Image.Image, text: str, size: int, angle: float = 0) -> Image.Image:
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    label = Image.new("L", (int(right - left) + 16, int(bottom - top) + 16), 245)
    ImageDraw.Draw(label).text((8 - left, 8 - top), text, fill=25, font=font)
    plate = Image.new("L", label.size, 255)
    label, plate = (one.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC) for one in (label, plate))
    picture = picture.copy()
    picture.paste(label.convert("RGB"), (30, 20), plate)
    return picture


def get_grey(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"))


@pytest.mark.parametrize("angle", [0, 20, 90])
def test_a_label_is_found_where_it_lies(angle: float) -> None:
    picture = write_on(draw_skin(1), "MARTIN Jean", 18, angle)
    rows = find_text(get_grey(picture))
    assert rows and rows[0][2] >= 4
    left, top, width, height = rows[0][1]
    changed = np.argwhere(np.abs(get_grey(picture).astype(int) - get_grey(draw_skin(1))) > 3)
    (low_y, low_x), (high_y, high_x) = changed.min(axis=0), changed.max(axis=0)
    assert low_x - 3 <= left <= left + width <= high_x + 4 and low_y - 3 <= top <= top + height <= high_y + 4
    assert max(width, height) > 0.4 * max(high_x - low_x, high_y - low_y)


def test_skin_with_a_mole_and_hairs_has_no_writing() -> None:
    assert sum(bool(find_text(get_grey(draw_skin(seed)))) for seed in range(10)) == 0


def draw_face(size: int = 220) -> Image.Image:
    """A face as the cascade sees it: bright skin, dark bands for eyes and mouth."""
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(90, 110, (size + 80, size + 80), dtype=np.uint8))
    draw = ImageDraw.Draw(picture)

    def ellipse(x: float, y: float, w: float, h: float, fill: int) -> None:
        box = [40 + size * (x - w / 2), 40 + size * (y - h / 2), 40 + size * (x + w / 2), 40 + size * (y + h / 2)]
        draw.ellipse(box, fill=fill)

    ellipse(0.5, 0.45, 0.95, 1.15, 45)  # hair
    ellipse(0.5, 0.55, 0.74, 0.95, 205)
    for x in (0.33, 0.67):
        ellipse(x, 0.38, 0.24, 0.07, 95)  # brow
        ellipse(x, 0.46, 0.19, 0.10, 130)
        ellipse(x, 0.46, 0.08, 0.09, 25)
    ellipse(0.5, 0.6, 0.10, 0.26, 225)
    ellipse(0.5, 0.70, 0.15, 0.04, 120)
    ellipse(0.5, 0.82, 0.30, 0.07, 90)
    return picture.resize((size + 80, size + 80)).convert("RGB")


def test_a_schematic_face_is_found_and_plain_skin_is_not() -> None:
    kinds = [kind for kind, _, _ in find_faces(get_grey(draw_face()))]
    assert "face" in kinds
    assert sum(bool(find_faces(get_grey(draw_skin(seed, (160, 120))))) for seed in range(4)) <= 1


def test_flags_name_the_image_that_holds_the_writing(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(4, (160, 120))
    for number in range(4):
        picture = draw_skin(number, (160, 120))
        if number == 2:
            picture = write_on(picture, "ID 483921", 16)
        picture.save(archive.root / "images" / f"photo{number}.jpg", quality=92)
    options = BuildOptions(samples_per_shard=2, max_rejected_share=0)
    shard_set = open_shard_set(build_shards(archive.card, archive.root, tmp_path / "shards", options=options).path)
    keys = {flag.key for flag in screen_images(shard_set) if flag.kind == "text"}
    written = [row for row in range(4) if shard_set.read_caption(row) is not None]  # the archive captions photo 2 only
    assert keys == {shard_set.table["key"][row].as_py() for row in written} and len(keys) == 1


def test_a_missing_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r'pip install "panfm\[screen\]"'):
        screening._import_opencv()
