"""Which subgroup every test unit belongs to: from the shard set, where it is at hand, into the predictions file.

    card.subgroups + samples of the units -> levels --rare ones become "other"--> columns `subgroup:NAME` of predictions

The board must not need the archive, so the levels travel with the predictions, and only as what a table needs: ages and
phototypes as bands, and no level that a handful of patients have. Needs no torch.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import Subgroup, TaskCard
from panfm.shards.index import ShardSet

AGE_BANDS = ((0, 30), (30, 50), (50, 70), (70, 200))  # years
PHOTOTYPE_BANDS = ((1, 2), (3, 4), (5, 6))  # Fitzpatrick: raters often differ by one, and few images have 5 or 6
MIN_LEVEL_GROUPS = 5  # a level of fewer patients could point at one of them
OTHER = "other"


def collect_subgroups(
    card: TaskCard, split: Split, shard_set: ShardSet, places: NDArray[np.int64]
) -> dict[str, list[str | None]]:
    """Collect the level of each unit for every attribute in the card's `subgroups`: name -> [M], None = unknown.

    places: int64 [M], the units' places in the split. A unit of several images (a pair, a slide, a patient) has the
    level that all of its images share, else none. A level with fewer than MIN_LEVEL_GROUPS groups becomes "other".
    """
    if not card.subgroups or len(places) == 0:
        return {}
    members = [split.members[place] for place in places] if split.members else [[row] for row in split.rows[places]]
    unit = np.repeat(np.arange(len(members)), [len(rows) for rows in members])
    table = shard_set.table.take(pa.array(np.concatenate([np.asarray(rows, dtype=np.int64) for rows in members])))
    columns: dict[str, list[str | None]] = {}
    for name in card.subgroups:
        found: list[set[str | None]] = [set() for _ in members]
        for place, level in zip(unit.tolist(), read_levels(table, name), strict=True):
            found[place].add(level)
        columns[name] = _merge_rare(
            [next(iter(levels)) if len(levels) == 1 else None for levels in found], split.groups[places]
        )
    return columns


def read_levels(table: pa.Table, name: Subgroup) -> list[str | None]:
    """Read the level of each sample of a shard set's table in one attribute, rare ones too; None = unknown."""
    if name == "age":
        return [_find_age_band(age) for age in table.column("age").to_pylist()]
    if name == "phototype":
        pairs = zip(table.column("phototype_low").to_pylist(), table.column("phototype_high").to_pylist(), strict=True)
        return [_find_phototype_band(low, high) for low, high in pairs]
    return [value or None for value in table.column(name).to_pylist()]


def _merge_rare(levels: Sequence[str | None], groups: ArrayLike) -> list[str | None]:
    of_level: dict[str, set[str]] = {}
    for level, group in zip(levels, np.asarray(groups).tolist(), strict=True):
        if level is not None:
            of_level.setdefault(level, set()).add(group)
    rare = {level for level, members in of_level.items() if len(members) < MIN_LEVEL_GROUPS}
    return [OTHER if level in rare else level for level in levels]


def _find_age_band(age: float | None) -> str | None:
    if age is None:
        return None
    low, high = next(((low, high) for low, high in AGE_BANDS if low <= age < high), (0, 0))
    return None if high == 0 else f"{low}-{high - 1}" if high < 200 else f"{low} or more"


def _find_phototype_band(low: int | None, high: int | None) -> str | None:
    """The band that holds the whole range; a range across two bands says neither."""
    if low is None or high is None:
        return None
    return next((f"{first}-{last}" for first, last in PHOTOTYPE_BANDS if first <= low and high <= last), None)
