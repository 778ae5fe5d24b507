"""The worst level and the sites, against the tables and predictions that they are read from."""

import json
from pathlib import Path

import numpy as np
import pytest

from panfm.board.standings import Board, compute_standings
from panfm.errors import UserError
from panfm.evaluation.results import get_scores, read_predictions, read_results
from panfm.measures.metrics import compute_metric
from tests.board.fabricated import GOOD, RANDOM, write_trial

NUM_GROUPS = 120


def write_archive(root: Path) -> Path:
    group = np.repeat(np.arange(NUM_GROUPS), 3)
    levels = {
        "sex": ["female" if one % 5 < 2 else "male" for one in group],
        "anatomic_site": ["toe" if one < 6 else "arm" if one < 60 else "trunk" for one in group],
        "device": ["camera"] * len(group),
    }
    for encoder, strength in ((GOOD, 1.5), (RANDOM, 0.3)):
        for classes, task in ((2, "lesions"), (4, "diagnoses")):
            write_trial(root, encoder, task, strength, classes=classes, num_groups=NUM_GROUPS, subgroups=levels)
        for variant, less in (("none", 0.5), ("same_size", 0.0)):
            write_trial(
                root, encoder, "lesions", strength - less, num_groups=NUM_GROUPS, protocol="leave_institution_out",
                variant=variant,
            )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("fairness") / "results")


@pytest.fixture(scope="module")
def board(results: Path) -> Board:
    return compute_standings([results])


def test_the_worst_level_is_that_of_the_tables(board: Board) -> None:
    page = next(page for page in board.pages if page.task.name == "lesions")
    details = next(one for one in page.encoders if one.encoder == GOOD)
    rows = [row for row in board.fairness if (row.encoder, row.task) == (GOOD, "lesions")]
    assert {(row.attribute, row.measure) for row in rows} == {
        (attribute, measure) for attribute in ("sex", "anatomic_site") for measure in ("sensitivity", "specificity")
    }
    for row in rows:
        table = details.subgroups[row.attribute]
        values = {one.level: getattr(one, row.measure).value for one in table.levels}
        shown = {level: value for level, value in values.items() if value is not None}
        assert row.worst == min(shown.values()) == shown[row.worst_level]
        assert (row.reference_level, row.reference) == (table.reference, values[table.reference])
        assert (row.num_levels, row.num_hidden) == (len(values), len(values) - len(shown))
        if row.worst_level == table.reference:
            assert row.gap is None and row.p_adjusted is None
        else:
            assert row.gap == pytest.approx(row.worst - values[table.reference])
            level = next(one for one in table.levels if one.level == row.worst_level)
            assert row.p_adjusted == getattr(level, f"{row.measure}_difference").p_adjusted
    assert any(row.gap is not None for row in rows)
    # Six patients have toes, three of each class: too few to be shown, so never the worst.
    assert all(row.num_hidden == 1 and row.worst_level != "toe" for row in rows if row.attribute == "anatomic_site")


def test_tasks_of_several_classes_have_the_share_of_right_images(board: Board) -> None:
    rows = [row for row in board.fairness if row.task == "diagnoses"]
    assert {row.measure for row in rows} == {"right"} and {row.encoder for row in rows} == {GOOD, RANDOM}


def test_what_an_institution_costs_is_paired(results: Path, board: Board) -> None:
    rows = {row.encoder: row for row in board.sites}
    assert set(rows) == {GOOD, RANDOM} and {row.kind for row in rows.values()} == {"left_out"}
    found = {}
    for path, result in read_results([results]):
        if result.protocol == "leave_institution_out" and result.encoder.name == GOOD:
            table = read_predictions(path.with_suffix(".parquet"))
            found[result.variant] = compute_metric("auroc", np.asarray(table["label"]), get_scores(table)).value
    row = rows[GOOD]
    assert row.gap == pytest.approx(found["none"] - found["same_size"]) and row.gap < 0
    assert row.beside == pytest.approx(found["same_size"])
    assert row.gap_low is not None and row.gap_high is not None and row.gap_low < row.gap < row.gap_high
    # Paired: narrower than what the two intervals by themselves would give.
    assert row.low is not None and row.high is not None and row.gap_high - row.gap_low < row.high - row.low


def test_how_well_features_tell_the_institution_comes_from_task_audits(results: Path, tmp_path: Path) -> None:
    signal = {"diagnosis": "naevus", "auroc": {"value": 0.83, "low": 0.8, "high": 0.86, "method": "x", "reason": None}}
    audit = {"audit_version": 1, "task": "lesions", "encoder_hash": f"hash-of-{GOOD}", "site": {"signals": [signal]}}
    for name, values in (
        ("known", audit),
        ("stranger", audit | {"encoder_hash": "another"}),
        ("old", audit | {"audit_version": 0}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "audit.json").write_text(json.dumps(values))
    board = compute_standings([results], task_audits=[tmp_path / "known", tmp_path / "stranger"])
    (told,) = [row for row in board.sites if row.kind == "told"]
    assert (told.encoder, told.task, told.what, told.value, told.high) == (GOOD, "lesions", "naevus", 0.83, 0.86)
    with pytest.raises(UserError, match=r"old/audit.json: audit_version is 0; .* run `panfm evaluate audit` again"):
        compute_standings([results], task_audits=[tmp_path / "old"])
