"""Task cards: a benchmark task as one YAML file on one screen, and the rows of a shard set that belong to it.

    evaluation/tasks/<name>.yaml -> TaskCard ;  TaskCard + ShardSet -> TaskRows (which rows, which group, which class)

A card names the source, the label, the classes in order, the unit that no split may cut (patient, lesion, slide), the
split, the metrics and what may be claimed from it. No code: a file in a user's own folder is a task. Needs no torch.
"""

from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from panfm.config import read_yaml, validate
from panfm.errors import UserError
from panfm.files import find_resource, list_resources
from panfm.measures.metrics import METRICS
from panfm.shards.index import ShardSet
from panfm.shards.schema import Modality

TASK_FOLDER = "evaluation/tasks"
Group = Literal["patient", "lesion", "slide", "unknown"]
Fold = Literal["train", "val", "test"]
FOLDS: tuple[Fold, ...] = ("train", "val", "test")
# A group of a coarser kind is never cut by a split of a finer one: rows grouped by patient satisfy `group: lesion`.
COARSENESS = {"sample": 0, "unknown": 0, "slide": 1, "lesion": 2, "patient": 3}
Subgroup = Literal["sex", "age", "phototype", "anatomic_site", "institution", "device", "modality", "confirmed_by"]


class CommittedSplit(BaseModel):
    """The folds lie in evaluation/splits/<task>.parquet (or beside the card): everybody's numbers compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["committed"]


class OfficialSplit(BaseModel):
    """The folds are the source's own: which values of Sample.official_split make each of ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["official"]
    train: tuple[str, ...] = Field(min_length=1)
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_disjoint(self) -> "OfficialSplit":
        values = Counter([*self.train, *self.val, *self.test])
        twice = sorted(value for value, count in values.items() if count > 1)
        if twice:
            raise ValueError(f"official split value {twice[0]!r} is listed twice; a value belongs to one fold")
        return self


class RuleSplit(BaseModel):
    """The folds are a pure hash of (seed, group): a group keeps its fold however the archive grows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rule"]
    seed: int = 0
    test_share: float = Field(default=0.25, gt=0, lt=1)
    val_share: float = Field(default=0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_shares(self) -> "RuleSplit":
        if self.test_share + self.val_share >= 1:
            raise ValueError(f"test_share + val_share is {self.test_share + self.val_share:g}; leave some for training")
        return self


class TaskCard(BaseModel):
    """One benchmark task. `version` grows whenever the same name would give other numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(ge=1)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    title: str
    source: str
    modality: Modality | None = None  # only rows of this modality; null = all
    family: Literal["classification"] = "classification"
    label: str  # name in Sample.labels
    classes: tuple[str, ...] = Field(min_length=2)  # order of the scores; binary: negative, then positive
    merge: dict[str, tuple[str, ...]] | None = None  # class -> the label values that make it; null = value is class
    ignore: tuple[str, ...] = ()  # label values that are left out on purpose
    group: Group  # the unit that no split and no label fraction may cut
    split: Annotated[CommittedSplit | OfficialSplit | RuleSplit, Field(discriminator="kind")]
    metrics: tuple[str, ...] = Field(min_length=1)
    primary_metric: str
    subgroups: tuple[Subgroup, ...] = ()
    claim: bool = True  # False: checks the pipeline, supports no claim about an encoder
    claim_note: str | None = None  # why not
    access: Literal["open", "request", "private"] = "open"
    licence: str
    citation: str
    published: tuple[str, ...] = ()  # names in evaluation/published
    synthetic: bool = False

    @model_validator(mode="after")
    def _check(self) -> "TaskCard":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {list(self.classes)}: a class is named twice")
        if self.merge is not None and set(self.merge) != set(self.classes):
            raise ValueError(f"merge has the classes {sorted(self.merge)}; it must have those of `classes`")
        values = Counter([*(value for group in self.get_values().values() for value in group), *self.ignore])
        twice = sorted(value for value, count in values.items() if count > 1)
        if twice:
            raise ValueError(f"label value {twice[0]!r} is assigned twice; it makes one class or is ignored")
        for metric in self.metrics:
            if metric not in METRICS:
                near = get_close_matches(metric, METRICS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}"
                raise ValueError(f"unknown metric {metric!r}; {hint}")
            if METRICS[metric].binary_only and len(self.classes) != 2:
                raise ValueError(f"metric {metric!r} is defined for two classes; this task has {len(self.classes)}")
        if self.primary_metric not in self.metrics:
            raise ValueError(f"primary_metric {self.primary_metric!r} must be one of metrics {list(self.metrics)}")
        if not self.claim and not self.claim_note:
            raise ValueError("claim is false without a claim_note; say why nothing may be claimed from this task")
        return self

    def get_values(self) -> dict[str, tuple[str, ...]]:
        """Return which label values make each class, in the order of classes."""
        if self.merge is None:
            return {name: (name,) for name in self.classes}
        return {name: self.merge[name] for name in self.classes}


@dataclass(frozen=True)
class TaskRows:
    """The labelled rows of a task in a shard set, in the order of the shard set.

    rows: int64 [N], row numbers in the shard set's table. keys, groups: [N] text. labels: int64 [N], place in classes.
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


def list_tasks(task_dir: str | Path | None = None) -> dict[str, Path]:
    """List the known task cards by name: the shipped ones, and those of `task_dir`, which win."""
    tasks = list_resources(TASK_FOLDER)
    if task_dir is not None:
        folder = Path(task_dir)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such task folder; --task-dir names a folder of task cards (*.yaml)")
        tasks.update({path.stem: path for path in sorted(folder.glob("*.yaml"))})
    return dict(sorted(tasks.items()))


def load_task(name_or_path: str | Path, task_dir: str | Path | None = None) -> TaskCard:
    """Read a task card by name (the user's `task_dir` first, then the shipped ones) or by path.

    Raises UserError for an unknown name (with the nearest ones) and for a card that is not valid.
    """
    given = Path(name_or_path)
    known = list_tasks(task_dir)
    if str(name_or_path) in known:
        path = known[str(name_or_path)]
    elif given.is_file():
        path = given
    elif task_dir is not None:
        near = get_close_matches(given.stem, known, n=3) or list(known)[:8]
        raise UserError(f"{name_or_path}: no such task, shipped or in {task_dir}; nearest: {', '.join(near)}")
    else:
        path = find_resource(TASK_FOLDER, given)
    card = validate(TaskCard, read_yaml(path), where=str(path))
    if card.name != path.stem:
        raise UserError(
            f"{path}: name is {card.name!r}; a task carries the name of its file, {path.stem!r}: rename one"
        )
    return card


def select_rows(card: TaskCard, shard_set: ShardSet) -> TaskRows:
    """Find the rows of `shard_set` that belong to the task, with their groups and classes.

    Raises UserError for a label value that the card does not know, rows whose groups are finer than the card promises,
    and no rows at all. Rows without the label are left out and counted.
    """
    where = f"task {card.name} on {shard_set.path}"
    if shard_set.source != card.source:
        raise UserError(f"{where}: the shards hold source {shard_set.source!r}; the task is on source {card.source!r}")
    table = shard_set.table
    values = pc.map_lookup(_combine(table.column("labels")), pa.scalar(card.label), "first")
    of_modality = np.ones(len(table), dtype=bool)
    if card.modality is not None:
        of_modality = _to_numpy(pc.equal(table.column("modality"), card.modality)).astype(bool)

    class_of_value = {value: number for number, name in enumerate(card.classes) for value in card.get_values()[name]}
    labels = np.full(len(table), -1, dtype=np.int64)
    num_unlabelled = num_ignored = 0
    unknown: Counter[str] = Counter()
    for row, value in enumerate(values.to_pylist()):
        if not of_modality[row]:
            continue
        if value is None:
            num_unlabelled += 1
        elif value in card.ignore:
            num_ignored += 1
        elif value in class_of_value:
            labels[row] = class_of_value[value]
        else:
            unknown[value] += 1
    if unknown:
        value, count = unknown.most_common(1)[0]
        raise UserError(
            f"{where}: label {card.label} has the value {value!r} ({count} images), which the task does not know; "
            f"known: {', '.join(class_of_value)}; add it to a class or to `ignore` in the card"
        )
    rows = np.flatnonzero(labels >= 0).astype(np.int64)
    if len(rows) == 0:
        modality = f" of modality {card.modality}" if card.modality else ""
        raise UserError(
            f"{where}: none of the {int(of_modality.sum())} images{modality} has the label {card.label!r}; "
            f"name another label in the card, or map it in the source card and build the shards again"
        )

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


def _combine(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _to_numpy(column: pa.ChunkedArray) -> NDArray:
    return _combine(column).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _to_text(column: pa.ChunkedArray) -> NDArray[np.str_]:
    return np.array(column.to_pylist(), dtype=np.str_)
