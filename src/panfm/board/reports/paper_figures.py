"""The drawings of a paper: the board's values in; SVG on white, each with its numbers as CSV, out.

sections --> forest plot: every encoder on every task, with its interval
         --> label efficiency: value over the share of labelled patients
         --> critical difference: mean ranks; bars join encoders that these patients cannot tell apart (Demsar 2006)
flow of a task --> boxes from the files of its source to its folds, with what was left out at the side
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from panfm.board.figures import draw_critical_difference, draw_efficiency, make_spec
from panfm.board.ranking import list_counted
from panfm.board.reports.document import Figure, format_csv
from panfm.board.standings import Board
from panfm.board.summary import LeaderboardSummary, Section
from panfm.board.vega import Spec, render_svg
from panfm.board.words import PROTOCOLS, describe_protocol
from panfm.measures.draws import Floats

Row = dict[str, object]
PADDING = {"left": 24, "right": 12, "top": 5, "bottom": 5}  # pixels: a reader's font may be wider than the measured one


@dataclass(frozen=True)
class Step:
    """One box of a flow, and what was left out before it: (reason, how many in words)."""

    title: str
    number: str
    left_out: tuple[tuple[str, str], ...] = ()


def draw_forests(summary: LeaderboardSummary) -> list[Figure]:
    """A forest plot of each protocol at its most labels."""
    return [_draw_forest(summary, section) for section in list_main_sections(summary)]


def list_main_sections(summary: LeaderboardSummary) -> list[Section]:
    """Of each protocol and variant, real and synthetic apart, the section with the most labels."""
    most: dict[tuple[bool, str, str], Section] = {}
    for section in summary.sections:
        key = section.synthetic, section.protocol, section.variant
        if key not in most or section.label_fraction > most[key].label_fraction:
            most[key] = section
    return list(most.values())


def _draw_forest(summary: LeaderboardSummary, section: Section) -> Figure:
    rows: list[Row] = [
        {
            "encoder": row.encoder.name,
            "series": summary.encoders.index(row.encoder.name),
            "task": f"{task.title} ({task.metric_title})",
            "value": cell.value,
            "low": cell.low,
            "high": cell.high,
        }
        for place, task in enumerate(section.tasks)
        for row in section.rows
        for cell in (row.cells[place],)
        if cell.value is not None
    ]
    title = f"{describe_protocol(section)}: every task with its 95 % interval."
    return _make(f"forest-{section.slug}", title, draw_forest(rows), rows)


def draw_forest(rows: Sequence[Row]) -> Spec:
    """Draw values with their intervals, one small multiple a task.

    rows: {encoder, series, task, value, low, high}; an interval that is None is not drawn.
    """
    x = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}, "axis": {"tickCount": 6}}
    y = {"field": "encoder", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 220}}
    color = {"field": "encoder", "type": "nominal", "sort": None, "legend": None}
    whisker = {
        "mark": {"type": "rule"},
        "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
        "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
    }
    point = {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": {"x": x}}
    view = {"width": 420, "height": {"step": 22}, "encoding": {"y": y, "color": color}, "layer": [whisker, point]}
    body = {
        "facet": {"field": "task", "type": "nominal", "sort": None, "title": None},
        "columns": 1,
        "resolve": {"scale": {"x": "independent"}},
        "spec": view,
    }
    return make_spec(body, "Values of every encoder with 95 % intervals, one panel a task.", {"rows": rows})


def draw_efficiencies(summary: LeaderboardSummary) -> list[Figure]:
    """Label-efficiency curves of each protocol that was measured at two shares of labels or more."""
    found = []
    for main in list_main_sections(summary):
        key = main.synthetic, main.protocol, main.variant
        those = [one for one in summary.sections if (one.synthetic, one.protocol, one.variant) == key]
        rows: list[Row] = [
            {
                "encoder": row.encoder.name,
                "series": summary.encoders.index(row.encoder.name),
                "task": f"{task.title} ({task.metric_title})",
                "protocol": section.protocol,
                "label_fraction": section.label_fraction,
                "value": cell.value,
                "low": cell.low,
                "high": cell.high,
            }
            for section in those
            for row in section.rows
            for task, cell in zip(section.tasks, row.cells, strict=True)
            if cell.value is not None and section.label_fraction > 0
        ]
        if len({row["label_fraction"] for row in rows}) > 1:
            name = PROTOCOLS.get(main.protocol, main.protocol)
            variant = "" if main.variant == "default" else f" ({main.variant.replace('_', ' ')})"
            title = f"{name}{variant}: value over the share of training patients with labels."
            slug = main.slug.rpartition("-f")[0]
            found.append(_make(f"efficiency-{slug}", title, draw_efficiency(rows), rows))
    return found


def draw_rankings(board: Board) -> list[Figure]:
    """Mean ranks of each protocol at its most labels, where two encoders or more share two tasks or more."""
    found = []
    for section in list_main_sections(board.summary):
        counted = list_counted(section.tasks, [row.cells for row in section.rows], section.synthetic)
        ranked = [place for place, row in enumerate(section.rows) if row.standing is not None]
        if len(ranked) < 2 or len(counted) < 2:
            continue
        replicates = board.replicates[section.slug][np.ix_(ranked, counted)]  # [E, T, R]
        points = np.array([[_get_value(section, row, task) for task in counted] for row in ranked])
        mean_ranks, spread = compute_mean_ranks(points[:, :, None])[:, 0], compute_mean_ranks(replicates)
        names = [section.rows[place].encoder.name for place in ranked]
        order = sorted(range(len(names)), key=lambda place: (mean_ranks[place], names[place]))
        rows: list[Row] = [
            {
                "encoder": names[place],
                "series": board.summary.encoders.index(names[place]),
                "mean_rank": float(mean_ranks[place]),
                "rank_low": float(np.nanpercentile(spread[place], 2.5)),
                "rank_high": float(np.nanpercentile(spread[place], 97.5)),
            }
            for place in order
        ]
        bars: list[Row] = [
            {"from": names[order[first]], "to": names[order[last]], "level": level}
            for level, (first, last) in enumerate(find_bars(spread[order]))
        ]
        title = (
            f"{describe_protocol(section)}: mean rank over {len(counted)} tasks with its 95 % interval. A bar joins "
            "encoders none of which these patients can tell from another."
        )
        spec = draw_critical_difference(rows, bars)
        found.append(_make(f"ranks-{section.slug}", title, spec, rows))
    return found


def _get_value(section: Section, row: int, task: int) -> float:
    value = section.rows[row].cells[task].value
    assert value is not None, "a ranked encoder has every counted task"
    return value if section.tasks[task].higher_is_better else -value


def compute_mean_ranks(values: Floats) -> Floats:
    """Mean over tasks of each encoder's rank, 1 the best, ties halved: [E, T, R], higher is better -> [E, R]."""
    return np.asarray(rankdata(-values, axis=0, nan_policy="omit").mean(axis=1))


def find_bars(spread: Floats) -> list[tuple[int, int]]:
    """Which runs of neighbours cannot be told apart pair by pair: places (first, last), none inside another.

    spread: mean ranks under the shared resamples [E, R], best first.
    """
    number = len(spread)
    alike: NDArray[np.bool_] = np.eye(number, dtype=bool)
    for one in range(number):
        for other in range(one + 1, number):
            low, high = np.nanpercentile(spread[other] - spread[one], [2.5, 97.5])
            alike[one, other] = alike[other, one] = low <= 0 <= high
    bars: list[tuple[int, int]] = []
    for first in range(number):
        last = first
        while last + 1 < number and alike[first : last + 2, first : last + 2].all():
            last += 1
        if last > first and not any(start <= first and last <= end for start, end in bars):
            bars.append((first, last))
    return bars


def _make(name: str, title: str, spec: Spec, rows: Sequence[Row]) -> Figure:
    heads = tuple(rows[0])
    numbers = format_csv(heads, ([row[head] for head in heads] for row in rows))
    spec = {**spec, "padding": PADDING}
    return Figure(name, title, str(spec["description"]), render_svg(spec), numbers)


# ------------------------------------------------------------------------------------------------ flow chart

BOX, SIDE, LEFT, GAP, LINE = 300, 300, 10, 26, 17  # pixels


def draw_flow(name: str, title: str, steps: Sequence[Step], ends: Sequence[Step] = ()) -> Figure:
    """Draw a flow: boxes from top to bottom with what was left out at their side, then `ends` beside each other."""
    parts, y = [], 10
    x = LEFT + BOX / 2
    for number, step in enumerate(steps):
        if number:
            lines = [line for reason, count in step.left_out for line in textwrap.wrap(f"{reason}: {count}", 40)]
            height = LINE * len(lines) + 16 if lines else 0
            parts.append(f'<path d="M{x:g} {y - 2} V{y + height + GAP - 2}" class="line" marker-end="url(#tip)"/>')
            if lines:
                parts.append(
                    f'<path d="M{x:g} {y + 14 + height / 2:g} h{BOX / 2 + 38:g}" class="line" marker-end="url(#tip)"/>'
                )
                parts.append(_draw_box(LEFT + BOX + 40, y + 14, SIDE, lines, "side"))
            y += height + GAP
        y += _add_step(parts, LEFT, y, step)
    if ends:
        parts.append(f'<path d="M{x:g} {y - 2} V{y + 2 * GAP - 2}" class="line" marker-end="url(#tip)"/>')
        turn = f"H{LEFT + BOX + 40 + SIDE / 2:g} v{GAP - 2}"
        parts.append(f'<path d="M{x:g} {y + GAP} {turn}" class="line" marker-end="url(#tip)"/>')
        y += 2 * GAP
        places = (LEFT, LEFT + BOX + 40)
        y += max(_add_step(parts, place, y, step) for place, step in zip(places, ends, strict=True))
    width = LEFT + BOX + 40 + SIDE + 10
    every = (*steps, *ends)
    label = f"Flow of images: {'; '.join(f'{step.title}: {step.number}' for step in every)}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 6}" viewBox="0 0 {width} {y + 6}" '
        f'role="img" aria-label="{escape(label)}">\n<style>'
        "rect{fill:#fff;stroke:#53606f}rect.side{fill:#f6f7f9;stroke:#d9dfe6}.line{fill:none;stroke:#53606f}"
        "text{font:13px 'Liberation Sans',Arial,Helvetica,sans-serif;fill:#17202b}.bold{font-weight:bold}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#53606f"/></marker></defs>\n'
        f'<rect width="{width}" height="{y + 6}" style="stroke:none"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
    rows = [
        (number + 1, step.title, step.number, reason, count)
        for number, step in enumerate(every)
        for reason, count in (step.left_out or (("", ""),))
    ]
    numbers = format_csv(("step", "what", "number", "left_out_before_it", "how_many"), rows)
    return Figure(name, title, label, svg, numbers)


def _add_step(parts: list[str], x: float, y: float, step: Step) -> int:
    """Add a step's box and return its height."""
    heads = textwrap.wrap(step.title, 38)
    lines = [*heads, *textwrap.wrap(step.number, 42)]
    parts.append(_draw_box(x, y, BOX, lines, "step", bold=len(heads)))
    return LINE * len(lines) + 12


def _draw_box(x: float, y: float, width: int, lines: Sequence[str], kind: str, bold: int = 0) -> str:
    height = LINE * len(lines) + 12
    texts = "".join(
        f'<text x="{x + 10:g}" y="{y + 18 + LINE * number:g}" class="{"bold" if number < bold else "plain"}">'
        f"{escape(line)}</text>"
        for number, line in enumerate(lines)
    )
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="5"/>{texts}'
