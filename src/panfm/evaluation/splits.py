"""Splits: which group of a task trains, validates or tests, and what pretraining must not see.

    TaskCard + ShardSet -> Split (one fold a row, one fold a group)
    tasks + shard sets -> test groups kept out of pretraining

A group (patient, else lesion, else slide) lies in one fold: a split that cuts a group is refused. Runs without torch.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.evaluation.task_rows import TaskRows, can_run, find_classes, select_rows
from panfm.evaluation.tasks import (
    FOLDS,
    CommittedSplit,
    NestedSplit,
    OfficialSplit,
    RuleSplit,
    TaskCard,
    list_tasks,
    load_task,
)
from panfm.files import compute_json_hash, list_resources, open_atomic
from panfm.measures.probe import make_group_folds
from panfm.shards.cards import load_card
from panfm.shards.index import Exclusion, ShardSet, compute_data_hash

SPLIT_FOLDER = "evaluation/splits"
SPLIT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("fold", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),  # the name of the class
    ],
    metadata={"panfm_split": "1"},
)


@dataclass(frozen=True)
class Split:
    """A task's rows in a shard set, each in a fold. All arrays run over the same N images, sorted by key.

    rows: int64 [N], row numbers in the shard set's table. keys, groups, folds: [N] text. labels: int64 [N], place in
    the card's class_names. hash: of (source, key, group, fold, class) of all images: equal splits, equal hashes.
    group_kind: patient, lesion, slide or sample (= groups unknown). notes: what was left out, in words, with counts.

    Where not single images are scored but what is made of several (a pair of visits, a slide, a patient; see `units`),
    the arrays run over these units instead; members: the row numbers of each unit's images, () = each is one image,
    that of `rows`. targets: float64 [N, T], what a family without classes asks for (a number; days and event); T may
    be 0.
    """

    task: str
    source: str
    rows: NDArray[np.int64]
    keys: NDArray[np.str_]
    groups: NDArray[np.str_]
    labels: NDArray[np.int64]
    folds: NDArray[np.str_]
    group_kind: str
    hash: str
    notes: tuple[str, ...]
    members: tuple[NDArray[np.int64], ...] = ()
    targets: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def find(self, *folds: str) -> NDArray[np.int64]:
        """Return the places (not row numbers) of the images in one of `folds`: int64 [n]."""
        return np.flatnonzero(np.isin(self.folds, folds)).astype(np.int64)

    def take(self, places: NDArray[np.int64], rule: str, note: str | None) -> "Split":
        """The split of some of its units, int64 [n]: `rule` enters its hash, `note` what is missing, if anything."""
        return replace(
            self,
            rows=self.rows[places],
            keys=self.keys[places],
            groups=self.groups[places],
            labels=self.labels[places],
            folds=self.folds[places],
            hash=compute_json_hash([rule, self.hash, self.keys[places].tolist()]),
            notes=self.notes if note is None else (*self.notes, note),
            members=tuple(self.members[place] for place in places) if self.members else (),
            targets=self.targets[places] if len(self.targets) else self.targets,
        )

    @property
    def strata(self) -> NDArray[np.int64]:
        """What folds and choices of labels spread evenly, [N]: the class; in survival, whether the event occurred."""
        has_event = self.targets.shape == (len(self.keys), 2)
        return self.targets[:, 1].astype(np.int64) if has_event else self.labels

    def compute_data_hash(self, shard_set: ShardSet) -> str:
        """Hash of the task's images in order of key: shards rebuilt in another order hold the same data."""
        rows = np.concatenate(self.members) if self.members else self.rows
        keys = shard_set.table.column("key").take(pa.array(rows)).to_pylist()
        sha256s = shard_set.table.column("sha256").take(pa.array(rows)).to_pylist()
        return compute_data_hash(keys, sha256s)


def load_split(card: TaskCard, shard_set: ShardSet, task_dir: str | Path | None = None) -> Split:
    """Put every labelled row of the task into a fold, as the card's `split` says.

    Raises UserError where a group lies in two folds, a fold that the task needs is empty, or a committed split does
    not fit the shards (other keys, groups or labels). Images without a fold are left out and counted in `notes`.
    """
    card = find_classes(card, shard_set)
    rows = select_rows(card, shard_set)
    notes = []
    if rows.num_unlabelled:
        notes.append(f"{rows.num_unlabelled} images without {card.target_words}")
    if rows.num_ignored:
        notes.append(f"{rows.num_ignored} images with an ignored value of {card.label}")
    if isinstance(card.split, CommittedSplit):
        folds, more = _read_committed_folds(card, rows, find_split_file(card.split_name, task_dir))
        notes += more
    elif isinstance(card.split, OfficialSplit):
        folds = _compute_official_folds(card.split, rows, shard_set)
    elif isinstance(card.split, NestedSplit):
        folds = np.full(len(rows.keys), "test", dtype="<U5")
    else:
        folds = _compute_rule_folds(card.split, rows.groups)

    unassigned = int((folds == "").sum())
    if unassigned:
        notes.append(f"{unassigned} images without a fold")
    order = np.argsort(rows.keys, kind="stable")
    order = order[folds[order] != ""]
    split = Split(
        task=card.name,
        source=card.source,
        rows=rows.rows[order],
        keys=rows.keys[order],
        groups=rows.groups[order],
        labels=rows.labels[order],
        folds=folds[order],
        group_kind=rows.group_kind,
        hash=_compute_split_hash(card, rows, folds, order),
        notes=tuple(notes),
    )
    _check_groups(card, split)
    for fold in ("test",) if isinstance(card.split, NestedSplit) else ("train", "test"):
        if len(split.find(fold)) == 0:
            raise UserError(
                f"task {card.name} on {shard_set.path}: no image in the fold {fold!r} (split: {card.split.kind}); "
                f"check the card's split against the shards, or use more images"
            )
    return split


def find_outer_folds(split: Split, nested: NestedSplit, repeat: int) -> NDArray[np.int64]:
    """The outer fold of each unit [N] in one repeat of a nested cross-validation: grouped, every class spread evenly.

    Raises UserError where a class has one group only: no fold of it can be scored by a probe that knows the class.
    """
    seed = hash_number("outer", str(nested.seed), str(repeat), split.hash) >> 1
    folds = make_group_folds(split.strata, split.groups, nested.folds, seed)
    if not folds.any():
        raise UserError(
            f"task {split.task}: a class has one {split.group_kind} only, so no fold can be held out; merge "
            f"it with another class in the card, or use more images"
        )
    return folds


def find_split_file(name: str, task_dir: str | Path | None = None) -> Path:
    """Find a committed split: in the user's `task_dir` (or its splits/), then among the shipped ones."""
    if task_dir is not None:
        for folder in (Path(task_dir), Path(task_dir) / "splits"):
            if (folder / f"{name}.parquet").is_file():
                return folder / f"{name}.parquet"
    shipped = list_resources(SPLIT_FOLDER, ".parquet")
    if name not in shipped:
        raise UserError(
            f"task {name}: split is committed, but no {name}.parquet lies in {SPLIT_FOLDER} or the task folder; "
            f"write one with panfm.evaluation.splits.write_split, or use split: {{kind: rule}} in the card"
        )
    return shipped[name]


def read_split_table(path: str | Path) -> pa.Table:
    """Read a split parquet (SPLIT_SCHEMA); a damaged or foreign file, or an unknown fold, is a UserError."""
    try:
        table = pq.read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: split cannot be read ({' '.join(str(error).split())})") from None
    if table.schema.names != SPLIT_SCHEMA.names:
        raise UserError(f"{path}: columns are {table.schema.names}; a split has {SPLIT_SCHEMA.names}")
    unknown = sorted(set(table.column("fold").to_pylist()) - set(FOLDS))
    if unknown:
        raise UserError(f"{path}: unknown fold {unknown[0]!r}; a fold is one of {', '.join(FOLDS)}")
    return table


def write_split(path: str | Path, card: TaskCard, split: Split) -> None:
    """Write a split as parquet, atomically, sorted by key: what is committed for everybody's shards.

    Only for sources with public identifiers: under a secret key nobody else's shards have these keys.
    """
    table = pa.table(
        {
            "source": [card.source] * len(split.keys),
            "key": split.keys.tolist(),
            "group": split.groups.tolist(),
            "fold": split.folds.tolist(),
            "label": [card.class_names[label] for label in split.labels],
        },
        schema=SPLIT_SCHEMA,
    )
    with open_atomic(path) as file:
        pq.write_table(table, file, compression="zstd")


def compute_excluded(
    tasks: Literal["all", "none"] | Sequence[str],
    shard_sets: Sequence[ShardSet],
    task_dir: str | Path | None = None,
) -> Exclusion:
    """Find the groups that pretraining must not see: the test groups, and only those, of the named tasks.

    tasks: names, "all" known tasks, or "none". The answer has a set of group ids for every source among `shard_sets`.
    A patient is one patient in every source that shares its identifiers (one namespace in their cards): test groups of
    a task on photographs are also kept out of the slides, and those of an absent source out of the ones present.

    Raises UserError where a task's test groups cannot be told, for example because a committed split names none of the
    shards' keys: leaving them in silently would spoil every later number. Of "all" tasks, those that these shards
    cannot run and whose test groups only their own shards could tell are not among the answer's `tasks`: the board then
    shows an encoder's contamination by them as unknown.
    """
    excluded: dict[str, set[str]] = {shard_set.source: set() for shard_set in shard_sets}
    if tasks == "none":
        return Exclusion({source: frozenset() for source in excluded})
    if isinstance(tasks, str) and tasks != "all":
        raise UserError(f"data.exclude.tasks ({tasks!r}): it must be all, none, or a list of task names")
    groups_of = {id(shard_set): frozenset(_get_groups(shard_set)) for shard_set in shard_sets}
    names = []
    for name in list_tasks(task_dir) if tasks == "all" else tasks:
        card = load_task(name, task_dir)
        own = [shard_set for shard_set in shard_sets if shard_set.source == card.source]
        able = [shard_set for shard_set in own if can_run(card, shard_set)] if tasks == "all" else own
        names.append(name)
        if own:
            namespace = own[0].card.namespace
            test: set[str] = set()
            for shard_set in able:
                split = load_split(card, shard_set, task_dir)
                test.update(split.groups[split.find("test")].tolist())
        else:
            try:
                namespace = load_card(card.source).namespace
            except UserError:  # a task of somebody whose source card is not here: no shard set can share its patients
                continue
            test = set()
        for shard_set in shard_sets:
            if shard_set.card.namespace != namespace:
                continue
            groups = groups_of[id(shard_set)]
            try:
                found = test if able else _find_absent_test_groups(card, groups, task_dir)
            except UserError:
                if tasks != "all":
                    raise
                names = [other for other in names if other != name]
                break
            excluded[shard_set.source] |= groups & found
    return Exclusion({source: frozenset(groups) for source, groups in excluded.items()}, tuple(names))


def _find_absent_test_groups(card: TaskCard, groups: frozenset[str], task_dir: str | Path | None) -> set[str]:
    """Which of `groups` test in a task whose own shards are not at hand but whose patients these are."""
    if isinstance(card.split, CommittedSplit):
        table = read_split_table(find_split_file(card.split_name, task_dir))
        pairs = zip(table.column("group").to_pylist(), table.column("fold").to_pylist(), strict=True)
        return {group for group, fold in pairs if fold == "test"}
    if isinstance(card.split, RuleSplit):
        names = np.array(sorted(groups), dtype=np.str_)
        return set(names[_compute_rule_folds(card.split, names) == "test"].tolist())
    raise UserError(
        f"task {card.name}: its test patients are those of source {card.source}, which shares patients with the shards "
        f"given but is not among them; add its shards, or leave the task out of data.exclude.tasks"
    )


def _get_groups(shard_set: ShardSet) -> list[str]:
    return shard_set.table.column("group_id").unique().to_pylist()  # type: ignore[no-any-return]


def hash_number(*parts: str) -> int:
    """A 64-bit number that depends on the parts alone (0 separates them; no part contains it)."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _compute_rule_folds(split: RuleSplit, groups: NDArray[np.str_]) -> NDArray[np.str_]:
    """Fold of each group: its hash in [0, 1) below test_share tests, the next val_share validates, the rest trains."""
    fold_of: dict[str, str] = {}
    for group in np.unique(groups).tolist():
        place = hash_number("split", str(split.seed), group) / 2**64
        fold_of[group] = (
            "test" if place < split.test_share else "val" if place < split.test_share + split.val_share else "train"
        )
    return np.array([fold_of[group] for group in groups.tolist()], dtype="<U5")


def _compute_official_folds(split: OfficialSplit, rows: TaskRows, shard_set: ShardSet) -> NDArray[np.str_]:
    fold_of: Mapping[str | None, str] = {
        **dict.fromkeys(split.train, "train"),
        **dict.fromkeys(split.val, "val"),
        **dict.fromkeys(split.test, "test"),
    }
    values = shard_set.table.column("official_split").take(pa.array(rows.rows)).to_pylist()
    return np.array([fold_of.get(value, "") for value in values], dtype="<U5")


def _read_committed_folds(card: TaskCard, rows: TaskRows, path: Path) -> tuple[NDArray[np.str_], list[str]]:
    """Join the committed split to the rows by key; check that groups and classes are those it was made with."""
    table = read_split_table(path).to_pydict()
    if set(table["source"]) - {card.source}:
        raise UserError(f"{path}: source is {table['source'][0]!r}; task {card.name} is on source {card.source!r}")
    committed = {
        key: (group, fold, label)
        for key, group, fold, label in zip(table["key"], table["group"], table["fold"], table["label"], strict=True)
    }
    if len(committed) != len(table["key"]):
        raise UserError(f"{path}: {len(table['key']) - len(committed)} keys stand twice; each image has one fold")
    present = set(rows.keys.tolist())
    missing = Counter(fold for key, (_, fold, _) in committed.items() if key not in present)
    if missing.total() == len(committed):
        raise UserError(
            f"task {card.name}: none of the {len(committed)} keys of {path} is among the shards' {len(present)} images "
            f"of source {card.source}; build the shards with the shipped source card (identifiers: public)"
        )
    folds = []
    for key, group, label in zip(rows.keys.tolist(), rows.groups.tolist(), rows.labels.tolist(), strict=True):
        if key not in committed:
            folds.append("")
            continue
        expected_group, fold, expected_class = committed[key]
        if group != expected_group:
            raise UserError(
                f"{path}: image {key} is of group {expected_group}, in the shards of group {group}; "
                f"build the shards with the source card that the split was made with"
            )
        if card.split_name == card.name and card.class_names[label] != expected_class:
            raise UserError(
                f"{path}: image {key} is {expected_class!r}, in the shards {card.class_names[label]!r}; "
                f"the labels or the card changed: raise the card's version and write the split again"
            )
        folds.append(fold)
    counts = ", ".join(f"{missing[fold]} {fold}" for fold in FOLDS if missing[fold])
    notes = [f"{missing.total()} of {len(committed)} images of the split are not in the shards ({counts})"]
    return np.array(folds, dtype="<U5"), notes if missing else []


def _compute_split_hash(card: TaskCard, rows: TaskRows, folds: NDArray[np.str_], order: NDArray[np.int64]) -> str:
    keys, groups, of_fold = (column[order].tolist() for column in (rows.keys, rows.groups, folds))
    classes = [card.class_names[label] for label in rows.labels[order]]
    return compute_split_hash(card.source, keys, groups, of_fold, classes)


def compute_split_hash(
    source: str, keys: Sequence[str], groups: Sequence[str], folds: Sequence[str], classes: Sequence[str]
) -> str:
    """The hash of a split: of the source and of four columns in order of key."""
    return compute_json_hash([source, keys, groups, folds, classes])


def _check_groups(card: TaskCard, split: Split) -> None:
    fold_of: dict[str, str] = {}
    for group, fold in zip(split.groups.tolist(), split.folds.tolist(), strict=True):
        if fold_of.setdefault(group, fold) != fold:
            raise UserError(
                f"task {card.name}: {split.group_kind} {group} lies in the folds {fold_of[group]} and {fold}; "
                f"a {split.group_kind} belongs to one fold: repair the split ({card.split.kind})"
            )
