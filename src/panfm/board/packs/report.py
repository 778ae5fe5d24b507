"""What `panfm leaderboard verify` says: reports of packs in; a table, plain lines and a JSON file out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from panfm.board.packs.check import Finding, PackReport
from panfm.board.packs.facts import AGREEMENT
from panfm.board.words import ORIGINS
from panfm.files import write_json


def format_findings(reports: Sequence[PackReport]) -> Table:
    """One row a Result: who, on what, what was recomputed, what was found."""
    table = Table(title="Submitted results", title_justify="left")
    for head in ("Pack", "Encoder", "Task", "Protocol", "Recomputed metrics", "Found", "Test images"):
        table.add_column(head, overflow="fold")
    for report in reports:
        for place, one in enumerate(report.findings):
            found = "REFUSED" if one.origin is None else one.origin.replace("_", "-")
            metrics = str(one.num_metrics) if one.num_metrics else "–"
            pack = report.path.name if place == 0 else ""
            texts = (pack, one.encoder, one.task, _describe_protocol(one), metrics, found, one.images or "–")
            table.add_row(*map(Text, texts), end_section=place == len(report.findings) - 1)
    return table


def describe_reports(reports: Sequence[PackReport]) -> list[str]:
    """Every refusal as one line, then a line a pack."""
    lines = [f"refused: {refusal}" for report in reports for refusal in report.refusals]
    for report in reports:
        if report.refusals:
            lines.append(f"{report.path}: {len(report.refusals)} refused, the pack is not accepted")
            continue
        counts: Counter[str | None] = Counter(one.origin for one in report.findings)
        said = ", ".join(f"{counts[origin]} {words}" for origin, words in ORIGINS.items() if counts[origin])
        where = f"; accepted as {report.accepted}" if report.accepted is not None else ""
        lines.append(f"{report.path}: {said}{where}")
        if counts["verified"]:
            lines.append(f"  verified: every metric within {AGREEMENT:g} (above 1: of its value) of your own run")
        if report.contact is not None:
            lines.append(f"  contact: {report.contact}")
    return lines


def write_report(path: Path, reports: Sequence[PackReport]) -> None:
    """Write the reports as JSON, atomically."""
    packs = [
        {
            **asdict(report),
            "path": str(report.path),
            "accepted": None if report.accepted is None else str(report.accepted),
        }
        for report in reports
    ]
    write_json(path, {"report_version": 1, "refused": sum(len(one.refusals) for one in reports), "packs": packs})


def _describe_protocol(one: Finding) -> str:
    variant = "" if one.variant == "default" else f" ({one.variant})"
    run = "" if one.draw is None else f", draw {one.draw}, seed {one.seed}"
    return f"{one.protocol}{variant}, {one.label_fraction * 100:g} % of labels{run}"
