"""Drift: false alarms at the stated rate whatever the patients bring, and alarms where something changed."""

import numpy as np
import pytest

from panfm.clinic import drift
from panfm.clinic.drift import Drift, adjust_holm, compute_drift, compute_quantile_mean, compute_shares_below
from panfm.clinic.outliers import fit_outliers
from panfm_predict.classifier import compute_probabilities
from panfm_predict.folder import Head
from panfm_predict.outliers import compute_scores, project

DIMS, NUM_REFERENCE = 12, 150
PERCENT = np.linspace(0, 100, 101)


def draw(num_patients: int, seed: int, images: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Skewed features [N, D] of patients whose images are nearly the same."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_patients), rng.integers(1, 2 * images, num_patients))
    own = rng.gamma(2.0, size=(num_patients, DIMS))[groups]
    return own + 0.2 * rng.normal(size=own.shape), groups


def make_head(seed: int = 0) -> tuple[Head, float]:
    features, groups = draw(NUM_REFERENCE, seed)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    z = (features - mean) / scale
    outliers, weight = fit_outliers(z, groups), np.random.default_rng(7).normal(size=(3, DIMS)) / 4
    scores = np.empty(len(z))
    for fold in range(5):
        own = groups % 5 == fold
        scores[own] = compute_scores(z[own], fit_outliers(z[~own], groups[~own]))
    head = Head(
        mean, scale, weight, np.zeros(3), outliers,
        np.percentile(project(z, outliers), PERCENT, axis=0).T,
        np.percentile(scores, PERCENT),
        np.percentile(compute_probabilities(z @ weight.T, 1.0), PERCENT, axis=0).T,
        None, None,
    )  # fmt: skip
    return head, float(np.percentile(scores, 99))


def compare(head: Head, threshold: float, features: np.ndarray, groups: np.ndarray, rate: float = 0.01) -> Drift:
    z = head.standardise(features)
    probabilities = compute_probabilities(z @ head.weight.T, 1.0)
    return compute_drift(z, probabilities, groups, head, threshold, NUM_REFERENCE, rate=rate)


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated_with_several_images_a_patient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drift, "NUM_DRAWS", 399)
    alarms, naive = 0, 0
    for seed in range(100):
        head, threshold = make_head(seed)
        features, groups = draw(60, 1000 + seed)
        alarms += compare(head, threshold, features, groups, rate=0.05).verdict == "drift"
        naive += compare(head, threshold, features, np.arange(len(groups)), rate=0.05).verdict == "drift"
    assert alarms <= 11  # of 5 expected at most: exceeded by chance once in 200 runs of this test
    assert naive > 2 * alarms + 5  # the same without patients: what the flips of whole patients are for


@pytest.mark.parametrize("change", ["colour", "other_source", "mix"])
def test_real_changes_are_found(change: str) -> None:
    head, threshold = make_head()
    features, groups = draw(120, 5)
    if change == "colour":
        features[:, 0] += 1.5
    elif change == "other_source":
        features = features[:, ::-1] * np.linspace(0.2, 4, DIMS)
    else:  # patients with a high first class come, the others stay away
        first = compute_probabilities(head.standardise(features) @ head.weight.T, 1.0)[:, 0]
        keep = first > np.median(first)
        features, groups = features[keep], groups[keep]
    found = compare(head, threshold, features, groups)
    alarms = {check.name for check in found.checks if check.is_alarm}
    assert found.verdict == "drift"
    assert {"colour": "features", "other_source": "outliers", "mix": "probabilities"}[change] in alarms


def test_fewer_patients_than_needed_give_no_figure() -> None:
    head, threshold = make_head()
    features, groups = draw(19, 5)
    found = compare(head, threshold, features + 5, groups)
    assert found.verdict == "too_few"
    assert (found.checks, found.shifts, found.mean_probabilities) == ((), (), ())


def test_a_significant_but_tiny_shift_is_no_alarm() -> None:
    places = np.full((5000, 1), 0.52) + np.random.default_rng(0).uniform(-0.2, 0.2, (5000, 1))
    shifts, p_value = drift.judge_shifts(places, np.arange(5000), 10**6, np.random.default_rng(0))
    assert p_value < 0.001 and shifts[0] < drift.MIN_SHIFT
    assert not drift._is_large("features", 0.5 + shifts[0])


def test_shares_below_are_midranks_between_quantiles() -> None:
    quantiles = np.linspace(0, 10, 101)[None]
    values = np.array([[-1.0], [0.25], [5.0], [12.0]])
    np.testing.assert_allclose(compute_shares_below(values, quantiles)[:, 0], [0, 0.025, 0.5, 1], atol=0.006)
    tied = np.array([0.0] * 60 + [1.0] * 41)[None]  # most of the fitted images share one value
    share = compute_shares_below(np.array([[0.0], [1.0]]), tied)[:, 0]
    np.testing.assert_allclose(share, [0.295, 0.8], atol=0.011)
    rng = np.random.default_rng(0)
    known, new = rng.gamma(1, size=20_000), rng.gamma(1, size=2000)
    uniform = compute_shares_below(new[:, None], np.percentile(known, PERCENT)[None])
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert compute_quantile_mean(np.percentile(known, PERCENT)[None])[0] == pytest.approx(known.mean(), abs=0.05)


def test_outliers_are_judged_by_patients_and_by_how_well_the_threshold_is_known() -> None:
    def judge(number: np.ndarray, flagged: list[int], reference: int) -> float:
        is_outlier = np.isin(np.arange(len(number)), flagged)
        return drift.judge_outliers(is_outlier, number, reference, np.random.default_rng(0))[2]

    single = np.arange(100)
    assert judge(single, [3], 1000) > 0.5  # one in 100 is what is expected
    assert judge(single, list(range(8)), 1000) < 0.001
    assert judge(single, list(range(8)), 30) > judge(single, list(range(8)), 1000) * 10
    assert judge(np.arange(100) // 10, list(range(8)), 1000) > 0.3  # eight images of one patient


def test_holm() -> None:
    assert adjust_holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
