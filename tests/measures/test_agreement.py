"""Kappas equal scikit-learn's and the published example's, with readers missing and by patient."""

import numpy as np
import pytest
from sklearn import metrics as sk

from panfm.errors import UserError
from panfm.measures.agreement import (
    MISSING,
    Weighting,
    compute_cohen_kappa,
    compute_fleiss_kappa,
    measure_agreement,
)


def make_readings(seed: int, num_images: int = 120) -> np.ndarray:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, num_images)
    return np.stack(
        [np.where(rng.random(num_images) < 0.7, truth, rng.integers(0, 4, num_images)) for _ in range(3)], 1
    )


@pytest.mark.parametrize("weighting", ["none", "linear", "quadratic"])
def test_cohen_equals_sklearn(weighting: Weighting) -> None:
    readings = make_readings(0)
    weights = np.stack([np.ones(120), np.random.default_rng(1).integers(0, 3, 120)])
    found = compute_cohen_kappa(readings[:, 0], readings[:, 1], 4, weights, weighting)
    for value, row in zip(found, weights, strict=True):
        expected = sk.cohen_kappa_score(
            readings[:, 0],
            readings[:, 1],
            weights=None if weighting == "none" else weighting,
            sample_weight=row,
        )
        assert value == pytest.approx(expected, abs=1e-12)


def test_fleiss_equals_the_textbook_example() -> None:
    # Ten subjects, fourteen readers, five classes: the worked example that gives 0.210 (mean agreement 0.378).
    counts = np.array(
        [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
         [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    )  # fmt: skip
    readings = np.stack([np.repeat(np.arange(5), row) for row in counts])
    assert compute_fleiss_kappa(readings, 5, np.ones((1, 10)))[0] == pytest.approx(0.210, abs=5e-4)


def test_fleiss_of_two_readers_by_hand() -> None:
    # They agree on three of four images; their eight readings are 3 x 0 and 5 x 1. The fifth image has one reader.
    readings = np.array([[0, 0], [1, 1], [0, 1], [1, 1], [0, MISSING]])
    chance = (3 / 8) ** 2 + (5 / 8) ** 2
    assert compute_fleiss_kappa(readings, 2, np.ones((1, 5)))[0] == pytest.approx((0.75 - chance) / (1 - chance))


def test_integer_weights_are_repeated_images_and_lone_readings_are_left_out() -> None:
    readings = make_readings(2)
    readings[:30, 2] = MISSING
    readings[:10, 1] = MISSING  # one reading alone
    weights = np.random.default_rng(0).integers(0, 3, 120)
    value = compute_fleiss_kappa(readings, 4, weights[None])[0]
    assert value == pytest.approx(
        compute_fleiss_kappa(np.repeat(readings, weights, axis=0), 4, np.ones((1, weights.sum())))[0], abs=1e-12
    )
    assert compute_fleiss_kappa(readings, 4, np.ones((1, 120)))[0] == pytest.approx(
        compute_fleiss_kappa(readings[10:], 4, np.ones((1, 110)))[0], abs=1e-12
    )


def test_agreement_of_all_readers_and_of_pairs_by_patient() -> None:
    readings = make_readings(3)
    readings[:30, 2] = MISSING
    found = measure_agreement(readings, np.arange(120) // 2, 4, seed=0, num_replicates=300)
    assert (found.num_images, found.num_readings) == (120, 330)
    assert [(pair.reader_a, pair.reader_b, pair.num_images) for pair in found.pairs] == [
        (0, 1, 120),
        (0, 2, 90),
        (1, 2, 90),
    ]
    assert found.pairs[1].kappa.value == pytest.approx(sk.cohen_kappa_score(readings[30:, 0], readings[30:, 2]))
    for estimate in (found.fleiss, *(pair.kappa for pair in found.pairs)):
        assert estimate.low < estimate.value < estimate.high
    assert found.fleiss.reason is None and found.pairs[0].kappa.reason is None
    assert "45 groups with two readings" in str(found.pairs[1].kappa.reason)
    twice = measure_agreement(np.repeat(readings, 2, axis=0), np.arange(240) // 4, 4, seed=0, num_replicates=300)
    assert (twice.fleiss.low, twice.fleiss.high) == pytest.approx((found.fleiss.low, found.fleiss.high))


def test_what_cannot_be_had_is_none_with_a_reason() -> None:
    same = measure_agreement(np.zeros((40, 2), int), np.arange(40), 2, seed=0, num_replicates=10)
    assert same.fleiss.value is None and "one single class" in str(same.fleiss.reason)
    alone = measure_agreement([[0, MISSING], [MISSING, 1]], [0, 1], 2, seed=0, num_replicates=10)
    assert alone.fleiss.reason == alone.pairs[0].kappa.reason == "no image with two readings"
    with pytest.raises(UserError, match="reading of row 1 by reader 0 is 2"):
        measure_agreement([[0, 1], [2, 1]], [0, 1], 2, seed=0)
    with pytest.raises(UserError, match="1 reader"):
        measure_agreement([[0], [1]], [0, 1], 2, seed=0)
