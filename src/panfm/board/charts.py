"""What the board's drawings share: a colour an encoder on every page, and axes with round ticks.

A series number is an encoder's place among all names on the board: its colour everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from panfm.board.summary import LeaderboardSummary

NUM_SERIES = 8  # colours of the page; more encoders start again from the first


@dataclass(frozen=True)
class Tick:
    """A grid line: position on its axis and label."""

    position: float
    label: str


def get_series(summary: LeaderboardSummary) -> dict[str, int]:
    """Return each encoder's series number, 0 to NUM_SERIES - 1."""
    return {name: number % NUM_SERIES for number, name in enumerate(summary.encoders)}


def choose_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Choose an axis from below the lowest to above the highest value, with three to six round ticks."""
    low, high = min(values), max(values)
    spread = max(high - low, 0.02)
    step = 10 ** math.floor(math.log10(spread / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if spread / (factor * step) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    ticks = [round(number * step, 10) for number in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def label_tick(value: float, ticks: Sequence[float]) -> str:
    """Write a tick with the digits that its neighbours differ in."""
    step = ticks[1] - ticks[0]
    return f"{value:.{max(0, -math.floor(math.log10(step * 1.0000001)))}f}"
