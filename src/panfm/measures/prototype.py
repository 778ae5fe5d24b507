"""Nearest prototype on frozen features (SimpleShot): one mean a class, nothing to fit and nothing to tune.

    train [N, D], labels [N], test [M, D]  ->  centred, length 1  ->  mean of each class  ->  probabilities [M, K]

Wang et al. 2019 (SimpleShot: revisiting nearest-neighbour classification for few-shot learning), its variant CL2N.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from panfm.errors import UserError

SHORTEST = 1e-12  # a feature at the training mean has no direction; it stays where it is


def predict_prototype(train: ArrayLike, labels: ArrayLike, test: ArrayLike, *, num_classes: int) -> NDArray[np.float64]:
    """Predict class probabilities [M, K] of `test` [M, D] from the class means of `train` [N, D] with `labels` [N].

    Features are centred on the training mean and brought to length 1; the scores are softmax(-squared distance to the
    class means), as if each class were a Gaussian of variance 1/2: good for ranking, not calibrated. A class without a
    training row has probability 0. Raises UserError if a feature is not finite or there is no training row.
    """
    train_array, label_array = np.asarray(train, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    test_array = np.asarray(test, dtype=np.float64)
    if len(train_array) == 0:
        raise UserError("prototypes need training rows; at least one labelled image is needed")
    assert label_array.shape == train_array.shape[:1]
    for name, array in (("training", train_array), ("test", test_array)):
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise UserError(f"{name} features of row {row} are not finite; compute the features again")
    mean = train_array.mean(axis=0)
    train_unit, test_unit = (_shorten(array - mean) for array in (train_array, test_array))
    present = np.unique(label_array)
    prototypes = np.stack([train_unit[label_array == label].mean(axis=0) for label in present])  # [K', D]
    # |x - c|^2 = |x|^2 - 2 x c + |c|^2, of which the first is the same for every class.
    logits = 2 * test_unit @ prototypes.T - (prototypes**2).sum(axis=1)
    scores = np.zeros((len(test_array), num_classes))
    scores[:, present] = softmax(logits, axis=1)
    return scores


def _shorten(array: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), SHORTEST))
