"""The board's numbers: Result files and their predictions in, values, intervals, differences and ranks out.

    results --verify hashes, recompute--> primary metric of each draw under shared bootstrap weights [R]
            --cells--> encoder x task: mean over draws and seeds, interval, difference to the reference encoder
            --ranking--> Borda share, normalised score, rank with interval, difference over tasks like these

One section is one (real or synthetic, protocol, variant, label_fraction): nothing is ranked across sections. Replicates
are shared within a task, so every difference is paired by patient. A task is worked through at a time, and of each run
only what its cell needs is kept.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from panfm.board.cells import Measured, adjust_column, build_cell, compare, measure
from panfm.board.fairness import FairnessRow, SiteRow, list_fairness, list_left_out, read_told
from panfm.board.printed import build_printed_rows, list_printed, read_printed
from panfm.board.ranking import compare_with_reference, list_counted, normalise, rank
from panfm.board.summary import (
    AuditedCell,
    Cell,
    Comparison,
    DevelopmentRow,
    LeaderboardSummary,
    Row,
    Section,
    Task,
    choose_reference,
)
from panfm.board.task_pages import TaskPage, build_task_page
from panfm.board.verify import TestSet, check_same_test_set, check_unique, read_test_set, recompute
from panfm.errors import UserError
from panfm.evaluation.contamination_list import Audit, Seen, find_seen
from panfm.evaluation.results import Result, read_results
from panfm.evaluation.tasks import TaskCard, load_task
from panfm.executor import run_tasks
from panfm.measures.by_family import compute_chance, compute_point, count_regime_groups, describe_metric
from panfm.measures.draws import Floats
from panfm.measures.statistics import (
    NUM_REPLICATES,
    compute_bootstrap_seed,
    draw_group_weights,
)

SectionKey = tuple[bool, str, str, float]  # synthetic, protocol, variant, label_fraction
Found = tuple[Path, Result]
# Where a protocol has several variants, the one that measures the encoder with the least help of its own.
RANKED_VARIANTS = {
    "slides": "mean",
    "change": "difference",
    "survival": "cox",
    "case_fusion": "images",
    "leave_institution_out": "none",
}


@dataclass(frozen=True, eq=False)
class Board:
    """The board in values, a page a task, and what a ranking over any of the tasks is computed from.

    replicates: section's slug -> float64 [E, T, R], rows and tasks in the section's order, each task's value under the
    shared resamples of its patients (and draws), rescaled: 0 chance, 1 perfect; NaN where undefined or missing.
    """

    summary: LeaderboardSummary
    pages: tuple[TaskPage, ...]
    replicates: Mapping[str, Floats]
    fairness: tuple[FairnessRow, ...]
    sites: tuple[SiteRow, ...]


@dataclass(frozen=True)
class _Column:
    """One task on one test set: what each section measured on it, by encoder; and its page."""

    task: Task
    measured: Mapping[SectionKey, Mapping[str, Measured]]
    audited: Mapping[SectionKey, Mapping[str, AuditedCell]]
    page: TaskPage


def compute_standings(
    roots: Sequence[Path], audit: Audit | None = None, *, task_audits: Sequence[Path] = (), processes: int = 1
) -> Board:
    """Compute the board from the Result files below `roots`; with an audit, every cell says what was seen before.

    task_audits: folders that `panfm evaluate audit` wrote. processes: tasks are worked through side by side.

    Raises UserError for predictions that are missing or not those of their Result, for a metric that does not follow
    from them, for a Result that is there twice, for one name on two encoders, and for a task measured on two test sets.
    """
    found = read_results(roots)
    check_unique(found)
    by_task: dict[tuple[str, str], list[Found]] = defaultdict(list)  # images one by one and lesions: two test sets
    for path, result in found:
        if result.evaluated_on == "test":
            by_task[result.task, result.unit].append((path, result))
    columns = run_tasks(
        _measure_task,
        [(items, audit) for _, items in sorted(by_task.items())],
        description="leaderboard",
        processes=processes,
        unit="tasks",
    )
    keys = {key for column in columns for key in column.measured}
    printed = read_printed()
    sections, replicates = [], {}
    for key in sorted(keys, key=_order_sections):
        those = [column for column in columns if key in column.measured]
        section = _build_section(key, those)
        section = replace(section, published=build_printed_rows(printed, section))
        sections.append(section)
        replicates[section.slug] = _stack_replicates(key, section, those)
    encoders = tuple(sorted({result.encoder.name for _, result in found}))
    summary = LeaderboardSummary(
        sections=tuple(sections),
        development=_list_development(found),
        encoders=encoders,
        num_results=len(found),
        published=list_printed(printed, [column.task for column in columns]),
        audit=None if audit is None else audit.hash,
    )
    pages = tuple(column.page for column in columns)
    sites = (*list_left_out(summary, replicates), *read_told(task_audits, summary))
    return Board(summary, pages, replicates, list_fairness(pages), sites)


def _measure_task(work: tuple[Sequence[Found], Audit | None]) -> _Column:
    """Read, check and measure all Results on one test set, the runs of one cell at a time."""
    items, audit = work
    first = read_test_set(*items[0])
    task = _describe_task(first)
    seed = compute_bootstrap_seed(task.name, first.result.split_hash)
    weights = draw_group_weights(first.groups, NUM_REPLICATES, seed)
    by_cell: dict[tuple[SectionKey, str], list[Found]] = defaultdict(list)
    for path, result in items:
        by_cell[_get_section_key(result), result.encoder.name].append((path, result))
    detailed = min((key for key, _ in by_cell), key=_order_sections)
    measured: dict[SectionKey, dict[str, Measured]] = defaultdict(dict)
    audited: dict[SectionKey, dict[str, AuditedCell]] = defaultdict(dict)
    seen: dict[str, Seen] = {}
    on_page = []
    for (key, name), runs in sorted(by_cell.items()):
        test_sets = [first if path == first.path else read_test_set(path, result) for path, result in runs]
        for test_set in test_sets:
            check_same_test_set(first, test_set)
        measured[key][name] = measure([recompute(test_set, weights) for test_set in test_sets], test_sets, seed)
        if key == detailed:
            on_page.append(min(test_sets, key=lambda one: (one.result.draw, one.result.seed)))
        if audit is not None:
            if name not in seen:
                seen[name] = find_seen(audit, runs[0][1].encoder, task.name, first.result.data_hash)
            audited[key][name] = _average_audited([_measure_unseen(test_set, seen[name]) for test_set in test_sets])
    card = _find_card(first.result)
    facts = {} if card is None else {"licence": card.licence, "citation": card.citation, "note": card.note}
    return _Column(task, measured, audited, build_task_page(task, facts, on_page, seed))


def _get_section_key(result: Result) -> SectionKey:
    return result.synthetic, result.protocol, result.variant, result.label_fraction


def _measure_unseen(test_set: TestSet, seen: Seen) -> AuditedCell:
    """Recompute one Result's primary metric without the images that its encoder has seen."""
    result = test_set.result
    if seen.keys is None:
        return AuditedCell(None, result.num_test, None, seen.reason, seen.choice)
    if seen.keys and not result.unit.startswith("image"):  # their keys are no keys of images
        reason = f"the audit lists images of this task, which scores each {result.unit} as one"
        return AuditedCell(None, result.num_test, None, reason, seen.choice)
    kept = ~np.isin(test_set.keys, sorted(seen.keys))
    num_seen = int((~kept).sum())
    if not kept.any():
        return AuditedCell(num_seen, result.num_test, None, "every test image was seen", seen.choice)
    point = compute_point(result.family, result.primary_metric, test_set.outcome.take(kept))
    return AuditedCell(num_seen, result.num_test, point.value, point.reason, seen.choice)


def _average_audited(found: Sequence[AuditedCell]) -> AuditedCell:
    """One cell of all draws and seeds: they have the same test images and the same encoder."""
    values = [cell.value for cell in found if cell.value is not None]
    undefined = next((cell.reason for cell in found if cell.value is None), None)
    return replace(found[0], value=float(np.mean(values)) if undefined is None else None, reason=undefined)


def _order_sections(key: SectionKey) -> tuple[bool, bool, str, bool, str, float]:
    """The ranked protocol first, of each protocol the ranked variant."""
    synthetic, protocol, variant, fraction = key
    others = variant != RANKED_VARIANTS.get(protocol, variant)
    return synthetic, protocol != "linear_probe", protocol, others, variant, -fraction


def _describe_task(test_set: TestSet) -> Task:
    result, outcome = test_set.result, test_set.outcome
    card = _find_card(result)
    chance, perfect = compute_chance(result.family, result.primary_metric, outcome)
    metric = describe_metric(result.family, result.primary_metric)
    num_counted, which = count_regime_groups(result.family, result.primary_metric, outcome)
    return Task(
        name=result.task,
        version=result.task_version,
        family=result.family,
        title=card.title if card else result.task,
        metric=result.primary_metric,
        metric_title=metric.title,
        metric_description=metric.description,
        direction=metric.direction,
        classes=result.classes,
        unit=result.unit,
        num_test=result.num_test,
        num_test_groups=result.num_test_groups,
        num_rarer_groups=num_counted,
        which_groups=which,
        group_kind=result.group_kind,
        synthetic=result.synthetic,
        modality=card.modality if card else None,
        licence=card.licence if card else None,
        access=card.access if card else None,
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


def _build_section(key: SectionKey, columns: Sequence[_Column]) -> Section:
    synthetic, protocol, variant, label_fraction = key
    tasks = tuple(column.task for column in columns)
    measured = {(name, column.task.name): one for column in columns for name, one in column.measured[key].items()}
    names = sorted({name for name, _ in measured})
    cards = {name: one.encoder for (name, _), one in sorted(measured.items())}
    reference = choose_reference(cards)
    cells = _build_cells(key, names, reference, columns, measured)
    counted = list_counted(tasks, list(cells.values()), synthetic)
    complete = [name for name in names if all(cells[name][place].value is not None for place in counted)]
    those = [tasks[place] for place in counted]
    standings = rank(complete, measured, those) if counted and len(complete) > 1 else {}
    over_tasks: Mapping[str, Comparison | None] = {}
    if reference in standings:
        section_seed = compute_bootstrap_seed("over tasks", "/".join(map(str, key)))
        others = [name for name in complete if name != reference]
        over_tasks = compare_with_reference(others, reference, measured, those, section_seed)
    rows = []
    for name in names:
        missing = [tasks[place].title for place in counted if cells[name][place].value is None]
        reason = None
        if not counted:
            reason = "no task here supports a claim about encoders"
        elif missing:
            reason = f"missing: {', '.join(missing)}"
        elif name not in standings:
            reason = "no other encoder has all tasks"
        rows.append(Row(cards[name], cells[name], standings.get(name), reason, over_tasks.get(name)))
    rows.sort(key=_order_rows)
    return Section(synthetic, protocol, variant, label_fraction, tasks, tuple(rows), reference)


def _stack_replicates(key: SectionKey, section: Section, columns: Sequence[_Column]) -> Floats:
    stacked = np.full((len(section.rows), len(columns), NUM_REPLICATES), np.nan)
    for row, encoder in enumerate(section.rows):
        for place, column in enumerate(columns):
            one = column.measured[key].get(encoder.encoder.name)
            if one is not None and one.value is not None and column.task.chance != column.task.perfect:
                stacked[row, place] = normalise(one.spread, column.task)
    return stacked


def _build_cells(
    key: SectionKey,
    names: Sequence[str],
    reference: str | None,
    columns: Sequence[_Column],
    measured: Mapping[tuple[str, str], Measured],
) -> dict[str, tuple[Cell, ...]]:
    """All cells of a section, by encoder; differences adjusted within a task."""
    by_column: list[list[Cell]] = []
    for column in columns:
        theirs = measured.get((reference, column.task.name)) if reference is not None else None
        ours = [measured.get((name, column.task.name)) for name in names]
        differences = adjust_column(
            [
                None if one is None or theirs is None or name == reference else compare(one, theirs, column.task)
                for name, one in zip(names, ours, strict=True)
            ]
        )
        audited = column.audited.get(key, {})
        by_column.append(
            [
                replace(build_cell(one, column.task), difference=difference, audit=audited.get(name))
                for name, one, difference in zip(names, ours, differences, strict=True)
            ]
        )
    return {name: tuple(cells[place] for cells in by_column) for place, name in enumerate(names)}


def _order_rows(row: Row) -> tuple[int, float, float, str]:
    if row.standing is None:
        return 10**9, 0.0, 0.0, row.encoder.name
    return row.standing.rank, -row.standing.borda, -row.standing.score, row.encoder.name


def _list_development(found: Sequence[Found]) -> tuple[DevelopmentRow, ...]:
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
