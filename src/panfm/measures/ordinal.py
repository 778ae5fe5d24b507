"""A probe of ordered classes on frozen features: one binary probe a step of the scale, one C for all of them.

    features [N, D], labels 0 .. K-1 -> K-1 logistic regressions "at least class k" -> made monotone -> scores [M, K]

Each step is a penalised logistic regression of its own, that of `probe` (Frank and Hall 2001): directions may differ
from step to step, as in a scale whose lower half is about colour and whose upper half about thickness. The
probabilities of reaching a class must not rise with the class; where they do, they are replaced by the nearest that do
not (least squares, pool adjacent violators). C is chosen by the log-loss summed over all steps: the log score of the
cumulative distribution.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from panfm.measures.probe import (
    C_GRID,
    FOLD_TOLERANCE,
    PATIENCE,
    TIE,
    Basis,
    Optimum,
    build_basis,
    check_training,
    compute_preset_c,
    fit_on_basis,
    make_group_folds,
    minimise,
    sum_log_loss,
)
from panfm.measures.threads import narrow_products

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class OrdinalProbe:
    """A fitted probe; a step that all training rows or none have reached has weight 0 and bias +inf or -inf."""

    mean: Floats  # [D]
    scale: Floats  # [D]
    weight: Floats  # [K - 1, D], of standardised features; row k - 1: at least class k
    bias: Floats  # [K - 1]
    C: float
    converged: bool

    def predict(self, features: ArrayLike) -> Floats:
        """Predict class probabilities [M, K] of features [M, D]."""
        standardised = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale
        reached = make_monotone(expit(standardised @ self.weight.T + self.bias))
        ends = np.ones((len(reached), 1))
        return np.asarray(np.clip(-np.diff(np.concatenate([ends, reached, 0 * ends], axis=1), axis=1), 0, 1))


@dataclass(frozen=True)
class OrdinalFit:
    """A probe with how its C came about."""

    probe: OrdinalProbe
    C: float
    num_folds: int  # 0: no folds possible, C is the preset one
    at_boundary: bool  # C is the smallest or largest of the grid: a wider grid might do better
    converged: bool
    log_losses: dict[float, float]  # mean held-out log-loss, summed over the steps, of each C that was tried


@narrow_products()
def fit_ordinal_cv(
    features: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, num_classes: int, seed: int, num_folds: int = 5
) -> OrdinalFit:
    """Choose C by grouped, stratified cross-validation within the training set, then fit to all of it.

    features [N, D], labels [N] (0 .. K-1, lowest first). Folds are those of `probe.fit_probe_cv`: a class with a single
    group makes them impossible, and C is `compute_preset_c(D)` with `num_folds` 0. Raises UserError as that does.
    """
    values, label_array = check_training(features, labels, num_classes)
    basis = build_basis(values)
    steps = [label_array >= k for k in range(1, num_classes)]
    folds = make_group_folds(label_array, groups, num_folds, seed)
    num_made = int(folds.max()) + 1
    if num_made < 2:
        probe = _fit_final(basis, steps, compute_preset_c(values.shape[1]))
        return OrdinalFit(probe, probe.C, 0, False, probe.converged, {})
    losses = _compute_path_losses(basis, steps, folds)
    best = min(losses.values())
    chosen = min(C for C, loss in losses.items() if loss <= best * (1 + TIE))
    probe = _fit_final(basis, steps, chosen)
    return OrdinalFit(probe, chosen, num_made, chosen in (C_GRID[0], C_GRID[-1]), probe.converged, losses)


def make_monotone(reached: Floats) -> Floats:
    """The nearest probabilities [M, K-1] that do not rise from one class to the next (least squares, a row at a time).

    By the formula of isotonic regression: the smallest, over all starts up to k, of the largest mean of a stretch from
    there that holds k.
    """
    num_steps = reached.shape[1]
    cumulated = np.concatenate([np.zeros((len(reached), 1)), np.cumsum(reached, axis=1)], axis=1)
    result = np.empty_like(reached)
    for k in range(num_steps):
        highest = [
            np.max([(cumulated[:, b + 1] - cumulated[:, a]) / (b + 1 - a) for b in range(k, num_steps)], axis=0)
            for a in range(k + 1)
        ]
        result[:, k] = np.min(highest, axis=0)
    return result


def _fit_final(basis: Basis, steps: list[NDArray[np.bool_]], C: float) -> OrdinalProbe:
    weight = np.zeros((len(steps), len(basis.mean)))
    bias = np.array([np.inf if step.all() else -np.inf for step in steps])
    converged = True
    for k, step in enumerate(steps):
        if step.any() and not step.all():
            probe = fit_on_basis(basis, step.astype(np.int64), 2, C)
            weight[k], bias[k] = probe.weight[1] - probe.weight[0], probe.bias[1] - probe.bias[0]
            converged &= probe.converged
    return OrdinalProbe(basis.mean, basis.scale, weight, bias, C, converged)


def _compute_path_losses(basis: Basis, steps: list[NDArray[np.bool_]], folds: Ints) -> dict[float, float]:
    """Compute the held-out log-loss of each C, all folds and steps side by side, until it worsened PATIENCE times."""
    num_folds = int(folds.max()) + 1
    labels = [step.astype(np.int64) for step in steps if step.any() and not step.all()]
    optima: dict[tuple[int, int], Optimum] = {}
    # In float32 the log-loss differs in the seventh digit and each product takes half as long.
    training = [basis.coordinates[folds != fold].astype(np.float32) for fold in range(num_folds)]
    losses: dict[float, float] = {}
    num_worse = 0
    for C in C_GRID:
        total = 0.0
        for fold in range(num_folds):
            held_out = folds == fold
            for k, label in enumerate(labels):
                optimum = minimise(
                    training[fold], label[~held_out], basis.variances, C, optima.get((fold, k)), FOLD_TOLERANCE
                )
                optima[fold, k] = optimum
                logits = optimum.weight @ basis.coordinates[held_out].T + optimum.bias[:, None]
                total += sum_log_loss(logits, label[held_out])
        loss = total / len(folds)
        num_worse = num_worse + 1 if losses and loss > min(losses.values()) else 0
        losses[C] = loss
        if num_worse == PATIENCE:
            break
    return losses
