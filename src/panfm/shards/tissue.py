"""Draws the slides of the synthetic archive: LesionTraits -> a section of skin, stained, as a pyramidal TIFF.

    glass | keratin | epidermis with ridges | dermis with fibres -> nests, islands, whorls, nuclei -> two stains -> RGB

A section is drawn as two planes of stain, haematoxylin (nuclei) and eosin (everything else), and turned into light by
absorption, so that an institution's stain is two numbers. What OpenSlide reads back states its microns per pixel.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from panfm.shards.scenery import Plane, make_noise, smoothstep
from panfm.shards.synthetic_patients import NOTICE, LesionTraits

SLIDE_SIZE = (1120, 672)  # pixels at level 0: 5 x 3 tiles of 112 um
SLIDE_MPP = 0.5
NUM_LEVELS = 3
NUM_ANGLES = 256
TIFF_TILE = 256
# Absorption of red, green, blue for one unit of a stain: haematoxylin as in Ruifrok and Johnston 2001; their eosin is
# magenta on a screen, this one is the pink of most scanners.
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], dtype=np.float32)[:, None, None]
EOSIN = np.array([0.10, 0.82, 0.33], dtype=np.float32)[:, None, None]


@dataclass(frozen=True)
class Stain:
    """How an institution's laboratory stains: the site effect of histopathology."""

    haematoxylin: float
    eosin: float


@dataclass(frozen=True)
class _Section:
    """The planes of a section [H, W], drawn into in place."""

    haematoxylin: Plane
    eosin: Plane
    top: npt.NDArray[np.float32]  # [W]: row where the tissue begins
    junction: npt.NDArray[np.float32]  # [W]: row where the epidermis ends


def draw_section(
    traits: LesionTraits, stain: Stain, lesion_seed: tuple[int, ...], rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Draw one stained section, uint8 [H, W, 3]; `lesion_seed` fixes the lesion, `rng` the rest."""
    lesion = np.random.default_rng([*lesion_seed, 7])
    section = _lay_out(traits, rng)
    _draw_epidermis(section, traits, lesion)
    _draw_dermis(section, traits, lesion)
    if traits.acanthosis > 0.35:
        _draw_horn_cysts(section, traits, lesion)
    _draw_clusters(section, traits, lesion)

    row = np.arange(SLIDE_SIZE[1], dtype=np.float32)[:, None]
    tissue = smoothstep(row - section.top[None, :], -1.5, 1.5)
    ragged = np.float32(SLIDE_SIZE[1] - 46) + 14 * make_noise(rng, (24, 1), SLIDE_SIZE)
    tissue *= smoothstep(ragged - row, -1.5, 1.5)
    patchy = tissue * (1 + 0.06 * make_noise(rng, (5, 4), SLIDE_SIZE))  # sections are not cut evenly thick
    absorbed = (stain.haematoxylin * section.haematoxylin * patchy) * HAEMATOXYLIN
    absorbed += (stain.eosin * section.eosin * patchy) * EOSIN
    light = np.clip(243 * np.exp(-absorbed), 0, 255).astype(np.uint8)  # [3, H, W]
    return np.ascontiguousarray(light.transpose(1, 2, 0))


def write_slide(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write a section as a tiled pyramidal TIFF that states SLIDE_MPP; equal images give equal bytes."""
    per_centimetre = 10_000 / SLIDE_MPP
    levels = [image]
    for _ in range(NUM_LEVELS - 1):
        smaller = Image.fromarray(levels[-1])
        levels.append(np.asarray(smaller.resize((smaller.width // 2, smaller.height // 2), Image.Resampling.BOX)))
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(
                level,
                subfiletype=int(number > 0),  # the reduced copies of the page before
                tile=(TIFF_TILE, TIFF_TILE),
                photometric="rgb",
                compression="zlib",  # tifffile would need a further package for JPEG
                compressionargs={"level": 3},  # a tenth larger than the default, in a third of its time
                predictor=True,
                resolution=(per_centimetre / 2**number, per_centimetre / 2**number),
                resolutionunit="CENTIMETER",
                software="panfm synthetic slide",
                description=None if number else NOTICE,
                metadata=None,
            )


def _lay_out(traits: LesionTraits, rng: np.random.Generator) -> _Section:
    """The surface and the wavy border between epidermis and dermis."""
    width, height = SLIDE_SIZE
    column = np.arange(width, dtype=np.float32)
    bend = make_noise(rng, (3, 1), (width, 1))[0]
    top = np.float32(90) + 26 * bend - (26 * traits.elevation) * np.cos((column / width - 0.5) * np.pi)
    thickness = np.float32(58 + 150 * traits.acanthosis)
    ridges = make_noise(rng, (26, 1), (width, 1))[0]
    junction = top + thickness * (1 + (0.30 + 0.2 * traits.acanthosis) * np.clip(ridges, -1.6, 1.6))
    fibre_long = make_noise(rng, (20, 90), SLIDE_SIZE)
    fibre_fine = make_noise(rng, (90, 260), SLIDE_SIZE)
    eosin = np.float32(0.44) + 0.13 * fibre_long + 0.09 * fibre_fine
    eosin -= 0.30 * smoothstep(make_noise(rng, (60, 110), SLIDE_SIZE), 0.9, 1.6)  # gaps between bundles
    wave = 9 * make_noise(rng, (14, 1), (width, 1))[0] + 4 * make_noise(rng, (40, 1), (width, 1))[0]
    shifted = (np.arange(height)[:, None] + wave.astype(np.int64)[None, :]) % height
    eosin = np.take_along_axis(eosin, shifted, axis=0)
    haematoxylin = np.full((height, width), 0.05, dtype=np.float32)
    return _Section(haematoxylin, np.maximum(eosin, 0.03).astype(np.float32), top, junction)


def _draw_epidermis(section: _Section, traits: LesionTraits, rng: np.random.Generator) -> None:
    width, height = SLIDE_SIZE
    row = np.arange(height, dtype=np.float32)[:, None]
    inside = smoothstep(section.junction[None, :] - row, -2, 2)
    section.eosin[:] = section.eosin * (1 - inside) + 0.36 * inside
    section.haematoxylin[:] += 0.17 * inside
    keratin = smoothstep(section.top[None, :] + np.float32(16 + 20 * traits.acanthosis) - row, -2, 2)
    flakes = 1 + 0.25 * make_noise(rng, (40, 200), SLIDE_SIZE)
    section.eosin[:] = section.eosin * (1 - keratin) + 0.62 * flakes * keratin
    section.haematoxylin[:] *= 1 - 0.8 * keratin
    basal = np.exp(-(((section.junction[None, :] - row - 7) / 6) ** 2))
    section.haematoxylin[:] += (0.16 + 0.25 * min(traits.melanin, 1.0)) * basal

    points = _place(rng, 15, 0.30)
    depth = points[:, 1] - section.top[np.clip(points[:, 0].astype(int), 0, width - 1)]
    room = (section.junction - section.top)[np.clip(points[:, 0].astype(int), 0, width - 1)]
    kept = (depth > 18 + 20 * traits.acanthosis) & (depth < room - 2)
    points, share = points[kept], (depth / np.maximum(room, 1))[kept]
    _draw_nuclei(section, rng, points, size=5.4 - 1.3 * share, stretch=1.25, dark=0.62, spread=0.12)
    if traits.atypia > 0.45 and traits.nests > 0.3:  # single atypical cells climbing up, as in melanoma
        chosen = points[rng.random(len(points)) < 0.10 * traits.atypia]
        _draw_nuclei(section, rng, chosen, size=8.5, stretch=1.3, dark=1.0, spread=0.3)


def _draw_dermis(section: _Section, traits: LesionTraits, rng: np.random.Generator) -> None:
    width, height = SLIDE_SIZE
    points = _place(rng, 34, 0.48)
    points = points[points[:, 1] > section.junction[np.clip(points[:, 0].astype(int), 0, width - 1)] + 6]
    _draw_nuclei(section, rng, points, size=4.2, stretch=2.6, dark=0.75, spread=0.15, flat=0.35)
    if traits.spindles > 0.3:  # swirling bundles of spindle cells
        for centre in rng.uniform([0, 280], [width, height], (round(13 * traits.spindles), 2)):
            count = round(130 * min(traits.spindles, 1.0))
            offset = rng.normal(0, 1, (count, 2)) * rng.uniform(30, 75, 2)
            turn = np.arctan2(offset[:, 1], offset[:, 0]) + np.pi / 2 + rng.uniform(-0.6, 0.6)
            uneven = 0.2 + 0.2 * traits.atypia
            _draw_nuclei(section, rng, centre + offset, size=4.4, stretch=3.2, dark=0.8, spread=uneven, turn=turn)
    infiltrate = round(520 * min(traits.lymphocytes, 1.0))
    column = np.clip(rng.normal(rng.uniform(0.25, 0.75) * width, 0.20 * width, infiltrate), 0, width - 1)
    below = section.junction[column.astype(int)] + np.abs(rng.normal(30, 45, infiltrate))
    _draw_nuclei(section, rng, np.stack([column, below], axis=1), size=3.4, stretch=1.05, dark=1.15, spread=0.06)


def _draw_clusters(section: _Section, traits: LesionTraits, rng: np.random.Generator) -> None:
    """Nests of melanocytes at the junction and below, and basaloid islands with a palisade and a cleft."""
    width, height = SLIDE_SIZE
    for _ in range(round((34 + 16 * traits.atypia) * min(traits.nests, 1.1))):
        column = float(rng.uniform(40, width - 40))
        start = float(section.junction[int(column)])
        below = rng.exponential(80 + 80 * traits.atypia) if rng.random() < 0.6 else rng.normal(0, 14)
        radius = rng.uniform(20, 34) * (1 + 0.5 * traits.atypia * rng.random())
        nest = _Body((column, start + below), _draw_outline(rng, radius, 0.10 + 0.15 * traits.atypia))
        _lay_body(section, nest, haematoxylin=0.16, eosin=0.28, cleft=0.0)
        place = nest.fill(rng, margin=4, spacing=11 + 3 * traits.atypia)
        size, uneven = 4.9 + 2.4 * traits.atypia, 0.08 + 0.32 * traits.atypia
        _draw_nuclei(section, rng, place, size=size, stretch=1.15, dark=0.72 + 0.25 * traits.atypia, spread=uneven)
    for _ in range(round(17 * min(traits.islands, 1.1)) if traits.islands > 0.15 else 0):
        centre = (float(rng.uniform(60, width - 60)), float(rng.uniform(210, height - 90)))
        island = _Body(centre, _draw_outline(rng, float(rng.uniform(34, 84)), 0.28))
        _lay_body(section, island, haematoxylin=0.30, eosin=0.22, cleft=7.0)
        place = island.fill(rng, margin=9, spacing=9.5)
        _draw_nuclei(section, rng, place, size=4.4, stretch=1.3, dark=0.95, spread=0.12)
        angle = np.arange(0, 2 * np.pi, 7.0 / island.outline.mean())
        ring = island.at(angle, margin=4)
        _draw_nuclei(section, rng, ring, size=4.4, stretch=1.9, dark=1.1, spread=0.08, turn=angle)


def _draw_horn_cysts(section: _Section, traits: LesionTraits, rng: np.random.Generator) -> None:
    width, _ = SLIDE_SIZE
    for _ in range(round(13 * traits.acanthosis)):
        column = float(rng.uniform(30, width - 30))
        top, bottom = float(section.top[int(column)]), float(section.junction[int(column)])
        if bottom - top > 80:
            centre = (column, float(rng.uniform(top + 45, bottom - 30)))
            cyst = _Body(centre, _draw_outline(rng, float(rng.uniform(13, 27)), 0.12))
            _lay_body(section, cyst, haematoxylin=0.0, eosin=0.66, cleft=3.0)


@dataclass(frozen=True)
class _Body:
    """A roundish body of cells: its centre (column, row) and its radius in pixels at NUM_ANGLES angles."""

    centre: tuple[float, float]
    outline: npt.NDArray[np.float64]

    def radius(self, angle: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The radius at each angle (radians)."""
        return np.asarray(self.outline[np.rint(angle * (NUM_ANGLES / (2 * np.pi))).astype(np.int64) % NUM_ANGLES])

    def at(self, angle: npt.NDArray[np.float64], margin: float) -> npt.NDArray[np.float64]:
        """Points [N, 2] at these angles, `margin` inside the outline."""
        reach = self.radius(angle) - margin
        return np.array(self.centre) + np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1)

    def fill(self, rng: np.random.Generator, margin: float, spacing: float) -> npt.NDArray[np.float64]:
        """Points [N, 2] inside the outline on a shaken grid."""
        offsets = np.arange(-self.outline.max(), self.outline.max() + spacing, spacing)
        columns, rows = np.meshgrid(offsets, offsets)
        points = (
            np.stack([columns.ravel(), rows.ravel()], axis=1) + rng.uniform(-0.35, 0.35, (columns.size, 2)) * spacing
        )
        inside = np.hypot(points[:, 0], points[:, 1]) < self.radius(np.arctan2(points[:, 1], points[:, 0])) - margin
        return np.asarray(points[inside] + np.array(self.centre))


def _draw_outline(rng: np.random.Generator, radius: float, uneven: float) -> npt.NDArray[np.float64]:
    """A closed wavy outline: radii at NUM_ANGLES angles."""
    theta = np.linspace(0, 2 * np.pi, NUM_ANGLES, endpoint=False)
    shape = np.ones(NUM_ANGLES)
    for order in (2, 3, 5):
        shape += uneven * rng.normal(0, 1.0) / order**0.7 * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
    return radius * np.clip(shape, 0.45, 1.7)


def _lay_body(section: _Section, body: _Body, *, haematoxylin: float, eosin: float, cleft: float) -> None:
    """Lay a body of its own stain over the section; `cleft` is the width of a pale rim around it, in pixels."""
    width, height = SLIDE_SIZE
    reach = float(body.outline.max()) + cleft + 4
    left, right = max(0, int(body.centre[0] - reach)), min(width, int(body.centre[0] + reach))
    top, bottom = max(0, int(body.centre[1] - reach)), min(height, int(body.centre[1] + reach))
    if left >= right or top >= bottom:
        return
    across = np.arange(left, right)[None, :] - body.centre[0]
    down = np.arange(top, bottom)[:, None] - body.centre[1]
    inside = body.radius(np.arctan2(down, across)) - np.hypot(across, down)
    cover = smoothstep(inside, -1.5, 1.5)
    here = (slice(top, bottom), slice(left, right))
    if cleft:
        rim = smoothstep(inside + cleft, -2, 2) * (1 - cover)
        section.eosin[here] *= 1 - 0.92 * rim
        section.haematoxylin[here] *= 1 - 0.92 * rim
    section.eosin[here] += (eosin - section.eosin[here]) * cover
    section.haematoxylin[here] += (haematoxylin - section.haematoxylin[here]) * cover


def _draw_nuclei(
    section: _Section,
    rng: np.random.Generator,
    points: npt.NDArray[np.float64],
    *,
    size: float | npt.NDArray[np.float64],
    stretch: float,
    dark: float,
    spread: float,
    turn: npt.NDArray[np.float64] | None = None,
    flat: float = 3.2,
) -> None:
    """Add nuclei at points [N, 2] (column, row): ellipses of `size` px radius, `spread` their unevenness.

    `turn` gives each one's direction in radians; without it directions are drawn within +- `flat` of level.
    """
    count = len(points)
    if count == 0:
        return
    radius = np.maximum(np.asarray(size) * np.exp(spread * rng.standard_normal(count)), 1.6)
    long, short = radius * np.sqrt(stretch), radius / np.sqrt(stretch)
    angle = rng.uniform(-flat, flat, count) if turn is None else turn + rng.normal(0, 0.2, count)
    shade = np.clip(dark * (1 + 0.5 * spread * rng.standard_normal(count)), 0.2, 1.4) * 170
    # Only the box that holds the nuclei is drawn: most calls are for one nest.
    reach = float(long.max()) + 3
    (left, top), (right, bottom) = np.floor(points.min(axis=0) - reach), np.ceil(points.max(axis=0) + reach)
    left, top = max(0, int(left)), max(0, int(top))
    right, bottom = min(SLIDE_SIZE[0], int(right)), min(SLIDE_SIZE[1], int(bottom))
    if left >= right or top >= bottom:
        return
    canvas = Image.new("L", (right - left, bottom - top))
    pen = ImageDraw.Draw(canvas)
    around = np.linspace(0, 2 * np.pi, 11)[:-1]
    circle = np.stack([np.cos(around), np.sin(around)])  # [2, 10]
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = points[:, :1] - left + long[:, None] * cosine * circle[0] - short[:, None] * sine * circle[1]  # [N, 10]
    y = points[:, 1:] - top + long[:, None] * sine * circle[0] + short[:, None] * cosine * circle[1]
    for outline, grey in zip(
        np.stack([x, y], axis=2).reshape(count, -1).tolist(), shade.astype(int).tolist(), strict=True
    ):
        pen.polygon(outline, fill=grey)
    soft = np.asarray(canvas.filter(ImageFilter.BoxBlur(0.8)), dtype=np.float32) / np.float32(170 / 1.15)
    here = section.haematoxylin[top:bottom, left:right]
    np.maximum(here, soft, out=here)


def _place(rng: np.random.Generator, spacing: float, jitter: float) -> npt.NDArray[np.float64]:
    """Points [N, 2] over the whole slide on a shaken grid: cells keep their distance."""
    width, height = SLIDE_SIZE
    columns, rows = np.meshgrid(np.arange(spacing / 2, width, spacing), np.arange(spacing / 2, height, spacing))
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    return points + rng.uniform(-jitter, jitter, points.shape) * spacing
