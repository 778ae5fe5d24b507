"""The linear probe where not every row counts alike: each institution as much as another, or the worst one alone.

    features [N, D], labels, institutions -> standardise -> L-BFGS along a path of C -> Probe
      balanced:   sum_i w_i loss_i + penalty,   w_i = N / (institutions x rows of its own)
      worst_case: N max_s mean_{i of s} loss_i + penalty      (GroupDRO, Sagawa 2020, arXiv 1911.08731)

Loss, penalty and meaning of C are those of `probe`; the objective is N times a mean loss, so that a C weighs the same
in both. Sagawa ascends on the institutions' weights and descends on the model by turns, as a deep network needs. A
linear probe is convex, so the same optimum is found directly: the maximum is smoothed to t log sum_s exp(mean_s / t),
which is above it by t log(number of institutions) at most, and t falls.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from panfm.errors import UserError
from panfm.measures.probe import C_GRID, PATIENCE, TIE, Probe, ProbeFit, compute_preset_c, make_group_folds
from panfm.measures.threads import narrow_products

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Aim = Literal["balanced", "worst_case"]
# Losses of the rows [N] -> what is minimised, and how much each row's loss counts in it [N].
Pool = Callable[[Floats], tuple[float, Floats]]

GRID = C_GRID[::2]  # whole decades: these fits cost more than those of `probe`, and C matters less than its decade
SMOOTHING = (1.0, 0.1, 0.01, 0.001)  # t, in nats; the last is below what a log-loss is reported to
FOLD_SMOOTHING = (0.1, 0.01)
FINAL_TOLERANCE, FOLD_TOLERANCE = 1e-10, 1e-6  # relative decrease of the objective a step at which a fit stops
MAX_ITERATIONS = 1000
MIN_SCALE = 1e-7  # standard deviation / |mean| of a feature that only rounding moves


def fit_robust_probe(
    features: ArrayLike, labels: ArrayLike, institutions: ArrayLike, *, num_classes: int, C: float, aim: Aim
) -> Probe:
    """Fit the probe to features [N, D], labels [N] (0 .. K-1) and names of institutions [N] at penalty C."""
    values, label_array, number = _check(features, labels, institutions)
    return _fit(values, label_array, number, num_classes, C, aim, SMOOTHING)


@narrow_products()
def fit_robust_probe_cv(
    features: ArrayLike,
    labels: ArrayLike,
    institutions: ArrayLike,
    groups: ArrayLike,
    *,
    num_classes: int,
    seed: int,
    aim: Aim,
    num_folds: int = 5,
) -> ProbeFit:
    """Choose C by grouped, stratified cross-validation on what is aimed at, then fit to all rows.

    The held-out log-loss of each institution is averaged over the institutions (balanced), or the worst one's is taken
    (worst_case). Where no folds can be made, C is the preset one, as in `probe`.
    """
    values, label_array, number = _check(features, labels, institutions)
    folds = make_group_folds(label_array, groups, num_folds, seed)
    num_made = int(folds.max()) + 1
    if num_made < 2:
        preset = compute_preset_c(values.shape[1])
        probe = _fit(values, label_array, number, num_classes, preset, aim, SMOOTHING)
        return ProbeFit(probe, preset, 0, False, probe.converged, {})
    losses: dict[float, float] = {}
    num_worse = 0
    for C in GRID:
        row_losses = np.empty(len(values))
        for fold in range(num_made):
            out = folds == fold
            probe = _fit(values[~out], label_array[~out], number[~out], num_classes, C, aim, FOLD_SMOOTHING)
            chance = probe.predict(values[out])[np.arange(out.sum()), label_array[out]]
            row_losses[out] = -np.log(np.maximum(chance, 1e-300))
        means = np.bincount(number, row_losses) / np.bincount(number)
        loss = float(means.mean() if aim == "balanced" else means.max())
        num_worse = num_worse + 1 if losses and loss > min(losses.values()) else 0
        losses[C] = loss
        if num_worse == PATIENCE:
            break
    chosen = min(C for C, loss in losses.items() if loss <= min(losses.values()) * (1 + TIE))
    probe = _fit(values, label_array, number, num_classes, chosen, aim, SMOOTHING)
    return ProbeFit(probe, chosen, num_made, chosen in (GRID[0], GRID[-1]), probe.converged, losses)


def _check(features: ArrayLike, labels: ArrayLike, institutions: ArrayLike) -> tuple[Floats, Ints, Ints]:
    values = np.asarray(features, dtype=np.float64)
    label_array = np.asarray(labels, dtype=np.int64)
    number = np.unique(np.asarray(institutions), return_inverse=True)[1]
    assert values.ndim == 2 and label_array.shape == number.shape == values.shape[:1], "features are [N, D], others [N]"
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"features of training row {row} are not finite; compute the features again")
    if len(np.unique(label_array)) < 2:
        raise UserError("training labels hold one class; a probe needs rows of at least two classes")
    return values, label_array, number


def _make_pool(number: Ints, aim: Aim, smoothing: float) -> Pool:
    counts = np.bincount(number).astype(np.float64)
    counts[counts == 0] = np.inf  # an institution that a fold leaves out entirely
    present = np.flatnonzero(np.isfinite(counts))
    weight = len(number) / (len(present) * counts)  # [S]

    def pool_balanced(losses: Floats) -> tuple[float, Floats]:
        return float(weight[number] @ losses), weight[number]

    def pool_worst(losses: Floats) -> tuple[float, Floats]:
        means = (np.bincount(number, losses, minlength=len(counts)) / counts)[present] / smoothing
        share = np.zeros(len(counts))
        share[present] = softmax(means)
        return len(number) * smoothing * float(logsumexp(means)), (len(number) * share / counts)[number]

    return pool_balanced if aim == "balanced" else pool_worst


def _fit(
    values: Floats, labels: Ints, number: Ints, num_classes: int, C: float, aim: Aim, smoothings: tuple[float, ...]
) -> Probe:
    present, compact = np.unique(labels, return_inverse=True)
    mean, spread = values.mean(axis=0), values.std(axis=0)
    scale = np.where(spread > MIN_SCALE * np.abs(mean), spread, 1.0)
    scale[scale == 0] = 1.0
    standardised = (values - mean) / scale
    if len(values) < values.shape[1]:  # every optimal weight lies in the span of the rows
        axes, reduced = np.linalg.qr(standardised.T)
        coordinates = reduced.T
    else:
        axes, coordinates = None, standardised
    penalty = (2.0 if len(present) == 2 else 1.0) / C  # see `probe`
    start = np.zeros(len(present) * (coordinates.shape[1] + 1))
    for smoothing in smoothings if aim == "worst_case" else smoothings[-1:]:  # balanced has nothing to smooth
        pool = _make_pool(number, aim, smoothing)
        tolerance = FINAL_TOLERANCE if smoothing == smoothings[-1] and smoothings == SMOOTHING else FOLD_TOLERANCE
        weight, bias, objective, converged = _minimise(coordinates, compact, pool, penalty, start, tolerance)
        start = np.concatenate([weight.ravel(), bias])
    weight_full = np.zeros((num_classes, values.shape[1]))
    bias_full = np.full(num_classes, -np.inf)
    weight_full[present] = weight if axes is None else weight @ axes.T
    bias_full[present] = bias - bias.mean()
    return Probe(mean, scale, weight_full, bias_full, C, objective, converged)


def _minimise(
    coordinates: Floats, labels: Ints, pool: Pool, penalty: float, start: Floats, tolerance: float
) -> tuple[Floats, Floats, float, bool]:
    """L-BFGS over weight [K, r] and bias [K], the weights measured in units of their own curvature."""
    num_rows, num_axes = coordinates.shape
    K = int(labels.max()) + 1
    rows = np.arange(num_rows)
    unit = np.sqrt(num_rows / K * (coordinates**2).mean(axis=0) + penalty)  # [r]
    bias_unit = np.sqrt(num_rows / K)

    def evaluate(variables: Floats) -> tuple[float, Floats]:
        weight = variables[:-K].reshape(K, num_axes) / unit
        logits = weight @ coordinates.T + (variables[-K:] / bias_unit)[:, None]  # [K, n]
        total = logsumexp(logits, axis=0)
        value, counted = pool(total - logits[labels, rows])
        error = np.exp(logits - total)
        error[labels, rows] -= 1
        error *= counted
        gradient = np.empty_like(variables)
        gradient[:-K] = ((error @ coordinates + penalty * weight) / unit).ravel()
        gradient[-K:] = error.sum(axis=1) / bias_unit
        return value + 0.5 * penalty * float(np.vdot(weight, weight)), gradient

    first = np.concatenate([(start[:-K].reshape(K, num_axes) * unit).ravel(), start[-K:] * bias_unit])
    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "maxcor": 20, "ftol": tolerance, "gtol": 0.0}
    found = minimize(evaluate, first, jac=True, method="L-BFGS-B", options=options)
    weight = found.x[:-K].reshape(K, num_axes) / unit
    return weight, found.x[-K:] / bias_unit, float(found.fun), bool(found.success)
