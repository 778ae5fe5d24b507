"""What an image must be to enter a shard, and the perceptual hash."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.shards.quality import RejectedImageError, check_not_blank, compute_phash, decode_image


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(data: bytes, **options: int) -> str:
    with pytest.raises(RejectedImageError) as error:
        image, _, _ = decode_image(data, **options)
        check_not_blank(image)
    return error.value.reason


def distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def make_bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 999)) + chunk(b"IEND", b"")
    )


def test_bad_files_have_their_reason() -> None:
    good = encode(picture(0))
    assert reason_of(b"") == "undecodable"
    assert reason_of(b"a hospital's thumbs.db") == "undecodable"
    assert reason_of(good[: len(good) // 2]) == "truncated"
    png = encode(picture(0), "PNG")
    assert reason_of(png[: len(png) // 2]) in ("truncated", "undecodable")
    assert reason_of(good, min_side=61) == "too_small"
    assert reason_of(make_bomb()) == "decompression_bomb"
    for colour in ("white", "black", (200, 150, 130)):
        assert reason_of(encode(Image.new("RGB", (64, 64), colour))) == "blank"
    assert reason_of(encode(Image.new("L", (64, 64), 7), "PNG")) == "blank"


def test_good_images_pass() -> None:
    image, width, height = decode_image(encode(picture(0)), min_side=60)
    assert (width, height) == image.size == (80, 60)
    check_not_blank(image)
    faint = np.full((64, 64), 200, dtype=np.uint8)
    faint[:, 32:] = 204  # nearly white tissue is not blank
    check_not_blank(Image.fromarray(faint))


def test_large_jpegs_are_decoded_at_a_fraction_never_below_the_short_side() -> None:
    data = encode(picture(0, (1600, 1200)))
    image, width, height = decode_image(data, short_side=300)
    assert (width, height) == (1600, 1200) and image.size == (400, 300)
    assert decode_image(data, short_side=301)[0].size == (800, 600)
    assert decode_image(data, short_side=1200)[0].size == (1600, 1200)


def test_phash_is_alike_for_copies_and_not_for_others() -> None:
    hashes = [compute_phash(picture(seed, (400, 300))) for seed in range(20)]
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in hashes)
    for seed, value in enumerate(hashes):
        original = picture(seed, (400, 300))
        small = original.resize((100, 75), Image.Resampling.LANCZOS)
        recompressed = Image.open(io.BytesIO(encode(original, quality=30)))
        assert distance(value, compute_phash(small)) <= 4
        assert distance(value, compute_phash(recompressed)) <= 4
    between = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(between) > 12 and 28 < float(np.mean(between)) < 36


def test_phash_of_a_known_picture() -> None:
    # A horizontal ramp has horizontal frequencies only: bits in the first row of the 8 x 8 spectrum alone.
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    assert compute_phash(ramp)[2:] == "0" * 14
    assert compute_phash(ramp.convert("RGB")) == compute_phash(ramp)


@pytest.mark.real
def test_real_images_pass(real_data: Path) -> None:
    for path in sorted((real_data / "total_body/slice3d/images").glob("*.jpg")):
        image, width, height = decode_image(path.read_bytes(), min_side=100)
        check_not_blank(image)
        assert image.size == (width, height)
