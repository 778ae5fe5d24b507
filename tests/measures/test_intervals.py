"""Closed-form intervals equal their formulas written out, and say so where they cannot be made."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from panfm.measures.intervals import (
    MIN_AREA_GROUPS,
    compute_area_parts,
    compute_effective_number,
    compute_newcombe,
    compute_wilson,
    estimate_area,
    estimate_mean,
    estimate_proportion,
)
from panfm.measures.metrics import compute_metric


def make_scores(seed: int = 0, num_groups: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of 1 to 4 images, of which some hold both classes; scores with ties."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), rng.integers(1, 5, num_groups))
    labels = (rng.random(len(groups)) < 0.4).astype(int)
    return labels, np.round(labels + rng.normal(size=len(groups)), 1), groups


def compare_by_force(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The double loop: 1 where the positive is higher, half where it ties; [positives, negatives]."""
    kernel = np.empty(((labels == 1).sum(), (labels == 0).sum()))
    for i, high in enumerate(scores[labels == 1]):
        for j, low in enumerate(scores[labels == 0]):
            kernel[i, j] = 1 if high > low else 0.5 if high == low else 0
    return kernel


def compute_obuchowski_by_force(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    kernel = compare_by_force(labels, scores)
    area, (m, n) = kernel.mean(), kernel.shape
    of_positives, of_negatives = groups[labels == 1], groups[labels == 0]
    names = sorted(set(groups.tolist()))
    in_positive = [(kernel.mean(axis=1)[of_positives == g] - area).sum() for g in names]
    in_negative = [(kernel.mean(axis=0)[of_negatives == g] - area).sum() for g in names]
    P, Q, G = len(set(of_positives.tolist())), len(set(of_negatives.tolist())), len(names)
    s10 = P / ((P - 1) * m) * sum(value**2 for value in in_positive)
    s01 = Q / ((Q - 1) * n) * sum(value**2 for value in in_negative)
    s11 = G / (G - 1) * sum(a * b for a, b in zip(in_positive, in_negative, strict=True))
    return s10 / m + s01 / n + 2 * s11 / (m * n)


def test_area_and_variance_equal_obuchowski_by_force() -> None:
    labels, scores, groups = make_scores()
    parts = compute_area_parts(labels, scores, groups)
    assert parts.area == pytest.approx(compare_by_force(labels, scores).mean(), abs=1e-12)
    assert parts.variance == pytest.approx(compute_obuchowski_by_force(labels, scores, groups), abs=1e-14)
    assert parts.variance > 0


def test_one_image_a_group_is_delong_by_force() -> None:
    labels, scores, _ = make_scores(1)
    kernel = compare_by_force(labels, scores)
    delong = kernel.mean(axis=1).var(ddof=1) / kernel.shape[0] + kernel.mean(axis=0).var(ddof=1) / kernel.shape[1]
    assert compute_area_parts(labels, scores, np.arange(len(labels))).variance == pytest.approx(delong, abs=1e-14)


def test_clustering_widens_and_the_interval_is_logit_student() -> None:
    labels, scores, groups = make_scores(2, 60)
    labels = labels[np.searchsorted(groups, groups)]  # one label a patient
    scores = np.repeat(scores, 3) + np.tile([0, 0.01, -0.01], len(scores))  # three nearly equal images
    labels, groups = np.repeat(labels, 3), np.repeat(groups, 3)
    ours, images = (estimate_area(labels, scores, names) for names in (groups, np.arange(len(labels))))
    assert ours.value == images.value == pytest.approx(compute_metric("auroc", labels, _two(scores)).value, abs=1e-12)
    assert ours.high - ours.low > 1.5 * (images.high - images.low)
    parts = compute_area_parts(labels, scores, groups)
    width = student.ppf(0.975, parts.freedom) * np.sqrt(parts.variance) / (parts.area * (1 - parts.area))
    logits = [np.log(limit / (1 - limit)) for limit in (ours.low, parts.area, ours.high)]
    assert logits[1] - logits[0] == pytest.approx(width) and logits[2] - logits[1] == pytest.approx(width)
    fewest = min(parts.effective_positive_groups, parts.effective_negative_groups)
    assert fewest < parts.num_rarer_groups  # sizes differ
    assert fewest - 1 <= parts.freedom <= len(set(groups.tolist())) - 1
    assert (ours.method, ours.reason) == ("delong_logit", None)


def test_draws_of_one_encoder_are_averaged() -> None:
    labels, scores, groups = make_scores(3)
    other = scores + np.random.default_rng(0).normal(size=len(scores))
    parts = compute_area_parts(labels, np.stack([scores, other]), groups)
    single = [compute_area_parts(labels, row, groups) for row in (scores, other)]
    assert parts.area == pytest.approx(np.mean([one.area for one in single]))
    np.testing.assert_allclose(parts.positive, np.mean([one.positive for one in single], axis=0), atol=1e-15)


def test_perfect_area_has_newcombes_interval() -> None:
    labels = np.array([1] * 16 + [0] * 30)
    estimate = estimate_area(labels, labels, np.arange(46))
    assert (estimate.value, estimate.high, estimate.method) == (1.0, 1.0, "newcombe")
    assert "AUROC of 1.000, shown to cover up to 0.97" in str(estimate.reason)
    low, _ = compute_newcombe(1.0, 16, 30)
    assert estimate.low == low
    half = 46 / 2 - 1
    error = np.sqrt(low * (1 - low) * (1 + half * (1 - low) / (2 - low) + half * low / (1 + low)) / (16 * 30))
    assert 1 - low == pytest.approx(norm.ppf(0.975) * error)
    assert compute_newcombe(0.0, 16, 30) == pytest.approx((0.0, 1 - low), abs=1e-6)


def test_area_out_of_its_regime_says_so() -> None:
    labels, rng = np.array([1] * (MIN_AREA_GROUPS - 1) + [0] * 30), np.random.default_rng(0)
    estimate = estimate_area(labels, rng.normal(size=len(labels)), np.arange(len(labels)))
    assert estimate.low is not None
    assert f"outside its declared regime: {MIN_AREA_GROUPS - 1} groups in the rarer class" in str(estimate.reason)
    one = estimate_area([1, 1, 0, 0], [3, 1, 2, 0], ["a", "a", "b", "c"])
    assert (one.value, one.low, one.method) == (0.75, None, None) and "1 group in the rarer class" in str(one.reason)
    none = estimate_area([0, 0], [1, 2], ["a", "b"])
    assert (none.value, none.low, none.reason) == (None, None, "no test image of class 1")


@pytest.mark.parametrize(("hits", "number"), [(0, 25), (3, 25), (25, 25), (17, 40)])
def test_wilson_equals_scipy_with_one_image_a_group(hits: int, number: int) -> None:
    expected = binomtest(hits, number).proportion_ci(method="wilson")
    estimate = estimate_proportion(np.arange(number) < hits, np.arange(number))
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (estimate.value, estimate.method, estimate.reason) == (hits / number, "wilson", None)


def test_copies_of_an_image_add_nothing() -> None:
    hits = np.arange(30) < 21
    number = compute_effective_number(np.repeat(hits, 4).astype(float), np.repeat(np.arange(30), 4))
    # 30 independent images, of which the variance is estimated (29 / 30) and Student's quantile taken.
    assert number == pytest.approx(29 * (norm.ppf(0.975) / student.ppf(0.975, 29)) ** 2)
    all_right = compute_effective_number(np.ones(120), np.repeat(np.arange(30), 4))
    assert all_right == pytest.approx(30)
    independent = compute_effective_number(np.tile([1.0, 0.0], 60), np.repeat(np.arange(60), 2))
    assert independent == pytest.approx(120 * (norm.ppf(0.975) / student.ppf(0.975, 59)) ** 2)  # never more than N


def test_wilson_of_nothing_and_of_one_group() -> None:
    assert estimate_proportion([], [], empty="no positive test image").reason == "no positive test image"
    one = estimate_proportion([True, False], ["a", "a"])
    assert (one.value, one.low) == (0.5, None) and "1 test group" in str(one.reason)
    assert "outside its declared regime" in str(estimate_proportion([1, 0, 1], ["a", "b", "c"]).reason)
    low, high = compute_wilson(1.0, 10)
    assert high == 1.0 and 0.7 < low < 0.75


def test_mean_of_single_images_is_students() -> None:
    values = np.random.default_rng(0).normal(size=25)
    estimate = estimate_mean(values, np.arange(25))
    half = student.ppf(0.975, 24) * values.std(ddof=1) / 5
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half))
    repeated = estimate_mean(np.repeat(values, 3), np.repeat(np.arange(25), 3))
    assert (repeated.low, repeated.high) == pytest.approx((estimate.low, estimate.high))


def _two(scores: np.ndarray) -> np.ndarray:
    return np.stack([-scores, scores], axis=1)
