"""Operating points: a threshold chosen on out-of-fold training scores, and what it reaches on the test images.

    training labels, out-of-fold scores --90 or 95 % of one side--> threshold
    test labels, scores, groups, threshold --> sensitivity, specificity, PPV, number needed to biopsy, with intervals
    test labels, probabilities, groups --> net benefit over threshold probabilities (decision curve)

A threshold taken from the test's own ROC curve promises what no clinic gets: a clinic fixes it before patients come. So
the share that was asked for stands beside the one that the test set reached. An image is called positive where its
score is at least the threshold. Proportions carry clustered Wilson intervals (`intervals`) whatever the number of
groups: they are closed and hold for many as for few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.errors import UserError
from panfm.measures.intervals import Estimate, estimate_proportion
from panfm.measures.statistics import NUM_REPLICATES, compute_interval, draw_group_weights

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Side = Literal["sensitivity", "specificity"]

WANTED: tuple[tuple[Side, float], ...] = (
    ("sensitivity", 0.90),
    ("sensitivity", 0.95),
    ("specificity", 0.90),
    ("specificity", 0.95),
)
THRESHOLD_PROBABILITIES = tuple(percent / 100 for percent in range(1, 51))  # of the decision curve
ROUNDING = 1e-12  # 9 of 10 is exactly 90 %


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it was chosen for; `value` is None with a reason where it cannot be chosen."""

    side: Side
    wanted: float
    value: float | None
    reached: float | None  # share on the out-of-fold training scores, at least `wanted`
    reason: str | None = None


@dataclass(frozen=True)
class OperatingPoint:
    """What one threshold reaches on the test images; a value that is None carries its reason.

    PPV and the number needed to biopsy (images called positive for each true positive, 1 / PPV) hold at this test set's
    prevalence only, which therefore stands beside them.
    """

    threshold: Threshold
    num_positive: int
    num_negative: int
    num_called: int  # images called positive
    prevalence: float | None
    sensitivity: Estimate
    specificity: Estimate
    ppv: Estimate
    number_needed_to_biopsy: Estimate


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit an image at each threshold probability [T]; calling none positive has 0 everywhere.

    The interval is pointwise, by patient-clustered bootstrap; None where `reason` says why.
    """

    thresholds: Floats
    net_benefit: Floats
    treat_all: Floats  # net benefit of calling every image positive
    low: Floats | None
    high: Floats | None
    reason: str | None = None


def choose_threshold(labels: ArrayLike, scores: ArrayLike, side: Side, wanted: float) -> Threshold:
    """Choose the threshold that reaches a sensitivity or specificity of at least `wanted` and loses least for it.

    labels: [N], 1 = positive. scores: [N] of the positive class, each made by a model that did not train on the image's
    group (out of fold). For a sensitivity the highest such threshold, for a specificity the lowest.
    """
    score, positive = _check(labels, scores)
    if positive.all() or not positive.any():
        return Threshold(side, wanted, None, None, f"no training image of class {0 if positive.any() else 1}")
    if side == "sensitivity":
        ascending = np.sort(score[positive])
        missed = int(np.floor((1 - wanted) * len(ascending) * (1 + ROUNDING)))  # positives that may lie below
        value = float(ascending[missed])
        reached = float((score[positive] >= value).mean())
    else:
        ascending = np.sort(score[~positive])
        called = int(np.floor((1 - wanted) * len(ascending) * (1 + ROUNDING)))  # negatives that may lie at or above
        bound = ascending[len(ascending) - 1 - called]  # the highest negative that must lie below
        higher = score[score > bound]
        value = float(higher.min()) if len(higher) else float(np.nextafter(bound, np.inf))
        reached = float((score[~positive] < value).mean())
    return Threshold(side, wanted, value, reached)


def choose_thresholds(labels: ArrayLike, scores: ArrayLike) -> tuple[Threshold, ...]:
    """Choose the four thresholds of WANTED. Arguments as in `choose_threshold`."""
    return tuple(choose_threshold(labels, scores, side, wanted) for side, wanted in WANTED)


def measure_operating_point(
    threshold: Threshold, labels: ArrayLike, scores: ArrayLike, groups: ArrayLike
) -> OperatingPoint:
    """Measure what a threshold reaches: test labels [N] (1 = positive), scores [N] of that class, groups [N]."""
    score, positive = _check(labels, scores)
    group = np.asarray(groups)
    prevalence = float(positive.mean()) if len(positive) else None
    counts = int(positive.sum()), int((~positive).sum())
    if threshold.value is None:
        missing = Estimate(None, None, None, f"no threshold: {threshold.reason}")
        return OperatingPoint(threshold, *counts, 0, prevalence, missing, missing, missing, missing)
    called = score >= threshold.value
    ppv = estimate_proportion(positive[called], group[called], empty="no test image is called positive")
    return OperatingPoint(
        threshold=threshold,
        num_positive=counts[0],
        num_negative=counts[1],
        num_called=int(called.sum()),
        prevalence=prevalence,
        sensitivity=estimate_proportion(called[positive], group[positive], empty="no positive test image"),
        specificity=estimate_proportion(~called[~positive], group[~positive], empty="no negative test image"),
        ppv=ppv,
        number_needed_to_biopsy=_invert(ppv),
    )


def compute_decision_curve(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    *,
    seed: int,
    thresholds: Sequence[float] = THRESHOLD_PROBABILITIES,
    num_replicates: int = NUM_REPLICATES,
) -> DecisionCurve:
    """Compute the net benefit of treating images whose probability is at least each threshold (Vickers 2006).

    labels: [N], 1 = positive. probabilities: [N] of that class. groups: [N]. Net benefit = true positives / N - false
    positives / N x threshold / (1 - threshold): what a treated healthy image costs is set by the threshold itself.

    Raises UserError for thresholds outside 0 .. 1 (both excluded), as the price is not defined there.
    """
    probability, positive = _check(labels, probabilities)
    at = np.asarray(thresholds, dtype=np.float64)
    if ((at <= 0) | (at >= 1)).any():
        raise UserError(f"thresholds of a decision curve are {at.tolist()}; each must lie between 0 and 1")
    if len(positive) == 0:
        empty = np.full(len(at), np.nan)
        return DecisionCurve(at, empty, empty, None, None, "no test images")
    price = at / (1 - at)
    called = probability[:, None] >= at
    benefit = np.where(positive[:, None], called, -price * called)  # [N, T]: its mean is the net benefit
    everything = float(positive.mean()) - float((~positive).mean()) * price
    weights = draw_group_weights(groups, num_replicates, seed).astype(np.float64)
    replicates = weights @ benefit / weights.sum(axis=1, keepdims=True)
    num_groups = len(np.unique(np.asarray(groups)))
    intervals = [compute_interval(column, num_groups) for column in replicates.T]
    if any(interval.low is None for interval in intervals):
        return DecisionCurve(at, benefit.mean(axis=0), everything, None, None, intervals[0].reason)
    low, high = np.array([(interval.low, interval.high) for interval in intervals], dtype=np.float64).T
    return DecisionCurve(at, benefit.mean(axis=0), everything, low, high)


def _invert(ppv: Estimate) -> Estimate:
    """The number needed to biopsy: 1 / PPV, its interval the PPV's turned round."""
    if ppv.value is None:
        return ppv
    if ppv.value == 0:
        return Estimate(None, None, None, "no image that is called positive is positive")
    low = None if ppv.high is None else 1 / ppv.high
    high = None if ppv.low is None else 1 / ppv.low
    return Estimate(1 / ppv.value, low, high, ppv.reason, method=ppv.method)


def _check(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Bools]:
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    assert score.ndim == 1 and score.shape == label.shape, "labels and scores of the positive class are [N]"
    if not np.isfinite(score).all():
        row = int(np.flatnonzero(~np.isfinite(score))[0])
        raise UserError(f"score of row {row} is {score[row]}; every score must be a finite number")
    bad = ~np.isin(label, (0, 1))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(f"label of row {row} is {label[row]}; labels must be 0 (negative) or 1 (positive)")
    return score, label == 1
