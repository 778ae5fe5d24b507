"""What draws: Vega-Lite specs in (`figures`), the library that a page loads and static SVG out.

    spec --page, assets/vega.js + assets/drawings.js--> SVG in the reader's colours
         `--render_svg--> SVG on white, for a paper

vl-convert carries Vega, Vega-Lite and Vega-Embed whole: nothing is fetched, neither here nor by a page.

A spec names its encoders by the field `encoder`, the colour of each by `series` (its number among the eight of the
board's style). Which encoders there are is known from the rows alone, so that domain and colours are filled in where
the rows are: here by `paint`, on a page by drawings.js.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import vl_convert

Spec = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

# On paper; templates/board_style.html.j2 has the same as --s0 ... --s7, --ink, --soft and --line, and others for dark.
SERIES = ("#0b62c4", "#c2500a", "#17805a", "#a3308f", "#8a6d00", "#5a4fcf", "#b3243a", "#4b6470")
INK, SOFT, LINE = "#17202b", "#53606f", "#d9dfe6"
# One encoder from another without colour; four patterns, so that two encoders that share one differ in colour.
DASHES = ((1, 0), (7, 3), (2, 2), (9, 3, 2, 3))
# vl-convert brings this family: widths of labels, and with them the bytes, do not depend on a machine's own fonts.
PAPER_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"

CONFIG: Spec = {
    "background": None,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    "aria": False,  # a drawing has one label; its numbers are in the table beside it, not in a thousand marks
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelColor": SOFT,
        "titleColor": SOFT,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
        "labelOverlap": True,
    },
    "axisY": {"titleAlign": "left", "titleAngle": 0, "titleAnchor": "start", "titleX": 0, "titleY": -12},
    "header": {"labelFontSize": 12, "labelFontWeight": "bold", "labelColor": INK, "labelAnchor": "start"},
    "legend": {
        "orient": "bottom",
        "columns": 2,
        "labelFontSize": 12,
        "labelColor": INK,
        "labelLimit": 260,
        "title": None,
        "symbolStrokeWidth": 2,
        "symbolSize": 250,
    },
    "line": {"strokeWidth": 2},
    "rule": {"strokeWidth": 1.5},
    "text": {"fontSize": 12, "color": INK},
    "title": {"fontSize": 13, "color": INK, "anchor": "start"},
}


@cache
def read_bundle() -> str:
    """Read the script that pages load: window.vega, window.vegaLite and window.vegaEmbed, about 0.9 MB."""
    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub knows no default


def paint(spec: Spec, rows: Rows) -> Spec:
    """Give each encoder of `rows` its colour and dashes: a copy of the spec, whose scales name them in this order.

    rows: plain values with `encoder` and `series`; where none has them the spec stays as it is.
    """
    series = {str(row["encoder"]): int(row["series"]) for row in rows if "encoder" in row and "series" in row}
    painted = copy.deepcopy(spec)
    view = painted.get("spec", painted)  # that a facet repeats
    for encoding in (one.get("encoding", {}) for one in (view, *view.get("layer", ()))):
        for channel, values in (("color", SERIES), ("strokeDash", [list(dash) for dash in DASHES])):
            if encoding.get(channel, {}).get("field") == "encoder" and series:
                chosen = [values[number % len(values)] for number in series.values()]
                encoding[channel]["scale"] = {"domain": list(series), "range": chosen}
    return painted


def render_svg(spec: Spec) -> str:
    """Draw a spec that holds its rows (`datasets`) as SVG on white; the same spec gives the same bytes.

    Raises ValueError for a spec that Vega-Lite does not understand.
    """
    held = spec.get("datasets", {})
    painted = paint(spec, [row for rows in held.values() for row in rows])
    painted["config"] = {**painted.get("config", {}), "background": "white", "font": PAPER_FONT}
    inner = painted.get("spec", painted)
    if inner.get("width") == "container":
        inner["width"] = 520
    return str(vl_convert.vegalite_to_svg(painted))
