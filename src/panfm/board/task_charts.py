"""What the drawings of a task's page show: a TaskPage in, a spec of `figures_task` with its rows for each place out.

    TaskPage --build_drawings--> {id of the place: Drawing}   --JSON--> the page, where assets/task.js draws them

All numbers are in the page's tables, too: the page reads without a script.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from panfm.board.figures_task import (
    draw_decision_curve,
    draw_event_free,
    draw_levels,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
)
from panfm.board.task_confusion import MIN_COUNTED_GROUPS
from panfm.board.task_pages import EncoderDetails, TaskPage
from panfm.board.vega import Spec
from panfm.measures.survival import StepCurve

DIGITS = 4  # of what is drawn: a pixel is a thousandth of a drawing
LOWEST_BENEFIT = -0.05  # below, treating everybody falls out of every useful scale

Row = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A spec and what it takes by name."""

    spec: Spec
    data: Mapping[str, Sequence[Row]]


def build_drawings(page: TaskPage, series: Mapping[str, int]) -> dict[str, Drawing]:
    """Build what a task's page draws, by the id of its place. series: number of each encoder's colour."""

    def start(details: EncoderDetails) -> Row:
        return {"encoder": details.encoder, "series": series[details.encoder]}

    found: dict[str, Drawing] = {}
    curves = [(start(one), one.curves) for one in page.encoders if one.curves is not None]
    roc = [{**row, **_place(one.roc.x, one.roc.y)} for row, one in curves if one.roc]
    recall = [
        {**row, **_place(one.precision_recall.x, one.precision_recall.y)} for row, one in curves if one.precision_recall
    ]
    if roc and recall:
        found["drawing-roc"] = Drawing(draw_roc(), {"rows": roc})
        prevalence = round(page.prevalence or 0.0, DIGITS)
        found["drawing-precision-recall"] = Drawing(draw_precision_recall(prevalence), {"rows": recall})
    if bins := [{**start(one), **row} for one in page.encoders for row in _list_bins(one)]:
        said = "predicted probability" if page.positive else "probability of the most probable class"
        found["drawing-reliability"] = Drawing(draw_reliability(said), {"rows": bins})
    benefits = [(start(one), one.curve) for one in page.encoders if one.curve is not None]
    if benefits:
        first = benefits[0][1]
        found["drawing-decision"] = Drawing(
            draw_decision_curve(LOWEST_BENEFIT),
            {
                "rows": [{**row, **_place(one.thresholds, one.net_benefit)} for row, one in benefits],
                "all": [_place(first.thresholds, first.treat_all)],
            },
        )
    followed = [
        {**start(one), "risk": risk, **trace_event_free(curve)}
        for one in page.encoders
        if one.follow_up is not None
        for risk, curve in (("low risk", one.follow_up.low), ("high risk", one.follow_up.high))
        if curve is not None
    ]
    if followed:
        found["drawing-event-free"] = Drawing(draw_event_free(), {"rows": followed})
    for name in dict.fromkeys(name for one in page.encoders for name in one.subgroups):
        bars = [{**start(one), **row} for one in page.encoders for row in _list_levels(one, name)]
        if bars:
            found[f"drawing-by-{name}"] = Drawing(draw_levels(), {"rows": bars})
    return found


def trace_event_free(curve: StepCurve) -> dict[str, list[float]]:
    """Trace the curve from day 0 while at least MIN_COUNTED_GROUPS patients are followed: its corners."""
    days, shares, value = [0.0], [1.0], 1.0
    for day, after, num in zip(curve.times.tolist(), curve.values.tolist(), curve.at_risk.tolist(), strict=True):
        if num < MIN_COUNTED_GROUPS:
            break
        days.append(day)
        shares.append(after)
        value = after
    return _place([*days, days[-1]], [*shares, value])


def _list_bins(details: EncoderDetails) -> list[Row]:
    return [
        {"x": _round(one.confidence), "y": _round(one.right.value), "low": _round(one.right.low),
         "high": _round(one.right.high)}
        for one in details.reliability
        if one.num_groups >= MIN_COUNTED_GROUPS
    ]  # fmt: skip


def _list_levels(details: EncoderDetails, name: str) -> list[Row]:
    """Two bars a level; what is hidden there has no value."""
    levels = details.subgroups[name].levels if name in details.subgroups else ()
    return [
        {"level": level.level.replace("_", " "), "measure": measure, "value": _round(one.value), "low": _round(one.low),
         "high": _round(one.high)}
        for measure, number in (("Sensitivity", 0), ("Specificity", 1))
        for level in levels
        for one in ((level.sensitivity, level.specificity)[number],)
        if one.value is not None
    ]  # fmt: skip


def _place(x: ArrayLike, y: ArrayLike) -> dict[str, list[float]]:
    both = {"x": np.asarray(x, dtype=np.float64), "y": np.asarray(y, dtype=np.float64)}
    return {name: values.round(DIGITS).tolist() for name, values in both.items()}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
