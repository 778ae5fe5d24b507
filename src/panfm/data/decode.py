"""Decode: stored image bytes -> RGB pixels, and no more of them than a crop needs.

    bytes -> decode_rgb -> uint8 [H, W, 3]
    bytes -> open_image (header only) -> boxes -> load_crops (one decode) -> uint8 [size, size, 3] a box

A JPEG that is much larger than the crop is decoded at 1/2, 1/4 or 1/8 of its size inside the DCT, then resized once in
uint8 with an antialiasing filter. Orientation and colour profile were applied when the shards were written.
Measured on JPEGs of 200x150 to 1500x1100 with a 128-px crop: torch resizes 3x as fast as Pillow, with the same pixels.
torchvision decodes 200x150 3x as fast as Pillow, but it cannot scale in the DCT, loses above 900x700 for that, and its
decoders are deprecated since 0.29.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in full-resolution pixels, x1 and y1 exclusive

DCT_SCALES = (8, 4, 2)
DCT_MARGIN = 1.25  # pixels that a scaled crop keeps for one of the output; 1.0 came within 2 dB of the 35 dB rule
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, here an error instead of a warning


class DecodeError(ValueError):
    """The bytes are not a whole image; the message is the reason that is counted and reported."""


def open_image(data: bytes) -> Image.Image:
    """Read the header: an image that knows its `size` (width, height) and whose pixels are not decoded yet.

    Raises DecodeError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning; the limit is enforced below
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise DecodeError("decompression_bomb") from None
    except (OSError, ValueError, SyntaxError):
        raise DecodeError("undecodable") from None
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError("decompression_bomb")
    return image


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """Decode JPEG, PNG, WebP or TIFF bytes to RGB, uint8 [H, W, 3]; transparency lies on white.

    Greyscale, palette, CMYK and 16-bit images become 8-bit RGB. Raises DecodeError for bytes that are no image, are
    cut short, claim more than MAX_PIXELS, or hold floats, whose range nobody stated.
    """
    return np.asarray(_load_rgb(open_image(data)))


def decode_crop(data: bytes, box: Box, size: int) -> NDArray[np.uint8]:
    """Decode one box and resize it: uint8 [size, size, 3]. See `load_crops`."""
    return load_crops(open_image(data), [box], size)[0]


def load_crops(image: Image.Image, boxes: Sequence[Box], size: int) -> list[NDArray[np.uint8]]:
    """Decode what `open_image` opened, once, and resize every box to uint8 [size, size, 3] (antialiased bicubic).

    Agrees with a full decode and the same resize to 35 dB PSNR or better. Raises DecodeError.
    """
    scale = min(compute_dct_scale(box, size) for box in boxes) if image.format == "JPEG" else 1
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    rgb = _load_rgb(image)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)  # [3, H, W], channels last in memory
    crops = []
    for box in boxes:
        x0, y0, x1, y1 = box
        if any(edge % scale for edge in box):
            # torch crops whole pixels only; a box between them keeps its place with Pillow's slower resize.
            part = (x0 / scale, y0 / scale, x1 / scale, y1 / scale)
            crops.append(np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=part)))
        else:
            crops.append(_resize(pixels, (x0 // scale, y0 // scale, x1 // scale, y1 // scale), size))
    return crops


def compute_dct_scale(box: Box, size: int) -> int:
    """Return the divisor (8, 4, 2 or 1) at which a JPEG still has the pixels for a crop of side `size`."""
    shorter = min(box[2] - box[0], box[3] - box[1])
    return next((scale for scale in DCT_SCALES if shorter >= DCT_MARGIN * size * scale), 1)


def _load_rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, IndexError) as error:
        raise DecodeError("truncated" if "truncated" in str(error) else "undecodable") from None
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


def _resize(pixels: torch.Tensor, box: Box, size: int) -> NDArray[np.uint8]:
    part = pixels[None, :, box[1] : box[3], box[0] : box[2]]  # [1, 3, h, w]
    resized = interpolate(part, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
