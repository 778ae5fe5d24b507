"""Agreement of several readers on the same images beyond what chance would give: Cohen's and Fleiss' kappa.

    readings [N, readers], MISSING where a reader did not read --a pair of readers--> Cohen's kappa (plain or weighted)
                                                               `--all readers------> Fleiss' kappa

What readers agree on bounds what a model can be asked for. Intervals are patient-clustered bootstrap percentiles; both
kappas are ratios of weighted sums, so all replicates come from one matrix product.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.errors import UserError
from panfm.measures.intervals import Estimate, explain_regime
from panfm.measures.statistics import NUM_REPLICATES, compute_interval, draw_group_weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Weighting = Literal["none", "linear", "quadratic"]

MIN_KAPPA_GROUPS = 60  # with two readings; simulated with 30: Fleiss' kappa 91 %, Cohen's 93 %
MISSING = -1  # in readings: this reader did not read this image


@dataclass(frozen=True)
class PairAgreement:
    """Cohen's kappa of two readers (columns of the readings) on the images that both read."""

    reader_a: int
    reader_b: int
    num_images: int
    kappa: Estimate


@dataclass(frozen=True)
class Agreement:
    """Fleiss' kappa over all images with at least two readings, and Cohen's for every pair of readers."""

    num_images: int
    num_readings: int
    fleiss: Estimate
    pairs: tuple[PairAgreement, ...]


def measure_agreement(
    readings: ArrayLike,
    groups: ArrayLike,
    num_classes: int,
    *,
    seed: int,
    weighting: Weighting = "none",
    num_replicates: int = NUM_REPLICATES,
) -> Agreement:
    """Measure how far readers agree.

    readings: [N, readers], classes 0 .. num_classes - 1, or MISSING. groups: [N]. weighting: how far apart two classes
    count in Cohen's kappa ("linear" or "quadratic" for ordinal classes); Fleiss' takes them as names.

    Raises UserError for a reading outside these values, and for fewer than two readers.
    """
    table = _check(readings, num_classes)
    group = np.asarray(groups)
    weights = draw_group_weights(group, num_replicates, seed)
    counts = _count_readings(table, num_classes)
    several = counts.sum(axis=1) > 1
    every = np.ones((1, len(table)))
    fleiss = _describe(
        compute_fleiss_kappa(table, num_classes, every),
        compute_fleiss_kappa(table, num_classes, weights),
        group[several],
    )
    pairs = []
    for a, b in combinations(range(table.shape[1]), 2):
        both = (table[:, a] != MISSING) & (table[:, b] != MISSING)
        read_a, read_b = table[both, a], table[both, b]
        kappa = _describe(
            compute_cohen_kappa(read_a, read_b, num_classes, every[:, both], weighting),
            compute_cohen_kappa(read_a, read_b, num_classes, weights[:, both], weighting),
            group[both],
        )
        pairs.append(PairAgreement(a, b, int(both.sum()), kappa))
    return Agreement(int(several.sum()), int(counts[several].sum()), fleiss, tuple(pairs))


def compute_cohen_kappa(
    readings_a: ArrayLike, readings_b: ArrayLike, num_classes: int, weights: ArrayLike, weighting: Weighting = "none"
) -> Floats:
    """Compute Cohen's kappa of two readers [N] under R rows of weights [R, N]: [R], NaN where chance explains all.

    1 - observed disagreement / disagreement expected from both readers' shares of classes.
    """
    a, b, w = np.asarray(readings_a), np.asarray(readings_b), np.asarray(weights, dtype=np.float64)
    distance = np.abs(np.subtract.outer(np.arange(num_classes), np.arange(num_classes))).astype(np.float64)
    if weighting == "none":
        distance = np.minimum(distance, 1)
    elif weighting == "quadratic":
        distance = distance**2
    names = np.eye(num_classes)
    shares_a, shares_b, total = w @ names[a], w @ names[b], w.sum(axis=1)
    expected = np.einsum("rk,kl,rl->r", shares_a, distance, shares_b)
    observed = (w @ distance[a, b]) * total
    return np.asarray(1 - np.divide(observed, expected, out=np.full(len(w), np.nan), where=expected > 0))


def compute_fleiss_kappa(readings: ArrayLike, num_classes: int, weights: ArrayLike) -> Floats:
    """Compute Fleiss' kappa of readings [N, readers] under R rows of weights [R, N]: [R], NaN where undefined.

    Images with fewer than two readings say nothing of agreement and are left out; others count alike, however many
    readers they had, and chance is the share of each class among all their readings.
    """
    counts = _count_readings(np.asarray(readings), num_classes)
    num_readers = counts.sum(axis=1)
    several = num_readers > 1
    counts, num_readers = counts[several], num_readers[several]
    w = np.asarray(weights, dtype=np.float64)[:, several]
    agreement = ((counts**2).sum(axis=1) - num_readers) / (num_readers * (num_readers - 1))
    total, readings_total = w.sum(axis=1), w @ num_readers
    undefined = np.full(len(w), np.nan)
    observed = np.divide(w @ agreement, total, out=undefined.copy(), where=total > 0)
    shares = (w @ counts) / np.where(readings_total > 0, readings_total, np.nan)[:, None]
    chance = (shares**2).sum(axis=1)
    return np.asarray(np.divide(observed - chance, 1 - chance, out=undefined, where=1 - chance > 1e-12))


def _count_readings(table: Ints, num_classes: int) -> Floats:
    """How many readers gave each class to each image: [N, K]."""
    return np.stack([(table == k).sum(axis=1) for k in range(num_classes)], axis=1).astype(np.float64)


def _describe(value: Floats, replicates: Floats, groups: NDArray) -> Estimate:
    num_groups = len(np.unique(groups))
    if num_groups == 0:
        return Estimate(None, None, None, "no image with two readings")
    if np.isnan(value[0]):
        return Estimate(None, None, None, "undefined: the readings are one single class")
    interval = compute_interval(replicates, num_groups)
    reason = interval.reason or explain_regime(num_groups, MIN_KAPPA_GROUPS, "with two readings")
    return Estimate(float(value[0]), interval.low, interval.high, reason, interval.num_undefined, interval.method)


def _check(readings: ArrayLike, num_classes: int) -> Ints:
    table = np.asarray(readings)
    assert table.ndim == 2, "readings are [N, readers]"
    if table.shape[1] < 2:
        raise UserError(f"readings have {table.shape[1]} reader; agreement needs at least 2")
    whole = table.astype(np.float64)
    bad = ~(((whole >= 0) & (whole < num_classes) & (whole == np.floor(whole))) | (whole == MISSING))
    if bad.any():
        row, reader = np.argwhere(bad)[0].tolist()
        raise UserError(
            f"reading of row {row} by reader {reader} is {table[row, reader]}; it must be a whole number from 0 to "
            f"{num_classes - 1}, or {MISSING} where the reader did not read the image"
        )
    return table.astype(np.int64)
