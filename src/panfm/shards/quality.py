"""What an image file must be to enter a shard: decodable to its end, large enough, not one colour.

    bytes -> decode_image -> PIL image (upright comes later, in privacy) or RejectedImageError(reason)
          -> compute_phash -> 64 hexadecimal characters, alike for images that look alike

A rejected file is never fatal by itself: the writer counts it by reason and quarantines it.
"""

import io
import struct
import warnings
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

RejectReason = Literal["undecodable", "truncated", "too_small", "blank", "decompression_bomb", "burned_in_annotation"]
REJECT_REASONS: tuple[RejectReason, ...] = get_args(RejectReason)
# Formats of photographs (JPEG with its variant MPO); Pillow knows more, and hands some (EPS) to other programs.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000", "AVIF")
PHASH_VERSION = 2  # 1 was 64 bits (bit = above the median); dermoscopy needs more to tell images apart (docs/audit.md)
PHASH_SIDE = 16  # frequencies an axis: 256 bits
PHASH_MIN_CONTRAST = 2.0  # grey levels, standard deviation of the 32 x 32 copy
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
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if min(width, height) < min_side:
                raise RejectedImageError("too_small", f"{width} x {height} pixels, the least side is {min_side}")
            if short_side is not None and image.format in ("JPEG", "MPO") and min(width, height) > short_side:
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


def compute_phash(image: Image.Image) -> str | None:
    """Compute a 256-bit perceptual hash of an 8-bit image as 64 hexadecimal characters; None: nothing to recognise.

    The signs of the 16 x 16 lowest frequencies of the DCT of a 32 x 32 luminance copy, from low to high frequency (in
    the order of PHASH_FREQUENCIES); after Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions". Signs, not a comparison with the median: a flip of the image then inverts the bits of odd frequencies
    and a transposition exchanges u and v, so that a quarter turn or mirror image is found from the stored hash
    (`shards.duplicates`). The mean (u = v = 0) is no sign of anything: its bit is 0. Similar images differ in few bits.
    Integer arithmetic: the same bits on every machine.

    An image whose grey copy hardly varies (an empty slide tile, a black frame) would match every other one: None.
    """
    grey = image.convert("L").resize((32, 32), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.int64)
    if pixels.std() < PHASH_MIN_CONTRAST:
        return None
    spectrum = _DCT @ pixels @ _DCT.T  # [16, 16]
    bits = spectrum[PHASH_FREQUENCIES[:, 0], PHASH_FREQUENCIES[:, 1]] > 0
    bits[0] = False
    return np.packbits(bits).tobytes().hex()


def _order_frequencies() -> npt.NDArray[np.int64]:
    """(u, v) of each bit, int64 [256, 2]: low frequencies, which copies change least, come first."""
    u, v = (axis.ravel() for axis in np.mgrid[:PHASH_SIDE, :PHASH_SIDE])
    return np.stack([u, v], axis=1)[np.lexsort((u, u * u + v * v))]


def _compute_dct_rows() -> npt.NDArray[np.int64]:
    """The first 16 rows of the 32-point DCT-II, scaled by 2^14 and rounded."""
    frequency, position = np.arange(PHASH_SIDE)[:, None], np.arange(32)[None, :]
    rows: npt.NDArray[np.int64] = np.rint(np.cos(np.pi * frequency * (2 * position + 1) / 64) * 2**14).astype(np.int64)
    return rows


PHASH_FREQUENCIES = _order_frequencies()
_DCT = _compute_dct_rows()
