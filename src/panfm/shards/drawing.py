"""Draws the photographs of the synthetic archive: LesionTraits + Scene -> RGB image and lesion mask.

    skin (phototype, mottling, creases) x pigment layers of the lesion x relief -> hairs, ruler -> camera -> uint8

A lesion is drawn in its own millimetres from its own seed, so that its clinical, dermoscopic and total-body images
show the same shape and texture at different scales and angles. Colour is absorption: each pigment dims red, green and
blue by its own factor, which is why a mole on dark skin has little contrast here as in life.
"""

import math  # its scalars are weak: one numpy.float64 would turn every plane into float64
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from panfm.shards.scenery import (
    BLOOD,
    DEEP_MELANIN,
    FIELDS,
    MELANIN,
    TEXTURE_SIDE,
    Frame,
    Plane,
    Scene,
    draw_hairs,
    draw_lens,
    draw_ruler,
    draw_skin,
    expose,
    light,
    make_noise,
    smoothstep,
    stamp,
)
from panfm.shards.synthetic_patients import LesionTraits

NUM_ANGLES = 1024  # of an outline


@dataclass(frozen=True)
class Photograph:
    """A drawn image uint8 [H, W, 3] and where the lesion is, bool [H, W]."""

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]


def draw_photograph(
    traits: LesionTraits, scene: Scene, lesion_seed: tuple[int, ...], rng: np.random.Generator
) -> Photograph:
    """Draw one lesion in one scene; `lesion_seed` fixes the lesion, `rng` everything that differs between images."""
    width, height, mm = FIELDS[scene.modality]
    angle = rng.uniform(-0.5, 0.5) if scene.modality == "total_body" else rng.uniform(0, 2 * np.pi)
    room = 0.10 if scene.modality == "clinical" else 0.05
    centre = (width * (0.5 + rng.uniform(-room, room)), height * (0.5 + rng.uniform(-room, room)))
    zoom = mm * rng.uniform(0.9, 1.1)
    frame = Frame(width, height, zoom, centre, angle)
    detail = float(np.clip(1.25 - zoom / 0.16, 0.0, 1.0))  # structure finer than the pixels is not drawn

    tone, melanin, blood = draw_skin(scene, frame, rng)
    # Most of a clinical image is skin: the lesion is drawn in the window that it and its halo fill.
    window, part = frame.crop(0.95 * traits.diameter_mm + 3.0)
    lesion = _draw_lesion(traits, part, detail, lesion_seed)
    melanin[window] += lesion.melanin
    blood[window] += lesion.blood
    absorbed = melanin * MELANIN + blood * BLOOD
    absorbed[:, *window] += lesion.deep * DEEP_MELANIN
    picture = tone * np.exp(-absorbed)
    pale = np.minimum(np.float32(0.33) + 0.58 * tone, np.float32(0.92))
    picture[:, *window] += (pale - picture[:, *window]) * lesion.white
    relief = np.zeros((height, width), dtype=np.float32)
    relief[window] = lesion.height
    mask = np.zeros((height, width), dtype=bool)
    mask[window] = lesion.alpha > 0.5
    picture = light(picture, relief, traits.gloss, scene, frame, rng)
    if scene.hairy > 0.1:
        picture = draw_hairs(picture, scene, frame, rng)
    if rng.random() < scene.camera.ruler and scene.modality != "total_body":
        picture = draw_ruler(picture, scene.modality, zoom, rng)
    if scene.modality == "dermoscopic":
        picture = draw_lens(picture, scene.camera, rng)
    return Photograph(expose(picture, scene.camera, scene.modality, rng), mask)


@dataclass(frozen=True)
class _Layers:
    """The lesion as layers [H, W]: cover, pigments, white tissue, height in mm."""

    alpha: Plane
    melanin: Plane
    blood: Plane
    deep: Plane
    white: Plane
    height: Plane


def _draw_lesion(traits: LesionTraits, frame: Frame, detail: float, seed: tuple[int, ...]) -> _Layers:
    rng = np.random.default_rng(seed)
    side = (TEXTURE_SIDE, TEXTURE_SIDE)
    coarse, patches, regress, middle, fine = (
        frame.view(Image.fromarray(make_noise(rng, (cells, cells), side))) for cells in (9, 11, 8, 26, 70)
    )
    x, y = frame.grid()
    radius = np.float32(traits.diameter_mm / 2)
    outline = _draw_outline(traits, rng)
    rho = np.sqrt(x * x + y * y)
    turn = ((np.arctan2(y, x) * np.float32(NUM_ANGLES / (2 * np.pi))).astype(np.int32)) % NUM_ANGLES
    inside = outline[turn] * radius - rho + (0.55 * traits.irregularity) * middle  # mm, positive inside
    edge = np.float32(max(traits.edge_mm, frame.mm))
    alpha = 0.5 + 0.5 * np.tanh(inside / edge)
    depth = np.clip(inside / radius, 0, 1)

    # Melanin: a base, patches where the colour is uneven, then structures.
    shift_x, shift_y = (rng.normal(0, 0.5 * traits.asymmetry) * traits.diameter_mm for _ in range(2))
    off_centre = np.exp(-((x - shift_x) ** 2 + (y - shift_y) ** 2) / (0.45 * traits.diameter_mm) ** 2, dtype=np.float32)
    melanin = traits.melanin * (0.62 + 0.45 * off_centre + 0.10 * middle)
    melanin = melanin * (1 + (0.35 * traits.variegation) * coarse)
    melanin += (1.15 * traits.variegation) * smoothstep(patches, 0.35, 0.9) * (0.3 + np.float32(traits.melanin))
    if detail > 0:
        mesh = _draw_network(x, y, middle, coarse, min(1.0, 0.6 * traits.variegation + traits.streaks))
        melanin += (1.1 * traits.network * detail) * (mesh - 0.35) * (1.15 - 0.8 * depth)
        melanin += (0.12 * detail) * fine
    furrows = np.exp(-(((middle + 0.35 * coarse) / 0.16) ** 2)) * smoothstep(depth, 0.05, 0.3)
    melanin += (0.75 * traits.fissures * (0.4 + 0.6 * detail)) * furrows
    blood = traits.blood * (0.75 + 0.25 * patches)
    white = (0.75 * traits.variegation) * smoothstep(regress + 0.3 * middle, 0.7, 2.0) * 0.8
    centre_glow = np.exp(-((rho / (0.30 * traits.diameter_mm)) ** 2) * (1 + 0.25 * patches))
    white += (0.75 * traits.scar) * smoothstep(centre_glow, 0.25, 0.8)
    melanin = melanin * (1 - min(0.85 * traits.scar, 0.9) * smoothstep(centre_glow, 0.2, 0.7))

    angle = rng.uniform(0, 2 * np.pi)
    veil_x, veil_y = 0.22 * traits.diameter_mm * math.cos(angle), 0.22 * traits.diameter_mm * math.sin(angle)
    veil = np.exp(-((x - veil_x) ** 2 + (y - veil_y) ** 2) / (0.32 * traits.diameter_mm) ** 2)
    veil = veil * (1 + 0.35 * regress) + 0.14 * middle
    deep = (1.15 * traits.veil) * smoothstep(veil, 0.25, 1.15)
    white += (0.30 * traits.veil) * smoothstep(veil, 0.45, 1.2)

    angle = rng.uniform(0, 2 * np.pi)
    sore_x, sore_y = 0.12 * traits.diameter_mm * math.cos(angle), 0.12 * traits.diameter_mm * math.sin(angle)
    sore_size = 0.10 + 0.13 * traits.ulcer
    sore = np.exp(-((x - sore_x) ** 2 + (y - sore_y) ** 2) / (sore_size * traits.diameter_mm) ** 2) + 0.16 * middle
    sore = smoothstep(sore, 0.42, 0.66)
    blood += min(1.5 * traits.ulcer, 1.3) * sore
    melanin += (0.6 * traits.ulcer) * sore * smoothstep(fine, -0.2, 0.8)

    melanin, blood, deep, white = melanin * alpha, blood * alpha, deep * alpha, np.clip(white, 0, 0.85) * alpha
    dots = _scatter(rng, round(46 * min(traits.globules, 1.0)), 0.46 * traits.diameter_mm)
    stamp(melanin, frame.to_pixels(dots), rng.uniform(0.07, 0.17, len(dots)) / frame.mm, 0.75 * (0.25 + 0.75 * detail))
    pearls = _scatter(rng, round(24 * min(traits.cysts, 1.0)), 0.38 * traits.diameter_mm)
    sizes = rng.uniform(0.10, 0.24, len(pearls)) / frame.mm
    half = len(pearls) // 2
    stamp(white, frame.to_pixels(pearls)[:half], sizes[:half], 0.55 * (0.3 + 0.7 * detail))
    stamp(melanin, frame.to_pixels(pearls)[half:], sizes[half:], 1.3 * (0.3 + 0.7 * detail))
    blood += _draw_vessels(traits, frame, rng) * np.float32(0.45 + 0.55 * detail)
    halo = np.exp(-((np.minimum(inside, 0) / 1.1) ** 2)) * (1 - alpha)
    blood += (0.30 * max(traits.blood, 0.7 * traits.ulcer)) * halo

    dome = np.sqrt(smoothstep(inside, -0.1, 0.55 * float(radius))) * np.float32(traits.elevation)
    rolled = np.exp(-(((inside - 0.55) / 0.45) ** 2)) * np.float32(0.5 * traits.gloss * traits.elevation)
    bumps = (0.10 * traits.elevation) * (coarse - 1.6 * traits.fissures * furrows)
    relief = dome + rolled + (bumps - (0.35 * traits.ulcer) * sore) * alpha
    return _Layers(
        alpha=alpha,
        melanin=np.maximum(melanin, 0),
        blood=np.maximum(blood, 0),
        deep=np.maximum(deep, 0),
        white=np.clip(white, 0, 0.9),
        height=relief,
    )


def _draw_outline(traits: LesionTraits, rng: np.random.Generator) -> Plane:
    """Radius around the lesion, 1 on average, at NUM_ANGLES angles."""
    theta = np.linspace(0, 2 * np.pi, NUM_ANGLES, endpoint=False)
    shape = 1 + traits.elongation * np.cos(2 * theta + rng.uniform(0, 6.28))
    for order in range(1, 14):
        strength = traits.asymmetry if order < 4 else 0.75 * traits.irregularity
        shape += strength * rng.normal(0, 0.55) / order**0.6 * np.cos(order * theta + rng.uniform(0, 6.28)) * 0.8
    # Streaks: narrow spikes on one or two arcs of the border, longer than the rest of it.
    spikes = np.interp(theta, np.linspace(0, 2 * np.pi, 73), np.append(s := rng.random(72), s[0]))
    arcs = smoothstep(np.cos(theta + rng.uniform(0, 6.28)).astype(np.float32), 0.1, 0.8)
    shape += 0.34 * traits.streaks * np.clip(spikes - 0.45, 0, 1) * arcs
    return np.clip(shape, 0.35, 1.9).astype(np.float32)


def _draw_network(x: Plane, y: Plane, middle: Plane, coarse: Plane, atypia: float) -> Plane:
    """A honeycomb of lines 0..1 with meshes of about 0.45 mm, warped where it is atypical."""
    warp_x, warp_y = (0.05 + 0.13 * atypia) * middle, (0.05 + 0.16 * atypia) * coarse
    pitch = np.float32(2 * np.pi / 0.42)
    u, v = (x + warp_x) * pitch, (y + warp_y) * pitch
    slant = 0.8660254 * v
    waves = np.cos(u) + np.cos(-0.5 * u + slant) + np.cos(-0.5 * u - slant)
    lines = 1 - smoothstep(waves, -1.0, 1.2)  # the waves peak in the holes of the mesh
    patchy = smoothstep(coarse + 0.6 * middle, -1.6, 0.6)
    return lines * (patchy + (0.45 * atypia) * middle)


def _draw_vessels(traits: LesionTraits, frame: Frame, rng: np.random.Generator) -> Plane:
    """Branching (arborising) vessels as a layer of blood."""
    canvas = Image.new("L", (2 * frame.width, 2 * frame.height))
    pen = ImageDraw.Draw(canvas)
    trunks = round(7 * min(traits.vessels, 1.0))
    for _ in range(trunks):
        start = rng.uniform(0, 2 * np.pi)
        place = np.array([math.cos(start), math.sin(start)]) * traits.diameter_mm * rng.uniform(0.30, 0.52)
        heading = start + np.pi + rng.normal(0, 0.5)
        branches = [(place, heading, 0.14, int(rng.integers(9, 15)))]
        while branches:
            place, heading, thick, steps = branches.pop()
            path = [place]
            for _step in range(steps):
                heading += rng.normal(0, 0.34)
                path.append(path[-1] + 0.055 * traits.diameter_mm * np.array([math.cos(heading), math.sin(heading)]))
                if thick > 0.06 and rng.random() < 0.22:
                    branches.append((path[-1], heading + rng.choice([-0.8, 0.8]), thick * 0.6, steps // 2 + 2))
            line = frame.to_pixels(np.array(path)) * 2
            pen.line(
                [tuple(point) for point in line], fill=255, width=max(1, round(2 * thick / frame.mm)), joint="curve"
            )
    soft = canvas.resize((frame.width, frame.height), Image.Resampling.BOX)
    return np.asarray(soft, dtype=np.float32) * np.float32(1.1 / 255)


def _scatter(rng: np.random.Generator, count: int, reach: float) -> npt.NDArray[np.float64]:
    """Points [count, 2] spread evenly over a disc of radius `reach`."""
    distance, angle = reach * np.sqrt(rng.random(count)), rng.uniform(0, 2 * np.pi, count)
    return np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)
