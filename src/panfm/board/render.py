"""The board's tables: a LeaderboardSummary in; Markdown, CSV, JSON and the terminal's table out (`page`: the page).

Each is a pure function of the summary, without dates or paths: equal numbers give equal bytes. Encoder names are other
people's text: they are escaped in the page and in Markdown, and cannot become a formula in a spreadsheet.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.table import Table
from rich.text import Text

from panfm import pages
from panfm.board.summary import LeaderboardSummary, Task
from panfm.board.words import (
    ORIGINS,
    RESEARCH_ONLY,
    describe_audit,
    describe_cell,
    describe_protocol,
    describe_rank,
    describe_score,
    describe_winner,
    format_count,
    format_number,
    format_percent,
    format_signed,
)

TEMPLATES = Path(__file__).parent / "templates"
DIGITS = 6  # in CSV and JSON: the last bits of a sum depend on the machine
MAX_TERMINAL_TASKS = 4

CSV_COLUMNS = (
    "images",
    "protocol",
    "variant",
    "label_fraction",
    "encoder",
    "rank",
    "rank_low",
    "rank_high",
    "mean_score",
    "mean_score_low",
    "mean_score_high",
    "beats_share",
    "task",
    "task_version",
    "metric",
    "value",
    "low",
    "high",
    "method",
    "reason",
    "runs",
    "spread_between_runs",
    "labelled_groups",
    "unit",
    "test_units",
    "test_groups",
    "group_kind",
    "reference",
    "difference",
    "difference_low",
    "difference_high",
    "difference_method",
    "difference_reason",
    "p_value",
    "p_adjusted",
    "mean_score_difference",
    "mean_score_difference_low",
    "mean_score_difference_high",
    "mean_score_p_adjusted",
    "contamination",
    "origin",
    "counts_for_claims",
    "audit_choice",
    "seen_test_images",
    "value_without_seen",
    "audit_reason",
)


def build_environment() -> Environment:
    """Build what turns the board's templates into pages, with its formats of numbers."""
    environment = pages.build_environment(TEMPLATES)
    environment.filters.update(number=format_number, signed=format_signed, percent=format_percent, count=format_count)
    return environment


def list_board_tasks(summary: LeaderboardSummary) -> dict[str, Task]:
    """All tasks of the board by the name of their page, in its order."""
    return dict(sorted((task.slug, task) for section in summary.sections for task in section.tasks))


def render_markdown(summary: LeaderboardSummary) -> str:
    """Render one table a section: rank, mean score, and every task with its 95 % interval."""
    lines = ["# Leaderboard", "", RESEARCH_ONLY, ""]
    for section in summary.sections:
        kind = "Synthetic (drawn) images" if section.synthetic else "Real images"
        lines += [f"## {kind}: {describe_protocol(section)}", "", _escape_markdown(describe_winner(section)), ""]
        heads = [f"{_escape_markdown(task.title)} ({task.metric_title})" for task in section.tasks]
        lines.append("| Rank | Encoder | Mean score | " + " | ".join(heads) + " |")
        lines.append("|---|---|---|" + "---|" * len(heads))
        for row in section.rows:
            rank, score = describe_rank(section, row), describe_score(row)
            cells = " | ".join(describe_cell(cell) for cell in row.cells)
            lines.append(f"| {rank} | {_escape_markdown(row.encoder.name)} | {score} | {cells} |")
        lines.append("")
        for row in section.rows:
            if row.reason:
                lines.append(f"- {_escape_markdown(row.encoder.name)}: no rank, {_escape_markdown(row.reason)}")
            for task, cell in zip(section.tasks, row.cells, strict=True):
                name = f"{row.encoder.name}, {task.title}"
                if cell.reason is not None and cell.num_runs > 0:
                    lines.append(f"- † {_escape_markdown(name)}: {_escape_markdown(cell.reason)}")
                if cell.label_note is not None:
                    lines.append(f"- {_escape_markdown(name)}: {_escape_markdown(cell.label_note)}")
                if cell.origin != "recomputed":
                    lines.append(f"- {_escape_markdown(name)}: {ORIGINS[cell.origin]}")
                if (found := describe_audit(cell)) is not None:
                    lines.append(f"- {_escape_markdown(name)}: {_escape_markdown(found[1])}")
        for task in section.tasks:
            if not task.claim:
                note = f": {task.claim_note}" if task.claim_note else ""
                lines.append(f"- {_escape_markdown(task.title)} checks the pipeline only{_escape_markdown(note)}")
        lines.append("")
    if summary.development:
        lines += ["## Development folds (recipes were chosen on these; never ranked)", ""]
        lines += ["| Encoder | Task | Protocol | Labels | Metric | Mean |", "|---|---|---|---|---|---|"]
        for entry in summary.development:
            protocol = f"{entry.protocol} ({entry.variant})" if entry.variant != "default" else entry.protocol
            texts = (entry.encoder, entry.task, protocol, f"{entry.label_fraction * 100:g} %", entry.metric)
            lines.append(f"| {' | '.join(map(_escape_markdown, texts))} | {format_number(entry.value)} |")
        lines.append("")
    lines.append(
        "Brackets: 95 % interval; it holds the choice of test patients and, from 3 draws on, that of labelled ones "
        "(how: column `method` of leaderboard.csv). Mean score: 0 = chance, 1 = perfect."
    )
    return "\n".join(lines) + "\n"


def render_csv(summary: LeaderboardSummary) -> str:
    """Render one line an encoder and task of each section."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section in summary.sections:
        for row in section.rows:
            place, over = row.standing, row.over_tasks
            standing = (
                [
                    place.rank,
                    place.rank_low,
                    place.rank_high,
                    place.score,
                    place.score_low,
                    place.score_high,
                    place.borda,
                ]
                if place
                else [None] * 7
            )
            for task, cell in zip(section.tasks, row.cells, strict=True):
                gap, audit = cell.difference, cell.audit
                values = [
                    *("synthetic" if section.synthetic else "real", section.protocol, section.variant),
                    *(section.label_fraction, row.encoder.name, *standing, task.name, task.version, task.metric),
                    *(cell.value, cell.low, cell.high, cell.method, cell.reason),
                    *(cell.num_runs, cell.spread, cell.num_train_groups),
                    *(task.unit, task.num_test, task.num_test_groups, task.group_kind, section.reference),
                    *((gap.difference, gap.low, gap.high, gap.method, gap.reason) if gap else (None,) * 5),
                    *((gap.p_value, gap.p_adjusted) if gap else (None, None)),
                    *((over.difference, over.low, over.high, over.p_adjusted) if over else (None,) * 4),
                    *(cell.contamination, cell.origin if cell.num_runs else None, task.claim),
                    *((audit.choice, audit.num_seen, audit.value, audit.reason) if audit else (None,) * 4),
                ]
                writer.writerow([_to_spreadsheet(value) for value in values])
    return buffer.getvalue()


def render_json(summary: LeaderboardSummary) -> str:
    """Render everything that the page is made of."""
    plain = {"leaderboard_version": 2, **_round(asdict(summary))}
    return json.dumps(plain, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def format_table(summary: LeaderboardSummary) -> Table:
    """Format the sections as one table for a terminal; tasks are columns where there are few enough to read."""
    names = sorted({task.name for section in summary.sections for task in section.tasks})
    shown = names if len(names) <= MAX_TERMINAL_TASKS else []
    table = Table(title="Leaderboard (95 % intervals, test patients)", caption=RESEARCH_ONLY, title_justify="left")
    for head in ("Images", "Protocol", "Rank", "Encoder", "Mean score"):
        table.add_column(head, overflow="fold")
    for name in shown:
        table.add_column(Text(name), overflow="fold")
    for section in summary.sections:
        places = {task.name: place for place, task in enumerate(section.tasks)}
        for number, row in enumerate(section.rows):
            last = number == len(section.rows) - 1
            kind = ("synthetic" if section.synthetic else "real") if number == 0 else ""
            protocol = describe_protocol(section) if number == 0 else ""
            cells = [describe_cell(row.cells[places[name]]) if name in places else "" for name in shown]
            texts = [kind, protocol, describe_rank(section, row), row.encoder.name, describe_score(row), *cells]
            table.add_row(*map(Text, texts), end_section=last)
    return table


def _escape_markdown(text: str) -> str:
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return escape(" ".join(text.split()), quote=False)


def _to_spreadsheet(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"  # a spreadsheet would run it as a formula
    return "" if value is None else value


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_round(item) for item in value]
    return value if not hasattr(value, "model_dump") else _round(value.model_dump(mode="json"))
