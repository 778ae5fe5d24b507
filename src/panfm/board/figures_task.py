"""The drawings of a task's page as Vega-Lite specs, as `figures` has those of the board; `task_charts` has their rows.

    draw_roc               sensitivity over 1 - specificity, a line an encoder
    draw_precision_recall  positive predictive value over sensitivity
    draw_reliability       share that was right over the predicted probability, a small multiple an encoder
    draw_decision_curve    net benefit over threshold probability
    draw_event_free        share without the event by day at low and at high risk, a small multiple an encoder
    draw_levels            sensitivity and specificity by level, a bar an encoder

A row of a line holds the whole line: lists that Vega takes apart (`flatten`), a fourth of the bytes of a row a point.
"""

from typing import Any

from panfm.board.figures import HEIGHT, make_spec
from panfm.board.vega import Spec

BY_ENCODER: Spec = {"field": "encoder", "type": "nominal", "sort": None, "title": None}
DASHED: Spec = {"strokeDash": BY_ENCODER, "order": {"value": None}}  # points stay in the order of their rows
REFERENCE: Spec = {"type": "line", "strokeWidth": 1.5, "strokeDash": [3, 3], "color": {"expr": "soft"}}
SHARE: Spec = {"domain": [0, 1], "nice": False}
TICKS: Spec = {"values": [0, 0.2, 0.4, 0.6, 0.8, 1], "format": ".1~f"}
KEPT = {"filter": "isValid(datum.low) && isValid(datum.high)"}


def draw_roc() -> Spec:
    """Draw ROC curves. rows: {encoder, series, x: [1 - specificity], y: [sensitivity]}."""
    body = _draw_square("1 − specificity", "sensitivity", [{"x": 0, "y": 0}, {"x": 1, "y": 1}], "linear")
    return make_spec(body, "ROC curves of all encoders; dashed: chance.", {}, square=True)


def draw_precision_recall(prevalence: float) -> Spec:
    """Draw precision over recall. rows: {encoder, series, x: [recall], y: [precision]}."""
    chance = [{"x": 0, "y": prevalence}, {"x": 1, "y": prevalence}]
    body = _draw_square("sensitivity (recall)", "positive predictive value (precision)", chance, "step-before")
    return make_spec(body, "Precision-recall curves of all encoders; dashed: prevalence.", {}, square=True)


def _draw_square(x_title: str, y_title: str, chance: list[dict[str, float]], interpolate: str) -> Spec:
    x = {"field": "x", "type": "quantitative", "title": x_title, "scale": SHARE, "axis": TICKS}
    y = {"field": "y", "type": "quantitative", "title": y_title, "scale": SHARE, "axis": TICKS}
    line = {
        "transform": [{"flatten": ["x", "y"]}],
        "mark": {"type": "line", "interpolate": interpolate},
        "encoding": {"color": BY_ENCODER, **DASHED},
    }
    reference = {"data": {"values": chance}, "mark": REFERENCE}
    return {"width": 300, "height": 300, "encoding": {"x": x, "y": y}, "layer": [reference, line]}


def draw_reliability(said: str) -> Spec:
    """Draw reliability. rows: {encoder, series, x (said), y (was), low, high}. said: what the probability is of."""
    x = {"field": "x", "type": "quantitative", "title": said, "scale": SHARE, "axis": TICKS}
    y = {"field": "y", "type": "quantitative", "title": None, "scale": SHARE, "axis": TICKS}  # the name stands there
    color = {**BY_ENCODER, "legend": None}  # each has its own name above it
    whisker = {
        "transform": [KEPT],
        "mark": {"type": "rule", "opacity": 0.6},
        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color},
    }
    point = {
        "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
        "encoding": {"color": color, "tooltip": tell({"x": "said", "y": "was", "low": "from", "high": "to"})},
    }
    reference = {"data": {"values": [{"x": 0, "y": 0}, {"x": 1, "y": 1}]}, "mark": REFERENCE}
    view = {"width": 220, "height": 200, "encoding": {"x": x, "y": y}, "layer": [reference, whisker, point]}
    body = {"facet": {**BY_ENCODER, "title": None}, "columns": 3, "spec": view}
    return make_spec(body, "Reliability: share that was right over the predicted probability.", {}, cell=200)


def draw_decision_curve(lowest: float) -> Spec:
    """Draw decision curves. rows: {encoder, series, x: [threshold], y: [net benefit]}; all: {x, y} of treating all.

    lowest: where the axis ends; below, treating everybody falls out of every useful scale.
    """
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "threshold probability",
        "scale": {"domainMin": 0, "nice": False},
        "axis": {"format": "~%", "grid": False},
    }
    scale = {"domainMin": lowest, "zero": False}
    y: Spec = {"field": "y", "type": "quantitative", "title": "net benefit an image", "scale": scale}
    flat: list[Spec] = [{"flatten": ["x", "y"]}]
    line: Spec = {
        "transform": flat,
        "mark": {"type": "line", "clip": True},
        "encoding": {"color": BY_ENCODER, **DASHED},
    }
    reference = {"data": {"name": "all"}, "transform": flat, "mark": {**REFERENCE, "clip": True}}
    nobody: Spec = {
        "data": {"values": [{"y": 0}]},
        "mark": {"type": "rule", "strokeWidth": 1, "color": {"expr": "ink"}},
        "encoding": {"x": None},
    }
    body = {
        "width": "container",
        "height": HEIGHT,
        "encoding": {"x": x, "y": y},
        "layer": [nobody, reference, line],
    }
    label = "Decision curves of all encoders; dashed: treating everybody; the line at 0: treating nobody."
    return make_spec(body, label, {}, margin=70)


def draw_event_free() -> Spec:
    """Draw event-free curves. rows: {encoder, series, risk, x: [day], y: [share]}."""
    x = {"field": "x", "type": "quantitative", "title": "days", "scale": {"domainMin": 0, "nice": False}}
    y: Spec = {"field": "y", "type": "quantitative", "scale": SHARE}
    y |= {"title": None, "axis": {**TICKS, "format": "~%"}}
    risk = {"field": "risk", "type": "nominal", "title": None, "sort": None}
    dash = {**risk, "scale": {"domain": ["low risk", "high risk"], "range": [[1, 0], [5, 4]]}}
    line = {
        "transform": [{"flatten": ["x", "y"]}],
        "mark": {"type": "line", "interpolate": "step-after"},
        "encoding": {
            "color": {**BY_ENCODER, "legend": None},
            "strokeDash": dash,
            "order": {"value": None},
        },
    }
    view = {"width": 300, "height": 200, "encoding": {"x": {**x, "axis": {"grid": False}}, "y": y}, "layer": [line]}
    body = {"facet": {**BY_ENCODER, "title": None}, "columns": 2, "spec": view}
    return make_spec(body, "Share of patients free of the event by day, at low and at high risk.", {}, cell=280)


def draw_levels() -> Spec:
    """Draw bars by level. rows: {encoder, series, level, measure, value, low, high}; hidden levels have no row."""
    level = {"field": "level", "type": "nominal", "sort": None, "title": None}
    y = {**level, "axis": {"ticks": False, "domain": False, "labelLimit": 130}}
    x = {"field": "value", "type": "quantitative", "title": None, "scale": SHARE, "axis": {**TICKS, "format": "~%"}}
    beside = {"field": "encoder", "type": "nominal", "sort": None}
    words = {"value": "value", "low": "from", "high": "to"}
    bar = {
        "mark": {"type": "bar", "opacity": 0.75},
        "encoding": {"color": BY_ENCODER, "tooltip": [{"field": "encoder"}, {"field": "level"}, *tell(words)]},
    }
    whisker = {
        "transform": [KEPT],
        "mark": {"type": "rule", "color": {"expr": "ink"}},
        "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
    }
    view = {
        "width": 220,
        "height": {"step": 11, "for": "offset"},
        "encoding": {"x": x, "y": y, "yOffset": beside},
        "layer": [bar, whisker],
    }
    body = {"facet": {"field": "measure", "type": "nominal", "title": None, "sort": None}, "columns": 2, "spec": view}
    return make_spec(body, "Sensitivity and specificity by level with 95 % intervals.", {}, cell=200, margin=150)


def tell(titles: dict[str, str]) -> list[Any]:
    """What the pointer reads on a mark: fields of numbers under these words."""
    return [{"field": name, "type": "quantitative", "title": title, "format": ".3f"} for name, title in titles.items()]
