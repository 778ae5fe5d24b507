"""Nearest neighbours on frozen features: the probe without anything to fit or to tune.

    train [N, D], labels [N], test [M, D]  ->  k most similar training rows  ->  probabilities [M, K]

Cosine similarity; the k neighbours vote with weights softmax(similarity / temperature), as in Wu et al. 2018
(Unsupervised Feature Learning via Non-Parametric Instance Discrimination) and in DINO's evaluation.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.errors import UserError

CHUNK_VALUES = 8_000_000  # similarities held at once: 64 MB in float64


def predict_knn(
    train: ArrayLike, labels: ArrayLike, test: ArrayLike, *, num_classes: int, k: int = 20, temperature: float = 0.07
) -> NDArray[np.float64]:
    """Predict class probabilities [M, K] of `test` [M, D] from the k nearest of `train` [N, D] with `labels` [N].

    k is clamped to N. A row of zeros is equally far from everything. Similarities are computed in the features' own
    precision. Raises UserError if a feature is not finite or there is no training row.
    """
    train_unit, test_unit = _normalise("training", train), _normalise("test", test)
    label_array = np.asarray(labels, dtype=np.int64)
    if len(train_unit) == 0:
        raise UserError("kNN has no training rows; at least one labelled image is needed")
    assert len(label_array) == len(train_unit) and k >= 1 and temperature > 0
    k = min(k, len(train_unit))
    probabilities = np.zeros((len(test_unit), num_classes))
    chunk = max(1, CHUNK_VALUES // len(train_unit))
    for start in range(0, len(test_unit), chunk):
        similarities = test_unit[start : start + chunk] @ train_unit.T  # [m, N]
        nearest = np.argpartition(-similarities, k - 1, axis=1)[:, :k]  # [m, k]
        logits = np.take_along_axis(similarities, nearest, axis=1).astype(np.float64) / temperature
        votes = np.exp(logits - logits.max(axis=1, keepdims=True))
        votes /= votes.sum(axis=1, keepdims=True)
        rows = np.arange(start, start + len(nearest))[:, None]
        np.add.at(probabilities, (rows, label_array[nearest]), votes)
    return probabilities


def _normalise(name: str, features: ArrayLike) -> NDArray[np.floating]:
    array = np.asarray(features)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise UserError(f"{name} features of row {row} are not finite; compute the features again")
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    return np.asarray(array / np.maximum(norms, 1e-12))
