"""First step of the way, for whole-slide images: one slide -> tissue tiles of a physical size at an exact resolution.

    slide file -> stated microns per pixel (or an error) -> tissue on a small copy -> SlidePlan of places, judged
               -> level read by OpenSlide, resampled to exactly `mpp`, in sRGB -> Tile (uint8 [side, side, 3])

A slide that says nothing believable about its resolution is refused: nothing is guessed, and no magnification is
looked up. Regions that cannot be read come out as tiles without an image, for the caller to count and leave out; white
is never put in their place. How slides are opened is in wsi_reader.py, what is tissue in wsi_tissue.py, the picture
that shows a person what was kept in wsi_overlay.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import openslide
from pydantic import Field, model_validator

from panfm.config import config_class
from panfm.shards.wsi_reader import Colour, OpenedSlide, SlideError, SlideReason, find_slide_file, open_slide
from panfm.shards.wsi_tissue import TissueMap, compute_tissue, map_tissue

__all__ = [
    "SlideError", "SlidePlan", "SlideReason", "SlideSettings", "Tile", "TilePlace", "compute_tissue", "count_tiles",
    "is_bad_slide", "judge_plan", "plan_tiles", "plan_tiles_with_map", "read_slide_tiles",
    "read_tiles",
]  # fmt: skip

PLAUSIBLE_MPP = (0.1, 4.0)  # finer than any slide scanner, coarser than any scan that shows cells
LEVEL_TOLERANCE = 0.02  # a pyramid's downsamples are rounded (3.9999, 4.016): a level this close is the level meant
MASK_MPP = 8.0  # nuclei vanish, strips of epidermis (50-100 um) stay
NUM_PROBES = (8, 64)  # tiles that planning reads to find a damaged slide, at least and at most
PROBE_SHARE = 1 / 16  # of a slide's tiles; a slide with a tenth of its tiles gone passes 64 probes once in 850 times
UNSCANNED_TOLERANCE = 0.1  # more of a tile without pixels than the small copy shows as glass: its data are gone


@config_class
class SlideSettings:
    """How slides become tiles: the `slides` section of a source card."""

    tile_um: Annotated[float, Field(gt=0)] = 112.0
    """Side of a tile in microns; 112 um at 0.5 mpp is 224 px, what most encoders take."""
    mpp: Annotated[float, Field(ge=PLAUSIBLE_MPP[0], le=PLAUSIBLE_MPP[1])] = 0.5
    """Microns per pixel of the delivered tiles; 0.5 (20x) shows nuclei and is in nearly every scan."""
    min_tissue: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of a tile that must be tissue; below it a tile is mostly glass."""
    reject_pen: bool = True
    """Red, green and blue ink is not tissue; false for stains of those colours (trichrome, Alcian blue, Giemsa)."""
    fallback_mpp: Annotated[float, Field(ge=PLAUSIBLE_MPP[0], le=PLAUSIBLE_MPP[1])] | None = None
    """Microns per pixel at full resolution of slides that state none or an implausible one; null: refuse them."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """A slide with a larger share of unreadable regions is left out whole: what is left of it is no fair sample."""

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

    @property
    def mask_mpp(self) -> float:
        """Microns per pixel of the small copy that tissue is found on: at least 8 x 8 of its pixels a tile."""
        return min(MASK_MPP, self.tile_um / 8)


@dataclass(frozen=True)
class TilePlace:
    """Where a tile lies: its origin in level-0 pixels and the share of it that is tissue."""

    x0: int
    y0: int
    tissue_fraction: float


@dataclass(frozen=True)
class SlidePlan:
    """What to read from one slide: small and picklable, a pure function of the file and the settings."""

    path: Path  # what OpenSlide opens: of a DICOM folder, its first file
    slide_mpp: tuple[float, float]  # microns per pixel at level 0, along x and y
    level: int
    settings: SlideSettings
    places: tuple[TilePlace, ...]  # row-major
    num_unmasked: int  # tiles left out because the small copy could not be read there
    num_grid: int  # tiles that fit on the slide, tissue or not
    unreadable: tuple[TilePlace, ...]  # those of `places` that planning found to be damaged at full resolution
    tissue_fraction: float  # of the slide's area
    pen_fraction: float
    colour: Colour
    series: str | None  # equal for every file of one DICOM slide: a table may list them all; None for other formats

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values, to be stored; without the path and the settings, which the card knows."""
        values = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        damaged = {(place.x0, place.y0) for place in self.unreadable}
        return values | {
            "slide_mpp": list(self.slide_mpp),
            "x0": [place.x0 for place in self.places],
            "y0": [place.y0 for place in self.places],
            "tissue": [place.tissue_fraction for place in self.places],
            "unreadable": [number for number, place in enumerate(self.places) if (place.x0, place.y0) in damaged],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path, settings: SlideSettings) -> Self:
        """The plan that `to_json` stored, for the slide at `path` (file or folder); the slide is not planned again."""
        places = tuple(map(TilePlace, values["x0"], values["y0"], values["tissue"]))
        return cls(
            path=find_slide_file(path),
            slide_mpp=(values["slide_mpp"][0], values["slide_mpp"][1]),
            settings=settings,
            places=places,
            unreadable=tuple(places[number] for number in values["unreadable"]),
            **{name: values[name] for name in _PLAIN_FIELDS},
        )


_PLAIN_FIELDS = ("level", "num_unmasked", "num_grid", "tissue_fraction", "pen_fraction", "colour", "series")


@dataclass(frozen=True)
class Tile:
    """One tile at exactly `mpp`; `image` is uint8 [side, side, 3], or None where the slide cannot be read."""

    image: npt.NDArray[np.uint8] | None
    x0: int
    y0: int
    level: int
    mpp: float
    tissue_fraction: float
    colour: Colour


# ------------------------------------------------------------------------------------------------ planning


def plan_tiles(path: Path, settings: SlideSettings) -> SlidePlan:
    """Choose the level and the tissue tiles of a slide: a file, or a folder with the files of one DICOM slide.

    Raises SlideError (a UserError) for a file that OpenSlide cannot open, a missing or implausible resolution, or a
    scan coarser than `settings.mpp`. A plan may be empty or full of damage: `judge_plan` says so.
    """
    return plan_tiles_with_map(path, settings)[0]


def plan_tiles_with_map(path: Path, settings: SlideSettings) -> tuple[SlidePlan, TissueMap]:
    """As `plan_tiles`, with the map that the plan was made from, which `draw_overlay` needs again."""
    slide = open_slide(find_slide_file(path))
    mpp = read_mpp(slide, settings)
    level = _choose_level(slide, max(mpp), settings.mpp)
    tissue_map = map_tissue(slide, mpp, settings.mask_mpp, reject_pen=settings.reject_pen)
    mask = np.where(tissue_map.readable, tissue_map.tissue, np.nan).astype(np.float32)
    width, height = slide.level_sizes[0]
    step_x, step_y = settings.tile_um / mpp[0], settings.tile_um / mpp[1]  # level-0 pixels a tile, not whole
    # 1e-6: a slide that is exactly n tiles wide must not lose the last one to rounding.
    rows, columns = int(height / step_y + 1e-6), int(width / step_x + 1e-6)
    places, num_unmasked = [], 0
    for row in range(rows):
        for column in range(columns):
            x0, y0 = round(column * step_x), round(row * step_y)
            left, top = x0 * mpp[0] / tissue_map.mpp, y0 * mpp[1] / tissue_map.mpp
            side = settings.tile_um / tissue_map.mpp
            window = mask[int(top) : math.ceil(top + side), int(left) : math.ceil(left + side)]
            fraction = float(window.mean())
            if math.isnan(fraction):
                num_unmasked += 1
            elif fraction >= settings.min_tissue:
                places.append(TilePlace(x0, y0, round(fraction, 4)))
    plan = SlidePlan(
        path=slide.path,
        slide_mpp=mpp,
        level=level,
        settings=settings,
        places=tuple(places),
        num_unmasked=num_unmasked,
        num_grid=rows * columns,
        unreadable=(),
        tissue_fraction=round(float(tissue_map.tissue.mean()), 4),
        pen_fraction=round(float(tissue_map.pen.mean()), 4),
        colour=slide.colour,
        series=slide.series,
    )
    return replace(plan, unreadable=_probe(plan)), tissue_map


def judge_plan(plan: SlidePlan) -> SlideError | None:
    """Why a slide gives no tiles, as far as planning can tell; None for a slide that does.

    The slide's share of damage is exact where planning met any, for then it read every tile; damage that 8 to 64 of
    its tiles, spread over the slide, did not show is left to `is_bad_slide` after all are read.
    """
    settings, num_wanted = plan.settings, len(plan.places) + plan.num_unmasked
    num_unreadable = plan.num_unmasked + len(plan.unreadable)
    if not plan.num_grid:
        return SlideError(
            "too_small",
            f"{plan.path}: is smaller than one tile of {settings.tile_um:g} um; lower slides.tile_um, or leave it out",
        )
    if is_bad_slide(num_unreadable, num_wanted, settings):
        return SlideError(
            "bad_slide",
            f"{plan.path}: {num_unreadable} of {num_wanted} regions cannot be read, more than slides.max_bad_fraction "
            f"({settings.max_bad_fraction:g}); copy the slide again, or raise it to keep what is left",
        )
    if not plan.places:
        return SlideError(
            "no_tissue",
            f"{plan.path}: none of its {plan.num_grid} tiles has slides.min_tissue ({settings.min_tissue:g}): "
            f"{plan.tissue_fraction:.1%} of the slide is tissue, {plan.pen_fraction:.1%} has the colours of pens "
            "(slides.reject_pen); look at its overlay",
        )
    return None


def is_bad_slide(num_unreadable: int, num_wanted: int, settings: SlideSettings) -> bool:
    """Whether so many of the regions wanted from a slide are unreadable that all of it must be left out."""
    return num_unreadable > settings.max_bad_fraction * num_wanted


def count_tiles(path: Path, settings: SlideSettings) -> int:
    """Count the tissue tiles of a slide without reading them all at full resolution."""
    return len(plan_tiles(path, settings).places)


def _probe(plan: SlidePlan) -> tuple[TilePlace, ...]:
    """The unreadable places of a plan: none if some tiles, spread over the slide, can all be read; else looked for."""
    least, most = NUM_PROBES
    num = min(len(plan.places), max(least, min(most, round(PROBE_SHARE * len(plan.places)))))
    chosen = [plan.places[number] for number in np.linspace(0, len(plan.places) - 1, num).round().astype(int)]
    if all(tile.image is not None for tile in read_tiles(plan, chosen)):
        return ()
    return tuple(place for place, tile in zip(plan.places, read_tiles(plan), strict=True) if tile.image is None)


# ------------------------------------------------------------------------------------------------ reading


def read_tiles(plan: SlidePlan, places: Sequence[TilePlace] | None = None) -> Iterator[Tile]:
    """Read the tiles of a plan (or some of its `places`), in the order given; row-major is the fast one.

    A region that cannot be read gives a Tile whose image is None.
    """
    settings, side = plan.settings, plan.settings.tile_side
    size = (settings.tile_um / plan.slide_mpp[0], settings.tile_um / plan.slide_mpp[1])
    damaged = {(place.x0, place.y0) for place in plan.unreadable}
    slide = open_slide(plan.path)
    for place in plan.places if places is None else places:
        image = None
        if (place.x0, place.y0) not in damaged:
            picture = slide.read_box(plan.level, (place.x0, place.y0), size, (side, side))
            # Stored tiles without data come out transparent: right for glass, never for what is tissue on the copy.
            if picture and picture.scanned_share >= place.tissue_fraction - UNSCANNED_TOLERANCE:
                image = np.asarray(picture.image)
        yield Tile(image, place.x0, place.y0, plan.level, settings.mpp, place.tissue_fraction, plan.colour)


def read_slide_tiles(path: Path, settings: SlideSettings) -> Iterator[Tile]:
    """Plan and read in one go: every tissue tile of a slide, row-major (see `plan_tiles` and `read_tiles`).

    Raises SlideError for a slide that gives none (see `judge_plan`).
    """
    plan = plan_tiles(path, settings)
    if (error := judge_plan(plan)) is not None:
        raise error
    yield from read_tiles(plan)


def read_mpp(slide: OpenedSlide, settings: SlideSettings) -> tuple[float, float]:
    """Microns per pixel of a slide at full resolution, along x and y.

    Raises SlideError where it states none or an implausible one and the settings name no fallback.
    """
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


def _choose_level(slide: OpenedSlide, slide_mpp: float, mpp: float) -> int:
    """The coarsest level that is no coarser than `mpp`, within the tolerance."""
    fine = [n for n, down in enumerate(slide.downsamples) if slide_mpp * down <= mpp * (1 + LEVEL_TOLERANCE)]
    if not fine:
        raise SlideError(
            "too_coarse",
            f"{slide.path}: was scanned at {slide_mpp:g} microns per pixel, coarser than the {mpp:g} asked for; "
            f"enlarging adds no detail, so set slides.mpp to {slide_mpp:g} or more, or leave the slide out",
        )
    return fine[-1]
