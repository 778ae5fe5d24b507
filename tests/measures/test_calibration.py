"""Calibration slope and intercept equal a logistic regression's; the reliability table adds up to the metric."""

import numpy as np
import pytest
from scipy.optimize import minimize

from panfm.measures.calibration import build_reliability_table, compute_calibration, estimate_calibration
from panfm.measures.metrics import compute_metric


def make_probabilities(seed: int, num_images: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Too sure by a factor of two, and too high."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=num_images)
    labels = (rng.random(num_images) < 1 / (1 + np.exp(-logit))).astype(int)
    return labels, 1 / (1 + np.exp(-(2 * logit + 0.5)))


def fit(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    x = np.log(probabilities / (1 - probabilities))

    def compute_loss(eta: np.ndarray) -> float:
        return float((weights * (np.logaddexp(0, eta) - labels * eta)).sum())

    slope = minimize(lambda ab: compute_loss(ab[0] + ab[1] * x), [0, 1], method="BFGS", options={"gtol": 1e-9}).x[1]
    intercept = minimize(lambda a: compute_loss(a[0] + x), [0], method="BFGS", options={"gtol": 1e-9}).x[0]
    return slope, intercept


def test_slope_and_intercept_equal_a_general_optimiser() -> None:
    labels, probabilities = make_probabilities(0)
    weights = np.stack([np.ones(400), np.random.default_rng(1).integers(0, 3, 400)])
    slopes, intercepts = compute_calibration(labels, probabilities, weights)
    expected = [fit(labels, probabilities, row) for row in weights]
    np.testing.assert_allclose(slopes, [one[0] for one in expected], rtol=1e-5)
    np.testing.assert_allclose(intercepts, [one[1] for one in expected], atol=1e-5)
    assert slopes[0] == pytest.approx(0.5, abs=0.15) and intercepts[0] < -0.2


def test_interval_holds_the_truth_and_groups_widen_it() -> None:
    labels, probabilities = make_probabilities(2)
    found = estimate_calibration(labels, probabilities, np.arange(400), seed=0, num_replicates=500)
    assert found.slope.low < 0.5 < found.slope.high and found.slope.high < 1  # too sure, surely
    assert found.intercept.high < 0  # too high, surely
    assert (found.slope.method, found.slope.reason) == ("bootstrap", None)
    thrice = estimate_calibration(
        np.repeat(labels, 3), np.repeat(probabilities, 3), np.repeat(np.arange(400), 3), seed=0, num_replicates=500
    )
    assert (thrice.slope.low, thrice.slope.high) == pytest.approx((found.slope.low, found.slope.high), abs=1e-6)


def test_slope_is_undefined_where_classes_separate_or_are_missing() -> None:
    labels, probabilities = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.9, 1.0])
    slopes, intercepts = compute_calibration(labels, probabilities, [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    assert np.isnan(slopes).all()
    assert np.isfinite(intercepts[0]) and np.isnan(intercepts[1])
    found = estimate_calibration(labels, probabilities, np.arange(6), seed=0)
    assert found.slope.value is None and "separate the classes" in str(found.slope.reason)
    same = estimate_calibration(labels, np.full(6, 0.5), np.arange(6), seed=0)
    assert same.slope.value is None and same.intercept.value == pytest.approx(0)
    missing = estimate_calibration([1, 1], [0.2, 0.3], [0, 1], seed=0)
    assert missing.slope.reason == missing.intercept.reason == "no test image of class 0"


def test_extreme_probabilities_and_slopes_are_found() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random(300) < 0.5).astype(int)
    for scale in (0.01, 30.0):  # nearly constant, and nearly all 0 or 1
        x = scale * (0.5 * labels + rng.normal(size=300)).clip(-0.4, 0.4)
        slope, _ = compute_calibration(labels, 1 / (1 + np.exp(-x)), np.ones((1, 300)))
        assert slope[0] == pytest.approx(fit(labels, 1 / (1 + np.exp(-x)), np.ones(300))[0], rel=1e-3)


def test_reliability_table_adds_up_to_the_calibration_error() -> None:
    labels, probabilities = make_probabilities(4)
    groups = np.arange(400) // 2
    table = build_reliability_table(probabilities, labels == 1, groups)
    total = sum(row.num_images * abs(row.confidence - row.right.value) for row in table) / 400
    ece = compute_metric("ece", labels, np.stack([1 - probabilities, probabilities], axis=1)).value
    assert total == pytest.approx(ece, abs=1e-12)
    assert sum(row.num_images for row in table) == 400 and len(table) == 15
    assert [row.confidence for row in table] == sorted(row.confidence for row in table)
    assert all(row.right.low <= row.right.value <= row.right.high for row in table)
    assert build_reliability_table([], [], []) == ()
    assert [row.num_images for row in build_reliability_table([0.5] * 9, [True] * 9, range(9))] == [9]  # all tie
