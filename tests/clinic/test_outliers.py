"""The outlier score's Gaussian: right where truth is known, sane where there are few images."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from panfm.clinic.outliers import choose_outlier_threshold, compute_shrinkage, fit_outliers
from panfm_predict.outliers import compute_scores


def draw(num: int, dims: int, seed: int, share: float = 0.9) -> np.ndarray:
    """Correlated rows [N, D]: most of the variance in few directions, the same ones whatever the seed."""
    mixing = np.random.default_rng(99).normal(size=(dims, dims)) * share ** np.arange(dims)[:, None]
    return np.random.default_rng(seed).normal(size=(num, dims)) @ mixing


@pytest.mark.parametrize(("num", "dims"), [(300, 40), (40, 40), (30, 120)])
def test_score_is_ledoit_and_wolfs_mahalanobis_distance(num: int, dims: int) -> None:
    z, new = draw(num, dims, 0), draw(20, dims, 1)
    peer = LedoitWolf().fit(z)
    assert compute_shrinkage(z - z.mean(axis=0)) == pytest.approx(peer.shrinkage_, rel=1e-9)
    np.testing.assert_allclose(compute_scores(new, fit_outliers(z)), peer.mahalanobis(new) / dims, rtol=1e-6)


def test_several_images_of_a_patient_shrink_more_than_as_many_patients() -> None:
    z = draw(60, 30, 0)
    groups = np.repeat(np.arange(60), 5)
    repeated = np.repeat(z, 5, axis=0)
    centred = repeated - repeated.mean(axis=0)
    # Five copies of an image tell nothing new: with patients named, the shrinkage is that of one image each.
    assert compute_shrinkage(centred, groups) == pytest.approx(compute_shrinkage(z - z.mean(axis=0)), rel=1e-9)
    assert compute_shrinkage(centred) < 0.5 * compute_shrinkage(centred, groups)
    order = np.random.default_rng(0).permutation(len(groups))
    assert compute_shrinkage(centred[order], groups[order]) == pytest.approx(compute_shrinkage(centred, groups))


@pytest.mark.parametrize("num", [1, 2, 3, 10])
def test_few_images_and_constant_columns_give_finite_positive_arrays(num: int) -> None:
    z = draw(num, 16, 3)
    z[:, 4] = 0.0
    outliers = fit_outliers(z)
    assert outliers.residual > 0 and (outliers.variances > 0).all()
    np.testing.assert_allclose(outliers.components @ outliers.components.T, np.eye(len(outliers.variances)), atol=1e-9)
    assert num == 1 or outliers.residual >= (z.var(axis=0).mean() / num) * (1 - 1e-9)  # an image's worth of doubt
    scores = compute_scores(np.vstack([z, draw(5, 16, 4)]), outliers)
    assert np.isfinite(scores).all()


def test_identical_images_leave_a_distance_in_units_of_the_features() -> None:
    outliers = fit_outliers(np.zeros((5, 4)))
    np.testing.assert_allclose(compute_scores(np.array([[0.0, 0, 0, 0], [1, 1, 1, 1]]), outliers), [0, 1])


@pytest.mark.parametrize(("num", "dims", "least"), [(400, 30, 0.98), (60, 100, 0.9)])
def test_another_source_is_told_and_new_images_of_the_same_pass(num: int, dims: int, least: float) -> None:
    z = draw(num, dims, 0)
    folds = np.arange(num) % 10
    scores = np.empty(num)
    for fold in range(10):
        scores[folds == fold] = compute_scores(z[folds == fold], fit_outliers(z[folds != fold]))
    threshold = choose_outlier_threshold(scores)
    outliers = fit_outliers(z)
    same = compute_scores(draw(2000, dims, 1), outliers)
    strange = compute_scores(np.random.default_rng(2).normal(size=(500, dims)) * draw(2000, dims, 1).std(), outliers)
    assert (same > threshold).mean() < 0.03
    assert (strange > threshold).mean() > least


def test_threshold_counts_one_more_patient() -> None:
    scores = np.arange(1000.0)
    assert choose_outlier_threshold(scores) == 990  # rank 991 of 1001
    assert choose_outlier_threshold(scores[:50]) == 49  # the highest: 99 patients are needed for 99 %
    # 500 patients with two images: one more patient brings two images.
    assert choose_outlier_threshold(scores, np.repeat(np.arange(500), 2)) == 991
    # The share of new images above it is on average what was promised.
    rng = np.random.default_rng(0)
    above = [1 - choose_outlier_threshold(rng.random(199)) for _ in range(4000)]
    assert np.mean(above) == pytest.approx(0.01, abs=0.0006)
