"""`panfm tasks check`, `panfm evaluate list`: what a task would measure on the shards at hand, before it is measured.

    TaskCard + SourceCard -> faults of the card      TaskCard + ShardSet -> Split -> counts, warnings: one screen

A fault (no such label, a patient in two folds) is a UserError of one line; a warning is what would make the numbers
unsound although they can be computed. Needs no torch.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.evaluation.families import (
    ChangeTarget,
    Family,
    OutOfDistributionTarget,
    RegressionTarget,
    RetrievalTarget,
    SlidesTarget,
    SurvivalTarget,
    UglyDucklingTarget,
    list_metrics,
    read_numbers,
)
from panfm.evaluation.published import find_published
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.subgroup_columns import read_levels
from panfm.evaluation.task_rows import can_run, find_classes
from panfm.evaluation.tasks import FOLDS, TaskCard
from panfm.shards.cards import SourceCard, list_cards, load_card
from panfm.shards.index import ShardSet

WIDTH = 118
NUM_FOLDS = 5  # of the probe's inner cross-validation (LinearProbeConfig.num_folds; a test keeps them equal)
FEW_TEST_GROUPS = 10  # in the rarest class: below it an interval is as wide as the scale
MAX_CLASSES = 12  # rows of the table; more classes are summed up
MAX_LEVELS = 5  # of a subgroup, the largest first


@dataclass(frozen=True)
class TaskCheck:
    """What `check_task` found. lines: the screen. warnings: what would make the numbers unsound, one line each."""

    card: TaskCard
    split: Split | None  # null: no shards were given
    lines: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """The screen."""
        return "\n".join([*self.lines, *(_fold(f"warning: {text}") for text in self.warnings)])


def find_source_card(card: TaskCard) -> SourceCard | None:
    """The shipped source card of the task's source, or None where there is none of that name."""
    return load_card(card.source) if card.source in list_cards() else None


def find_card_faults(card: TaskCard, source: SourceCard) -> list[str]:
    """What the task asks for and the source card does not give, in words; empty: they fit."""
    faults = []
    if card.label is not None and card.label not in source.labels:
        faults.append(f"source {source.name} has no label {card.label}; it has {', '.join(source.labels) or 'none'}")
    elif card.label is not None and (known := source.labels[card.label].known_values) is not None:
        unknown = card.target.unknown if isinstance(card.target, OutOfDistributionTarget) else ()
        asked = [*(value for values in card.get_values().values() for value in values), *card.ignore, *unknown]
        if strange := sorted(set(asked) - known):
            faults.append(f"label {card.label} of source {source.name} never is {', '.join(strange)}")
        if not card.num_classes and card.others == "error" and (left := sorted(known - set(asked))):
            faults.append(f"label {card.label} of source {source.name} also is {', '.join(left)}, which no class takes")
        if card.num_classes and len(known - set(card.ignore)) != card.num_classes:
            faults.append(f"label {card.label} of source {source.name} has {len(known)} values, not {card.num_classes}")
    if card.family == "segmentation" and source.slides is None:
        named = any(entry.mask for entry in source.image_entries.values())
        if not named:
            faults.append(f"source {source.name} names no masks")
    if card.synthetic != source.synthetic:
        faults.append(f"synthetic is {card.synthetic} in the task and {source.synthetic} in source {source.name}")
    return faults


def check_task(card: TaskCard, shard_sets: Sequence[ShardSet] = (), task_dir: str | Path | None = None) -> TaskCheck:
    """Check a card, and count what it finds in the shard set of its source.

    Raises UserError: label or classes that the source does not have, shards of other sources only, and all that
    `load_split` refuses (a patient in two folds, no image in a fold, a split of other shards).
    """
    source = find_source_card(card)
    if source is not None and card.needs is None and (faults := find_card_faults(card, source)):
        raise UserError(f"task {card.name}: {faults[0]}; correct the card, or the source card")
    lines = list(_describe_card(card, source, task_dir))
    own = [shard_set for shard_set in shard_sets if shard_set.source == card.source]
    if shard_sets and not own:
        given = ", ".join(shard_set.source for shard_set in shard_sets)
        raise UserError(f"task {card.name}: is on source {card.source}, the shards hold {given}; give --shards of it")
    claim = [f"supports no claim: {card.claim_note}"] if not card.claim else []
    if not own:
        missing = [] if card.needs is None else [f"cannot run yet, it needs {card.needs}"]
        if source is None and card.needs is None:
            missing = [f"no source card {card.source} is shipped; shards of that source must come from a card of yours"]
        return TaskCheck(card, None, tuple(lines), (*missing, *claim))
    shard_set = own[0]
    split = load_split(card, shard_set, task_dir)
    card = find_classes(card, shard_set)
    lines += ["", *_count_images(split, shard_set), "", *_count_classes(card, split)]
    lines += _count_target(card, split, shard_set)
    if card.subgroups:
        lines += ["", "subgroups of the test fold, images (groups):", *_count_subgroups(card, split, shard_set)]
    return TaskCheck(card, split, tuple(lines), (*_warn(card, split, shard_set), *claim))


def _describe_card(card: TaskCard, source: SourceCard | None, task_dir: str | Path | None) -> Iterator[str]:
    yield f"{card.name}, version {card.version}: {card.title}"
    modality = card.modality or "all modalities"
    yield f"family {card.family}, {modality}, access {card.access}, licence {card.licence}"[:WIDTH]
    where = f"source card {card.source}" if source else "no source card shipped"
    kind = card.split.kind if card.split_name == card.name else f"{card.split.kind}, that of {card.split_name}"
    yield f"source {card.source} ({where}), asks for {card.target_words}, group {card.group}, split {kind}"
    directions = list_metrics(card.family)
    arrows = {"higher": "+", "lower": "-"}
    metrics = ", ".join(f"{name}{arrows[directions[name]]}" for name in card.metrics)
    yield _fold(f"metrics (+ higher, - lower is better): {metrics}; primary {card.primary_metric}")
    if numbers := find_published(card.name, card.published):
        yield f"published numbers: {len(numbers)} in {', '.join(card.published)}, on other splits than ours"
    if card.note:
        yield _fold(f"note: {card.note}")


def _count_images(split: Split, shard_set: ShardSet) -> Iterator[str]:
    kind = {"sample": "groups unknown, each image its own"}.get(split.group_kind, f"grouped by {split.group_kind}")
    yield (
        f"{len(split.rows):,} of the {len(shard_set.table):,} images in {shard_set.path}, "
        f"{len(np.unique(split.groups)):,} groups ({kind})"
    )
    if split.notes:
        yield _fold("left out: " + "; ".join(split.notes))


def _count_classes(card: TaskCard, split: Split) -> Iterator[str]:
    names = card.class_names
    images = {(c, f): _find(split, c, f) for c in range(len(names)) for f in FOLDS}
    order = sorted(range(len(names)), key=lambda c: sum(len(images[c, fold]) for fold in FOLDS))
    shown = range(len(names)) if len(names) <= MAX_CLASSES else order[:MAX_CLASSES]
    width = max(len("class"), *(len(names[c]) for c in shown))
    yield f"{'class':<{width}}" + "".join(f"{fold:>18}" for fold in FOLDS) + "   images (groups)"
    for c in shown:
        yield f"{names[c]:<{width}}" + "".join(_count(split, images[c, fold]) for fold in FOLDS)
    if len(shown) < len(names):
        yield f"... the rarest of {len(names)} classes"
    if len(names) > 1:
        yield f"{'all':<{width}}" + "".join(_count(split, split.find(fold)) for fold in FOLDS)


def _find(split: Split, label: int, *folds: str) -> NDArray[np.int64]:
    return np.flatnonzero((split.labels == label) & np.isin(split.folds, folds)).astype(np.int64)


def _count(split: Split, places: NDArray[np.int64]) -> str:
    return f"{f'{len(places):,} ({len(np.unique(split.groups[places])):,})':>18}"


def _count_target(card: TaskCard, split: Split, shard_set: ShardSet) -> Iterator[str]:
    """One line of what only this family counts."""
    table = shard_set.table.take(pa.array(split.rows))
    target = card.target
    if isinstance(target, RegressionTarget):
        values = read_numbers(table, target.column)
        below = values < target.low if target.low is not None else np.zeros(len(values), dtype=bool)
        above = values > target.high if target.high is not None else np.zeros(len(values), dtype=bool)
        outside = int((below | above).sum())
        low, middle, high = np.quantile(values, (0, 0.5, 1))
        yield f"{target.column} in {target.unit}: {low:g} to {high:g}, median {middle:g}; {outside} outside its range"
    elif isinstance(target, SurvivalTarget):
        events, days = read_numbers(table, target.event) > 0, read_numbers(table, target.days)
        groups = len(np.unique(split.groups[events]))
        yield _fold(
            f"{target.outcome}, days since {target.time_zero}: median {np.median(days):g}; {groups:,} groups with it"
        )
    elif isinstance(target, ChangeTarget):
        pairs = _count_pairs(table, split, target)
        yield "pairs of visits: " + ", ".join(f"{fold} {pairs[fold]:,}" for fold in FOLDS)
    elif isinstance(target, SlidesTarget):
        ids = np.array([value or "" for value in table.column(f"{target.bag}_id").to_pylist()])
        counts = (f"{fold} {len(np.unique(ids[split.find(fold)])):,}" for fold in FOLDS)
        yield f"{target.bag}s: " + ", ".join(counts)
    elif isinstance(target, RetrievalTarget) and target.match != "caption":
        ids, sides = table.column(f"{target.match}_id").to_pylist(), _find_sides(table, target)
        both = {place for place, side in zip(ids, sides, strict=True) if side == "query"} & {
            place for place, side in zip(ids, sides, strict=True) if side == "gallery"
        }
        queries = sum(side == "query" and place in both for place, side in zip(ids, sides, strict=True))
        yield f"queries with a partner in the gallery: {queries:,}, of {len(both):,} {target.match}s"
    elif isinstance(target, UglyDucklingTarget):
        patients, lesions = table.column("patient_id").to_pylist(), table.column("lesion_id").to_pylist()
        pairs_seen = {pair for pair in zip(patients, lesions, strict=True) if None not in pair}
        sizes = Counter(patient for patient, _ in pairs_seen)
        positive = {patients[place] for place in np.flatnonzero(split.labels == 1)}
        enough = {patient for patient, count in sizes.items() if count >= target.min_lesions}
        yield (
            f"{len(enough):,} patients with at least {target.min_lesions} lesions, "
            f"{len(enough & positive):,} of them with a lesion of class {card.classes[1]}"
        )


def _count_pairs(table: pa.Table, split: Split, target: ChangeTarget) -> Counter[str]:
    visits: dict[str, set[int]] = defaultdict(set)
    fold_of: dict[str, str] = {}
    columns = (table.column("lesion_id").to_pylist(), table.column("visit_day").to_pylist(), split.folds.tolist())
    for lesion, day, fold in zip(*columns, strict=True):
        if lesion is not None and day is not None:
            visits[lesion].add(day)
            fold_of[lesion] = fold
    counts: Counter[str] = Counter()
    for lesion, days in visits.items():
        ordered = sorted(days)
        both = pairwise(ordered) if target.pairs == "consecutive" else [(ordered[0], ordered[-1])]
        longest = target.max_days if target.max_days is not None else np.inf
        counts[fold_of[lesion]] += sum(max(target.min_days, 1) <= late - early <= longest for early, late in both)
    return counts


def _find_sides(table: pa.Table, target: RetrievalTarget) -> list[str | None]:
    """Whether each row is a query, in the gallery, or neither."""
    if target.query == "first_visit":
        ids, days = table.column(f"{target.match}_id").to_pylist(), table.column("visit_day").to_pylist()
        first: dict[str, int] = {}
        for place, day in zip(ids, days, strict=True):
            if day is not None:
                first[place] = min(day, first.get(place, day))
        return [
            None if day is None else "query" if day == first[place] else "gallery"
            for place, day in zip(ids, days, strict=True)
        ]
    side_of = {target.query: "query", target.gallery: "gallery"}
    return [side_of.get(modality) for modality in table.column("modality").to_pylist()]


def _count_subgroups(card: TaskCard, split: Split, shard_set: ShardSet) -> Iterator[str]:
    test = split.find("test")
    table = shard_set.table.take(pa.array(split.rows[test]))
    groups = split.groups[test]
    for name in card.subgroups:
        levels = np.array([level or "" for level in read_levels(table, name)], dtype=np.str_)
        counts = {level: int((levels == level).sum()) for level in np.unique(levels).tolist()}
        known = sorted((level for level in counts if level), key=lambda level: (-counts[level], level))
        texts = [
            f"{level} {counts[level]:,} ({len(np.unique(groups[levels == level])):,})" for level in known[:MAX_LEVELS]
        ]
        if len(known) > MAX_LEVELS:
            texts.append(f"{len(known) - MAX_LEVELS} more levels")
        if "" in counts:
            texts.append(f"unknown {counts['']:,}")
        yield _fold(f"  {name}: {', '.join(texts)}")


def _warn(card: TaskCard, split: Split, shard_set: ShardSet) -> Iterator[str]:
    """What would make the task's numbers unsound on these shards."""
    if split.group_kind == "sample":
        yield "groups are unknown: images of one person or lesion can lie in two folds, and intervals are too narrow"
    names = card.class_names
    if len(names) > 1:
        learned = range(len(card.classes))
        few = {names[c]: _count_groups(split, c, "train", "val") for c in learned}
        few = {name: count for name, count in few.items() if count < NUM_FOLDS}
        if few:
            yield f"fewer groups in train and val than the {NUM_FOLDS} inner folds: {_list(few)}"
        tested = {name: _count_groups(split, c, "test") for c, name in enumerate(names)}
        if absent := [name for name, count in tested.items() if count == 0]:
            yield f"no image in the test fold, so metrics over all classes are null: {_list(absent)}"
        elif min(tested.values()) < FEW_TEST_GROUPS:
            rare = {name: count for name, count in tested.items() if count < FEW_TEST_GROUPS}
            yield f"fewer than {FEW_TEST_GROUPS} groups in the test fold, so intervals are wide: {_list(rare)}"
    if len(split.find("val")) == 0:
        yield "no val fold: recipes cannot be chosen without the test fold (evaluate_on: development)"
    table = shard_set.table.take(pa.array(split.rows))
    if same := _count_shared(table.column("source_sha256").to_pylist(), split.folds):
        yield f"{same} images lie in two folds under different keys (equal files): audit the source before a claim"
    unlabelled = 1 - len(split.rows) / max(1, len(shard_set.table))
    if split.notes and any("of the split are not in the shards" in note for note in split.notes):
        yield "not all images of the committed split are there: numbers do not compare with those on the whole source"
    elif unlabelled > 0.5 and card.modality is None:
        yield f"{unlabelled:.0%} of the images are left out: is the right label named?"


def _count_groups(split: Split, label: int, *folds: str) -> int:
    return len(np.unique(split.groups[_find(split, label, *folds)]))


def _count_shared(values: Sequence[str | None], folds: NDArray[np.str_]) -> int:
    """How many rows carry a value that another fold has, too."""
    found: dict[str, set[str]] = defaultdict(set)
    for value, fold in zip(values, folds.tolist(), strict=True):
        if value is not None:
            found[value].add(fold)
    return sum(value is not None and len(found[value]) > 1 for value in values)


def _list(items: Sequence[str] | Mapping[str, int]) -> str:
    texts = [f"{k} {v}" for k, v in items.items()] if isinstance(items, Mapping) else list(items)
    return ", ".join(texts[:6]) + (f" and {len(texts) - 6} more" if len(texts) > 6 else "")


def _fold(text: str) -> str:
    return "\n".join(wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False))


def format_tasks(cards: Sequence[TaskCard], shard_sets: Sequence[ShardSet]) -> str:
    """One line a task, by family, modality and access; with shards, whether these hold it: here, lacking, or -."""
    lines: list[str] = []
    width = max((len(card.name) for card in cards), default=0)
    for family in get_args(Family):
        members = [card for card in cards if card.family == family]
        if members:
            lines += [*([""] if lines else []), family]
        for modality in sorted({card.modality or "all modalities" for card in members}):
            lines.append(f"  {modality}")
            found = [card for card in members if (card.modality or "all modalities") == modality]
            for card in sorted(found, key=lambda card: (card.access, card.name)):
                held = f"{_find_held(card, shard_sets):<9}" if shard_sets else ""
                lines.append(f"    {card.name:<{width}}  {card.access:<8} {held}{card.source:<23} {card.title}")
    return "\n".join(lines)


def _find_held(card: TaskCard, shard_sets: Sequence[ShardSet]) -> str:
    own = [shard_set for shard_set in shard_sets if shard_set.source == card.source]
    if not own:
        return "-"
    return "here" if any(can_run(card, shard_set) for shard_set in own) else "lacking"
