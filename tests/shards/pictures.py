"""Pictures for the tests of duplicates: fine patterns that tell one from another, and what copies are made of them."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps


def draw_skin(seed: int, width: int = 160, height: int = 120, strength: float = 0.25) -> Image.Image:
    """A dark blob in the middle of pale skin, as in dermoscopy: alike from afar, with a pattern of its own.

    strength: of the pattern, 1 = all grey levels.
    """
    rng = np.random.default_rng(seed)
    pattern = Image.fromarray(rng.integers(0, 256, (24, 32), dtype=np.uint8)).resize((width, height), 3)
    y, x = np.mgrid[:height, :width]
    blob = np.exp(-(((x / width - 0.5) / 0.2) ** 2 + ((y / height - 0.5) / 0.2) ** 2))
    grey = 190 - 110 * blob + strength * (np.asarray(pattern, dtype=float) - 128)
    pixels = grey[..., None] + np.array([20, 0, -15])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def recompress(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized": lambda image: image.resize((80, 60), Image.Resampling.BILINEAR),
    "recompressed": lambda image: recompress(image, 30),
    "cropped": lambda image: image.crop((2, 1, 156, 117)),
    "mirrored": ImageOps.mirror,
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "recoloured": lambda image: Image.fromarray((np.asarray(image) * np.array([0.9, 0.8, 0.6])).astype(np.uint8)),
}
