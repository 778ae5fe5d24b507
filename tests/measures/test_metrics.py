"""Metrics equal scikit-learn's to 1e-12, with weights and ties, and are None with a reason where they are undefined."""

import numpy as np
import pytest
from sklearn import metrics as sk

from panfm.errors import UserError
from panfm.measures.metrics import METRICS, compute_all_replicates, compute_metric, compute_replicates


def make_predictions(num_classes: int, seed: int, num_rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), generator.integers(0, num_classes, num_rows - num_classes)])
    scores = generator.normal(size=(num_rows, num_classes))
    scores[np.arange(num_rows), labels] += 0.7
    scores = np.exp(np.round(scores, 1))  # rounded: many rows tie
    return labels, scores / scores.sum(axis=1, keepdims=True)


def compute_with_sklearn(name: str, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> float:
    num_classes = scores.shape[1]
    classes = np.arange(num_classes)
    predicted = scores.argmax(axis=1)
    kept = {"sample_weight": weights}
    if name == "auroc":
        if num_classes == 2:
            return sk.roc_auc_score(labels, scores[:, 1], **kept)
        return sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro", **kept)
    if name == "auprc":
        target = labels if num_classes == 2 else np.eye(num_classes)[labels]
        return sk.average_precision_score(target, scores[:, 1] if num_classes == 2 else scores, **kept)
    if name == "balanced_accuracy":
        return sk.balanced_accuracy_score(labels, predicted, **kept)
    if name == "accuracy":
        return sk.accuracy_score(labels, predicted, **kept)
    if name in ("weighted_f1", "macro_f1"):
        average = name.removesuffix("_f1")
        return sk.f1_score(labels, predicted, labels=classes, average=average, zero_division=0, **kept)
    if name == "kappa":
        return sk.cohen_kappa_score(labels, predicted, **kept)
    if name == "brier":
        if num_classes == 2:
            return sk.brier_score_loss(labels, scores[:, 1], **kept)
        return float(np.average(((scores - np.eye(num_classes)[labels]) ** 2).sum(axis=1), weights=weights))
    if name == "log_loss":
        return sk.log_loss(labels, scores, labels=classes, **kept)
    if name == "partial_auroc_above_80_sensitivity":
        # Turned over, it is the part of the curve up to 20 % false positives; scikit-learn rescales that (McClish).
        rescaled = sk.roc_auc_score(1 - labels, -scores[:, 1], max_fpr=0.2, **kept)
        lowest = 0.2**2 / 2
        return float((lowest + (2 * rescaled - 1) * (0.2 - lowest)) / 0.2)
    assert name.startswith("sensitivity_at_")
    specificity = int(name.split("_")[2]) / 100
    false_rate, true_rate, _ = sk.roc_curve(labels, scores[:, 1], drop_intermediate=False, **kept)
    return float(true_rate[false_rate <= 1 - specificity + 1e-12].max())


EQUAL_TO_SKLEARN = [name for name in METRICS if name != "ece"]


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [(name, K) for name in EQUAL_TO_SKLEARN for K in (2, 3, 7) if K == 2 or not METRICS[name].binary_only],
)
def test_metric_equals_sklearn(name: str, num_classes: int) -> None:
    labels, scores = make_predictions(num_classes, seed=num_classes)
    generator = np.random.default_rng(1)
    weights = np.stack([generator.integers(0, 4, 200), generator.integers(1, 3, 200)]).astype(float)
    weights[1] += generator.random(200)
    assert compute_metric(name, labels, scores).value == pytest.approx(
        compute_with_sklearn(name, labels, scores, None), abs=1e-12, rel=0
    )
    replicates = compute_replicates(name, labels, scores, weights)
    expected = [compute_with_sklearn(name, labels, scores, row) for row in weights]
    np.testing.assert_allclose(replicates, expected, atol=1e-12, rtol=0)


def test_integer_weights_are_repeated_rows() -> None:
    labels, scores = make_predictions(4, seed=5)
    weights = np.random.default_rng(2).integers(0, 3, (1, 200))
    names = [name for name in METRICS if not METRICS[name].binary_only and name != "ece"]
    weighted = compute_all_replicates(names, labels, scores, weights.astype(np.uint16))
    for name in names:
        repeated = compute_metric(name, np.repeat(labels, weights[0]), np.repeat(scores, weights[0], axis=0)).value
        assert weighted[name][0] == pytest.approx(repeated, abs=1e-12)


def test_replicates_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = make_predictions(3, seed=6)
    weights = np.random.default_rng(3).integers(0, 3, (7, 200))
    names = ["auroc", "auprc", "kappa", "ece"]
    whole = compute_all_replicates(names, labels, scores, weights)
    monkeypatch.setattr("panfm.measures.metrics.MAX_CHUNK_VALUES", 2 * scores.size)
    chunked = compute_all_replicates(names, labels, scores, weights)
    for name in names:
        np.testing.assert_allclose(chunked[name], whole[name], atol=1e-14)


def test_calibration_error_by_hand() -> None:
    # 15 bins of two equal confidences; 0, 1 or 2 of two are right, so that neighbouring bins err in opposite directions
    # and only these 15 bins give this sum.
    confidence = np.repeat(np.linspace(0.1, 0.9, 15), 2)
    num_right = np.tile([0, 2, 1], 5)
    labels = np.stack([num_right >= 1, num_right == 2], axis=1).astype(int).ravel()
    scores = np.stack([1 - confidence, confidence], axis=1)
    expected = np.abs(np.linspace(0.1, 0.9, 15) - num_right / 2).mean()
    assert compute_metric("ece", labels, scores).value == pytest.approx(expected, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(30)  # tied confidences share a bin whatever the order of rows
    assert compute_metric("ece", labels[shuffled], scores[shuffled]).value == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_many_classes_looks_at_the_top_class() -> None:
    scores = np.tile([0.6, 0.3, 0.1], (20, 1))
    labels = np.array([0] * 15 + [1] * 5)  # one bin: confidence 0.6, right 0.75
    assert compute_metric("ece", labels, scores).value == pytest.approx(0.15, abs=1e-12)


def test_sensitivity_at_90_specificity_allows_exactly_one_of_ten() -> None:
    labels = np.array([0] * 10 + [1] * 4)
    score = np.array([0.9, *[0.1] * 9, 0.95, 0.5, 0.5, 0.05])
    scores = np.stack([1 - score, score], axis=1)
    assert compute_metric("sensitivity_at_90_specificity", labels, scores).value == 0.75
    assert compute_metric("sensitivity_at_95_specificity", labels, scores).value == 0.25


def test_partial_auroc_by_hand() -> None:
    # Five positives: above 80 % sensitivity only the lowest counts, and one of four negatives lies above it.
    labels = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0])
    score = np.linspace(0.9, 0.1, 9)
    scores = np.stack([1 - score, score], axis=1)
    assert compute_metric("partial_auroc_above_80_sensitivity", labels, scores).value == pytest.approx(0.75)
    score[4:6] = 0.5  # a tie counts half
    tied = np.stack([1 - score, score], axis=1)
    assert compute_metric("partial_auroc_above_80_sensitivity", labels, tied).value == pytest.approx(0.875)


@pytest.mark.parametrize("name", ["auroc", "auprc", "balanced_accuracy", "macro_f1"])
def test_absent_class_is_none_with_a_reason(name: str) -> None:
    labels, scores = make_predictions(3, seed=1)
    point = compute_metric(name, np.minimum(labels, 1), scores)
    assert point.value is None
    assert point.reason == "no test image of class 2"
    weights = np.ones((2, 200))
    weights[0, labels == 2] = 0  # this replicate did not draw class 2
    replicates = compute_replicates(name, labels, scores, weights)
    assert np.isnan(replicates[0]) and not np.isnan(replicates[1])


def test_absent_class_leaves_accuracy_and_weighted_f1_defined() -> None:
    labels, scores = make_predictions(3, seed=1)
    two = np.minimum(labels, 1)
    for name in ("accuracy", "weighted_f1"):
        expected = compute_with_sklearn(name, two, scores, None)
        assert compute_metric(name, two, scores).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "labels", "scores", "reason"),
    [
        ("auroc", [0, 0], [[0.5, 0.5], [0.2, 0.8]], "no test image of class 1"),
        ("sensitivity_at_90_specificity", [1, 1], [[0.5, 0.5], [0.2, 0.8]], "no test image of class 0"),
        ("kappa", [0, 0], [[0.9, 0.1], [0.8, 0.2]], "no test image of class 1"),
        ("auroc", [], np.zeros((0, 2)), "no test images"),
        ("sensitivity_at_90_specificity", [0, 1, 2], np.eye(3), "defined for two classes, the task has 3"),
        ("brier", [0, 1], [[2.0, -1.0], [0.0, 1.0]], "scores are not probabilities"),
        ("log_loss", [0, 1], [[3.0, 1.0], [0.0, 1.0]], "scores are not probabilities"),
    ],
)
def test_undefined_is_none_with_a_reason(name: str, labels: list[int], scores: list[list[float]], reason: str) -> None:
    point = compute_metric(name, labels, scores)
    assert point.value is None
    assert reason in str(point.reason)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "label of row 1 is 2"),
        ([0, np.nan], [[0.5, 0.5], [0.5, 0.5]], "label of row 1 is nan"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "scores of row 1"),
    ],
)
def test_bad_input_names_the_row(labels: list[float], scores: list[list[float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_metric("auroc", labels, scores)


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="known metrics: auroc"):
        compute_metric("auc", [0, 1], [[1, 0], [0, 1]])
