"""Whole-slide images, where the tissue is: an open slide -> a small copy at a few microns per pixel -> TissueMap.

    OpenedSlide -> read_small_copy (block by block, what cannot be read left out) -> compute_tissue -> TissueMap

Tissue is what is coloured (saturation above Otsu's threshold) and not ink. Ink is told from stain by which light it
takes away: every common stain takes green most, next to it red (haematoxylin) or blue (DAB, melanin), never both the
way that a red pen takes blue and green, or a green or blue pen takes red.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from panfm.shards.wsi_reader import OpenedSlide

BLOCK = 128  # pixels of the small copy a read: bounds the memory where a slide has no coarse level
MIN_BLOCK = 32  # a block that cannot be read is tried in quarters down to this
MIN_BRIGHTNESS = 0.2  # darker is the scanner's black fill or a pen, whose saturation is noise
SATURATION_BOUNDS = (0.04, 0.12)  # Otsu's threshold is held in here: it splits tissue in two where no glass is seen
MIN_TISSUE_UM2 = 100.0 * 100.0  # smaller islands are dust
MAX_HOLE_UM2 = 150.0 * 150.0  # smaller holes are vessels and fat, which belong to the tissue
MIN_PEN_UM2 = 100.0 * 100.0  # a pen's line is wider; a smaller group of red pixels is blood


@dataclass(frozen=True)
class TissueMap:
    """A small copy of a slide and what is what on it; arrays are [rows, columns], `mpp` microns a pixel."""

    image: npt.NDArray[np.uint8]  # [rows, columns, 3]
    readable: npt.NDArray[np.bool_]
    tissue: npt.NDArray[np.bool_]
    pen: npt.NDArray[np.bool_]
    mpp: float


def map_tissue(slide: OpenedSlide, slide_mpp: tuple[float, float], mpp: float, *, reject_pen: bool) -> TissueMap:
    """Find the tissue of a slide on a copy at `mpp` microns a pixel; `slide_mpp` is that of level 0, along x and y."""
    image, scanned, readable = read_small_copy(slide, slide_mpp, mpp)
    pen = find_pen(image, mpp) if reject_pen else np.zeros(readable.shape, dtype=bool)
    return TissueMap(image, readable, compute_tissue(image, mpp, pen) & scanned & readable, pen, mpp)


def read_small_copy(
    slide: OpenedSlide, slide_mpp: tuple[float, float], mpp: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The whole slide at `mpp`: RGB [rows, columns, 3], where it was scanned, and where it could be read."""
    width, height = slide.level_sizes[0]
    columns, rows = math.ceil(width * slide_mpp[0] / mpp), math.ceil(height * slide_mpp[1] / mpp)
    fine = [level for level, down in enumerate(slide.downsamples) if max(slide_mpp) * down <= mpp] or [0]
    image = np.full((rows, columns, 3), 255, dtype=np.uint8)
    scanned, readable = np.ones((rows, columns), dtype=bool), np.zeros((rows, columns), dtype=bool)

    def read(top: int, left: int, side: int) -> None:
        block = (min(side, columns - left), min(side, rows - top))
        origin = (int(left * mpp / slide_mpp[0]), int(top * mpp / slide_mpp[1]))  # down: the last stays inside
        size = (block[0] * mpp / slide_mpp[0], block[1] * mpp / slide_mpp[1])
        window = np.s_[top : top + block[1], left : left + block[0]]
        picture = slide.read_box(fine[-1], origin, size, block)
        if picture is not None:
            readable[window] = True
            image[window] = np.asarray(picture.image)
            if picture.scanned is not None:
                scanned[window] = np.asarray(picture.scanned) > 127
        elif side > MIN_BLOCK:
            for y in range(top, top + block[1], side // 2):
                for x in range(left, left + block[0], side // 2):
                    read(y, x, side // 2)

    for top in range(0, rows, BLOCK):
        for left in range(0, columns, BLOCK):
            read(top, left, BLOCK)
    return image, scanned, readable


def compute_tissue(
    image: npt.NDArray[np.uint8], mpp: float, pen: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.bool_]:
    """Tissue bool [H, W] of a small RGB copy [H, W, 3] at `mpp`: saturation above Otsu's threshold, specks, holes gone.

    Where `pen` is true there is none. N. Otsu, "A threshold selection method from gray-level histograms", IEEE Trans.
    SMC 1979.
    """
    ink = np.zeros(image.shape[:2], dtype=bool) if pen is None else pen
    values = image.astype(np.float32) / 255.0
    brightest = values.max(axis=2)
    saturation = (brightest - values.min(axis=2)) / np.maximum(brightest, 1e-3)
    saturation = ndimage.median_filter(saturation, size=3)
    threshold = float(np.clip(_compute_otsu(saturation), *SATURATION_BOUNDS))
    tissue = ndimage.binary_dilation((saturation > threshold) & (brightest > MIN_BRIGHTNESS) & ~ink)
    tissue = ndimage.binary_erosion(tissue, border_value=1)  # binary_closing would eat tissue at the slide's edge
    tissue &= ~_find_small(tissue, MIN_TISSUE_UM2 / mpp**2)
    glass = np.pad(~tissue, 1, constant_values=True)
    filled: npt.NDArray[np.bool_] = tissue | _find_small(glass, MAX_HOLE_UM2 / mpp**2, at_edge=False)[1:-1, 1:-1]
    return filled & ~ink


def find_pen(image: npt.NDArray[np.uint8], mpp: float) -> npt.NDArray[np.bool_]:
    """Ink of red, green and blue pens, bool [H, W], on a small RGB copy [H, W, 3] at `mpp`, with its faint edges.

    By ratios of optical density, which do not depend on how thick the ink lies. Black ink is left to the tissue's own
    rule: it has no saturation.
    """
    red, green, blue = np.moveaxis(-np.log10((image.astype(np.float32) + 1) / 241), 2, 0).clip(min=0)
    # Eosin and haematoxylin take half as much blue as green, DAB and melanin 1.3 times as much; haematoxylin alone
    # takes red up to 1.25 times as much as green.
    red_pen = (blue > 0.65 * green) & (blue < 1.1 * green) & (red < 0.7 * green)
    green_pen = red > 1.35 * green
    faint = (red_pen & (green > 0.05)) | (green_pen & (red > 0.05))
    sure = (red_pen & (blue > 0.75 * green) & (red < 0.2 * green) & (green > 0.45)) | (green_pen & (red > 0.1))
    labels, num = ndimage.label(faint)
    areas = np.bincount(labels[sure], minlength=num + 1)
    found: npt.NDArray[np.bool_] = (areas >= MIN_PEN_UM2 / mpp**2)[labels] & faint
    return found


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


def _find_small(mask: npt.NDArray[np.bool_], area: float, *, at_edge: bool = True) -> npt.NDArray[np.bool_]:
    """The connected regions of `mask` with fewer than `area` pixels; not the first pixel's if not `at_edge`."""
    labels, _ = ndimage.label(mask)
    small = np.bincount(labels.ravel()) < area
    small[0] = False  # label 0 is what is not in the mask
    if not at_edge:
        small[labels[0, 0]] = False
    found: npt.NDArray[np.bool_] = small[labels]
    return found
