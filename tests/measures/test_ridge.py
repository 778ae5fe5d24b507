"""Ridge equals scikit-learn's with the same penalty, and its penalty is that of the groups that were held out."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from panfm.errors import UserError
from panfm.measures.outcomes import Floats
from panfm.measures.probe import C_GRID, make_group_folds
from panfm.measures.ridge import fit_ridge, fit_ridge_cv


def make_rows(seed: int, num_rows: int = 90, num_features: int = 30) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (num_rows, num_features)) * rng.uniform(0.5, 4, num_features) + 3
    target = 50 + 6 * features[:, 0] - 4 * features[:, 1] + rng.normal(0, 15, num_rows)
    return features, target, np.arange(num_rows) // 3


@pytest.mark.parametrize("num_features", [30, 200])  # fewer and more than rows
@pytest.mark.parametrize("C", [1e-4, 0.01, 10.0])
def test_it_equals_sklearn(num_features: int, C: float) -> None:
    features, target, _ = make_rows(0, num_features=num_features)
    model = fit_ridge(features, target, C=C)
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    # The target's unit does not matter: its deviation multiplies both sides of the normal equations.
    expected = Ridge(alpha=1 / C, solver="cholesky").fit(standardised, target)
    np.testing.assert_allclose(model.weight, expected.coef_, atol=1e-8)
    np.testing.assert_allclose(model.predict(features), expected.predict(standardised), atol=1e-8)


@pytest.mark.parametrize("num_features", [30, 200])
def test_the_penalty_is_chosen_on_groups_that_were_held_out(num_features: int) -> None:
    features, target, groups = make_rows(1, num_features=num_features)
    fit = fit_ridge_cv(features, target, groups, seed=5)
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    folds = make_group_folds(np.zeros(90, np.int64), groups, 5, 5)
    assert fit.num_folds == 5 and all(len(set(folds[groups == group])) == 1 for group in groups)
    for C in C_GRID[2::5]:
        error = 0.0
        for fold in range(5):
            rows = folds != fold
            model = Ridge(alpha=1 / C, solver="svd").fit(standardised[rows], target[rows])
            error += ((model.predict(standardised[~rows]) - target[~rows]) ** 2).sum()
        assert fit.squared_errors[C] == pytest.approx(error / 90, rel=1e-6)
    assert min(fit.squared_errors, key=lambda C: fit.squared_errors[C]) == fit.C and not fit.at_boundary


def test_the_unit_of_the_target_changes_nothing_but_the_unit() -> None:
    features, target, groups = make_rows(2)
    years, days = (fit_ridge_cv(features, target * unit, groups, seed=0) for unit in (1.0, 365.25))
    assert years.C == days.C
    np.testing.assert_allclose(days.ridge.predict(features), 365.25 * years.ridge.predict(features))


def test_what_cannot_be_fitted_is_said() -> None:
    features, target, groups = make_rows(3)
    with pytest.raises(UserError, match="targets of all 90 training rows are equal"):
        fit_ridge_cv(features, np.ones(90), groups, seed=0)
    with pytest.raises(UserError, match="target of training row 4 not finite"):
        fit_ridge_cv(features, np.where(np.arange(90) == 4, np.nan, target), groups, seed=0)
    one_patient = fit_ridge_cv(features, target, np.zeros(90), seed=0)
    assert one_patient.num_folds == 0 and pytest.approx(1 / 30) == one_patient.C
