"""The board's drawings as static SVG: every encoder in its colour and place, the same bytes for the same rows."""

import re
from pathlib import Path

import pytest

import panfm.board
from panfm.board.figures import draw_critical_difference, draw_efficiency, draw_radar, draw_score_vs
from panfm.board.vega import SERIES, Spec, paint, read_bundle, render_svg

NAMES = [f"encoder {chr(97 + number)}" for number in range(10)]  # more than there are colours
STYLE = Path(panfm.board.__file__).parent / "templates" / "board_style.html.j2"


def draw_all(num: int = 10) -> dict[str, Spec]:
    names = list(enumerate(NAMES[:num]))
    return {
        "efficiency": draw_efficiency(
            [
                {"encoder": name, "series": n % 8, "task": task, "protocol": "linear_probe", "label_fraction": fraction,
                 "value": 0.7 + n / 100, "low": 0.6, "high": 0.9}
                for n, name in names for task in ("one", "two") for fraction in (0.1, 1.0)
            ]
        ),
        "score_vs": draw_score_vs(
            [
                {"encoder": name, "series": n % 8, "x": 10.0 ** (n + 1), "score": 0.5, "low": 0.4, "high": 0.6}
                for n, name in names
            ]
        ),
        "critical_difference": draw_critical_difference(
            [
                {"encoder": name, "series": n % 8, "mean_rank": 1.0 + n, "rank_low": n + 0.5, "rank_high": n + 2}
                for n, name in names
            ],
            [{"from": NAMES[0], "to": NAMES[1], "level": 0}],
        ),
        "radar": draw_radar(
            [
                {"encoder": name, "series": n % 8, "task": task, "value": 0.3 + n / 20, "order": order}
                for n, name in names[:6] for order, task in enumerate(("one", "two", "three"))
            ]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["efficiency", "score_vs", "critical_difference", "radar"])
def test_a_drawing_names_its_encoders_in_their_colours_and_repeats(kind: str) -> None:
    svg = render_svg(draw_all()[kind])
    shown = NAMES[:6] if kind == "radar" else NAMES
    assert all(name in svg for name in shown)
    used = set(re.findall(r"#[0-9a-f]{6}", svg))
    assert set(SERIES[: len(shown)]) <= used  # the ninth takes the first colour again
    assert svg == render_svg(draw_all()[kind])


def test_an_encoder_keeps_its_colour_whoever_stands_beside_it() -> None:
    rows = [{"encoder": "late", "series": 5}, {"encoder": "early", "series": 0}]
    spec = paint({"layer": [{"encoding": {"color": {"field": "encoder"}}}]}, rows)
    assert spec["layer"][0]["encoding"]["color"]["scale"] == {
        "domain": ["late", "early"], "range": [SERIES[5], SERIES[0]],
    }  # fmt: skip


def test_mean_ranks_stand_in_their_order_also_without_an_interval() -> None:
    rows = [
        {"encoder": "no interval", "series": 0, "mean_rank": 1.0, "rank_low": None, "rank_high": None},
        {"encoder": "second", "series": 1, "mean_rank": 2.0, "rank_low": 1.5, "rank_high": 2.5},
        {"encoder": "third", "series": 2, "mean_rank": 3.0, "rank_low": 2.5, "rank_high": 3.5},
    ]
    svg = render_svg(draw_critical_difference(rows))
    place = {name: svg.index(f">{name}</text>") for name in ("no interval", "second", "third")}
    heights = {
        name: float(re.findall(r"translate\([-\d.]+,([-\d.]+)\)[^<]*>", svg[: at + 1])[-1])
        for name, at in place.items()
    }
    assert heights["no interval"] < heights["second"] < heights["third"]


def test_the_paper_has_the_pages_colours_and_the_bundle_fetches_nothing() -> None:
    light = STYLE.read_text().split("prefers-color-scheme")[0]
    assert tuple(re.findall(r"--s\d: (#[0-9a-f]{6});", light)) == SERIES
    assert "vegaEmbed" in read_bundle() and not re.findall(
        r"https?://(?!www\.w3\.org|vega\.github\.io|github\.com)", read_bundle()
    )
