"""The figures of the report, all from out-of-fold probabilities, with intervals that hold patients together.

    labels, groups, OutOfFold  --compute_figures-->  Figures: overall, a row a class, calibration, reliability bins

Figures of a part of the patients (a class, a bin) are not shown where it is fewer than MIN_SHOWN_GROUPS of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panfm.clinic.recipes import Floats, Ints
from panfm.measures.calibration import Calibration, ReliabilityBin, estimate_calibration
from panfm.measures.intervals import Estimate, estimate_proportion
from panfm.measures.statistics import estimate_metrics
from panfm.measures.subgroups import MIN_SHOWN_GROUPS

MAX_BINS = 10
OVERALL = ("auroc", "balanced_accuracy", "accuracy", "brier")


@dataclass(frozen=True)
class ClassRow:
    """One class. num_groups: patients. recall: share of its images whose highest probability is this class."""

    name: str
    num_images: int
    num_groups: int
    area: Estimate  # against all other classes
    recall: Estimate


@dataclass(frozen=True)
class Figures:
    """What was measured. judged: of which probability calibration and bins speak, in words."""

    overall: dict[str, Estimate]
    classes: tuple[ClassRow, ...]
    judged: str
    calibration: Calibration
    bins: tuple[ReliabilityBin, ...]
    num_hidden_bins: int


def compute_figures(
    labels: Ints, groups: NDArray, probabilities: Floats, classes: Sequence[str], positive: str | None, *, seed: int
) -> Figures:
    """Measure out-of-fold probabilities [N, K] of N images against labels [N]; groups: [N] patients."""
    num_groups = len(np.unique(groups))
    K = len(classes)
    focus = list(classes).index(positive) if positive is not None else 1 if K == 2 else None
    if K == 2 and focus is not None:  # the class of interest is class 1 of the measures
        shown_labels, shown = (labels == focus).astype(np.int64), probabilities[:, [1 - focus, focus]]
    else:
        shown_labels, shown = labels, probabilities
    few = _explain_few(num_groups)
    if few is None:
        overall = estimate_metrics(OVERALL, shown_labels, shown, groups, seed=seed)
    else:
        overall = dict.fromkeys(OVERALL, Estimate(None, None, None, few))
    if focus is not None:
        judged, right, confidence = f"the probability of {classes[focus]}", labels == focus, probabilities[:, focus]
    else:
        judged = "the highest probability of an image, whichever class has it"
        right, confidence = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1)
    if few is None:
        calibration = estimate_calibration(right.astype(np.int64), confidence, groups, seed=seed)
    else:
        calibration = Calibration(Estimate(None, None, None, few), Estimate(None, None, None, few))
    bins = _build_bins(confidence, right, groups)
    kept = tuple(one for one in bins if one.num_groups >= MIN_SHOWN_GROUPS)
    return Figures(
        overall,
        tuple(_describe_class(place, name, labels, groups, probabilities, seed) for place, name in enumerate(classes)),
        judged,
        calibration,
        kept,
        len(bins) - len(kept),
    )


def _describe_class(place: int, name: str, labels: Ints, groups: NDArray, probabilities: Floats, seed: int) -> ClassRow:
    own = labels == place
    num_groups = len(np.unique(groups[own]))
    few = _explain_few(min(num_groups, len(np.unique(groups[~own]))))
    if few is not None:
        hidden = Estimate(None, None, None, few)
        return ClassRow(name, int(own.sum()), num_groups, hidden, hidden)
    score = np.stack([1 - probabilities[:, place], probabilities[:, place]], axis=1)
    area = estimate_metrics(["auroc"], own.astype(np.int64), score, groups, seed=seed)["auroc"]
    recall = estimate_proportion(probabilities[own].argmax(axis=1) == place, groups[own])
    return ClassRow(name, int(own.sum()), num_groups, area, recall)


def _build_bins(confidence: Floats, right: NDArray[np.bool_], groups: NDArray) -> list[ReliabilityBin]:
    """Bins of equal mass, as many as leave MIN_SHOWN_GROUPS patients in each: fewer than the 15 of a benchmark."""
    num_bins = min(MAX_BINS, len(np.unique(groups)) // MIN_SHOWN_GROUPS)
    if num_bins < 2:
        return []
    found = []
    for places in np.array_split(np.argsort(confidence, kind="stable"), num_bins):
        found.append(
            ReliabilityBin(
                num_images=len(places),
                num_groups=len(np.unique(groups[places])),
                confidence=float(confidence[places].mean()),
                right=estimate_proportion(right[places], groups[places]),
            )
        )
    return found


def _explain_few(num_groups: int) -> str | None:
    if num_groups >= MIN_SHOWN_GROUPS:
        return None
    return f"not shown: of {num_groups} patients, at least {MIN_SHOWN_GROUPS} are needed"
