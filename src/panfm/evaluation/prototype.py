"""Protocol `prototype`: the nearest class mean of frozen features (SimpleShot); what a handful of labels can do.

features [N, D] of the labelled images, [M, D] of the scored ones  ->  distances to class means  ->  scores [M, K]
"""

import numpy as np
from numpy.typing import NDArray

from panfm.config import config_class
from panfm.evaluation.protocol import Scored, Trial
from panfm.measures.prototype import predict_prototype


@config_class
class PrototypeConfig:
    """Settings of the prototypes."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""


def score_prototype(trial: Trial, features: NDArray[np.float32], config: PrototypeConfig) -> Scored:
    """Return probabilities for the trial's test part. features: [N, D] of all images of the split, in its order."""
    labels = trial.split.labels[trial.train]
    scores = predict_prototype(features[trial.train], labels, features[trial.test], num_classes=trial.num_classes)
    return Scored(scores=scores)
