"""Figures that nobody here can recompute, on the board: Aggregates of one task in; its column, cells and page out.

    aggregates of a task --the same test set as the others?--> by section and encoder --> Cell with origin self_reported
    a task that has no other numbers here --> a Task that counts in no mean and no rank, and its page

Such a cell has value and interval as stated: no replicates, so no difference, no rank and no part in anybody else's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from panfm.board.packs.aggregate import Aggregate
from panfm.board.packs.images import find_shipped_card
from panfm.board.summary import Cell, Task
from panfm.board.task_pages import EncoderDetails, MetricLine, TaskPage
from panfm.errors import UserError
from panfm.measures.by_family import describe_metric

AGGREGATE_ONLY = "self-reported, aggregate only"
UNCHECKED = "self-reported: its test images were not checked"
SectionKey = tuple[bool, str, str, float]  # synthetic, protocol, variant, label_fraction
Reported = tuple[Path, Aggregate]


def sort_reported(items: Sequence[Reported]) -> dict[SectionKey, dict[str, Aggregate]]:
    """The aggregates of one task by section and encoder."""
    found: dict[SectionKey, dict[str, Aggregate]] = {}
    for _, one in items:
        key = (one.synthetic, one.protocol, one.variant, one.label_fraction)
        found.setdefault(key, {})[one.encoder.name] = one
    return found


def check_same_task(task: Task, split_hash: str, items: Sequence[Reported]) -> None:
    """Refuse aggregates of another test set, version or metric than the column that they are to stand in."""
    for path, one in items:
        ours = (one.task_version, one.family, one.split_hash, one.classes, one.primary_metric, one.synthetic)
        theirs = (task.version, task.family, split_hash, task.classes, task.metric, task.synthetic)
        names = ("task_version", "family", "split_hash", "classes", "primary_metric", "synthetic")
        for name, our, their in zip(names, ours, theirs, strict=True):
            if our != their:
                raise UserError(
                    f"{path}: {name} of task {one.task} is {our}, but {their} in the other results; a board compares "
                    "encoders on one test set, rename the task or leave it out"
                )


def describe_reported_task(items: Sequence[Reported]) -> Task:
    """A task of which the board has no predictions: its counts are rounded, and it counts in no mean and no rank."""
    first = items[0][1]
    card = find_shipped_card(first.task)
    metric = describe_metric(first.family, first.primary_metric)
    return Task(
        name=first.task,
        version=first.task_version,
        family=first.family,
        title=first.title,
        metric=first.primary_metric,
        metric_title=metric.title,
        metric_description=metric.description,
        direction=metric.direction,
        classes=first.classes,
        unit=first.unit,
        num_test=first.num_test,
        num_test_groups=first.num_test_groups,
        num_rarer_groups=first.num_rarer_groups,
        which_groups=first.which_groups,
        group_kind=first.group_kind,
        synthetic=first.synthetic,
        modality=card.modality if card else None,
        licence=card.licence if card else None,
        access=card.access if card else None,
        claim=False,
        claim_note="Its numbers are self-reported, aggregate only: nobody else recomputed them. Counts are rounded.",
        chance=0.0,  # alike: what a guess reaches depends on shares of classes that stayed at home
        perfect=0.0,
    )


def build_reported_page(task: Task, items: Sequence[Reported]) -> TaskPage:
    """The page of such a task: the metrics that were stated in the section of most labels, nothing else."""
    by_section = sort_reported(items)
    key = max(by_section, key=lambda one: (one[1] == "linear_probe", one[3], one[1], one[2]))
    _, protocol, variant, label_fraction = key
    return TaskPage(
        task=task,
        protocol=protocol,
        variant=variant,
        label_fraction=label_fraction,
        encoders=tuple(
            EncoderDetails(name, _list_metrics(one), (), None, None, (), None, {}, {}, None)
            for name, one in sorted(by_section[key].items())
        ),
        positive=None,
        prevalence=None,
        notes=(f"{AGGREGATE_ONLY}: as stated by who measured it; counts are rounded down",),
        licence=task.licence,
        citation=None,
        caution=None,
    )


def build_reported_cell(aggregate: Aggregate) -> Cell:
    """The cell of an aggregate: value and interval as stated, and nothing that needs replicates."""
    stated = aggregate.metrics[aggregate.primary_metric]
    return Cell(
        value=stated.value,
        low=stated.low,
        high=stated.high,
        reason=stated.reason,
        method=stated.method,
        num_runs=aggregate.num_runs,
        spread=None,
        num_train_groups=aggregate.num_train_groups,
        contamination=aggregate.encoder.contamination,
        difference=None,
        predictions_sha256=(),
        origin="self_reported",
    )


def explain_unranked(cells: Mapping[str, Cell], counted: Sequence[Task]) -> str | None:
    """Why self-reported cells keep a row out of the ranking, None where none does.

    cells: of the row, by title of task. counted: the tasks that the ranking is over.
    """
    evaluated = [cell for cell in cells.values() if cell.num_runs]
    stated = [cell for cell in evaluated if cell.origin == "self_reported"]
    if stated and len(stated) == len(evaluated):
        return AGGREGATE_ONLY if not any(cell.predictions_sha256 for cell in stated) else UNCHECKED
    titles = [task.title for task in counted if cells[task.title].origin == "self_reported"]
    return f"self-reported: {', '.join(titles)}" if titles else None


def _list_metrics(aggregate: Aggregate) -> tuple[MetricLine, ...]:
    lines = []
    for name, value in aggregate.metrics.items():
        described = describe_metric(aggregate.family, name)
        lines.append(MetricLine(name, described.title, described.description, value))
    return tuple(lines)
