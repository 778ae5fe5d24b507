"""Metrics of numbers and grades equal scipy's, scikit-learn's and the published example's, in every replicate."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from panfm.measures import numbers
from panfm.measures.numbers import MEASURES_ORDINAL, MEASURES_REGRESSION, compute_median_classes
from panfm.measures.outcomes import Floats, Outcome
from panfm.measures.statistics import draw_group_weights


def make_numbers(seed: int, num_units: int = 60) -> Outcome:
    rng = np.random.default_rng(seed)
    true = np.round(rng.normal(50, 15, num_units))  # with ties, as ages have
    predicted = np.round(0.6 * true + 12 + rng.normal(0, 8, num_units))
    groups = np.array([f"P{number}" for number in rng.integers(0, 25, num_units)])
    return Outcome(np.zeros(num_units, np.int64), predicted[:, None], groups, true[:, None])


def make_grades(seed: int, num_units: int = 60, num_classes: int = 5) -> Outcome:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_units)
    near = -np.abs(np.arange(num_classes) - labels[:, None] + rng.normal(0, 1, (num_units, 1)))
    scores = np.exp(near + rng.normal(0, 0.3, near.shape))
    groups = np.array([f"P{number}" for number in rng.integers(0, 25, num_units)])
    return Outcome(labels, scores / scores.sum(axis=1, keepdims=True), groups, np.zeros((num_units, 0)))


def compute_icc_by_anova(predicted: Floats, true: Floats) -> float:
    """ICC(2,1) from the mean squares of the two-way table, loop by loop."""
    table = np.stack([predicted, true], axis=1)
    n, k = table.shape
    grand = table.mean()
    between = k * sum((row.mean() - grand) ** 2 for row in table) / (n - 1)
    raters = n * sum((column.mean() - grand) ** 2 for column in table.T) / (k - 1)
    residual = sum(
        (table[i, j] - table[i].mean() - table[:, j].mean() + grand) ** 2 for i in range(n) for j in range(k)
    ) / ((n - 1) * (k - 1))
    return float((between - residual) / (between + (k - 1) * residual + k * (raters - residual) / n))


BRUTE = {
    "mean_absolute_error": lambda predicted, true: sk.mean_absolute_error(true, predicted),
    "root_mean_squared_error": lambda predicted, true: sk.root_mean_squared_error(true, predicted),
    "intraclass_correlation": compute_icc_by_anova,
    "spearman": lambda predicted, true: stats.spearmanr(predicted, true).statistic,
    "quadratic_kappa": lambda predicted, true: sk.cohen_kappa_score(predicted, true, weights="quadratic"),
}


@pytest.mark.parametrize("name", MEASURES_REGRESSION)
def test_numbers_equal_brute_force_in_every_replicate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = make_numbers(0)
    weights = np.concatenate([np.ones((1, 60), np.uint16), draw_group_weights(outcome.groups, 40, seed=1)])
    monkeypatch.setattr(numbers, "MAX_BLOCK_VALUES", 60 * 7)  # several blocks, the last one shorter
    found = MEASURES_REGRESSION[name].compute(outcome, weights)
    for value, row in zip(found, weights, strict=True):
        repeated = np.repeat(np.arange(60), row)
        expected = BRUTE[name](outcome.scores[repeated, 0], outcome.targets[repeated, 0])
        assert value == pytest.approx(expected, abs=1e-12)
    assert MEASURES_REGRESSION[name].explain(outcome) is None


@pytest.mark.parametrize("name", MEASURES_ORDINAL)
def test_grades_equal_brute_force_in_every_replicate(name: str) -> None:
    outcome = make_grades(0)
    weights = np.concatenate([np.ones((1, 60), np.uint16), draw_group_weights(outcome.groups, 40, seed=1)])
    found = MEASURES_ORDINAL[name].compute(outcome, weights)
    expected_grade = (outcome.scores * np.arange(5)).sum(axis=1)
    grade = np.array([next(k for k in range(5) if row[: k + 1].sum() >= 0.5) for row in outcome.scores])
    predicted = expected_grade if name in ("intraclass_correlation", "spearman") else grade
    for value, row in zip(found, weights, strict=True):
        repeated = np.repeat(np.arange(60), row)
        assert value == pytest.approx(BRUTE[name](predicted[repeated], outcome.labels[repeated]), abs=1e-12)


def test_icc_equals_the_published_example() -> None:
    # Shrout and Fleiss 1979, table 2: six subjects, four judges, ICC(2,1) = 0.29. The code here has two raters, so
    # the loop is checked with four and the code against the loop.
    table = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], dtype=float)
    n, k = table.shape
    grand = table.mean()
    between = k * ((table.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    raters = n * ((table.mean(axis=0) - grand) ** 2).sum() / (k - 1)
    residual = ((table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + grand) ** 2).sum() / ((n - 1) * 3)
    assert (between - residual) / (between + 3 * residual + 4 * (raters - residual) / n) == pytest.approx(
        0.29, abs=5e-3
    )
    outcome = Outcome(np.zeros(6, np.int64), table[:, :1], np.arange(6).astype(str), table[:, 3:])
    found = MEASURES_REGRESSION["intraclass_correlation"].compute(outcome, np.ones((1, 6)))[0]
    assert found == pytest.approx(compute_icc_by_anova(table[:, 0], table[:, 3]), abs=1e-12)


def test_agreement_sees_an_offset_that_correlation_does_not() -> None:
    true = np.arange(20.0)
    outcome = Outcome(np.zeros(20, np.int64), true[:, None] + 10, np.arange(20).astype(str), true[:, None])
    ones = np.ones((1, 20))
    assert MEASURES_REGRESSION["spearman"].compute(outcome, ones)[0] == 1
    assert MEASURES_REGRESSION["intraclass_correlation"].compute(outcome, ones)[0] < 0.5
    assert MEASURES_REGRESSION["mean_absolute_error"].compute(outcome, ones)[0] == 10


def test_agreement_keeps_its_digits_far_from_zero() -> None:
    outcome = make_numbers(4)
    far = Outcome(outcome.labels, outcome.scores + 1e7, outcome.groups, outcome.targets + 1e7)
    measure = MEASURES_REGRESSION["intraclass_correlation"]
    near, found = (measure.compute(shifted, np.ones((1, 60)))[0] for shifted in (outcome, far))
    assert found == pytest.approx(near, abs=1e-10)


def test_what_is_undefined_is_nan_with_a_reason() -> None:
    outcome = Outcome(np.zeros(4, np.int64), np.array([[0.1], [0.1], [0.1], [0.1]]), np.array(list("abcd")),
                      np.array([[1.0], [2.0], [3.0], [4.0]]))  # fmt: skip
    weights = np.array([[1, 1, 1, 1], [3, 0, 0, 0]])
    assert MEASURES_REGRESSION["spearman"].explain(outcome) == "all predicted values are equal"
    assert np.isnan(MEASURES_REGRESSION["spearman"].compute(outcome, weights)).all()
    # One unit three times over: 0.1 - 0.1 must not leave a rounding error that divides into a number.
    alike = Outcome(outcome.labels, outcome.targets * 0.1, outcome.groups, outcome.targets * 0.1)
    found = MEASURES_REGRESSION["intraclass_correlation"].compute(alike, weights)
    assert found[0] == pytest.approx(1) and np.isnan(found[1])
    empty = outcome.take(np.zeros(4, dtype=bool))
    for measures, nothing in (
        (MEASURES_REGRESSION, empty),
        (MEASURES_ORDINAL, make_grades(0).take(np.zeros(60, bool))),
    ):
        for measure in measures.values():
            assert measure.explain(nothing)
            assert np.isnan(measure.compute(nothing, np.zeros((2, 0)))).all()
    same = Outcome(np.ones(3, np.int64), np.tile([0.0, 1.0], (3, 1)), np.array(list("abc")), np.zeros((3, 0)))
    assert MEASURES_ORDINAL["quadratic_kappa"].explain(same) == "all true and predicted values are one and the same"
    assert np.isnan(MEASURES_ORDINAL["quadratic_kappa"].compute(same, np.ones((1, 3))))[0]
    assert MEASURES_ORDINAL["mean_absolute_error"].compute(same, np.ones((1, 3)))[0] == 0


def test_chance_is_what_a_constant_reaches_and_perfect_what_the_truth_reaches() -> None:
    outcome = make_numbers(3)
    true = outcome.targets[:, 0]
    ones = np.ones((1, 60))
    for name, constant in (("mean_absolute_error", np.median(true)), ("root_mean_squared_error", true.mean())):
        measure = MEASURES_REGRESSION[name]
        guess = Outcome(outcome.labels, np.full((60, 1), constant), outcome.groups, outcome.targets)
        assert measure.chance(outcome) == pytest.approx(measure.compute(guess, ones)[0])
    known = Outcome(outcome.labels, outcome.targets, outcome.groups, outcome.targets)
    for measure in MEASURES_REGRESSION.values():
        assert measure.compute(known, ones)[0] == pytest.approx(measure.perfect)


def test_the_median_grade_is_the_first_reached_with_one_half() -> None:
    scores = np.array([[0.5, 0.0, 0.5], [0.4, 0.2, 0.4], [0.1, 0.3, 0.6], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(compute_median_classes(scores), [0, 1, 2, 0])
