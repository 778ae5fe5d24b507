"""From a stored image to the pixels that the graph takes: what panfm does to an image before it measures it.

    bytes  --decode_rgb-->  RGB image  --prepare-->  uint8 [3, S, S]

Equal to `EvalTransform.apply` of panfm bit for bit (tests/predict/test_transform.py), with Pillow alone: libjpeg-turbo,
which decodes JPEG there, is inside Pillow too. As there, the image is turned as its EXIF data say, and converted to
sRGB as an embedded colour profile says.
"""

import io
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from panfm_predict.errors import ImageError

MAX_PIXELS = 178_956_970  # of an image, as in panfm: Pillow's own limit against decompression bombs
# An image comes from anywhere; what Pillow would hand to another program (EPS) or reads rarely is not opened at all.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF")

# One of them is in every file that states an orientation.
ORIENTATION_MARKS = (b"Exif", b"exif", b"EXIF", b"eXIf", b"Orientation", b"irot", b"imir")
PROFILED_MODES = ("RGB", "CMYK", "L")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_opening = threading.Lock()  # Python's warning filters belong to the process, not to a thread


class SizedTransform(Protocol):
    """What `prepare` reads of a transform: panfm's EvalTransform has it too."""

    @property
    def image_size(self) -> int: ...  # noqa: D102
    @property
    def resize_size(self) -> int: ...  # noqa: D102
    @property
    def interpolation(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Transform:
    """The fixed transform of the encoder, from classifier.json.

    image_size: side of the centre crop, pixels. resize_size: length of the shorter side before the crop, pixels.
    interpolation: "bicubic" or "bilinear". mean, std: of RGB in 0 to 1; the graph holds them, they are here to be read.
    """

    image_size: int
    resize_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def prepare(data: bytes, transform: SizedTransform) -> NDArray[np.uint8]:
    """Decode, resize with antialiasing, crop the centre: uint8 [3, S, S].

    Raises ImageError for bytes that are no whole image, or one of too many pixels.
    """
    try:
        return _prepare(decode_rgb(data), transform)
    except MemoryError:
        raise ImageError("has more pixels than this computer has memory for; make it smaller") from None


def _prepare(image: Image.Image, transform: SizedTransform) -> NDArray[np.uint8]:
    width, height = image.size
    shorter = min(width, height)
    target = (int(transform.resize_size * width / shorter), int(transform.resize_size * height / shorter))
    if target[0] * target[1] > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels: too narrow to be resized; crop it")
    if target != image.size:
        image = image.resize(target, Image.Resampling[transform.interpolation.upper()])
    size = transform.image_size
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    pixels = np.asarray(image)[top : top + size, left : left + size]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_rgb(data: bytes) -> Image.Image:
    """Decode stored bytes to 8-bit sRGB, upright; transparency lies on white.

    Greyscale, palette, CMYK and 16-bit images become 8-bit RGB; of several frames the first counts. Raises ImageError
    for bytes that are no image, are cut short, claim more than MAX_PIXELS, or hold floats, whose range nobody stated.
    """
    image = _open(data)
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS:,}; make it smaller")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own ways to say that it cannot go on
        reason = "is cut short" if "truncated" in str(error) else "is damaged"
        raise ImageError(f"the file {reason}; copy it again") from None
    if image.mode == "F":
        raise ImageError("holds floating-point pixels; save it as 8-bit PNG or JPEG")
    turn = TURNS.get(_read_orientation(data))
    converted = _convert_to_srgb(image)
    upright = _to_rgb(image) if converted is None else converted
    return upright if turn is None else upright.transpose(turn)


def _read_orientation(data: bytes) -> int:
    """The EXIF orientation; 1 where there is none or it is damaged, and for TIFF, which Pillow turns itself."""
    if not any(mark in data for mark in ORIENTATION_MARKS):
        return 1
    try:
        image = _open(data)
        orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # any: Pillow's EXIF parser raises what damaged bytes make it raise, and EXIF is optional
        return 1
    return orientation if isinstance(orientation, int) else 1


def _open(data: bytes) -> Image.Image:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow lacks AVIF
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning; the limit is enforced by `decode_rgb`
            return Image.open(io.BytesIO(data), formats=known)
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception:  # whatever a parser stumbled over
        raise ImageError("is no image that can be read; save it as JPEG or PNG") from None


def _convert_to_srgb(image: Image.Image) -> Image.Image | None:
    """Pixels in sRGB by their colour profile (telephones write Display P3); None where there is nothing to convert."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in PROFILED_MODES:
        return None
    transform = _build_transform(profile, image.mode)
    if transform is None:
        return None
    try:
        return ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=32)  # a camera writes the same profile into all its images, and building takes longer than using
def _build_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source) and mode == "RGB":
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # damaged, or for another colour space: viewers ignore those too


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        values = np.asarray(image)
        return Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
