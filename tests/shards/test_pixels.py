"""Pixels on their way to the stored size: as good as a full decode, wherever the file takes another way too."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.shards import pixels
from panfm.shards.pixels import (
    choose_fraction,
    compute_means,
    compute_size,
    encode_jpeg,
    resize,
    shrink_jpeg,
    turn_upright,
)
from panfm.shards.privacy import clean_image


def draw(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture with fine structures of any direction, which a shift of a fraction of a pixel would cost."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    rng = np.random.default_rng(seed)
    image = np.full((size[1], size[0], 3), 128.0)
    for _ in range(12):
        period, angle, phase = rng.uniform(6, 60), rng.uniform(0, np.pi), rng.uniform(0, 6, 3)
        wave = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle))[..., None] / period + phase
        image += 12 * np.sin(wave)
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, "subsampling": 0, **options})
    return buffer.getvalue()


def compute_psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, ((first.astype(float) - second) ** 2).mean())))


def shrink_slowly(data: bytes, short_side: int) -> np.ndarray:
    """A full decode, then Pillow's Lanczos."""
    image = Image.open(io.BytesIO(data))
    return np.asarray(image.resize(compute_size(*image.size, short_side), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("size", [(300, 220), (401, 403), (903, 611), (1001, 1303), (2050, 1100)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_shrunk_is_as_good_as_decoded_whole(size: tuple[int, int], mode: str) -> None:
    data = encode(draw(size).convert(mode))
    shrunk = shrink_jpeg(data, 200)
    assert shrunk is not None and shrunk.header.size == size
    expected = shrink_slowly(data, 200)
    assert shrunk.pixels.shape == expected.shape and min(expected.shape[:2]) == 200
    assert compute_psnr(shrunk.pixels, expected) > 38  # without `extent`: 24 to 30 where sides are odd


def test_decoders_go_no_further_than_the_short_side() -> None:
    sizes = [(600, 512), (1023, 1200), (1024, 2000), (4096, 4096), (9000, 9000)]
    assert [choose_fraction(*size, 512) for size in sizes] == [1, 1, 2, 8, 8]
    assert compute_size(300, 500, 512) == (300, 500) and compute_size(3000, 2000, 512) == (768, 512)
    assert compute_size(513, 5000, 512) == (512, 4990)


def test_both_resizers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cykooz_resizer")
    image = np.asarray(draw((301, 203)))
    ours = [resize(image, (150, 101)), resize(image, (150, 101), (300.5, 202.5)), compute_means(image, 32)]
    monkeypatch.setattr(pixels, "RESIZER", "pillow")
    theirs = [resize(image, (150, 101)), resize(image, (150, 101), (300.5, 202.5)), compute_means(image, 32)]
    for first, second in zip(ours, theirs, strict=True):
        assert first.shape == second.shape and np.abs(first.astype(int) - second).max() <= 2
    assert compute_psnr(ours[0], ours[1]) < 45  # half a pixel is not nothing


def test_every_processor_gives_the_same_pixels() -> None:
    cykooz_resizer = pytest.importorskip("cykooz_resizer")
    resizer, image = pixels._get_resizer(), np.random.default_rng(0).integers(0, 256, (301, 403, 3), dtype=np.uint8)
    best, answers = resizer.cpu_extensions, set()
    try:
        for extensions in (cykooz_resizer.CpuExtensions.none, best):
            resizer.cpu_extensions = extensions
            answers.add(resize(image, (200, 149), (402.5, 300.5)).tobytes())
    finally:
        resizer.cpu_extensions = best
    assert len(answers) == 1


def test_files_that_are_not_plain_go_the_other_way() -> None:
    plain = encode(draw((400, 300)))
    assert shrink_jpeg(plain, 300) is None and shrink_jpeg(plain, 299) is not None
    for data in (b"", b"text", plain[:200], plain[: len(plain) // 2], plain[:-400]):
        assert shrink_jpeg(data, 100) is None
    cmyk = encode(Image.new("CMYK", (400, 300), (10, 20, 30, 40)))
    png = io.BytesIO()
    draw((400, 300)).save(png, "PNG")
    assert shrink_jpeg(cmyk, 100) is None and shrink_jpeg(png.getvalue(), 100) is None
    for data in (cmyk, png.getvalue()):
        assert clean_image(data, short_side=100).pixels.shape == (100, 133, 3)
    progressive = encode(draw((400, 300)), progressive=True)
    assert compute_psnr(clean_image(progressive, short_side=100).pixels, shrink_slowly(progressive, 100)) > 38


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    draw((31, 20)).save(buffer, "PNG", exif=exif)
    stored = Image.open(io.BytesIO(buffer.getvalue()))
    expected = np.asarray(ImageOps.exif_transpose(stored))
    assert np.array_equal(turn_upright(np.asarray(stored), orientation), expected)


def test_encoded_at_full_chroma() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = (200, 40, 90)
    image = Image.open(io.BytesIO(encode_jpeg(stripes)))
    assert np.abs(np.asarray(image).astype(int) - stripes).mean() < 4 and image.info.keys() <= {
        "jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi",
    }  # fmt: skip
    grey = Image.open(io.BytesIO(encode_jpeg(stripes[:, :, 0])))
    assert grey.mode == "L" and np.abs(np.asarray(grey).astype(int) - stripes[:, :, 0]).mean() < 4


@pytest.mark.real
def test_real_photographs_lose_nothing(real_data: Path) -> None:
    for path in sorted((real_data / "dermoscopic/isic_uda1").rglob("*.jpg")):
        data = path.read_bytes()
        shrunk = shrink_jpeg(data, 512)
        if shrunk is not None:
            assert compute_psnr(shrunk.pixels, shrink_slowly(data, 512)) > 40, path.name
