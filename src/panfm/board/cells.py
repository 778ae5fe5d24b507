"""The numbers of one cell and of what it is compared with: verified runs of an encoder on a task in, a Cell out.

    runs (draws x seeds) --mean--> value, replicates [R] --+ error of the choice of labels (`draws`)--> interval
    two encoders' replicates or parts of areas, subtracted -----------------------------------------> difference, p
    the p-values of one column --Holm--> adjusted

Which interval a metric gets is the declared regime of `measures.statistics`: the closed forms for few groups, else the
percentiles of 2,000 bootstrap samples of whole patients, shared by all encoders of a task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from panfm.board.summary import Cell, Comparison, Task
from panfm.board.verify import Run, TestSet
from panfm.evaluation.results import EncoderCard, Result
from panfm.measures.by_family import OUT_OF_DISTRIBUTION, OWN_MEASURES
from panfm.measures.comparisons import PairedDifference, adjust_holm, compare_area_parts
from panfm.measures.draws import MIN_DRAWS, Floats, compute_draw_variance, spread_by_draws, widen_by_draws
from panfm.measures.intervals import AreaParts, Estimate, compute_area_parts, estimate_area, estimate_proportion
from panfm.measures.statistics import (
    FEW_AREA_GROUPS,
    FEW_GROUPS,
    count_rarer_groups,
    describe_difference,
    describe_value,
)


@dataclass(frozen=True)
class Measured:
    """An encoder on a task in a section: what its cell, its differences and its rank are computed from.

    values: float64 [B], one a draw (the mean over its seeds; one a seed where there is a single draw), NaN where
    undefined; `draws` their numbers. replicates: float64 [R] of the mean, test patients resampled alone; `spread` the
    same with the choice of labels. closed: the interval that takes the percentiles' place; areas: what groups add to
    the error of a mean AUROC, where that is what closes it.
    """

    encoder: EncoderCard
    results: tuple[Result, ...]
    draws: tuple[int, ...]
    values: Floats
    replicates: Floats
    spread: Floats
    reason: str | None
    closed: Estimate | None
    areas: AreaParts | None

    @property
    def value(self) -> float | None:
        """Mean over draws and seeds; None where one of them is undefined."""
        return None if self.reason is not None or len(self.values) == 0 else float(self.values.mean())


def measure(runs: Sequence[Run], test_sets: Sequence[TestSet], seed: int) -> Measured:
    """Put the runs of one encoder on one task in one section together; test_sets are theirs, in the same order.

    seed: of `statistics.compute_bootstrap_seed`, the same for every encoder of the task.
    """
    results = tuple(run.result for run in runs)
    several_draws = len({result.draw for result in results}) > 1
    numbers = [result.draw if several_draws else result.seed for result in results]
    draws = tuple(sorted(set(numbers)))
    known = np.array([np.nan if run.value is None else run.value for run in runs])
    values = np.array([known[np.equal(numbers, draw)].mean() for draw in draws])
    # Each draw counts alike, however many seeds it has.
    replicates = np.mean(
        [
            np.mean([run.replicates for run, number in zip(runs, numbers, strict=True) if number == draw], axis=0)
            for draw in draws
        ],
        axis=0,
    )
    reason = next((run.reason or "undefined" for run in runs if run.value is None), None)
    closed, areas = (None, None) if reason is not None else _close(results[0], test_sets)
    if closed is not None and closed.low is not None and closed.high is not None:
        low, high = widen_by_draws(float(values.mean()), closed.low, closed.high, values)
        closed = replace(closed, low=max(low, 0.0), high=min(high, 1.0))
    return Measured(
        encoder=results[0].encoder,
        results=results,
        draws=draws,
        values=values,
        replicates=replicates,
        spread=spread_by_draws(replicates, values, draws, seed) if reason is None else replicates,
        reason=reason,
        closed=closed,
        areas=areas,
    )


def _close(result: Result, test_sets: Sequence[TestSet]) -> tuple[Estimate | None, AreaParts | None]:
    """The interval in closed form of a mean over runs, where the rarer class has few groups; (None, None) elsewhere."""
    metric, outcome = result.primary_metric, test_sets[0].outcome
    num_rarer = count_rarer_groups(outcome.labels, outcome.groups)
    if metric in OWN_MEASURES.get(result.family, {}) or result.family == OUT_OF_DISTRIBUTION:
        return None, None
    if metric == "auroc" and outcome.scores.shape[1] == 2 and num_rarer < FEW_AREA_GROUPS:
        scores = np.stack([test_set.scores[:, 1] for test_set in test_sets])
        return (
            estimate_area(outcome.labels, scores, outcome.groups),
            compute_area_parts(outcome.labels, scores, outcome.groups),
        )
    if metric == "accuracy" and num_rarer < FEW_GROUPS:
        hits = np.mean([test_set.scores.argmax(axis=1) == outcome.labels for test_set in test_sets], axis=0)
        return estimate_proportion(hits, outcome.groups), None
    return None, None


def build_cell(measured: Measured | None, task: Task) -> Cell:
    """The cell without its difference: value, interval, and how that was made."""
    if measured is None:
        return Cell(None, None, None, "not evaluated", None, 0, None, None, "unknown", None, ())
    results = measured.results
    value = measured.value
    if value is None:
        estimate = Estimate(None, None, None, measured.reason)
    elif measured.closed is not None:
        estimate = measured.closed
    else:
        estimate = _clip(
            describe_value(
                task.metric, value, measured.spread, task.num_test_groups, task.num_rarer_groups, task.which_groups
            ),
            task,
        )
    several = len(measured.values) > 1
    with_draws = estimate.method is not None and len(measured.values) >= MIN_DRAWS
    reason = estimate.reason
    if several and not with_draws and estimate.method is not None:
        alone = f"holds the test patients alone: {len(measured.values)} draws, their choice counts from {MIN_DRAWS} on"
        reason = alone if reason is None else f"{reason}; {alone}"
    return Cell(
        value=value,
        low=estimate.low,
        high=estimate.high,
        reason=reason,
        method=None if estimate.method is None else f"{estimate.method}{'+draws' if with_draws else ''}",
        num_runs=len(results),
        spread=float(np.std(measured.values, ddof=1)) if several and value is not None else None,
        num_train_groups=int(np.median([result.num_train_groups for result in results])),
        label_note=results[0].settings.get("label_note"),
        contamination=measured.encoder.contamination,
        difference=None,
        predictions_sha256=tuple(sorted(result.predictions_sha256 for result in results)),
    )


def compare(ours: Measured, reference: Measured, task: Task) -> Comparison | None:
    """Our value minus the reference's on the same patients; None where one of them is undefined."""
    if ours.value is None or reference.value is None:
        return None
    difference = ours.value - reference.value
    paired = ours.draws == reference.draws
    with_draws = min(len(ours.values), len(reference.values)) >= MIN_DRAWS
    if ours.areas is not None and reference.areas is not None:
        if paired:
            variance = compute_draw_variance(ours.values - reference.values)
        else:
            variance = compute_draw_variance(ours.values) + compute_draw_variance(reference.values)
        found = compare_area_parts(
            ours.areas,
            reference.areas,
            independent=len(ours.areas.positive) == task.num_test,
            further_variance=variance,
            further_freedom=float(max(1, min(len(ours.values), len(reference.values)) - 1)),
        )
    else:
        found = describe_difference(
            task.metric,
            difference,
            ours.spread - reference.spread,
            task.num_test_groups,
            task.num_rarer_groups,
            task.which_groups,
        )
    return to_comparison(replace(found, difference=difference), with_draws)


def to_comparison(found: PairedDifference, with_draws: bool) -> Comparison:
    """What the board keeps of a paired difference."""
    method = None if found.method is None else f"{found.method}{'+draws' if with_draws else ''}"
    return Comparison(found.difference, found.low, found.high, found.reason, method, found.p_value)


def adjust_column(column: Sequence[Comparison | None]) -> list[Comparison | None]:
    """Adjust the p-values of one column, the comparisons on one task, by Holm's method."""
    adjusted = adjust_holm([None if item is None else item.p_value for item in column])
    return [
        None if item is None else replace(item, p_adjusted=p_adjusted)
        for item, p_adjusted in zip(column, adjusted, strict=True)
    ]


def _clip(estimate: Estimate, task: Task) -> Estimate:
    """Noise of the draws can pass the best value there is; no metric can."""
    if estimate.low is None or estimate.high is None:
        return estimate
    if task.higher_is_better:
        return replace(estimate, high=min(estimate.high, task.perfect))
    return replace(estimate, low=max(estimate.low, task.perfect))
