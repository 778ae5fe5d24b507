"""The hazard model equals published fits and a minimiser of the likelihood written out pair by pair."""

import numpy as np
import pytest
from scipy.optimize import minimize

from panfm.errors import UserError
from panfm.measures.cox import CoxModel, PartialLikelihood, fit_cox, fit_cox_cv
from panfm.measures.outcomes import Floats, Outcome
from panfm.measures.probe import C_GRID, make_group_folds
from panfm.measures.survival import MEASURES, compute_event_free

FREE = 1e9  # C without a penalty to speak of


def make_patients(seed: int, num_rows: int = 80, num_features: int = 5) -> tuple[Floats, Floats, Floats, Floats]:
    """Features, days with ties, events (0, 1, some 2), groups of two."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (num_rows, num_features)) * rng.uniform(0.5, 3, num_features) + 2
    hazard = np.exp(0.5 * (features[:, 0] - features[:, 1]) - 1)
    days, gone = np.ceil(8 * rng.exponential(1 / hazard)).clip(max=60), np.ceil(rng.uniform(1, 40, num_rows))
    event = np.where(days <= gone, 1, np.where(rng.random(num_rows) < 0.3, 2, 0))
    return features, np.minimum(days, gone), event, np.arange(num_rows) // 2


def compute_brute_loss(risk: Floats, days: Floats, is_event: Floats) -> float:
    """Minus Efron's log partial likelihood, one event at a time."""
    loss = 0.0
    for day in np.unique(days[is_event]):
        tied = np.flatnonzero((days == day) & is_event)
        for place, case in enumerate(tied):
            denominator = np.exp(risk[days >= day]).sum() - place / len(tied) * np.exp(risk[tied]).sum()
            loss += np.log(denominator) - risk[case]
    return loss


def get_slope(model: CoxModel) -> float:
    return float(model.weight[0] / model.scale[0])


def test_published_hazard_ratios_are_found_again() -> None:
    # Remission of leukaemia, 6-mercaptopurine against placebo (Freireich 1963): 1.572 by Efron, 1.509 by Breslow.
    treated = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    relapsed = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    group = np.repeat([0.0, 1.0], 21)[:, None]
    model = fit_cox(group, treated + placebo, relapsed + [1] * 21, C=FREE)
    assert get_slope(model) == pytest.approx(1.572, abs=5e-4) and model.converged
    # Acute myelogenous leukaemia, not maintained against maintained (Miller 1997): 0.9155.
    days = [9, 13, 13, 18, 23, 28, 31, 34, 45, 48, 161, 5, 5, 8, 8, 12, 16, 23, 27, 30, 33, 43, 45]
    event = [1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    model = fit_cox(np.repeat([0.0, 1.0], [11, 12])[:, None], days, event, C=FREE)
    assert get_slope(model) == pytest.approx(0.9155, abs=5e-5)


def test_loss_and_gradient_equal_the_written_out_likelihood() -> None:
    _, days, event, _ = make_patients(0)
    risk = np.random.default_rng(1).normal(0, 1, len(days))
    likelihood = PartialLikelihood.build(days, event == 1)
    loss, gradient = likelihood.compute_loss_and_gradient(risk)
    assert loss == pytest.approx(compute_brute_loss(risk, days, event == 1), abs=1e-9)
    assert likelihood.compute_loss(risk + 500) == pytest.approx(loss, abs=1e-6)  # no overflow, and the level is free
    for row in range(0, len(days), 7):
        step = np.eye(len(days))[row] * 1e-5
        slope = (likelihood.compute_loss(risk + step) - likelihood.compute_loss(risk - step)) / 2e-5
        assert gradient[row] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("num_features", [5, 120])  # fewer and more than rows
@pytest.mark.parametrize("C", [0.01, 1.0])
def test_the_fit_is_the_minimum_of_the_penalised_objective(num_features: int, C: float) -> None:
    features, days, event, _ = make_patients(2, num_features=num_features)
    model = fit_cox(features, days, event, C=C)
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    likelihood = PartialLikelihood.build(days, event == 1)

    def evaluate(weight: Floats) -> tuple[float, Floats]:
        loss, gradient = likelihood.compute_loss_and_gradient(standardised @ weight)
        return loss + weight @ weight / (2 * C), standardised.T @ gradient + weight / C

    # tol far below the demanded gap; started elsewhere.
    found = minimize(evaluate, np.ones(num_features), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    assert model.objective == pytest.approx(found.fun, rel=1e-6)
    np.testing.assert_allclose(model.weight, found.x, atol=2e-4)
    np.testing.assert_allclose(model.predict_risk(features), standardised @ model.weight, atol=1e-9)


def test_probabilities_without_features_are_the_common_curve() -> None:
    """With all hazards alike exp(-Nelson-Aalen), or Aalen-Johansen, is left: near the Kaplan-Meier curve."""
    _, days, event, _ = make_patients(3, num_rows=2000)
    nothing = np.zeros((2000, 1))
    grid = np.array([0.0, 3.0, 8.0, 20.0, 39.0])
    for events in (np.minimum(event, 1) * (event != 2), event):
        free = fit_cox(nothing, days, events, C=1.0).predict_event_free(nothing[:1], grid)[0]
        np.testing.assert_allclose(free, compute_event_free(days, events).read(grid), atol=0.01)
        assert free[0] == 1 and (np.diff(free) < 0).all()


def test_competing_events_keep_the_event_from_occurring() -> None:
    features, days, event, _ = make_patients(4, num_rows=300)
    with_rivals = fit_cox(features, days, event, C=0.1)
    without = fit_cox(features, days, np.where(event == 2, 0, event), C=0.1)
    grid = np.array([5.0, 15.0, 35.0])
    np.testing.assert_allclose(with_rivals.weight, without.weight)  # the hazard of the event is the same
    assert (with_rivals.predict_event_free(features, grid) > without.predict_event_free(features, grid)).all()
    # By hand for one row: sum over days of P(free of both before) x P(event on that day).
    ratio = np.exp(with_rivals.predict_risk(features[:1]))[0]
    survived, incidence = 1.0, 0.0
    for day in range(1, 36):
        own = ratio * with_rivals.hazard[with_rivals.times == day].sum()
        incidence += survived * (1 - np.exp(-own))
        survived *= np.exp(-own - with_rivals.competing_hazard[with_rivals.competing_times == day].sum())
    assert with_rivals.predict_event_free(features[:1], grid)[0, 2] == pytest.approx(1 - incidence, abs=1e-12)


def test_the_penalty_is_chosen_on_groups_that_were_held_out() -> None:
    features, days, event, groups = make_patients(5, num_rows=120, num_features=60)
    fit = fit_cox_cv(features, days, event, groups, seed=3, num_folds=4)
    assert fit.num_folds == 4 and not fit.at_boundary and min(fit.losses, key=lambda C: fit.losses[C]) == fit.C
    # The loss of one C, fold by fold with separate fits on features standardised over all rows.
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    folds = make_group_folds(event == 1, groups, 4, 3)
    assert all(len(set(folds[groups == group])) == 1 for group in groups)
    C, total = fit.C, 0.0
    for fold in range(4):
        rows = folds != fold
        likelihood = PartialLikelihood.build(days[rows], event[rows] == 1)

        def evaluate(
            weight: Floats, likelihood: PartialLikelihood = likelihood, rows: Floats = rows
        ) -> tuple[float, Floats]:
            loss, gradient = likelihood.compute_loss_and_gradient(standardised[rows] @ weight)
            return loss + weight @ weight / (2 * C), standardised[rows].T @ gradient + weight / C

        weight = minimize(evaluate, np.zeros(60), jac=True, method="BFGS", options={"gtol": 1e-8}).x
        risk = standardised @ weight
        total += compute_brute_loss(risk, days, event == 1) - compute_brute_loss(
            risk[rows], days[rows], event[rows] == 1
        )
        np.testing.assert_allclose(fit.held_out_risk[~rows], risk[~rows], atol=0.01)
    assert fit.losses[C] == pytest.approx(total / (event == 1).sum(), abs=1e-4)


def test_noise_is_penalised_away_and_a_signal_is_found() -> None:
    features, days, event, groups = make_patients(6, num_rows=400, num_features=40)
    found = fit_cox_cv(features, days, event, groups, seed=0)
    noise = np.random.default_rng(8).normal(0, 1, (400, 40))
    blank = fit_cox_cv(noise, days, event, groups, seed=0)
    assert np.abs(found.model.weight[:2]).min() > 5 * np.abs(found.model.weight[2:]).mean()
    assert found.losses[found.C] < found.losses[C_GRID[0]] - 0.1  # nats an event better than no model
    assert blank.losses[blank.C] > blank.losses[C_GRID[0]] - 0.01
    assert blank.model.predict_risk(noise).std() < 0.2 < 0.5 < found.model.predict_risk(features).std()


def test_no_event_and_single_groups() -> None:
    features, days, event, groups = make_patients(9)
    with pytest.raises(UserError, match="none of the 80 training rows has the event"):
        fit_cox_cv(features, days, np.where(event == 1, 0, event), groups, seed=0)
    alone = np.zeros(80)
    alone[np.flatnonzero(event == 1)[0]] = 1
    fit = fit_cox_cv(features, days, alone, groups, seed=0)
    assert fit.num_folds == 0 and pytest.approx(1 / 5) == fit.C and np.isfinite(fit.held_out_risk).all()
    with pytest.raises(UserError, match="row 3 are not finite"):
        fit_cox(np.where(np.arange(80)[:, None] == 3, np.nan, features), days, event, C=1.0)


def test_held_out_risks_order_the_events() -> None:
    features, days, event, groups = make_patients(10, num_rows=300)
    fit = fit_cox_cv(features, days, event, groups, seed=0)
    free = fit.model.predict_event_free(features, [5.0, 10.0, 20.0])
    scores = np.concatenate([fit.held_out_risk[:, None], free], axis=1)
    outcome = Outcome(np.zeros(300, np.int64), scores, groups.astype(str), np.stack([days, event], 1),
                      np.array([5.0, 10.0, 20.0]))  # fmt: skip
    assert MEASURES["harrell_c"].compute(outcome, np.ones((1, 300)))[0] > 0.7
    brier = MEASURES["integrated_brier"]
    assert brier.compute(outcome, np.ones((1, 300)))[0] < brier.chance(outcome)
