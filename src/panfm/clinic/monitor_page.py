"""The page of one run of `panfm monitor`, and the charts of all runs: plain values in, a Page out.

report (drift.json), Drift, history  --build_page-->  Page  --page.render_html-->  drift.html
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from panfm.clinic.drift import MIN_PATIENTS, MIN_SHIFT, Check, Drift
from panfm.clinic.page import Page, Section

TITLES = {
    "no_drift": "no change found",
    "drift": "the images have changed",
    "too_few": "too few patients to tell",
}
NAMES = {
    "outliers": "Images unlike the fitted ones",
    "scores": "Outlier score as a whole",
    "features": "What the encoder sees (component that moved most)",
    "probabilities": "Predicted probabilities (class that moved most)",
}
NUM_CHARTED, NUM_LISTED = 52, 52  # runs: a year of weeks
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 44, 12, 12, 40  # of a chart, units of its view box
NORMAL_QUANTILES = 3.9 + 0.84  # of the largest of 32 shifts at a rate of 1 % after Holm, and of a power of 80 %


def build_page(
    report: Mapping[str, Any], drift: Drift, history: Sequence[Mapping[str, Any]], num_reference: int
) -> Page:
    """Build the page. num_reference: patients that the classifier was fitted on."""
    images, name = report["images"], report["classifier"]["name"]
    cautions = []
    if images["grouping"] == "image":
        cautions.append(
            "Patients are not known: every image counts as a patient of its own. Where a patient has several images, "
            "false alarms are more frequent than stated. Name a table with the columns image and patient."
        )
    if images["unreadable"]:
        cautions.append(f"{images['unreadable']} of the images could not be read and are not in the comparison.")
    sections = [Section("What was found, and what to do", points=tuple(report["advice"]))]
    if drift.checks:
        sections += [_describe_checks(report, drift), _describe_classes(report)]
    sections += [_describe_history(history), _describe_method(drift, num_reference)]
    compared = "" if images["compared"] is None else f"{images['compared']:,} images"
    people = f" of {images['patients']:,} patients" if images["patients"] is not None else ""
    lead = f"{compared}{people} against what {name}, version {report['classifier']['version']}, was fitted on."
    return Page(
        title=f"{report['label']}: {TITLES[drift.verdict]}",
        lead=lead if compared else f"Images against what {name} was fitted on.",
        warning=report["warning"],
        cautions=tuple(cautions),
        sections=tuple(sections),
        footer=f"panfm {report['panfm_version']}, {report['date']}. It names no image and no patient.",
    )


def _describe_checks(report: Mapping[str, Any], drift: Drift) -> Section:
    rows = tuple(
        (
            NAMES[check.name] + _name_largest(check, list(report["classes"])),
            f"{check.value:.1%}" if check.name == "outliers" else f"{check.value:.2f}",
            f"{check.expected:.1%}" if check.name == "outliers" else f"{check.expected:.2f}",
            f"{check.adjusted:.4f}" if check.adjusted >= 0.0005 else "below 0.0005",
            "ALARM" if check.is_alarm else "too small to matter" if check.adjusted <= drift.rate else "within chance",
        )
        for check in drift.checks
    )
    paragraphs = [
        "The first line is a share of images. The others say how a new image compares with a fitted one: 0.50 where "
        "nothing changed, 0.70 if in 70 of 100 pairs the new image has the higher value. The p-value is corrected for "
        "the number of comparisons."
    ]
    if report["unexpected_modality"] is not None:
        paragraphs.append(f"{report['unexpected_modality']:.0%} of the images look like another modality.")
    return Section(
        "Four comparisons", tuple(paragraphs), heads=("compared", "found", "expected", "p", "verdict"), rows=rows
    )


def _name_largest(check: Check, classes: Sequence[str]) -> str:
    if check.largest is None:
        return ""
    return f": {classes[check.largest]}" if check.name == "probabilities" else f": {check.largest + 1}"


def _describe_classes(report: Mapping[str, Any]) -> Section:
    return Section(
        "Classes",
        (
            "What the classifier says, not what the images show. A mean probability moves when the disease becomes "
            "more frequent and also when the camera changes.",
        ),
        heads=("class", "mean probability now", "when fitted", "named first now", "share of fitted images"),
        rows=tuple(
            (
                name,
                *(
                    f"{values[key]:.1%}"
                    for key in ("mean_probability", "mean_probability_when_fitted", "named_first", "share_of_fitted")
                ),
            )
            for name, values in report["classes"].items()
        ),
    )


def _describe_history(history: Sequence[Mapping[str, Any]]) -> Section:
    runs = history[-NUM_CHARTED:]
    charts = draw_series(runs, "outliers", 0.01, "share of images that are unlike the fitted ones") + draw_series(
        runs, "features", 0.5, "what the encoder sees: mean share of fitted images below, component that moved most"
    )
    rows = tuple(
        (
            str(run["label"]),
            str(run["version"]),
            "fewer than needed" if run["images"] is None else f"{run['images']:,}",
            "-" if run["outliers"] is None else f"{run['outliers']:.1%}",
            "-" if run["features"] is None else f"{run['features']:.2f}",
            "-" if run["probabilities"] is None else f"{run['probabilities']:.2f}",
            TITLES[run["verdict"]],
        )
        for run in reversed(history[-NUM_LISTED:])
    )
    return Section(
        "Over time",
        ("Triangles are alarms. The dashed line is what is expected where nothing changed.",),
        svg=charts,
        heads=("run", "version", "images", "unlike", "encoder", "probabilities", "verdict"),
        rows=rows,
    )


def _describe_method(drift: Drift, num_reference: int) -> Section:
    points = [
        f"Where nothing changed, at most {drift.rate:.1%} of the runs raise an alarm, whatever the number of images, "
        "as long as patients are named.",
        "Images of one patient are kept together, and the fitted images are a sample too: both widen what chance "
        "explains.",
        f"A shift counts from {MIN_SHIFT:g} on (0.45 or 0.55 instead of 0.50): with thousands of images every two "
        "sources differ a little.",
        f"Below {MIN_PATIENTS} patients nothing is computed and no figure is written.",
        "A classifier can fail on images that look as ever: a new kind of lesion, another way to diagnose. This page "
        "cannot see that; only images with a confirmed diagnosis can.",
    ]
    if drift.checks:
        visible = NORMAL_QUANTILES * np.sqrt((1 / drift.num_patients + 1 / num_reference) / 12)
        points.insert(
            3,
            f"With so many patients, a component that moved by less than about {min(visible, 0.5):.2f} is likely to go "
            "unseen" + ("; more patients show smaller changes." if visible > 0.1 else "."),
        )
    return Section("How it is judged", points=tuple(points))


def draw_series(runs: Sequence[Mapping[str, Any]], key: str, expected: float, said: str) -> str:
    """Draw one value over the runs; runs without it leave a gap, alarms of it are triangles."""
    values = [None if run[key] is None else float(run[key]) for run in runs]
    known = [value for value in values if value is not None]
    low = 0.0
    high = 1.0 if key != "outliers" else max([0.05, *known]) * 1.1
    span_x, span_y = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(place: int) -> float:
        return LEFT + span_x * ((place + 0.5) / max(len(runs), 1))

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - span_y * (value - low) / (high - low)

    def number(value: float) -> str:
        return f"{value:.0%}" if key == "outliers" else f"{value:.2f}"

    told = "; ".join(
        f"{run['label']}: {'none' if value is None else number(value)}" for run, value in zip(runs, values, strict=True)
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="reliability" style="width:min(100%,34rem)">',
        f"<title>{escape(said)}</title><desc>{escape(told)}</desc>",
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{span_x}" height="{span_y}"/>',
        f'<line class="ideal" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(expected):.1f}" y2="{y(expected):.1f}"/>',
    ]
    for tick in (low, high) if key == "outliers" else (low, 0.5, high):
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for place in range(1, len(runs)):
        before, now = values[place - 1], values[place]
        if before is not None and now is not None:
            parts.append(
                f'<line class="interval" x1="{x(place - 1):.1f}" y1="{y(before):.1f}" x2="{x(place):.1f}" '
                f'y2="{y(now):.1f}"/>'
            )
    for place, (run, value) in enumerate(zip(runs, values, strict=True)):
        if value is None:
            continue
        if key in run["alarms"]:
            at, top = x(place), y(value)
            corners = f"{at:.1f},{top - 7:.1f} {at - 7:.1f},{top + 6:.1f} {at + 7:.1f},{top + 6:.1f}"
            parts.append(f'<polygon points="{corners}" style="fill:var(--bad-ink)"/>')
        else:
            parts.append(f'<circle class="point" cx="{x(place):.1f}" cy="{y(value):.1f}" r="4"/>')
    ends = [(0, "start", LEFT)] + ([(len(runs) - 1, "end", WIDTH - RIGHT)] if len(runs) > 1 else [])
    for place, anchor, at in ends:
        text = escape(str(runs[place]["label"])[:24])
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{text}</text>')
    shown = "unlike the fitted images" if key == "outliers" else "what the encoder sees"
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{shown}</text></svg>')
    return "".join(parts)
