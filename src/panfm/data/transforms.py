"""Transforms: bytes -> one uint8 view for pretraining (random) or for evaluation (fixed); normalised on the device.

    augment_views   bytes -> boxes -> one decode -> flips, right-angle turns -> colour -> uint8 [3, S, S] a view
    EvalTransform   bytes -> shorter side resized -> centre crop -> uint8 [3, S, S] -> (device) float, normalised

The augmentation keeps the diagnosis: colour is evidence in skin images, so there is no hue, greyscale or solarise
jitter. Cameras vary mildly in brightness, contrast, saturation and white balance; histopathology varies in its stain.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from panfm.config import config_class
from panfm.data.decode import Box, compute_dct_scale, decode_rgb, load_crops, open_image
from panfm.shards.schema import Modality

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Strength = Annotated[float, Field(ge=0.0, lt=1.0)]
RGB = tuple[float, float, float]

# Haematoxylin, eosin and DAB in optical density (Ruifrok and Johnston 2001), a stain a row, rows of length 1.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
OPTICAL_DENSITY = (-np.log((np.arange(256) + 1.0) / 256.0)).astype(np.float32)
BOX_ATTEMPTS = 10


@config_class
class AugmentConfig:
    """Random views for pretraining; a strength s draws its factor uniformly from 1 - s to 1 + s."""

    image_size: Annotated[int, Field(ge=8, le=2048)] = 224
    """Side of a view, pixels; a multiple of the encoder's patch size."""
    views: Annotated[int, Field(ge=1, le=8)] = 1
    """Independently augmented views of every image; contrastive objectives need two."""
    crop_scale: tuple[Share, Share] = (0.3, 1.0)
    """Area of a crop as a share of a clinical or dermoscopic image; below 0.3 the lesion is often outside."""
    total_body_crop_scale: tuple[Share, Share] = (0.6, 1.0)
    """The same for total-body tiles: 15 mm around one small lesion, which a smaller crop would miss."""
    histopathology_crop_scale: tuple[Share, Share] = (0.3, 1.0)
    """The same for histopathology tiles; the lower end is a zoom of 1.8, less than one objective step."""
    aspect_ratio: Annotated[float, Field(ge=1.0, le=4.0)] = 4 / 3
    """Crops are between 1 / this and this times as wide as they are high; more would distort asymmetry, a criterion."""
    flips: bool = True
    """Mirror half of the views: skin and tissue have no left."""
    rotations: bool = True
    """Turn by a multiple of 90 degrees: skin and tissue have no up, and right angles need no interpolation."""
    brightness: Strength = 0.2
    """Cameras: factor on all channels, as exposure varies."""
    contrast: Strength = 0.2
    """Cameras: factor on the distance to the view's mean grey."""
    saturation: Strength = 0.15
    """Cameras: factor on the distance of a pixel to its own grey; mild, since red, blue and white are findings."""
    white_balance: Strength = 0.05
    """Cameras: factor on each channel by itself, as light sources vary."""
    stain: Strength = 0.15
    """Histopathology: factor on each stain's density (HED jitter, Tellez et al. 2018, arXiv 1902.06543)."""
    stain_shift: Strength = 0.02
    """Histopathology: shift of each stain's density, optical density units, from - to + this."""
    mean: RGB = IMAGENET_MEAN
    """Subtracted on the device, of RGB in 0 to 1."""
    std: RGB = IMAGENET_STD
    """Divided by on the device."""


def augment_view(data: bytes, modality: Modality, rng: np.random.Generator, config: AugmentConfig) -> NDArray[np.uint8]:
    """Draw one augmented view: uint8 [3, S, S]. The same generator state gives the same pixels. Raises DecodeError."""
    return augment_views(data, modality, [rng], config)[0]


def augment_views(
    data: bytes, modality: Modality, rngs: Sequence[np.random.Generator], config: AugmentConfig
) -> list[NDArray[np.uint8]]:
    """Draw one view a generator from a single decode of `data`: uint8 [3, S, S] each. Raises DecodeError."""
    image = open_image(data)
    scale = get_crop_scale(modality, config)
    boxes = [sample_box(image.size, scale, config.aspect_ratio, config.image_size, rng) for rng in rngs]
    views = []
    for crop, rng in zip(load_crops(image, boxes, config.image_size), rngs, strict=True):
        flip, turns = bool(rng.random() < 0.5), int(rng.integers(4))
        view = crop[:, :, ::-1] if config.flips and flip else crop  # [3, S, S]
        view = np.rot90(view, turns, axes=(1, 2)) if config.rotations else view
        jitter = jitter_stain if modality == "histopathology" else jitter_colour
        views.append(jitter(np.ascontiguousarray(view), rng, config))
    return views


def get_crop_scale(modality: Modality, config: AugmentConfig) -> tuple[float, float]:
    """Return the smallest and largest crop of a modality, as shares of the image's area."""
    return {
        "clinical": config.crop_scale,
        "dermoscopic": config.crop_scale,
        "total_body": config.total_body_crop_scale,
        "histopathology": config.histopathology_crop_scale,
    }[modality]


def sample_box(
    image_size: tuple[int, int], scale: tuple[float, float], aspect_ratio: float, size: int, rng: np.random.Generator
) -> Box:
    """Draw a crop box in an image of (width, height): its share of the area uniform in `scale`, its aspect log-uniform.

    A box that fits nowhere after BOX_ATTEMPTS draws is clipped. The edges lie on multiples of the scale at which a JPEG
    will be decoded, so that the crop falls on whole pixels.
    """
    width, height = image_size
    low, high = min(scale), max(scale)
    area_share, log_aspect, u_left, u_top = rng.random((BOX_ATTEMPTS, 4)).T
    areas = width * height * (low + area_share * (high - low))
    aspects = np.exp((2 * log_aspect - 1) * np.log(aspect_ratio))
    widths, heights = np.rint(np.sqrt(areas * aspects)), np.rint(np.sqrt(areas / aspects))
    fits = np.flatnonzero((widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height))
    chosen = int(fits[0]) if fits.size else 0
    box_width = int(np.clip(widths[chosen], 1, width))
    box_height = int(np.clip(heights[chosen], 1, height))
    left = int(u_left[chosen] * (width - box_width + 1))
    top = int(u_top[chosen] * (height - box_height + 1))
    step = compute_dct_scale((left, top, left + box_width, top + box_height), size)
    left, top = left - left % step, top - top % step
    return left, top, left + box_width - box_width % step, top + box_height - box_height % step


def jitter_colour(view: NDArray[np.uint8], rng: np.random.Generator, config: AugmentConfig) -> NDArray[np.uint8]:
    """Vary exposure, contrast, saturation and white balance of uint8 [3, H, W] in one affine map of the colour."""
    draws = 2.0 * rng.random(6) - 1.0
    gain = 1.0 + config.brightness * draws[0]
    contrast = 1.0 + config.contrast * draws[1]
    saturation = 1.0 + config.saturation * draws[2]
    balance = gain * (1.0 + config.white_balance * draws[3:6])
    if not (config.brightness or config.contrast or config.saturation or config.white_balance):
        return view
    matrix = (saturation * np.eye(3) + (1.0 - saturation) * LUMA) * balance[:, None]  # [3 out, 3 in]
    pixels = view.reshape(3, -1).astype(np.float32)
    grey = float(LUMA @ matrix @ pixels.mean(axis=1))  # of the view after exposure, saturation and balance
    pixels = (contrast * matrix).astype(np.float32) @ pixels
    pixels += np.float32((1.0 - contrast) * grey + 0.5)
    return _to_uint8(pixels).reshape(view.shape)


def jitter_stain(view: NDArray[np.uint8], rng: np.random.Generator, config: AugmentConfig) -> NDArray[np.uint8]:
    """Vary the density of each stain in uint8 [3, H, W]: colour deconvolution, factor and shift, and back."""
    draws = 2.0 * rng.random(6) - 1.0
    if not (config.stain or config.stain_shift):
        return view
    factors, shifts = 1.0 + config.stain * draws[:3], config.stain_shift * draws[3:]
    density = OPTICAL_DENSITY[view].reshape(3, -1)
    # density = STAINS.T @ amounts, hence the jittered density is one affine map of the density
    density = (STAINS.T @ np.diag(factors) @ np.linalg.inv(STAINS.T)).astype(np.float32) @ density
    density += (STAINS.T @ shifts).astype(np.float32)[:, None]
    pixels = np.exp(-density) * np.float32(256.0) - np.float32(0.5)
    return _to_uint8(pixels).reshape(view.shape)


def _to_uint8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Cut to 0 .. 255 in place and truncate; callers add the half that makes it rounding."""
    return np.clip(pixels, 0.0, 255.0, out=pixels).astype(np.uint8)


@dataclass(frozen=True)
class EvalTransform:
    """The fixed transform that an encoder is measured with; it travels with the encoder.

    image_size: side of the centre crop, pixels. resize_size: length of the shorter side before the crop, pixels.
    """

    image_size: int
    resize_size: int
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD

    def __post_init__(self) -> None:
        assert 0 < self.image_size <= self.resize_size, (self.image_size, self.resize_size)

    def apply(self, data: bytes) -> NDArray[np.uint8]:
        """Decode, resize with antialiasing, crop the centre: uint8 [3, image_size, image_size]. Raises DecodeError."""
        image = Image.fromarray(decode_rgb(data))
        width, height = image.size
        shorter = min(width, height)
        target = (int(self.resize_size * width / shorter), int(self.resize_size * height / shorter))
        if target != image.size:
            image = image.resize(target, Image.Resampling[self.interpolation.upper()])
        left, top = round((target[0] - self.image_size) / 2), round((target[1] - self.image_size) / 2)
        pixels = np.asarray(image)[top : top + self.image_size, left : left + self.image_size]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 [B, 3, H, W] into float32 on its device: (x / 255 - mean) / std."""
        return normalise(images, self.mean, self.std)

    def to_plain(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "EvalTransform":
        """Rebuild the transform that `to_plain` described."""
        return cls(
            image_size=values["image_size"],
            resize_size=values["resize_size"],
            interpolation=values["interpolation"],
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
        )


def normalise(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Turn uint8 [B, 3, H, W] into float32 on its device: (x / 255 - mean) / std."""
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1) * 255.0
    scale = torch.tensor(std, device=images.device).view(3, 1, 1) * 255.0
    return (images.float() - shift) / scale
