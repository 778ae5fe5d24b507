"""Metrics of predicted scores: labels [N] and scores [N, K] in, one number (or one a bootstrap replicate) out.

    scores [N, K] --sorted once a class--> order      weights [R, N] --one gather, one cumsum--> AUROC, AUPRC, ...  [R]
           `------argmax-------> predicted class      weights [R, N] --one matrix product------> confusion [R, K, K]

Every metric is written once, for R rows of sample weights; the plain value is the case R = 1 with weights of 1. With
weights a metric equals scikit-learn's with `sample_weight`. What is undefined is NaN in a replicate and None with a
reason in a point value, never 0: a class that has no test image has no recall, and no mean over classes either.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.errors import UserError
from panfm.measures.definitions import METRICS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_CALIBRATION_BINS = 15
MAX_CHUNK_VALUES = 4_000_000  # R x N x K handled at once: about 150 MB with all temporaries
PROBABILITY_TOLERANCE = 1e-3  # rows of half-precision softmax outputs sum to 1 within this


@dataclass(frozen=True)
class MetricPoint:
    """One value, or None and the reason why there is none."""

    value: float | None
    reason: str | None = None


def compute_metric(name: str, labels: ArrayLike, scores: ArrayLike) -> MetricPoint:
    """Compute one metric of `scores` [N, K] against `labels` [N] (0 .. K-1; for K = 2 class 1 is the positive one).

    A class that the metric needs and the labels lack makes the value None with a reason. Ties between the highest
    scores of a row go to the lower class number.

    Raises UserError for labels outside 0 .. K-1 and for scores that are not finite.
    """
    checked_labels, checked_scores = _check(name, labels, scores)
    reason = _explain_undefined(name, checked_labels, checked_scores)
    if reason is not None:
        return MetricPoint(None, reason)
    value = float(compute_replicates(name, checked_labels, checked_scores, np.ones((1, len(checked_labels))))[0])
    if np.isnan(value):
        absent = _list_absent_classes(checked_labels, checked_scores.shape[1])
        if absent:
            return MetricPoint(None, f"no test image of class {', '.join(map(str, absent))}")
        return MetricPoint(None, "undefined: labels and predictions are one single class")
    return MetricPoint(value)


def compute_replicates(name: str, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> Floats:
    """Compute one metric under R rows of sample weights [R, N]; returns [R], NaN where it is undefined."""
    return compute_all_replicates([name], labels, scores, weights)[name]


def compute_all_replicates(
    names: Sequence[str], labels: ArrayLike, scores: ArrayLike, weights: ArrayLike
) -> dict[str, Floats]:
    """Compute several metrics under R rows of sample weights [R, N], sharing sorting and confusion matrices.

    Works in chunks of R so that the temporaries stay below about 150 MB.
    """
    rows = np.asarray(weights)
    results = {name: np.full(len(rows), np.nan) for name in names}
    if not names:
        return results
    label_array, score_array = _check(names[0], labels, scores)
    assert rows.ndim == 2 and rows.shape[1] == len(label_array), "weights are [R, N]"
    for name in names:
        _check_name(name)
    wanted = [name for name in names if _explain_undefined(name, label_array, score_array) is None]
    shared = _Predictions(label_array, score_array)
    chunk = max(1, MAX_CHUNK_VALUES // max(1, score_array.size))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        weighted = _Weighted(shared, np.ascontiguousarray(rows[part], dtype=np.float64))
        for name in wanted:
            results[name][part] = _COMPUTE[name](weighted)
    return results


@dataclass(frozen=True)
class _Predictions:
    """What does not depend on the weights: computed once for all replicates."""

    labels: Ints
    scores: Floats

    @property
    def num_classes(self) -> int:
        return int(self.scores.shape[1])

    @cached_property
    def predicted(self) -> Ints:
        return np.asarray(np.argmax(self.scores, axis=1), dtype=np.int64)

    @cached_property
    def ranked_classes(self) -> list["_Ranked"]:
        """The one-versus-rest problems: class 1 alone for two classes, every class for more."""
        classes = [1] if self.num_classes == 2 else range(self.num_classes)
        return [_Ranked.build(self.labels == k, self.scores[:, k]) for k in classes]


@dataclass(frozen=True)
class _Ranked:
    """One binary problem in descending order of score, tied scores as one step."""

    order: Ints  # [N] rows in descending order of score
    positive_places: Ints  # [P] places of the positives in that order
    tie_start: Ints  # [P] for each positive: number of rows with a higher score
    tie_end: Ints  # [P] for each positive: number of rows with a higher or the same score
    step_ends: Ints  # [S] number of rows at or above each distinct score

    @classmethod
    def build(cls, positive: NDArray[np.bool_], score: Floats) -> "_Ranked":
        order = np.argsort(-score, kind="stable")
        descending = -score[order]
        places = np.flatnonzero(positive[order])
        return cls(
            order=order,
            positive_places=places,
            tie_start=np.searchsorted(descending, descending[places], side="left"),
            tie_end=np.searchsorted(descending, descending[places], side="right"),
            step_ends=np.append(np.flatnonzero(np.diff(descending)) + 1, len(score)),
        )


@dataclass(frozen=True)
class _RankedWeights:
    """One binary problem under R rows of weights; cumulated weights start with a 0."""

    ranked: _Ranked
    all_cumulated: Floats  # [R, N + 1] weight of the first n rows
    positive_cumulated: Floats  # [R, P + 1] weight of the first p positives
    positive: Floats  # [R, P] weights of the positives

    @property
    def num_positive(self) -> Floats:
        return np.asarray(self.positive_cumulated[:, -1])

    @property
    def num_negative(self) -> Floats:
        return np.asarray(self.all_cumulated[:, -1] - self.num_positive)

    def sum_all(self, num_rows: Ints) -> Floats:
        """Weight of the first rows, for each of the given numbers of rows [M]: [R, M]."""
        return self.all_cumulated[:, num_rows]

    def sum_positives(self, num_rows: Ints) -> Floats:
        """Weight of the positives among the first rows: [R, M]."""
        return self.positive_cumulated[:, np.searchsorted(self.ranked.positive_places, num_rows, side="left")]

    @classmethod
    def build(cls, ranked: _Ranked, weights: Floats) -> "_RankedWeights":
        ordered = weights[:, ranked.order]
        positive = ordered[:, ranked.positive_places]
        return cls(ranked, _cumulate(ordered), _cumulate(positive), positive)


@dataclass(frozen=True)
class _Weighted:
    """Predictions under R rows of weights [R, N]."""

    shared: _Predictions
    weights: Floats

    @cached_property
    def total(self) -> Floats:
        return np.asarray(self.weights.sum(axis=1))

    @cached_property
    def confusion(self) -> Floats:
        """Weighted confusion matrices [R, K, K]: true class, predicted class."""
        K = self.shared.num_classes
        cells = np.zeros((len(self.shared.labels), K * K))
        cells[np.arange(len(cells)), self.shared.labels * K + self.shared.predicted] = 1
        return (self.weights @ cells).reshape(-1, K, K)

    @cached_property
    def ranked(self) -> list[_RankedWeights]:
        return [_RankedWeights.build(ranked, self.weights) for ranked in self.shared.ranked_classes]

    def average(self, values: Floats) -> Floats:
        """Weighted mean [R] of one value a row [N]."""
        return _divide(self.weights @ values, self.total)


def _auroc(weighted: _Weighted) -> Floats:
    """Mean over problems of P(score of a positive > score of a negative) + half of P(equal)."""
    areas = []
    for problem in weighted.ranked:
        start, end = problem.ranked.tie_start, problem.ranked.tie_end
        higher = problem.sum_all(start) - problem.sum_positives(start)
        higher_or_same = problem.sum_all(end) - problem.sum_positives(end)
        wrong = ((higher + higher_or_same) * problem.positive).sum(axis=1) / 2
        areas.append(1 - _divide(wrong, problem.num_positive * problem.num_negative))
    return np.asarray(np.mean(areas, axis=0))


def _auprc(weighted: _Weighted) -> Floats:
    """Mean over problems of average precision: sum over distinct scores of (gain in recall) x precision."""
    areas = []
    for problem in weighted.ranked:
        end = problem.ranked.tie_end
        above = problem.sum_all(end)  # 0 only where the positive itself weighs 0
        precision = np.divide(problem.sum_positives(end), above, out=np.zeros_like(above), where=above > 0)
        areas.append(_divide((precision * problem.positive).sum(axis=1), problem.num_positive))
    return np.asarray(np.mean(areas, axis=0))


def _sensitivity_at(specificity: float) -> Callable[[_Weighted], Floats]:
    def compute(weighted: _Weighted) -> Floats:
        (problem,) = weighted.ranked
        ends = problem.ranked.step_ends
        true_positives = problem.sum_positives(ends)
        false_positives = problem.sum_all(ends) - true_positives
        allowed = (1 - specificity) * problem.num_negative * (1 + 1e-12)  # 10 of 100 negatives are exactly 90 %
        best = np.where(false_positives <= allowed[:, None], true_positives, 0).max(axis=1)
        undefined = problem.num_negative == 0
        return np.where(undefined, np.nan, _divide(best, problem.num_positive))

    return compute


def _partial_auroc_above(sensitivity: float) -> Callable[[_Weighted], Floats]:
    def compute(weighted: _Weighted) -> Floats:
        (problem,) = weighted.ranked
        # The curve climbs only where a distinct score has positives; between its two ends it is a straight line.
        starts, ends = np.unique(np.stack([problem.ranked.tie_start, problem.ranked.tie_end]), axis=1)
        found, found_after = problem.sum_positives(starts), problem.sum_positives(ends)
        wrong, wrong_after = problem.sum_all(starts) - found, problem.sum_all(ends) - found_after
        gained = found_after - found
        above = np.clip(found_after - sensitivity * problem.num_positive[:, None], 0, gained)  # the part that counts
        share = np.divide(above, gained, out=np.zeros_like(gained), where=gained > 0)
        middle = wrong_after - (wrong_after - wrong) * share / 2  # false positives in the middle of that part
        width = (1 - sensitivity) * problem.num_positive
        return 1 - _divide((above * middle).sum(axis=1), width * problem.num_negative)

    return compute


def _recalls(weighted: _Weighted) -> Floats:
    return _divide(np.einsum("rkk->rk", weighted.confusion), weighted.confusion.sum(axis=2))


def _balanced_accuracy(weighted: _Weighted) -> Floats:
    return np.asarray(_recalls(weighted).mean(axis=1))


def _accuracy(weighted: _Weighted) -> Floats:
    return _divide(np.einsum("rkk->r", weighted.confusion), weighted.total)


def _f1_scores(weighted: _Weighted) -> Floats:
    """F1 of each class [R, K]; NaN for a class without true images, 0 for one that is never predicted rightly."""
    true = weighted.confusion.sum(axis=2)
    both = true + weighted.confusion.sum(axis=1)
    f1 = _divide(2 * np.einsum("rkk->rk", weighted.confusion), both)
    return np.where(true > 0, f1, np.nan)


def _macro_f1(weighted: _Weighted) -> Floats:
    return np.asarray(_f1_scores(weighted).mean(axis=1))


def _weighted_f1(weighted: _Weighted) -> Floats:
    true = weighted.confusion.sum(axis=2)
    return _divide((np.nan_to_num(_f1_scores(weighted)) * true).sum(axis=1), weighted.total)


def _kappa(weighted: _Weighted) -> Floats:
    true, predicted = weighted.confusion.sum(axis=2), weighted.confusion.sum(axis=1)
    chance = _divide((true * predicted).sum(axis=1), weighted.total**2)
    observed = _accuracy(weighted)
    return _divide(observed - chance, np.where(1 - chance > 1e-12, 1 - chance, 0))


def _brier(weighted: _Weighted) -> Floats:
    right = np.eye(weighted.shared.num_classes)[weighted.shared.labels]
    squared = (weighted.shared.scores - right) ** 2
    return weighted.average(squared[:, 1] if weighted.shared.num_classes == 2 else squared.sum(axis=1))


def _log_loss(weighted: _Weighted) -> Floats:
    labels, scores = weighted.shared.labels, weighted.shared.scores
    smallest = np.finfo(np.float64).eps
    return weighted.average(-np.log(np.clip(scores[np.arange(len(labels)), labels], smallest, 1 - smallest)))


def cut_equal_mass(confidence: Floats) -> Ints:
    """Cut confidences [N] into NUM_CALIBRATION_BINS bins of equal mass by mid-ranks; equal ones share a bin: [N]."""
    ascending = np.sort(confidence)
    ranks = np.searchsorted(ascending, confidence, "left") + np.searchsorted(ascending, confidence, "right")
    bins = (ranks / 2 / len(confidence) * NUM_CALIBRATION_BINS).astype(np.int64)
    return np.asarray(bins.clip(max=NUM_CALIBRATION_BINS - 1), dtype=np.int64)


def _ece(weighted: _Weighted) -> Floats:
    """Sum over bins of |mean confidence - share right| x the bin's mass.

    The bins are cut by mid-ranks of the whole test set (equal confidences share a bin) and stay for all replicates. The
    absolute value makes resampled errors larger than the point value on average: a percentile interval sits high.
    """
    shared = weighted.shared
    if shared.num_classes == 2:
        confidence, right = shared.scores[:, 1], shared.labels == 1
    else:
        confidence, right = shared.scores.max(axis=1), shared.predicted == shared.labels
    bins = cut_equal_mass(confidence)
    gaps = np.zeros((len(confidence), NUM_CALIBRATION_BINS))
    gaps[np.arange(len(confidence)), bins] = confidence - right
    return _divide(np.abs(weighted.weights @ gaps).sum(axis=1), weighted.total)


_COMPUTE: Mapping[str, Callable[[_Weighted], Floats]] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "balanced_accuracy": _balanced_accuracy,
    "accuracy": _accuracy,
    "weighted_f1": _weighted_f1,
    "macro_f1": _macro_f1,
    "kappa": _kappa,
    "sensitivity_at_90_specificity": _sensitivity_at(0.90),
    "sensitivity_at_95_specificity": _sensitivity_at(0.95),
    "partial_auroc_above_80_sensitivity": _partial_auroc_above(0.80),
    "brier": _brier,
    "ece": _ece,
    "log_loss": _log_loss,
}


def _cumulate(values: Floats) -> Floats:
    """Cumulated sums along the last axis with a leading 0: [R, N] -> [R, N + 1]."""
    result = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=result[:, 1:])
    return result


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, NaN (undefined) where the denominator is 0."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=denominator != 0))


def _check_name(name: str) -> None:
    if name not in METRICS:
        raise UserError(f"metric {name!r} is not known; known metrics: {', '.join(METRICS)}")


def _check(name: str, labels: ArrayLike, scores: ArrayLike) -> tuple[Ints, Floats]:
    _check_name(name)
    label_array, score_array = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    assert score_array.ndim == 2 and score_array.shape[1] >= 2, "scores are [N, K] with K of at least 2"
    assert label_array.shape == score_array.shape[:1], "labels are [N], scores [N, K]"
    if not np.isfinite(score_array).all():
        row = int(np.flatnonzero(~np.isfinite(score_array).all(axis=1))[0])
        raise UserError(f"scores of row {row} are {score_array[row].tolist()}; every score must be a finite number")
    whole = label_array.astype(np.float64)
    bad = ~((whole >= 0) & (whole < score_array.shape[1]) & (whole == np.floor(whole)))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(
            f"label of row {row} is {label_array[row]}; with {score_array.shape[1]} scores a row labels must be whole "
            f"numbers from 0 to {score_array.shape[1] - 1}"
        )
    return label_array.astype(np.int64), score_array


def _list_absent_classes(labels: Ints, num_classes: int) -> list[int]:
    return np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0).tolist()


def _explain_undefined(name: str, labels: Ints, scores: Floats) -> str | None:
    """Say why a metric cannot be computed whatever the weights, or None."""
    definition = METRICS[name]
    if len(labels) == 0:
        return "no test images"
    if definition.binary_only and scores.shape[1] != 2:
        return f"defined for two classes, the task has {scores.shape[1]}"
    if definition.needs_probabilities:
        off = np.abs(scores.sum(axis=1) - 1).max()
        if scores.min() < 0 or off > PROBABILITY_TOLERANCE:
            return "scores are not probabilities (not all at least 0 with rows that sum to 1)"
    return None
