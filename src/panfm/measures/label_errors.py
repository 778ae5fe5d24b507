"""Labels that are probably wrong: confident learning from held-out probabilities.

    labels [N], held-out probabilities [N, K] -> thresholds [K] -> confident joint [K, K] -> suspects, share of errors

Northcutt, Jiang and Chuang 2021 (JAIR 70:1373). An image counts as confidently of class j where its probability of j is
at least the mean probability of j among the images labelled j; of several such classes the most probable. What is
labelled i and confidently j is counted in the joint, and off its diagonal an image is a suspect. The probabilities must
come from models that saw neither the image nor another one of its patient.

The method doubts what a model doubts: rare forms, poor photographs, and images that the encoder cannot tell apart are
among the suspects too. They are to be looked at, not to be changed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LabelErrors:
    """What confident learning finds in N labelled images of K classes.

    thresholds: [K], NaN for a class without images. joint: int64 [K, K], images labelled i (row) and confidently j.
    confident: int64 [N], the class that an image confidently is, -1 = none. suspects: int64 [n], places of the images
    labelled otherwise than they confidently are, the least plausible label first. error_share: estimated share of wrong
    labels: the joint, each row scaled to the images that are labelled so, off its diagonal.
    """

    thresholds: Floats
    joint: Ints
    confident: Ints
    suspects: Ints
    error_share: float


def find_label_errors(labels: ArrayLike, probabilities: ArrayLike) -> LabelErrors:
    """Find the suspects among labels [N] (0 .. K-1) by held-out probabilities [N, K]; N is 1 or more."""
    given, p = np.asarray(labels, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    assert p.ndim == 2 and given.shape == p.shape[:1] and len(given), "probabilities are [N, K], labels [N]"
    num_classes = p.shape[1]
    counts = np.bincount(given, minlength=num_classes)
    own = p[np.arange(len(given)), given]
    sums = np.bincount(given, own, minlength=num_classes)
    thresholds = np.divide(sums, counts, out=np.full(num_classes, np.nan), where=counts > 0)
    above = p >= np.where(counts > 0, thresholds, np.inf)
    confident = np.where(above.any(axis=1), np.where(above, p, -1.0).argmax(axis=1), -1).astype(np.int64)
    joint = count_joint(given, confident, num_classes, np.ones((1, len(given))))[0].astype(np.int64)
    others = p.copy()
    others[np.arange(len(given)), given] = -np.inf
    margin = own - others.max(axis=1)
    suspects = np.flatnonzero((confident >= 0) & (confident != given))
    suspects = suspects[np.argsort(margin[suspects], kind="stable")].astype(np.int64)
    share = float(compute_error_share(joint[None].astype(np.float64), counts[None].astype(np.float64))[0])
    return LabelErrors(thresholds, joint, confident, suspects, share)


def count_joint(labels: Ints, confident: Ints, num_classes: int, weights: NDArray[np.generic]) -> Floats:
    """The confident joint under R rows of weights [R, N]: [R, K, K]."""
    sure = confident >= 0
    cells = np.zeros((int(sure.sum()), num_classes * num_classes))
    cells[np.arange(len(cells)), labels[sure] * num_classes + confident[sure]] = 1
    return (weights[:, sure].astype(np.float64) @ cells).reshape(len(weights), num_classes, num_classes)


def compute_error_share(joint: Floats, counts: Floats) -> Floats:
    """Estimated share of wrong labels: joint [R, K, K], images labelled so [R, K] -> [R]; NaN without an image.

    A class of which no image is confidently anything tells nothing of its errors: its labels count as right.
    """
    row = joint.sum(axis=2)
    right = np.einsum("rkk->rk", joint)
    share_right = np.divide(right, row, out=np.ones_like(row), where=row > 0)
    total = counts.sum(axis=1)
    wrong = (counts * (1 - share_right)).sum(axis=1)
    return np.asarray(np.divide(wrong, total, out=np.full(len(total), np.nan), where=total > 0))
