"""The page of a preview: PreviewSamples in, one picture out. Pillow and its own font draw it; no plotting library.

head     what the run asks for, and the legend
section  a modality, and in one line what its views go through
row      the stored image with the crops on it | each large view | the same under its mask | the local views
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from panfm.data.masking import MaskConfig, num_hidden
from panfm.data.transforms import AugmentConfig, CameraJitter, StainJitter, ViewPlan, get_crop_scale
from panfm.shards.schema import MODALITIES, Modality

SIDE = 256  # pixels of the page for a large view, at most: smaller ones are enlarged by a whole number
STORED_WIDTH, CELL_WIDTH = 320, 224  # at least, so that the columns of all rows are in line and captions fit
MARGIN, GAP, NARROW = 40, 22, 8
INK, PALE, RULE = "#1b1f24", "#5c6670", "#d5dae0"
VIEW_COLOURS = ("#2f6df6", "#f59e0b", "#12b886", "#b14df0")
LOCAL_COLOUR = "#00b8d4"
HIDDEN, SEAM = (160, 166, 174), (188, 193, 199)
Colour = str | tuple[int, int, int]
HIDDEN_OPACITY = 0.88  # a little of what is hidden shines through
FINE = 2  # boxes are drawn on a picture this much larger, so that their edges fall between pixels


@dataclass(frozen=True)
class PreviewSample:
    """One example of the stream: the stored image, and what the loader made of it."""

    source: str
    position: int
    size: tuple[int, int]  # of the stored image: width, height
    stored: Image.Image  # reduced to what the page can show
    plans: tuple[ViewPlan, ...]  # of the large views, then the local ones
    views: tuple[NDArray[np.uint8], ...]  # [3, S, S] each, in the same order
    masks: NDArray[np.bool_] | None  # [views that have one, rows, columns]


def draw_page(
    samples: Mapping[Modality, Sequence[PreviewSample]],
    augment: AugmentConfig,
    mask: MaskConfig | None,
    mask_grid: tuple[int, int],
    title: str,
) -> Image.Image:
    """Lay out the page; modalities without samples are left out."""
    blocks = [_draw_head(augment, mask, mask_grid, title)]
    rules = []  # blocks that a line above parts from the section before
    for modality in MODALITIES:
        if samples[modality]:
            rules.append(len(blocks))
            name, line = modality.replace("_", "-").capitalize(), describe_views(modality, augment)
            blocks.append(_stack([_write(name, 22), _write(line, 15, PALE)], NARROW))
            blocks += [_draw_row(sample, augment, mask) for sample in samples[modality]]
    width = max(block.width for block in blocks)
    for number in reversed(rules):
        blocks.insert(number, Image.new("RGB", (width, 2), RULE))
    return _frame(_stack(blocks, GAP), MARGIN, "white")


def describe_views(modality: Modality, augment: AugmentConfig) -> str:
    """One line for a reader: what the views of a modality go through."""
    low, high = get_crop_scale(modality, augment)
    parts = [f"crops of {_percent(low)} to {_percent(high)} of the area"]
    if augment.local_views:
        low, high = get_crop_scale(modality, augment, local=True)
        parts[0] += f" (local: {_percent(low)} to {_percent(high)})"
    parts.append(f"at most {augment.aspect_ratio:.3g} times as long as wide")
    parts += ["mirrored"] * augment.flips + ["turned by right angles"] * augment.rotations
    line = "; ".join([*parts, describe_jitter(modality, augment), "never hue or greyscale"])
    return line[0].upper() + line[1:]


def describe_jitter(modality: Modality, augment: AugmentConfig) -> str:
    """The strengths that apply to a modality."""
    if modality == "histopathology":
        strengths = {"stains": _percent(augment.stain), "density": f"{augment.stain_shift:g}"}
        on = {"stains": augment.stain, "density": augment.stain_shift}
    else:
        on = {name: getattr(augment, name) for name in ("brightness", "contrast", "saturation", "white_balance")}
        strengths = {name: _percent(value) for name, value in on.items()}
    parts = [f"{name.replace('_', ' ')} \u00b1 {strengths[name]}" for name, value in on.items() if value]
    return ", ".join(parts) or "colour unchanged"


def describe_mask(mask: MaskConfig | None, grid: tuple[int, int]) -> str:
    """Kind, ratio, and how many patches that is."""
    if mask is None:
        return "no mask"
    kind = mask.kind.replace("_", " ")
    return f"{kind} {mask.ratio:g}, {num_hidden(mask, grid)} of {grid[0]} x {grid[1]} patches"


def describe_plan(plan: ViewPlan, size: tuple[int, int]) -> list[str]:
    """What chance decided about one view of an image of `size`, in three short lines."""
    left, top, right, bottom = plan.box
    share = (right - left) * (bottom - top) / (size[0] * size[1])
    moves = ["mirrored"] * plan.mirrored + [f"turned {90 * plan.quarter_turns}\u00b0"] * (plan.quarter_turns > 0)
    lines = [", ".join([f"{_percent(share)} of the area", *moves])]
    jitter = plan.jitter
    if isinstance(jitter, CameraJitter):
        lines.append(f"brightness {_change(jitter.exposure)} %, contrast {_change(jitter.contrast)} %")
        balance = " ".join(map(_change, jitter.balance))
        lines.append(f"saturation {_change(jitter.saturation)} %, balance {balance} %")
    elif isinstance(jitter, StainJitter):
        lines.append(f"H, E, D {' '.join(map(_change, jitter.factors))} %")
        lines.append("density {:+.3f} {:+.3f} {:+.3f}".format(*jitter.shifts))
    return lines


def _draw_head(augment: AugmentConfig, mask: MaskConfig | None, grid: tuple[int, int], title: str) -> Image.Image:
    facts = [f"{augment.views} {'view' if augment.views == 1 else 'views'} of {augment.image_size} px"]
    if augment.local_views:
        facts.append(f"{augment.local_views} local of {augment.local_size} px")
    facts.append(describe_mask(mask, grid))
    colours: list[tuple[Colour, str]] = [(_colour(view), f"crop of view {view + 1}") for view in range(augment.views)]
    colours += [(LOCAL_COLOUR, "crops of the local views")] * bool(augment.local_views)
    colours += [(HIDDEN, "hidden patch")] * (mask is not None)
    legend = [_beside([Image.new("RGB", (15, 15), colour), _write(text, 14)], NARROW) for colour, text in colours]
    lines = [_write(title, 28), _write("; ".join(facts), 16, PALE), _beside(legend, GAP)]
    return _stack(lines, NARROW + 4)


def _draw_row(sample: PreviewSample, augment: AugmentConfig, mask: MaskConfig | None) -> Image.Image:
    large = augment.image_size
    zoom = SIDE // large if large <= SIDE else SIDE / large
    side = round(large * zoom)
    lines = [f"{sample.source}, {sample.size[0]} x {sample.size[1]} px", f"position {sample.position}"]
    cells = [_draw_cell(_draw_boxes(sample, augment.views, side + 6), "stored image", lines, STORED_WIDTH)]
    for view in range(augment.views):
        picture, frame, name = _enlarge(sample.views[view], zoom), _colour(view), f"view {view + 1}"
        lines = describe_plan(sample.plans[view], sample.size)
        cells.append(_draw_cell(_frame(picture, 3, frame), name, lines, CELL_WIDTH))
        if mask is not None and sample.masks is not None and view < len(sample.masks):
            hidden = sample.masks[view]
            name += f", {mask.kind.replace('_', ' ')} mask {mask.ratio:g}"
            lines = [f"{np.count_nonzero(hidden)} of {hidden.size} patches hidden"]
            cells.append(_draw_cell(_frame(_lay_mask(picture, hidden), 3, frame), name, lines, CELL_WIDTH))
    if local := [_frame(_enlarge(view, zoom), 2, LOCAL_COLOUR) for view in sample.views[augment.views :]]:
        rows = max(1, (side + 6 + NARROW) // (local[0].height + NARROW))
        columns = [_stack(local[first : first + rows], NARROW) for first in range(0, len(local), rows)]
        cells.append(_draw_cell(_beside(columns, NARROW), "local views", ["never masked"], 0))
    return _beside(cells, GAP)


def _draw_cell(picture: Image.Image, title: str, lines: Sequence[str], width: int) -> Image.Image:
    spacer = Image.new("RGB", (width, 1), "white")
    return _stack([_write(title, 14), picture, *(_write(line, 13, PALE) for line in lines), spacer], 5)


def _draw_boxes(sample: PreviewSample, num_large: int, most_rows: int) -> Image.Image:
    """The stored image with the crop of every view on it, local ones below."""
    scale = min(STORED_WIDTH / sample.size[0], most_rows / sample.size[1])
    shown = (max(1, round(sample.size[0] * scale)), max(1, round(sample.size[1] * scale)))
    canvas = sample.stored.resize((shown[0] * FINE, shown[1] * FINE), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas)
    for number, plan in reversed(list(enumerate(sample.plans))):
        left, top, right, bottom = (round(edge * scale * FINE) for edge in plan.box)
        colour, width = (_colour(number), 3) if number < num_large else (LOCAL_COLOUR, 2)
        outer = (left, top, right - 1, bottom - 1)
        pen.rectangle(outer, outline="black", width=(width + 1) * FINE)  # a dark rim: seen on pale skin and on dark
        pen.rectangle(outer, outline=colour, width=width * FINE)
    return canvas.resize(shown, Image.Resampling.BOX)


def _lay_mask(picture: Image.Image, hidden: NDArray[np.bool_]) -> Image.Image:
    """Grey out the hidden patches of a picture; seams show where one ends."""
    pixels = np.asarray(picture).astype(np.float32)
    height, width = pixels.shape[:2]
    rows, columns = (np.arange(n) * m // n for n, m in zip(hidden.shape, (height, width), strict=True))
    seam = np.zeros((height, width), dtype=np.bool_)
    seam[rows] = seam[:, columns] = True
    where = np.asarray(Image.fromarray(hidden).resize((width, height), Image.Resampling.NEAREST))
    pixels[where] += HIDDEN_OPACITY * (np.array(HIDDEN, dtype=np.float32) - pixels[where])
    pixels[where & seam] = SEAM
    return Image.fromarray(pixels.astype(np.uint8))


def _enlarge(view: NDArray[np.uint8], zoom: float) -> Image.Image:
    """uint8 [3, S, S] as a picture: each pixel as a square, or reduced."""
    side = round(view.shape[-1] * zoom)
    method = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0))).resize((side, side), method)


def _write(text: str, size: int, colour: Colour = INK) -> Image.Image:
    font = ImageFont.load_default(size=size)
    block = Image.new("RGB", (math.ceil(font.getlength(text)) + 1, round(1.3 * size)), "white")
    ImageDraw.Draw(block).text((0, 0), text, fill=colour, font=font)
    return block


def _stack(blocks: Sequence[Image.Image], gap: int) -> Image.Image:
    """One below the other, on white, left edges in line."""
    height = sum(block.height for block in blocks) + gap * (len(blocks) - 1)
    page = Image.new("RGB", (max(block.width for block in blocks), height), "white")
    top = 0
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height + gap
    return page


def _beside(blocks: Sequence[Image.Image], gap: int) -> Image.Image:
    """One right of the other, on white, top edges in line."""
    width = sum(block.width for block in blocks) + gap * (len(blocks) - 1)
    page = Image.new("RGB", (width, max(block.height for block in blocks)), "white")
    left = 0
    for block in blocks:
        page.paste(block, (left, 0))
        left += block.width + gap
    return page


def _frame(picture: Image.Image, width: int, colour: Colour) -> Image.Image:
    page = Image.new("RGB", (picture.width + 2 * width, picture.height + 2 * width), colour)
    page.paste(picture, (width, width))
    return page


def _colour(view: int) -> str:
    return VIEW_COLOURS[view % len(VIEW_COLOURS)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _change(factor: float) -> str:
    """1.08 as +8, in percent."""
    return f"{round(100 * (factor - 1)):+d}"
