"""The board's drawings as plain numbers: Sections in, positions out, which the page's template writes as inline SVG.

x is in percent of the drawing's width and y in pixels, so that one drawing serves a telephone and a screen without
scaled text. A series number is an encoder's place among all names on the board: its colour everywhere.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from panfm.board.summary import Cell, LeaderboardSummary, Section, Task

EFFICIENCY_HEIGHT = 200  # pixels between the lowest and the highest grid line
NUM_SERIES = 8  # colours of the page; more encoders start again from the first


@dataclass(frozen=True)
class Tick:
    """A grid line: position on its axis and label."""

    position: float
    label: str


@dataclass(frozen=True)
class ForestRow:
    """An encoder's value and interval on a task, as positions in percent; None where undefined or missing."""

    encoder: str
    series: int
    cell: Cell
    x: float | None
    x_low: float | None
    x_high: float | None


@dataclass(frozen=True)
class Forest:
    """All encoders of a section on one task."""

    task: Task
    ticks: tuple[Tick, ...]
    chance: float | None  # position of the chance level, where it lies on the axis
    rows: tuple[ForestRow, ...]


@dataclass(frozen=True)
class EfficiencyPoint:
    """A value at a label fraction: x in percent, y in pixels from the top."""

    x: float
    y: float
    y_low: float | None
    y_high: float | None
    text: str


@dataclass(frozen=True)
class EfficiencyLine:
    """One encoder over label fractions."""

    encoder: str
    series: int
    points: tuple[EfficiencyPoint, ...]


@dataclass(frozen=True)
class Efficiency:
    """A task under one protocol: value over the share of labelled training groups."""

    protocol: str
    variant: str
    task: Task
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[EfficiencyLine, ...]


def get_series(summary: LeaderboardSummary) -> dict[str, int]:
    """Return each encoder's series number, 0 to NUM_SERIES - 1."""
    return {name: number % NUM_SERIES for number, name in enumerate(summary.encoders)}


def compute_forests(section: Section, series: Mapping[str, int]) -> tuple[Forest, ...]:
    """Draw one forest plot a task; the axis holds every interval of the section's encoders on it."""
    forests = []
    for place, task in enumerate(section.tasks):
        cells = [row.cells[place] for row in section.rows]
        if all(cell.value is None for cell in cells):
            continue
        low, high, ticks = choose_axis(_collect(cells))

        def locate(value: float | None, low: float = low, high: float = high) -> float | None:
            return None if value is None else round(100 * (value - low) / (high - low), 2)

        forests.append(
            Forest(
                task=task,
                ticks=tuple(Tick(locate(value) or 0.0, label_tick(value, ticks)) for value in ticks),
                chance=locate(task.chance) if low <= task.chance <= high else None,
                rows=tuple(
                    ForestRow(
                        row.encoder.name,
                        series[row.encoder.name],
                        cell,
                        locate(cell.value),
                        locate(cell.low),
                        locate(cell.high),
                    )
                    for row, cell in zip(section.rows, cells, strict=True)
                ),
            )
        )
    return tuple(forests)


def compute_efficiencies(summary: LeaderboardSummary, series: Mapping[str, int]) -> tuple[Efficiency, ...]:
    """Draw one label-efficiency plot for each task and protocol that was run at two or more label fractions."""
    grouped: dict[tuple[bool, str, str, str], list[tuple[Section, int]]] = defaultdict(list)
    for section in summary.sections:
        for place, task in enumerate(section.tasks):
            grouped[section.synthetic, section.protocol, section.variant, task.name].append((section, place))
    drawings = []
    for (_, protocol, variant, _), places in grouped.items():  # in the order of sections: real before synthetic
        fractions = sorted({section.label_fraction for section, _ in places})
        if len(fractions) < 2:
            continue
        task = places[0][0].tasks[places[0][1]]
        values: dict[str, dict[float, Cell]] = defaultdict(dict)
        for section, place in places:
            for row in section.rows:
                if row.cells[place].value is not None:
                    values[row.encoder.name][section.label_fraction] = row.cells[place]
        if not values:
            continue
        low, high, ticks = choose_axis(_collect([cell for cells in values.values() for cell in cells.values()]))

        def locate(value: float, low: float = low, high: float = high) -> float:
            return round(EFFICIENCY_HEIGHT * (high - value) / (high - low), 1)

        x_of = _place_fractions(fractions)
        lines = []
        for number, (encoder, cells) in enumerate(sorted(values.items())):
            aside = 0.8 * (number - (len(values) - 1) / 2)  # whiskers of different encoders stand side by side
            points = tuple(
                EfficiencyPoint(
                    x=round(x_of[fraction] + aside, 2),
                    y=locate(cell.value or 0.0),
                    y_low=None if cell.low is None else locate(cell.low),
                    y_high=None if cell.high is None else locate(cell.high),
                    text=f"{encoder}, {fraction:.0%} of labels: {cell.value:.3f}",
                )
                for fraction, cell in sorted(cells.items())
            )
            lines.append(EfficiencyLine(encoder, series[encoder], points))
        drawings.append(
            Efficiency(
                protocol=protocol,
                variant=variant,
                task=task,
                x_ticks=tuple(Tick(x_of[fraction], f"{fraction * 100:g} %") for fraction in fractions),
                y_ticks=tuple(Tick(locate(value), label_tick(value, ticks)) for value in ticks),
                lines=tuple(lines),
            )
        )
    return tuple(drawings)


def _collect(cells: Sequence[Cell]) -> list[float]:
    return [value for cell in cells for value in (cell.value, cell.low, cell.high) if value is not None]


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


def _place_fractions(fractions: Sequence[float]) -> dict[float, float]:
    """Place label fractions on a logarithmic axis, in percent of the width with room for labels."""
    first, last = math.log(fractions[0]), math.log(fractions[-1])
    return {fraction: round(8 + 84 * (math.log(fraction) - first) / (last - first), 2) for fraction in fractions}
