"""Whole-slide images, for a person to look at: SlidePlan -> a small PNG that shows what was kept and what was not.

    plan + TissueMap -> the slide in small, tissue contour, tiles kept, regions lost, one line of facts -> PNG bytes

The picture is read from the pyramid, never from the label, macro or thumbnail images, and neither it nor its caption
names the file. Text written on the glass of the scanned area itself stays visible: review overlays before they leave
the house.
"""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from panfm.shards.wsi import SlidePlan, TilePlace, judge_plan
from panfm.shards.wsi_reader import open_slide
from panfm.shards.wsi_tissue import TissueMap, map_tissue, read_small_copy

LONG_SIDE = 1024  # pixels of the picture
COLOURS = 64  # of the slide in the picture's palette, a fifth of the bytes; the marks have their own after them
CONTOUR, KEPT, LOST, PEN = (0, 120, 60), (20, 60, 200), (215, 0, 0), (255, 150, 0)
MARKS = (CONTOUR, KEPT, LOST, PEN, (0, 0, 0), (255, 255, 255))
HATCH = 6  # pixels from stripe to stripe


def draw_overlay(
    plan: SlidePlan, tissue_map: TissueMap | None = None, *, unreadable: Sequence[TilePlace] = ()
) -> bytes:
    """Draw what a plan takes from its slide, as the bytes of a PNG that depend on nothing else.

    Tissue has a green contour, ink an orange one, kept tiles are outlined in blue, what cannot be read is hatched in
    red: on the small copy, by `plan.unreadable`, and by `unreadable`, what reading the tiles found later. Give the map
    of `plan_tiles_with_map` to spare finding the tissue again.
    """
    slide, slide_mpp, settings = open_slide(plan.path), plan.slide_mpp, plan.settings
    if tissue_map is None:
        tissue_map = map_tissue(slide, slide_mpp, settings.mask_mpp, reject_pen=settings.reject_pen)
    width_um, height_um = (slide.level_sizes[0][axis] * slide_mpp[axis] for axis in (0, 1))
    mpp = max(width_um, height_um) / LONG_SIDE
    size = (max(1, round(width_um / mpp)), max(1, round(height_um / mpp)))
    # The copy that the tissue was found on is fine enough for most slides; of a small one a sharper is read.
    pixels = tissue_map.image if tissue_map.mpp < 2 * mpp else read_small_copy(slide, slide_mpp, mpp)[0]
    photo = Image.fromarray(pixels).resize(size, Image.Resampling.BOX).quantize(COLOURS, dither=Image.Dither.NONE)
    image = np.array(photo)  # numbers of the palette

    def enlarge(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        return np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))

    side = settings.tile_um / mpp
    lost = enlarge(~tissue_map.readable)
    lost_tiles = {(place.x0, place.y0) for place in (*plan.unreadable, *unreadable)}
    boxes = []
    for place in plan.places:
        left, top = place.x0 * slide_mpp[0] / mpp, place.y0 * slide_mpp[1] / mpp
        right, bottom = min(round(left + side), size[0]) - 1, min(round(top + side), size[1]) - 1
        box = (round(left), round(top), right, bottom)
        if (place.x0, place.y0) in lost_tiles:
            lost[box[1] : box[3] + 1, box[0] : box[2] + 1] = True
        else:
            boxes.append(box)
    y, x = np.indices(lost.shape)
    image[lost & ((x + y) % HATCH < 2)] = _get_number(LOST)
    for mask, colour in ((tissue_map.tissue, CONTOUR), (tissue_map.pen, PEN)):
        whole = enlarge(mask)
        image[whole & ~ndimage.binary_erosion(whole, iterations=2, border_value=1)] = _get_number(colour)
    for left, top, right, bottom in boxes:
        image[[top, bottom], left : right + 1] = image[top : bottom + 1, [left, right]] = _get_number(KEPT)
    image = _add_caption(image, _describe(plan, num_kept=len(boxes), num_lost=len(lost_tiles)))
    page = Image.fromarray(image)
    palette = (photo.getpalette() or [])[: 3 * COLOURS]
    palette += [0] * (3 * COLOURS - len(palette))  # of a slide with fewer colours
    page.putpalette(palette + [value for colour in MARKS for value in colour])
    buffer = io.BytesIO()
    page.save(buffer, "png")
    return buffer.getvalue()


def _get_number(colour: tuple[int, int, int]) -> int:
    return COLOURS + MARKS.index(colour)


def _describe(plan: SlidePlan, *, num_kept: int, num_lost: int) -> str:
    settings, error = plan.settings, judge_plan(plan)
    mpp = " x ".join(f"{value:.4g}" for value in dict.fromkeys(plan.slide_mpp))
    facts = [
        f"{mpp} um/px, level {plan.level} -> {settings.mpp:g} um/px",
        f"{num_kept} of {plan.num_grid} tiles of {settings.tile_um:g} um kept",
        f"{num_lost + plan.num_unmasked} unreadable",
        f"tissue {plan.tissue_fraction:.1%}",
        f"pen {plan.pen_fraction:.1%}",
        f"colour {plan.colour}",
    ]
    return "; ".join(facts if error is None else [*facts, f"LEFT OUT: {error.reason}"])


def _add_caption(image: npt.NDArray[np.uint8], text: str) -> npt.NDArray[np.uint8]:
    """The picture with a white band of `text` below it, wide enough for all of it; in numbers of the palette."""
    font = ImageFont.load_default(size=14)
    height, width = image.shape
    band = Image.new("1", (max(width, int(font.getlength(text)) + 16), 26))
    ImageDraw.Draw(band).text((8, 4), text, fill=1, font=font)
    page = np.full((height + band.height, band.width), _get_number((255, 255, 255)), dtype=np.uint8)
    page[:height, :width] = image
    page[height:][np.asarray(band)] = _get_number((0, 0, 0))
    return page
