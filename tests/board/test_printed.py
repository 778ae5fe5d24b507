"""Printed numbers beside measured ones: where they compare, greyed rows; else lines; never a rank."""

from pathlib import Path

from panfm.board.printed import build_printed_rows, list_printed, read_printed
from panfm.board.standings import compute_standings
from panfm.evaluation.published import Publication, collect_published
from tests.board.fabricated import GOOD, RANDOM, write_trial

TASK = "ham10000_diagnosis"
AUROCS = {"PanDerm": 0.981, "DermLIP-PanDerm": 0.981, "DINOv3-L": 0.976}  # DermFM-Zero's table of HAM-official


def make_publication(*numbers: dict[str, object], **table: object) -> Publication:
    return Publication.model_validate(
        {
            "version": 1, "name": "paper", "title": "Paper", "citation": "A. B.", "doi": "10.1000/x",
            "tables": [
                {"task": "lesions", "protocol": "linear_probe", "split": "theirs", "where": "table 1", **table,
                 "numbers": list(numbers)}
            ],
        }
    )  # fmt: skip


def test_rows_stand_where_task_protocol_labels_and_metric_are_the_same(tmp_path: Path) -> None:
    for encoder, strength in ((GOOD, 2.0), (RANDOM, 0.3)):
        write_trial(tmp_path, encoder, TASK, strength, classes=7, num_groups=70)
        write_trial(tmp_path, encoder, TASK, strength, classes=7, num_groups=70, protocol="knn")
    summary = compute_standings([tmp_path]).summary
    probe, knn = sorted(summary.sections, key=lambda section: section.protocol, reverse=True)
    rows = {row.model: row.cells[0] for row in probe.published if row.citation.startswith("DermFM-Zero")}
    for model, value in AUROCS.items():
        assert rows[model] is not None and rows[model].value == value and "not ours" in rows[model].split
    assert not any(row.encoder.name in rows for row in probe.rows)  # never among the ranked ones
    assert knn.published == ()
    models = {line.model for line in summary.published if line.task == TASK}
    assert set(AUROCS) <= models
    # Reader studies on other images stand as lines of no task, with what was asked.
    readers = [line for line in summary.published if line.readers]
    assert {"dermatologist 1", "41 readers with PanDerm", "37 readers", "clinicians"} <= {
        line.model for line in readers
    }
    assert all(line.task is None and line.about for line in readers)
    assert all(line.doi.startswith("10.") and line.citation for line in summary.published)


def test_readers_stand_beside_every_protocol_and_gains_are_lines_only(tmp_path: Path) -> None:
    for protocol in ("linear_probe", "knn"):
        write_trial(tmp_path, GOOD, "lesions", 2.0, protocol=protocol)
    sections = compute_standings([tmp_path]).summary.sections
    printed = collect_published(
        [
            make_publication(
                {"model": "A", "metric": "auroc", "value": 0.9, "low": 0.8, "high": 0.95},
                {"model": "A", "metric": "accuracy", "value": 0.7},
                {"model": "B", "metric": "auroc", "gain": "+2 %", "over": "A"},
                {"model": "30 readers", "readers": True, "metric": "auroc", "value": 0.8},
            )
        ]
    )
    by_protocol = {section.protocol: build_printed_rows(printed, section) for section in sections}
    assert [(row.model, row.readers) for row in by_protocol["linear_probe"]] == [("30 readers", True), ("A", False)]
    assert [row.model for row in by_protocol["knn"]] == ["30 readers"]
    cell = by_protocol["linear_probe"][1].cells[0]
    assert cell is not None and (cell.value, cell.low, cell.high, cell.where) == (0.9, 0.8, 0.95, "table 1")
    lines = list_printed(printed, sections[0].tasks)
    assert [(line.model, line.metric, line.gain) for line in lines][:3] == [
        ("A", "auroc", None), ("A", "accuracy", None), ("B", "auroc", "+2 % over A"),
    ]  # fmt: skip


def test_another_share_of_the_labels_is_another_section(tmp_path: Path) -> None:
    write_trial(tmp_path, GOOD, "lesions", 2.0)
    (section,) = compute_standings([tmp_path]).summary.sections
    few = make_publication({"model": "A", "metric": "auroc", "value": 0.9}, label_fraction=0.1)
    assert build_printed_rows(collect_published([few]), section) == ()
    assert read_printed()[None], "reader studies are shipped"
