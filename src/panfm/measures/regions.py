"""Metrics of segmentation: how well predicted regions cover the true ones, image by image.

    scores [N, 2S]: pixels of the intersection for S structures, then pixels predicted;  targets [N, S]: of the mask
      -> Dice and Jaccard an image (the mean over its structures) -> weighted mean over images

Of each image first, then averaged: a large lesion counts no more than a small one. A structure that is neither there
nor predicted is right (1), one that is predicted where there is none is wrong (0).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from panfm.measures.outcomes import Floats, Measure, Outcome
from panfm.measures.weighted import compute_means


def compute_dice(outcome: Outcome) -> Floats:
    """Dice of each image [N], the mean over its structures: 2 |A and B| / (|A| + |B|), 1 where both are empty."""
    shared, predicted, true = _get_pixels(outcome)
    return _divide(2 * shared, predicted + true)


def compute_jaccard(outcome: Outcome) -> Floats:
    """Jaccard index of each image [N], the mean over its structures: |A and B| / |A or B|, 1 where both are empty."""
    shared, predicted, true = _get_pixels(outcome)
    return _divide(shared, predicted + true - shared)


def _get_pixels(outcome: Outcome) -> tuple[Floats, Floats, Floats]:
    """Pixels of the intersection, predicted, of the mask: each [N, S]."""
    S = outcome.targets.shape[1]
    assert S > 0 and outcome.scores.shape[1] == 2 * S, "intersections and predictions of S structures, masks of S"
    return outcome.scores[:, :S], outcome.scores[:, S:], outcome.targets


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    shares = np.divide(numerator, denominator, out=np.ones_like(denominator), where=denominator > 0)
    return np.asarray(shares.mean(axis=1))


def _average(of_image: Callable[[Outcome], Floats]) -> Callable[[Outcome, NDArray[np.generic]], Floats]:
    return lambda outcome, weights: compute_means(of_image(outcome), weights)


def _explain(outcome: Outcome) -> str | None:
    return None if len(outcome.targets) else "no test images"


def _compute_chance(outcome: Outcome) -> float:
    """What predicting nothing anywhere scores: 1 for each empty mask, 0 for each other."""
    return float((outcome.targets == 0).mean())


MEASURES: dict[str, Measure] = {
    "dice": Measure(
        "Dice",
        "higher",
        "Twice the shared pixels over the pixels of both regions, of each image and structure, then the mean; an "
        "empty prediction of an empty mask is right (1).",
        compute=_average(compute_dice),
        explain=_explain,
        chance=_compute_chance,
        perfect=1.0,
    ),
    "jaccard": Measure(
        "Jaccard index",
        "higher",
        "Shared pixels over the pixels of either region, of each image and structure, then the mean; an empty "
        "prediction of an empty mask is right (1).",
        compute=_average(compute_jaccard),
        explain=_explain,
        chance=_compute_chance,
        perfect=1.0,
    ),
}
