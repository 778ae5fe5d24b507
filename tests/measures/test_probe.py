"""The probe's solver reaches scikit-learn's optimum; folds keep groups whole; C is chosen by log-loss."""

import warnings

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from panfm.errors import UserError
from panfm.measures.probe import C_GRID, compute_preset_c, fit_probe, fit_probe_cv, make_group_folds


def make_features(num_rows: int, num_features: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated float32 features of very different scales with overlapping classes."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(num_rows, num_features)) * np.arange(1, num_features + 1) ** -0.7
    logits = hidden @ generator.normal(size=(num_features, num_classes))
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    labels[:num_classes] = np.arange(num_classes)
    mixed = hidden @ generator.normal(size=(num_features, num_features)) * 10 ** generator.uniform(-2, 2, num_features)
    return (mixed + 5).astype(np.float32), labels


def compute_objective(
    features: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, C: float
) -> float:
    logits = features @ weight.T + bias
    loss = (logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).sum()
    return float(loss + (weight**2).sum() / (2 * C))


def fit_with_sklearn(features: np.ndarray, labels: np.ndarray, C: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=C, tol=1e-12, max_iter=20_000).fit(features, labels)


@pytest.mark.parametrize("C", [1e-5, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize(("num_rows", "num_features", "num_classes"), [(300, 20, 4), (60, 150, 3)])
def test_multiclass_optimum_is_sklearns(num_rows: int, num_features: int, num_classes: int, C: float) -> None:
    features, labels = make_features(num_rows, num_features, num_classes)
    probe = fit_probe(features, labels, num_classes=num_classes, C=C)
    standardised = (features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)) / features.std(
        axis=0, dtype=np.float64
    )
    peer = fit_with_sklearn(standardised, labels, C)
    theirs = compute_objective(standardised, labels, peer.coef_, peer.intercept_, C)
    ours = compute_objective(standardised, labels, probe.weight, probe.bias, C)
    assert probe.objective == pytest.approx(ours, rel=1e-9)
    assert (ours - theirs) / theirs <= 1e-6
    np.testing.assert_allclose(probe.predict(features), peer.predict_proba(standardised), atol=2e-4)
    assert probe.converged


@pytest.mark.parametrize("C", [1e-4, 0.1, 10.0])
def test_binary_optimum_is_sklearns_at_the_same_c(C: float) -> None:
    features, labels = make_features(250, 30, 2)
    probe = fit_probe(features, labels, num_classes=2, C=C)
    standardised = (features.astype(np.float64) - probe.mean) / probe.scale
    peer = fit_with_sklearn(standardised, labels, C)

    def objective(w: np.ndarray, b: float) -> float:
        return float(np.logaddexp(0, (1 - 2 * labels) * (standardised @ w + b)).sum() + w @ w / (2 * C))

    theirs = objective(peer.coef_[0], peer.intercept_[0])
    ours = objective(probe.weight[1] - probe.weight[0], probe.bias[1] - probe.bias[0])
    assert (ours - theirs) / theirs <= 1e-6
    np.testing.assert_allclose(probe.predict(features), peer.predict_proba(standardised), atol=1e-4)


def test_constant_feature_and_class_without_rows_are_harmless() -> None:
    features, labels = make_features(120, 8, 3)
    features[:, 2] = 0.1
    probe = fit_probe(features, labels * 2, num_classes=5, C=0.1)  # classes 1 and 3 have no rows
    without = fit_probe(np.delete(features, 2, axis=1), labels, num_classes=3, C=0.1)
    predicted = probe.predict(features)
    assert (predicted[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(predicted[:, [0, 2, 4]], without.predict(np.delete(features, 2, axis=1)), atol=1e-5)
    np.testing.assert_allclose(predicted.sum(axis=1), 1)


def test_standardisation_uses_the_training_rows_only() -> None:
    features, labels = make_features(100, 5, 2)
    probe = fit_probe(features, labels, num_classes=2, C=1.0)
    np.testing.assert_allclose(probe.mean, features.mean(axis=0, dtype=np.float64))
    far = probe.predict(features[:3] + 1000)
    assert not np.allclose(far, probe.predict(features[:3]))
    np.testing.assert_array_equal(far[0], probe.predict(features[:1] + 1000)[0])


def test_folds_keep_groups_whole_and_spread_classes() -> None:
    generator = np.random.default_rng(0)
    groups = np.array([f"g{number}" for number in generator.integers(0, 150, 600)])
    labels = generator.choice(4, 600, p=[0.7, 0.2, 0.06, 0.04])
    folds = make_group_folds(labels, groups, 5, seed=1)
    assert set(folds) == {0, 1, 2, 3, 4}
    for group in set(groups):
        assert len(set(folds[groups == group])) == 1
    counts = np.stack([np.bincount(folds[labels == label], minlength=5) for label in range(4)])
    assert (np.abs(counts - counts.mean(axis=1, keepdims=True)) <= np.maximum(3, 0.15 * counts)).all()
    np.testing.assert_array_equal(folds, make_group_folds(labels, groups, 5, seed=1))
    assert (folds != make_group_folds(labels, groups, 5, seed=2)).any()


def test_class_with_three_groups_lowers_the_folds_to_three() -> None:
    labels = np.array([0] * 30 + [1] * 9)
    groups = np.array([f"n{row}" for row in range(30)] + ["a", "a", "a", "b", "b", "b", "c", "c", "c"])
    folds = make_group_folds(labels, groups, 5, seed=0)
    assert folds.max() == 2
    assert np.bincount(folds[labels == 1]).tolist() == [3, 3, 3]


def test_class_with_one_group_takes_the_preset_c() -> None:
    features, labels = make_features(40, 10, 2)
    groups = np.where(labels == 1, "only", np.arange(40).astype(str))
    fit = fit_probe_cv(features, labels, groups, num_classes=2, seed=0)
    assert (fit.num_folds, fit.C, fit.probe.C) == (0, compute_preset_c(10), 0.1)
    assert not fit.log_losses and not fit.at_boundary


def test_cross_validation_finds_the_c_that_sklearn_would() -> None:
    features, labels = make_features(400, 40, 3, seed=3)
    groups = np.array([f"g{row // 2}" for row in range(400)])
    fit = fit_probe_cv(features, labels, groups, num_classes=3, seed=5)
    folds = make_group_folds(labels, groups, 5, seed=5)
    standardised = (features.astype(np.float64) - fit.probe.mean) / fit.probe.scale
    losses = {}
    for C in C_GRID[4:13]:
        total = 0.0
        for fold in range(5):
            peer = fit_with_sklearn(standardised[folds != fold], labels[folds != fold], C)
            held_out = folds == fold
            total -= peer.predict_log_proba(standardised[held_out])[np.arange(held_out.sum()), labels[held_out]].sum()
        losses[C] = total / 400
    assert min(losses, key=losses.__getitem__) == pytest.approx(fit.C)
    assert fit.num_folds == 5 and not fit.at_boundary and fit.converged
    for C, loss in losses.items():
        if C in fit.log_losses:
            assert fit.log_losses[C] == pytest.approx(loss, rel=2e-3)
    later = [C for C in fit.log_losses if C > fit.C]
    assert len(later) == 3  # the path ends three C after its best


def test_ties_go_to_the_stronger_penalty() -> None:
    features = np.zeros((40, 3), dtype=np.float32)  # nothing to learn: every C has the same log-loss
    labels = np.tile([0, 1], 20)
    fit = fit_probe_cv(features, labels, np.arange(40).astype(str), num_classes=2, seed=0)
    assert fit.at_boundary
    assert pytest.approx(fit.C) == C_GRID[0]


def test_bad_training_data_is_named() -> None:
    features, labels = make_features(20, 4, 2)
    with pytest.raises(UserError, match="1 class"):
        fit_probe(features, np.zeros(20, dtype=int), num_classes=2, C=1.0)
    with pytest.raises(UserError, match="0 to 1"):
        fit_probe(features, labels + 1, num_classes=2, C=1.0)
    features[7, 1] = np.nan
    with pytest.raises(UserError, match="row 7"):
        fit_probe(features, labels, num_classes=2, C=1.0)
