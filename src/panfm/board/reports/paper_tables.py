"""Numbers of a paper that the board does not show: who was in training and test, and how wide an interval would be.

    predictions' subgroups, shard set + split --count_levels--> Table 1 of a task (few groups not shown)
    measured area, variance parts --> expected width of its 95 % interval for a planned number of patients

Widths stand on two feet: Hanley and McNeil 1982 (Radiology 143:29), which knows the area alone, and the measured
DeLong / Obuchowski variance, whose parts shrink with the patients of their class. Both assume patients like those
measured, one row each in Hanley and McNeil; the interval is symmetric on the logit scale, as the board's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from panfm.board.reports.counts import UNKNOWN, Count, count_levels
from panfm.board.verify import TestSet
from panfm.errors import UserError
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.subgroup_columns import read_levels
from panfm.evaluation.task_rows import find_classes
from panfm.evaluation.tasks import Subgroup, TaskCard
from panfm.measures.intervals import AreaParts, compute_area_parts, compute_quantile
from panfm.shards.index import ShardSet

ATTRIBUTES: tuple[Subgroup, ...] = ("age", "sex", "phototype", "anatomic_site", "institution")
# Planned patients with and without the disease: a pilot, what most single hospitals have, what a registry has.
PLANNED = ((20, 80), (50, 200), (100, 400), (200, 800), (500, 2000), (1000, 4000))


@dataclass(frozen=True)
class Characteristic:
    """One attribute of a task's images. None: not recorded (no shard set was named, or it is not the one measured)."""

    attribute: str
    train: tuple[Count, ...] | None
    test: tuple[Count, ...] | None

    @property
    def levels(self) -> tuple[str, ...]:
        """All levels, in the order of whichever side has them."""
        return tuple(dict.fromkeys(count.level for side in (self.train, self.test) for count in side or ()))


@dataclass(frozen=True)
class Width:
    """The expected width of a 95 % interval; scaled: None where the measured variance is none (an area of 0 or 1)."""

    num_positive: int
    num_negative: int
    hanley: float
    scaled: float | None


def find_measured_split(card: TaskCard | None, test_set: TestSet, shard_sets: Mapping[str, ShardSet]) -> Split | None:
    """The split of the task's images in the shard sets named, if it is the very one that was measured; else None."""
    shard_set = None if card is None else shard_sets.get(card.source)
    if card is None or shard_set is None or test_set.result.unit != "image":
        return None
    try:
        split = load_split(find_classes(card, shard_set), shard_set)
    except UserError:  # a split that does not fit these shards is not the one measured
        return None
    return split if split.hash == test_set.result.split_hash else None


def describe_patients(test_set: TestSet, split: Split | None, shard_set: ShardSet | None) -> list[Characteristic]:
    """Count training and test images and groups by class, age, sex, phototype, anatomic site and institution.

    Test levels come from the predictions, training levels from the shard set where `split` is the measured one.
    """
    groups = test_set.groups.tolist()
    classes = test_set.result.classes
    found = []
    train: tuple[Count, ...] | None = None
    test: tuple[Count, ...] | None
    if len(classes) > 1:
        test = count_levels([classes[label] for label in test_set.labels.tolist()], groups, classes)
        if split is not None:
            place = split.find("train", "val")
            names = [classes[label] for label in split.labels[place].tolist()]
            train = count_levels(names, split.groups[place].tolist(), classes)
        found.append(Characteristic("class", train, test))
    for attribute in ATTRIBUTES:
        levels = test_set.subgroups.get(attribute)
        train = test = None
        if split is not None and shard_set is not None:
            every = read_levels(shard_set.table, attribute)
            train = _count_fold(split, every, "train", "val")
            test = _count_fold(split, every, "test")
        if levels is not None:
            test = count_levels(levels, groups)
        train, test = _drop_unknown(train), _drop_unknown(test)
        found.append(Characteristic(attribute.replace("_", " "), train, test))
    return found


def _drop_unknown(counts: tuple[Count, ...] | None) -> tuple[Count, ...] | None:
    """None where no image has a value: that was not recorded."""
    return None if counts is None or all(count.level == UNKNOWN for count in counts) else counts


def _count_fold(split: Split, every: Sequence[str | None], *folds: str) -> tuple[Count, ...]:
    place = split.find(*folds)
    return count_levels([every[row] for row in split.rows[place].tolist()], split.groups[place].tolist())


# ------------------------------------------------------------------------------------------------ planning


def plan_widths(test_set: TestSet) -> tuple[float, list[Width]] | None:
    """The measured AUROC of a task of two classes and the interval's expected width for PLANNED; else None."""
    labels = test_set.labels
    if len(test_set.result.classes) != 2 or test_set.scores.shape[1] != 2 or len(np.unique(labels)) != 2:
        return None
    parts = compute_area_parts(labels, test_set.scores[:, 1], test_set.groups)
    if parts.num_rarer_groups < 2:
        return None
    widths = [
        Width(
            positive,
            negative,
            compute_width(parts.area, compute_hanley_variance(parts.area, positive, negative)),
            compute_width(parts.area, scale_variance(parts, positive, negative)) if parts.variance > 1e-12 else None,
        )
        for positive, negative in PLANNED
    ]
    return parts.area, widths


def compute_hanley_variance(area: float, num_positive: int, num_negative: int) -> float:
    """Hanley and McNeil's variance of an area, from the area alone (exponential scores)."""
    both_positive, both_negative = area / (2 - area), 2 * area**2 / (1 + area)
    return (
        area * (1 - area)
        + (num_positive - 1) * (both_positive - area**2)
        + (num_negative - 1) * (both_negative - area**2)
    ) / (num_positive * num_negative)


def scale_variance(parts: AreaParts, num_positive: int, num_negative: int) -> float:
    """The measured variance for other numbers of patients: each class's part shrinks with its patients.

    The part of groups that hold both classes is scaled by the factor that leaves the variance larger.
    """
    P, Q = parts.num_positive_groups, parts.num_negative_groups
    in_positive = P / (P - 1) * float((parts.positive**2).sum())
    in_negative = Q / (Q - 1) * float((parts.negative**2).sum())
    shared = parts.variance - in_positive - in_negative
    factors = (P / num_positive, Q / num_negative)
    of_shared = max(factors) if shared > 0 else min(factors)
    return max(0.0, in_positive * factors[0] + in_negative * factors[1] + shared * of_shared)


def compute_width(area: float, variance: float) -> float:
    """Width of the 95 % interval of an area, made on the logit scale with the normal quantile."""
    if not 0 < area < 1:
        return math.nan
    middle = math.log(area / (1 - area))
    half = compute_quantile() * math.sqrt(variance) / (area * (1 - area))
    return 1 / (1 + math.exp(-middle - half)) - 1 / (1 + math.exp(-middle + half))
