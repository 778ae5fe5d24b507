"""Metrics of every task family through one door: a family's name, a metric's name and an Outcome in, numbers out.

    Outcome --compute_point--> value or a reason      --compute_outcome_replicates--> [R] under bootstrap weights
            --estimate_outcome--> values with 95 % intervals that hold groups together, each with its method

Families with classes are measured by `metrics` (and `statistics` chooses their intervals); what only one family has
comes from its own module. Out of distribution, the metrics of classification are those of the units of known classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from panfm.measures import detection, numbers, regions, retrieval, survival
from panfm.measures.definitions import METRICS, MetricDefinition
from panfm.measures.intervals import Estimate
from panfm.measures.metrics import MetricPoint, compute_all_replicates, compute_metric
from panfm.measures.outcomes import Floats, Measure, Outcome
from panfm.measures.statistics import (
    NUM_REPLICATES,
    count_rarer_groups,
    describe_value,
    draw_group_weights,
    estimate_metrics,
)

OWN_MEASURES: Mapping[str, Mapping[str, Measure]] = {
    "regression": numbers.MEASURES_REGRESSION,
    "ordinal": numbers.MEASURES_ORDINAL,
    "survival": survival.MEASURES,
    "segmentation": regions.MEASURES,
    "retrieval": retrieval.MEASURES,
    "ugly_duckling": detection.MEASURES_UGLY_DUCKLING,
    "out_of_distribution": detection.MEASURES_OUT_OF_DISTRIBUTION,
}
OUT_OF_DISTRIBUTION = "out_of_distribution"


def describe_metric(family: str, name: str) -> MetricDefinition:
    """What a metric of a family is called, which way is better, and what it is."""
    own = OWN_MEASURES.get(family, {}).get(name)
    if own is None:
        return METRICS[name]
    return MetricDefinition(own.title, own.direction, own.description)


def compute_point(family: str, name: str, outcome: Outcome) -> MetricPoint:
    """Compute one metric of all units; None with a reason where it is undefined."""
    own = OWN_MEASURES.get(family, {}).get(name)
    if own is None:
        known = _select_classified(family, outcome)
        return compute_metric(name, known.labels, known.scores)
    if len(outcome.groups) == 0:
        return MetricPoint(None, "nothing was scored")
    reason = own.explain(outcome)
    if reason is not None:
        return MetricPoint(None, reason)
    value = float(own.compute(outcome, np.ones((1, len(outcome.groups)), dtype=np.uint16))[0])
    return MetricPoint(None, f"{own.title} is undefined here") if np.isnan(value) else MetricPoint(value)


def compute_outcome_replicates(
    family: str, names: Sequence[str], outcome: Outcome, weights: NDArray[np.generic]
) -> dict[str, Floats]:
    """Compute several metrics under R rows of weights [R, N]; each [R], NaN where a replicate leaves it undefined."""
    own = OWN_MEASURES.get(family, {})
    shared = [name for name in names if name not in own]
    replicates: dict[str, Floats] = {}
    if shared:
        is_known = _find_classified(family, outcome)
        known = _select_classified(family, outcome)
        replicates = compute_all_replicates(shared, known.labels, known.scores, weights[:, is_known])
    for name in names:
        if name in own:
            undefined = len(outcome.groups) == 0 or own[name].explain(outcome) is not None
            replicates[name] = np.full(len(weights), np.nan) if undefined else own[name].compute(outcome, weights)
    return replicates


def estimate_outcome(
    family: str, names: Sequence[str], outcome: Outcome, *, seed: int, num_replicates: int = NUM_REPLICATES
) -> dict[str, Estimate]:
    """Estimate metrics with 95 % intervals that hold groups together; undefined ones are None with a reason.

    seed: of `statistics.compute_bootstrap_seed`. A metric of a family's own has a percentile interval; outside
    its declared regime the reason says that it may be too narrow.
    """
    own = [name for name in names if name in OWN_MEASURES.get(family, {})]
    shared = [name for name in names if name not in own]
    known = _select_classified(family, outcome)
    estimates = (
        estimate_metrics(shared, known.labels, known.scores, known.groups, seed=seed, num_replicates=num_replicates)
        if shared
        else {}
    )
    points = {name: compute_point(family, name, outcome) for name in own}
    drawn = [name for name in own if points[name].value is not None]
    weights = draw_group_weights(outcome.groups, num_replicates if drawn else 0, seed)
    replicates = compute_outcome_replicates(family, drawn, outcome, weights)
    num_groups = len(np.unique(outcome.groups))
    for name in own:
        value = points[name].value
        if value is None:
            estimates[name] = Estimate(None, None, None, points[name].reason)
            continue
        counted, which = count_regime_groups(family, name, outcome)
        estimates[name] = describe_value(name, value, replicates[name], num_groups, counted, which)
    return {name: estimates[name] for name in names}


def count_regime_groups(family: str, name: str, outcome: Outcome) -> tuple[int, str]:
    """The number of groups that an interval's declared regime counts, and which these are in words."""
    if name not in OWN_MEASURES.get(family, {}):
        return count_rarer_groups(outcome.labels, outcome.groups), "in the rarer class"
    if family == "survival":  # what counts is in how many patients something occurred
        return len(np.unique(outcome.groups[outcome.targets[:, 1] == 1])), "with the event"
    if family == OUT_OF_DISTRIBUTION:
        is_unknown = ~_find_classified(family, outcome)
        return count_rarer_groups(is_unknown, outcome.groups), "in the rarer of known and unknown"
    if family == "ugly_duckling":
        return len(np.unique(outcome.groups[outcome.labels == 1])), "with a positive"
    return len(np.unique(outcome.groups)), "in all"


def compute_chance(family: str, name: str, outcome: Outcome) -> tuple[float, float]:
    """The value of a predictor that knows only what is common in these units, and the best value there is.

    They are 0 and 1 of a normalised score.
    """
    own = OWN_MEASURES.get(family, {}).get(name)
    if own is not None:
        return own.chance(outcome), own.perfect
    known = _select_classified(family, outcome)
    shares = np.bincount(known.labels, minlength=known.scores.shape[1]) / max(1, len(known.labels))
    return _compute_chance(name, shares), 1.0 if METRICS[name].direction == "higher" else 0.0


def _find_classified(family: str, outcome: Outcome) -> NDArray[np.bool_]:
    if family != OUT_OF_DISTRIBUTION:
        return np.ones(len(outcome.labels), dtype=bool)
    return np.asarray(outcome.labels < outcome.scores.shape[1] - 1)


def _select_classified(family: str, outcome: Outcome) -> Outcome:
    """The units that the metrics of classification count, with probabilities that sum to 1."""
    if family != OUT_OF_DISTRIBUTION:
        return outcome
    known = outcome.take(_find_classified(family, outcome))
    scores = known.scores[:, :-1]  # the last column is how unknown the image looks
    return Outcome(known.labels, scores, known.groups, known.targets)


def _compute_chance(metric: str, shares: Floats) -> float:
    """A metric of classification for a predictor that knows only the class shares [K]."""
    K = len(shares)
    largest = float(shares.max())
    majority_f1 = 2 * largest / (1 + largest)
    squares = float((shares**2).sum())
    return {
        "auroc": 0.5,
        "auprc": float(shares[1]) if K == 2 else 1 / K,
        "balanced_accuracy": 1 / K,
        "accuracy": largest,
        "weighted_f1": largest * majority_f1,
        "macro_f1": majority_f1 / K,
        "kappa": 0.0,
        "partial_auroc_above_80_sensitivity": 0.10,
        "sensitivity_at_90_specificity": 0.10,
        "sensitivity_at_95_specificity": 0.05,
        "brier": (1 - squares) / 2 if K == 2 else 1 - squares,
        "ece": 1.0,  # a predictor of the shares is perfectly calibrated: 1 is the worst value instead
        "log_loss": float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()),
    }[metric]
