"""The rows of a shard set that belong to a task: which rows, which group, which class.

    TaskCard + ShardSet -> TaskRows -> splits.load_split (which fold)

A label value that the card does not know, groups that are finer than it promises and no row at all are errors; rows
without the label (mask, number, event) are counted. Needs no torch.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.evaluation.families import OutOfDistributionTarget, find_rows
from panfm.evaluation.tasks import TaskCard
from panfm.shards.index import ShardSet

# A group of a coarser kind is never cut by a split of a finer one: rows grouped by patient satisfy `group: lesion`.
COARSENESS = {"sample": 0, "unknown": 0, "slide": 1, "lesion": 2, "patient": 3}


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task in a shard set that have what it asks for, in the order of the shard set.

    rows: int64 [N], row numbers in the shard set's table. keys, groups: [N] text. labels: int64 [N], place in the
    card's `class_names`.
    group_kind: the finest kind of group among the rows ("sample" = groups unknown).
    num_unlabelled, num_ignored: rows of the modality that carry no such label, or a value that the card ignores.
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.str_]
    groups: NDArray[np.str_]
    labels: NDArray[np.int64]
    group_kind: str
    num_unlabelled: int
    num_ignored: int


def find_classes(card: TaskCard, shard_set: ShardSet) -> TaskCard:
    """Return the card with its classes named: where it only counts them, they are the label's values, by alphabet.

    Raises UserError where the shards hold another number of values: scores of other classes do not compare.
    """
    if card.num_classes is None:
        return card
    _check_source(card, shard_set)
    values = _read_labels(card, shard_set)
    found = tuple(sorted({value for value in values if value is not None} - set(card.ignore)))
    if found and len(found) != card.num_classes:
        raise UserError(
            f"task {card.name} on {shard_set.path}: label {card.label} has {len(found)} values "
            f"({', '.join(found[:3])}, ...), the task has {card.num_classes} classes (num_classes); build the shards "
            f"from the whole source, or name others in `ignore`"
        )
    return card.model_copy(update={"classes": found, "num_classes": None})


def can_run(card: TaskCard, shard_set: ShardSet) -> bool:
    """Whether the shards hold the task: its source, and images with its label (or mask, number, event)."""
    try:
        select_rows(card, shard_set)
    except UserError:
        return False
    return True


def select_rows(card: TaskCard, shard_set: ShardSet) -> TaskRows:
    """Find the rows of `shard_set` that belong to the task, with their groups and classes.

    Raises UserError for a label value that the card does not know, rows whose groups are finer than the card promises,
    and no rows at all. Rows without the label (mask, number, event) are left out and counted.
    """
    card = find_classes(card, shard_set)
    where = f"task {card.name} on {shard_set.path}"
    _check_source(card, shard_set)
    table = shard_set.table
    of_modality = _find_modality(card, table)
    if card.label is None:
        there = find_rows(card.target, table)
        labels = np.where(of_modality & there, 0, -1).astype(np.int64)
        num_unlabelled, num_ignored = int((of_modality & ~there).sum()), 0
    else:
        labels, num_unlabelled, num_ignored = _read_classes(card, shard_set, where)
    rows = np.flatnonzero(labels >= 0).astype(np.int64)
    if len(rows) == 0:
        modality = f" of modality {card.modality}" if card.modality else ""
        way_out = (
            f"the card needs {card.needs}"
            if card.needs
            else ("name another label in the card, or map it in the source card and build the shards again")
        )
        what = f"the label {card.label!r}" if card.label is not None else card.target_words
        raise UserError(f"{where}: none of the {int(of_modality.sum())} images{modality} has {what}; {way_out}")

    taken = table.select(["key", "group_id", "group_kind"]).take(pa.array(rows))
    kinds: Counter[str] = Counter(taken.column("group_kind").to_pylist())
    finest = min(kinds, key=COARSENESS.__getitem__)
    if COARSENESS[finest] < COARSENESS[card.group]:
        way_out = "unknown" if finest == "sample" else finest
        raise UserError(
            f"{where}: group is {card.group!r}, but {kinds[finest]} of {len(rows)} images are known by {finest} only; "
            f"map the {card.group} id in the source card, or set group: {way_out} (the board shows it)"
        )
    return TaskRows(
        rows=rows,
        keys=_to_text(taken.column("key")),
        groups=_to_text(taken.column("group_id")),
        labels=labels[rows],
        group_kind=finest,
        num_unlabelled=num_unlabelled,
        num_ignored=num_ignored,
    )


def _check_source(card: TaskCard, shard_set: ShardSet) -> None:
    if shard_set.source != card.source:
        raise UserError(
            f"task {card.name} on {shard_set.path}: the shards hold source {shard_set.source!r}; the task is on source "
            f"{card.source!r}"
        )


def _find_modality(card: TaskCard, table: pa.Table) -> NDArray[np.bool_]:
    if card.modality is None:
        return np.ones(len(table), dtype=bool)
    return _to_numpy(pc.equal(table.column("modality"), card.modality)).astype(bool)


def _read_labels(card: TaskCard, shard_set: ShardSet) -> list[str | None]:
    """The label of each row [N]; None where it has none, or is of another modality."""
    values = pc.map_lookup(_combine(shard_set.table.column("labels")), pa.scalar(card.label), "first").to_pylist()
    return [
        value if wanted else None for value, wanted in zip(values, _find_modality(card, shard_set.table), strict=True)
    ]


def _read_classes(card: TaskCard, shard_set: ShardSet, where: str) -> tuple[NDArray[np.int64], int, int]:
    """The class of each row [N] (-1: none), the number of rows without the label, and of those ignored."""
    class_of_value = {value: number for number, name in enumerate(card.classes) for value in card.get_values()[name]}
    if isinstance(card.target, OutOfDistributionTarget):
        class_of_value |= dict.fromkeys(card.target.unknown, len(card.classes))
    rest = card.classes.index(card.others) if card.others in card.classes else None
    values = _read_labels(card, shard_set)
    labels = np.full(len(values), -1, dtype=np.int64)
    num_ignored = 0
    unknown: Counter[str] = Counter()
    for row, value in enumerate(values):
        if value is None:
            continue
        if value in card.ignore:
            num_ignored += 1
        elif value in class_of_value:
            labels[row] = class_of_value[value]
        elif rest is not None:
            labels[row] = rest
        elif card.others == "ignore":
            num_ignored += 1
        else:
            unknown[value] += 1
    if unknown:
        value, count = unknown.most_common(1)[0]
        raise UserError(
            f"{where}: label {card.label} has the value {value!r} ({count} images), which the task does not know; "
            f"known: {', '.join(class_of_value)}; add it to a class or to `ignore` in the card"
        )
    num_unlabelled = int(_find_modality(card, shard_set.table).sum()) - sum(value is not None for value in values)
    return labels, num_unlabelled, num_ignored


def _combine(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _to_numpy(column: pa.ChunkedArray) -> NDArray:
    return _combine(column).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _to_text(column: pa.ChunkedArray) -> NDArray[np.str_]:
    return np.array(column.to_pylist(), dtype=np.str_)
