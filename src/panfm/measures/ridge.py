"""Ridge regression on frozen features, the penalty chosen within the training set.

    features [N, D], targets [N] -> standardise -> principal axes -> closed form for every C at once -> Ridge -> [M]
                                                `-> folds of groups: squared error a C -> C

Objective, for standardised features x and targets y divided by their standard deviation s:
sum_i ((y_i - s w x_i - b) / s)^2 / 2 + ||w||^2 / (2 C), bias unpenalised: scikit-learn's Ridge with alpha = 1 / C. The
grid of C is that of `probe`, and means the same whatever the unit of the target.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.errors import UserError
from panfm.measures.probe import C_GRID, TIE, Basis, build_basis, compute_preset_c, make_group_folds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ridge:
    """A fitted linear model of a number."""

    mean: Floats  # [D]
    scale: Floats  # [D]
    weight: Floats  # [D], of standardised features, in units of the target
    bias: float
    C: float

    def predict(self, features: ArrayLike) -> Floats:
        """Predict the number of features [M, D]: [M]."""
        standardised = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale
        return np.asarray(standardised @ self.weight + self.bias)


@dataclass(frozen=True)
class RidgeFit:
    """A model with how its C came about."""

    ridge: Ridge
    C: float
    num_folds: int  # 0: no folds possible, C is the preset one
    at_boundary: bool  # C is the smallest or largest of the grid: a wider grid might do better
    squared_errors: dict[float, float]  # mean held-out squared error of each C, in units of the target, squared


def fit_ridge(features: ArrayLike, targets: ArrayLike, *, C: float) -> Ridge:
    """Fit features [N, D] to targets [N] at penalty C.

    Raises UserError for features or targets that are not finite, and for targets that are all equal.
    """
    values, target = _check(features, targets)
    return _fit_final(build_basis(values), target, C)


def fit_ridge_cv(
    features: ArrayLike, targets: ArrayLike, groups: ArrayLike, *, seed: int, num_folds: int = 5
) -> RidgeFit:
    """Choose C by grouped cross-validation on the squared error within the training set, then fit to all of it.

    Features are standardised once, over the whole training set, so that a C means the same in every fold. With a single
    group C is `compute_preset_c(D)` and `num_folds` 0.
    """
    values, target = _check(features, targets)
    basis = build_basis(values)
    folds = make_group_folds(np.zeros(len(target), dtype=np.int64), groups, num_folds, seed)
    num_made = int(folds.max()) + 1
    if num_made < 2:
        preset = compute_preset_c(values.shape[1])
        return RidgeFit(_fit_final(basis, target, preset), preset, 0, False, {})
    errors = np.zeros(len(C_GRID))
    for fold in range(num_made):
        errors += _compute_errors(basis, target, folds == fold)
    errors /= len(target)
    chosen = min(C for C, error in zip(C_GRID, errors, strict=True) if error <= errors.min() * (1 + TIE))
    return RidgeFit(
        ridge=_fit_final(basis, target, chosen),
        C=chosen,
        num_folds=num_made,
        at_boundary=chosen in (C_GRID[0], C_GRID[-1]),
        squared_errors=dict(zip(C_GRID, errors.tolist(), strict=True)),
    )


def _check(features: ArrayLike, targets: ArrayLike) -> tuple[Floats, Floats]:
    values, target = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    assert values.ndim == 2 and target.shape == values.shape[:1], "features are [N, D], targets [N]"
    for name, rows in (("features", np.isfinite(values).all(axis=1)), ("target", np.isfinite(target))):
        if not rows.all():
            row = int(np.flatnonzero(~rows)[0])
            raise UserError(f"{name} of training row {row} not finite; compute the features again, or repair the table")
    if len(target) < 2 or np.ptp(target) == 0:
        raise UserError(
            f"the targets of all {len(target)} training rows are equal; a regression needs at least two values, take a "
            "larger label_fraction"
        )
    return values, target


def _fit_final(basis: Basis, target: Floats, C: float) -> Ridge:
    # The coordinates are uncorrelated over all rows and have mean 0: one division an axis, and the bias is the mean.
    fitted = basis.coordinates.T @ (target - target.mean())
    weight = fitted / (len(target) * basis.variances + 1 / C)
    return Ridge(basis.mean, basis.scale, np.asarray(basis.axes @ weight), float(target.mean()), C)


def _compute_errors(basis: Basis, target: Floats, held_out: NDArray[np.bool_]) -> Floats:
    """Sum of squared errors of the held-out rows by models of the others, one for each C of the grid: [23]."""
    training, tested = basis.coordinates[~held_out], basis.coordinates[held_out]
    mean, centre = training.mean(axis=0), target[~held_out].mean()
    # The products of all rows are known and diagonal; those of the few held-out rows are quickly taken away.
    products = np.diag(len(target) * basis.variances) - tested.T @ tested - len(training) * np.outer(mean, mean)
    eigenvalues, axes = np.linalg.eigh(products)
    fitted = axes.T @ (training.T @ (target[~held_out] - centre))
    weights = fitted[:, None] / (np.maximum(eigenvalues, 0)[:, None] + 1 / np.array(C_GRID))  # [r, 23]
    predicted = (tested - mean) @ (axes @ weights) + centre
    return np.asarray(((predicted - target[held_out][:, None]) ** 2).sum(axis=0))
