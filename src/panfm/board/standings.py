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
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from panfm.board.audited import average_audited, measure_unseen
from panfm.board.cells import Measured, adjust_column, build_cell, compare, measure
from panfm.board.fairness import FairnessRow, SiteRow, list_fairness, list_left_out, read_told
from panfm.board.packs.accepted import ORIGINS, Claims, read_claims
from panfm.board.packs.aggregate import Aggregate, read_aggregates
from panfm.board.packs.images import check_images
from panfm.board.packs.reported import (
    UNCHECKED,
    Reported,
    SectionKey,
    build_reported_cell,
    build_reported_page,
    check_same_task,
    describe_reported_task,
    explain_unranked,
    sort_reported,
)
from panfm.board.printed import build_printed_rows, list_printed, read_printed
from panfm.board.ranking import compare_with_reference, list_counted, normalise, rank
from panfm.board.summary import (
    AuditedCell,
    Cell,
    Comparison,
    DevelopmentRow,
    LeaderboardSummary,
    Origin,
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
from panfm.measures.by_family import compute_chance, count_regime_groups, describe_metric
from panfm.measures.draws import Floats
from panfm.measures.statistics import (
    NUM_REPLICATES,
    compute_bootstrap_seed,
    draw_group_weights,
)

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
    origins: Mapping[tuple[SectionKey, str], Origin]  # of what was measured, by section and encoder
    reported: Mapping[SectionKey, Mapping[str, Aggregate]]

    def is_trusted(self, key: SectionKey, name: str) -> bool:
        """Whether there are predictions of an encoder here, on images that are known to be the task's."""
        return self.origins.get((key, name), "self_reported") != "self_reported"


@dataclass(frozen=True)
class _Work:
    """What there is of one task on one test set, and what is known of it where it came in packs."""

    items: list[Found] = field(default_factory=list)
    reported: list[Reported] = field(default_factory=list)
    claims: Claims = field(default_factory=lambda: Claims({}))
    audit: Audit | None = None


def compute_standings(
    roots: Sequence[Path], audit: Audit | None = None, *, task_audits: Sequence[Path] = (), processes: int = 1
) -> Board:
    """Compute the board from the Result files below `roots`; with an audit, every cell says what was seen before.

    task_audits: folders that `panfm evaluate audit` wrote. processes: tasks are worked through side by side.

    Raises UserError for predictions that are missing or not those of their Result, for a metric that does not follow
    from them, for a Result that is there twice, for one name on two encoders, and for a task measured on two test sets.
    """
    found, aggregates = read_results(roots), read_aggregates(roots)
    if not found and not aggregates:
        raise UserError(f"{', '.join(map(str, roots))}: no result files; run `panfm evaluate run` first")
    claims = read_claims(roots, found, aggregates)
    found = claims.leave_out_confirmed(found)
    everything: list[tuple[Path, Result | Aggregate]] = [*found, *aggregates]
    check_unique(everything)
    by_task: dict[tuple[str, str], _Work] = defaultdict(_Work)  # images one by one and lesions: two test sets
    for path, result in found:
        if result.evaluated_on == "test":
            by_task[result.task, result.unit].items.append((path, result))
    for path, aggregate in aggregates:
        by_task[aggregate.task, aggregate.unit].reported.append((path, aggregate))
    columns = run_tasks(
        _measure_task,
        [replace(work, claims=claims, audit=audit) for _, work in sorted(by_task.items())],
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
    encoders = tuple(sorted({one.encoder.name for _, one in everything}))
    summary = LeaderboardSummary(
        sections=tuple(sections),
        development=_list_development(found),
        encoders=encoders,
        num_results=len(everything),
        published=list_printed(printed, [column.task for column in columns]),
        audit=None if audit is None else audit.hash,
    )
    pages = tuple(column.page for column in columns)
    sites = (*list_left_out(summary, replicates), *read_told(task_audits, summary))
    return Board(summary, pages, replicates, list_fairness(pages), sites)


def _measure_task(work: _Work) -> _Column:
    """Read, check and measure all Results on one test set, the runs of one cell at a time."""
    reported = sort_reported(work.reported)
    if not work.items:
        task = describe_reported_task(work.reported)
        check_same_task(task, work.reported[0][1].split_hash, work.reported)
        page = build_reported_page(task, work.reported)
        return _Column(task, {key: {} for key in reported}, {}, page, {}, reported)
    # What is known best comes first: a fault between two files is then named in the other.
    audit, trust = work.audit, {path: ORIGINS.index(work.claims.get_origin(path)) for path, _ in work.items}
    items = sorted(work.items, key=lambda item: (-trust[item[0]], item[0]))
    first = read_test_set(*items[0])
    task = _describe_task(first)
    check_same_task(task, first.result.split_hash, work.reported)
    # Images that could not be checked before are, below, if those of another Result were: they must be the same.
    least = min(trust[first.path], ORIGINS.index("recomputed"))
    origins: dict[tuple[SectionKey, str], Origin] = {}
    seed = compute_bootstrap_seed(task.name, first.result.split_hash)
    weights = draw_group_weights(first.groups, NUM_REPLICATES, seed)
    by_cell: dict[tuple[SectionKey, str], list[Found]] = defaultdict(list)
    for path, result in items:
        by_cell[_get_section_key(result), result.encoder.name].append((path, result))
    detailed = min((key for key, _ in by_cell), key=_order_sections)
    measured: dict[SectionKey, dict[str, Measured]] = defaultdict(dict)
    audited: dict[SectionKey, dict[str, AuditedCell]] = defaultdict(dict)
    seen: dict[str, Seen] = {}
    on_page, on_page_runs = [], {}
    for (key, name), runs in sorted(by_cell.items()):
        test_sets = [first if path == first.path else read_test_set(path, result) for path, result in runs]
        for test_set in test_sets:
            check_same_test_set(first, test_set)
            if test_set.path in work.claims.checked:
                check_images(test_set.result, test_set)
        origins[key, name] = ORIGINS[max(least, min(trust[path] for path, _ in runs))]
        if name in reported.get(key, {}):
            raise UserError(
                f"{runs[0][0]}: task {task.name} of encoder {name} is there as an aggregate, too; a board takes each "
                "once, leave one of them out"
            )
        measured[key][name] = measure([recompute(test_set, weights) for test_set in test_sets], test_sets, seed)
        if key == detailed:
            on_page.append(min(test_sets, key=lambda one: (one.result.draw, one.result.seed)))
            on_page_runs[name] = [result for _, result in runs]
        if audit is not None:
            if name not in seen:
                seen[name] = find_seen(audit, runs[0][1].encoder, task.name, first.result.data_hash)
            audited[key][name] = average_audited([measure_unseen(test_set, seen[name]) for test_set in test_sets])
    card = _find_card(first.result)
    about = () if card is None else ("licence", "citation", "note", "source")
    page = build_task_page(task, {name: getattr(card, name) for name in about}, on_page, seed, on_page_runs)
    if ORIGINS[least] == "self_reported":
        page = replace(page, notes=(UNCHECKED, *page.notes))
    return _Column(task, {**{key: {} for key in reported}, **measured}, audited, page, origins, reported)


def _get_section_key(result: Result) -> SectionKey:
    return result.synthetic, result.protocol, result.variant, result.label_fraction


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
    # Whatever is compared, averaged or ranked comes from here: self-reported numbers stand beside it.
    measured = {
        (name, column.task.name): one
        for column in columns
        for name, one in column.measured[key].items()
        if column.is_trusted(key, name)
    }
    cards = {name: one.encoder for (name, _), one in sorted(measured.items())}
    reference = choose_reference(cards)
    for column in columns:
        for name, stated in column.measured[key].items():
            cards.setdefault(name, stated.encoder)
        for name, aggregate in column.reported.get(key, {}).items():
            cards.setdefault(name, aggregate.encoder)
    names = sorted(cards)
    cells = _build_cells(key, names, reference, columns, measured)
    counted = list_counted(tasks, list(cells.values()), synthetic)
    those = [tasks[place] for place in counted]
    complete = [
        name
        for name in names
        if all((name, task.name) in measured and measured[name, task.name].value is not None for task in those)
    ]
    standings = rank(complete, measured, those) if counted and len(complete) > 1 else {}
    over_tasks: Mapping[str, Comparison | None] = {}
    if reference in standings:
        section_seed = compute_bootstrap_seed("over tasks", "/".join(map(str, key)))
        others = [name for name in complete if name != reference]
        over_tasks = compare_with_reference(others, reference, measured, those, section_seed)
    rows = []
    for name in names:
        missing = [tasks[place].title for place in counted if cells[name][place].value is None]
        by_title = {task.title: cell for task, cell in zip(tasks, cells[name], strict=True)}
        stated_only = explain_unranked(by_title, those)
        reason = None
        if stated_only is not None:
            reason = f"{stated_only}; missing: {', '.join(missing)}" if missing else stated_only
        elif not counted:
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
            name = encoder.encoder.name
            one = column.measured[key].get(name) if column.is_trusted(key, name) else None
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
        by_column.append([_build_cell(column, key, name, gap) for name, gap in zip(names, differences, strict=True)])
    return {name: tuple(cells[place] for cells in by_column) for place, name in enumerate(names)}


def _build_cell(column: _Column, key: SectionKey, name: str, difference: Comparison | None) -> Cell:
    if name in column.reported.get(key, {}):
        return build_reported_cell(column.reported[key][name])
    one = column.measured[key].get(name)
    cell = replace(build_cell(one, column.task), difference=difference)
    if one is None:
        return cell
    return replace(cell, audit=column.audited.get(key, {}).get(name), origin=column.origins[key, name])


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
