"""The linear probe's solver: multinomial logistic regression on frozen features, C chosen within the training set.

    features [N, D] -> standardise -> rotate to principal axes -> L-BFGS along a path of C -> Probe -> [M, K]
                                            `-> 5 folds of groups: log-loss a C -> C

Objective, for standardised features x and labels y:  sum_i -log softmax(W x_i + b)_{y_i} + ||W||^2 / (2 C). The loss is
a sum, the penalty is squared, the bias is free: scikit-learn's LogisticRegression has the same optimum and the same C.
For two classes its single weight vector w corresponds to W = (-w/2, +w/2), whose ||W||^2 is half as large, so the
penalty is ||W||^2 / C there.

Why it is quick: the features are rotated once for all folds and all C (if N < D first reduced to N coordinates by a QR
decomposition; both are exact), L-BFGS then works on coordinates divided by the square root of an estimate of the
Hessian's diagonal, which in that basis is nearly all of it, and every C starts at the optimum of the one before. The
path over C ends when the log-loss of the held-out folds has worsened for three C in a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from panfm.errors import UserError
from panfm.measures.threads import map_side_by_side, narrow_products

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

C_GRID: tuple[float, ...] = tuple(float(10 ** (-6 + step / 2)) for step in range(23))  # 1e-6 .. 1e5, half decades
PATIENCE = 3  # C in a row with a worse log-loss before the path ends
TIE = 1e-6  # relative difference in log-loss below which the stronger penalty wins
FINAL_TOLERANCE = 1e-11  # relative decrease of the objective a step at which the final fit stops
FOLD_TOLERANCE = 1e-6  # the same within cross-validation, where only the log-loss to a few digits matters
MAX_ITERATIONS = 2000
CONSTANT_SPREAD = 1e-7  # standard deviation / |mean| of a float32 feature that only rounding moves


@dataclass(frozen=True)
class Probe:
    """A fitted probe; classes without a training row have weight 0 and bias -inf, thus probability 0."""

    mean: Floats  # [D]
    scale: Floats  # [D]
    weight: Floats  # [K, D], of standardised features
    bias: Floats  # [K]
    C: float
    objective: float  # sum of losses + penalty at the optimum
    converged: bool

    def predict(self, features: ArrayLike) -> Floats:
        """Predict class probabilities [M, K] of features [M, D]."""
        standardised = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale
        return np.asarray(softmax(standardised @ self.weight.T + self.bias, axis=1))


@dataclass(frozen=True)
class ProbeFit:
    """A probe with how its C came about."""

    probe: Probe
    C: float
    num_folds: int  # 0: no folds possible, C is the preset one
    at_boundary: bool  # C is the smallest or largest of the grid: a wider grid might do better
    converged: bool
    log_losses: dict[float, float]  # mean held-out log-loss of each C that was tried
    held_out: Floats | None = None  # [N, K], each training row's probabilities at C by the fold that did not see it


@dataclass(frozen=True)
class Basis:
    """Standardised features in the coordinates that the solver likes: an exact rotation of their row space."""

    mean: Floats  # [D]
    scale: Floats  # [D]
    coordinates: Floats  # [N, r], r = min(N, D)
    axes: Floats  # [D, r], orthonormal columns: standardised features = coordinates @ axes.T
    variances: Floats  # [r], mean square of each coordinate


@dataclass(frozen=True)
class Optimum:
    """Where one minimisation ended, in the coordinates of the basis."""

    weight: Floats  # [K, r]
    bias: Floats  # [K]
    objective: float
    converged: bool


def fit_probe(features: ArrayLike, labels: ArrayLike, *, num_classes: int, C: float) -> Probe:
    """Fit the probe to features [N, D] and labels [N] (0 .. K-1) at penalty C (scikit-learn's convention).

    Raises UserError for features that are not finite and labels that hold fewer than two classes.
    """
    values, label_array = check_training(features, labels, num_classes)
    basis = build_basis(values)
    with narrow_products():
        return fit_on_basis(basis, label_array, num_classes, C)


def fit_probe_cv(
    features: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, num_classes: int, seed: int, num_folds: int = 5
) -> ProbeFit:
    """Choose C by grouped, stratified cross-validation on log-loss within the training set, then fit to all of it.

    Features are standardised once, over the whole training set, so that a C means the same in every fold. A class with
    fewer groups than folds lowers the number of folds; a class with one group makes folds impossible, and C is
    `compute_preset_c(D)` with `num_folds` 0.
    """
    values, label_array = check_training(features, labels, num_classes)
    basis = build_basis(values)  # a decomposition of whole matrices: outside of the narrow products
    folds = make_group_folds(label_array, groups, num_folds, seed)
    num_made = int(folds.max()) + 1
    with narrow_products():
        if num_made < 2:
            preset = compute_preset_c(values.shape[1])
            probe = fit_on_basis(basis, label_array, num_classes, preset)
            return ProbeFit(probe, preset, 0, False, probe.converged, {})
        losses, logits, starts = _compute_path_losses(basis, label_array, folds)
        best = min(losses.values())
        chosen = min(C for C, loss in losses.items() if loss <= best * (1 + TIE))
        probe = fit_on_basis(basis, label_array, num_classes, chosen, start=starts[chosen])
    held_out = np.zeros((len(label_array), num_classes))
    held_out[:, np.unique(label_array)] = softmax(logits[chosen], axis=0).T
    return ProbeFit(probe, chosen, num_made, chosen in (C_GRID[0], C_GRID[-1]), probe.converged, losses, held_out)


def compute_preset_c(num_features: int) -> float:
    """The C without cross-validation: 1 / D, a Gaussian prior under which a class's logit has standard deviation 1."""
    return 1.0 / num_features


def make_group_folds(labels: ArrayLike, groups: ArrayLike, num_folds: int, seed: int) -> Ints:
    """Cut rows into folds [N], no group in two of them, every class spread evenly.

    Fewer folds where a class has fewer groups; all zeros (one fold) where a class has a single group. Classes are dealt
    from rarest to most common; a class's groups, largest first and ties in the seed's order, each go to the fold that
    has the fewest rows of that class, then the fewest rows.
    """
    label_array, group_array = np.asarray(labels, dtype=np.int64), np.asarray(groups)
    names, number = np.unique(group_array, return_inverse=True)
    classes, label_number = np.unique(label_array, return_inverse=True)
    counts = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(counts, (number, label_number), 1)
    num_groups = (counts > 0).sum(axis=0)
    num_folds = min(num_folds, int(num_groups.min()))
    if num_folds < 2:
        return np.zeros(len(label_array), dtype=np.int64)
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
    assigned = np.full(len(names), -1, dtype=np.int64)
    filled = np.zeros((num_folds, len(classes)), dtype=np.int64)
    for k in np.argsort(num_groups, kind="stable"):
        waiting = shuffled[(counts[shuffled, k] > 0) & (assigned[shuffled] < 0)]
        for group in waiting[np.argsort(-counts[waiting, k], kind="stable")]:
            fold = min(range(num_folds), key=lambda fold: (filled[fold, k], filled[fold].sum()))
            assigned[group] = fold
            filled[fold] += counts[group]
    if ((filled > 0).sum(axis=0) < 2).any():  # groups of several classes can crowd a class into one fold
        return np.zeros(len(label_array), dtype=np.int64)
    return assigned[number]


def check_training(features: ArrayLike, labels: ArrayLike, num_classes: int) -> tuple[Floats, Ints]:
    """Return features [N, D] and labels [N] of a training set as arrays; UserError where a probe cannot learn."""
    values = np.asarray(features, dtype=np.float64)
    label_array = np.asarray(labels, dtype=np.int64)
    assert values.ndim == 2 and label_array.shape == values.shape[:1], "features are [N, D], labels [N]"
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"features of training row {row} are not finite; compute the features again")
    if len(label_array) and not (label_array.min() >= 0 and label_array.max() < num_classes):
        raise UserError(
            f"training labels reach from {label_array.min()} to {label_array.max()}; "
            f"they must lie in 0 to {num_classes - 1}"
        )
    if len(np.unique(label_array)) < 2:
        raise UserError(
            f"training labels hold {len(np.unique(label_array))} class; a probe needs rows of at least two classes, "
            "take a larger label_fraction"
        )
    return values, label_array


def build_basis(features: Floats) -> Basis:
    """Standardise features [N, D] and rotate them to their principal axes; constant ones become 0."""
    mean = features.mean(axis=0)
    spread = features.std(axis=0)
    scale = np.where(spread > CONSTANT_SPREAD * np.abs(mean), spread, 1.0)
    scale[scale == 0] = 1.0
    standardised = (features - mean) / scale
    if len(features) < features.shape[1]:  # X.T = Q R: every optimal weight lies in the span of Q's N columns
        span, reduced = np.linalg.qr(standardised.T)
        coordinates = reduced.T
    else:
        span, coordinates = None, standardised
    eigenvalues, rotation = np.linalg.eigh(coordinates.T @ coordinates)
    axes = rotation if span is None else span @ rotation
    return Basis(mean, scale, coordinates @ rotation, axes, np.maximum(eigenvalues, 0) / len(features))


def fit_on_basis(basis: Basis, labels: Ints, num_classes: int, C: float, *, start: Optimum | None = None) -> Probe:
    """Fit the probe to labels [N] of the basis's rows, to the last digit.

    start: an optimum near by, such as a fold's at the same C; without one a short path leads there.
    """
    present, compact = np.unique(labels, return_inverse=True)
    rough = basis.coordinates.astype(np.float32)  # twice as quick, and right to six digits: for the way there
    steps = [C] if start is not None else [*[step for step in C_GRID if C / 1e3 < step < C][::2], C]
    for step in steps:
        start = minimise(rough, compact, basis.variances, step, start, FOLD_TOLERANCE)
    optimum = minimise(basis.coordinates, compact, basis.variances, C, start, FINAL_TOLERANCE)
    weight = np.zeros((num_classes, len(basis.mean)))
    bias = np.full(num_classes, -np.inf)
    weight[present] = optimum.weight @ basis.axes.T
    bias[present] = optimum.bias - optimum.bias.mean()  # a constant common to all classes is free
    return Probe(basis.mean, basis.scale, weight, bias, C, optimum.objective, optimum.converged)


def _compute_path_losses(
    basis: Basis, labels: Ints, folds: Ints
) -> tuple[dict[float, float], dict[float, Floats], dict[float, Optimum]]:
    """Compute the mean held-out log-loss of each C, all folds side by side, until it has worsened PATIENCE times.

    Returns with it the held-out logits [K, N] of the K classes that occur, and the first fold's optimum at each C.
    """
    _, compact = np.unique(labels, return_inverse=True)
    num_folds = int(folds.max()) + 1
    optima: list[Optimum | None] = [None] * num_folds
    # In float32 the log-loss differs in the seventh digit and each product takes half as long.
    training = [basis.coordinates[folds != fold].astype(np.float32) for fold in range(num_folds)]
    losses: dict[float, float] = {}
    predicted: dict[float, Floats] = {}
    first: dict[float, Optimum] = {}
    num_worse = 0
    for C in C_GRID:

        def fit_fold(fold: int, C: float = C) -> Optimum:
            rows = compact[folds != fold]
            return minimise(training[fold], rows, basis.variances, C, optima[fold], FOLD_TOLERANCE)

        optima[:] = map_side_by_side(fit_fold, range(num_folds), size=training[0].size)
        predicted[C] = np.empty((int(compact.max()) + 1, len(labels)))
        for fold, optimum in enumerate(optima):
            assert optimum is not None
            first.setdefault(C, optimum)
            held_out = folds == fold
            predicted[C][:, held_out] = optimum.weight @ basis.coordinates[held_out].T + optimum.bias[:, None]
        loss = sum_log_loss(predicted[C], compact) / len(labels)
        num_worse = num_worse + 1 if losses and loss > min(losses.values()) else 0
        losses[C] = loss
        if num_worse == PATIENCE:
            break
    return losses, predicted, first


def sum_log_loss(logits: Floats, labels: Ints) -> float:
    """Sum of the log-losses of logits [K, N] against labels [N]."""
    return float((logsumexp(logits, axis=0) - logits[labels, np.arange(len(labels))]).sum())


def minimise(
    coordinates: NDArray[np.floating],
    labels: Ints,
    variances: Floats,
    C: float,
    start: Optimum | None,
    tolerance: float,
) -> Optimum:
    """Minimise the objective over weight [K, r] and bias [K] by L-BFGS in preconditioned variables.

    The Hessian's diagonal is about n * variance_j * p_k (1 - p_k) + 1 / C in the rotated coordinates, p_k (1 - p_k)
    taken as its mean over rows at the start; variables are multiplied by its square root. Classes come first in every
    array: sums over the first axis are twice as quick as the other way round.
    """
    num_rows, num_axes = coordinates.shape
    K = int(labels.max()) + 1
    penalty = (2.0 if K == 2 else 1.0) / C  # see the module's docstring
    rows = np.arange(num_rows)
    if start is None:
        shares = np.bincount(labels, minlength=K) / num_rows
        start = Optimum(np.zeros((K, num_axes)), np.log(np.maximum(shares, 1e-12)), np.inf, False)
        spread = shares * (1 - shares)
    else:
        probability = softmax(start.weight @ coordinates.T + start.bias[:, None], axis=0)
        spread = (probability * (1 - probability)).mean(axis=1)
    spread = np.maximum(spread, 1e-9)
    weight_scale = np.sqrt(num_rows * spread[:, None] * variances + penalty)  # [K, r]
    bias_scale = np.sqrt(num_rows * spread)

    def evaluate(variables: Floats) -> tuple[float, Floats]:
        weight = variables[:-K].reshape(K, num_axes) / weight_scale
        # [n, r] @ [r, K] and a small copy: BLAS reads the rows as they lie, which [K, r] @ [r, n] does not.
        logits = np.ascontiguousarray((coordinates @ weight.T.astype(coordinates.dtype)).T, dtype=np.float64)  # [K, n]
        logits += (variables[-K:] / bias_scale)[:, None]
        logits -= logits.max(axis=0)
        right = logits[labels, rows].sum()
        np.exp(logits, out=logits)
        total = logits.sum(axis=0)
        objective = float(np.log(total).sum() - right + 0.5 * penalty * np.vdot(weight, weight))
        logits /= total
        logits[labels, rows] -= 1  # now the gradient w.r.t. the logits
        gradient = np.empty_like(variables)
        fitted = (logits.astype(coordinates.dtype) @ coordinates).astype(np.float64)  # [K, r]
        gradient[:-K] = ((fitted + penalty * weight) / weight_scale).ravel()
        gradient[-K:] = logits.sum(axis=1) / bias_scale
        return objective, gradient

    # The products run in the coordinates' precision, everything that is summed and returned in float64.
    first = np.concatenate([(start.weight * weight_scale).ravel(), start.bias * bias_scale])
    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "maxcor": 20, "ftol": tolerance, "gtol": 0.0}
    found = minimize(evaluate, first, jac=True, method="L-BFGS-B", options=options)
    weight = found.x[:-K].reshape(K, num_axes) / weight_scale
    return Optimum(weight, found.x[-K:] / bias_scale, float(found.fun), bool(found.success))
