"""ROC and precision-recall curves of a task of two classes: probabilities in, lines of few points out.

    labels, probabilities [N] --every threshold--> points --thin--> at most MAX_POINTS, ends kept
    ROC points, a wanted specificity --> the highest sensitivity that keeps it

Both curves are of the test set's own thresholds: they show what an encoder could reach, and a clinic reaches less.
Where fewer than MIN_SHOWN_GROUPS groups carry a class nothing is drawn: a curve of few steps is a list of patients.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.measures.subgroups import MIN_SHOWN_GROUPS

Floats = NDArray[np.float64]
MAX_POINTS = 200  # of a line: a drawing is at most 340 pixels wide
SPECIFICITIES = (0.80, 0.90, 0.95)  # at which the table reads a sensitivity
ROUNDING = 1e-12  # 9 of 10 is exactly 90 %


@dataclass(frozen=True, eq=False)
class Line:
    """A line of P points from left to right: x [P], y [P]."""

    x: Floats
    y: Floats


@dataclass(frozen=True, eq=False)
class Curves:
    """The curves of one encoder; None where `reason` says why they are not shown."""

    roc: Line | None  # 1 - specificity, sensitivity
    precision_recall: Line | None  # sensitivity, positive predictive value
    prevalence: float | None  # what precision is by chance
    sensitivities: tuple[float, ...]  # at SPECIFICITIES
    reason: str | None = None


def build_curves(labels: ArrayLike, probabilities: ArrayLike, groups: ArrayLike) -> Curves:
    """Build both curves. labels: [N], 1 = positive. probabilities: [N] of that class. groups: [N]."""
    positive, group = np.asarray(labels) == 1, np.asarray(groups)
    for side, name in ((positive, "a positive"), (~positive, "a negative")):
        if len(np.unique(group[side])) < MIN_SHOWN_GROUPS:
            reason = f"not shown: fewer than {MIN_SHOWN_GROUPS} groups have {name} unit, at least as many are needed"
            return Curves(None, None, None, (), reason)
    roc = compute_roc(labels, probabilities)
    return Curves(
        roc=thin(roc),
        precision_recall=thin(compute_precision_recall(labels, probabilities)),
        prevalence=float(positive.mean()),
        sensitivities=tuple(float(roc.y[roc.x <= 1 - wanted + ROUNDING].max()) for wanted in SPECIFICITIES),
    )


def compute_roc(labels: ArrayLike, scores: ArrayLike) -> Line:
    """Compute the ROC curve: false positive rate, true positive rate, at every score from the highest down.

    Rows of equal scores are one point. Both classes must be there.
    """
    true, false = _count_called(labels, scores)
    return Line(np.concatenate([[0.0], false / false[-1]]), np.concatenate([[0.0], true / true[-1]]))


def compute_precision_recall(labels: ArrayLike, scores: ArrayLike) -> Line:
    """Compute recall and precision at every score from the highest down; recall 0 has precision 1 by convention."""
    true, false = _count_called(labels, scores)
    return Line(np.concatenate([[0.0], true / true[-1]]), np.concatenate([[1.0], true / (true + false)]))


def thin(line: Line, num: int = MAX_POINTS) -> Line:
    """Keep at most `num` points of a line, evenly along its way, its ends among them."""
    if len(line.x) <= num:
        return line
    way = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(line.x)) + np.abs(np.diff(line.y)))])
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], num)))
    kept[-1] = len(way) - 1
    return Line(line.x[kept], line.y[kept])


def _count_called(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """True and false positives at each distinct score, descending."""
    score, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of rows with one score
    true = np.cumsum(positive[order], dtype=np.float64)[last]
    return true, last + 1 - true
