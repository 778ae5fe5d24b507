"""Masks: which patches of a view are hidden from the encoder, drawn by the loader beside the pixels.

    (kind, ratio), grid (h, w), rng   ->   bool [h * w], True = hidden, the same number hidden in every mask

A fixed number lets a batch of visible tokens be one rectangular tensor. numpy only: masks are drawn in loader workers.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class

SMALLEST_BLOCK_SHARE = 16 / 196  # BEiT's smallest block: 16 patches of a 14 x 14 grid; other grids keep the share
LOG_ASPECT = float(np.log(1 / 0.3))  # BEiT: height / width between 0.3 and 1 / 0.3, uniform in its logarithm
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
    count = num_hidden(config, grid)
    if config.kind == "random":
        mask = np.zeros(grid[0] * grid[1], dtype=np.bool_)
        mask[rng.permutation(mask.size)[:count]] = True
        return mask
    if config.kind == "block":
        return _sample_blocks(grid, count, rng).reshape(-1)
    return ~_sample_blocks(grid, grid[0] * grid[1] - count, rng).reshape(-1)


def _sample_blocks(grid: tuple[int, int], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Cover exactly `count` cells with rectangles, as BEiT (arXiv 2106.08254, algorithm 1) and CAE do.

    A block's area lies between the smallest block and what is still missing; it is taken if it adds at least one cell
    and not more than are missing. Tiny grids and ratios near 1 leave a remainder that no block fits: it is grown from
    the edge of what is covered, which keeps the shape in one piece (random cells would not).
    """
    height, width = grid
    mask = np.zeros(grid, dtype=np.bool_)
    smallest = max(1.0, SMALLEST_BLOCK_SHARE * mask.size)
    missing = count
    while missing > 0:
        for u_area, u_aspect, u_top, u_left in rng.random((BLOCK_ATTEMPTS, 4)).tolist():
            area = smallest + u_area * (missing - smallest)
            aspect = float(np.exp((2 * u_aspect - 1) * LOG_ASPECT))
            rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if not (0 < rows < max(height, 2) and 0 < columns < max(width, 2)):
                continue
            top, left = int(u_top * (height - rows + 1)), int(u_left * (width - columns + 1))
            block = mask[top : top + rows, left : left + columns]
            added = rows * columns - int(np.count_nonzero(block))
            if 0 < added <= missing:
                block[...] = True
                missing -= added
                break
        else:
            _grow(mask, missing, rng)
            return mask
    return mask


def _grow(mask: NDArray[np.bool_], missing: int, rng: np.random.Generator) -> None:
    """Cover `missing` more cells in place, ring by ring around what is covered; the last ring by chance."""
    while missing > 0:
        edge = np.zeros_like(mask)
        edge[1:] |= mask[:-1]
        edge[:-1] |= mask[1:]
        edge[:, 1:] |= mask[:, :-1]
        edge[:, :-1] |= mask[:, 1:]
        candidates = np.flatnonzero(edge & ~mask)
        if candidates.size == 0:  # nothing is covered yet: start from one cell
            candidates = rng.integers(mask.size, size=1)
        chosen = candidates if candidates.size <= missing else rng.permutation(candidates)[:missing]
        mask.reshape(-1)[chosen] = True
        missing -= int(chosen.size)
