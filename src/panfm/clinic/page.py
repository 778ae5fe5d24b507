"""A page in plain values and its two faces: Page in, Markdown and one HTML file that fetches nothing out.

Page (title, warning, cautions, sections)  --render_markdown, render_html-->  report.md, report.html
reliability bins  --draw_reliability-->  inline SVG
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markupsafe import Markup

from panfm.measures.calibration import ReliabilityBin
from panfm.measures.intervals import Estimate
from panfm.pages import build_environment

TEMPLATES = Path(__file__).parent / "templates"
NARROW = "\u00a0"  # a blank at which no line ends: an interval stays whole
SIDE, MARGIN = 320, 46  # of the picture, units of its view box


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order. svg: a drawing made of numbers alone, already markup."""

    title: str
    paragraphs: tuple[str, ...] = ()
    svg: str = ""
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    points: tuple[str, ...] = ()
    code: str = ""

    @property
    def markup(self) -> Markup:
        """The drawing, which is made of numbers alone and needs no escaping."""
        return Markup(self.svg)  # noqa: S704


@dataclass(frozen=True)
class Page:
    """warning: the research banner. cautions: what must be read before any figure."""

    title: str
    lead: str
    warning: str
    cautions: tuple[str, ...]
    sections: tuple[Section, ...]
    footer: str


def show(estimate: Estimate, *, percent: bool = False) -> str:
    """Show a value with its interval, and what must be said beside them."""
    if estimate.value is None:
        return estimate.reason or "undefined"

    def number(value: float) -> str:
        return f"{100 * value:.0f}{NARROW}%" if percent else f"{value:.2f}"

    text = number(estimate.value)
    if estimate.low is not None and estimate.high is not None:
        text += f" ({number(estimate.low)}{NARROW}to{NARROW}{number(estimate.high)})"
    return f"{text}; {estimate.reason}" if estimate.reason else text


def render_html(page: Page) -> str:
    """One file: style and drawings inside, everything escaped, no script."""
    return build_environment(TEMPLATES).get_template("page.html.j2").render(page=page).rstrip() + "\n"


def render_markdown(page: Page) -> str:
    """The same page as Markdown; a drawing is left out, its table says the same."""
    lines = [f"# {_plain(page.title)}", "", _plain(page.lead), "", f"> **{_plain(page.warning)}**"]
    for caution in page.cautions:
        lines += [">", f"> {_plain(caution)}"]
    for section in page.sections:
        lines += ["", f"## {_plain(section.title)}"]
        for paragraph in section.paragraphs:
            lines += ["", _plain(paragraph)]
        if section.rows:
            lines += ["", _row(section.heads), _row(["---"] * len(section.heads)), *map(_row, section.rows)]
        if section.points:
            lines += ["", *(f"- {_plain(point)}" for point in section.points)]
        if section.code:
            lines += ["", "```", section.code, "```"]
    return "\n".join([*lines, "", _plain(page.footer)]) + "\n"


def draw_reliability(bins: Sequence[ReliabilityBin], judged: str) -> str:
    """Draw the bins' shares with intervals against their mean probability; the diagonal is perfect calibration."""
    span = SIDE - 2 * MARGIN

    def x(value: float) -> str:
        return f"{MARGIN + span * value:.1f}"

    def y(value: float) -> str:
        return f"{SIDE - MARGIN - span * value:.1f}"

    said = f"Of {judged}: " + "; ".join(
        f"at {one.confidence:.2f} {one.right.value or 0:.2f} were right" for one in bins
    )
    parts = [
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" class="reliability"><title>Reliability</title>',
        f"<desc>{escape(said)}</desc>",
        f'<rect class="frame" x="{MARGIN}" y="{MARGIN}" width="{span}" height="{span}"/>',
        f'<line class="ideal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>',
    ]
    for tick in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{x(tick)}" y="{SIDE - MARGIN + 16}" text-anchor="middle">{tick:g}</text>')
        parts.append(
            f'<text x="{MARGIN - 8}" y="{y(tick)}" text-anchor="end" dominant-baseline="middle">{tick:g}</text>'
        )
    for one in bins:
        if one.right.value is None:
            continue
        if one.right.low is not None and one.right.high is not None:
            place = x(one.confidence)
            parts.append(
                f'<line class="interval" x1="{place}" y1="{y(one.right.low)}" x2="{place}" y2="{y(one.right.high)}"/>'
            )
        parts.append(f'<circle class="point" cx="{x(one.confidence)}" cy="{y(one.right.value)}" r="4"/>')
    middle = SIDE / 2
    parts += [
        f'<text x="{middle:g}" y="{SIDE - 8}" text-anchor="middle">mean probability</text>',
        f'<text x="14" y="{middle:g}" text-anchor="middle" transform="rotate(-90 14 {middle:g})">'
        "share that was right</text>",
        "</svg>",
    ]
    return "".join(parts)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") if cell != "---" else cell for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text of people's own labels as text: no markup of Markdown or HTML begins in it."""
    return re.sub(r"([\\`*_<\[\]#])", r"\\\1", " ".join(text.split()))
