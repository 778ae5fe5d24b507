"""Calibration of binary probabilities: slope, intercept, and the table behind a reliability plot.

    labels, probabilities --logit--> x --logistic regression of the label on x--> slope      (1 = right, < 1 = too sure)
                                      `--the same with the slope held at 1-------> intercept (0 = right, < 0 = too high)
    confidences, right or wrong --bins of equal mass--> mean confidence, share right with interval, a bin

Both regressions run for all bootstrap replicates at once: Newton's method on R rows of weights [R, N]. The expected
calibration error is in `metrics`; the table's bins are the bins of that number.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.measures.intervals import Estimate, estimate_proportion, explain_regime
from panfm.measures.metrics import MAX_CHUNK_VALUES, NUM_CALIBRATION_BINS, cut_equal_mass
from panfm.measures.statistics import (
    MIN_SLOPE_GROUPS,
    NUM_REPLICATES,
    compute_interval,
    count_rarer_groups,
    draw_group_weights,
)

Floats = NDArray[np.float64]

SMALLEST_PROBABILITY = 1e-6  # a stored 0 or 1 is a float32 that was rounded: its logit would be infinite
MAX_NEWTON_STEPS = 50
MAX_NEWTON_CHANGE = 2.0  # of slope or intercept a step: a full step from far away can overshoot for ever
TOLERANCE = 1e-10  # change of slope and intercept at which they stand


@dataclass(frozen=True)
class Calibration:
    """Calibration slope and intercept (calibration in the large) with intervals; None is explained by its reason."""

    slope: Estimate
    intercept: Estimate


@dataclass(frozen=True)
class ReliabilityBin:
    """One point of a reliability plot."""

    num_images: int
    num_groups: int
    confidence: float  # mean
    right: Estimate  # share of positives (two classes) or of right top classes (more)


def estimate_calibration(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    *,
    seed: int,
    num_replicates: int = NUM_REPLICATES,
) -> Calibration:
    """Estimate slope and intercept by maximum likelihood, with patient-clustered bootstrap intervals.

    labels: [N], 1 = positive. probabilities: [N] of that class. groups: [N].
    """
    label, group = np.asarray(labels), np.asarray(groups)
    probability = np.asarray(probabilities, dtype=np.float64)
    if len(label) == 0 or len(np.unique(label)) < 2:
        reason = "no test images" if len(label) == 0 else f"no test image of class {1 - int(label[0])}"
        missing = Estimate(None, None, None, reason)
        return Calibration(missing, missing)
    slope, intercept = compute_calibration(label, probability, np.ones((1, len(label))))
    weights = draw_group_weights(group, num_replicates, seed)
    slopes, intercepts = compute_calibration(label, probability, weights)
    num_groups, num_rarer = len(np.unique(group)), count_rarer_groups(label, group)
    return Calibration(
        _describe(float(slope[0]), slopes, num_groups, num_rarer),
        _describe(float(intercept[0]), intercepts, num_groups, num_rarer),
    )


def compute_calibration(labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike) -> tuple[Floats, Floats]:
    """Compute slope [R] and intercept [R] under R rows of weights [R, N]; NaN where undefined.

    Undefined: a class is absent; for the slope also where the probabilities separate the classes (it is infinite) or
    are all the same.
    """
    positive = np.asarray(labels) == 1
    probability = np.clip(np.asarray(probabilities, dtype=np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    x = np.log(probability / (1 - probability))
    rows = np.asarray(weights)
    slope, intercept = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    chunk = max(1, MAX_CHUNK_VALUES // max(1, len(x)))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        w = np.asarray(rows[part], dtype=np.float64)
        intercept[part] = _fit_intercept(x, positive, w)
        slope[part] = _fit_slope(x, positive, w)
    return slope, intercept


def build_reliability_table(confidences: ArrayLike, right: ArrayLike, groups: ArrayLike) -> tuple[ReliabilityBin, ...]:
    """Build the bins of a reliability plot, in ascending order of confidence; bins that ties leave empty are left out.

    confidences: [N], the probability of class 1 for two classes, of the top class for more. right: [N] bool, whether
    the image is of class 1, or of its top class. The sum of mass x |confidence - share right| is the metric `ece`.
    """
    confidence, hit = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=bool)
    group = np.asarray(groups)
    if len(confidence) == 0:
        return ()
    bins = cut_equal_mass(confidence)
    table = []
    for number in range(NUM_CALIBRATION_BINS):
        inside = bins == number
        if inside.any():
            table.append(
                ReliabilityBin(
                    num_images=int(inside.sum()),
                    num_groups=len(np.unique(group[inside])),
                    confidence=float(confidence[inside].mean()),
                    right=estimate_proportion(hit[inside], group[inside]),
                )
            )
    return tuple(table)


def _describe(value: float, replicates: Floats, num_groups: int, num_rarer: int) -> Estimate:
    if np.isnan(value):
        return Estimate(None, None, None, "undefined: the probabilities separate the classes, or are all the same")
    interval = compute_interval(replicates, num_groups)
    reason = interval.reason or explain_regime(num_rarer, MIN_SLOPE_GROUPS, "in the rarer class")
    return Estimate(value, interval.low, interval.high, reason, interval.num_undefined, interval.method)


def _fit_intercept(x: Floats, positive: NDArray[np.bool_], w: Floats) -> Floats:
    """Solve sum w (y - sigmoid(a + x)) = 0 for a [R]."""
    num_positive, total = w @ positive, w.sum(axis=1)
    a = np.zeros(len(w))
    for _ in range(MAX_NEWTON_STEPS):
        expected = 1 / (1 + np.exp(-(x + a[:, None])))
        step = (num_positive - (w * expected).sum(axis=1)) / np.maximum(
            (w * expected * (1 - expected)).sum(axis=1), 1e-12
        )
        step = np.clip(step, -MAX_NEWTON_CHANGE, MAX_NEWTON_CHANGE)
        a += step
        if np.abs(step).max() < TOLERANCE:
            break
    return np.where((num_positive > 0) & (num_positive < total), a, np.nan)


def _fit_slope(x: Floats, positive: NDArray[np.bool_], w: Floats) -> Floats:
    """Maximise sum w (y eta - log(1 + exp eta)), eta = a + b x, and return b [R]."""
    drawn = w > 0
    lowest, highest = np.where(drawn, x, np.inf), np.where(drawn, x, -np.inf)
    overlap = (lowest[:, positive].min(axis=1) < highest[:, ~positive].max(axis=1)) & (
        lowest[:, ~positive].min(axis=1) < highest[:, positive].max(axis=1)
    )
    centred, scale = x - x.mean(), float(x.std()) or 1.0  # conditioning alone: the slope is scaled back
    z = centred / scale
    a, b = np.zeros(len(w)), np.full(len(w), scale)
    done = ~overlap
    for _ in range(MAX_NEWTON_STEPS):
        expected = 1 / (1 + np.exp(-np.clip(a[:, None] + b[:, None] * z, -500, 500)))
        residual = w * (positive - expected)
        curvature = w * expected * (1 - expected)
        gradient_a, gradient_b = residual.sum(axis=1), residual @ z
        h_aa, h_ab, h_bb = curvature.sum(axis=1), curvature @ z, curvature @ z**2
        determinant = np.maximum(h_aa * h_bb - h_ab**2, 1e-12)
        step_a = (h_bb * gradient_a - h_ab * gradient_b) / determinant
        step_b = (h_aa * gradient_b - h_ab * gradient_a) / determinant
        largest = np.maximum(np.abs(step_a), np.abs(step_b))
        shrink = np.where(done, 0, np.minimum(1, MAX_NEWTON_CHANGE / np.maximum(largest, 1e-300)))
        a, b = a + shrink * step_a, b + shrink * step_b
        done |= largest < TOLERANCE
        if done.all():
            break
    return np.where(overlap & done, b / scale, np.nan)
