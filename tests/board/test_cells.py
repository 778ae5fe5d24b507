"""Cells and comparisons of fabricated Results: the intervals of `measures`, draws in them, Holm, families, tasks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from panfm.board.build import build_leaderboard
from panfm.board.standings import compute_standings
from panfm.board.summary import Cell, Section
from panfm.board.words import describe_units
from panfm.evaluation.results import get_scores, read_predictions, read_results
from panfm.measures.comparisons import adjust_holm, compare_area_parts
from panfm.measures.draws import widen_by_draws
from panfm.measures.intervals import compute_area_parts, estimate_area
from panfm.measures.statistics import NO_INTERVAL, compare_paired, compute_bootstrap_seed, estimate_metrics
from tests.board.fabricated import GOOD, MIDDLE, RANDOM, write_numbers, write_trial
from tests.board.pages import read_page_data


def find_cell(section: Section, encoder: str, place: int = 0) -> Cell:
    return next(row.cells[place] for row in section.rows if row.encoder.name == encoder)


def read_scores(root: Path) -> dict[str, list[np.ndarray]]:
    """The scores [N, 2] of each encoder's runs."""
    found: dict[str, list[np.ndarray]] = {}
    for path, result in read_results([root]):
        found.setdefault(result.encoder.name, []).append(get_scores(read_predictions(path.with_suffix(".parquet"))))
    return found


def read_rows(root: Path) -> tuple[np.ndarray, np.ndarray]:
    path, _ = read_results([root])[0]
    table = read_predictions(path.with_suffix(".parquet"))
    return np.asarray(table["label"]), np.array(table["group"].to_pylist())


def test_few_groups_get_the_closed_forms(tmp_path: Path) -> None:
    for encoder, strength in ((GOOD, 1.5), (RANDOM, 0.3)):
        write_trial(tmp_path, encoder, "lesions", strength, num_groups=40)
    (section,) = compute_standings([tmp_path]).summary.sections
    (labels, groups), scores = read_rows(tmp_path), read_scores(tmp_path)
    seed = compute_bootstrap_seed("lesions", "split-lesions")
    expected = estimate_metrics(["auroc"], labels, scores[GOOD][0], groups, seed=seed)["auroc"]
    cell = find_cell(section, GOOD)
    assert (cell.low, cell.high, cell.method) == (
        pytest.approx(expected.low),
        pytest.approx(expected.high),
        "delong_logit",
    )
    gap = compare_paired("auroc", labels, scores[GOOD][0], scores[RANDOM][0], groups, seed=seed)
    assert cell.difference is not None and cell.difference.method == gap.method == "delong_clustered"
    assert (cell.difference.low, cell.difference.p_value) == (pytest.approx(gap.low), pytest.approx(gap.p_value))


def test_draws_widen_the_closed_forms(tmp_path: Path) -> None:
    for draw, strength in enumerate((0.9, 1.1, 1.3, 1.5)):
        for encoder, behind in ((GOOD, 0.0), (RANDOM, 0.5)):
            write_trial(tmp_path, encoder, "lesions", strength - behind, num_groups=40, fraction=0.1, draw=draw)
    (section,) = compute_standings([tmp_path]).summary.sections
    (labels, groups), scores = read_rows(tmp_path), read_scores(tmp_path)
    patients = estimate_area(labels, np.stack([one[:, 1] for one in scores[GOOD]]), groups)
    values = [estimate_area(labels, one[:, 1], groups).value for one in scores[GOOD]]
    cell = find_cell(section, GOOD)
    assert cell.method == "delong_logit+draws" and cell.value == pytest.approx(np.mean(values))
    assert (cell.low, cell.high) == pytest.approx(widen_by_draws(cell.value, patients.low, patients.high, values))
    assert cell.high - cell.low > 1.05 * (patients.high - patients.low)
    # Both encoders are compared draw by draw, on the same labelled patients.
    theirs = [estimate_area(labels, one[:, 1], groups).value for one in scores[RANDOM]]
    parts = [compute_area_parts(labels, np.stack([one[:, 1] for one in scores[n]]), groups) for n in (GOOD, RANDOM)]
    variance = np.var(np.subtract(values, theirs), ddof=1) / 4
    gap = compare_area_parts(*parts, independent=False, further_variance=variance, further_freedom=3)
    assert cell.difference is not None and cell.difference.method == "delong_clustered+draws"
    assert (cell.difference.low, cell.difference.p_value) == pytest.approx((gap.low, gap.p_value))


def test_two_draws_are_said_not_to_count(tmp_path: Path) -> None:
    for draw in range(2):
        write_trial(tmp_path, GOOD, "lesions", 1.0 + draw, num_groups=200, fraction=0.1, draw=draw)
    (section,) = compute_standings([tmp_path]).summary.sections
    cell = find_cell(section, GOOD)
    assert cell.method == "bootstrap" and "holds the test patients alone: 2 draws" in (cell.reason or "")


def test_a_fraction_that_cannot_be_had_is_marked(tmp_path: Path) -> None:
    note = "0.01 of 40 training groups is less than one a class: 2 (5.0%) were labelled"
    for encoder in (GOOD, RANDOM):
        write_trial(tmp_path / "r", encoder, "lesions", 1.0, fraction=0.01, settings={"label_note": note})
    build_leaderboard([tmp_path / "r"], tmp_path)
    data = read_page_data(tmp_path / "index.html")
    cells = [cell for row in data["sections"][0]["rows"] for cell in row["cells"]]
    assert [data["texts"][cell["label_note"]] for cell in cells] == [note, note]
    assert note in (tmp_path / "LEADERBOARD.md").read_text()


def test_p_values_are_adjusted_within_a_task(tmp_path: Path) -> None:
    for encoder, strength in ((GOOD, 1.0), (MIDDLE, 0.6), ("third", 0.42), (RANDOM, 0.4)):
        write_trial(tmp_path, encoder, "lesions", strength, num_groups=240)
    (section,) = compute_standings([tmp_path]).summary.sections
    (labels, groups), scores = read_rows(tmp_path), read_scores(tmp_path)
    seed = compute_bootstrap_seed("lesions", "split-lesions")
    names = [GOOD, MIDDLE, "third"]
    raw = [compare_paired("auroc", labels, scores[n][0], scores[RANDOM][0], groups, seed=seed).p_value for n in names]
    gaps = [find_cell(section, name).difference for name in names]
    assert [gap.p_value for gap in gaps] == raw and None not in raw
    assert [gap.p_adjusted for gap in gaps] == adjust_holm(raw) != raw
    assert gaps[0].is_sure and not gaps[2].is_sure


def test_few_groups_say_that_their_interval_is_uncertain(tmp_path: Path) -> None:
    for encoder, strength in ((GOOD, 1.5), (RANDOM, 0.3)):
        write_trial(tmp_path / "r", encoder, "lesions", strength, num_groups=20, metric="balanced_accuracy")
    build_leaderboard([tmp_path / "r"], tmp_path)
    data, text = read_page_data(tmp_path / "index.html"), (tmp_path / "LEADERBOARD.md").read_text()
    reason = "interval outside its declared regime: 10 groups in the rarer class, shown to cover from 30 on"
    cells = [cell for row in data["sections"][0]["rows"] for cell in row["cells"]]
    assert [(data["texts"][cell["reason"]], "low" in cell) for cell in cells] == [(reason, True)] * 2
    assert f"† {RANDOM}, lesions: {reason}" in text and "]†" in text
    gaps = [cell["difference"] for cell in cells if "difference" in cell]
    assert [(gap["sure"], "words" in gap, "p_adjusted" in gap) for gap in gaps] == [(False, False, False)]  # ten groups


def test_calibration_error_has_no_interval_and_no_sure_rank(tmp_path: Path) -> None:
    for encoder, strength in ((GOOD, 2.0), (RANDOM, 0.2)):
        write_trial(tmp_path, encoder, "lesions", strength, metric="ece")
    (section,) = compute_standings([tmp_path]).summary.sections
    cell = find_cell(section, GOOD)
    assert (cell.low, cell.reason, cell.method) == (None, NO_INTERVAL["ece"], None) and cell.value is not None
    assert cell.difference is not None and (cell.difference.low, cell.difference.p_value) == (None, None)
    standings = [row.standing for row in section.rows]
    assert [one.rank for one in standings] == [1, 1] and all("has none" in one.reason for one in standings)


def test_mean_over_tasks_like_these(tmp_path: Path) -> None:
    for encoder, strength in ((GOOD, 2.0), (RANDOM, 0.4)):
        for task in ("one", "two", "three"):
            write_trial(tmp_path, encoder, task, strength)
    (section,) = compute_standings([tmp_path]).summary.sections
    row = next(row for row in section.rows if row.encoder.name == GOOD)
    over, score = row.over_tasks, row.standing
    assert over is not None and over.method == "hierarchical_bootstrap"
    assert over.difference == pytest.approx(np.mean([cell.difference.difference / 0.5 for cell in row.cells]))
    assert over.low < over.difference < over.high and over.p_adjusted == over.p_value
    assert score.score_high - score.score_low < over.high - over.low  # these tasks are surer than tasks like these
    two = [one for one in section.tasks if one.name != "one"]
    assert len(two) == 2 and next(row for row in section.rows if row.encoder.name == RANDOM).over_tasks is None


def test_a_family_where_lower_is_better(tmp_path: Path) -> None:
    for encoder, error in (("close", 2.0), ("far", 9.0)):
        write_numbers(tmp_path / "r", encoder, "thickness", error)
        write_numbers(tmp_path / "r", encoder, "thickness", error, unit="lesion", num=80)
    summary = build_leaderboard([tmp_path / "r"], tmp_path)
    lesions, images = sorted(summary.sections, key=lambda section: section.tasks[0].num_test)
    for section in (lesions, images):
        assert [row.encoder.name for row in section.rows] == ["close", "far"]
        (task,) = section.tasks
        assert not task.higher_is_better and task.perfect == 0 and task.chance > 5
        cell = section.rows[1].cells[0]
        assert cell.difference is not None and cell.difference.difference > 4 and cell.low < cell.value < cell.high
    assert (tmp_path / "tasks/thickness.html").is_file() and (tmp_path / "tasks/thickness-lesion.html").is_file()
    known = replace(images.tasks[0], unit="image of a known institution")
    assert describe_units(known) == "120 images of a known institution, 60 patients" and " " not in known.slug
    plain = read_page_data(tmp_path / "index.html")["tasks"]
    assert [one["higher"] for one in plain] == [False, False]
    assert {one["units"] for one in plain} >= {"80 lesions, 40 patients"}
    assert "Spearman" in (tmp_path / "tasks/thickness.html").read_text()
    # Its protocol is one that this panfm does not know: the numbers stand, a command cannot.
    assert "No command: protocol other is none of this panfm." in (tmp_path / "tasks/thickness-lesion.html").read_text()
