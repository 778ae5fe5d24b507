"""Intervals in closed form, for where few groups (patients) carry the rarer class and percentiles are too narrow.

    labels, scores, groups --placement of each row--> sums a group --Obuchowski--> variance --logit, t--> AUROC interval
    hits [N], groups       --sums a group--> design effect --> effective number of images --Wilson, t--> proportion

Groups are the units that were sampled; images of one group may depend on each other in any way, and one group may hold
both classes. With one image a group the AUROC's variance is DeLong's and the proportion's interval is Wilson's.

Sources: Obuchowski 1997 (Biometrics 53:567) for clustered ROC data; DeLong 1988; Newcombe 2006 (Stat Med 25:559, method
5) for an AUROC of exactly 0 or 1; Wilson 1927 with an effective number of images (Korn and Graubard 1998). Where each
interval holds is declared below and shown by `python -m tests.measures.simulate`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Method = Literal["bootstrap", "delong_logit", "newcombe", "wilson", "clustered_t"]

CONFIDENCE = 0.95
# The declared regimes: from this many groups on, simulated coverage is 93 to 97 %.
MIN_AREA_GROUPS = 15  # groups in the rarer class, clustered DeLong
MAX_AREA = 0.97  # nearer to 1 (or to 0) a handful of images makes the variance, which is then often far too small
MIN_PROPORTION_GROUPS = 20  # groups with images that count (positives for a sensitivity), clustered Wilson


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, or None and the reason; with limits a reason says that it lies outside its declared regime."""

    low: float | None
    high: float | None
    reason: str | None
    num_undefined: int = 0
    method: Method | None = None


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, and by which method that was made.

    reason: why the value or the interval is None; beside an interval: why it may not cover what it says.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None
    num_undefined: int = 0  # bootstrap replicates in which the metric is undefined
    method: Method | None = None  # None where there is no interval


@dataclass(frozen=True)
class AreaParts:
    """An AUROC and what each of G groups adds to its error: sum over a group's rows of (placement - area) / rows.

    The parts of two encoders on the same rows subtract: the difference of the areas has the difference of the parts.
    """

    area: float
    positive: Floats  # [G], 0 for a group without a positive
    negative: Floats  # [G]
    num_positive_groups: int
    num_negative_groups: int
    effective_positive_groups: float  # as many groups of one size weigh as much: (rows)^2 / sum of squared group sizes
    effective_negative_groups: float

    @property
    def num_rarer_groups(self) -> int:
        """Groups of the class that fewer groups have."""
        return min(self.num_positive_groups, self.num_negative_groups)

    @property
    def variance(self) -> float:
        """Obuchowski's variance of the area; DeLong's where every group has one row."""
        in_positive, in_negative, shared = self._sums
        return in_positive + in_negative + shared

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the variance (Satterthwaite), at least those of the rarer class and at least 1."""
        in_positive, in_negative, _ = self._sums
        of_positive, of_negative = (
            max(1.0, number - 1) for number in (self.effective_positive_groups, self.effective_negative_groups)
        )
        spread = in_positive**2 / of_positive + in_negative**2 / of_negative
        fewest = min(of_positive, of_negative)
        return float(np.clip(self.variance**2 / spread, fewest, len(self.positive) - 1)) if spread > 0 else fewest

    @property
    def _sums(self) -> tuple[float, float, float]:
        G, P, Q = len(self.positive), self.num_positive_groups, self.num_negative_groups
        return (
            float(P / (P - 1) * (self.positive**2).sum()),
            float(Q / (Q - 1) * (self.negative**2).sum()),
            float(2 * G / (G - 1) * (self.positive * self.negative).sum()),
        )

    def subtract(self, other: "AreaParts") -> "AreaParts":
        """The parts of the difference of two areas on the same rows."""
        return AreaParts(
            self.area - other.area,
            self.positive - other.positive,
            self.negative - other.negative,
            self.num_positive_groups,
            self.num_negative_groups,
            self.effective_positive_groups,
            self.effective_negative_groups,
        )


def compute_quantile(freedom: float | None = None) -> float:
    """Student's quantile for a two-sided interval, the normal one without degrees of freedom."""
    tail = 0.5 + CONFIDENCE / 2
    return float(ndtri(tail) if freedom is None else stdtrit(freedom, tail))


def number_groups(groups: ArrayLike) -> tuple[Ints, int]:
    """Number the groups: names [N] -> numbers [N] from 0, and how many there are."""
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    return number.astype(np.int64), len(names)


def sum_by_group(values: Floats, number: Ints, num_groups: int) -> Floats:
    """Sum values [N] a group: [G]."""
    return np.asarray(np.bincount(number, values, minlength=num_groups), dtype=np.float64)


def count_effective_groups(number: Ints) -> float:
    """How many groups of one size weigh as much as those of rows [N] numbered by group: N^2 / sum of squared sizes."""
    sizes = np.bincount(number).astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def compute_area_parts(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> AreaParts:
    """Compute the AUROC of the positives' scores and its parts a group, O(N log N), ties counted half.

    labels: [N], 1 = positive. scores: [N], or [D, N] for D draws of one encoder, whose areas are averaged: what is then
    estimated is their mean under the choice of test patients. Both classes must occur.
    """
    positive = np.asarray(labels) == 1
    rows = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    number, num_groups = number_groups(groups)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    assert num_positive > 0 and num_negative > 0, "both classes must occur"
    placed = np.zeros(len(positive))  # a positive: share of negatives below it; a negative: share of positives above it
    for row in rows:
        ranks = rankdata(row)
        placed[positive] += (ranks[positive] - rankdata(row[positive])) / num_negative
        placed[~positive] += 1 - (ranks[~positive] - rankdata(row[~positive])) / num_positive
    placed /= len(rows)
    area = float(placed[positive].mean())
    error = placed - area
    return AreaParts(
        area,
        sum_by_group(error[positive] / num_positive, number[positive], num_groups),
        sum_by_group(error[~positive] / num_negative, number[~positive], num_groups),
        len(np.unique(number[positive])),
        len(np.unique(number[~positive])),
        count_effective_groups(number[positive]),
        count_effective_groups(number[~positive]),
    )


def estimate_area(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> Estimate:
    """Estimate the AUROC with a clustered DeLong interval on the logit scale. Arguments as in `compute_area_parts`.

    The quantile is Student's, with Satterthwaite's degrees of freedom: the few groups of the rarer class make most of
    the variance, the fewer the more their sizes differ. An area without any variance (0 or 1 in particular, whose logit
    is infinite) gets Newcombe's interval with groups in place of images.
    """
    positive = np.asarray(labels) == 1
    if positive.all() or not positive.any():
        return Estimate(None, None, None, f"no test image of class {0 if positive.any() else 1}")
    parts = compute_area_parts(labels, scores, groups)
    fewest = parts.num_rarer_groups
    if fewest < 2:
        return Estimate(
            parts.area, None, None, f"no interval: {fewest} group in the rarer class, at least 2 are needed"
        )
    reason = explain_regime(fewest, MIN_AREA_GROUPS, "in the rarer class")
    if reason is None and not 1 - MAX_AREA <= parts.area <= MAX_AREA:
        reason = f"interval outside its declared regime: AUROC of {parts.area:.3f}, shown to cover up to {MAX_AREA}"
    if parts.variance < 1e-12 or not 1e-9 < parts.area < 1 - 1e-9:
        low, high = compute_newcombe(parts.area, parts.num_positive_groups, parts.num_negative_groups)
        return Estimate(parts.area, low, high, reason, method="newcombe")
    width = compute_quantile(parts.freedom) * np.sqrt(parts.variance)
    middle = np.log(parts.area / (1 - parts.area))
    low, high = 1 / (1 + np.exp(-middle + np.array([1, -1]) * width / (parts.area * (1 - parts.area))))
    return Estimate(parts.area, float(low), float(high), reason, method="delong_logit")


def compute_newcombe(area: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """Compute Newcombe's interval of an AUROC: all areas whose own standard error (Hanley, McNeil) reaches it."""
    quantile = compute_quantile()
    half = (num_positive + num_negative) / 2 - 1

    def excess(truth: float) -> float:
        inner = 1 + half * (1 - truth) / (2 - truth) + half * truth / (1 + truth)
        return float((area - truth) ** 2 - quantile**2 * truth * (1 - truth) * inner / (num_positive * num_negative))

    tiny = 1e-9
    low = 0.0 if area <= tiny else brentq(excess, 0.0, min(area, 1 - tiny))
    high = 1.0 if area >= 1 - tiny else brentq(excess, max(area, tiny), 1.0)
    return float(low), float(high)


def estimate_proportion(hits: ArrayLike, groups: ArrayLike, *, empty: str = "no test images") -> Estimate:
    """Estimate a proportion with a clustered Wilson interval.

    hits: [N], which of the images that count are right (a sensitivity: the positives alone, True where found); for D
    draws of one encoder their mean, 0 to 1. groups: [N]. empty: the reason to give where no image counts.
    """
    hit = np.asarray(hits, dtype=np.float64)
    if len(hit) == 0:
        return Estimate(None, None, None, empty)
    value = float(hit.mean())
    number, num_groups = number_groups(groups)
    if num_groups < 2:
        return Estimate(value, None, None, f"no interval: {num_groups} test group, at least 2 are needed")
    low, high = compute_wilson(value, compute_effective_number(hit, number))
    reason = explain_regime(num_groups, MIN_PROPORTION_GROUPS, "with such images")
    return Estimate(value, low, high, reason, method="wilson")


def estimate_mean(values: ArrayLike, groups: ArrayLike, *, empty: str = "no test images") -> Estimate:
    """Estimate the mean of values [N] in groups [N], with Student's interval from its clustered standard error."""
    value = np.asarray(values, dtype=np.float64)
    if len(value) == 0:
        return Estimate(None, None, None, empty)
    mean = float(value.mean())
    number, G = number_groups(groups)
    if G < 2:
        return Estimate(mean, None, None, f"no interval: {G} test group, at least 2 are needed")
    errors = sum_by_group(value - mean, number, G)
    half = float(compute_quantile(G - 1) * np.sqrt(G / (G - 1) * (errors**2).sum()) / len(value))
    reason = explain_regime(G, MIN_PROPORTION_GROUPS, "with such images")
    return Estimate(mean, mean - half, mean + half, reason, method="clustered_t")


def compute_effective_number(hits: Floats, number: Ints) -> float:
    """Compute how many independent images carry as much about a proportion as `hits` [N] in groups `number` [N] do.

    N over the design effect, the ratio of the variance between groups (linearised) to that of independent images. Not
    more than N. Where all hits agree nothing can be learnt of the design effect, and images of one group are taken as
    one (N^2 / sum of squared sizes). The quantile of Student for the estimated variance is put into the number.
    """
    sizes = np.bincount(number).astype(np.float64)
    G, N, value = len(sizes), len(hits), float(hits.mean())
    if (sizes == 1).all():
        return float(N)
    independent = value * (1 - value) / N
    if independent < 1e-15:
        return count_effective_groups(number)
    errors = sum_by_group(hits, number, G) - sizes * value
    between = G / (G - 1) * float((errors**2).sum()) / N**2
    quantile = compute_quantile() / compute_quantile(G - 1)
    return float(N / max(1.0, between / independent) * quantile**2)


def compute_wilson(value: float, number: float) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a proportion `value` among `number` independent images."""
    share = compute_quantile() ** 2 / number
    middle = (value + share / 2) / (1 + share)
    half = np.sqrt(share * value * (1 - value) + share**2 / 4) / (1 + share)
    low = 0.0 if value == 0 else float(middle - half)
    return low, 1.0 if value == 1 else float(middle + half)


def explain_regime(num_groups: int, needed: int, which: str) -> str | None:
    """Say that an interval lies outside its declared regime, or None where it lies inside."""
    if num_groups >= needed:
        return None
    return f"interval outside its declared regime: {num_groups} groups {which}, shown to cover from {needed} on"
