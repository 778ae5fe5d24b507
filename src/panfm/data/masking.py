"""Masks: which patches of a view are hidden from the encoder, drawn by the loader beside the pixels.

    (kind, ratio), grid (h, w), rng   ->   bool [h * w], True = hidden, the same number hidden in every mask

A fixed number lets a batch of visible tokens be one rectangular tensor. numpy only: masks are drawn in loader workers.
"""

import functools
import math
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class

SMALLEST_BLOCK_SHARE = 16 / 196  # BEiT's smallest block: 16 patches of a 14 x 14 grid; other grids keep the share
LOG_ASPECT = math.log(1 / 0.3)  # BEiT: height / width between 0.3 and 1 / 0.3, uniform in its logarithm
BLOCK_ATTEMPTS = 10  # placements tried for one block before the remainder is grown


@config_class
class MaskConfig:
    """How many patches are hidden and in what shape."""

    kind: Literal["random", "block", "inverse_block"] = "random"
    """random: patch by patch (MAE). block: hides rectangles (BEiT, CAE). inverse_block: rectangles stay visible."""
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.75
    """Share of the patches that is hidden; at least one patch always stays visible."""


def num_hidden(config: MaskConfig, grid: tuple[int, int]) -> int:
    """Return how many of the h * w patches every mask hides: the ratio rounded, one patch at least left visible."""
    num_patches = grid[0] * grid[1]
    assert num_patches >= 1, f"a grid of {grid[0]} x {grid[1]} has no patches"
    return min(int(config.ratio * num_patches + 0.5), num_patches - 1)


def sample_mask(config: MaskConfig, grid: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw one mask: bool [h * w] in row-major order with exactly `num_hidden(config, grid)` True."""
    count, num_patches = num_hidden(config, grid), grid[0] * grid[1]
    if config.kind == "random":
        mask = np.zeros(num_patches, dtype=np.bool_)
        mask[rng.permutation(num_patches)[:count]] = True
        return mask
    if config.kind == "block":
        return _unpack(_sample_blocks(grid, count, rng), num_patches)
    return ~_unpack(_sample_blocks(grid, num_patches - count, rng), num_patches)


def _sample_blocks(grid: tuple[int, int], count: int, rng: np.random.Generator) -> int:
    """Cover exactly `count` cells with rectangles, as BEiT (arXiv 2106.08254, algorithm 1) and CAE do.

    A block's area lies between the smallest block and what is still missing; it is taken if it adds at least one cell
    and not more than are missing. Tiny grids and ratios near 1 leave a remainder that no block fits: it is grown from
    the edge of what is covered, which keeps the shape in one piece (random cells would not).

    Returns the cells as the bits of one integer, bit r * width + c for row r and column c: laying a block is a
    multiplication and a shift, what it adds a bit count, in 0.6 of the time that an array of 14 x 14 takes.
    """
    height, width = grid
    columns_of = _get_columns(grid)
    smallest = max(1.0, SMALLEST_BLOCK_SHARE * height * width)
    most_rows, most_columns = max(height, 2), max(width, 2)  # a block is smaller than the grid, as BEiT has it
    covered, missing, failures = 0, count, 0
    draws = _draw_blocks(rng)
    while missing > 0 and failures < BLOCK_ATTEMPTS:
        u_area, stretch, u_top, u_left = next(draws)
        failures += 1
        side = math.sqrt(smallest + u_area * (missing - smallest))
        rows, columns = round(side * stretch), round(side / stretch)
        if not (0 < rows < most_rows and 0 < columns < most_columns):
            continue
        top, left = int(u_top * (height - rows + 1)), int(u_left * (width - columns + 1))
        block = (((1 << columns) - 1) * columns_of[rows]) << (top * width + left)
        added = (block & ~covered).bit_count()
        if 0 < added <= missing:
            covered |= block
            missing -= added
            failures = 0
    return _grow(covered, missing, grid, rng)


def _grow(covered: int, missing: int, grid: tuple[int, int], rng: np.random.Generator) -> int:
    """Cover `missing` more cells, ring by ring around what is covered; the last ring by chance."""
    height, width = grid
    first_column = _get_columns(grid)[height]
    last_column = first_column << (width - 1)
    everything = (1 << (height * width)) - 1
    while missing > 0:
        beside = ((covered & ~last_column) << 1) | ((covered & ~first_column) >> 1)
        ring = (beside | (covered << width) | (covered >> width)) & everything & ~covered
        if ring == 0:  # nothing is covered yet: start from one cell
            ring = 1 << int(rng.integers(height * width))
        if ring.bit_count() > missing:
            cells = np.flatnonzero(_unpack(ring, height * width))
            ring = sum(1 << cell for cell in rng.permutation(cells)[:missing].tolist())
        covered |= ring
        missing -= ring.bit_count()
    return covered


@functools.cache
def _get_columns(grid: tuple[int, int]) -> tuple[int, ...]:
    """At place k the first cell of each of the first k rows, as bits."""
    return tuple(sum(1 << (row * grid[1]) for row in range(rows)) for rows in range(grid[0] + 1))


def _draw_blocks(rng: np.random.Generator) -> Iterator[list[float]]:
    """What chance says about one block after another: area, square root of the aspect, top and left; all but the aspect
    as shares of what is possible. Drawn for as many as most masks try: a call for each would take twice the time."""
    while True:
        draws = rng.random((24, 4))
        draws[:, 1] = np.exp((draws[:, 1] - 0.5) * LOG_ASPECT)
        yield from draws.tolist()


def _unpack(cells: int, num_patches: int) -> NDArray[np.bool_]:
    """Turn the bits of an integer into bool [num_patches]."""
    packed = np.frombuffer(cells.to_bytes(-(-num_patches // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=num_patches, bitorder="little").view(np.bool_)
