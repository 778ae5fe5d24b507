"""The pixels of a photograph on their way to the stored size: decoded small, resized once, encoded. Nothing is judged.

    JPEG bytes -> shrink_jpeg: header -> decoded at 1, 1/2, 1/4 or 1/8 -> Lanczos to its size -> encode_jpeg -> bytes
    pixels of any other file -> resize -> encode_jpeg

This is where a build spends its time, so three libraries share the work: libjpeg-turbo through simplejpeg (arrays
without a detour over images), the SIMD resizer of `cykooz_resizer` where its wheels exist, Pillow for all headers and
for every file that is not plain. All three calculate in integers: the same bytes on every processor. The figures, and
what lost, are in docs/performance.md.
"""

import io
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

JPEG_QUALITY = 95
# Without a wheel for this processor Pillow resizes, some six times slower. The two differ in the last bit of some
# pixels, so that the name is part of every plan.
RESIZER: Literal["cykooz", "pillow"] = "cykooz" if find_spec("cykooz_resizer") else "pillow"
Pixels = npt.NDArray[np.uint8]  # [H, W] grey or [H, W, 3] RGB


@dataclass(frozen=True)
class ShrunkJpeg:
    """A JPEG at its stored size, not yet upright, in the colours of its own profile."""

    header: Image.Image  # opened, never decoded: size, EXIF and profile of the original
    pixels: Pixels


def compute_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height at which the short side is `short_side`; never larger than the image."""
    if min(width, height) <= short_side:
        return width, height
    scale = short_side / min(width, height)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def shrink_jpeg(data: bytes, short_side: int) -> ShrunkJpeg | None:
    """Decode and resize a JPEG whose short side exceeds `short_side`; None for any file that is not so plain.

    Not plain: another format, no larger than that, other modes than grey and RGB, anything that libjpeg-turbo has a
    warning for. Those go through Pillow (quality.decode_image), which also tells what is wrong with them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of 89 million pixels; a bomb has twice that and raises
            header = Image.open(io.BytesIO(data), formats=("JPEG",))  # with its variant MPO
    except Exception:  # any: decode_image opens it again and gives the reason
        return None
    if header.format not in ("JPEG", "MPO") or header.mode not in ("L", "RGB"):
        return None
    width, height = header.size
    if min(width, height) <= short_side:
        return None
    fraction = choose_fraction(width, height, short_side)
    try:
        # Two of them, because libjpeg-turbo takes the smallest of all eighths that reaches both; of these only the
        # powers of two have SIMD code: 5/8 takes longer than the whole, and looks worse.
        pixels = simplejpeg.decode_jpeg(
            data,
            "GRAY" if header.mode == "L" else "RGB",
            min_height=-(-height // fraction),
            min_width=-(-width // fraction),
        )
    except ValueError:  # a warning too: what Pillow makes of a damaged file must not depend on its size
        return None
    pixels = pixels[:, :, 0] if header.mode == "L" else pixels
    size = compute_size(width, height, short_side)
    return ShrunkJpeg(header, resize(pixels, size, (width / fraction, height / fraction)))


def choose_fraction(width: int, height: int, short_side: int) -> int:
    """The largest of 1, 2, 4, 8 by which a JPEG decoder can divide the sides and stay at `short_side` or above."""
    return max(n for n in (1, 2, 4, 8) if n == 1 or min(width, height) >= n * short_side)


def resize(pixels: Pixels, size: tuple[int, int], extent: tuple[float, float] | None = None) -> Pixels:
    """Resize to `size` (width, height) with an antialiased Lanczos filter of three lobes.

    `extent` (width, height) is the part of `pixels` that the picture fills. Decoding 1129 rows at a half gives 565,
    the last of them half outside: taken as 564.5 rows it stays in place, as 565 the whole picture is stretched, which
    costs fine structures (hairs) up to 10 dB.
    """
    height, width = pixels.shape[:2]
    extent = (width, height) if extent is None else extent
    if size == (width, height) and extent[0] == width and extent[1] == height:
        return pixels
    if RESIZER == "pillow":
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, box=(0, 0, *extent))
        return np.asarray(picture)
    return _resize_fast(pixels, size, extent, "lanczos3")


def compute_means(pixels: Pixels, side: int) -> Pixels:
    """The means of `side` x `side` blocks, whatever the shape of the image: what hash and blank check look at."""
    height, width = pixels.shape[:2]
    if RESIZER == "pillow":
        return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))
    return _resize_fast(pixels, (side, side), (width, height), "box")


def _resize_fast(pixels: Pixels, size: tuple[int, int], extent: tuple[float, float], filter_name: str) -> Pixels:
    from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions

    pixel_type = PixelType.U8 if pixels.ndim == 2 else PixelType.U8x3
    source = ImageData(pixels.shape[1], pixels.shape[0], pixel_type, pixels.tobytes())
    target = ImageData(*size, pixel_type)
    algorithm = ResizeAlg.convolution(FilterType[filter_name])
    options = ResizeOptions(resize_alg=algorithm, crop_box=CropBox(0, 0, *extent), use_alpha=False)
    _get_resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size[1], size[0], *pixels.shape[2:])


@cache
def _get_resizer() -> Any:
    from cykooz_resizer import Resizer

    return Resizer()  # one a process: it keeps its buffers


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation (1-8; others count as 1)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def encode_jpeg(pixels: Pixels) -> bytes:
    """Encode pixels as JPEG of quality 95 at full chroma resolution; nothing but pixels can get into it."""
    pixels = np.ascontiguousarray(pixels)
    if pixels.ndim == 2:
        data: bytes = simplejpeg.encode_jpeg(pixels[:, :, None], JPEG_QUALITY, "GRAY", "Gray")
    else:
        data = simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, "RGB", "444")
    return data
