"""Thresholds as a clinic sets them: before patients come, on training scores of classifiers that saw none of them.

    training labels [N], out-of-fold probabilities [N, 2] --90 or 95 % of one side--> settings["chosen"]["thresholds"]
        --the board (`task_pages`)--> what they reach on the test images

A threshold on scores of a classifier that saw the image would promise too much, one from the test set more still.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.measures.operating_points import Threshold, choose_thresholds

THRESHOLDS = "thresholds"  # key of what a protocol chose


def describe_thresholds(labels: NDArray[np.int64], held_out: NDArray[np.float64] | None) -> dict[str, Any]:
    """Choose the four thresholds on out-of-fold training scores, as plain values for `Scored.chosen`.

    labels: int64 [N]. held_out: float64 [N, K], None where training had too few groups for folds. {} for more than two
    classes and without folds.
    """
    if held_out is None or held_out.shape[1] != 2:
        return {}
    # As the test's scores are stored: in float32, so that an image on the threshold falls on one side everywhere.
    scores = held_out[:, 1].astype(np.float32).astype(np.float64)
    return {THRESHOLDS: [asdict(threshold) for threshold in choose_thresholds(labels, scores)]}


def read_thresholds(settings: Mapping[str, Any]) -> tuple[Threshold, ...]:
    """Read the thresholds of a Result's settings; () where its protocol chose none."""
    return tuple(Threshold(**values) for values in settings.get("chosen", {}).get(THRESHOLDS, ()))
