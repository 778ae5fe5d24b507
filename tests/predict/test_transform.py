"""The pixels of panfm_predict are those of panfm, bit for bit, whatever the file; what panfm refuses it refuses too."""

import io
import itertools
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from panfm.data.decode import DecodeError, decode_upright
from panfm.data.transforms import EvalTransform
from panfm_predict.errors import ImageError
from panfm_predict.transform import MAX_PIXELS, prepare
from panfm_predict.transform import decode_rgb as decode_here
from tests.predict.made import draw_bytes, draw_image
from tests.profiles import SRGB, make_swapped_profile

SIZES = [(1, 1), (7, 9), (16, 16), (17, 31), (31, 17), (64, 64), (97, 83), (255, 256), (1, 40), (320, 61), (301, 457)]
TRANSFORMS = [
    EvalTransform(224, 256),
    EvalTransform(48, 48, "bilinear"),
    EvalTransform(33, 50),
    EvalTransform(64, 97, "bilinear"),
]


def encode(image: Image.Image, kind: str, **save: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def make_noise(size: tuple[int, int], channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def assert_same_pixels(data: bytes) -> None:
    expected = decode_upright(data)
    np.testing.assert_array_equal(np.asarray(decode_here(data)), expected)
    transform = TRANSFORMS[len(data) % len(TRANSFORMS)]
    np.testing.assert_array_equal(prepare(data, transform), transform.apply(data))


@pytest.mark.parametrize(
    "transform", TRANSFORMS, ids=lambda one: f"{one.resize_size}-{one.image_size}-{one.interpolation}"
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(size: tuple[int, int], transform: EvalTransform) -> None:
    for kind in ("PNG", "JPEG"):
        data = draw_bytes(3, size, kind)
        pixels = prepare(data, transform)
        np.testing.assert_array_equal(pixels, transform.apply(data))
        assert pixels.dtype == np.uint8 and pixels.shape == (3, transform.image_size, transform.image_size)
        assert pixels.flags["C_CONTIGUOUS"]


def list_jpegs() -> Iterator[bytes]:
    """Every way in which a camera writes JPEG; panfm decodes them with another library than Pillow."""
    images = [draw_image(1, (97, 83)), Image.fromarray(make_noise((33, 50)))]
    for image, sampling, quality, progressive in itertools.product(
        images, ("4:4:4", "4:2:2", "4:2:0"), (30, 75, 95), (False, True)
    ):
        yield encode(image, "JPEG", subsampling=sampling, quality=quality, progressive=progressive)
    for image in images:
        for sampling in ("440", "411"):  # scanners and old cameras; Pillow does not write them
            yield simplejpeg.encode_jpeg(np.array(image), 85, colorsubsampling=sampling)
        yield encode(image.convert("L"), "JPEG")
        yield encode(image, "JPEG", restart_marker_rows=1)
        yield encode(image, "JPEG", keep_rgb=True)
        yield encode(image, "JPEG") + b"what a phone appends"
        yield encode(image.convert("CMYK"), "JPEG")
        # Adobe's inverted CMYK is recognised by its mark alone.
        yield encode(image.convert("CMYK"), "JPEG").replace(b"Adobe", b"adobe")
    yield encode(images[0], "MPO", save_all=True, append_images=images[:1])


def test_every_kind_of_jpeg() -> None:
    kinds = list(list_jpegs())
    assert len(kinds) == 53
    for data in kinds:
        assert_same_pixels(data)


def list_modes() -> Iterator[tuple[str, bytes]]:
    size = (61, 45)
    rgb, rgba = Image.fromarray(make_noise(size)), Image.fromarray(make_noise(size, 4), "RGBA")
    sixteen = Image.fromarray(make_noise(size, 1).squeeze(2).astype(np.uint16) * 257 + 100)
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        image = rgba if mode in ("RGBA", "LA") else rgb
        for kind in ("PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000"):
            if (kind, mode) in {("BMP", "LA"), ("JPEG2000", "1"), ("JPEG2000", "P"), ("TIFF", "LA")}:
                continue  # Pillow does not write it
            save = {"lossless": True} if kind == "WEBP" else {}
            yield f"{kind} {mode}", encode(image.convert(mode), kind, **save)
    yield "PNG I;16", encode(sixteen, "PNG")
    yield "TIFF I;16", encode(sixteen, "TIFF")
    yield "TIFF CMYK", encode(rgb.convert("CMYK"), "TIFF")
    yield "TIFF YCbCr", encode(rgb.convert("YCbCr"), "TIFF", compression="jpeg")
    yield "TIFF pages", encode(rgb, "TIFF", save_all=True, append_images=[rgb.rotate(90)])
    yield "PNG P with a transparent colour", encode(rgb.convert("P"), "PNG", transparency=3)
    yield "PNG P with alpha", encode(rgba.quantize(64), "PNG")
    yield "PNG RGB with a transparent colour", encode(rgb, "PNG", transparency=tuple(make_noise(size)[0, 0].tolist()))
    yield "PNG L with a transparent grey", encode(rgb.convert("L"), "PNG", transparency=7)
    yield "GIF of two frames", encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)])
    yield "AVIF", encode(rgb, "AVIF")
    yield "PNG 16-bit RGB", make_png16(size)


def make_png16(size: tuple[int, int]) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""
    rows = np.random.default_rng(5).integers(0, 65536, (size[1], size[0] * 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *size, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 1)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("name", "data"), list(list_modes()), ids=lambda value: value if type(value) is str else "")
def test_every_mode(name: str, data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's advice on palettes; the two see the same file
        assert_same_pixels(data)


def test_transparency_lies_on_white() -> None:
    data = encode(Image.new("RGBA", (60, 60), (10, 20, 30, 0)), "PNG")
    assert (prepare(data, TRANSFORMS[1]) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_an_image_is_turned_as_its_camera_says(kind: str) -> None:
    image = draw_image(8, (80, 50))
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(image, kind, exif=exif)
        assert_same_pixels(data)
        with Image.open(io.BytesIO(data)) as stored:
            np.testing.assert_array_equal(decode_here(data), ImageOps.exif_transpose(stored).convert("RGB"))
        assert decode_here(data).size == ((50, 80) if 5 <= orientation <= 8 else (80, 50))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "L"), ("JPEG", "CMYK"), ("TIFF", "CMYK"), ("MPO", "RGB"), ("JPEG", "RGB")]
    + [(kind, mode) for kind in ("PNG", "TIFF", "WEBP", "AVIF") for mode in ("RGB", "L", "RGBA")],
)
def test_a_colour_profile_is_applied(kind: str, mode: str) -> None:
    """As telephones write their photographs: whoever reads them as sRGB sees other colours than panfm's shards hold."""
    image = draw_image(8, (80, 50)).convert(mode)
    for profile in (make_swapped_profile(), SRGB, b"damaged" * 30):
        assert_same_pixels(encode(image, kind, icc_profile=profile))
    if mode == "RGB":
        swapped = np.asarray(decode_here(encode(image, "PNG", icc_profile=make_swapped_profile())))
        assert np.abs(swapped.astype(int) - np.asarray(image)[..., ::-1]).mean() < 0.5


def list_damaged() -> Iterator[tuple[str, bytes]]:
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        whole = draw_bytes(2, (97, 83), kind)
        for number in range(30):
            draw = random.Random(number)
            damaged = bytearray(whole[: draw.randrange(len(whole))] if number % 2 else whole)
            for _ in range(draw.randrange(4)):
                damaged[draw.randrange(len(damaged)) if damaged else 0 :][:1] = b"\x55"
            if damaged and number % 3:
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            yield f"{kind} {number}", bytes(damaged)


def test_what_is_damaged_is_refused_by_both_or_read_alike() -> None:
    outcomes = {"refused": 0, "read": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on directories that are torn
        for name, data in list_damaged():
            try:
                expected = decode_upright(data)
            except DecodeError as reason:
                with pytest.raises(ImageError, match="cut short" if str(reason) == "truncated" else "damaged|no image"):
                    decode_here(data)
                outcomes["refused"] += 1
                continue
            np.testing.assert_array_equal(np.asarray(decode_here(data)), expected, err_msg=name)
            outcomes["read"] += 1
    assert outcomes["refused"] > 60 and outcomes["read"] > 40, outcomes


def make_huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims more than its body holds: reading on would ask for the memory."""
    small = bytearray(encode(Image.new("L", (1, 1)), "PNG"))
    small[16:24] = struct.pack(">II", width, height)
    small[29:33] = struct.pack(">I", zlib.crc32(bytes(small[12:29])))
    return bytes(small)


@pytest.mark.parametrize("size", [(20_000, 20_000), (MAX_PIXELS // 1000 + 1, 1000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="more than 178,956,970"):
        prepare(make_huge_png(*size), TRANSFORMS[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as a program around us may have set it
    with pytest.raises(ImageError, match="more than 178,956,970"):
        prepare(make_huge_png(*size), TRANSFORMS[0])


def test_an_image_that_would_burst_when_resized_is_refused() -> None:
    with pytest.raises(ImageError, match="60000 x 16 pixels: too narrow to be resized; crop it"):
        prepare(encode(Image.new("L", (60_000, 16)), "PNG"), EvalTransform(224, 256))


def test_what_would_start_another_program_is_not_opened() -> None:
    """Pillow hands PostScript to Ghostscript; floats have a range that nobody stated."""
    assert Image.open(io.BytesIO(encode(draw_image(0), "EPS"))).format == "EPS"
    for data in (encode(draw_image(0), "EPS"), b"", b"no image", encode(draw_image(0), "PDF")):
        with pytest.raises(ImageError, match="is no image that can be read; save it as JPEG or PNG"):
            prepare(data, TRANSFORMS[0])
    with pytest.raises(ImageError, match="holds floating-point pixels"):
        prepare(encode(Image.new("F", (9, 9)), "TIFF"), TRANSFORMS[0])


@pytest.mark.real
def test_real_photographs(real_data: Path) -> None:
    files = sorted(path for kind in ("*.jpg", "*.png", "*.tif") for path in (real_data / "clinical").rglob(kind))
    files += sorted((real_data / "histopathology").rglob("*.tif"))
    for path in random.Random(0).sample(files, 40):
        assert_same_pixels(path.read_bytes())
