"""How many images and patients have what, with small numbers left out: levels and groups in, counts that may be shown.

    samples.parquet or predictions -> levels [N], groups [N] --count_levels--> a Count a level, few groups hidden

A level of fewer than MIN_SHOWN_GROUPS groups is not counted in public. What is hidden can be worked out together, as
the total is known: the smallest further levels are hidden with it until that says nothing of few either. How many are
unknown tells nothing of anybody: a small number of them is not shown, but nothing else is hidden for its sake.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from panfm.evaluation.subgroup_columns import read_levels
from panfm.evaluation.tasks import Subgroup
from panfm.measures.subgroups import MIN_SHOWN_GROUPS
from panfm.shards.index import ShardSet

UNKNOWN = "unknown"
FEW = "few, not shown"
FEW_NOTE = (
    f"'{FEW}': of fewer than {MIN_SHOWN_GROUPS} patients, lesions or slides, or a number from which such a one could "
    "be worked out."
)
KINDS = {"patient": "patients", "lesion": "lesions", "slide": "slides", "sample": "images"}


@dataclass(frozen=True)
class Count:
    """A level of an attribute; both numbers None where they are not shown."""

    level: str
    num_images: int | None
    num_groups: int | None


@dataclass(frozen=True)
class Spread:
    """How the images of a shard set spread over the levels of an attribute."""

    attribute: Subgroup
    counts: tuple[Count, ...]

    @property
    def is_known(self) -> bool:
        """Whether any image has a value."""
        return any(count.level != UNKNOWN for count in self.counts)


def count_levels(
    levels: Sequence[str | None], groups: Sequence[str], order: Sequence[str] = (), *, least: int = MIN_SHOWN_GROUPS
) -> tuple[Count, ...]:
    """Count images and groups of each level (None = unknown), by `order`, then by name, the unknown last.

    levels, groups: [N]. least: groups that a level needs to be shown.
    """
    members: dict[str, set[str]] = {}
    images: dict[str, int] = {}
    for level, group in zip(levels, groups, strict=True):
        name = UNKNOWN if level is None else level
        members.setdefault(name, set()).add(group)
        images[name] = images.get(name, 0) + 1
    hidden = {name for name, those in members.items() if len(those) < least and name != UNKNOWN}
    while hidden and (rest := members.keys() - hidden):
        if len(set().union(*(members[name] for name in hidden))) >= least:
            break
        hidden.add(min(rest, key=lambda name: (images[name], name)))
    if len(members.get(UNKNOWN, ())) < least:
        hidden.add(UNKNOWN)
    place = {name: number for number, name in enumerate(order)}
    names = sorted(members, key=lambda name: (name == UNKNOWN, place.get(name, len(place)), name))
    return tuple(
        Count(name, None, None) if name in hidden else Count(name, images[name], len(members[name])) for name in names
    )


def count_spread(shard_set: ShardSet, attribute: Subgroup) -> Spread:
    """Count the images of a whole shard set by an attribute."""
    groups = shard_set.table.column("group_id").to_pylist()
    return Spread(attribute, count_levels(read_levels(shard_set.table, attribute), groups))


def find_group_kind(shard_set: ShardSet) -> str:
    """What the groups of a shard set are: patient, lesion, slide, or sample where one image knows no better."""
    kinds = set(shard_set.table.column("group_kind").to_pylist())
    return str(next(iter(kinds))) if len(kinds) == 1 else "sample"


def describe_count(count: Count, group_kind: str) -> str:
    """Say it in words: '1,200 images of 300 patients'."""
    if count.num_images is None or count.num_groups is None:
        return FEW
    images = f"{count.num_images:,} images"
    return images if group_kind == "sample" else f"{images} of {count.num_groups:,} {KINDS.get(group_kind, 'groups')}"
