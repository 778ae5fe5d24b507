"""decode: every kind of image becomes the right RGB, a crop agrees with a full decode, damaged bytes say why."""

import functools
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from panfm.data.decode import (
    DecodeError,
    compute_dct_scale,
    decode_crop,
    decode_rgb,
    decode_upright,
    load_crops,
    open_image,
)
from panfm.data.transforms import EvalTransform
from panfm.shards.pixels import turn_upright
from panfm.shards.privacy import clean_image
from tests.profiles import SRGB, make_swapped_profile

Encode = Callable[..., bytes]


def compute_psnr(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape and first.dtype == second.dtype == np.uint8
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def decode_plainly(data: bytes) -> Image.Image:
    """Pillow alone, whole, with transparency on white and 16 bits scaled: what every decode is held to."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def resize_fully(data: bytes, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """A full decode and one antialiased resize: uint8 [3, size, size]."""
    image = decode_plainly(data)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)


@functools.cache
def draw_texture(seed: int, width: int, height: int) -> Image.Image:
    """Detail at every scale down to two pixels, more of it than photographs hold: too small a decode loses it."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    for step, contrast in ((256, 40), (64, 24), (16, 20), (4, 16), (2, 12)):
        coarse = rng.integers(0, 256, (height // step + 2, width // step + 2, 3), dtype=np.uint8)
        fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(fine, dtype=np.float64) - 128) * (contrast / 75)  # uniform noise deviates by 75
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def test_plain_kinds_decode_to_the_pixels_that_were_stored(make_picture: Callable, make_bytes: Encode) -> None:
    picture = make_picture(1)
    pixels = np.asarray(picture)
    np.testing.assert_array_equal(decode_rgb(make_bytes(picture, "PNG")), pixels)
    np.testing.assert_array_equal(decode_rgb(make_bytes(picture, "WEBP", lossless=True)), pixels)
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        assert compute_psnr(decode_rgb(make_bytes(picture, quality=95, **options)), pixels) > 35


def test_greyscale_palette_and_sixteen_bits(make_picture: Callable, make_bytes: Encode) -> None:
    grey = make_picture(2).convert("L")
    expected = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_rgb(make_bytes(grey, "PNG")), expected)
    assert compute_psnr(decode_rgb(make_bytes(grey, "JPEG", quality=98)), expected) > 38
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_rgb(make_bytes(deep, "PNG")), expected)
    palette = make_picture(2).quantize(64)
    np.testing.assert_array_equal(decode_rgb(make_bytes(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_transparency_lies_on_white(make_bytes: Encode) -> None:
    layer = np.zeros((4, 4, 4), dtype=np.uint8)
    layer[:, :2] = (10, 20, 30, 255)  # opaque
    layer[:, 2:] = (10, 20, 30, 0)  # invisible
    layer[0, 0] = (0, 0, 0, 51)  # a fifth of black
    pixels = decode_rgb(make_bytes(Image.fromarray(layer), "PNG"))
    assert pixels[1, 1].tolist() == [10, 20, 30]
    assert pixels[1, 3].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == [204, 204, 204]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert decode_rgb(make_bytes(palette, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_cmyk_is_not_inverted(make_bytes: Encode) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(decode_rgb(make_bytes(cyan, quality=95))[8, 8].astype(int) - [0, 255, 255]).max() <= 3


JPEG_KINDS: dict[str, dict[str, object]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "rgb": {"keep_rgb": True},
    "grey": {},
    "cmyk": {},
}
MODES = {"grey": "L", "cmyk": "CMYK"}


@pytest.mark.parametrize("size", [(600, 450), (1024, 768), (1501, 1127)])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_a_crop_agrees_with_a_full_decode(size: tuple[int, int], kind: str, make_bytes: Encode) -> None:
    picture = draw_texture(3, *size).convert(MODES.get(kind, "RGB"))
    data = make_bytes(picture, quality=92, **JPEG_KINDS[kind])
    width, height = size
    boxes = [(0, 0, width, height), (width // 3, height // 5, width // 3 + height // 2, height), (7, 11, 171, 180)]
    crops = load_crops(open_image(data), boxes, [96] * len(boxes))
    for box, crop in zip(boxes, crops, strict=True):
        expected = resize_fully(data, box, 96)
        assert crop.shape == (3, 96, 96) and crop.flags["C_CONTIGUOUS"]
        assert compute_psnr(crop, expected) >= 35
        alone = decode_crop(data, box, 96)
        assert compute_psnr(alone, expected) >= 35
        np.testing.assert_array_equal(alone, decode_crop(data, box, 96))


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_every_odd_size_decodes_as_pillow_does(kind: str, make_bytes: Encode) -> None:
    texture = draw_texture(4, 200, 150).convert(MODES.get(kind, "RGB"))
    for width, height in [(1, 1), (1, 9), (7, 1), (2, 3), (8, 8), (9, 15), (16, 17), (17, 33), (31, 16), (65, 47)]:
        data = make_bytes(texture.crop((0, 0, width, height)), quality=90, **JPEG_KINDS[kind])
        expected = np.asarray(decode_plainly(data))
        assert expected.shape == (height, width, 3)
        assert compute_psnr(decode_rgb(data), expected) > 60, (width, height)
        for box in [(0, 0, width, height), (width // 2, height // 3, width, height)]:
            assert compute_psnr(decode_crop(data, box, 8), resize_fully(data, box, 8)) >= 35, (box, width, height)


def test_plain_jpegs_take_the_fast_way(make_bytes: Encode) -> None:
    for kind, options in JPEG_KINDS.items():
        image = open_image(make_bytes(draw_texture(4, 200, 150).convert(MODES.get(kind, "RGB")), **options))
        assert image.size == (200, 150)
        assert (image.opened is None) == (kind != "cmyk"), kind


def test_a_jpeg_stays_as_it_is_stored_whatever_its_exif_says(make_bytes: Encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees; shards hold upright pixels, so a leftover mark would turn them twice
    picture = draw_texture(4, 200, 150)
    data = make_bytes(picture, quality=95, exif=exif)
    assert open_image(data).size == (200, 150)
    np.testing.assert_array_equal(decode_rgb(data), decode_rgb(make_bytes(picture, quality=95)))
    assert compute_psnr(decode_crop(data, (10, 20, 110, 120), 96), resize_fully(data, (10, 20, 110, 120), 96)) >= 35


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_files_are_turned_as_their_camera_says(kind: str) -> None:
    for orientation in range(1, 9):
        data = encode_turned(kind, orientation)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(decode_upright(data), np.asarray(upright))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("PNG", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")]
    + [(kind, mode) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for mode in ("RGB", "L")],
)
def test_a_file_has_the_colours_that_shards_give_it(kind: str, mode: str) -> None:
    picture = draw_texture(4, 300, 290).convert(mode)
    if mode == "RGBA":
        picture.putalpha(200)  # an opaque one is stored as RGB by WebP
    exif = Image.Exif()
    exif[0x0112] = 6
    for profile in (make_swapped_profile(), SRGB, b"damaged" * 30):
        buffer = io.BytesIO()
        picture.save(buffer, kind, icc_profile=profile, exif=exif)
        data = buffer.getvalue()
        stored = clean_image(data).pixels
        expected = stored if stored.ndim == 3 else np.repeat(stored[:, :, None], 3, axis=2)
        np.testing.assert_array_equal(decode_upright(data), expected)
        converted = not np.array_equal(decode_upright(data), turn_upright(decode_rgb(data), 6 if kind != "TIFF" else 1))
        assert converted == (mode == "RGB" and profile == make_swapped_profile())


def test_damaged_exif_counts_as_none() -> None:
    data = encode_turned("JPEG", 6)
    torn = data.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    assert torn != data
    np.testing.assert_array_equal(decode_upright(torn), decode_rgb(data))


def encode_turned(kind: str, orientation: int) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    draw_texture(4, 70, 50).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def test_an_image_too_narrow_to_be_resized_is_refused(make_bytes: Encode) -> None:
    with pytest.raises(DecodeError, match="too_narrow"):
        EvalTransform(224, 256).apply(make_bytes(Image.new("RGB", (60_000, 16)), "PNG"))


@pytest.mark.parametrize("kind", ["rgb", "transparent", "palette", "see-through palette", "grey", "16 bit", "webp"])
def test_a_crop_of_png_and_webp_agrees_with_a_full_decode(kind: str, make_bytes: Encode) -> None:
    picture = draw_texture(5, 333, 257)
    grey = np.asarray(picture.convert("L"))
    layer = np.dstack([np.asarray(picture), np.roll(grey, 40, axis=1)])
    data = {
        "rgb": lambda: make_bytes(picture, "PNG"),
        "transparent": lambda: make_bytes(Image.fromarray(layer), "PNG"),
        "palette": lambda: make_bytes(picture.quantize(32), "PNG"),
        "see-through palette": lambda: make_bytes(picture.quantize(32), "PNG", transparency=3),
        "grey": lambda: make_bytes(Image.fromarray(grey), "PNG"),
        "16 bit": lambda: make_bytes(Image.fromarray(grey.astype(np.uint16) * 251 + 77), "PNG"),
        "webp": lambda: make_bytes(picture, "WEBP", quality=90),
    }[kind]()
    boxes = [(0, 0, 333, 257), (33, 21, 301, 250), (200, 120, 231, 151), (64, 64, 160, 160)]
    for box, crop in zip(boxes, load_crops(open_image(data), boxes, [96] * len(boxes)), strict=True):
        assert crop.shape == (3, 96, 96) and crop.flags["C_CONTIGUOUS"]
        assert compute_psnr(crop, resize_fully(data, box, 96)) >= 35, box


def test_a_box_between_scaled_pixels_keeps_its_place(make_bytes: Encode) -> None:
    wave = np.sin(np.arange(1600) * 2 * np.pi / 64) * 100 + 128  # 6.4 output pixels a period
    picture = Image.fromarray(np.repeat(wave[None, :, None], 1600, axis=0).repeat(3, axis=2).astype(np.uint8))
    data = make_bytes(picture, quality=95)
    box = (206, 206, 1166, 1166)
    assert compute_dct_scale(box, 96) == 8
    assert compute_psnr(decode_crop(data, box, 96), resize_fully(data, box, 96)) >= 35


def test_the_scale_leaves_more_pixels_than_the_crop_needs() -> None:
    assert compute_dct_scale((0, 0, 319, 319), 128) == 1
    assert compute_dct_scale((0, 0, 320, 400), 128) == 2
    assert compute_dct_scale((0, 0, 3000, 2000), 128) == 8
    assert compute_dct_scale((0, 0, 3000, 100), 128) == 1


@pytest.mark.real
def test_real_photographs_agree(real_data: Path) -> None:
    files = sorted((real_data / "dermoscopic" / "isic_uda1").rglob("*.jpg"))[::4]
    for folder in ("dermoscopic/ham10000", "clinical/pad_ufes20", "histopathology"):
        files += sorted(path for path in (real_data / folder).rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))[
            ::97
        ][:8]
    assert len(files) > 30
    rng = np.random.default_rng(0)
    for file in files:
        data = file.read_bytes()
        width, height = open_image(data).size
        for size in (96, 224):
            side = int(min(width, height) * rng.uniform(0.4, 1.0))
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
            box = (left, top, left + side, top + side)
            assert compute_psnr(decode_crop(data, box, size), resize_fully(data, box, size)) >= 35, (file.name, box)


def test_damaged_bytes_name_a_reason(make_picture: Callable, make_bytes: Encode) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = make_bytes(make_picture(4, 640, 480), kind)
        with pytest.raises(DecodeError, match=r"^(truncated|undecodable)$"):
            decode_rgb(data[: len(data) // 2])
        with pytest.raises(DecodeError, match=r"^(truncated|undecodable)$"):
            decode_crop(data[: len(data) * 3 // 4], (0, 0, 640, 480), 32)  # inside the DCT-scaled decode too
    with pytest.raises(DecodeError, match=r"^truncated$"):
        data = make_bytes(make_picture(4), "JPEG")
        decode_rgb(data[: len(data) // 2])
    for data in (b"", b"no image at all", b"\xff\xd8\xff\xe0"):
        with pytest.raises(DecodeError, match=r"^undecodable$"):
            decode_rgb(data)
    with pytest.raises(DecodeError, match=r"^undecodable$"):
        decode_rgb(make_bytes(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


def test_a_decompression_bomb_is_refused(make_bytes: Encode) -> None:
    header = bytearray(make_bytes(Image.new("L", (1, 1)), "PNG"))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height claim 3.6 gigapixels
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(DecodeError, match=r"^decompression_bomb$"):
        decode_rgb(bytes(header))
    photo = bytearray(make_bytes(Image.new("RGB", (16, 16)), "JPEG"))
    frame = photo.index(b"\xff\xc0")
    for width, height in [(60_000, 60_000), (20_000, 13_000)]:  # the second is one that Pillow only warns of
        photo[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        with pytest.raises(DecodeError, match=r"^decompression_bomb$"):
            open_image(bytes(photo))


def test_a_jpeg_cut_below_the_crop_is_truncated_all_the_same(make_bytes: Encode) -> None:
    data = make_bytes(draw_texture(3, 1501, 1127), quality=90)
    for cut in (len(data) - 2, len(data) - 9_000):
        for size in (96, 32):  # at full size and scaled
            with pytest.raises(DecodeError, match=r"^truncated$"):
                decode_crop(data[:cut], (0, 0, 400, 400), size)


def test_what_libjpeg_only_warns_of_is_no_failure(make_bytes: Encode) -> None:
    data = make_bytes(draw_texture(3, 600, 450), quality=90)
    stuffed = data[:-2] + b"stuffed" + data[-2:]  # bytes before the end mark: simplejpeg complains, Pillow does not
    for odd in (stuffed, data + b"trailing"):
        np.testing.assert_array_equal(decode_rgb(odd), decode_rgb(data))
        box = (0, 0, 400, 400)
        assert compute_psnr(decode_crop(odd, box, 96), resize_fully(data, box, 96)) >= 35
