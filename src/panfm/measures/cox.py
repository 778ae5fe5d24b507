"""Proportional hazards with a squared penalty on frozen features, the penalty chosen within the training set.

    features [N, D], days, events -> standardise -> principal axes -> L-BFGS along a path of C -> CoxModel
                                             `-> folds of groups: cross-validated partial likelihood a C -> C
    CoxModel -> risk [M]; probability of being event-free on given days [M, H]

Objective, for standardised features x:  - log partial likelihood (ties by Efron 1977) + ||w||^2 / (2 C), the convention
of `probe`. C is judged by the cross-validated partial likelihood (Verweij and van Houwelingen 1993, Stat Med 12:2305):
what a fold adds to the log-likelihood of all when the model has not seen it. The baseline hazard is Breslow's, with
the same handling of ties. A competing event ends the observation of the event (cause-specific hazard); its own hazard
is taken as the same for everybody, which is enough to turn hazards into probabilities.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from panfm.errors import UserError
from panfm.measures.probe import (
    C_GRID,
    FINAL_TOLERANCE,
    FOLD_TOLERANCE,
    MAX_ITERATIONS,
    PATIENCE,
    TIE,
    Basis,
    build_basis,
    compute_preset_c,
    make_group_folds,
)
from panfm.measures.survival import COMPETING, EVENT
from panfm.measures.threads import narrow_products

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_LOG_HAZARD = 100.0  # beyond it a probability is 0 or 1 to the last digit, and exp overflows at 709


@dataclass(frozen=True)
class CoxModel:
    """A fitted model. The baseline is that of the mean features, whose risk is 0."""

    mean: Floats  # [D]
    scale: Floats  # [D]
    weight: Floats  # [D], of standardised features
    C: float
    times: Floats  # [U], days with an event, ascending
    hazard: Floats  # [U], what the baseline's cumulative hazard gains on them
    competing_times: Floats  # [V]
    competing_hazard: Floats  # [V], of everybody (Nelson-Aalen)
    objective: float
    converged: bool

    def predict_risk(self, features: ArrayLike) -> Floats:
        """Predict the log of the hazard ratio to the mean features [M, D]: [M], higher = earlier event."""
        return np.asarray(((np.asarray(features, dtype=np.float64) - self.mean) / self.scale) @ self.weight)

    def predict_event_free(self, features: ArrayLike, days: ArrayLike) -> Floats:
        """Predict the probability [M, H] of having had no event through each of the days [H].

        With competing events 1 - cumulative incidence: those who had one are event-free for good.
        """
        day = np.asarray(days, dtype=np.float64)
        ratio = np.exp(np.clip(self.predict_risk(features), -MAX_LOG_HAZARD, MAX_LOG_HAZARD))[:, None]  # [M, 1]
        if len(self.competing_times) == 0:
            cumulated = np.concatenate([[0.0], np.cumsum(self.hazard)])
            return np.asarray(np.exp(-ratio * cumulated[np.searchsorted(self.times, day, side="right")]))
        times = np.concatenate([self.times, self.competing_times])
        order = np.argsort(times, kind="stable")  # on one day the event comes first
        own = np.concatenate([self.hazard, np.zeros(len(self.competing_times))])[order]
        other = np.concatenate([np.zeros(len(self.times)), self.competing_hazard])[order]
        own_before, other_before = np.cumsum(own) - own, np.cumsum(other) - other
        gained = np.exp(-ratio * own_before - other_before) * -np.expm1(-ratio * own)  # [M, U + V]
        incidence = np.concatenate([np.zeros((len(ratio), 1)), np.cumsum(gained, axis=1)], axis=1)
        return np.asarray(1 - incidence[:, np.searchsorted(times[order], day, side="right")])


@dataclass(frozen=True)
class CoxFit:
    """A model with how its C came about."""

    model: CoxModel
    C: float
    num_folds: int  # 0: no folds possible, C is the preset one
    at_boundary: bool  # C is the smallest or largest of the grid: a wider grid might do better
    converged: bool
    losses: dict[float, float]  # minus the cross-validated log partial likelihood an event, of each C tried
    held_out_risk: Floats  # [N], of each training row by the model that did not see it; the model's own without folds


@dataclass(frozen=True)
class PartialLikelihood:
    """Who is at risk when, of N rows: what does not depend on the model. Ties are Efron's."""

    order: Ints  # [N], rows by descending day: each risk set is a prefix
    cases: Ints  # [E], rows with the event, by ascending day
    sizes: Ints  # [E], size of each case's risk set
    fraction: Floats  # [E], 0, 1/d, .. (d - 1)/d among the d cases of a day
    day_of_case: Ints  # [E], number of the case's day among the days with an event
    num_days: int
    days_before: Ints  # [N], how many days with an event lie at or before the row's last day
    times: Floats  # [U], days with an event

    @classmethod
    def build(cls, days: Floats, is_event: NDArray[np.bool_]) -> "PartialLikelihood":
        """From the last day of each row [N] and whether it had the event then."""
        cases = np.flatnonzero(is_event)
        cases = cases[np.argsort(days[cases], kind="stable")]
        times, starts, number, counts = np.unique(
            days[cases], return_index=True, return_inverse=True, return_counts=True
        )
        ascending = np.sort(days)
        return cls(
            order=np.argsort(-days, kind="stable"),
            cases=cases,
            sizes=len(days) - np.searchsorted(ascending, days[cases], side="left"),
            fraction=(np.arange(len(cases)) - starts[number]) / counts[number],
            day_of_case=number,
            num_days=len(times),
            days_before=np.searchsorted(times, days, side="right"),
            times=times,
        )

    def compute_loss(self, risk: Floats) -> float:
        """Minus the log partial likelihood of log hazards [N]."""
        hazard, shift = self._scale(risk)
        return float(
            np.log(self._compute_denominators(hazard)).sum() + len(self.cases) * shift - risk[self.cases].sum()
        )

    def compute_loss_and_gradient(self, risk: Floats) -> tuple[float, Floats]:
        """The loss of log hazards [N], and its gradient [N]."""
        hazard, shift = self._scale(risk)
        denominators = self._compute_denominators(hazard)
        loss = float(np.log(denominators).sum() + len(self.cases) * shift - risk[self.cases].sum())
        gained = np.bincount(self.day_of_case, 1 / denominators, self.num_days)
        tied = np.bincount(self.day_of_case, self.fraction / denominators, self.num_days)
        gradient = hazard * np.concatenate([[0.0], np.cumsum(gained)])[self.days_before]
        gradient[self.cases] -= hazard[self.cases] * tied[self.day_of_case] + 1
        return loss, gradient

    def compute_baseline(self, risk: Floats) -> Floats:
        """What the cumulative hazard of log hazard 0 gains on each day with an event: [U]."""
        hazard, shift = self._scale(risk)
        gained = np.bincount(self.day_of_case, 1 / self._compute_denominators(hazard), self.num_days)
        return np.asarray(gained * np.exp(-shift))

    def _compute_denominators(self, hazard: Floats) -> Floats:
        """Sum of hazards at risk when each case has its event, of the cases of its day only a share: [E]."""
        at_risk = np.cumsum(hazard[self.order])[self.sizes - 1]
        tied = np.bincount(self.day_of_case, hazard[self.cases], self.num_days)
        return np.asarray(at_risk - self.fraction * tied[self.day_of_case])

    @staticmethod
    def _scale(risk: Floats) -> tuple[Floats, float]:
        shift = float(risk.max())
        return np.exp(risk - shift), shift


def fit_cox(features: ArrayLike, days: ArrayLike, events: ArrayLike, *, C: float) -> CoxModel:
    """Fit the model to features [N, D], last days [N] and events [N] (0 censored, 1 event, 2 competing) at penalty C.

    Raises UserError for features that are not finite, and where nobody has the event.
    """
    values, day, event = _check(features, days, events)
    return _fit_final(build_basis(values), day, event, C)


@narrow_products()
def fit_cox_cv(
    features: ArrayLike, days: ArrayLike, events: ArrayLike, groups: ArrayLike, *, seed: int, num_folds: int = 5
) -> CoxFit:
    """Choose C by grouped cross-validation, events spread evenly over the folds, then fit to all rows.

    Features are standardised once, over all rows, so that a C means the same in every fold. Fewer groups with an event
    than folds lower the number of folds; with a single one C is `compute_preset_c(D)` and `num_folds` 0.
    """
    values, day, event = _check(features, days, events)
    basis = build_basis(values)
    folds = make_group_folds(event == EVENT, groups, num_folds, seed)
    num_made = int(folds.max()) + 1
    if num_made < 2:
        model = _fit_final(basis, day, event, compute_preset_c(values.shape[1]))
        return CoxFit(model, model.C, 0, False, model.converged, {}, model.predict_risk(values))
    losses, risks = _compute_path_losses(basis, day, event == EVENT, folds)
    best = min(losses.values())
    chosen = min(C for C, loss in losses.items() if loss <= best + TIE * abs(best))
    model = _fit_final(basis, day, event, chosen)
    at_boundary = chosen in (C_GRID[0], C_GRID[-1])
    return CoxFit(model, chosen, num_made, at_boundary, model.converged, losses, risks[chosen])


def _check(features: ArrayLike, days: ArrayLike, events: ArrayLike) -> tuple[Floats, Floats, Ints]:
    values, day = np.asarray(features, dtype=np.float64), np.asarray(days, dtype=np.float64)
    event = np.asarray(events).astype(np.int64)
    assert values.ndim == 2 and day.shape == event.shape == values.shape[:1], "features are [N, D], days and events [N]"
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"features of training row {row} are not finite; compute the features again")
    if not (event == EVENT).any():
        raise UserError(
            f"none of the {len(event)} training rows has the event; a hazard needs at least one, take a larger "
            "label_fraction"
        )
    return values, day, event


def _fit_final(basis: Basis, days: Floats, event: Ints, C: float) -> CoxModel:
    likelihood = PartialLikelihood.build(days, event == EVENT)
    weight, objective, converged = np.zeros(basis.coordinates.shape[1]), np.inf, False
    for step in (*[step for step in C_GRID if C / 1e3 < step < C][::2], C):  # a short path is quicker than a cold start
        tolerance = FINAL_TOLERANCE if step == C else FOLD_TOLERANCE
        weight, objective, converged = _minimise(
            basis.coordinates, likelihood, basis.variances, step, weight, tolerance
        )
    competing_times = np.unique(days[event == COMPETING])
    ascending = np.sort(days)
    at_risk = len(days) - np.searchsorted(ascending, competing_times, side="left")
    num_competing = np.array([(days[event == COMPETING] == time).sum() for time in competing_times], dtype=np.float64)
    return CoxModel(
        mean=basis.mean,
        scale=basis.scale,
        weight=np.asarray(basis.axes @ weight),
        C=C,
        times=likelihood.times,
        hazard=likelihood.compute_baseline(basis.coordinates @ weight),
        competing_times=competing_times,
        competing_hazard=num_competing / at_risk,
        objective=objective,
        converged=converged,
    )


def _compute_path_losses(
    basis: Basis, days: Floats, is_event: NDArray[np.bool_], folds: Ints
) -> tuple[dict[float, float], dict[float, Floats]]:
    """For each C, until its loss has worsened PATIENCE times: the loss, and the held-out log hazards [N]."""
    num_folds = int(folds.max()) + 1
    everybody = PartialLikelihood.build(days, is_event)
    training = [folds != fold for fold in range(num_folds)]
    coordinates = [basis.coordinates[rows] for rows in training]
    likelihoods = [PartialLikelihood.build(days[rows], is_event[rows]) for rows in training]
    weights = [np.zeros(basis.coordinates.shape[1]) for _ in training]
    losses: dict[float, float] = {}
    risks: dict[float, Floats] = {}
    num_worse = 0
    for C in C_GRID:
        loss, risk = 0.0, np.empty(len(days))
        for fold, rows in enumerate(training):
            weights[fold], _, _ = _minimise(
                coordinates[fold], likelihoods[fold], basis.variances, C, weights[fold], FOLD_TOLERANCE
            )
            all_risk = basis.coordinates @ weights[fold]
            # Held-out rows are compared with all rows at risk, not among themselves: small folds have few such pairs.
            loss += everybody.compute_loss(all_risk) - likelihoods[fold].compute_loss(all_risk[rows])
            risk[~rows] = all_risk[~rows]
        loss /= int(is_event.sum())
        num_worse = num_worse + 1 if losses and loss > min(losses.values()) else 0
        losses[C], risks[C] = loss, risk
        if num_worse == PATIENCE:
            break
    return losses, risks


def _minimise(
    coordinates: Floats, likelihood: PartialLikelihood, variances: Floats, C: float, start: Floats, tolerance: float
) -> tuple[Floats, float, bool]:
    """Minimise the objective over the weight [r], in variables divided by a guess of the Hessian's diagonal."""
    scale = np.sqrt(len(likelihood.cases) * variances + 1 / C)

    def evaluate(variables: Floats) -> tuple[float, Floats]:
        weight = variables / scale
        loss, gradient = likelihood.compute_loss_and_gradient(coordinates @ weight)
        objective = loss + float(weight @ weight) / (2 * C)
        return objective, (coordinates.T @ gradient + weight / C) / scale

    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "maxcor": 20, "ftol": tolerance, "gtol": 0.0}
    found = minimize(evaluate, start * scale, jac=True, method="L-BFGS-B", options=options)
    return found.x / scale, float(found.fun), bool(found.success)
