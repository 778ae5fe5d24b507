"""Colours as cameras and scanners meant them: what an embedded profile says, as sRGB.

Telephones write Display P3, scanners and studios Adobe RGB or CMYK. Read as if they were sRGB, such pixels are duller
than the skin was. The screen of a browser applies the profile; so do shards, and so does whatever reads a photograph.
"""

import io
from functools import lru_cache

from PIL import Image, ImageCms

PROFILED_MODES = ("RGB", "CMYK", "L")


def convert_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """Convert loaded pixels from their profile to 8-bit sRGB; None where there is nothing to convert.

    Nothing: no profile, sRGB's own, one that is damaged or for another colour space (viewers ignore those too), and
    pixels of a mode that profiles are not for (transparency, palettes, 16 bits).
    """
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
        return None
