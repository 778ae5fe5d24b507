"""The batched probe: the numbers of the one that walks the path, whatever is beside it in the batch."""

import numpy as np
import pytest
import torch

from panfm.errors import UserError
from panfm.measures.lbfgs import minimise_batched
from panfm.measures.probe import fit_probe_cv
from panfm.measures.probe_batched import Labelled, fit_probes_cv


def make_data(num_rows: int, num_features: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)  # a fifth is wrong, so that no C separates them
    features = rng.normal(size=(num_rows, num_features)) @ rng.normal(size=(num_features, num_features))
    features += 0.6 * rng.normal(size=(num_classes, num_features))[labels] * np.sqrt(num_features) + 3.0
    labels = np.where(rng.random(num_rows) < 0.2, rng.integers(0, num_classes, num_rows), labels)
    return features, labels, np.array([f"P{row // 2}" for row in range(num_rows)])


def choose(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, rows: np.ndarray, seed: int = 0) -> Labelled:
    return Labelled(rows, labels[rows], groups[rows], seed)


@pytest.mark.parametrize(("num_features", "num_classes"), [(12, 2), (12, 4), (90, 3)])
def test_it_is_the_probe_of_the_path_for_every_choice_of_labels(num_features: int, num_classes: int) -> None:
    features, labels, groups = make_data(160, num_features, num_classes)
    features[:, 0] = 7.0  # constant: standardised to 0 by both
    rng = np.random.default_rng(1)
    rows = [np.arange(160), np.sort(rng.choice(160, 80, replace=False)), np.sort(rng.choice(160, 40, replace=False))]
    fits = fit_probes_cv(
        features, [choose(features, labels, groups, r, seed) for seed, r in enumerate(rows)], num_classes=num_classes
    )
    for seed, (fit, r) in enumerate(zip(fits, rows, strict=True)):
        expected = fit_probe_cv(features[r], labels[r], groups[r], num_classes=num_classes, seed=seed)
        assert (fit.C, fit.num_folds, fit.at_boundary) == (expected.C, expected.num_folds, expected.at_boundary)
        assert list(fit.log_losses) == list(expected.log_losses)
        np.testing.assert_allclose(list(fit.log_losses.values()), list(expected.log_losses.values()), rtol=3e-3)
        assert fit.converged and expected.converged
        assert fit.probe.objective == pytest.approx(expected.probe.objective, rel=1e-6)
        np.testing.assert_allclose(fit.probe.predict(features), expected.probe.predict(features), atol=2e-4)
        np.testing.assert_allclose(fit.held_out, expected.held_out, atol=2e-2)  # fits of folds stop early in both
        assert (abs(fit.held_out - expected.held_out) < 2e-3).mean() > 0.95


def test_a_class_without_rows_and_a_class_with_one_group() -> None:
    features, labels, groups = make_data(120, 8, 4)
    without = np.flatnonzero(labels != 2)
    single = np.concatenate([np.flatnonzero(labels != 2), np.flatnonzero(labels == 2)[:1]])
    two = np.flatnonzero(labels < 2)
    fits = fit_probes_cv(features, [choose(features, labels, groups, r) for r in (without, single, two)], num_classes=4)
    for fit, rows in zip(fits, (without, single, two), strict=True):
        expected = fit_probe_cv(features[rows], labels[rows], groups[rows], num_classes=4, seed=0)
        assert (fit.C, fit.num_folds) == (expected.C, expected.num_folds)
        np.testing.assert_allclose(fit.probe.predict(features), expected.probe.predict(features), atol=2e-4)
    assert fits[1].num_folds == 0 and fits[1].log_losses == {} and fits[1].held_out is None
    assert (fits[0].probe.predict(features)[:, 2] == 0).all()
    with pytest.raises(UserError, match="at least two classes"):
        fit_probes_cv(features, [choose(features, labels, groups, np.flatnonzero(labels == 0))], num_classes=4)


def test_problems_end_on_their_own() -> None:
    curvature = torch.tensor([[1.0, 2.0], [1.0, 1e4], [1e-3, 5.0]], dtype=torch.float64)
    centre = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-4.0, 0.0]], dtype=torch.float64)
    calls: list[int] = []

    def evaluate(x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(at))
        away = x - centre[at]
        return (0.5 * curvature[at] * away**2).sum(dim=1), curvature[at] * away

    found, values, converged = minimise_batched(
        evaluate, torch.zeros(3, 2, dtype=torch.float64), tolerance=1e-14, max_iterations=200
    )
    assert converged.all() and (values < 1e-8).all()
    torch.testing.assert_close(found, centre, atol=1e-2, rtol=0)
    assert calls[0] == 3 and calls[-1] < 3
    *_, unfinished = minimise_batched(evaluate, torch.zeros(3, 2, dtype=torch.float64), tolerance=0.0, max_iterations=1)
    assert not unfinished.any()
