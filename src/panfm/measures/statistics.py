"""Intervals and comparisons: patient-clustered bootstrap of any metric of `metrics`.

    groups [N] -> draw whole groups with replacement -> weights [R, N] -> metric a replicate [R] -> percentile interval

The unit that is drawn is the group (a patient; else a lesion, slide or image): images of one patient are alike, and
drawing single images would make every interval too narrow. Groups are not stratified by class, so the share of
positives varies between replicates as it does between hospitals' samples. The point estimate is that of all data, not
the mean of the replicates. Two encoders are compared on the same replicates.

Known limits. A percentile interval covers less than it says where the rarer class has few groups. Simulated for AUROCs
of 0.75 and 0.91 (three images a patient, 400 trials each): 89 and 83 % with 8 positive groups, 91 and 88 % with 15, 94
and 94 % with 30. It has no width where the point estimate is at its bound (AUROC of 1). For the calibration error it
sits too high (see `metrics`). Training and choice of labels are not in it: average several draws (the leaderboard does)
to see those.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.measures.metrics import compute_all_replicates, compute_metric, compute_replicates

NUM_REPLICATES = 2000
CONFIDENCE = 0.95
MAX_UNDEFINED_SHARE = 0.05  # above it the defined replicates are a selection, and their percentiles mislead
MAX_BLOCK_VALUES = 2_000_000  # drawn group numbers held at once: 16 MB
FEW_GROUPS = 30  # in the rarer class: below it percentile intervals are too narrow


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval; what is None is explained by `reason`."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None
    num_undefined: int = 0  # replicates in which the metric is undefined


@dataclass(frozen=True)
class PairedDifference:
    """Metric of a minus metric of b with its 95 % interval on shared replicates; None is explained by `reason`."""

    difference: float | None
    low: float | None
    high: float | None
    reason: str | None = None
    num_undefined: int = 0


@dataclass(frozen=True)
class Interval:
    """A percentile interval, or None and the reason."""

    low: float | None
    high: float | None
    reason: str | None
    num_undefined: int


def compute_bootstrap_seed(task: str, split_hash: str) -> int:
    """Compute the bootstrap's seed (63 bits): every encoder on one task and split meets the same replicates."""
    digest = hashlib.blake2b(f"{task}\n{split_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_group_weights(groups: ArrayLike, num_replicates: int, seed: int) -> NDArray[np.uint16]:
    """Draw bootstrap weights [R, N]: how often each row's group was drawn, G of G groups with replacement.

    `groups` [N] are names; the draw depends on their sorted set, so rows of one group weigh the same and the order of
    rows does not matter.
    """
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = np.empty((num_replicates, len(names)), dtype=np.uint16)
    block = max(1, MAX_BLOCK_VALUES // max(1, len(names)))
    for start in range(0, num_replicates, block):
        size = min(block, num_replicates - start)
        drawn = generator.integers(0, len(names), (size, len(names))) + len(names) * np.arange(size)[:, None]
        tally = np.bincount(drawn.ravel(), minlength=size * len(names))
        counts[start : start + size] = tally.reshape(size, len(names))
    return counts[:, number]


def count_rarer_groups(labels: ArrayLike, groups: ArrayLike) -> int:
    """Count the groups of the class that the fewest groups have (0 if there are no rows)."""
    label_array, group_array = np.asarray(labels), np.asarray(groups)
    counts = [len(np.unique(group_array[label_array == label])) for label in np.unique(label_array)]
    return min(counts, default=0)


def compute_interval(replicates: ArrayLike, num_groups: int) -> Interval:
    """Compute the 95 % percentile interval of replicates [R], NaN = undefined; None where there is no honest one."""
    values = np.asarray(replicates, dtype=np.float64)
    defined = values[~np.isnan(values)]
    num_undefined = len(values) - len(defined)
    if num_groups < 2:
        return Interval(None, None, f"no interval: {num_groups} test group, at least 2 are needed", num_undefined)
    if num_undefined > MAX_UNDEFINED_SHARE * len(values):
        return Interval(
            None, None, f"no interval: undefined in {num_undefined} of {len(values)} bootstrap samples", num_undefined
        )
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(float(low), float(high), None, num_undefined)


def estimate_metrics(
    names: Sequence[str],
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    *,
    seed: int,
    num_replicates: int = NUM_REPLICATES,
) -> dict[str, Estimate]:
    """Estimate metrics of `scores` [N, K] against `labels` [N] with patient-clustered 95 % intervals.

    `seed` comes from `compute_bootstrap_seed`. An undefined value or interval is None with a reason.
    """
    points = {name: compute_metric(name, labels, scores) for name in names}
    defined = [name for name in names if points[name].value is not None]
    weights = draw_group_weights(groups, num_replicates, seed)
    replicates = compute_all_replicates(defined, labels, scores, weights)
    num_groups = len(np.unique(np.asarray(groups)))
    return {name: _join(points[name].value, points[name].reason, replicates, name, num_groups) for name in names}


def compare_paired(
    name: str,
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: ArrayLike,
    *,
    seed: int,
    num_replicates: int = NUM_REPLICATES,
) -> PairedDifference:
    """Compare two encoders' scores [N, K] of the same rows: metric of a minus metric of b, on the same replicates."""
    point_a, point_b = compute_metric(name, labels, scores_a), compute_metric(name, labels, scores_b)
    if point_a.value is None or point_b.value is None:
        return PairedDifference(None, None, None, point_a.reason or point_b.reason)
    weights = draw_group_weights(groups, num_replicates, seed)
    replicates_a = compute_replicates(name, labels, scores_a, weights)
    replicates_b = compute_replicates(name, labels, scores_b, weights)
    interval = compute_interval(replicates_a - replicates_b, len(np.unique(np.asarray(groups))))
    return PairedDifference(
        point_a.value - point_b.value, interval.low, interval.high, interval.reason, interval.num_undefined
    )


def _join(
    value: float | None, reason: str | None, replicates: Mapping[str, NDArray[np.float64]], name: str, num_groups: int
) -> Estimate:
    if value is None:
        return Estimate(None, None, None, reason)
    interval = compute_interval(replicates[name], num_groups)
    return Estimate(value, interval.low, interval.high, interval.reason, interval.num_undefined)
