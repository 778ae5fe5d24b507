"""Metrics of a predicted number, and of a predicted grade among ordered classes.

    regression: scores [N, 1] the number, targets [N, 1]      -> MEASURES_REGRESSION
    ordinal: scores [N, K] probabilities, labels [N] 0 .. K-1 -> MEASURES_ORDINAL

A grade is counted in steps, 0 for the lowest class. What has to be a grade (mean absolute error, quadratic kappa) is
computed from the median of the predicted distribution: the lowest class that is reached with a probability of at least
one half. What may lie between two grades (intraclass correlation, Spearman) is computed from the expected grade.

Every metric is written once, for R rows of weights; with whole weights it is the metric of the repeated units.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from panfm.measures.agreement import compute_cohen_kappa
from panfm.measures.outcomes import Direction, Floats, Measure, Outcome

MAX_BLOCK_VALUES = 2_000_000  # R x N handled at once: 16 MB an array, about ten arrays
NO_SPREAD = 1e-12  # share of a sum of squares that only rounding leaves

Read = Callable[[Outcome], tuple[Floats, Floats]]  # predicted and true values, [N] each
Statistic = Callable[[Floats, Floats, Floats], Floats]  # predicted [N], true [N], weights [r, N] -> [r]


def compute_in_blocks(
    compute: Callable[[Floats], Floats], weights: NDArray[np.generic], num_values: int | None = None
) -> Floats:
    """Apply `compute` ([r, N] -> [r]) to blocks of the weights [R, N], as float64, so that memory is bounded.

    num_values: what one row of weights is blown up to; None = N.
    """
    size = max(1, MAX_BLOCK_VALUES // max(1, num_values or weights.shape[1]))
    parts = [
        compute(np.ascontiguousarray(weights[start : start + size], dtype=np.float64))
        for start in range(0, len(weights), size)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, NaN (undefined) where the denominator is 0."""
    undefined = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=denominator != 0))


def compute_mean_absolute_error(predicted: Floats, true: Floats, weights: Floats) -> Floats:
    """Mean of |predicted - true| under weights [R, N]: [R]."""
    return divide(weights @ np.abs(predicted - true), weights.sum(axis=1))


def compute_root_mean_squared_error(predicted: Floats, true: Floats, weights: Floats) -> Floats:
    """Root of the mean squared difference under weights [R, N]: [R]."""
    return np.sqrt(divide(weights @ (predicted - true) ** 2, weights.sum(axis=1)))


def compute_intraclass_correlation(predicted: Floats, true: Floats, weights: Floats) -> Floats:
    """ICC(2,1) of two raters, the prediction and the truth, under weights [R, N]: [R].

    Two-way random effects, absolute agreement, single rater (Shrout and Fleiss 1979, Psychol Bull 86:420): with the
    mean squares of n subjects, raters and residual, (MSR - MSE) / (MSR + MSE + 2 (MSC - MSE) / n). A constant offset or
    another scale of the prediction lowers it, which a correlation would not show.
    """
    middle, gap = (predicted + true) / 2, predicted - true
    middle = middle - middle.mean() if len(middle) else middle  # sums of squares about 0 lose digits far from it
    n = weights.sum(axis=1)
    subjects = 2 * _sum_squares(middle, weights)
    residual = _sum_squares(gap, weights) / 2
    raters = divide((weights @ gap) ** 2, n) / 2  # = MSC: there are two raters, so one degree of freedom
    degrees = np.where(n > 1, n - 1, 0)
    subjects, residual = divide(subjects, degrees), divide(residual, degrees)
    return divide(subjects - residual, subjects + residual + 2 * divide(raters - residual, n))


def compute_spearman(predicted: Floats, true: Floats, weights: Floats) -> Floats:
    """Spearman's rank correlation, ties at their mean rank, under weights [R, N]: [R]; NaN where one is constant."""
    total = weights.sum(axis=1, keepdims=True)
    # The mean of the mid-ranks is half the total weight: centred ranks are exact (whole or half numbers).
    a, b = (_compute_mid_ranks(values, weights) - total / 2 for values in (predicted, true))
    product = np.einsum("rn,rn,rn->r", weights, a, b)
    squares_a, squares_b = np.einsum("rn,rn,rn->r", weights, a, a), np.einsum("rn,rn,rn->r", weights, b, b)
    return divide(product, np.sqrt(squares_a) * np.sqrt(squares_b))


def compute_median_classes(scores: Floats) -> Floats:
    """The median grade of each predicted distribution [N, K]: the lowest class reached with at least one half, [N]."""
    reached = np.cumsum(scores, axis=1) >= scores.sum(axis=1, keepdims=True) / 2
    return np.asarray(reached.argmax(axis=1), dtype=np.float64)


def _sum_squares(values: Floats, weights: Floats) -> Floats:
    """Sum of squares [R] about each replicate's own mean; what only rounding leaves is 0."""
    about_zero = weights @ values**2
    squares = about_zero - divide((weights @ values) ** 2, weights.sum(axis=1))
    return np.where(squares <= NO_SPREAD * about_zero, 0.0, squares)


def _compute_mid_ranks(values: Floats, weights: Floats) -> Floats:
    """Weight of the units below, and half of the tied: [R, N]."""
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    cumulated = np.zeros((len(weights), len(values) + 1))
    np.cumsum(weights[:, order], axis=1, out=cumulated[:, 1:])
    starts = np.searchsorted(ascending, values, side="left")
    ends = np.searchsorted(ascending, values, side="right")
    return np.asarray((cumulated[:, starts] + cumulated[:, ends]) / 2)


def _compute_quadratic_kappa(predicted: Floats, true: Floats, weights: Floats) -> Floats:
    if not len(true):
        return np.full(len(weights), np.nan)
    num_classes = int(max(predicted.max(), true.max())) + 1  # higher grades that nobody has change nothing
    return compute_cohen_kappa(
        predicted.astype(np.int64), true.astype(np.int64), num_classes, weights, weighting="quadratic"
    )


def _read_numbers(outcome: Outcome) -> tuple[Floats, Floats]:
    return outcome.scores[:, 0], outcome.targets[:, 0]


def _read_grades(outcome: Outcome) -> tuple[Floats, Floats]:
    return compute_median_classes(outcome.scores), outcome.labels.astype(np.float64)


def _read_expected(outcome: Outcome) -> tuple[Floats, Floats]:
    return outcome.scores @ np.arange(outcome.scores.shape[1]), outcome.labels.astype(np.float64)


def _explain_empty(predicted: Floats, true: Floats) -> str | None:
    return None if len(true) else "no test units"


def _explain_constant(predicted: Floats, true: Floats) -> str | None:
    if len(true) < 2:
        return f"{len(true)} test units, a correlation needs at least 2"
    if np.ptp(true) == 0:
        return "all true values are equal"
    return "all predicted values are equal" if np.ptp(predicted) == 0 else None


def _explain_agreement(predicted: Floats, true: Floats) -> str | None:
    if len(true) < 2:
        return f"{len(true)} test units, agreement beyond chance needs at least 2"
    if np.ptp(np.concatenate([predicted, true])) == 0:
        return "all true and predicted values are one and the same"
    return None


def _compute_typical_error(predicted: Floats, true: Floats) -> float:
    """The mean absolute error of always saying the median."""
    return float(np.abs(true - np.median(true)).mean()) if len(true) else np.nan


def _compute_deviation(predicted: Floats, true: Floats) -> float:
    """The root mean squared error of always saying the mean."""
    return float(true.std()) if len(true) else np.nan


def _compute_nothing(predicted: Floats, true: Floats) -> float:
    return 0.0


def _build(
    title: str,
    direction: Direction,
    description: str,
    *,
    read: Read,
    statistic: Statistic,
    explain: Callable[[Floats, Floats], str | None],
    chance: Callable[[Floats, Floats], float] = _compute_nothing,
    perfect: float = 1.0,
) -> Measure:
    def compute(outcome: Outcome, weights: NDArray[np.generic]) -> Floats:
        predicted, true = read(outcome)
        return compute_in_blocks(lambda block: statistic(predicted, true, block), weights)

    return Measure(
        title=title,
        direction=direction,
        description=description,
        compute=compute,
        explain=lambda outcome: explain(*read(outcome)),
        chance=lambda outcome: chance(*read(outcome)),
        perfect=perfect,
    )


MEASURES_REGRESSION: Mapping[str, Measure] = {
    "mean_absolute_error": _build(
        "Mean absolute error", "lower", "Mean distance between prediction and truth, in the unit of the target.",
        read=_read_numbers, statistic=compute_mean_absolute_error, explain=_explain_empty,
        chance=_compute_typical_error, perfect=0.0,
    ),
    "root_mean_squared_error": _build(
        "Root mean squared error", "lower",
        "Root of the mean squared distance between prediction and truth, in the unit of the target.",
        read=_read_numbers, statistic=compute_root_mean_squared_error, explain=_explain_empty,
        chance=_compute_deviation, perfect=0.0,
    ),
    "intraclass_correlation": _build(
        "Intraclass correlation", "higher",
        "ICC(2,1) of prediction and truth: two-way, absolute agreement, single rater.",
        read=_read_numbers, statistic=compute_intraclass_correlation, explain=_explain_agreement,
    ),
    "spearman": _build(
        "Spearman's correlation", "higher", "Correlation of the ranks of prediction and truth.",
        read=_read_numbers, statistic=compute_spearman, explain=_explain_constant,
    ),
}  # fmt: skip

MEASURES_ORDINAL: Mapping[str, Measure] = {
    "mean_absolute_error": _build(
        "Mean absolute error", "lower", "Mean distance, in grades, between the median of the prediction and the truth.",
        read=_read_grades, statistic=compute_mean_absolute_error, explain=_explain_empty,
        chance=_compute_typical_error, perfect=0.0,
    ),
    "intraclass_correlation": _build(
        "Intraclass correlation", "higher",
        "ICC(2,1) of expected and true grade: two-way, absolute agreement, single rater.",
        read=_read_expected, statistic=compute_intraclass_correlation, explain=_explain_agreement,
    ),
    "spearman": _build(
        "Spearman's correlation", "higher", "Correlation of the ranks of expected and true grade.",
        read=_read_expected, statistic=compute_spearman, explain=_explain_constant,
    ),
    "quadratic_kappa": _build(
        "Quadratic kappa", "higher",
        "Agreement beyond chance of the median of the prediction with the truth, disagreements squared.",
        read=_read_grades, statistic=_compute_quadratic_kappa, explain=_explain_agreement,
    ),
}  # fmt: skip
