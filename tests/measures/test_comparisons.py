"""Comparisons of two encoders equal their formulas, refuse what they do not suit, and agree with each other."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from panfm.measures.comparisons import (
    adjust_holm,
    compare_areas,
    compare_mcnemar,
    compare_over_tasks,
    compute_p_value,
)
from panfm.measures.statistics import FEW_GROUPS, MIN_PAIRED_GROUPS, compare_paired


def make_pair(seed: int, num_images: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2
    a = labels + rng.normal(size=num_images)
    return labels, a, 0.5 * a + 0.3 * labels + 0.7 * rng.normal(size=num_images)


def compute_delong_by_force(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """DeLong's paired difference and its variance, from both kernels written out."""
    kernels = []
    for scores in (a, b):
        high, low = scores[labels == 1][:, None], scores[labels == 0][None]
        kernels.append((high > low) + 0.5 * (high == low))
    positive = np.cov([kernel.mean(axis=1) for kernel in kernels])
    negative = np.cov([kernel.mean(axis=0) for kernel in kernels])
    both = positive / (labels == 1).sum() + negative / (labels == 0).sum()
    return kernels[0].mean() - kernels[1].mean(), both[0, 0] + both[1, 1] - 2 * both[0, 1]


def test_delong_equals_the_double_loop() -> None:
    labels, a, b = make_pair(0)
    found = compare_areas(labels, a, b, np.arange(80))
    difference, variance = compute_delong_by_force(labels, a, b)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    half = (found.high - found.low) / 2
    assert norm.ppf(0.975) < half / np.sqrt(variance) < student.ppf(0.975, 39) + 1e-9
    assert found.method == "delong" and found.reason is None
    assert 2 * norm.sf(abs(difference) / np.sqrt(variance)) == pytest.approx(found.p_value, rel=0.2)
    assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)


def test_copies_of_images_do_not_make_a_difference_surer() -> None:
    labels, a, b = make_pair(1)
    once = compare_areas(labels, a, b, np.arange(80))
    thrice = compare_areas(*(np.repeat(x, 3) for x in (labels, a, b)), np.repeat(np.arange(80), 3))
    assert (thrice.low, thrice.high, thrice.p_value) == pytest.approx((once.low, once.high, once.p_value), rel=1e-9)
    assert (once.method, thrice.method) == ("delong", "delong_clustered")


def test_few_groups_get_delong_and_many_the_bootstrap() -> None:
    labels, a, b = make_pair(2, 2 * MIN_PAIRED_GROUPS)
    both = [np.stack([-x, x], axis=1) for x in (a, b)]
    many = compare_paired("auroc", labels, *both, np.arange(len(labels)), seed=0)
    exact = compare_areas(labels, a, b, np.arange(len(labels)))
    assert many.method == "bootstrap" and many.reason is None
    assert (many.low, many.high) == pytest.approx((exact.low, exact.high), abs=0.02)
    assert many.p_value == pytest.approx(exact.p_value, abs=0.1)
    few = slice(0, 2 * FEW_GROUPS - 2)
    found = compare_paired("auroc", labels[few], *(x[few] for x in both), np.arange(2 * FEW_GROUPS - 2), seed=0)
    assert found == compare_areas(labels[few], a[few], b[few], np.arange(2 * FEW_GROUPS - 2))
    other = compare_paired("accuracy", labels[few], *(x[few] for x in both), np.arange(2 * FEW_GROUPS - 2), seed=0)
    assert other.low is not None and other.p_value is None and "outside its declared regime" in str(other.reason)


def test_same_scores_and_few_groups() -> None:
    labels, a, _ = make_pair(3)
    same = compare_areas(labels, a, a, np.arange(80))
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    few = compare_areas(labels[:8], a[:8], -a[:8], np.arange(8))
    assert few.low is not None and few.p_value is None and "4 groups in the rarer class" in str(few.reason)
    assert compare_areas([1, 1], [0, 1], [1, 0], [0, 1]).reason == "no test image of class 0"


@pytest.mark.parametrize(("only_a", "only_b"), [(9, 2), (2, 9), (4, 4), (1, 0), (30, 14)])
def test_mcnemar_equals_the_binomial_test(only_a: int, only_b: int) -> None:
    a = np.array([1] * only_a + [0] * only_b + [1, 1, 0])
    b = np.array([0] * only_a + [1] * only_b + [1, 1, 0])
    found = compare_mcnemar(a, b, np.arange(len(a)))
    assert (found.num_only_a, found.num_only_b) == (only_a, only_b)
    assert found.p_value == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, abs=1e-12)


def test_mcnemar_refuses_images_of_one_patient_and_needs_a_disagreement() -> None:
    found = compare_mcnemar([1, 0, 1], [0, 0, 1], ["a", "a", "b"])
    assert found.p_value is None and found.reason == "images are not independent: 1 groups have more than one"
    assert compare_mcnemar([1, 0], [1, 0], ["a", "b"]).p_value is None


def test_holm_by_hand() -> None:
    # 0.005 x 4; 0.01 x 3; 0.03 x 2; 0.04 x 1 is less than 0.06 before it, so 0.06 stays. None is no comparison.
    assert adjust_holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert adjust_holm([0.6, 0.7]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_p_value_counts_replicates_beyond_zero() -> None:
    assert compute_p_value(np.append(np.arange(-10, 990) + 0.5, np.nan)) == pytest.approx(2 * 11 / 1001)
    assert compute_p_value(np.ones(1999)) == 0.001
    assert compute_p_value(np.zeros(50)) == 1.0
    assert compute_p_value([np.nan]) is None


def test_mean_over_tasks_is_as_wide_as_tasks_differ() -> None:
    rng = np.random.default_rng(0)
    points = np.array([0.02, 0.05, 0.01, 0.04, 0.03, 0.06, 0.00, 0.03])
    replicates = points[:, None] + 0.002 * rng.normal(size=(8, 2000))
    found = compare_over_tasks(points, replicates, seed=1)
    assert found.difference == pytest.approx(points.mean())
    half = student.ppf(0.975, 7) * points.std(ddof=1) / np.sqrt(8)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.p_value < 0.05 < 0.02 + found.low / half and found.method == "hierarchical_bootstrap"
    assert compare_over_tasks(points - points.mean(), replicates, seed=1).p_value > 0.5
    agree = compare_over_tasks(np.full(8, 0.03), replicates, seed=1)
    assert (agree.difference, agree.low) == (pytest.approx(0.03), None) and "same on every task" in str(agree.reason)


def test_mean_over_tasks_is_undefined_where_a_task_is() -> None:
    replicates = np.random.default_rng(0).normal(size=(4, 100))
    replicates[1, :3] = np.nan  # a few undefined replicates are replaced by others of their task
    before = replicates.copy()
    assert compare_over_tasks(np.arange(4.0), replicates, seed=0).low is not None
    np.testing.assert_array_equal(replicates, before)
    replicates[2] = np.nan
    assert compare_over_tasks(np.zeros(4), replicates, seed=0).reason == "undefined on one of the tasks"
    two = compare_over_tasks([0.1, 0.2], replicates[:2], seed=0)
    assert (two.difference, two.low) == (pytest.approx(0.15), None) and "2 tasks, at least 3" in str(two.reason)
