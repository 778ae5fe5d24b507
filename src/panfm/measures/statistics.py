"""Intervals and comparisons of any metric of `metrics`: the patient-clustered bootstrap, and who takes its place.

    groups [N] -> draw whole groups with replacement -> weights [R, N] -> metric a replicate [R] -> percentile interval

The unit that is drawn is the group (a patient; else a lesion, slide or image): images of one patient are alike, and
drawing single images would make every interval too narrow. Groups are not stratified by class, so the share of
positives varies between replicates as it does between hospitals' samples. The point estimate is that of all data, not
the mean of the replicates. Two encoders are compared on the same replicates.

The declared regime. A percentile interval needs FEW_GROUPS groups in the rarer class, for some metrics more
(MIN_BOOTSTRAP_GROUPS). Below FEW_AREA_GROUPS the AUROC of two classes gets a clustered DeLong interval on the logit
scale, below FEW_GROUPS accuracy a clustered Wilson interval, both with regimes of their own (`intervals`); the other
metrics keep their percentiles, and `reason` says that these are too narrow. Every Estimate names its method. What each
covers is shown by `python -m tests.measures.simulate`.

Known limits. A percentile interval has no width where the point estimate is at its bound. The calibration error gets no
interval: resampled errors are larger than the point value (see `metrics`). Training and choice of labels are not in any
of this: average several draws (the leaderboard does) to see those.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.measures.comparisons import PairedDifference, compare_areas, compute_p_value
from panfm.measures.intervals import (
    CONFIDENCE,
    Estimate,
    Interval,
    estimate_area,
    estimate_proportion,
    explain_regime,
)
from panfm.measures.metrics import compute_all_replicates, compute_metric, compute_replicates

NUM_REPLICATES = 2000
MAX_UNDEFINED_SHARE = 0.05  # above it the defined replicates are a selection, and their percentiles mislead
MAX_BLOCK_VALUES = 2_000_000  # drawn group numbers held at once: 16 MB
FEW_GROUPS = 30  # in the rarer class: below it percentile intervals are too narrow
# Below it the AUROC of two classes has its closed form. Simulated at 30 / 45 / 60 / 90 groups, areas of 0.8 and 0.92:
# percentiles cover 90 to 94 / 91 to 94 / 92 to 94 / 94 to 96 %, clustered DeLong 93 to 96 % at all of them.
FEW_AREA_GROUPS = 90
# Metrics that hang on few images at one end of the ranking. Simulated with 30 and 60 groups: AUROC of three classes 92
# and 95 %, AUPRC 91 to 93 and 92 to 95 %, partial AUROC 89 to 91 and 91 to 92 %, calibration slope 91 to 92 and 93 %.
# Other families (`tests.measures.simulate_families`): numbers and grades cover 89 to 92 % with 30 groups, 93 to 95 %
# with 60; with 15 patients who had the event C-indices and AUROC cover 93 to 97 %, the Brier score 92 to 93 %.
MIN_BOOTSTRAP_GROUPS: Mapping[str, int] = {
    "auroc": 60,
    "auprc": 100,
    "partial_auroc_above_80_sensitivity": 100,
    **dict.fromkeys(("mean_absolute_error", "root_mean_squared_error", "intraclass_correlation", "spearman"), 60),
    "quadratic_kappa": 60,
    **dict.fromkeys(("harrell_c", "uno_c", "time_dependent_auroc"), 15),
    "integrated_brier": 40,
    "unknown_auroc": 60,  # as any area and any average precision by percentiles
    "unknown_auprc": 100,
    "fpr_at_95_tpr": 60,
}
MIN_SLOPE_GROUPS = 60
# A paired difference on replicates gets a p-value from here on: with 40 groups 8 to 10 % were rejected under the null.
MIN_PAIRED_GROUPS = 100
NO_INTERVAL: Mapping[str, str] = {
    "ece": "no interval: resampled calibration errors are larger than the point value, percentiles would sit too high"
}


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
    return Interval(float(low), float(high), None, num_undefined, "bootstrap")


def estimate_metrics(
    names: Sequence[str],
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    *,
    seed: int,
    num_replicates: int = NUM_REPLICATES,
) -> dict[str, Estimate]:
    """Estimate metrics of `scores` [N, K] against `labels` [N] with 95 % intervals that hold groups together.

    `seed` comes from `compute_bootstrap_seed`. Which interval a metric gets is the declared regime at the top of this
    file. An undefined value or interval is None with a reason; an interval outside its regime carries a reason too.
    """
    points = {name: compute_metric(name, labels, scores) for name in names}
    num_groups, num_rarer = len(np.unique(np.asarray(groups))), count_rarer_groups(labels, groups)
    closed = {name: _estimate_closed(name, labels, scores, groups, num_rarer) for name in names}
    drawn = [name for name in names if points[name].value is not None and closed[name] is None]
    weights = draw_group_weights(groups, num_replicates if drawn else 0, seed)
    replicates = compute_all_replicates(drawn, labels, scores, weights)
    estimates = {}
    for name in names:
        value, special = points[name].value, closed[name]
        if value is None:
            estimates[name] = Estimate(None, None, None, points[name].reason)
        elif special is not None:
            estimates[name] = replace(special, value=value)
        else:
            estimates[name] = describe_value(name, value, replicates[name], num_groups, num_rarer)
    return estimates


def describe_value(
    name: str,
    value: float,
    replicates: ArrayLike,
    num_groups: int,
    num_rarer: int,
    which: str = "in the rarer class",
) -> Estimate:
    """Describe a value of metric `name` by its replicates [R]: the percentile interval, or why there is none.

    num_rarer: the number of groups that the declared regime asks for, `which` of them in words.
    """
    if name in NO_INTERVAL:
        return Estimate(value, None, None, NO_INTERVAL[name])
    interval = compute_interval(replicates, num_groups)
    reason = interval.reason or explain_regime(num_rarer, MIN_BOOTSTRAP_GROUPS.get(name, FEW_GROUPS), which)
    return Estimate(value, interval.low, interval.high, reason, interval.num_undefined, interval.method)


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
    """Compare two encoders' scores [N, K] of the same rows: metric of a minus metric of b.

    On the same replicates; an AUROC of two classes with few groups in the rarer class by the clustered DeLong test.
    """
    point_a, point_b = compute_metric(name, labels, scores_a), compute_metric(name, labels, scores_b)
    if point_a.value is None or point_b.value is None:
        return PairedDifference(None, None, None, point_a.reason or point_b.reason)
    num_groups, num_rarer = len(np.unique(np.asarray(groups))), count_rarer_groups(labels, groups)
    if _is_area_of_few(name, scores_a, num_rarer):
        return compare_areas(labels, np.asarray(scores_a)[:, 1], np.asarray(scores_b)[:, 1], groups)
    weights = draw_group_weights(groups, num_replicates, seed)
    differences = compute_replicates(name, labels, scores_a, weights)
    differences -= compute_replicates(name, labels, scores_b, weights)
    return describe_difference(name, point_a.value - point_b.value, differences, num_groups, num_rarer)


def describe_difference(
    name: str,
    difference: float,
    replicates: ArrayLike,
    num_groups: int,
    num_rarer: int,
    which: str = "in the rarer class",
) -> PairedDifference:
    """Describe a difference in metric `name` by its replicates [R]; a p-value only inside the declared regime."""
    if name in NO_INTERVAL:
        return PairedDifference(difference, None, None, NO_INTERVAL[name])
    interval = compute_interval(replicates, num_groups)
    reason = interval.reason or explain_regime(num_rarer, MIN_PAIRED_GROUPS, which)
    return PairedDifference(
        difference,
        interval.low,
        interval.high,
        reason,
        interval.num_undefined,
        None if reason else compute_p_value(replicates),
        None if interval.method is None else "bootstrap",
    )


def _is_area_of_few(name: str, scores: ArrayLike, num_rarer: int) -> bool:
    return name == "auroc" and np.shape(scores)[1] == 2 and num_rarer < FEW_AREA_GROUPS


def _estimate_closed(
    name: str, labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, num_rarer: int
) -> Estimate | None:
    """The interval that takes the bootstrap's place, or None where the bootstrap stays."""
    if name in NO_INTERVAL:
        return Estimate(None, None, None, NO_INTERVAL[name])
    if _is_area_of_few(name, scores, num_rarer):
        return estimate_area(labels, np.asarray(scores)[:, 1], groups)
    if name == "accuracy" and num_rarer < FEW_GROUPS:
        return estimate_proportion(np.argmax(scores, axis=1) == np.asarray(labels), groups)
    return None
