"""The board's numbers: Result files and their predictions in, values, intervals, differences and ranks out.

    results --verify hashes, recompute--> primary metric of each draw under shared bootstrap weights [R]
            --mean over draws and seeds--> a cell: encoder x task, with interval and paired difference to the reference
            --mean over tasks--> Borda share, normalised score, rank with interval

One section is one (real or synthetic, protocol, variant, label_fraction): nothing is ranked across sections. Replicates
are shared within a task, so every difference is paired by patient. Tasks are drawn independently of each other,
although two tasks on one source share patients: intervals of means over such tasks are somewhat too narrow. Intervals
hold the choice of test patients; the choice of labels enters by averaging its draws, whose spread is shown beside.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from panfm.errors import UserError
from panfm.evaluation.contamination_list import Audit, Seen, find_seen
from panfm.evaluation.results import EncoderCard, Result, read_results
from panfm.evaluation.tasks import TaskCard, load_task
from panfm.evaluation.verify import Run, TestSet, check_same_test_set, check_unique, read_test_set, recompute
from panfm.measures.metrics import METRICS, compute_metric
from panfm.measures.statistics import (
    FEW_GROUPS,
    NUM_REPLICATES,
    PairedDifference,
    compute_bootstrap_seed,
    compute_interval,
    count_rarer_groups,
    draw_group_weights,
)
from panfm.progress import track

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """A column: one task, measured by its primary metric."""

    name: str
    version: int
    title: str
    metric: str
    metric_title: str
    classes: tuple[str, ...]
    num_test: int
    num_test_groups: int
    num_rarer_groups: int  # groups of the class that the fewest groups have
    group_kind: str
    synthetic: bool
    claim: bool  # False: checks the pipeline, counts in no mean and no rank
    claim_note: str | None
    chance: float  # value of a predictor that knows the class shares and nothing else: normalised 0
    perfect: float  # normalised 1

    @property
    def few_groups(self) -> bool:
        """Whether the rarer class has so few groups that percentile intervals are too narrow."""
        return self.num_rarer_groups < FEW_GROUPS


@dataclass(frozen=True)
class AuditedCell:
    """What an audit says of an encoder on a task, and the value without the test images that pretraining has seen."""

    num_seen: int | None  # test images; None: the audit cannot tell, `reason` says why
    num_test: int
    value: float | None  # the primary metric of the others, mean over draws and seeds
    reason: str | None
    choice: str | None  # "excluded": pretraining left out what the audit lists; "flagged": it did not


@dataclass(frozen=True)
class Cell:
    """An encoder on a task: mean over draws and seeds with its 95 % interval; null with a reason."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None
    num_runs: int  # draws x seeds
    spread: float | None  # standard deviation between them
    num_train_groups: int | None  # labelled groups, the median over draws
    contamination: str
    difference: PairedDifference | None  # to the section's reference encoder, on the same patients
    predictions_sha256: tuple[str, ...]
    audit: AuditedCell | None = None  # None: the board was built without an audit


@dataclass(frozen=True)
class Standing:
    """Where an encoder stands among those that have every task of the section."""

    rank: int  # 1 + number of encoders whose mean normalised score is surely higher
    rank_low: int | None  # 95 % interval of the Borda rank
    rank_high: int | None
    borda: float  # share of the other encoders that it beats, averaged over tasks
    score: float  # mean normalised score
    score_low: float | None
    score_high: float | None


@dataclass(frozen=True)
class Row:
    """An encoder in a section."""

    encoder: EncoderCard
    cells: tuple[Cell, ...]  # in the order of the section's tasks
    standing: Standing | None
    reason: str | None  # why it has no standing


@dataclass(frozen=True)
class Section:
    """One ranked table."""

    synthetic: bool
    protocol: str
    variant: str
    label_fraction: float
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    reference: str | None  # name of the encoder that the others are compared with

    @property
    def slug(self) -> str:
        """A name for anchors and files, unique on the board."""
        kind = "synthetic" if self.synthetic else "real"
        return f"{kind}-{self.protocol}-{self.variant}-f{self.label_fraction:g}".replace(".", "_")


@dataclass(frozen=True)
class DevelopmentRow:
    """A mean over development folds: shown apart, never ranked."""

    encoder: str
    task: str
    protocol: str
    variant: str
    label_fraction: float
    metric: str
    value: float | None
    num_runs: int


@dataclass(frozen=True)
class LeaderboardSummary:
    """All that the board shows."""

    sections: tuple[Section, ...]
    development: tuple[DevelopmentRow, ...]
    encoders: tuple[str, ...]  # all names, sorted: an encoder keeps its colour on the whole page
    num_results: int
    audit: str | None = None  # SHA-256 of the audit.json that the cells were held against


def compute_standings(roots: Sequence[Path], audit: Audit | None = None) -> LeaderboardSummary:
    """Compute the board from the Result files below `roots`; with an audit, every cell says what was seen before.

    Raises UserError for predictions that are missing or not those of their Result, for a metric that does not follow
    from them, for a Result that is there twice, for one name on two encoders, and for a task measured on two test sets.
    """
    found = read_results(roots)
    check_unique(found)
    by_task: dict[str, list[tuple[Path, Result]]] = defaultdict(list)
    for path, result in found:
        if result.evaluated_on == "test":
            by_task[result.task].append((path, result))
    tasks: dict[str, Task] = {}
    runs: dict[tuple[bool, str, str, float], dict[tuple[str, str], list[Run]]] = defaultdict(lambda: defaultdict(list))
    num_groups: dict[str, int] = {}
    seen: dict[tuple[str, str], Seen] = {}
    audited: dict[tuple[bool, str, str, float], dict[tuple[str, str], list[AuditedCell]]] = defaultdict(
        lambda: defaultdict(list)
    )
    with_progress = track(sorted(by_task.items()), "leaderboard: bootstrap", unit="tasks")
    for name, items in with_progress:
        first = read_test_set(*items[0])
        weights = draw_group_weights(
            first.groups, NUM_REPLICATES, compute_bootstrap_seed(name, first.result.split_hash)
        )
        tasks[name] = _describe_task(first)
        num_groups[name] = len(np.unique(first.groups))
        for path, result in items:
            test_set = first if path == first.path else read_test_set(path, result)
            check_same_test_set(first, test_set)
            section = (result.synthetic, result.protocol, result.variant, result.label_fraction)
            runs[section][result.encoder.name, name].append(recompute(test_set, weights))
            if audit is not None:
                place = result.encoder.name, name
                if place not in seen:
                    seen[place] = find_seen(audit, result.encoder, name, result.data_hash)
                audited[section][place].append(_measure_unseen(test_set, seen[place]))
    sections = tuple(
        _build_section(
            *key, tasks, runs[key], num_groups, {at: _average_audited(found) for at, found in audited[key].items()}
        )
        for key in sorted(runs, key=_order_sections)
    )
    encoders = tuple(sorted({result.encoder.name for _, result in found}))
    development = _list_development(found)
    return LeaderboardSummary(sections, development, encoders, len(found), None if audit is None else audit.hash)


def _measure_unseen(test_set: TestSet, seen: Seen) -> AuditedCell:
    """Recompute one Result's primary metric without the images that its encoder has seen."""
    num_test = test_set.result.num_test
    if seen.keys is None:
        return AuditedCell(None, num_test, None, seen.reason, seen.choice)
    kept = ~np.isin(test_set.keys, sorted(seen.keys))
    num_seen = len(np.unique(test_set.keys[~kept]))
    if not kept.any():
        return AuditedCell(num_seen, num_test, None, "every test image was seen", seen.choice)
    point = compute_metric(test_set.result.primary_metric, test_set.labels[kept], test_set.scores[kept])
    return AuditedCell(num_seen, num_test, point.value, point.reason, seen.choice)


def _average_audited(found: Sequence[AuditedCell]) -> AuditedCell:
    """One cell of all draws and seeds: they have the same test images and the same encoder."""
    values = [cell.value for cell in found if cell.value is not None]
    undefined = next((cell.reason for cell in found if cell.value is None), None)
    return replace(found[0], value=float(np.mean(values)) if undefined is None else None, reason=undefined)


def _order_sections(key: tuple[bool, str, str, float]) -> tuple[bool, int, str, str, float]:
    synthetic, protocol, variant, fraction = key
    return synthetic, 0 if protocol == "linear_probe" else 1, protocol, variant, -fraction


def _describe_task(test_set: TestSet) -> Task:
    result = test_set.result
    card = _find_card(result)
    shares = np.bincount(test_set.labels, minlength=len(result.classes)) / max(1, len(test_set.labels))
    chance, perfect = compute_chance(result.primary_metric, shares)
    return Task(
        name=result.task,
        version=result.task_version,
        title=card.title if card else result.task,
        metric=result.primary_metric,
        metric_title=METRICS[result.primary_metric].title,
        classes=result.classes,
        num_test=result.num_test,
        num_test_groups=result.num_test_groups,
        num_rarer_groups=count_rarer_groups(test_set.labels, test_set.groups),
        group_kind=result.group_kind,
        synthetic=result.synthetic,
        claim=card.claim if card else True,
        claim_note=card.claim_note if card else None,
        chance=chance,
        perfect=perfect,
    )


def _find_card(result: Result) -> TaskCard | None:
    try:
        card = load_task(result.task)
    except UserError:  # a task of the user's own folder: the Result says all that is needed
        return None
    return card if card.version == result.task_version else None


def compute_chance(metric: str, shares: Floats) -> tuple[float, float]:
    """Return a metric's value for a predictor that knows only the test set's class shares [K], and the best value."""
    K = len(shares)
    largest = float(shares.max())
    majority_f1 = 2 * largest / (1 + largest)
    squares = float((shares**2).sum())
    chance = {
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
    return chance, 1.0 if METRICS[metric].direction == "higher" else 0.0


def _build_section(
    synthetic: bool,
    protocol: str,
    variant: str,
    label_fraction: float,
    all_tasks: Mapping[str, Task],
    runs: Mapping[tuple[str, str], list[Run]],
    num_groups: Mapping[str, int],
    audited: Mapping[tuple[str, str], AuditedCell],
) -> Section:
    encoders = sorted({encoder for encoder, _ in runs})
    tasks = tuple(all_tasks[name] for name in sorted({task for _, task in runs}))
    cards = {encoder: group[0].result.encoder for (encoder, _), group in sorted(runs.items())}
    reference = _choose_reference(cards)
    cells: dict[str, tuple[Cell, ...]] = {}
    for encoder in encoders:
        row = []
        for task in tasks:
            theirs = runs.get((reference, task.name)) if reference is not None and encoder != reference else None
            cell = _build_cell(runs.get((encoder, task.name)), theirs, num_groups[task.name])
            row.append(replace(cell, audit=audited.get((encoder, task.name))))
        cells[encoder] = tuple(row)
    # A metric that this test set leaves undefined is so for every encoder: the task then counts for none.
    counted = [
        place
        for place, task in enumerate(tasks)
        if (task.claim or synthetic) and any(row[place].value is not None for row in cells.values())
    ]
    complete = [name for name in encoders if all(cells[name][place].value is not None for place in counted)]
    standings: dict[str, Standing] = {}
    if counted and len(complete) > 1:
        points = [[_normalise(_known(cells[name][p].value), tasks[p]) for p in counted] for name in complete]
        replicates = [[_normalise(_average(runs[name, tasks[p].name]), tasks[p]) for p in counted] for name in complete]
        smallest = min(num_groups[tasks[p].name] for p in counted)
        standings = _rank(complete, np.array(points), np.array(replicates), smallest)
    rows = []
    for name in encoders:
        missing = [tasks[p].title for p in counted if cells[name][p].value is None]
        reason = None
        if not counted:
            reason = "no task here supports a claim about encoders"
        elif missing:
            reason = f"missing: {', '.join(missing)}"
        elif name not in standings:
            reason = "no other encoder has all tasks"
        rows.append(Row(cards[name], cells[name], standings.get(name), reason))
    rows.sort(key=_order_rows)
    return Section(synthetic, protocol, variant, label_fraction, tasks, tuple(rows), reference)


def _order_rows(row: Row) -> tuple[int, float, float, str]:
    if row.standing is None:
        return 10**9, 0.0, 0.0, row.encoder.name
    return row.standing.rank, -row.standing.borda, -row.standing.score, row.encoder.name


def _choose_reference(cards: Mapping[str, EncoderCard]) -> str | None:
    """The encoder at random weights if there is one, else the first by name; none where there is nothing to compare."""
    if len(cards) < 2:
        return None
    random = sorted(name for name, card in cards.items() if "@random:" in card.address)
    return random[0] if random else min(cards)


def _build_cell(ours: Sequence[Run] | None, reference: Sequence[Run] | None, num_groups: int) -> Cell:
    if not ours:
        return Cell(None, None, None, "not evaluated", 0, None, None, "unknown", None, ())
    results = [run.result for run in ours]
    labelled = int(np.median([result.num_train_groups for result in results]))
    contamination = results[0].encoder.contamination
    hashes = tuple(sorted(result.predictions_sha256 for result in results))
    values = [run.value for run in ours if run.value is not None]
    if len(values) < len(ours):
        reason = next(run.reason for run in ours if run.value is None)
        return Cell(None, None, None, reason, len(ours), None, labelled, contamination, None, hashes)
    value = float(np.mean(values))
    replicates = _average(ours)
    interval = compute_interval(replicates, num_groups)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    difference = None
    if reference and all(run.value is not None for run in reference):
        gap = compute_interval(replicates - _average(reference), num_groups)
        point = value - float(np.mean([run.value for run in reference if run.value is not None]))
        difference = PairedDifference(point, gap.low, gap.high, gap.reason, gap.num_undefined)
    return Cell(
        value,
        interval.low,
        interval.high,
        interval.reason,
        len(ours),
        spread,
        labelled,
        contamination,
        difference,
        hashes,
    )


def _average(runs: Sequence[Run]) -> Floats:
    """Mean over draws and seeds of the replicates [R]: the same patients were drawn for each."""
    return np.asarray(np.mean([run.replicates for run in runs], axis=0))


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _normalise(value: Any, task: Task) -> Any:
    return (value - task.chance) / (task.perfect - task.chance)


def _rank(names: Sequence[str], points: Floats, replicates: Floats, num_groups: int) -> dict[str, Standing]:
    """Rank E > 1 encoders by normalised scores: points [E, T], replicates [E, T, R]."""
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
            score_high=interval.high,
        )
    return standings


def compute_borda(scores: Floats) -> Floats:
    """Compute the share of other encoders that each beats (ties count half), averaged over tasks.

    scores: [E, T] or [E, T, R], higher is better; returns [E] or [E, R].
    """
    beaten = rankdata(scores, method="average", axis=0) - 1
    return np.asarray((beaten / max(1, len(scores) - 1)).mean(axis=1))


def _list_development(found: Sequence[tuple[Path, Result]]) -> tuple[DevelopmentRow, ...]:
    grouped: dict[tuple[str, str, str, float, str], list[Result]] = defaultdict(list)
    for _, result in found:
        if result.evaluated_on == "development":
            key = (result.task, result.protocol, result.variant, result.label_fraction, result.encoder.name)
            grouped[key].append(result)
    rows = []
    for (task, protocol, variant, fraction, encoder), results in sorted(grouped.items()):
        metric = results[0].primary_metric
        values = [result.metrics[metric].value for result in results]
        known = [value for value in values if value is not None]
        mean = float(np.mean(known)) if len(known) == len(values) else None
        rows.append(DevelopmentRow(encoder, task, protocol, variant, fraction, metric, mean, len(results)))
    return tuple(rows)
