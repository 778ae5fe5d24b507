"""Comparisons of two encoders on the same images, beside the paired bootstrap of `statistics`.

    scores of a and b --parts of both areas a group--> DeLong, clustered (Obuchowski) --> difference, interval, p
    right or wrong of a and b, one image a group  --> McNemar, exact                  --> p
    differences [T] and replicates [T, R] of T tasks --draw tasks, then patients--    --> mean difference, interval, p
    p-values of one task                          --> Holm                            --> adjusted p-values

Which test where. Any metric: the paired bootstrap. The AUROC with few groups in the rarer class: the clustered DeLong
test, which is DeLong's own where every group has one image. McNemar only there: it takes each image for a witness of
its own. Shown to reject at most 6 % at a level of 5 % by `python -m tests.measures.simulate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit
from scipy.stats import binom

from panfm.measures.intervals import CONFIDENCE, AreaParts, compute_area_parts, compute_quantile, explain_regime

Floats = NDArray[np.float64]
ComparisonMethod = Literal["bootstrap", "delong", "delong_clustered", "hierarchical_bootstrap"]

MIN_COMPARED_AREA_GROUPS = 15  # groups in the rarer class from which the clustered DeLong test keeps its level
MIN_TASKS = 3  # fewer tasks say nothing of how tasks differ: the interval would be as wide as the scale


@dataclass(frozen=True)
class PairedDifference:
    """Metric of a minus metric of b on the same images, its 95 % interval and the p-value of 'no difference'.

    reason: why something is None; beside an interval: why it may not cover what it says.
    """

    difference: float | None
    low: float | None
    high: float | None
    reason: str | None = None
    num_undefined: int = 0  # bootstrap replicates in which it is undefined
    p_value: float | None = None  # two-sided
    method: ComparisonMethod | None = None  # None where there is no interval


@dataclass(frozen=True)
class McNemar:
    """Images that only a, or only b, gets right, and the exact two-sided p-value; None is explained by `reason`."""

    num_only_a: int
    num_only_b: int
    p_value: float | None
    reason: str | None = None


def compare_areas(labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike, groups: ArrayLike) -> PairedDifference:
    """Compare two AUROCs on the same images by DeLong's test, clustered (Obuchowski) where groups have several images.

    labels: [N], 1 = positive. scores_a, scores_b: [N], or [D, N] for several draws of an encoder (their areas are
    averaged). The quantile is Student's with Satterthwaite's degrees of freedom.
    """
    positive = np.asarray(labels) == 1
    if positive.all() or not positive.any():
        return PairedDifference(None, None, None, f"no test image of class {0 if positive.any() else 1}")
    parts_a, parts_b = (compute_area_parts(labels, scores, groups) for scores in (scores_a, scores_b))
    return compare_area_parts(parts_a, parts_b, independent=len(parts_a.positive) == len(positive))


def compare_area_parts(
    parts_a: AreaParts,
    parts_b: AreaParts,
    *,
    independent: bool,
    further_variance: float = 0.0,
    further_freedom: float = 1.0,
) -> PairedDifference:
    """Compare two AUROCs by the parts that groups add to their errors; independent: every group has one image.

    further_variance, with degrees of freedom of its own: that of the difference which is no matter of the test images,
    such as the choice of labels (`draws`).
    """
    parts = parts_a.subtract(parts_b)
    fewest = parts.num_rarer_groups
    if fewest < 2:
        return PairedDifference(
            parts.area, None, None, f"no interval: {fewest} group in the rarer class, at least 2 are needed"
        )
    reason = explain_regime(fewest, MIN_COMPARED_AREA_GROUPS, "in the rarer class")
    variance, freedom = parts.variance + further_variance, parts.freedom
    if further_variance > 0:
        freedom = variance**2 / (parts.variance**2 / parts.freedom + further_variance**2 / further_freedom)
    error = float(np.sqrt(variance))
    width = compute_quantile(freedom) * error
    p_value = float(2 * stdtr(freedom, -abs(parts.area) / error)) if error > 0 else 1.0
    return PairedDifference(
        parts.area,
        parts.area - width,
        parts.area + width,
        reason,
        p_value=None if reason else p_value,
        method="delong" if independent else "delong_clustered",
    )


def compare_mcnemar(right_a: ArrayLike, right_b: ArrayLike, groups: ArrayLike) -> McNemar:
    """Test whether two encoders are right equally often, exactly (binomial): right_a, right_b [N] bool, groups [N].

    Only where images are independent, one a group; otherwise the p-value is None with the reason.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    counts = np.unique(np.asarray(groups), return_counts=True)[1]
    if (counts > 1).any():
        several = int((counts > 1).sum())
        return McNemar(only_a, only_b, None, f"images are not independent: {several} groups have more than one")
    discordant = only_a + only_b
    if discordant == 0:
        return McNemar(0, 0, None, "no image on which only one of the two is right")
    return McNemar(only_a, only_b, float(min(1.0, 2 * binom.cdf(min(only_a, only_b), discordant, 0.5))))


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p-values of one family (the comparisons on one task) by Holm's method; None is no comparison."""
    known = [(p_value, place) for place, p_value in enumerate(p_values) if p_value is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p_value, place) in enumerate(sorted(known)):
        largest = max(largest, min(1.0, (len(known) - rank) * p_value))
        adjusted[place] = largest
    return adjusted


def compute_p_value(differences: ArrayLike) -> float | None:
    """Compute the two-sided p-value of 'no difference' from bootstrap differences [R], NaN = undefined.

    Twice the share of replicates on the rarer side of 0, the observed data counted as one of them: never 0. Below 5 %
    exactly where the percentile interval excludes 0, but for rounding. None where no replicate is defined.
    """
    values = np.asarray(differences, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return None
    beyond = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(defined) + 1))


def compare_over_tasks(differences: ArrayLike, replicates: ArrayLike, *, seed: int) -> PairedDifference:
    """Compare two encoders by their mean difference over tasks, for tasks like these: a hierarchical bootstrap.

    differences: [T], a minus b on each task. replicates: [T, R], the same under each task's own patient-clustered
    bootstrap (`statistics`). A replicate draws T tasks with replacement, then one replicate of each.

    Tasks as observed differ by their nature and by the patients they happen to have; drawing patients again within
    drawn tasks counts the patients twice, and drawing T of T tasks counts their nature (T - 1) / T times. So the
    replicates are scaled about the mean to its unbiased variance (that of the observed differences over T)
    and to Student's quantile for T tasks. Tasks are drawn independently of each other,
    although two tasks on one source share patients.
    """
    points, drawn_patients = np.asarray(differences, dtype=np.float64), np.asarray(replicates, dtype=np.float64)
    T, R = drawn_patients.shape
    assert points.shape == (T,), "differences are [T], replicates [T, R]"
    if T < MIN_TASKS:
        mean = float(points.mean()) if T else None
        return PairedDifference(mean, None, None, f"no interval: {T} tasks, at least {MIN_TASKS} are needed")
    undefined = np.isnan(drawn_patients)
    if np.isnan(points).any() or undefined.all(axis=1).any():
        return PairedDifference(None, None, None, "undefined on one of the tasks")
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn_patients = drawn_patients.copy()
    for row, missing in zip(drawn_patients, undefined, strict=True):
        if missing.any():  # an undefined replicate counts as another one of its task
            row[missing] = generator.choice(row[~missing], int(missing.sum()))
    tasks = generator.integers(0, T, (R, T))
    means = drawn_patients[tasks, generator.integers(0, R, (R, T))].mean(axis=1)

    mean = float(points.mean())
    spread = float(means.std())
    if points.std() == 0 or spread == 0:
        return PairedDifference(mean, None, None, "no interval: the difference is the same on every task")
    deviations = np.sort((means - means.mean()) / spread) * points.std(ddof=1) / np.sqrt(T)

    def compute_limits(level: float) -> tuple[float, float]:
        wider = float(stdtrit(T - 1, 1 - level / 2) / ndtri(1 - level / 2))
        low, high = np.quantile(deviations, [level / 2, 1 - level / 2])
        return mean + wider * float(low), mean + wider * float(high)

    low, high = compute_limits(1 - CONFIDENCE)
    inside, outside = 1 / R, 1 - 1e-6  # the p-value is the level at which the interval just reaches 0
    for _ in range(30):
        level = (inside + outside) / 2
        reached = compute_limits(level)
        inside, outside = (level, outside) if reached[0] <= 0 <= reached[1] else (inside, level)
    return PairedDifference(mean, low, high, p_value=float(inside), method="hierarchical_bootstrap")
