"""What surrounds a drawn lesion: the skin, the light, hairs, rulers, the lens and the camera of an institution.

    phototype -> tone, melanin, blood      picture -> relief and light -> hairs -> ruler -> lens -> camera -> uint8

Used by `drawing`, which puts the lesion between the skin and the light. Also the primitives of both: smooth noise,
soft steps, soft discs, and the frame that says where an image's pixels lie in the lesion's millimetres.
"""

import math  # its scalars are weak: one numpy.float64 would turn every plane into float64
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Plane = npt.NDArray[np.floating]  # [H, W], float32
Picture = npt.NDArray[np.floating]  # [3, H, W]: with the colours last, NumPy would take three times as long
PhotographModality = Literal["clinical", "dermoscopic", "total_body"]

# Width and height in pixels, millimetres per pixel.
FIELDS: dict[PhotographModality, tuple[int, int, float]] = {
    "clinical": (320, 240, 0.13),
    "dermoscopic": (300, 225, 0.058),
    "total_body": (128, 128, 0.117),  # the 15 mm tiles of a total-body scan
}
SKIN = (
    (0.93, 0.78, 0.70),
    (0.89, 0.71, 0.60),
    (0.81, 0.61, 0.48),
    (0.68, 0.47, 0.34),
    (0.49, 0.32, 0.22),
    (0.33, 0.21, 0.15),
)
# Absorption of red, green, blue for one unit of a pigment.
MELANIN = np.array([0.62, 1.00, 1.28], dtype=np.float32)[:, None, None]
BLOOD = np.array([0.14, 0.95, 0.80], dtype=np.float32)[:, None, None]
DEEP_MELANIN = np.array([1.25, 0.95, 0.55], dtype=np.float32)[:, None, None]  # scattered back from below, it looks blue
CLOTHS = ((0.20, 0.30, 0.46), (0.16, 0.40, 0.36), (0.12, 0.12, 0.14), (0.55, 0.60, 0.66))
TEXTURE_MM, TEXTURE_SIDE = 26.0, 208  # the patch of skin for which a lesion's texture is made


@dataclass(frozen=True)
class Camera:
    """How an institution's cameras see: the cast that a site effect is made of."""

    gains: tuple[float, float, float]
    gamma: float
    noise: float  # standard deviation, share of full scale
    blur: float  # Gaussian radius in pixels
    ring: float  # share of the dermoscopic images with the black ring of a contact dermoscope
    ruler: float  # share of images with a ruler


@dataclass(frozen=True)
class Scene:
    """Everything about one photograph that is not the lesion."""

    modality: PhotographModality
    camera: Camera
    phototype: int
    hairy: float  # 0 none .. 1 dense


@dataclass(frozen=True)
class Frame:
    """Where the pixels of an image lie in the lesion's millimetres."""

    width: int
    height: int
    mm: float  # a pixel
    centre: tuple[float, float]  # of the lesion, in pixels
    angle: float

    def grid(self) -> tuple[Plane, Plane]:
        """The lesion's x and y in mm at every pixel, each [H, W]."""
        across = (np.arange(self.width, dtype=np.float32) + np.float32(0.5 - self.centre[0])) * np.float32(self.mm)
        down = (np.arange(self.height, dtype=np.float32) + np.float32(0.5 - self.centre[1])) * np.float32(self.mm)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return cos * across[None, :] + sin * down[:, None], -sin * across[None, :] + cos * down[:, None]

    def crop(self, reach_mm: float) -> tuple[tuple[slice, slice], "Frame"]:
        """The window within `reach_mm` of the lesion's centre, as slices of the image and as a frame of its own."""
        reach = reach_mm / self.mm
        left, right = max(0, int(self.centre[0] - reach)), min(self.width, int(self.centre[0] + reach))
        top, bottom = max(0, int(self.centre[1] - reach)), min(self.height, int(self.centre[1] + reach))
        centre = (self.centre[0] - left, self.centre[1] - top)
        frame = Frame(right - left, bottom - top, self.mm, centre, self.angle)
        return (slice(top, bottom), slice(left, right)), frame

    def to_pixels(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Points [N, 2] in the lesion's mm -> pixels [N, 2]."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        across, down = cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]
        return np.stack([across / self.mm + self.centre[0], down / self.mm + self.centre[1]], axis=1)

    def view(self, texture: Image.Image) -> Plane:
        """A square texture of TEXTURE_MM around the lesion, as seen in this image [H, W]."""
        scale = TEXTURE_SIDE / TEXTURE_MM * self.mm
        cos, sin, half = math.cos(self.angle) * scale, math.sin(self.angle) * scale, TEXTURE_SIDE / 2
        x, y = self.centre
        affine = (cos, sin, half - cos * x - sin * y, -sin, cos, half + sin * x - cos * y)
        seen = texture.transform(
            (self.width, self.height), Image.Transform.AFFINE, affine, resample=Image.Resampling.BILINEAR
        )
        return np.asarray(seen)


def make_noise(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> Plane:
    """Smooth noise [size[1], size[0]] of mean 0 and deviation about 1 with `cells` bumps across and down."""
    lattice = rng.standard_normal((cells[1] + 1, cells[0] + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(lattice).resize(size, Image.Resampling.BICUBIC)) * np.float32(1.25)


def smoothstep(values: Plane, low: float, high: float) -> Plane:
    """0 below `low`, 1 above `high`, smooth between."""
    t: Plane = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def stamp(layer: Plane, points: npt.NDArray[np.float64], radii: npt.NDArray[np.float64], weight: float) -> None:
    """Add soft discs (pixels: points [N, 2], radii [N]) to `layer` [H, W] in place."""
    height, width = layer.shape
    for (x, y), radius in zip(points, radii, strict=True):
        reach = int(radius + 2.5)
        left, right = max(0, int(x) - reach), min(width, int(x) + reach + 1)
        top, bottom = max(0, int(y) - reach), min(height, int(y) + reach + 1)
        if left >= right or top >= bottom:
            continue
        across = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
        down = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)
        distance = np.sqrt(across[None, :] ** 2 + down[:, None] ** 2)
        layer[top:bottom, left:right] += weight * np.clip((np.float32(radius) - distance) / 1.5 + 0.5, 0, 1)


def draw_skin(scene: Scene, frame: Frame, rng: np.random.Generator) -> tuple[Picture, Plane, Plane]:
    """Skin: its tone [3, 1, 1] in 0..1, and on it melanin and blood [H, W] as mottling, creases, freckles."""
    size, span = (frame.width, frame.height), frame.width * frame.mm
    tone = np.array(SKIN[scene.phototype - 1], dtype=np.float32)
    tone = tone ** (1 + 0.10 * rng.standard_normal()) * np.float32(1 + 0.03 * rng.standard_normal())
    cells = max(3, round(span / 5))
    mottle = make_noise(rng, (cells, cells), size)
    grain = make_noise(rng, (frame.width // 4, frame.height // 4), size)
    fairness = np.float32((7 - scene.phototype) / 6)
    blood = 0.035 * fairness * mottle
    melanin = 0.035 * make_noise(rng, (cells, cells), size) + 0.025 * grain
    x, y = frame.grid()
    turn = rng.uniform(0, np.pi)
    for angle in (turn, turn + rng.uniform(0.9, 1.4)):  # the rhomboid pattern of skin creases
        along = math.cos(angle) * x + math.sin(angle) * y
        waves = np.sin((2 * np.pi / 0.9) * (along + 0.16 * mottle) + grain * np.float32(0.5))
        melanin += (0.05 * min(1.0, 0.09 / frame.mm)) * smoothstep(waves, 0.55, 1.0)
    freckles = rng.poisson(3.0 * float(fairness) * span / 15)
    spots = rng.uniform(0, 1, (freckles, 2)) * size
    stamp(melanin, spots, rng.uniform(0.15, 0.55, freckles) / frame.mm, 0.14)
    return tone[:, None, None], melanin, blood


def light(
    picture: Picture,
    height: Plane,
    gloss: float,
    scene: Scene,
    frame: Frame,
    rng: np.random.Generator,
) -> Picture:
    """Relief, uneven light, and in clinical images the bend of a limb with cloth behind it."""
    strength = {"clinical": 1.0, "dermoscopic": 0.25, "total_body": 0.8}[scene.modality]
    angle = rng.uniform(0, 2 * np.pi)
    step = np.float32(2 * frame.mm)
    slope = np.zeros_like(height)
    slope[:, 1:-1] = math.cos(angle) * (height[:, 2:] - height[:, :-2])
    slope[1:-1] += math.sin(angle) * (height[2:] - height[:-2])
    slope /= step
    shade = 1 + (0.42 * strength) * np.tanh(slope * np.float32(0.9))
    glint = (0.42 * gloss * strength) * smoothstep(slope, 0.2, 1.4)
    across = np.linspace(-1, 1, frame.width, dtype=np.float32)[None, :]
    down = np.linspace(-1, 1, frame.height, dtype=np.float32)[:, None]
    turn = rng.uniform(0, 2 * np.pi)
    ramp = math.cos(turn) * across + math.sin(turn) * down
    shade = shade * (1 + (rng.uniform(0.02, 0.14) * max(strength, 0.5)) * ramp)
    lit: Picture = picture * shade + glint
    if scene.modality == "clinical" and rng.random() < 0.45:
        reach = rng.uniform(0.80, 1.15)
        wavy = ramp + 0.05 * make_noise(rng, (4, 4), (frame.width, frame.height))
        bend = np.clip(wavy / np.float32(reach), 0, 1)
        lit = lit * (1 - 0.55 * bend**4)
        cloth = np.array(CLOTHS[int(rng.integers(len(CLOTHS)))], dtype=np.float32)[:, None, None]
        weave = 1 + 0.07 * make_noise(rng, (frame.width // 3, frame.height // 3), (frame.width, frame.height))
        behind = smoothstep(wavy, reach, reach + 0.03)
        lit = lit * (1 - behind) + cloth * (weave * (np.float32(0.7) + 0.3 * bend)) * behind
    return lit


def draw_hairs(picture: Picture, scene: Scene, frame: Frame, rng: np.random.Generator) -> Picture:
    """Hairs over everything, dark or blond, lying roughly one way."""
    canvas = Image.new("L", (2 * frame.width, 2 * frame.height))
    pen = ImageDraw.Draw(canvas)
    count = rng.poisson(9 * scene.hairy * (1.6 if scene.modality == "clinical" else 1.0))
    lie = rng.uniform(0, 2 * np.pi)
    t = np.linspace(0, 1, 14)[:, None]
    for _ in range(count):
        start = rng.uniform(-0.1, 1.1, 2) * canvas.size
        heading, length = lie + rng.normal(0, 0.45), rng.uniform(5, 11) / frame.mm
        end = start + 2 * length * np.array([math.cos(heading), math.sin(heading)])
        knee = (start + end) / 2 + rng.normal(0, 0.25 * length, 2)
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * knee + t**2 * end
        pen.line([tuple(point) for point in curve], fill=235, width=max(1, round(rng.uniform(0.10, 0.18) / frame.mm)))
    cover = np.asarray(canvas.resize((frame.width, frame.height), Image.Resampling.BOX), dtype=np.float32)
    blond = scene.phototype <= 2 and rng.random() < 0.3
    colour = np.array([0.52, 0.38, 0.22] if blond else [0.11, 0.08, 0.07], dtype=np.float32)
    return picture + (colour[:, None, None] - picture) * (cover / 255)


def draw_ruler(picture: Picture, modality: PhotographModality, mm: float, rng: np.random.Generator) -> Picture:
    """A paper ruler along an edge (clinical) or the scale engraved in a dermoscope's plate."""
    height, width = picture.shape[1:]
    top = bool(rng.random() < 0.5)
    depth = round(height * 0.13)
    base = 0 if top else height - depth
    out = picture.copy()
    if modality == "clinical":
        out[:, base : base + depth] = np.array([0.94, 0.94, 0.90], dtype=np.float32)[:, None, None]
    ticks = np.arange(rng.uniform(0, 1), width * mm, 1.0)
    for number, place in enumerate(ticks):
        column = int(place / mm)
        long = depth * (0.62 if number % 5 == 0 else 0.34)
        rows = slice(base, base + int(long)) if not top else slice(base + depth - int(long), base + depth)
        out[:, rows, column : column + 2] *= np.float32(0.18)
    return out


def draw_lens(picture: Picture, camera: Camera, rng: np.random.Generator) -> Picture:
    """The dermoscope: light falling off to the corners, a black ring for some, bubbles in the gel for a few."""
    height, width = picture.shape[1:]
    across = (np.arange(width, dtype=np.float32) - width / 2)[None, :]
    down = (np.arange(height, dtype=np.float32) - height / 2)[:, None]
    distance = np.sqrt(across**2 + down**2) / np.float32(width / 2)
    picture = picture * (1 - rng.uniform(0.10, 0.30) * distance**2)
    if rng.random() < camera.ring:
        ring = 1 - smoothstep(distance, 0.90, 0.94)
        picture = picture * ring + np.float32(0.02)
    if rng.random() < 0.15:
        bubbles = np.zeros((height, width), dtype=np.float32)
        count = int(rng.integers(2, 7))
        points, radii = rng.uniform(0, 1, (count, 2)) * (width, height), rng.uniform(2, 8, count)
        stamp(bubbles, points, radii, 0.35)
        stamp(bubbles, points, radii - 1.2, -0.28)
        picture = picture + bubbles
    return picture


def expose(
    picture: Picture, camera: Camera, modality: PhotographModality, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """What the camera makes of the light: exposure, cast, gamma, blur, noise -> uint8 [H, W, 3]."""
    exposure = np.float32(1 + 0.06 * rng.standard_normal())
    gains = np.array(camera.gains, dtype=np.float32) * (1 + 0.015 * rng.standard_normal(3, dtype=np.float32))
    levels = np.clip(picture * (1023 * exposure * gains)[:, None, None], 0, 1023).astype(np.uint16)
    curve = 255 * np.linspace(0, 1, 1024) ** camera.gamma  # a table: powers are slow
    seen = np.rint(curve).astype(np.uint8)[levels].transpose(1, 2, 0)
    blur = (
        camera.blur
        + (0.4 if modality == "total_body" else 0.0)
        + (rng.exponential(0.9) if rng.random() < 0.15 else 0.0)
    )
    soft = Image.fromarray(np.ascontiguousarray(seen)).filter(ImageFilter.BoxBlur(blur))
    noise = rng.standard_normal(seen.shape[:2], dtype=np.float32) * np.float32(255 * camera.noise)
    grainy = np.asarray(soft, dtype=np.int16) + np.rint(noise).astype(np.int16)[..., None]
    return np.asarray(np.clip(grainy, 0, 255), dtype=np.uint8)
