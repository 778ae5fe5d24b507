"""What an image file must be to enter a shard: decodable to its end, large enough, not one colour.

    bytes -> decode_image -> PIL image (upright comes later, in privacy) or RejectedImageError(reason)
          -> compute_phash -> 16 hexadecimal characters, alike for images that look alike

A rejected file is never fatal by itself: the writer counts it by reason and quarantines it.
"""

import io
import struct
import warnings
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

RejectReason = Literal["undecodable", "truncated", "too_small", "blank", "decompression_bomb"]
REJECT_REASONS: tuple[RejectReason, ...] = get_args(RejectReason)
BLANK_RANGE = 2  # grey levels, of 32 x 32 block means: below sensor noise, which no photograph of anything is


class RejectedImageError(ValueError):
    """An image that must not enter a shard; `reason` is counted, the text is for the person who runs the build."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason: RejectReason = reason


def decode_image(data: bytes, *, min_side: int = 1, short_side: int | None = None) -> tuple[Image.Image, int, int]:
    """Decode an image file (the first frame of several) and return it with its full width and height in pixels.

    With `short_side` a large JPEG is decoded at a half, quarter or eighth of its size, never below that short side.

    Raises RejectedImageError: undecodable, truncated, too_small (a side below `min_side`), decompression_bomb.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at 89 million pixels, which good cameras reach, and refuses at twice that: a bomb.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            width, height = image.size
            if min(width, height) < min_side:
                raise RejectedImageError("too_small", f"{width} x {height} pixels, the least side is {min_side}")
            if short_side is not None and image.format == "JPEG" and min(width, height) > short_side:
                scale = short_side / min(width, height)
                image.draft(None, (int(np.ceil(width * scale)), int(np.ceil(height * scale))))
            image.load()
    except Image.DecompressionBombError as error:
        raise RejectedImageError("decompression_bomb", str(error)) from None
    except RejectedImageError:
        raise
    # Pillow's decoders raise all of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error) as error:
        reason: RejectReason = "truncated" if "truncated" in str(error) else "undecodable"
        raise RejectedImageError(reason, str(error) or type(error).__name__) from None
    return image, width, height


def check_not_blank(image: Image.Image) -> None:
    """Raise RejectedImageError("blank") for an 8-bit image that is one colour all over."""
    extrema = image.resize((32, 32), Image.Resampling.BOX).getextrema()
    ranges = [extrema] if isinstance(extrema[0], int | float) else list(extrema)
    if all(high - low <= BLANK_RANGE for low, high in ranges):
        raise RejectedImageError("blank", f"one colour all over: channel ranges {ranges}")


def compute_phash(image: Image.Image) -> str:
    """Compute a 64-bit perceptual hash of an 8-bit image as 16 hexadecimal characters.

    The 8 x 8 lowest frequencies of the DCT of a 32 x 32 grey copy, each bit = above their median (Zauner 2010,
    "Implementation and benchmarking of perceptual image hash functions"). Integer arithmetic: the same bits on every
    machine. Similar images differ in few bits.
    """
    grey = image.convert("L").resize((32, 32), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.int64)
    spectrum = _DCT @ pixels @ _DCT.T  # [8, 8]
    bits = (spectrum > np.median(spectrum)).ravel()
    return np.packbits(bits).tobytes().hex()


def _compute_dct_rows() -> npt.NDArray[np.int64]:
    """The first 8 rows of the 32-point DCT-II, scaled by 2^14 and rounded."""
    frequency, position = np.arange(8)[:, None], np.arange(32)[None, :]
    rows: npt.NDArray[np.int64] = np.rint(np.cos(np.pi * frequency * (2 * position + 1) / 64) * 2**14).astype(np.int64)
    return rows


_DCT = _compute_dct_rows()
