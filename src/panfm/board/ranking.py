"""Ranks: the encoders that have every task of a section, by their mean normalised score.

    values [E, T], replicates [E, T, R] --normalise: 0 chance, 1 perfect; mean over tasks--> scores with intervals
        --surely higher--> rank   --share of others beaten--> Borda, its rank's interval
        --tasks drawn, then patients--> mean difference to the reference, for tasks like these

Two questions, two intervals. Rank and score are those of these very tasks: test patients and draws of labels vary, the
tasks stay. `over_tasks` asks for tasks like these (`comparisons.compare_over_tasks`) and is wider. Tasks are drawn
independently of each other, although two tasks on one source share patients: intervals over such tasks are somewhat too
narrow.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from panfm.board.cells import Measured, adjust_column, to_comparison
from panfm.board.summary import Cell, Comparison, Standing, Task
from panfm.measures.comparisons import compare_over_tasks
from panfm.measures.draws import MIN_DRAWS, Floats
from panfm.measures.statistics import NO_INTERVAL, compute_interval


def rank(
    names: Sequence[str], measured: Mapping[tuple[str, str], Measured], tasks: Sequence[Task]
) -> dict[str, Standing]:
    """Rank E > 1 encoders that have all of T > 0 tasks; measured: by encoder and task."""
    points = np.array([[normalise(measured[name, task.name].values.mean(), task) for task in tasks] for name in names])
    replicates = np.array([[normalise(measured[name, task.name].spread, task) for task in tasks] for name in names])
    reason = _explain(tasks)
    num_groups = min(task.num_test_groups for task in tasks)
    if any(task.metric in NO_INTERVAL for task in tasks):
        replicates = np.full_like(replicates, np.nan)
    score_replicates = replicates.mean(axis=1)  # [E, R]
    defined = ~np.isnan(score_replicates).any(axis=0)
    borda = compute_borda(points)
    rank_replicates = rankdata(-compute_borda(replicates[:, :, defined]), method="min", axis=0)  # [E, R']
    standings = {}
    for place, name in enumerate(names):
        interval = compute_interval(score_replicates[place], num_groups)
        gaps = [compute_interval(other - score_replicates[place], num_groups) for other in score_replicates]
        low = high = None
        if interval.low is not None:
            low, high = np.percentile(rank_replicates[place], [2.5, 97.5], method="inverted_cdf").astype(int).tolist()
        standings[name] = Standing(
            rank=1 + sum(gap.low is not None and gap.low > 0 for gap in gaps),
            rank_low=low,
            rank_high=high,
            borda=float(borda[place]),
            score=float(points[place].mean()),
            score_low=interval.low,
            score_high=None if interval.high is None else min(1.0, interval.high),
            reason=reason or interval.reason,
        )
    return standings


def compare_with_reference(
    names: Sequence[str],
    reference: str,
    measured: Mapping[tuple[str, str], Measured],
    tasks: Sequence[Task],
    seed: int,
) -> dict[str, Comparison | None]:
    """Compare encoders with the reference by their mean difference over tasks like these; Holm over the encoders.

    All of them and the reference have all of the tasks.
    """
    column: list[Comparison | None] = []
    for name in names:
        pairs = [(measured[name, task.name], measured[reference, task.name], task) for task in tasks]
        differences = [_scale(ours.values.mean() - theirs.values.mean(), task) for ours, theirs, task in pairs]
        replicates = [_scale(ours.spread - theirs.spread, task) for ours, theirs, task in pairs]
        with_draws = all(min(len(ours.values), len(theirs.values)) >= MIN_DRAWS for ours, theirs, _ in pairs)
        found = compare_over_tasks(np.array(differences), np.array(replicates), seed=seed)
        column.append(to_comparison(found, with_draws))
    return dict(zip(names, adjust_column(column), strict=True))


def compute_borda(scores: Floats) -> Floats:
    """Compute the share of other encoders that each beats (ties count half), averaged over tasks.

    scores: [E, T] or [E, T, R], higher is better; returns [E] or [E, R].
    """
    beaten = rankdata(scores, method="average", axis=0) - 1
    # Summed before it is divided: halves add without rounding, so that equal shares are equal numbers and tie.
    return np.asarray(beaten.sum(axis=1) / (max(1, len(scores) - 1) * scores.shape[1]))


def list_counted(tasks: Sequence[Task], rows: Sequence[Sequence[Cell]], synthetic: bool) -> list[int]:
    """List the places of the tasks that count in mean and rank; rows: every encoder's cells of the section.

    A metric that this test set leaves undefined is so for every encoder, and one that a guess has at its best tells
    nothing: the task then counts for none. Nor does one of which there are self-reported values alone.
    """
    return [
        place
        for place, task in enumerate(tasks)
        if (task.claim or synthetic)
        and task.chance != task.perfect
        and any(cells[place].value is not None and cells[place].origin != "self_reported" for cells in rows)
    ]


def normalise(value: Floats, task: Task) -> Floats:
    """Rescale values of a task: 0 what is common in its test set, 1 perfect."""
    return _scale(value - task.chance, task)


def _scale(difference: Floats, task: Task) -> Floats:
    return np.asarray(difference / (task.perfect - task.chance))


def _explain(tasks: Sequence[Task]) -> str | None:
    """Why an interval over these tasks is missing, or may not cover what it says."""
    without = [task.title for task in tasks if task.metric in NO_INTERVAL]
    if without:
        return f"no interval: the metric of {', '.join(without)} has none"
    few = sum(task.few_groups for task in tasks)
    if few:
        return f"interval outside its declared regime: {few} of {len(tasks)} tasks have few groups in the rarer class"
    return None
