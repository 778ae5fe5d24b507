"""The nearest class mean against its definition, one image at a time; corners."""

import numpy as np
import pytest

from panfm.errors import UserError
from panfm.measures.prototype import predict_prototype


def test_scores_are_the_softmax_of_minus_squared_distances_to_the_class_means() -> None:
    rng = np.random.default_rng(0)
    train, test, labels = (
        rng.normal(size=(9, 4)) + 3,
        rng.normal(size=(5, 4)) + 3,
        np.array([0, 0, 2, 2, 2, 0, 2, 0, 2]),
    )
    scores = predict_prototype(train, labels, test, num_classes=4)
    mean = train.mean(axis=0)
    unit = [(row - mean) / np.linalg.norm(row - mean) for row in train]
    prototypes = {
        label: np.mean([u for u, own in zip(unit, labels, strict=True) if own == label], axis=0) for label in (0, 2)
    }
    for row, found in zip(test, scores, strict=True):
        x = (row - mean) / np.linalg.norm(row - mean)
        weights = {label: np.exp(-((x - prototype) ** 2).sum()) for label, prototype in prototypes.items()}
        expected = [weights.get(label, 0.0) / sum(weights.values()) for label in range(4)]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_one_label_a_class_and_an_image_at_the_mean_are_fine() -> None:
    train = np.array([[0.0, 1.0], [0.0, -1.0]])
    scores = predict_prototype(train, [0, 1], [[0.0, 5.0], [0.0, 0.0]], num_classes=2)
    assert scores[0, 0] > 0.9
    np.testing.assert_allclose(scores[1], 0.5)


def test_what_cannot_be_scored_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="at least one labelled image"):
        predict_prototype(np.zeros((0, 3)), [], np.zeros((1, 3)), num_classes=2)
    with pytest.raises(UserError, match="test features of row 1 are not finite"):
        predict_prototype(np.eye(2), [0, 1], [[0.0, 1.0], [np.inf, 1.0]], num_classes=2)
