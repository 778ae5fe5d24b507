"""Curves and tables of what is taken for what: the numbers are scikit-learn's, and few patients are not counted."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import vl_convert
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score, roc_curve

from panfm.board.standings import Board, compute_standings
from panfm.board.task_charts import build_drawings
from panfm.board.task_confusion import MIN_COUNTED_GROUPS, build_confusion
from panfm.board.task_curves import (
    MAX_POINTS,
    SPECIFICITIES,
    build_curves,
    compute_precision_recall,
    compute_roc,
    thin,
)
from panfm.board.task_report import list_benefits, render_task_page
from panfm.board.vega import render_svg
from panfm.measures.subgroups import MIN_SHOWN_GROUPS
from tests.board.fabricated import GOOD, RANDOM, write_trial


def draw_cases(num: int = 700, digits: int | None = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of one class; with two digits many scores are equal."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, num)
    scores = 1 / (1 + np.exp(-(labels + rng.normal(size=num))))
    return labels, scores if digits is None else scores.round(digits)


@pytest.mark.parametrize("digits", [None, 2, 0])
def test_curves_are_those_of_scikit_learn_ties_included(digits: int | None) -> None:
    labels, scores = draw_cases(digits=digits)
    roc, recall = compute_roc(labels, scores), compute_precision_recall(labels, scores)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose([roc.x, roc.y], [false, true], atol=1e-12)
    precision, sensitivity, _ = precision_recall_curve(labels, scores)
    np.testing.assert_allclose([recall.x, recall.y], [sensitivity[::-1], precision[::-1]], atol=1e-12)


def test_thin_lines_keep_their_ends_and_their_areas() -> None:
    labels, scores = draw_cases(digits=None)
    roc, recall = thin(compute_roc(labels, scores)), thin(compute_precision_recall(labels, scores))
    for line in (roc, recall):
        assert len(line.x) <= MAX_POINTS and (np.diff(line.x) >= 0).all()
        assert (line.x[0], line.x[-1]) == (0, 1)
    assert (roc.y[0], roc.y[-1], recall.y[0]) == (0, 1, 1) and recall.y[-1] == labels.mean()
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(roc_auc_score(labels, scores), abs=0.003)
    steps = (np.diff(recall.x) * recall.y[1:]).sum()
    assert steps == pytest.approx(average_precision_score(labels, scores), abs=0.01)


def test_sensitivity_is_the_highest_that_keeps_a_specificity() -> None:
    labels, scores = draw_cases()
    found = build_curves(labels, scores, np.arange(len(labels)))
    for wanted, sensitivity in zip(SPECIFICITIES, found.sensitivities, strict=True):
        reached = [
            (scores[labels == 1] >= threshold).mean()
            for threshold in [*np.unique(scores), 2.0]
            if (scores[labels == 0] < threshold).mean() >= wanted
        ]
        assert sensitivity == pytest.approx(max(reached))
    assert found.prevalence == labels.mean()


@pytest.mark.parametrize("few", [0, 1])
def test_a_class_of_few_groups_has_no_curve(few: int) -> None:
    labels, scores = draw_cases()
    groups = np.arange(len(labels))
    groups[labels == few] = np.arange((labels == few).sum()) % MIN_SHOWN_GROUPS
    assert build_curves(labels, scores, groups).reason is None
    groups[labels == few] = np.arange((labels == few).sum()) % (MIN_SHOWN_GROUPS - 1)
    found = build_curves(labels, scores, groups)
    assert found.roc is None and found.sensitivities == () and "fewer than 20 groups" in str(found.reason)


def test_confusion_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 4000), rng.integers(0, 4, 4000)
    rows = build_confusion(labels, predicted, [str(row) for row in range(4000)], "abcd")
    expected = confusion_matrix(labels, predicted)
    assert [[cell.num for cell in row.cells] for row in rows] == expected.tolist()
    np.testing.assert_allclose(
        [[cell.share for cell in row.cells] for row in rows], confusion_matrix(labels, predicted, normalize="true")
    )
    assert [(row.label, row.num) for row in rows] == list(zip("abcd", expected.sum(axis=1).tolist(), strict=True))


def test_cells_of_few_groups_are_hidden_and_cannot_be_worked_out() -> None:
    """Class a: 30 right, 8 as b, 3 as c (of 3 groups), none as d; b: 30 right and 12 as c of 2 groups; d: 4 images."""
    labels = np.array([0] * 41 + [1] * 42 + [2] * 40 + [3] * 4)
    predicted = np.array([0] * 30 + [1] * 8 + [2] * 3 + [1] * 30 + [2] * 12 + [2] * 40 + [3] * 4)
    groups = [f"g{row}" for row in range(len(labels))]
    for row in range(71, 83):
        groups[row] = f"same{row % 2}"
    first, second, third, last = build_confusion(labels, predicted, groups, "abcd")
    assert [cell.num for cell in first.cells] == [30, None, None, 0] and first.num == 41
    assert [cell.num for cell in second.cells] == [0, None, None, 0] and second.num == 42
    # The four images of d are 127 less the others: one more row, the smallest, says nothing either.
    assert last.num is None and third.num is None and all(cell.num is None for cell in (*last.cells, *third.cells))
    for row in (first, second):
        hidden = [cell for cell in row.cells if cell.num is None]
        assert len(hidden) > 1 and all(cell.share is None for cell in hidden)
    assert MIN_COUNTED_GROUPS == 5


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    root = tmp_path_factory.mktemp("curves")
    sex = [("female", "male")[group % 2] for group in range(90) for _ in range(3)]
    sex[:6] = ["other"] * 6
    for encoder, strength in ((GOOD, 1.5), (RANDOM, 0.3)):
        write_trial(root, encoder, "lesions", strength, num_groups=90, subgroups={"sex": sex})
        write_trial(root, encoder, "diagnoses", strength, classes=3, num_groups=90)
    return compute_standings([root])


def test_every_drawing_draws_what_the_page_holds(board: Board) -> None:
    series = {GOOD: 0, RANDOM: 1}
    names = {}
    for page in board.pages:
        drawings = build_drawings(page, series)
        names[page.task.name] = list(drawings)
        html = render_task_page(board.summary, page)
        held = re.search(r'<script type="application/json" id="task-data">(.*?)</script>', html)
        assert held is not None
        assert set(json.loads(held[1])) == set(drawings)
        for name, one in drawings.items():
            assert f'id="{name}"' in html
            svg = render_svg({**one.spec, "datasets": dict(one.data)})
            assert svg.count("<path") > 2 and len(svg) > 3000
            assert vl_convert.vegalite_to_vega({**one.spec, "datasets": dict(one.data)})
    assert names["lesions"] == [
        "drawing-roc", "drawing-precision-recall", "drawing-reliability", "drawing-decision", "drawing-by-sex",
    ]  # fmt: skip
    assert names["diagnoses"] == ["drawing-reliability"]


def test_rows_of_drawings_are_the_values_of_the_page(board: Board) -> None:
    page = next(page for page in board.pages if page.task.name == "lesions")
    drawings = build_drawings(page, {GOOD: 0, RANDOM: 1})
    details = next(one for one in page.encoders if one.encoder == GOOD)
    assert details.curves is not None and details.curves.roc is not None and details.curve is not None
    line = next(row for row in drawings["drawing-roc"].data["rows"] if row["encoder"] == GOOD)
    np.testing.assert_allclose(line["y"], details.curves.roc.y, atol=1e-4)
    bars = drawings["drawing-by-sex"].data["rows"]
    assert {row["level"] for row in bars} == {"female", "male"}  # "other" has two groups
    level = next(one for one in details.subgroups["sex"].levels if one.level == "female")
    bar = next(r for r in bars if (r["encoder"], r["level"], r["measure"]) == (GOOD, "female", "Specificity"))
    assert level.specificity.value is not None and bar["value"] == pytest.approx(level.specificity.value, abs=1e-4)
    benefits = list_benefits(page.encoders)
    assert benefits is not None and benefits["thresholds"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert dict(benefits["rows"])[GOOD][1][0] == details.curve.net_benefit[19]


def test_a_page_without_a_class_of_enough_groups_says_so(board: Board, tmp_path: Path) -> None:
    write_trial(tmp_path, GOOD, "few", 1.0, num_groups=30)
    found = compute_standings([tmp_path])
    (page,) = found.pages
    html = render_task_page(found.summary, replace(page, encoders=page.encoders))
    assert "Curves are not shown: fewer than 20 groups" in html and 'id="drawing-roc"' not in html
