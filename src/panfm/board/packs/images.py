"""Are these the task's test images? Predictions and a committed split in, a word about it or a refusal out.

    Result + keys, groups, labels --held against evaluation/splits/TASK.parquet--> ImageCheck

Only where the split of a task is committed can somebody without the images tell. The Result's split hash must then be
the committed one; every test key must be there once, with the group and the class that the split gives it. A task whose
folds are another's (`split: {of: ...}`), and a protocol that scores lesions or pairs, use a part of them that the split
does not name: what is there is held against it, but whether all of it is there stays open.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from panfm.board.verify import TestSet
from panfm.errors import UserError
from panfm.evaluation.results import Result
from panfm.evaluation.splits import compute_split_hash, find_split_file, read_split_table
from panfm.evaluation.tasks import CommittedSplit, TaskCard, list_tasks, load_task

Entry = tuple[str, str, str]  # group, fold, name of the class


@dataclass(frozen=True)
class ImageCheck:
    """Whether the images are known to be the task's, all of them, and how that was found."""

    is_checked: bool
    words: str


@dataclass(frozen=True)
class _Committed:
    entries: Mapping[str, Entry]
    hash: str


def find_shipped_card(task: str) -> TaskCard | None:
    """The card of a task that panfm ships, None for any other name. A name from a pack is never taken for a path."""
    path = list_tasks().get(task)
    return None if path is None else load_task(path)


def check_images(result: Result, test_set: TestSet) -> ImageCheck:
    """Hold a Result's test units against the committed split of its task, where there is one.

    Raises UserError for a split hash, a key, a group or a class that is not the split's, and for missing test images.
    """
    card = find_shipped_card(result.task)
    if card is None:
        return ImageCheck(False, "images not checked: not a task that panfm ships")
    if not isinstance(card.split, CommittedSplit):
        return ImageCheck(False, "images not checked: the task has no committed split")
    committed = _read_committed(card.split_name)
    way_out = "evaluate again with the shipped source card and task, or ask whoever keeps the board"
    where = f"{test_set.path}: task {result.task}"
    own, by_image = card.split_name == card.name, result.unit == "image"
    if own and by_image and result.split_hash != committed.hash:
        raise UserError(
            f"{where}: split_hash {result.split_hash[:12]} is not that of the committed split ({committed.hash[:12]}): "
            f"other images, groups or folds; {way_out}"
        )
    if not result.unit.startswith("image"):
        fold_of = {group: fold for group, fold, _ in committed.entries.values()}
        for group in np.unique(test_set.groups).tolist():
            if fold_of.get(group) != "test":
                raise UserError(
                    f"{where}: group {group} is {fold_of.get(group, 'not')} in the split, not test; {way_out}"
                )
        return ImageCheck(False, f"groups are test groups of the split; which {result.unit}s there are was not checked")
    names = card.class_names
    for key, group, label in zip(
        test_set.keys.tolist(), test_set.groups.tolist(), test_set.labels.tolist(), strict=True
    ):
        if key not in committed.entries:
            raise UserError(f"{where}: image {key} is not in the committed split {card.split_name}; {way_out}")
        its_group, fold, name = committed.entries[key]
        if fold != "test":
            raise UserError(f"{where}: image {key} is in the fold {fold!r} of the split, not in 'test'; {way_out}")
        if group != its_group:
            raise UserError(f"{where}: image {key} has group {group}, in the split {its_group}; {way_out}")
        if own and (not 0 <= label < len(names) or names[label] != name):
            shown = names[label] if 0 <= label < len(names) else label
            raise UserError(f"{where}: image {key} has class {shown!r}, in the split {name!r}; {way_out}")
    if not own or not by_image:
        return ImageCheck(False, f"images are test images of split {card.split_name}; whether all was not checked")
    missing = sorted(
        {key for key, (_, fold, _) in committed.entries.items() if fold == "test"} - set(test_set.keys.tolist())
    )
    if missing:
        raise UserError(f"{where}: {len(missing)} test images are missing, such as {missing[0]}; {way_out}")
    return ImageCheck(True, f"all {len(test_set.keys):,} images as in the committed split {card.split_name}")


@lru_cache(maxsize=8)
def _read_committed(name: str) -> _Committed:
    table = read_split_table(find_split_file(name)).sort_by("key").to_pydict()
    columns = (table["key"], table["group"], table["fold"], table["label"])
    entries = {key: (group, fold, label) for key, group, fold, label in zip(*columns, strict=True)}
    return _Committed(entries, compute_split_hash(table["source"][0], *columns))
