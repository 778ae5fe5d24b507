"""The board's drawings as Vega-Lite specs: plain rows in, or none where a page's script feeds them, specs out.

    draw_efficiency           value over the share of labelled patients, with bands
    draw_score_vs             score against parameters, operations or energy
    draw_critical_difference  mean ranks; bars join encoders that the data cannot tell apart
    draw_radar                a chosen few, tasks as axes

Every spec takes its data by name ("rows"; critical_difference also "bars"), so that one spec serves any choice that is
made on the page. `usermeta` tells drawings.js what a screen reader says and, of small multiples, how narrow one may be.
"""

from typing import Any

from panfm.board.vega import CONFIG, INK, LINE, SOFT, Rows, Spec

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name, never fetched
HEIGHT = 260  # pixels of a drawing; its width is the page's
NUM_RINGS = 4  # of the radar


def draw_efficiency(rows: Rows = ()) -> Spec:
    """Draw label-efficiency curves, one small multiple a task.

    rows: {encoder, series, task, protocol, label_fraction (above 0), value, low, high}; the band is the interval.
    """
    x = {
        "field": "label_fraction",
        "type": "quantitative",
        "title": "share of training patients with labels",
        "scale": {"type": "log"},
        "axis": {"format": "~%", "grid": False, "values": [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1]},
    }
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}, "axis": {"tickCount": 5}}
    band = {
        "mark": {"type": "area", "opacity": 0.15, "line": False},
        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
    }
    points = {
        "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
        "encoding": {"tooltip": _tell("encoder", "label_fraction", *INTERVAL)},
    }
    view = {
        "width": 300,
        "height": 200,
        "encoding": {"x": x, "y": y, **_by_encoder()},
        "layer": [band, {"mark": "line", "encoding": _dash_by_encoder()}, points],
    }
    facet = {"field": "task", "type": "nominal", "title": None, "sort": None}
    multiples = {"facet": facet, "columns": 2, "spec": view, "resolve": {"scale": {"y": "independent"}}}
    transform = [{"filter": "datum.label_fraction > 0 && isValid(datum.value)"}]
    label = "Value over the share of training patients with labels, a line an encoder."
    return make_spec({"transform": transform, **multiples}, label, {"rows": rows}, cell=280)


def draw_score_vs(rows: Rows = (), x_title: str = "parameters") -> Spec:
    """Draw the mean score against what an encoder costs, on a logarithmic axis.

    rows: {encoder, series, x (above 0; others are left out), score, low, high}.
    """
    x = {
        "field": "x",
        "type": "quantitative",
        "title": x_title,
        "scale": {"type": "log", "nice": False, "padding": 24},
        "axis": {"format": "~s", "grid": False, "tickCount": 5},
    }
    y = {
        "field": "score",
        "type": "quantitative",
        "title": "mean score (0 chance, 1 perfect)",
        "scale": {"zero": False},
    }
    whisker = {
        "mark": {"type": "rule"},
        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
    }
    point = {
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
        "encoding": {"tooltip": _tell("encoder", "x", "score", "low", "high")},
    }
    encoding = {"x": x, "y": y, "color": _by_encoder()["color"]}
    body = {
        "width": "container",
        "height": HEIGHT,
        "transform": [{"filter": "datum.x > 0 && isValid(datum.score)"}],
        "encoding": encoding,
        "layer": [whisker, point],
    }
    return make_spec(body, f"Mean score against {x_title}, a point an encoder.", {"rows": rows})


def draw_critical_difference(rows: Rows = (), bars: Rows = ()) -> Spec:
    """Draw mean ranks with their intervals, best first; a bar at the right joins those that cannot be told apart.

    rows: {encoder, series, mean_rank, rank_low, rank_high}. bars: {from, to, level}: names of the first and the last
    encoder of a bar, and its place beside others, from 0. After Demsar, JMLR 7 (2006), turned so that names stay
    readable on a telephone.
    """
    rows = sorted(rows, key=lambda row: row["mean_rank"])  # rows that a page feeds come in this order, too
    names = {"field": "encoder", "type": "nominal", "sort": None}
    y = {**names, "title": None, "axis": {"grid": True, "ticks": False, "domain": False, "labelLimit": 200}}
    x = {
        "field": "mean_rank",
        "type": "quantitative",
        "title": "mean rank over tasks (1 is best)",
        "scale": {"zero": False, "padding": 14},
        "axis": {"grid": False, "tickMinStep": 1},
    }
    whisker = {
        "mark": {"type": "rule"},
        "encoding": {"x": {**x, "field": "rank_low"}, "x2": {"field": "rank_high"}, "y": y},
        "transform": [{"filter": "isValid(datum.rank_low) && isValid(datum.rank_high)"}],
    }
    point = {
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
        "encoding": {"x": x, "y": y, "tooltip": _tell("encoder", "mean_rank", "rank_low", "rank_high")},
    }
    bar = {
        "data": {"name": "bars"},
        "mark": {"type": "rule", "strokeWidth": 4, "strokeCap": "round", "color": {"expr": "ink"}},
        "encoding": {
            "x": {"value": {"expr": "width + 12 + 11 * datum.level"}},
            "y": {"field": "from", "type": "nominal", "sort": None},
            "y2": {"field": "to"},
            "color": {"value": {"expr": "ink"}},
        },
    }
    body = {
        "width": "container",
        "height": {"step": 30},
        "encoding": {"color": _by_encoder()["color"]},
        "layer": [point, whisker, bar],  # points first: they have every encoder, and the order of the names is theirs
    }
    label = "Mean ranks with intervals, best first; bars join encoders that the data cannot tell apart."
    return make_spec(body, label, {"rows": rows, "bars": bars})


def draw_radar(rows: Rows = ()) -> Spec:
    """Draw at most six encoders on tasks as axes, from chance (the centre) to perfect (the rim).

    rows: {encoder, series, task, value (rescaled, 0 ... 1), order (place of the task, from 0)}; an encoder's rows are
    all its tasks. Values below chance are drawn at the centre.
    """
    place = [
        {"joinaggregate": [{"op": "max", "field": "order", "as": "last"}]},
        {"calculate": "2 * PI * datum.order / (datum.last + 1)", "as": "angle"},
        {"calculate": "clamp(datum.value, 0, 1)", "as": "length"},
        {"calculate": "datum.length * sin(datum.angle)", "as": "x"},
        {"calculate": "datum.length * cos(datum.angle)", "as": "y"},
    ]
    axes = [
        {"aggregate": [{"op": "max", "field": "angle", "as": "angle"}], "groupby": ["task", "order"]},
        {"calculate": "sin(datum.angle)", "as": "x"},
        {"calculate": "cos(datum.angle)", "as": "y"},
    ]
    scale = {"domain": [-1.12, 1.12], "nice": False}
    at: Spec = {
        channel: {"field": channel, "type": "quantitative", "scale": scale, "axis": None} for channel in ("x", "y")
    }
    plain: Spec = {"color": {"value": {"expr": "line"}}}
    rings: Spec = {
        "data": {"sequence": {"start": 1, "stop": NUM_RINGS + 0.5, "as": "ring"}},
        "mark": {
            "type": "arc",
            "theta": 0,
            "theta2": 6.2832,
            "filled": False,
            "outerRadius": {"expr": f"datum.ring / {NUM_RINGS} * min(width, height) / 2.24"},
            "x": {"expr": "width / 2"},
            "y": {"expr": "height / 2"},
        },
        "encoding": plain,
    }
    spokes: Spec = {
        "transform": [*axes, {"calculate": "0", "as": "zero"}],
        "mark": "rule",
        "encoding": {**at, "x2": {"datum": 0}, "y2": {"datum": 0}, **plain},
    }
    names: list[Spec] = [
        {
            "transform": [*axes, {"filter": side}, {"calculate": "datum.x * 1.05", "as": "x"}],
            "mark": {"type": "text", "align": align, "dy": dy, "limit": 200, "fontSize": 11.5},
            "encoding": {
                **at,
                "text": {"field": "task"},
                "color": {"value": {"expr": "soft"}},
            },
        }
        for side, align, dy in (
            ("abs(datum.x) < 0.01 && datum.y > 0", "center", -9),
            ("abs(datum.x) < 0.01 && datum.y < 0", "center", 9),
            ("datum.x >= 0.01", "left", 0),
            ("datum.x <= -0.01", "right", 0),
        )
    ]
    line = {
        "mark": {"type": "line", "interpolate": "linear-closed"},
        "encoding": {**at, "order": {"field": "order"}, **_dash_by_encoder()},
    }
    point = {
        "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
        "encoding": {**at, "tooltip": _tell("encoder", "task", "value")},
    }
    body = {
        "width": 300,
        "height": 300,
        "transform": place,
        "encoding": _by_encoder(),
        "layer": [rings, spokes, *names, line, point],
    }
    return make_spec(body, "Radar of rescaled values, an axis a task, a line an encoder.", {"rows": rows}, square=True)


INTERVAL = ("value", "low", "high")
_FORMATS = {"label_fraction": "~%", "x": "~s"}
_TITLES = {"label_fraction": "labels", "mean_rank": "mean rank", "rank_low": "from", "rank_high": "to"}
_WORDS = ("encoder", "task", "level")


def _tell(*fields: str) -> list[Spec]:
    """What the pointer reads on a mark."""
    return [
        {"field": field, "type": "nominal" if field in _WORDS else "quantitative", "title": _TITLES.get(field, field)}
        | ({} if field in _WORDS else {"format": _FORMATS.get(field, ".3f")})
        for field in fields
    ]


def _by_encoder() -> Spec:
    """Colour by encoder; `vega.paint` and drawings.js fill in whose."""
    return {
        "color": {"field": "encoder", "type": "nominal", "sort": None, "title": None},
        "detail": {"field": "encoder"},
    }


def _dash_by_encoder() -> Spec:
    """Dashes by encoder, for a layer of lines: other marks have none."""
    return {"strokeDash": {"field": "encoder", "type": "nominal", "sort": None, "title": None}}


def make_spec(body: Spec, label: str, datasets: dict[str, Rows], *, cell: int | None = None, **meta: Any) -> Spec:
    """Complete a drawing: its data by name, the shared config, its label, and what drawings.js must know.

    cell: of small multiples, the least width of one in pixels. Data without rows are left for the page to feed.
    """
    spec: Spec = {
        "$schema": SCHEMA,
        "description": label,
        "data": {"name": "rows"},
        "usermeta": {"label": label, **({"cell": cell} if cell else {}), **meta},
        "params": [{"name": name, "value": value} for name, value in (("ink", INK), ("soft", SOFT), ("line", LINE))],
        "config": CONFIG,
        **body,
    }
    held = {name: [dict(row) for row in rows] for name, rows in datasets.items() if rows}
    return {**spec, "datasets": held} if held else spec
