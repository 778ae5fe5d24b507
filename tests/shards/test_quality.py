"""What an image must be to enter a shard, and the perceptual hash."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.shards.quality import (
    PHASH_FREQUENCIES,
    RejectedImageError,
    check_not_blank,
    compute_phash,
    decode_image,
)
from tests.shards.pictures import COPIES, draw_skin


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


def hash_of(image: Image.Image) -> str:
    value = compute_phash(image)
    assert value is not None
    return value


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
    hashes = [hash_of(draw_skin(seed)) for seed in range(20)]
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in hashes)
    for seed, value in enumerate(hashes):
        for name in ("resized", "recompressed", "recoloured"):
            assert distance(value, hash_of(COPIES[name](draw_skin(seed)))) <= 24, name
    between = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(between) > 64 and 100 < float(np.mean(between)) < 140


def test_phash_of_a_known_picture() -> None:
    # A horizontal ramp has odd horizontal frequencies only, all of the sign that its direction has.
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    bits = np.unpackbits(
        np.frombuffer(bytes.fromhex(hash_of(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT))), np.uint8)
    )
    u, v = PHASH_FREQUENCIES.T
    assert not bits[0], "the mean is no sign of anything"
    assert bits[(u == 0) & (v % 2 == 1)].all() and not bits[u > 0].any()
    assert hash_of(ramp.convert("RGB")) == hash_of(ramp)
    assert not np.unpackbits(np.frombuffer(bytes.fromhex(hash_of(ramp)), np.uint8))[(u == 0) & (v % 2 == 1)].any()


def test_phash_needs_something_to_recognise() -> None:
    rng = np.random.default_rng(0)
    empty_tile = np.clip(rng.normal(240, 2.0, (256, 256, 3)), 0, 255).astype(np.uint8)
    check_not_blank(Image.fromarray(empty_tile - (np.arange(256) > 200).astype(np.uint8)[None, :, None] * 4))
    assert compute_phash(Image.fromarray(empty_tile)) is None
    assert compute_phash(picture(0)) is not None


@pytest.mark.real
def test_real_images_pass(real_data: Path) -> None:
    for path in sorted((real_data / "total_body/slice3d/images").glob("*.jpg")):
        image, width, height = decode_image(path.read_bytes(), min_side=100)
        check_not_blank(image)
        assert image.size == (width, height)
