"""What must not get through: raw ids become keyed hashes, image files lose everything but their pixels.

    raw id + PseudonymKey    -> pseudonymise -> "p" + 16 hexadecimal characters
    image bytes              -> clean_image  -> CleanImage: pixels upright in sRGB, no metadata of any kind

Pseudonymous is not anonymous: whoever holds the key, or (for `identifiers: public`) the published id, can find a
patient again. And pixels are not looked at: a face, a wristband or handwriting in the picture stays in the picture.
"""

import hmac
import io
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from panfm.errors import UserError
from panfm.shards.colour import convert_to_srgb
from panfm.shards.dicom import is_dicom, unwrap_dicom
from panfm.shards.pixels import Pixels, ShrunkJpeg, compute_size, encode_jpeg, resize, shrink_jpeg, turn_upright
from panfm.shards.quality import decode_image
from panfm.shards.text_patterns import find_patterns

IdKind = Literal["patient", "lesion", "slide", "sample"]
ID_PREFIX: dict[IdKind, str] = {"patient": "p", "lesion": "l", "slide": "s", "sample": "k"}
LOSSLESS_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")


# ------------------------------------------------------------------------------------------------ ids


@dataclass(frozen=True)
class PseudonymKey:
    """The key of the hashes. `fingerprint` tells keys apart and says nothing about their secret."""

    secret: bytes
    kind: Literal["public", "private"]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal characters that two shard sets share if and only if their keys are the same."""
        return hmac.digest(self.secret, b"panfm key fingerprint", "sha256").hex()[:16]

    def __repr__(self) -> str:
        return f"PseudonymKey({self.kind}, fingerprint={self.fingerprint})"  # a traceback must not print the secret


# Published on purpose: ids of open data sets are no secret, and committed splits must match everybody's shards.
PUBLIC_KEY = PseudonymKey(b"panfm public pseudonym key, version 1", "public")


def load_key(path: str | Path, *, shard_folder: str | Path) -> PseudonymKey:
    """Read a secret key file (64 hexadecimal characters, readable by its owner only).

    Raises UserError where it is missing, malformed, readable by others, or inside the shard folder.
    """
    path = _check_outside(Path(path), Path(shard_folder))
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such key file; to make a new key there, once, add --create-key (a new key gives every "
            "patient a new id)"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError):
        text = ""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise UserError(f"{path}: not a key file; it must hold 64 hexadecimal characters, as --create-key writes them")
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path}: others than its owner can read this key; run chmod 600 {path}")
    return PseudonymKey(bytes.fromhex(text), "private")


def create_key(path: str | Path, *, shard_folder: str | Path) -> PseudonymKey:
    """Write a new random key to `path`, readable by its owner only, and return it; an existing key is read instead."""
    path = _check_outside(Path(path), Path(shard_folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return load_key(path, shard_folder=shard_folder)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return load_key(path, shard_folder=shard_folder)


def _check_outside(path: Path, shard_folder: Path) -> Path:
    if path.resolve().is_relative_to(shard_folder.resolve()):
        raise UserError(
            f"{path}: the key lies inside the shard set {shard_folder}; whoever gets the shards would get the key, so "
            "put it elsewhere"
        )
    return path


def pseudonymise(key: PseudonymKey, namespace: str, kind: IdKind, raw_id: str) -> str:
    """Hash a raw id: HMAC-SHA256 under the key, 64 bits of it, with a letter for its kind.

    The answer is pseudonymous, not anonymous: whoever has the key can hash a list of known ids and compare.

    The same (key, namespace, kind, raw id) gives the same hash everywhere; ids of different kinds never meet.
    """
    message = "\0".join((namespace, kind, raw_id)).encode()
    return ID_PREFIX[kind] + hmac.digest(key.secret, message, "sha256").hex()[:16]


# ------------------------------------------------------------------------------------------------ images


@dataclass(frozen=True)
class CleanImage:
    """An image as a shard stores it. `pixels` (uint8 [H, W] or [H, W, 3]) are those that were encoded."""

    data: bytes
    extension: Literal["jpg", "png"]
    pixels: Pixels
    original_width: int  # upright, before shrinking
    original_height: int
    device: str | None  # camera make and model, the one thing that is read before EXIF goes

    @property
    def width(self) -> int:
        """Stored pixels a row."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Stored rows."""
        return int(self.pixels.shape[0])

    @property
    def image(self) -> Image.Image:
        """The same pixels as a Pillow image."""
        return Image.fromarray(self.pixels)


def clean_image(data: bytes, *, min_side: int = 1, short_side: int | None = None) -> CleanImage:
    """Strip an image file of everything but its pixels, and shrink it where its short side exceeds `short_side`.

    A DICOM photograph is taken out of its file first (see dicom.unwrap_dicom).

    EXIF orientation is applied, colours are converted from an embedded profile to sRGB, transparency is laid on
    white, 16 bits become 8. A JPEG that needs none of this keeps its own compressed data, bit for bit; other lossless
    files become PNG; whatever had to be changed and was photographic becomes a JPEG of quality 95 without chroma
    subsampling.

    Raises RejectedImageError (see quality.decode_image and dicom.unwrap_dicom).
    """
    if is_dicom(data):
        dicom = unwrap_dicom(data)
        clean = clean_image(dicom.data, min_side=min_side, short_side=short_side)
        return replace(clean, device=name_device(dicom.make, dicom.model))
    shrunk = None if short_side is None else shrink_jpeg(data, short_side)
    if shrunk is not None and min(shrunk.header.size) >= min_side:
        return _clean_shrunk(shrunk)
    image, width, height = decode_image(data, min_side=min_side, short_side=short_side)
    source_format, device, orientation = image.format, *_read_exif(image)
    upright = _to_stored_colours(image)
    if short_side is not None and min(width, height) > short_side:
        fraction = round(max(width, height) / max(image.size))  # of its sides at which a JPEG was decoded
        size, extent = compute_size(width, height, short_side), (width / fraction, height / fraction)
        upright = Image.fromarray(resize(np.asarray(upright), size, extent))
    if 2 <= orientation <= 8:
        upright = Image.fromarray(turn_upright(np.asarray(upright), orientation))
        if orientation >= 5:
            width, height = height, width
    stored: bytes | None = None
    extension: Literal["jpg", "png"] = "jpg"
    if upright is image and source_format in ("JPEG", "MPO"):  # MPO: a second photograph stands behind the first
        stored = strip_jpeg(data)
        if stored is not None and not _is_only_pixels(stored):
            stored = None
    if stored is None and source_format in LOSSLESS_FORMATS and upright.size == (width, height):
        stored, extension = encode_image(upright, "png"), "png"
    if stored is None:
        stored = encode_image(upright, "jpg")
    return CleanImage(stored, extension, np.asarray(upright), width, height, device)


def _clean_shrunk(shrunk: ShrunkJpeg) -> CleanImage:
    """The way of most photographs: a JPEG that came out of its decoder at the stored size already."""
    device, orientation = _read_exif(shrunk.header)
    width, height = shrunk.header.size
    converted = convert_to_srgb(Image.fromarray(shrunk.pixels), shrunk.header.info.get("icc_profile"))
    pixels = shrunk.pixels if converted is None else np.asarray(converted)
    if 2 <= orientation <= 8:
        pixels = turn_upright(pixels, orientation)
        if orientation >= 5:
            width, height = height, width
    return CleanImage(encode_jpeg(pixels), "jpg", pixels, width, height, device)


def encode_image(image: Image.Image, extension: Literal["jpg", "png"]) -> bytes:
    """Encode pixels alone: PNG without loss, or JPEG of quality 95 at full chroma resolution."""
    if extension == "jpg":
        return encode_jpeg(np.asarray(image))
    bare = image.copy()
    bare.info = {}  # Pillow's writer would carry comments, profiles and text from here into the file
    buffer = io.BytesIO()
    bare.save(buffer, "PNG")
    return buffer.getvalue()


def strip_jpeg(data: bytes) -> bytes | None:
    """Rebuild a JPEG from the segments that decoding needs; None where its structure is not plain enough for that.

    Dropped: every APPn and COM segment wherever it stands, and everything behind the first end-of-image marker
    (phones append previews and whole second photographs there). JFIF and Adobe markers tell decoders the colour
    space, so bare ones are written in their place.
    """
    parts = [b"\xff\xd8"]
    for marker, payload, scan in _iterate_segments(data):
        if marker is None:
            return None
        if marker == 0xE0 and payload[:5] == b"JFIF\0":
            parts.append(b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00")  # no thumbnail
        elif marker == 0xEE and payload[:5] == b"Adobe" and len(payload) >= 12:
            parts.append(b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + payload[11:12])  # the transform byte
        elif marker in KEPT_MARKERS:
            parts.append(bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload + scan)
    if len(parts) < 4:
        return None
    return b"".join(parts) + b"\xff\xd9"


def _is_only_pixels(jpeg: bytes) -> bool:
    """Whether a decoder needs all of the compressed data: text can hide behind the last pixel, before the end marker.

    libjpeg counts what it has left over there; up to 8 bytes it may have fetched ahead without noticing.
    """
    try:
        simplejpeg.decode_jpeg(jpeg)
    except ValueError:  # its warnings
        return False
    return True


# Frames (SOF, without DHT, JPG and DAC, which share their range), tables, restart interval, scan, number of lines.
KEPT_MARKERS = frozenset({*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD})
SCAN_END = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # a marker that is neither a stuffed 0xff nor a restart


def _iterate_segments(data: bytes) -> Iterator[tuple[int | None, bytes, bytes]]:
    """Yield (marker, payload, compressed data behind it) up to the end of the image; (None, b"", b"") on a fault."""
    fault = (None, b"", b"")
    if data[:2] != b"\xff\xd8":
        yield fault
        return
    place = 2
    while True:
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if data[place : place + 1] != b"\xff" or place + 2 > len(data):
            yield fault
            return
        marker = data[place + 1]
        if marker == 0xD9:
            return
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        payload = data[place + 4 : place + 2 + length]
        if length < 2 or len(payload) != length - 2:
            yield fault
            return
        place += 2 + length
        scan = b""
        if marker == 0xDA:
            end = SCAN_END.search(data, place)
            stop = end.start() if end else len(data)
            scan = data[place:stop]
            place = stop
            if end is None:  # the decoder got its last line without an end-of-image marker
                yield marker, payload, scan
                return
        yield marker, payload, scan


def _read_exif(image: Image.Image) -> tuple[str | None, int]:
    """Camera make and model, and the orientation, from EXIF; damaged EXIF counts as none."""
    if not any(name in image.info for name in ("exif", "Raw profile type exif", "xmp")) and image.format != "TIFF":
        return None, 1
    try:
        exif = image.getexif()
        named = [exif.get(tag) for tag in (ExifTags.Base.Make, ExifTags.Base.Model)]
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # any: Pillow's EXIF parser raises what damaged bytes make it raise, and EXIF is optional
        return None, 1
    device = name_device(*(value for value in named if isinstance(value, str)))
    return device, orientation if isinstance(orientation, int) else 1


def name_device(*texts: str | None) -> str | None:
    """Make and model of a camera in plain words, at most 40 characters each; None where nothing may be kept.

    Dropped as a whole if it holds what identifies: a name with its title or as an owner ("Anna's iPhone"), a date, an
    address, or six digits on end, which no model has and serial numbers do. TextScanner.clean_device compares it with
    the ids and names of its row besides.
    """
    known = [text for text in texts if text]
    if any(find_patterns(" ".join(known))):
        return None
    words = [_plain_words(text) for text in known]
    return " ".join(word for word in words if word) or None


def _plain_words(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9 ._/()+-]+", " ", text).strip()[:40].strip()


def _to_stored_colours(image: Image.Image) -> Image.Image:
    """8-bit L or RGB pixels in sRGB; the very same object where nothing had to be converted."""
    converted = convert_to_srgb(image, image.info.get("icc_profile"))
    if converted is not None:
        return converted
    if image.mode.startswith(("I", "F")):
        return _scale_to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (0 .. 65535) to 8 bits; 32-bit pixels are scaled by their own range, for they state none."""
    pixels: Any = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and pixels.min() >= 0 and 255 < pixels.max() <= 65535):
        scaled = pixels / 257.0
    else:
        low, high = float(pixels.min()), float(pixels.max())
        scaled = (pixels - low) * (255.0 / (high - low)) if high > low else np.zeros_like(pixels)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
