"""Transforms: bytes -> one uint8 view for pretraining (random) or for evaluation (fixed); normalised on the device.

    augment_views   bytes -> sample_views: what chance decides, a ViewPlan a view -> one decode, one resize a view
                          -> flip and right-angle turn -> colour -> uint8 [3, S, S] a view
    EvalTransform   bytes -> shorter side resized -> centre crop -> uint8 [3, S, S] -> (device) float, normalised

The augmentation keeps the diagnosis. Colour is evidence in skin images, so there is no hue, greyscale or solarise
jitter: cameras vary mildly in exposure, contrast, saturation and white balance, histopathology varies in its stain.
Skin has no up, and right angles are exact and almost free; other angles would need a second interpolation (the one
resize that uint8 kernels offer is axis-aligned) and either black corners or crops of half the area. There is no blur
and no recompression: network lines, dots and vessels are a few pixels wide in a view and are what a blur takes first,
and the stored files carry the compression of their sources already.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from panfm.config import config_class
from panfm.data.decode import (
    MAX_PIXELS,
    Box,
    DecodeError,
    StoredImage,
    compute_dct_scale,
    decode_upright,
    load_crops,
    open_image,
)
from panfm.shards.schema import Modality

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check_order(scale: tuple[float, float]) -> tuple[float, float]:
    if scale[0] > scale[1]:
        raise ValueError(f"must be [smallest, largest]; try [{scale[1]}, {scale[0]}]")
    return scale


Share = Annotated[float, Field(gt=0.0, le=1.0)]
Scale = Annotated[tuple[Share, Share], AfterValidator(_check_order)]
Strength = Annotated[float, Field(ge=0.0, lt=1.0)]
RGB = tuple[float, float, float]

# Haematoxylin, eosin and DAB in optical density (Ruifrok and Johnston 2001), a stain a row, rows of length 1.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)
STAINS_INVERSE = np.linalg.inv(STAINS)
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
BOX_ATTEMPTS = 10


@config_class
class AugmentConfig:
    """Random views for pretraining; a strength s draws its factor uniformly from 1 - s to 1 + s."""

    image_size: Annotated[int, Field(ge=8, le=2048)] = 224
    """Side of a view, pixels; a multiple of the encoder's patch size."""
    views: Annotated[int, Field(ge=1, le=8)] = 1
    """Independently augmented views of every image; contrastive objectives need two."""
    local_views: Annotated[int, Field(ge=0, le=16)] = 0
    """Small views beside them, for self-distillation (DINOv2: 8); cut from the same decode, never masked."""
    local_size: Annotated[int, Field(ge=8, le=2048)] = 96
    """Side of a local view, pixels; a multiple of the encoder's patch size."""
    crop_scale: Scale = (0.3, 1.0)
    """Area of a crop as a share of a clinical or dermoscopic image. From 0.3 on 95 % of the crops hold half of the
    lesion or more, from 0.2 on 86 % (501 images of HAM10000 and their masks)."""
    total_body_crop_scale: Scale = (0.6, 1.0)
    """The same for total-body tiles, 15 mm around one small lesion: from 0.6 on every crop holds the 5 mm in their
    middle whole, whatever its place and aspect."""
    histopathology_crop_scale: Scale = (0.3, 1.0)
    """The same for histopathology tiles; the lower end is a zoom of 1.8, less than one objective step."""
    local_crop_scale: Scale = (0.05, 0.3)
    """The same for local views of all modalities but total_body: at 96 of 224 pixels about the magnification of the
    large views, so that tissue and network keep the size that they have there."""
    total_body_local_crop_scale: Scale = (0.2, 0.6)
    """The same for local views of total-body tiles: 6.7 mm wide at least, or most would show bare skin, enlarged."""
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
    """Histopathology: factor on each stain's density (HED jitter, Tellez et al. 2019, arXiv 1902.06543)."""
    stain_shift: Strength = 0.02
    """Histopathology: shift of each stain's density, optical density units, from - to + this. It also acts on the
    glass: 0.02 leaves white at 244 or above."""
    mean: RGB = IMAGENET_MEAN
    """Subtracted on the device, of RGB in 0 to 1."""
    std: RGB = IMAGENET_STD
    """Divided by on the device."""

    @property
    def num_views(self) -> int:
        """Views of every image, the local ones included."""
        return self.views + self.local_views


@dataclass(frozen=True)
class CameraJitter:
    """Factors of a camera's view: 1.0 leaves it as it is. balance: of red, green and blue."""

    exposure: float
    contrast: float
    saturation: float
    balance: RGB


@dataclass(frozen=True)
class StainJitter:
    """Factor and shift (optical density) of haematoxylin, eosin and DAB."""

    factors: RGB
    shifts: RGB


@dataclass(frozen=True)
class ViewPlan:
    """All that chance decides about one view; `render_views` makes the pixels from it."""

    box: Box
    size: int  # side of the view, pixels
    mirrored: bool  # before it is turned
    quarter_turns: int  # counterclockwise, 0 to 3
    jitter: CameraJitter | StainJitter | None  # None: all strengths are 0


def augment_view(data: bytes, modality: Modality, rng: np.random.Generator, config: AugmentConfig) -> NDArray[np.uint8]:
    """Draw one large view: uint8 [3, S, S]. The same generator state gives the same pixels. Raises DecodeError."""
    image = open_image(data)
    return render_views(image, [sample_view(image.size, modality, rng, config)])[0]


def augment_views(
    data: bytes, modality: Modality, rngs: Sequence[np.random.Generator], config: AugmentConfig
) -> list[NDArray[np.uint8]]:
    """Draw all views from a single decode, one a generator of the `config.num_views` given; raises DecodeError.

    First `views` of uint8 [3, image_size, image_size], then `local_views` of [3, local_size, local_size].
    """
    image = open_image(data)
    return render_views(image, sample_views(image.size, modality, rngs, config))


def sample_views(
    image_size: tuple[int, int], modality: Modality, rngs: Sequence[np.random.Generator], config: AugmentConfig
) -> list[ViewPlan]:
    """Draw what is done to an image of (width, height) for each of its `config.num_views` views, large ones first."""
    assert len(rngs) == config.num_views, f"{len(rngs)} generators for {config.num_views} views"
    return [
        sample_view(image_size, modality, rng, config, local=number >= config.views) for number, rng in enumerate(rngs)
    ]


def sample_view(
    image_size: tuple[int, int],
    modality: Modality,
    rng: np.random.Generator,
    config: AugmentConfig,
    *,
    local: bool = False,
) -> ViewPlan:
    """Draw what is done to an image of (width, height) for one view."""
    size = config.local_size if local else config.image_size
    box = sample_box(image_size, get_crop_scale(modality, config, local=local), config.aspect_ratio, size, rng)
    flip, turn, *colour = rng.random(8).tolist()
    draws = [2.0 * value - 1.0 for value in colour]
    jitter: CameraJitter | StainJitter | None = None
    if modality == "histopathology":
        if config.stain or config.stain_shift:
            h, e, d = (1.0 + config.stain * draw for draw in draws[:3])
            h_shift, e_shift, d_shift = (config.stain_shift * draw for draw in draws[3:])
            jitter = StainJitter((h, e, d), (h_shift, e_shift, d_shift))
    elif config.brightness or config.contrast or config.saturation or config.white_balance:
        red, green, blue = (1.0 + config.white_balance * draw for draw in draws[3:])
        jitter = CameraJitter(
            exposure=1.0 + config.brightness * draws[0],
            contrast=1.0 + config.contrast * draws[1],
            saturation=1.0 + config.saturation * draws[2],
            balance=(red, green, blue),
        )
    return ViewPlan(box, size, config.flips and flip < 0.5, int(4 * turn) if config.rotations else 0, jitter)


def render_views(image: StoredImage, plans: Sequence[ViewPlan]) -> list[NDArray[np.uint8]]:
    """Make the pixels of the planned views, uint8 [3, size, size] each, from one decode. Raises DecodeError."""
    views = []
    for crop, plan in zip(load_crops(image, [p.box for p in plans], [p.size for p in plans]), plans, strict=True):
        view = _turn(crop, plan.mirrored, plan.quarter_turns)
        if isinstance(plan.jitter, CameraJitter):
            view = apply_camera_jitter(view, plan.jitter)
        elif plan.jitter is not None:
            view = apply_stain_jitter(view, plan.jitter)
        views.append(view)
    return views


def get_crop_scale(modality: Modality, config: AugmentConfig, *, local: bool = False) -> tuple[float, float]:
    """Return the smallest and largest crop of a modality, as shares of the image's area."""
    if local:
        return config.total_body_local_crop_scale if modality == "total_body" else config.local_crop_scale
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
    for _ in range(BOX_ATTEMPTS):
        area_share, log_aspect, u_left, u_top = rng.random(4).tolist()
        area = width * height * (scale[0] + area_share * (scale[1] - scale[0]))
        aspect = aspect_ratio ** (2.0 * log_aspect - 1.0)
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            break
    box_width, box_height = min(max(box_width, 1), width), min(max(box_height, 1), height)
    left, top = int(u_left * (width - box_width + 1)), int(u_top * (height - box_height + 1))
    step = compute_dct_scale((left, top, left + box_width, top + box_height), size)
    left, top = left - left % step, top - top % step
    return left, top, left + box_width - box_width % step, top + box_height - box_height % step


def _turn(view: NDArray[np.uint8], mirrored: bool, quarter_turns: int) -> NDArray[np.uint8]:
    """Mirror uint8 [3, S, S] left to right, then turn it counterclockwise; contiguous, the same where nothing moves."""
    if quarter_turns % 2:
        return np.ascontiguousarray(np.rot90(view[:, :, ::-1] if mirrored else view, quarter_turns, axes=(1, 2)))
    # Half a turn is a flip of both axes. torch reverses bytes several times as fast as numpy.
    axes = [axis for axis, flip in ((1, quarter_turns == 2), (2, mirrored != (quarter_turns == 2))) if flip]
    return torch.flip(torch.from_numpy(view), axes).numpy() if axes else view


def apply_camera_jitter(view: NDArray[np.uint8], jitter: CameraJitter) -> NDArray[np.uint8]:
    """Change exposure, contrast, saturation and white balance of uint8 [3, H, W] in one affine map of the colour."""
    gains = jitter.exposure * np.array(jitter.balance)
    matrix = (jitter.saturation * np.eye(3) + (1.0 - jitter.saturation) * LUMA) * gains[:, None]  # [3 out, 3 in]
    pixels = _to_homogeneous(view)
    means = np.einsum("cp->c", pixels[:3]) / pixels.shape[1]
    grey = float(LUMA @ matrix @ means)  # of the view after exposure, saturation and balance
    return _to_uint8(_map_colours(pixels, jitter.contrast * matrix, (1.0 - jitter.contrast) * grey + 0.5), view.shape)


def apply_stain_jitter(view: NDArray[np.uint8], jitter: StainJitter) -> NDArray[np.uint8]:
    """Change the density of each stain in uint8 [3, H, W]: colour deconvolution, factor and shift, and back.

    With v = value + 0.5 the density of a channel is log(256 / v) = STAINS.T @ amounts, so that the jittered density is
    one affine map of the density, and the jittered log(v) one of log(v). Amounts below zero are kept: a change of
    nothing changes nothing.
    """
    matrix = STAINS.T @ np.diag(jitter.factors) @ STAINS_INVERSE.T  # [3 out, 3 in]
    pixels = _to_homogeneous(view)
    values = pixels[:3]
    values += np.float32(0.5)
    np.log(values, out=values)
    offset = math.log(256.0) * (1.0 - matrix.sum(axis=1)) - STAINS.T @ np.array(jitter.shifts)
    mapped = _map_colours(pixels, matrix, offset)
    return _to_uint8(np.exp(mapped, out=mapped), view.shape)


def _to_homogeneous(view: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn uint8 [3, H, W] into float32 [4, H * W] whose last row is 1: an affine map of it is one product."""
    pixels = np.empty((4, view[0].size), dtype=np.float32)
    torch.from_numpy(pixels[:3]).copy_(torch.from_numpy(view).view(3, -1))  # two thirds of numpy's time
    pixels[3] = 1.0
    return pixels


def _map_colours(
    pixels: NDArray[np.float32], matrix: NDArray[np.float64], offset: NDArray[np.float64] | float
) -> NDArray[np.float32]:
    affine = np.empty((3, 4), dtype=np.float32)
    affine[:, :3], affine[:, 3] = matrix, offset
    return affine @ pixels  # [3, P]


def _to_uint8(pixels: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Cut to 0 .. 255 in place and truncate; callers add the half that makes it rounding."""
    torch.from_numpy(pixels).clamp_(0.0, 255.0)
    return pixels.astype(np.uint8).reshape(shape)


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
        """Decode upright, resize with antialiasing, crop the centre: uint8 [3, S, S]. Raises DecodeError."""
        image = Image.fromarray(decode_upright(data))
        width, height = image.size
        shorter = min(width, height)
        target = (int(self.resize_size * width / shorter), int(self.resize_size * height / shorter))
        if target[0] * target[1] > MAX_PIXELS:
            raise DecodeError("too_narrow")
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
