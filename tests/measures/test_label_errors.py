import numpy as np
import pytest

from panfm.measures.label_errors import compute_error_share, count_joint, find_label_errors


def draw(seed: int, share: float, num: int = 900) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True classes, labels of which a share is wrong, and probabilities of a good but not perfect model."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, num)
    labels = np.where(rng.random(num) < share, (truth + 1) % 3, truth)
    logits = rng.normal(size=(num, 3)) + 3.5 * np.eye(3)[truth]
    p = np.exp(logits)
    return truth, labels, p / p.sum(axis=1, keepdims=True)


def test_the_joint_is_that_of_the_definition_image_by_image() -> None:
    _, labels, p = draw(0, 0.1)
    labels[labels == 2] = 1  # a class that nothing is labelled
    found = find_label_errors(labels, p)
    thresholds = [p[labels == k, k].mean() if (labels == k).any() else np.inf for k in range(3)]
    joint = np.zeros((3, 3), dtype=int)
    suspects = []
    for place, (given, row) in enumerate(zip(labels, p, strict=True)):
        candidates = [k for k in range(3) if row[k] >= thresholds[k]]
        if candidates:
            best = max(candidates, key=lambda k: row[k])
            joint[given, best] += 1
            if best != given:
                margin = row[given] - max(row[k] for k in range(3) if k != given)
                suspects.append((margin, place))
    np.testing.assert_array_equal(found.joint, joint)
    assert found.suspects.tolist() == [place for _, place in sorted(suspects)]
    assert np.isnan(found.thresholds[2]) and found.joint[:, 2].sum() == 0
    scaled = [joint[k] / joint[k].sum() * (labels == k).sum() for k in range(2)]
    wrong = sum(row.sum() - row[k] for k, row in enumerate(scaled))
    assert found.error_share == pytest.approx(wrong / len(labels))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_flipped_labels_are_found_and_their_share_is_told(share: float) -> None:
    truth, labels, p = draw(1, share)
    found = find_label_errors(labels, p)
    assert found.error_share == pytest.approx(share, abs=0.04)
    flipped = np.flatnonzero(truth != labels)
    if share:
        assert len(np.intersect1d(found.suspects, flipped)) > 0.75 * len(flipped)
        first = found.suspects[: len(flipped) // 2]  # the least plausible first
        assert np.isin(first, flipped).mean() > 0.9


def test_weights_count_images_as_often_as_they_say() -> None:
    _, labels, p = draw(2, 0.1, num=60)
    found = find_label_errors(labels, p)
    weights = np.random.default_rng(0).integers(0, 4, (5, 60))
    joint = count_joint(labels, found.confident, 3, weights)
    for row, counted in zip(weights, joint, strict=True):
        again = np.zeros((3, 3))
        for place in np.repeat(np.arange(60), row):
            if found.confident[place] >= 0:
                again[labels[place], found.confident[place]] += 1
        np.testing.assert_array_equal(counted, again)
    assert compute_error_share(np.zeros((1, 2, 2)), np.array([[3.0, 0.0]]))[0] == 0
    assert np.isnan(compute_error_share(np.zeros((1, 2, 2)), np.zeros((1, 2)))[0])
