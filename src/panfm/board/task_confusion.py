"""What was taken for what: labels and most probable classes in, a table of counts out that points at nobody.

    labels, predicted [N], groups [N] --> a row a true class, a cell a predicted one, with counts and shares of the row

A cell of images of 1 to 4 groups is not counted. A row's total is known, so that one hidden cell could be worked out:
the smallest further ones are hidden with it (`reports.counts`), and rows of few groups as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from panfm.board.reports.counts import count_levels

MIN_COUNTED_GROUPS = 5


@dataclass(frozen=True)
class ConfusionCell:
    """Images of a row's class that were taken for the column's; both None where the count is hidden."""

    num: int | None
    share: float | None  # of the row


@dataclass(frozen=True)
class ConfusionRow:
    """A true class. num: its images; None, as all of its cells then, where that is hidden."""

    label: str
    num: int | None
    cells: tuple[ConfusionCell, ...]  # in the order of the classes


HIDDEN = ConfusionCell(None, None)


def build_confusion(
    labels: ArrayLike, predicted: ArrayLike, groups: Sequence[str], classes: Sequence[str]
) -> tuple[ConfusionRow, ...]:
    """Build the table, a row a class in the order of `classes`. labels, predicted: places in classes [N]."""
    label, top, group = np.asarray(labels), np.asarray(predicted), np.asarray(groups)
    totals = _count(label.tolist(), group.tolist())
    rows = []
    for place, name in enumerate(classes):
        total = totals.get(place, 0)
        if not total:  # no image of this class, or not to be told
            rows.append(ConfusionRow(name, total, (ConfusionCell(0, None) if total == 0 else HIDDEN,) * len(classes)))
            continue
        inside = label == place
        counts = _count(top[inside].tolist(), group[inside].tolist())
        found = [counts.get(column, 0) for column in range(len(classes))]
        rows.append(ConfusionRow(name, total, tuple(_describe(num, total) for num in found)))
    return tuple(rows)


def _describe(num: int | None, total: int) -> ConfusionCell:
    return HIDDEN if num is None else ConfusionCell(num, num / total)


def _count(places: Sequence[int], groups: Sequence[str]) -> dict[int, int | None]:
    """Images of each class that occurs; None where it is hidden."""
    counts = count_levels([str(place) for place in places], groups, least=MIN_COUNTED_GROUPS)
    return {int(count.level): count.num_images for count in counts}
