"""Ids become keyed hashes; images keep their pixels and nothing else."""

import io
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from panfm.errors import UserError
from panfm.shards.privacy import PUBLIC_KEY, clean_image, create_key, load_key, name_device, pseudonymise, strip_jpeg
from panfm.shards.quality import RejectedImageError
from tests.profiles import SRGB, make_swapped_profile


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def plant_exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Canon", "EOS 5D"  # make, model
    exif[0x013B], exif[0x0112] = "PLANTED artist", orientation
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 11.0, 7.0), 29: "PLANTED:GPS"})
    exif.get_ifd(0x8769).update({0x9286: b"ASCII\0\0\0PLANTED user comment", 0xA430: "PLANTED owner"})
    return exif


# ------------------------------------------------------------------------------------------------ ids


def test_public_hashes_never_change() -> None:
    # Committed splits join on these: HMAC-SHA256(key, namespace NUL kind NUL id), 16 of 64 digits.
    assert pseudonymise(PUBLIC_KEY, "ham10000", "lesion", "HAM_0000550") == "lf66367de3da188ef"
    assert pseudonymise(PUBLIC_KEY, "ham10000", "sample", "ISIC_0024306") == "k13c6c197194c28d1"


def test_hashes_keep_apart_what_differs(tmp_path: Path) -> None:
    private = create_key(tmp_path / "key", shard_folder=tmp_path / "shards")
    hashes = {
        pseudonymise(key, namespace, kind, raw)
        for key in (PUBLIC_KEY, private)
        for namespace in ("a", "b")
        for kind in ("patient", "lesion", "slide", "sample")
        for raw in ("1", "2", "01")
    }
    assert len(hashes) == 2 * 2 * 4 * 3
    assert all(len(value) == 17 for value in hashes)


def test_a_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "hospital.key"
    with pytest.raises(UserError, match=r"hospital.key: no such key file; .*--create-key"):
        load_key(path, shard_folder=tmp_path / "shards")
    key = create_key(path, shard_folder=tmp_path / "shards")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key.secret) == 32 and key.secret != PUBLIC_KEY.secret
    assert create_key(path, shard_folder=tmp_path / "shards") == key == load_key(path, shard_folder=tmp_path / "shards")
    assert key.secret.hex() not in repr(key) and key.fingerprint in repr(key)


def test_unsafe_keys_are_refused(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (tmp_path / "link").symlink_to(shards, target_is_directory=True)
    for inside in (shards / "a.key", shards / "sub" / "a.key", tmp_path / "link" / "a.key"):
        with pytest.raises(UserError, match=r"a.key: the key lies inside the shard set"):
            create_key(inside, shard_folder=shards)
        assert not inside.exists()
    shared = tmp_path / "shared.key"
    create_key(shared, shard_folder=shards)
    for mode in (0o644, 0o640, 0o604, 0o620):
        shared.chmod(mode)
        with pytest.raises(UserError, match=r"others than its owner can read this key; run chmod 600"):
            load_key(shared, shard_folder=shards)
    weak = tmp_path / "weak.key"
    weak.write_text("password")
    weak.chmod(0o600)
    with pytest.raises(UserError, match=r"weak.key: not a key file; .*64 hexadecimal"):
        load_key(weak, shard_folder=shards)


def test_no_way_around_leads_a_key_into_the_shard_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, keys = tmp_path / "shards", tmp_path / "keys"
    (shards / "sub").mkdir(parents=True)
    create_key(keys / "a.key", shard_folder=shards)
    inside = shards / "sub" / "a.key"
    inside.write_bytes((keys / "a.key").read_bytes())
    inside.chmod(0o600)
    (keys / "to_file.key").symlink_to(inside)
    (keys / "to_folder").symlink_to(shards / "sub", target_is_directory=True)
    (tmp_path / "other_name").symlink_to(shards, target_is_directory=True)
    monkeypatch.chdir(shards)
    ways = [
        Path("sub/a.key"),
        Path("sub/../sub/a.key"),
        keys / ".." / "shards" / "sub" / "a.key",
        keys / "to_file.key",
        keys / "to_folder" / "a.key",
        keys / "to_folder" / ".." / "new.key",  # the parent of what the link points to
    ]
    for way in ways:
        for folder in (shards, Path(), tmp_path / "other_name", shards / "sub" / ".."):
            for read in (load_key, create_key):
                with pytest.raises(UserError, match="the key lies inside the shard set"):
                    read(way, shard_folder=folder)
    assert load_key(Path("../keys/a.key"), shard_folder=shards) == load_key(keys / "a.key", shard_folder=Path())


# ------------------------------------------------------------------------------------------------ JPEG


# What Pillow says of any JPEG, from its structure.
PLAIN_INFO = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "progressive", "progression"}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_loses_its_metadata_and_keeps_its_pixels(options: dict[str, object], mode: str) -> None:
    original = picture(1).convert(mode)
    second = encode(picture(2), comment=b"PLANTED in a preview")
    planted = encode(
        original,
        quality=83,
        exif=plant_exif(),
        xmp=b"<x:xmpmeta>PLANTED xmp</x:xmpmeta>",
        comment=b"PLANTED comment",
        icc_profile=SRGB if mode == "RGB" else None,
        **options,
    )
    plain = encode(original, quality=83, **options)
    assert planted.count(b"PLANTED") >= 5
    clean = clean_image(planted + second + b"PLANTED behind the end")
    assert b"PLANTED" not in clean.data and b"Exif" not in clean.data and b"ICC_PROFILE" not in clean.data
    assert clean.data == plain  # the compressed data and tables, bit for bit
    assert (clean.device, clean.extension, clean.width, clean.height) == ("Canon EOS 5D", "jpg", 80, 60)
    assert set(Image.open(io.BytesIO(clean.data)).info) <= PLAIN_INFO


def test_metadata_between_scans_and_in_thumbnails_goes_too() -> None:
    data = encode(picture(3), progressive=True)
    scans = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    text = b"PLANTED between scans"
    comment = b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
    preview = b"JFXX\0\x13PLANTED preview"
    thumbnail = b"\xff\xe0" + (len(preview) + 2).to_bytes(2, "big") + preview
    assert len(scans) > 2
    assert data[:11] == b"\xff\xd8\xff\xe0\x00\x10JFIF\0"
    jfif = b"\xff\xe0\x00\x1cJFIF\0\x01\x01\0\0\x01\0\x01\x02\x02PLANTED-2x2!"  # with a thumbnail of 2 x 2 pixels
    planted = data[:2] + jfif + thumbnail + data[20 : scans[2]] + comment + data[scans[2] :]
    assert np.array_equal(decode(planted), decode(data))
    assert strip_jpeg(planted) == data


def test_adobe_colour_spaces_survive() -> None:
    cmyk = picture(4).convert("CMYK")
    clean = clean_image(encode(cmyk, quality=95))  # CMYK is converted: nothing downstream reads four channels
    assert clean.extension == "jpg" and Image.open(io.BytesIO(clean.data)).mode == "RGB"
    assert np.abs(decode(clean.data) - np.asarray(picture(4)).astype(int)).mean() < 4
    rgb = encode(picture(4), quality=95, keep_rgb=True)  # RGB stored as RGB, told by the Adobe marker alone
    assert b"Adobe" in rgb
    stripped = strip_jpeg(rgb)
    assert stripped is not None and np.array_equal(decode(stripped), decode(rgb))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_text_behind_the_last_pixel_is_gone(options: dict[str, object]) -> None:
    data = encode(picture(5), quality=90, **options)
    assert clean_image(data).data == data
    clean = clean_image(data[:-2] + b"PLANTED before the end of the image" + data[-2:])
    assert b"PLANTED" not in clean.data
    assert np.abs(decode(clean.data) - decode(data)).mean() < 2  # encoded anew


def test_a_phones_double_photograph_keeps_the_data_of_the_first() -> None:
    double = encode(picture(5), "MPO", save_all=True, append_images=[picture(6)], quality=85)
    assert Image.open(io.BytesIO(double)).format == "MPO" and double.count(b"\xff\xd8\xff") == 2
    assert clean_image(double).data == encode(picture(5), quality=85)


def test_a_jpeg_of_odd_structure_is_encoded_anew() -> None:
    data = encode(picture(5))
    assert strip_jpeg(data[:2] + b"junk" + data[2:]) is None
    assert strip_jpeg(b"not a jpeg") is None
    unfinished = data[:-2]  # no end-of-image marker, all pixels there
    stripped = strip_jpeg(unfinished)
    assert stripped == data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    upright = np.asarray(picture(6)).astype(int)
    undo = {  # what a camera held that way would have stored
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    stored = Image.fromarray(undo[orientation].astype(np.uint8))
    for kind, options in {"JPEG": {"quality": 98, "subsampling": 0}, "PNG": {}, "TIFF": {}}.items():
        clean = clean_image(encode(stored, kind, exif=plant_exif(orientation), **options))
        assert (clean.width, clean.height, clean.original_width, clean.original_height) == (80, 60, 80, 60)
        assert np.abs(decode(clean.data) - upright).mean() < 2, kind
        assert b"PLANTED" not in clean.data


def test_shrinking_keeps_the_original_size_on_record() -> None:
    big = picture(7, (1200, 900))
    clean = clean_image(encode(big, quality=95, exif=plant_exif(6)), short_side=300)
    assert (clean.width, clean.height) == (300, 400)
    assert (clean.original_width, clean.original_height) == (900, 1200)
    expected = big.transpose(Image.Transpose.ROTATE_270).resize((300, 400), Image.Resampling.LANCZOS)
    assert np.abs(decode(clean.data) - np.asarray(expected).astype(int)).mean() < 2
    assert clean_image(encode(big), short_side=900).width == 1200


def test_encoding_anew_carries_nothing_over() -> None:
    planted = encode(picture(7, (200, 150)), comment=b"PLANTED", xmp=b"PLANTED", exif=plant_exif(), icc_profile=SRGB)
    shrunk = clean_image(planted, short_side=100).data
    assert b"PLANTED" not in shrunk and b"ICC_PROFILE" not in shrunk and b"\xff\xfe" not in shrunk[:200]
    png = clean_image(encode(picture(7), "PNG", icc_profile=SRGB)).data
    assert b"iCCP" not in png and np.array_equal(decode(png), np.asarray(picture(7)))


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((1024, 1024, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: grey once shrunk by eight, never stripes or a flat black or white
    for kind in ("JPEG", "PNG"):
        pixels = decode(clean_image(encode(Image.fromarray(stripes), kind), short_side=128).data)
        assert np.abs(pixels[8:-8, 8:-8] - 127.5).max() < 12


# ------------------------------------------------------------------------------------------------ other formats


def test_png_text_is_gone_and_pixels_are_exact() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "PLANTED text")
    text.add_text("Comment", "PLANTED compressed" * 20, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "PLANTED xmp")
    clean = clean_image(encode(picture(8), "PNG", pnginfo=text, exif=plant_exif(), dpi=(72, 72)))
    assert clean.extension == "png" and clean.device == "Canon EOS 5D"
    assert np.array_equal(decode(clean.data), np.asarray(picture(8)))
    assert Image.open(io.BytesIO(clean.data)).info == {}
    chunks = {clean.data[place : place + 4] for place in range(len(clean.data) - 4)}
    assert not chunks & {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"pHYs", b"tIME"}


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "GIF", "WEBP"])
def test_other_formats_are_encoded_anew(kind: str) -> None:
    options = {"TIFF": {"description": "PLANTED", "artist": "PLANTED"}, "WEBP": {"exif": plant_exif(), "quality": 95}}
    clean = clean_image(encode(picture(9), kind, **options.get(kind, {})))
    assert clean.extension == ("jpg" if kind == "WEBP" else "png")
    assert b"PLANTED" not in clean.data
    assert np.abs(decode(clean.data) - np.asarray(picture(9)).astype(int)).mean() < (14 if kind == "GIF" else 3)


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, :32] = (200, 100, 50, 255)
    pixels[:, 32:48] = (0, 0, 0, 128)
    stored = decode(clean_image(encode(Image.fromarray(pixels), "PNG")).data)
    assert stored[0, 0].tolist() == [200, 100, 50]
    assert np.abs(stored[0, 40] - 127).max() <= 1
    assert stored[0, 60].tolist() == [255, 255, 255]


def test_sixteen_bits_become_eight() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    stored = clean_image(encode(Image.fromarray(ramp), "PNG"))
    assert stored.image.mode == "L"
    assert np.array_equal(np.asarray(stored.image), np.rint(ramp / 257).astype(np.uint8))


def test_colour_profiles_are_applied() -> None:
    plain = encode(picture(10), quality=92)
    assert clean_image(encode(picture(10), quality=92, icc_profile=SRGB)).data == plain
    assert clean_image(encode(picture(10), quality=92, icc_profile=b"damaged" * 30)).data == plain
    swapped = make_swapped_profile()
    for kind, tolerance in (("JPEG", 2.0), ("PNG", 0.5)):
        stored = decode(clean_image(encode(picture(10), kind, icc_profile=swapped)).data)
        assert np.abs(stored - decode(encode(picture(10), kind))[..., ::-1]).mean() < tolerance


@pytest.mark.parametrize(
    ("texts", "device"),
    [
        (("Canon", "EOS 5D"), "Canon EOS 5D"),
        (("FotoFinder", "medicam 1000s (rev. 2)"), "FotoFinder medicam 1000s (rev. 2)"),
        (("NIKON\0\n", None), "NIKON"),
        (("Canon", "x" * 90), "Canon " + "x" * 40),
        (("Canon", "EOS 5D 123456789"), None),  # a serial number
        (("Canon", "EOS of Dr. Dupont"), None),
        (("Apple", "Anna's iPhone 6"), None),
        (("Apple", "anna@north.org"), None),
        (("Apple", "2019:03:12"), None),
        (("", None), None),
    ],
)
def test_a_device_is_make_and_model_in_plain_words(texts: tuple[str | None, ...], device: str | None) -> None:
    assert name_device(*texts) == device


def test_formats_that_run_programs_are_not_opened() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n%%EndComments\nshowpage\n"
    with pytest.raises(RejectedImageError) as error:
        clean_image(script)
    assert error.value.reason == "undecodable"


@pytest.mark.real
def test_real_profile_and_exif(real_data: Path) -> None:
    found = 0
    for path in sorted((real_data / "dermoscopic/isic_uda1/images").glob("*.jpg")):
        with Image.open(path) as image:
            if not {"exif", "icc_profile"} & set(image.info) or image.width > 1100:  # large ones take long
                continue
            before = np.asarray(image.convert("RGB")).astype(int)
        clean = clean_image(path.read_bytes())
        found += 1
        assert (
            b"Exif" not in clean.data and b"http://ns.adobe.com" not in clean.data and b"ICC_PROFILE" not in clean.data
        )
        assert np.abs(decode(clean.data) - before).mean() < 3
    assert found >= 3
