"""The board's faces: a LeaderboardSummary in; page, Markdown, CSV, JSON and the terminal's table out.

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

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from panfm.evaluation.charts import EFFICIENCY_HEIGHT, compute_efficiencies, compute_forests, get_series
from panfm.evaluation.standings import Cell, LeaderboardSummary, Row, Section

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
    "reason",
    "runs",
    "spread_between_runs",
    "labelled_groups",
    "test_images",
    "test_groups",
    "group_kind",
    "reference",
    "difference",
    "difference_low",
    "difference_high",
    "contamination",
    "counts_for_claims",
    "audit_choice",
    "seen_test_images",
    "value_without_seen",
    "audit_reason",
)
PROTOCOLS = {
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbours",
    "prototype": "Nearest class mean",
    "finetune": "Fine-tuning",
    "metadata_fusion": "Linear probe with metadata",
    "panderm_compat": "As PanDerm's code, to compare with its numbers",
    "dinov2_compat": "As DINOv2's code, to compare with its numbers",
}
CONTAMINATION = {
    "excluded": "test patients kept out of pretraining",
    "none": "no skin images in pretraining",
    "unknown": "pretraining overlap unknown",
}
RESEARCH_ONLY = (
    "For research only. These numbers compare image encoders; they do not show that any of them is safe or useful for "
    "the care of patients."
)


def render_page(summary: LeaderboardSummary) -> str:
    """Render the static page: one HTML file that fetches nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, signed=_signed, percent=_percent, count=_count)
    series = get_series(summary)
    page = environment.get_template("leaderboard.html.j2").render(
        summary=summary,
        series=series,
        forests={section.slug: compute_forests(section, series) for section in summary.sections},
        efficiencies=compute_efficiencies(summary, series),
        efficiency_height=EFFICIENCY_HEIGHT,
        tasks={task.name: task for section in summary.sections for task in section.tasks},
        cards={row.encoder.name: row.encoder for section in summary.sections for row in section.rows},
        contamination_titles=CONTAMINATION,
        research_only=RESEARCH_ONLY,
        describe_protocol=describe_protocol,
        protocol_titles=PROTOCOLS,
        describe_unranked=describe_unranked,
        describe_winner=describe_winner,
        is_shared=is_shared,
        is_best=is_best,
        list_contamination=list_contamination,
        describe_audit=describe_audit,
    )
    return page.rstrip() + "\n"


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
            rank, score = _describe_rank(section, row), _describe_score(row)
            cells = " | ".join(_describe_cell(cell) for cell in row.cells)
            lines.append(f"| {rank} | {_escape_markdown(row.encoder.name)} | {score} | {cells} |")
        lines.append("")
        for row in section.rows:
            if row.reason:
                lines.append(f"- {_escape_markdown(row.encoder.name)}: no rank, {_escape_markdown(row.reason)}")
            for task, cell in zip(section.tasks, row.cells, strict=True):
                if (found := describe_audit(cell)) is not None:
                    name = f"{row.encoder.name}, {task.title}"
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
            lines.append(f"| {' | '.join(map(_escape_markdown, texts))} | {_number(entry.value)} |")
        lines.append("")
    lines.append(
        "Brackets: 95 % interval of 2,000 bootstrap samples of whole patients. Mean score: 0 = chance, 1 = perfect."
    )
    return "\n".join(lines) + "\n"


def render_csv(summary: LeaderboardSummary) -> str:
    """Render one line an encoder and task of each section."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section in summary.sections:
        for row in section.rows:
            place = row.standing
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
                    *(cell.value, cell.low, cell.high, cell.reason, cell.num_runs, cell.spread, cell.num_train_groups),
                    *(task.num_test, task.num_test_groups, task.group_kind, section.reference),
                    *((gap.difference, gap.low, gap.high) if gap else (None, None, None)),
                    *(cell.contamination, task.claim),
                    *((audit.choice, audit.num_seen, audit.value, audit.reason) if audit else (None,) * 4),
                ]
                writer.writerow([_to_spreadsheet(value) for value in values])
    return buffer.getvalue()


def render_json(summary: LeaderboardSummary) -> str:
    """Render everything that the page is made of."""
    plain = {"leaderboard_version": 1, **_round(asdict(summary))}
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
            cells = [_describe_cell(row.cells[places[name]]) if name in places else "" for name in shown]
            texts = [kind, protocol, _describe_rank(section, row), row.encoder.name, _describe_score(row), *cells]
            table.add_row(*map(Text, texts), end_section=last)
    return table


def describe_protocol(section: Section) -> str:
    """Name a section's protocol and labels: 'Linear probe, 10 % of labels'."""
    name = PROTOCOLS.get(section.protocol, section.protocol)
    variant = "" if section.variant == "default" else f" ({section.variant})"
    return f"{name}{variant}, {section.label_fraction * 100:g} % of labels"


def describe_winner(section: Section) -> str:
    """Say in one sentence who leads, and whether the data can tell."""
    leaders = [row.encoder.name for row in section.rows if row.standing and row.standing.rank == 1]
    num_ranked = sum(row.standing is not None for row in section.rows)
    if not leaders:
        return f"No ranking: {section.rows[0].reason}."
    if len(leaders) == 1:
        return f"{leaders[0]} leads: its mean score is above that of every other ranked encoder, beyond chance."
    names = f"{', '.join(leaders[:-1])} and {leaders[-1]}"
    if len(leaders) == num_ranked:
        return f"{names} share the first place: these patients cannot tell any of them apart."
    return f"{names} share the first place: these patients cannot tell them apart."


def describe_unranked(section: Section) -> str:
    """Say which encoders stand outside the ranking, if some are ranked; else nothing."""
    outside = [row.encoder.name for row in section.rows if row.standing is None]
    if not outside or len(outside) == len(section.rows):
        return ""
    return f"Not ranked, because tasks are missing: {', '.join(outside)}."


def is_shared(section: Section, row: Row) -> bool:
    """Whether other encoders of the section have this row's rank too."""
    same = [other for other in section.rows if other.standing and row.standing]
    return sum(other.standing.rank == row.standing.rank for other in same if other.standing and row.standing) > 1


def is_best(section: Section, place: int, cell: Cell) -> bool:
    """Whether a cell holds the best value of its task in the section."""
    values = [row.cells[place].value for row in section.rows]
    known = [value for value in values if value is not None]
    if cell.value is None or len(known) < 2:
        return False
    higher = section.tasks[place].perfect > section.tasks[place].chance
    return cell.value == (max(known) if higher else min(known))


def list_contamination(section: Section, row: Row) -> list[tuple[str, str]]:
    """Say what is known of an encoder's pretraining and these tests: (kind, words), one for each kind that occurs."""
    found = [cell.contamination for cell in row.cells if cell.num_runs]
    kinds = [kind for kind in ("unknown", "excluded", "none") if kind in found]
    if len(kinds) == 1:
        return [(kinds[0], CONTAMINATION[kinds[0]])]
    return [(kind, f"{CONTAMINATION[kind]} ({found.count(kind)} of {len(found)} tasks)") for kind in kinds]


def describe_audit(cell: Cell) -> tuple[str, str] | None:
    """Say what an audit found for a cell: (badge, words); None where no audit was read or nothing was measured."""
    audit = cell.audit
    if audit is None or cell.num_runs == 0:
        return None
    if audit.num_seen is None:
        return "unknown", f"not audited: {audit.reason}"
    if audit.num_seen == 0:
        left_out = "kept out of pretraining" if audit.choice == "excluded" else "none found"
        return "excluded", f"audit: copies of test images {left_out}"
    value = f"without them {_number(audit.value)}" if audit.value is not None else f"without them: {audit.reason}"
    share = _percent(audit.num_seen / audit.num_test)
    return "unknown", f"audit: {audit.num_seen} of {audit.num_test} test images ({share}) in pretraining; {value}"


def _describe_rank(section: Section, row: Row) -> str:
    if row.standing is None:
        return "–"
    rank = f"{'=' if is_shared(section, row) else ''}{row.standing.rank}"
    if row.standing.rank_low is None:
        return rank
    return f"{rank} [{row.standing.rank_low}–{row.standing.rank_high}]"


def _describe_score(row: Row) -> str:
    if row.standing is None:
        return "–"
    return _with_interval(row.standing.score, row.standing.score_low, row.standing.score_high)


def _describe_cell(cell: Cell) -> str:
    if cell.value is None:
        return "missing" if cell.num_runs == 0 else "undefined"
    return _with_interval(cell.value, cell.low, cell.high)


def _with_interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{value * 100:.3g} %"


def _count(value: float | None) -> str:
    """Format a large count: 5.5 M."""
    if value is None:
        return "unknown"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


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
