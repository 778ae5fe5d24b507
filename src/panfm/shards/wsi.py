"""First step of the way, for whole-slide images: one slide -> tissue tiles of a physical size at an exact resolution.

    slide file -> stated microns per pixel (or an error) -> tissue mask on a small copy -> SlidePlan of places
               -> level read by OpenSlide, resampled to exactly `mpp` -> Tile (uint8 [side, side, 3])

A slide that says nothing believable about its resolution is refused: nothing is guessed. Regions that cannot be read
come out as tiles without an image, for the caller to count and leave out; white is never put in their place. Label
and macro images are never opened: they hold patients' names. Colour is as stored: ICC profiles are not applied.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image
from pydantic import Field, model_validator
from scipy import ndimage

from panfm.config import config_class
from panfm.errors import UserError

SlideReason = Literal["unreadable_slide", "no_mpp", "implausible_mpp", "too_coarse"]
PLAUSIBLE_MPP = (0.1, 4.0)  # finer than any slide scanner, coarser than any scan that shows cells
LEVEL_TOLERANCE = 0.02  # a pyramid's downsamples are rounded (3.9999, 4.016): a level this close is the level meant
MASK_MPP = 8.0  # nuclei vanish, strips of epidermis (50-100 um) stay
MASK_BLOCK = 128  # mask pixels a read: bounds the memory where a slide has no coarse level
MIN_BRIGHTNESS = 0.2  # darker is the scanner's black fill or a pen, whose saturation is noise
SATURATION_BOUNDS = (0.04, 0.12)  # Otsu's threshold is held in here: it splits tissue in two where no glass is seen
MIN_TISSUE_UM2 = 100.0 * 100.0  # smaller islands are dust
MAX_HOLE_UM2 = 150.0 * 150.0  # smaller holes are vessels and fat, which belong to the tissue


@config_class
class SlideSettings:
    """How slides become tiles: the `slides` section of a source card."""

    tile_um: Annotated[float, Field(gt=0)] = 112.0
    """Side of a tile in microns; 112 um at 0.5 mpp is 224 px, what most encoders take."""
    mpp: Annotated[float, Field(ge=PLAUSIBLE_MPP[0], le=PLAUSIBLE_MPP[1])] = 0.5
    """Microns per pixel of the delivered tiles; 0.5 (20x) shows nuclei and is in nearly every scan."""
    min_tissue: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of a tile that must be tissue; below it a tile is mostly glass."""
    fallback_mpp: Annotated[float, Field(ge=PLAUSIBLE_MPP[0], le=PLAUSIBLE_MPP[1])] | None = None
    """Microns per pixel at full resolution of slides that state none or an implausible one; null: refuse them."""

    @model_validator(mode="after")
    def _check_whole_pixels(self) -> Self:
        side = self.tile_um / self.mpp
        if round(side) < 16 or abs(side - round(side)) > 1e-6 * side:
            nearest = max(16, round(side)) * self.mpp
            raise ValueError(
                f"tile_um ({self.tile_um:g}) must be a whole number of pixels, 16 or more, at mpp {self.mpp:g}; "
                f"try {nearest:g}"
            )
        return self

    @property
    def tile_side(self) -> int:
        """Side of a delivered tile in pixels."""
        return round(self.tile_um / self.mpp)


class SlideError(UserError):
    """A slide that cannot become tiles: one line for the user, and `reason` for the count of rejected files."""

    def __init__(self, reason: SlideReason, message: str) -> None:
        super().__init__(message)
        self.reason: SlideReason = reason


@dataclass(frozen=True)
class TilePlace:
    """Where a tile lies: its origin in level-0 pixels and the share of it that is tissue."""

    x0: int
    y0: int
    tissue_fraction: float


@dataclass(frozen=True)
class SlidePlan:
    """What to read from one slide: small and picklable, a pure function of the file and the settings."""

    path: Path
    slide_mpp: tuple[float, float]  # microns per pixel at level 0, along x and y
    level: int
    settings: SlideSettings
    places: tuple[TilePlace, ...]  # row-major
    num_unmasked: int  # tiles left out because the small copy could not be read there


@dataclass(frozen=True)
class Tile:
    """One tile at exactly `mpp`; `image` is uint8 [side, side, 3], or None where the slide cannot be read."""

    image: npt.NDArray[np.uint8] | None
    x0: int
    y0: int
    level: int
    mpp: float
    tissue_fraction: float


def plan_tiles(path: Path, settings: SlideSettings) -> SlidePlan:
    """Choose the level and the tissue tiles of a slide.

    Raises SlideError (a UserError) for a file that OpenSlide cannot open, a missing or implausible resolution, or a
    scan coarser than `settings.mpp`.
    """
    with _OpenSlide(path) as slide:
        mpp = _read_mpp(slide, settings)
        level = _choose_level(slide, max(mpp), settings.mpp)
        mask, mask_mpp = _compute_tissue_mask(slide, mpp, settings)
        width, height = slide.level_sizes[0]
    step_x, step_y = settings.tile_um / mpp[0], settings.tile_um / mpp[1]  # level-0 pixels a tile, not whole
    places, num_unmasked = [], 0
    # 1e-6: a slide that is exactly n tiles wide must not lose the last one to rounding.
    for row in range(int(height / step_y + 1e-6)):
        for column in range(int(width / step_x + 1e-6)):
            x0, y0 = round(column * step_x), round(row * step_y)
            left, top = x0 * mpp[0] / mask_mpp, y0 * mpp[1] / mask_mpp
            side = settings.tile_um / mask_mpp
            window = mask[int(top) : math.ceil(top + side), int(left) : math.ceil(left + side)]
            fraction = float(window.mean())
            if math.isnan(fraction):
                num_unmasked += 1
            elif fraction >= settings.min_tissue:
                places.append(TilePlace(x0, y0, round(fraction, 4)))
    return SlidePlan(path, mpp, level, settings, tuple(places), num_unmasked)


def read_tiles(plan: SlidePlan, places: Sequence[TilePlace] | None = None) -> Iterator[Tile]:
    """Read the tiles of a plan (or some of its `places`), in the order given; row-major is the fast one.

    A region that cannot be read gives a Tile whose image is None.
    """
    settings, side = plan.settings, plan.settings.tile_side
    size = (settings.tile_um / plan.slide_mpp[0], settings.tile_um / plan.slide_mpp[1])
    with _OpenSlide(plan.path) as slide:
        for place in plan.places if places is None else places:
            picture = slide.read_box(plan.level, (place.x0, place.y0), size, (side, side))
            image = None if picture is None else np.asarray(picture)
            yield Tile(image, place.x0, place.y0, plan.level, settings.mpp, place.tissue_fraction)


def read_slide_tiles(path: Path, settings: SlideSettings) -> Iterator[Tile]:
    """Plan and read in one go: every tissue tile of a slide, row-major (see `plan_tiles` and `read_tiles`)."""
    yield from read_tiles(plan_tiles(path, settings))


def count_tiles(path: Path, settings: SlideSettings) -> int:
    """Count the tissue tiles of a slide without reading them at full resolution."""
    return len(plan_tiles(path, settings).places)


class _OpenSlide:
    """An open slide whose reads give None where it is damaged, and which goes on after that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = self._open()
        self.properties = dict(self.handle.properties)
        self.downsamples: tuple[float, ...] = self.handle.level_downsamples
        self.level_sizes: tuple[tuple[int, int], ...] = self.handle.level_dimensions

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()

    def _open(self) -> openslide.OpenSlide:
        if not self.path.exists():  # OpenSlide calls it an unsupported format
            raise SlideError("unreadable_slide", f"{self.path}: no such file; check the source card's table")
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:  # an unsupported format too
            raise SlideError(
                "unreadable_slide",
                f"{self.path}: OpenSlide cannot open it ({error}); check the copy or convert it to a pyramidal TIFF",
            ) from None

    def read_box(
        self, level: int, origin: tuple[int, int], size: tuple[float, float], out: tuple[int, int]
    ) -> Image.Image | None:
        """Read the box at `origin` of `size` level-0 pixels from `level`, resampled to `out` pixels, RGB on white."""
        limit = self.level_sizes[level]
        # Level sizes are rounded, so each axis has its own ratio; OpenSlide turns places into pixels by their mean.
        ratio = [self.level_sizes[0][axis] / limit[axis] for axis in (0, 1)]
        start = [origin[axis] / ratio[axis] for axis in (0, 1)]  # the box in pixels of the level
        end = [min((origin[axis] + size[axis]) / ratio[axis], limit[axis]) for axis in (0, 1)]
        # The resampling filter looks beyond the box, so a margin is read with it where the slide goes on.
        margin = [math.ceil(3 * max(1.0, (end[axis] - start[axis]) / out[axis])) for axis in (0, 1)]
        first = [max(0, math.floor(start[axis]) - margin[axis]) for axis in (0, 1)]
        last = [min(limit[axis], math.ceil(end[axis]) + margin[axis]) for axis in (0, 1)]
        mean = self.downsamples[level]
        location = (round(first[0] * mean), round(first[1] * mean))
        try:
            region = self.handle.read_region(location, level, (last[0] - first[0], last[1] - first[1]))
        except openslide.OpenSlideError:
            # After its first error a handle of OpenSlide answers nothing but that error.
            self.handle.close()
            self.handle = self._open()
            return None
        picture = Image.alpha_composite(Image.new("RGBA", region.size, "white"), region).convert("RGB")
        left, top = start[0] - location[0] / mean, start[1] - location[1] / mean
        right, bottom = (
            min(value, side)
            for value, side in zip((left + end[0] - start[0], top + end[1] - start[1]), picture.size, strict=True)
        )
        if (left, top, right, bottom) == (round(left), round(top), round(left) + out[0], round(top) + out[1]):
            return picture.crop((round(left), round(top), round(right), round(bottom)))  # stored pixels, untouched
        return picture.resize(out, Image.Resampling.BICUBIC, box=(max(left, 0.0), max(top, 0.0), right, bottom))


def _read_mpp(slide: _OpenSlide, settings: SlideSettings) -> tuple[float, float]:
    stated = [slide.properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    rule = "set slides.fallback_mpp in the source card if you know it from the scanner"
    try:
        mpp_x, mpp_y = (float(value) for value in stated if value is not None)
    except ValueError:  # fewer than two values, or text
        if settings.fallback_mpp is not None:
            return settings.fallback_mpp, settings.fallback_mpp
        raise SlideError(
            "no_mpp", f"{slide.path}: states no resolution (microns per pixel {stated[0]!r}, {stated[1]!r}); {rule}"
        ) from None
    low, high = PLAUSIBLE_MPP
    if not all(low <= value <= high for value in (mpp_x, mpp_y)):
        if settings.fallback_mpp is not None:
            return settings.fallback_mpp, settings.fallback_mpp
        raise SlideError(
            "implausible_mpp",
            f"{slide.path}: states {mpp_x:g} x {mpp_y:g} microns per pixel, outside {low}-{high}; {rule}",
        )
    return mpp_x, mpp_y


def _choose_level(slide: _OpenSlide, slide_mpp: float, mpp: float) -> int:
    """The coarsest level that is no coarser than `mpp`, within the tolerance."""
    fine = [n for n, down in enumerate(slide.downsamples) if slide_mpp * down <= mpp * (1 + LEVEL_TOLERANCE)]
    if not fine:
        raise SlideError(
            "too_coarse",
            f"{slide.path}: was scanned at {slide_mpp:g} microns per pixel, coarser than the {mpp:g} asked for; "
            f"enlarging adds no detail, so set slides.mpp to {slide_mpp:g} or more, or leave the slide out",
        )
    return fine[-1]


def _compute_tissue_mask(
    slide: _OpenSlide, mpp: tuple[float, float], settings: SlideSettings
) -> tuple[npt.NDArray[np.float32], float]:
    """Tissue mask float [rows, columns] (1 tissue, 0 glass, NaN unreadable) and its microns per pixel."""
    mask_mpp = min(MASK_MPP, settings.tile_um / 8)  # at least 8 x 8 mask pixels a tile
    width, height = slide.level_sizes[0]
    columns, rows = math.ceil(width * mpp[0] / mask_mpp), math.ceil(height * mpp[1] / mask_mpp)
    fine = [n for n, down in enumerate(slide.downsamples) if max(mpp) * down <= mask_mpp]
    small = np.full((rows, columns, 3), 255, dtype=np.uint8)
    readable = np.ones((rows, columns), dtype=bool)
    for top in range(0, rows, MASK_BLOCK):
        for left in range(0, columns, MASK_BLOCK):
            block = (min(MASK_BLOCK, columns - left), min(MASK_BLOCK, rows - top))
            origin = (int(left * mask_mpp / mpp[0]), int(top * mask_mpp / mpp[1]))  # down: the last stays inside
            size = (block[0] * mask_mpp / mpp[0], block[1] * mask_mpp / mpp[1])
            window = np.s_[top : top + block[1], left : left + block[0]]
            picture = slide.read_box(fine[-1] if fine else 0, origin, size, block)
            if picture is None:
                readable[window] = False
            else:
                small[window] = np.asarray(picture)
    return np.where(readable, compute_tissue(small, mask_mpp), np.nan).astype(np.float32), mask_mpp


def compute_tissue(image: npt.NDArray[np.uint8], mpp: float) -> npt.NDArray[np.bool_]:
    """Tissue bool [H, W] of a small RGB copy [H, W, 3]: saturation above Otsu's threshold, small specks and holes gone.

    N. Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 1979.
    """
    values = image.astype(np.float32) / 255.0
    brightest = values.max(axis=2)
    saturation = (brightest - values.min(axis=2)) / np.maximum(brightest, 1e-3)
    saturation = ndimage.median_filter(saturation, size=3)
    threshold = float(np.clip(_compute_otsu(saturation), *SATURATION_BOUNDS))
    tissue = ndimage.binary_dilation((saturation > threshold) & (brightest > MIN_BRIGHTNESS))
    tissue = ndimage.binary_erosion(tissue, border_value=1)  # binary_closing would eat tissue at the slide's edge
    tissue &= ~_find_small(tissue, MIN_TISSUE_UM2 / mpp**2)
    glass = np.pad(~tissue, 1, constant_values=True)  # what touches the edge of the slide is no hole in the tissue
    filled: npt.NDArray[np.bool_] = tissue | _find_small(glass, MAX_HOLE_UM2 / mpp**2)[1:-1, 1:-1]
    return filled


def _compute_otsu(values: npt.NDArray[np.float32]) -> float:
    """The threshold in 0..1 that parts `values` into two classes with the largest variance between them."""
    counts, edges = np.histogram(values, bins=256, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)
    total = np.cumsum(counts * centres)
    below, above = weight[:-1], weight[-1] - weight[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = total[:-1] / below - (total[-1] - total[:-1]) / above
        variance = np.where((below > 0) & (above > 0), below * above * gap**2, 0.0)
    return float(edges[1 + int(np.argmax(variance))])


def _find_small(mask: npt.NDArray[np.bool_], area: float) -> npt.NDArray[np.bool_]:
    """The connected regions of `mask` that have fewer than `area` pixels."""
    labels, _ = ndimage.label(mask)
    small = np.bincount(labels.ravel()) < area
    small[0] = False  # label 0 is what is not in the mask
    found: npt.NDArray[np.bool_] = small[labels]
    return found
