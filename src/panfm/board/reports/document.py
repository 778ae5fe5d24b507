"""A written page in plain values, and its two faces: Document in, Markdown and one HTML file out.

    Document (banner, sections of paragraphs, tables, points, figures) -> render_markdown, render_html

Model card, paper and pictures are Documents. What nobody recorded or measured is said with one of two marks, shown as
such and counted at the top: a gap that can be seen gets filled. Names are other people's text: they are escaped in both
faces. No dates, no paths: equal values give equal bytes.
"""

import base64
import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from panfm.board.render import build_environment
from panfm.evaluation.results import make_folder_name
from panfm.files import write_text

NOT_RECORDED = "not recorded"  # a fact that a file could hold and does not
NOT_MEASURED = "not measured"  # a number that a run could give and none has
BLANKS = (NOT_RECORDED, NOT_MEASURED)
NO_DIAGNOSIS = "For research, not a diagnosis: no decision about a patient may rest on it, and it is no medical device."


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Something to type."""

    text: str
    language: str


@dataclass(frozen=True)
class Table:
    """A table of texts: the first cell of a row names it. name: of its file tables/NAME.csv, where it has one."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str | None = None
    name: str | None = None
    folded: bool = False  # long and for reference: closed in the page until somebody opens it

    @property
    def path(self) -> str:
        """Where its CSV lies beside the page; names of tasks are other people's text."""
        return f"tables/{make_folder_name(self.name or '')}.csv"


@dataclass(frozen=True)
class Figure:
    """A drawing beside its numbers: figures/NAME.svg and figures/NAME.csv."""

    name: str
    title: str
    description: str  # what it shows, for somebody who cannot see it
    svg: str
    csv: str

    @property
    def path(self) -> str:
        """Where it lies beside the page, without its ending; names of tasks are other people's text."""
        return f"figures/{make_folder_name(self.name)}"


Block = Paragraph | Heading | Points | Code | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def slug(self) -> str:
        """Its anchor, as Markdown readers make it from the title."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """A page. front: metadata block before the Markdown, as it stands. cautions: what must be read first."""

    title: str
    lead: str
    cautions: tuple[str, ...]
    sections: tuple[Section, ...]
    footer: str
    front: str = ""

    @property
    def blanks(self) -> tuple[str, ...]:
        """Where something is not recorded or not measured: 'Section: row, column', in the order of the page."""
        return tuple(f"{section.title}: {name}" for section in self.sections for name in _find_blanks(section.blocks))

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All drawings, in the order of the page."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Figure))

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables that have files of their own, in the order of the page."""
        blocks = (block for section in self.sections for block in section.blocks)
        return tuple(block for block in blocks if isinstance(block, Table) and block.name)


def is_blank(text: str) -> bool:
    """Whether a cell or point says that something is not there."""
    return text.startswith(BLANKS)


def describe_blanks(document: Document) -> str:
    """Count the blanks by section, in one sentence."""
    blanks = document.blanks
    if not blanks:
        return "Blanks: none."
    places: dict[str, int] = {}
    for blank in blanks:
        section = blank.partition(": ")[0]
        places[section] = places.get(section, 0) + 1
    where = ", ".join(f"{section} {count}" for section, count in places.items())
    return (
        f"Blanks: {len(blanks)} ({where}). Each says '{NOT_RECORDED}' or '{NOT_MEASURED}' in its place; none was "
        "guessed."
    )


def _find_blanks(blocks: Iterable[Block]) -> Iterable[str]:
    for block in blocks:
        if isinstance(block, Table):
            for row in block.rows:
                for head, cell in zip(block.heads[1:], row[1:], strict=True):
                    if is_blank(cell):
                        yield row[0] if len(row) == 2 else f"{row[0]}, {head}"
        elif isinstance(block, Points):
            yield from (item for item in block.items if is_blank(item))
        elif isinstance(block, Paragraph) and is_blank(block.text):
            yield block.text


# ------------------------------------------------------------------------------------------------ faces


def write_files(document: Document, out: Path) -> None:
    """Write what stands beside the page: figures/NAME.svg with NAME.csv, and tables/NAME.csv."""
    for figure in document.figures:
        write_text(out / f"{figure.path}.svg", figure.svg)
        write_text(out / f"{figure.path}.csv", figure.csv)
    for table in document.tables:
        write_text(out / table.path, format_csv(table.heads, table.rows))


def format_csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format rows as CSV: numbers to six digits, None as nothing, no cell that a spreadsheet would run."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        writer.writerow([_to_cell(value) for value in row])
    return buffer.getvalue()


def _to_cell(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6)  # the last bits of a sum depend on the machine
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return "" if value is None else value


def render_markdown(document: Document) -> str:
    """Render the page as Markdown (GitHub's tables); figures are links to their files."""
    lines = [document.front.rstrip(), ""] if document.front else []
    lines += [f"# {escape_markdown(document.title)}", "", escape_markdown(document.lead), ""]
    lines += [line for caution in document.cautions for line in (f"> **{escape_markdown(caution)}**", ">")]
    lines += [f"> {escape_markdown(describe_blanks(document))}", ""]
    for section in document.sections:
        lines += [f"## {escape_markdown(section.title)}", ""]
        for block in section.blocks:
            lines += [*_format_block(block), ""]
    lines += ["---", "", escape_markdown(document.footer)]
    return "\n".join(lines).rstrip() + "\n"


def render_html(document: Document) -> str:
    """Render the page as one HTML file that fetches nothing; figures lie inside it."""
    template = build_environment().get_template("document.html.j2")
    pictures = {
        figure.name: "data:image/svg+xml;base64," + base64.b64encode(figure.svg.encode()).decode()
        for figure in document.figures
    }
    blanks = describe_blanks(document)
    return (
        template.render(
            document=document,
            blanks=blanks,
            pictures=pictures,
            is_blank=is_blank,
            kind=lambda block: type(block).__name__,
        ).rstrip()
        + "\n"
    )


def _format_block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [_mark(block.text)]
    if isinstance(block, Heading):
        return [f"### {escape_markdown(block.text)}"]
    if isinstance(block, Points):
        return [f"- {_mark(item)}" for item in block.items] or ["None."]
    if isinstance(block, Code):
        return [f"```{block.language}", block.text, "```"]
    if isinstance(block, Figure):
        return [
            f"![{escape_markdown(block.description)}]({block.path}.svg)",
            "",
            f"{escape_markdown(block.title)} ([numbers]({block.path}.csv))",
        ]
    lines = [f"**{escape_markdown(block.caption)}**", ""] if block.caption else []
    lines += ["| " + " | ".join(map(escape_markdown, block.heads)) + " |", "|" + "---|" * len(block.heads)]
    return lines + ["| " + " | ".join(map(_mark, row)) + " |" for row in block.rows]


def _mark(text: str) -> str:
    return f"**{escape_markdown(text)}**" if is_blank(text) else escape_markdown(text)


def escape_markdown(text: str) -> str:
    """Other people's text must become neither markup nor HTML, nor break a table."""
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return escape(" ".join(text.split()), quote=False)
