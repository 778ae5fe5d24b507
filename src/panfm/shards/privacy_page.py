"""The privacy report as a page: its parts, and how they become Markdown and the same as HTML.

    PrivacyReport (a SetReport a shard set, of Sections) -> render_markdown, render_page -> write_privacy_report

Texts come from cards and cells that other people wrote; none of them becomes markup.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panfm.errors import UserError
from panfm.files import write_text
from panfm.pages import build_environment
from panfm.shards.review import TEMPLATES

OPEN = "OPEN"

PSEUDONYMISED = (
    "These data are pseudonymised, not anonymous: whoever holds the key (or, for public sources, the published ids), "
    "or knows enough of the metadata below, may find a patient again; and pixels can be recognised. Treat them as "
    "personal data."
)
FLOW = (
    ("Raw archive", "images, tables, names, dates, file names, DICOM headers", "nothing; it is read, never changed"),
    (
        "Shards",
        "pixels without embedded metadata; the fields below; keyed hashes instead of ids; days instead of dates",
        "nothing, unless you copy the folder",
    ),
    ("Features", "one vector an image, computed by an encoder, by hashed key", "nothing, unless you copy the folder"),
    ("Weights", "an encoder trained on the images; it may remember some of them", "nothing, unless exported"),
    (
        "Export",
        "the encoder's weights, names and licences of its sources; no images, no rows",
        "what you hand over, for a permitted use only",
    ),
)


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then a table, then points."""

    title: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    points: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetReport:
    """What the page says about one shard set."""

    source: str
    title: str
    synthetic: bool
    open_points: tuple[str, ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class PrivacyReport:
    """The page: one part a shard set."""

    sets: tuple[SetReport, ...]

    @property
    def num_open(self) -> int:
        """Points that somebody must answer."""
        return sum(len(one.open_points) for one in self.sets)


def write_privacy_report(report: PrivacyReport, out: str | Path) -> tuple[Path, Path]:
    """Write `out` (.md) and the same page beside it as .html; return both paths."""
    out = Path(out)
    if out.suffix != ".md":
        raise UserError(f"{out}: the report is Markdown, with a page of the same name beside it; end the name in .md")
    page = out.with_suffix(".html")
    write_text(page, render_page(report))
    write_text(out, render_markdown(report))
    return out, page


def render_page(report: PrivacyReport) -> str:
    """Render the page as one HTML file that fetches nothing."""
    template = build_environment(TEMPLATES).get_template("privacy.html.j2")
    return template.render(report=report, pseudonymised=PSEUDONYMISED, flow=FLOW, marker=OPEN).rstrip() + "\n"


def render_markdown(report: PrivacyReport) -> str:
    """Render the same page as Markdown."""
    lines = ["# Privacy report", "", PSEUDONYMISED, "", "## Open points", ""]
    for one in report.sets:
        lines += [f"- **{_escape(one.source)}**: {_escape(point)}" for point in one.open_points]
    lines += ["" if report.num_open else "None.\n", "## Data flow", ""]
    lines += [*_format_table(Table(("Step", "Holds", "Leaves the house"), FLOW)), ""]
    for one in report.sets:
        lines += [f"## {_escape(one.source)}: {_escape(one.title)}", ""]
        lines += ["Drawn by a program: no patients.", ""] if one.synthetic else []
        for section in one.sections:
            lines += [f"### {section.title}", ""]
            lines += [part for paragraph in section.paragraphs for part in (_escape(paragraph), "")]
            lines += [*_format_table(section.table), ""] if section.table else []
            lines += [*(f"- {_escape(point)}" for point in section.points), ""] if section.points else []
    return "\n".join(lines).rstrip() + "\n"


def _format_table(table: Table) -> list[str]:
    rows: list[Any] = [table.heads, ("---",) * len(table.heads)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return lines + ["| " + " | ".join(map(_escape, row)) + " |" for row in table.rows]


def _escape(text: str) -> str:
    """Other people's text (cards, cells) must not become markup."""
    plain = " ".join(text.split())
    for mark in ("\\", "|", "`", "*", "_", "[", "]", "<"):
        plain = plain.replace(mark, f"\\{mark}")
    return plain
