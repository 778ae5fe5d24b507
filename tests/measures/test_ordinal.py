"""The probe of ordered classes: two classes are the linear probe, and probabilities never rise against the order."""

import numpy as np
import pytest
from sklearn.isotonic import isotonic_regression

from panfm.measures.ordinal import fit_ordinal_cv, make_monotone
from panfm.measures.outcomes import Floats
from panfm.measures.probe import fit_probe, fit_probe_cv


def make_rows(seed: int, num_classes: int, num_rows: int = 160) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (num_rows, 20))
    hidden = features[:, 0] + 0.5 * features[:, 1] + rng.normal(0, 0.7, num_rows)
    return features, np.digitize(hidden, np.linspace(-1, 1, num_classes - 1)), np.arange(num_rows) // 2


def test_two_classes_are_the_linear_probe() -> None:
    features, labels, groups = make_rows(0, 2)
    fit = fit_ordinal_cv(features, labels, groups, num_classes=2, seed=1)
    probe = fit_probe_cv(features, labels, groups, num_classes=2, seed=1)
    assert fit.C == probe.C and fit.num_folds == probe.num_folds == 5
    np.testing.assert_allclose(
        fit.probe.predict(features), probe.probe.predict(features), atol=1e-5
    )  # two ways to one optimum
    assert fit.log_losses == pytest.approx(probe.log_losses)


def test_each_step_is_a_probe_of_at_least_this_class_with_one_penalty() -> None:
    features, labels, groups = make_rows(1, 4)
    fit = fit_ordinal_cv(features, labels, groups, num_classes=4, seed=0)
    reached = [
        fit_probe(features, (labels >= k).astype(int), num_classes=2, C=fit.C).predict(features)[:, 1]
        for k in range(1, 4)
    ]
    monotone = make_monotone(np.stack(reached, axis=1))
    scores = fit.probe.predict(features)
    np.testing.assert_allclose(1 - np.cumsum(scores, axis=1)[:, :-1], monotone, atol=1e-9)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)
    assert scores.min() >= 0 and fit.converged
    # No single step has the lowest sum: the penalty is a compromise of all of them.
    assert min(fit.log_losses, key=lambda C: fit.log_losses[C]) == fit.C


def test_the_order_is_learned() -> None:
    features, labels, groups = make_rows(2, 4, num_rows=300)
    train = np.arange(300) < 200
    fit = fit_ordinal_cv(features[train], labels[train], groups[train], num_classes=4, seed=0)
    expected = fit.probe.predict(features[~train]) @ np.arange(4)
    error = np.abs(expected - labels[~train]).mean()
    assert error < 0.7 * np.abs(np.median(labels[train]) - labels[~train]).mean()


def test_monotone_is_isotonic_regression() -> None:
    reached = np.random.default_rng(3).random((200, 6))
    found = make_monotone(reached)
    for row, expected in zip(found, reached, strict=True):
        np.testing.assert_allclose(row, isotonic_regression(expected, increasing=False), atol=1e-12)
    falling = np.sort(reached, axis=1)[:, ::-1]
    np.testing.assert_allclose(make_monotone(falling), falling, atol=1e-15)


def test_classes_without_training_rows_have_probability_0() -> None:
    features, labels, groups = make_rows(4, 3)
    fit = fit_ordinal_cv(features, labels + 1, groups, num_classes=6, seed=0)  # classes 0, 4 and 5 never occur
    scores = fit.probe.predict(features)
    assert (scores[:, [0, 4, 5]] == 0).all() and (scores[:, 1:4] > 0).any(axis=0).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)


def test_a_class_of_one_patient_presets_the_penalty() -> None:
    features, labels, groups = make_rows(5, 3)
    labels = np.minimum(labels, 1)
    labels[0] = 2
    fit = fit_ordinal_cv(features, labels, groups, num_classes=3, seed=0)
    assert fit.num_folds == 0 and pytest.approx(1 / 20) == fit.C and np.isfinite(fit.probe.predict(features)).all()
