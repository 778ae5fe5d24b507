"""Decode: stored image bytes -> RGB pixels, and no more of them than a crop needs.

    bytes -> decode_rgb -> uint8 [H, W, 3]
    bytes -> open_image (header only) -> boxes -> load_crops (one decode) -> uint8 [3, size, size] a box

A JPEG goes through simplejpeg (libjpeg-turbo into a numpy array). One that is much larger than the crop is decoded at
1/2, 1/4 or 1/8 of its size inside the DCT, then resized once in uint8 with an antialiasing filter. What simplejpeg does
not read without a complaint (CMYK, damaged files) goes through Pillow, and so do PNG, WebP and TIFF: Pillow alone says
what is an image and what is not, and where both decode a JPEG their pixels are the same. Orientation and colour profile
were applied when the shards were written; `decode_upright` does both to files as cameras write them. The same bytes and
boxes give the same pixels on one machine.

What was measured and lost (torchvision's decoder, Pillow's draft mode, OpenCV, PyTurboJPEG, faster chroma, leaving out
rows below the crop) is in docs/lab_log.md. At 2 bits a pixel three quarters of what a scaled decode costs is reading
the Huffman code, which no library leaves out for the columns and rows that a crop does not need.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

from panfm.shards.colour import convert_to_srgb
from panfm.shards.pixels import turn_upright
from panfm.shards.quality import FORMATS

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in full-resolution pixels, x1 and y1 exclusive

DCT_SCALES = (8, 4, 2)
DCT_MARGIN = 1.25  # pixels that a scaled crop keeps for one of the output; 1.0 came within 1 dB of the 35 dB rule
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, here an error instead of a warning
JPEG_START = b"\xff\xd8\xff"
# One of them is in every file that states an orientation; Pillow need not open the others for it.
ORIENTATION_MARKS = (b"Exif", b"exif", b"EXIF", b"eXIf", b"Orientation", b"irot", b"imir")
PROFILE_MARK = b"ICC_PROFILE\0"  # in every JPEG with a colour profile, likewise
JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # libjpeg-turbo turns them into RGB; CMYK needs Pillow's eye for Adobe's mark


class DecodeError(ValueError):
    """The bytes are not a whole image; the message is the reason that is counted and reported."""


@dataclass(frozen=True)
class StoredImage:
    """An image of which the header alone was read. size: width, height in pixels."""

    data: bytes
    size: tuple[int, int]
    opened: Image.Image | None  # by Pillow; None for a JPEG that simplejpeg is to decode


def open_image(data: bytes) -> StoredImage:
    """Read the header: an image that knows its size and whose pixels are not decoded yet.

    Raises DecodeError.
    """
    size = _read_jpeg_size(data)
    opened = None
    if size is None:
        opened = _open_with_pillow(data)
        size = opened.size
    if size[0] * size[1] > MAX_PIXELS:
        raise DecodeError("decompression_bomb")
    return StoredImage(data, size, opened)


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """Decode JPEG, PNG, WebP or TIFF bytes to RGB, uint8 [H, W, 3]; transparency lies on white.

    Greyscale, palette, CMYK and 16-bit images become 8-bit RGB. Raises DecodeError for bytes that are no image, are
    cut short, claim more than MAX_PIXELS, or hold floats, whose range nobody stated.
    """
    return _decode(open_image(data))


def decode_upright(data: bytes) -> NDArray[np.uint8]:
    """Decode as `decode_rgb` does, to sRGB by an embedded colour profile, turned as EXIF says: uint8 [H, W, 3].

    Raises DecodeError.
    """
    image = open_image(data)
    if image.opened is None and PROFILE_MARK in data:
        image = replace(image, opened=_open_with_pillow(data))
    if image.opened is not None and image.opened.info.get("icc_profile"):
        pixels = np.asarray(_load_with_pillow(image, by_profile=True))
    else:
        pixels = _decode(image)
    return turn_upright(pixels, _read_orientation(data))


def decode_crop(data: bytes, box: Box, size: int) -> NDArray[np.uint8]:
    """Decode one box and resize it: uint8 [3, size, size]. See `load_crops`."""
    return load_crops(open_image(data), [box], [size])[0]


def load_crops(image: StoredImage, boxes: Sequence[Box], sizes: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Decode what `open_image` opened, once, and resize each box to uint8 [3, size, size] (antialiased bicubic).

    Agrees with a full decode and the same resize to 35 dB PSNR or better. Raises DecodeError.
    """
    scale = 1
    if image.opened is None:
        scale = min(compute_dct_scale(box, size) for box, size in zip(boxes, sizes, strict=True))
    left = top = 0
    pixels = _decode_jpeg(image, scale) if image.opened is None else None
    if pixels is None:
        scale, left, top = 1, min(box[0] for box in boxes), min(box[1] for box in boxes)
        rgb = _load_with_pillow(image)
        pixels = np.array(rgb.crop((left, top, max(box[2] for box in boxes), max(box[3] for box in boxes))))
    crops = []
    for box, size in zip(boxes, sizes, strict=True):
        x0, y0, x1, y1 = box[0] - left, box[1] - top, box[2] - left, box[3] - top
        if any(edge % scale for edge in box):
            # torch crops whole pixels only; a box between them keeps its place with Pillow's slower resize.
            part = (x0 / scale, y0 / scale, x1 / scale, y1 / scale)
            resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=part)
            crops.append(np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1)))
        else:
            crops.append(_resize(pixels[y0 // scale : y1 // scale, x0 // scale : x1 // scale], size))
    return crops


def compute_dct_scale(box: Box, size: int) -> int:
    """Return the divisor (8, 4, 2 or 1) at which a JPEG still has the pixels for a crop of side `size`."""
    shorter = min(box[2] - box[0], box[3] - box[1])
    return next((scale for scale in DCT_SCALES if shorter >= DCT_MARGIN * size * scale), 1)


def _decode(image: StoredImage) -> NDArray[np.uint8]:
    pixels = _decode_jpeg(image, scale=1) if image.opened is None else None
    return np.asarray(_load_with_pillow(image)) if pixels is None else pixels


def _read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of a JPEG that simplejpeg can turn into RGB, or None. A tenth of Pillow's time."""
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (int(width), int(height)) if colours in JPEG_COLOURS else None


def _decode_jpeg(image: StoredImage, scale: int) -> NDArray[np.uint8] | None:
    """Decode at 1/scale: uint8 [ceil(H / scale), ceil(W / scale), 3], or None where libjpeg-turbo warns or fails."""
    width, height = image.size
    rows, columns = -(-height // scale), -(-width // scale)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            image.data, "RGB", min_height=rows, min_width=columns, min_factor=scale
        )
    except ValueError:
        return None
    assert pixels.shape == (rows, columns, 3), (pixels.shape, image.size, scale)
    return pixels


def _read_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it is damaged, and for TIFF, which Pillow turns itself."""
    if not any(mark in data for mark in ORIENTATION_MARKS):
        return 1
    try:
        image = _open_with_pillow(data)
        orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # any: Pillow's EXIF parser raises what damaged bytes make it raise, and EXIF is optional
        return 1
    return orientation if orientation in range(1, 9) else 1


def _open_with_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning; the limit is enforced in `open_image`
            return Image.open(io.BytesIO(data), formats=FORMATS)  # no EPS, which Pillow hands to another program
    except Image.DecompressionBombError:
        raise DecodeError("decompression_bomb") from None
    except (OSError, ValueError, SyntaxError, RuntimeError):  # the last: a damaged AVIF
        raise DecodeError("undecodable") from None


def _load_with_pillow(stored: StoredImage, *, by_profile: bool = False) -> Image.Image:
    image = stored.opened if stored.opened is not None else _open_with_pillow(stored.data)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, IndexError, RuntimeError) as error:
        raise DecodeError("truncated" if "truncated" in str(error) else "undecodable") from None
    converted = convert_to_srgb(image, image.info.get("icc_profile")) if by_profile else None
    if converted is not None:
        return converted
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DecodeError("undecodable")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        values = np.asarray(image)
        return Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize uint8 [h, w, 3], a slice or not, to [3, size, size] by torch's antialiased uint8 kernel."""
    part = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, h, w], channels last in memory
    resized = interpolate(part, (size, size), mode="bicubic", antialias=True)[0].numpy()
    return np.ascontiguousarray(resized)  # a copy only where the size was the right one already
