"""An encoder's most confident mistakes: its test set in, at most twelve images out; small copies only where asked for.

    scores, labels, groups --wrong, surest first, at most MAX_A_GROUP a group--> Mistake (its key stays inside)
    `leaderboard build --images SHARDS` --> the shard set of the task's source --> JPEG of SIDE pixels, data: URI

A page with images holds patients and must stay where the shards may lie. Neither key nor group stands on it, and the
copies are made from the pixels: nothing of a file's header goes along.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from panfm.data.decode import decode_rgb
from panfm.pages import encode_thumbnail
from panfm.shards.index import ShardSet, open_shard_set

MAX_MISTAKES = 12  # of an encoder
MAX_A_GROUP = 3  # one patient with a rare disease would else fill the page
SIDE = 160  # pixels of the longest side
QUALITY = 85  # of the JPEG


@dataclass(frozen=True)
class Mistake:
    """An image whose most probable class is wrong. key: of the sample; it is shown nowhere."""

    key: str
    true: str
    predicted: str
    probability: float  # of the predicted class


@dataclass(frozen=True)
class ShownMistake:
    """A mistake with its image. image: data: URI, None where the shards have no such key."""

    mistake: Mistake
    image: str | None


def find_mistakes(
    keys: Sequence[str], labels: ArrayLike, scores: ArrayLike, groups: Sequence[str], classes: Sequence[str]
) -> tuple[Mistake, ...]:
    """Find the surest mistakes. keys, labels, groups: [N]; scores: [N, K], a probability a class."""
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    top = score.argmax(axis=1)
    wrong = np.flatnonzero(top != label).tolist()
    num_of_group: dict[str, int] = {}
    found: list[Mistake] = []
    for row in sorted(wrong, key=lambda row: (-score[row, top[row]], str(keys[row]))):
        group = str(groups[row])
        num_of_group[group] = num_of_group.get(group, 0) + 1
        if num_of_group[group] <= MAX_A_GROUP and len(found) < MAX_MISTAKES:
            found.append(Mistake(str(keys[row]), classes[label[row]], classes[top[row]], float(score[row, top[row]])))
    return tuple(found)


def open_image_sets(folders: Sequence[Path]) -> list[ShardSet]:
    """Open the shard sets that images may be taken from."""
    return [open_shard_set(str(folder), columns=["key"]) for folder in folders]


def find_image_set(shard_sets: Sequence[ShardSet], source: str | None, keys: Collection[str]) -> ShardSet | None:
    """Find the set of a source; of a task whose source is unknown the only one that has all keys, None without one."""
    if source is not None:
        return next((one for one in shard_sets if one.source == source), None)
    holding = [one for one in shard_sets if keys and set(keys) <= set(one.table.column("key").to_pylist())]
    return holding[0] if len(holding) == 1 else None


def show_mistakes(
    mistakes: Mapping[str, Sequence[Mistake]], source: str | None, shard_sets: Sequence[ShardSet]
) -> dict[str, list[ShownMistake]] | None:
    """Put small copies of the images beside each encoder's mistakes; None where no set of the source was given."""
    keys = {one.key for those in mistakes.values() for one in those}
    shard_set = find_image_set(shard_sets, source, keys)
    if shard_set is None:
        return None
    rows = enumerate(shard_set.table.column("key").to_pylist())
    copies = {key: make_thumbnail(shard_set.read_image(row)) for row, key in rows if key in keys}
    return {name: [ShownMistake(one, copies.get(one.key)) for one in those] for name, those in mistakes.items()}


def make_thumbnail(data: bytes) -> str:
    """A small JPEG copy of a stored image as a data: URI."""
    return encode_thumbnail(Image.fromarray(decode_rgb(data)), SIDE, QUALITY)
