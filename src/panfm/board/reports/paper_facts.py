"""What a paper is filled from: Results and shard sets in, the board and what it leaves out.

    results --compute_standings--> Board          --read_test_set--> Table 1, planned widths, settings, versions
    shard sets --index.json, split--> what was left out on the way from the files to the folds

Counts are read where they were recorded: rejected files in index.json, images left out of a task in its Results'
`split_notes`, folds in the Results. What nobody recorded is said to be so.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from panfm.board.reports.counts import KINDS
from panfm.board.reports.document import NOT_RECORDED
from panfm.board.reports.paper_figures import Step
from panfm.board.reports.paper_tables import Characteristic, Width, describe_patients, find_measured_split, plan_widths
from panfm.board.standings import Board, compute_standings
from panfm.board.summary import Task
from panfm.board.verify import TestSet, read_test_set
from panfm.board.words import describe_units
from panfm.errors import UserError
from panfm.evaluation.contamination_list import read_audit
from panfm.evaluation.results import Result, read_results
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard, load_task
from panfm.shards.index import ShardSet, open_shard_set

REGIONS = "unreadable_region"  # the one reason in index.json that counts regions of slides, not files


@dataclass(frozen=True)
class PaperTask:
    """One test set of the paper. widths: of the encoder with the highest area; None where there is no such area."""

    task: Task
    card: TaskCard | None  # None: a task of a folder of one's own
    results: tuple[Result, ...]
    group_kind: str
    characteristics: tuple[Characteristic, ...]
    flow: tuple[Step, ...]
    folds: tuple[Step, ...]  # training and test, where the flow ends
    planned_for: str | None
    area: float | None
    widths: tuple[Width, ...]


@dataclass(frozen=True)
class PaperFacts:
    """All that the paper is written from."""

    board: Board
    results: tuple[Result, ...]
    tasks: tuple[PaperTask, ...]
    sources: Mapping[str, ShardSet]
    audited: bool

    @property
    def versions(self) -> dict[str, tuple[str, ...]]:
        """Every version that the Results name, by package."""
        found: dict[str, set[str]] = defaultdict(set)
        for result in self.results:
            for name, version in result.versions.items():
                found[name].add(version)
        return {name: tuple(sorted(versions)) for name, versions in sorted(found.items())}


def collect_paper_facts(
    roots: Sequence[Path], shards: Sequence[str | Path] = (), audit: Path | None = None, *, processes: int = 1
) -> PaperFacts:
    """Gather what a paper of these Results can say.

    Raises UserError for Results that the board refuses, and for two shard sets of one source.
    """
    sources: dict[str, ShardSet] = {}
    for path in shards:
        shard_set = open_shard_set(path)
        if shard_set.source in sources:
            raise UserError(f"{path}: source {shard_set.source} was named already; name one shard set of each")
        sources[shard_set.source] = shard_set
    board = compute_standings(roots, None if audit is None else read_audit(audit), processes=processes)
    found = [(path, result) for path, result in read_results(roots) if result.evaluated_on == "test"]
    by_task: dict[tuple[str, str], list[tuple[Path, Result]]] = defaultdict(list)
    for path, result in found:
        by_task[result.task, result.unit].append((path, result))
    tasks = {(task.name, task.unit): task for section in board.summary.sections for task in section.tasks}
    return PaperFacts(
        board=board,
        results=tuple(result for _, result in found),
        tasks=tuple(_describe_task(tasks[key], items, sources) for key, items in sorted(by_task.items())),
        sources=sources,
        audited=audit is not None,
    )


def _describe_task(task: Task, items: Sequence[tuple[Path, Result]], sources: Mapping[str, ShardSet]) -> PaperTask:
    card = _find_card(items[0][1])
    first = read_test_set(*items[0])
    split = find_measured_split(card, first, sources)
    shard_set = None if card is None else sources.get(card.source)
    planned_for: str | None = None
    area: float | None = None
    widths: tuple[Width, ...] = ()
    for test_set in _list_planned(items):
        planned = plan_widths(test_set)
        if planned is not None and (area is None or planned[0] > area):
            planned_for, area, widths = test_set.result.encoder.name, planned[0], tuple(planned[1])
    return PaperTask(
        task=task,
        card=card,
        results=tuple(result for _, result in items),
        group_kind=items[0][1].group_kind,
        characteristics=tuple(describe_patients(first, split, shard_set)),
        flow=tuple(_trace(task, card, [result for _, result in items], split, shard_set)),
        folds=_list_folds(task, [result for _, result in items]),
        planned_for=planned_for,
        area=area,
        widths=widths,
    )


def _find_card(result: Result) -> TaskCard | None:
    try:
        card = load_task(result.task)
    except UserError:  # a task of the user's own folder
        return None
    return card if card.version == result.task_version else None


def _list_planned(items: Sequence[tuple[Path, Result]]) -> list[TestSet]:
    """Of each encoder the linear probe (else its first protocol) at the most labels, its first draw."""
    best: dict[str, tuple[Path, Result]] = {}
    for path, result in items:
        old = best.get(result.encoder.name)
        if old is None or _order(result) < _order(old[1]):
            best[result.encoder.name] = path, result
    return [read_test_set(*best[name]) for name in sorted(best)]


def _order(result: Result) -> tuple[bool, str, str, float, int, int]:
    others = result.protocol != "linear_probe"
    return others, result.protocol, result.variant, -result.label_fraction, result.draw, result.seed


# ------------------------------------------------------------------------------------------------ flow


def _trace(
    task: Task, card: TaskCard | None, results: Sequence[Result], split: Split | None, shard_set: ShardSet | None
) -> list[Step]:
    """From the files of the source to the images of the task."""
    source = card.source if card is not None else "the source"
    steps = []
    if shard_set is None:
        steps.append(Step(f"Files of {source}", f"{NOT_RECORDED} here: name the shard set"))
        steps.append(Step(f"Images of {source}", f"{NOT_RECORDED} here: name the shard set", _not_named()))
    else:
        rejected = {reason: number for reason, number in shard_set.index["num_rejected"].items() if number}
        files = shard_set.num_samples + sum(number for reason, number in rejected.items() if reason != REGIONS)
        left_out = tuple((reason.replace("_", " "), f"{number:,}") for reason, number in rejected.items())
        what = "Files" if shard_set.card.slides is None else "Tiles"
        steps.append(Step(f"{what} of {source}", f"{files:,} read (what was removed on request is not counted)"))
        steps.append(Step(f"Images of {source} as shards", f"{shard_set.num_samples:,} images", left_out))
    notes = tuple(dict.fromkeys(note for result in results for note in result.settings.get("split_notes", ())))
    if split is not None:
        number = (
            f"{len(split.keys):,} images of {len(set(split.groups.tolist())):,} {KINDS.get(task.group_kind, 'groups')}"
        )
    else:
        number = f"{NOT_RECORDED} in all: see the folds"
    steps.append(Step(f"Images of the task: {task.title}", number, tuple(_split_note(note) for note in notes)))
    return steps


def _list_folds(task: Task, results: Sequence[Result]) -> tuple[Step, ...]:
    """Where the flow ends: what was labelled for training at the most labels, and the test set."""
    most = max(results, key=lambda one: (one.label_fraction, one.num_train))
    train = "nothing is trained"
    if most.label_fraction > 0:
        groups = KINDS.get(task.group_kind, "groups")
        train = f"{most.num_train:,} {task.unit}s of {most.num_train_groups:,} {groups}"
        train += f" ({most.label_fraction * 100:g} % of labels)"
    return Step("Training and validation, at the most labels", train), Step("Test", describe_units(task))


def _not_named() -> tuple[tuple[str, str], ...]:
    return (("files that could not be used", f"{NOT_RECORDED} here"),)


def _split_note(note: str) -> tuple[str, str]:
    """'3 images without the label x' -> ('without the label x', '3 images'); other notes stay whole."""
    number, _, rest = note.partition(" ")
    unit, _, what = rest.partition(" ")
    return (what, f"{number} {unit}") if number.replace(",", "").isdigit() and what else ("note", note)
