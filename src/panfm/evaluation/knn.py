"""Protocol `knn`: weighted nearest neighbours by cosine similarity of frozen features; nothing is fitted.

    features [N, D] of the labelled images, [M, D] of the scored ones -> votes exp(similarity / T) -> scores [M, K]

k is fixed in advance (20, or all labelled images where there are fewer): nobody picks the best k on the test set.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.evaluation.protocol import Scored, Trial
from panfm.measures.knn import predict_knn


@config_class
class KnnConfig:
    """Settings of the nearest neighbours."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""
    k: int = Field(default=20, ge=1)
    """Neighbours that vote."""
    temperature: float = Field(default=0.07, gt=0)
    """Weight of a vote = exp(cosine similarity / temperature), as in DINO."""


def score_knn(trial: Trial, features: NDArray[np.float32], config: KnnConfig) -> Scored:
    """Return probabilities for the trial's test part. features: [N, D] of all images of the split, in its order."""
    k = min(config.k, len(trial.train))
    scores = predict_knn(
        features[trial.train],
        trial.split.labels[trial.train],
        features[trial.test],
        num_classes=trial.num_classes,
        k=k,
        temperature=config.temperature,
    )
    return Scored(scores=np.asarray(scores, dtype=np.float64), chosen={"k": k})
