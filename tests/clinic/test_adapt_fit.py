"""The statistics of `panfm adapt` on drawn features, where the truth is known: what is promised must hold."""

import numpy as np
import pytest

from panfm.clinic.figures import compute_figures
from panfm.clinic.fit import Fitted, fit_classifier, fit_modality_head, fit_temperature
from panfm.clinic.recipes import build_probe_recipe
from panfm.clinic.threshold import OperatingCard, Wanted, choose_operating_point, compute_predictive_values
from panfm.measures.probe import fit_probe
from panfm.progress import muted
from panfm_predict.classifier import compute_probabilities
from panfm_predict.outliers import compute_scores

CLASSES = ("benign", "malignant")
WANTED = Wanted("sensitivity", 0.9)


def draw(num_patients: int, seed: int, shift: float = 1.0, dims: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, D], labels [N], patients [N]: one or two images a patient, alike where they are of one patient."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_patients), rng.integers(1, 3, num_patients))
    labels = (rng.random(num_patients) < 0.4).astype(np.int64)[groups]
    features = rng.normal(size=(num_patients, dims))[groups] + 0.3 * rng.normal(size=(len(groups), dims))
    features[:, 0] += shift * labels
    return features, labels, groups


def fit(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, wanted: Wanted | None = WANTED) -> Fitted:
    with muted():
        return fit_classifier(
            build_probe_recipe(features, labels, groups, num_classes=2, seed=0),
            labels,
            groups,
            classes=CLASSES,
            positive="malignant",
            wanted=wanted,
            unit="patients",
            num_folds=5,
            seed=0,
        )


def test_features_without_any_signal_get_chance_figures() -> None:
    """Two images of a patient are nearly the same: folds that cut through patients would find them again."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 2)
    labels = rng.integers(0, 2, 60)[groups]
    features = rng.normal(size=(60, 80))[groups] + 0.01 * rng.normal(size=(120, 80))
    fitted = fit(features, labels, groups)
    figures = compute_figures(labels, groups, fitted.nested.probabilities, CLASSES, "malignant", seed=0)
    area = figures.overall["auroc"]
    assert area.low is not None and area.high is not None and area.low < 0.5 < area.high
    leaky = fit(features, labels, np.arange(120)).nested.probabilities
    assert compute_figures(labels, groups, leaky, CLASSES, None, seed=0).overall["auroc"].value > 0.8


def test_what_the_card_promises_holds_on_new_patients() -> None:
    """Mean over 8 fits of 120 patients: the promise is one of the mean; a plain quantile would miss it by 2 %."""
    new, truth, _ = draw(3000, 99)
    reached, promised, specific, alarms, gaps = [], [], [], [], []
    for seed in range(8):
        features, labels, groups = draw(120, seed)
        fitted = fit(features, labels, groups)
        card = fitted.card
        assert isinstance(card, OperatingCard) and card.sensitivity.value is not None
        assert card.sensitivity.value >= WANTED.target
        probability = compute_probabilities(fitted.learned.compute_logits(new), fitted.temperature)[:, 1]
        called = probability >= card.threshold
        reached.append(called[truth == 1].mean())
        promised.append(card.sensitivity.value)
        specific.append((~called[truth == 0]).mean() - card.specificity.value)
        gaps.append(probability.mean() - truth.mean())
        alarms.append(
            (compute_scores(fitted.learned.standardise(new), fitted.outliers) > fitted.outlier_threshold).mean()
        )
    assert abs(np.mean(reached) - np.mean(promised)) < 0.025
    assert abs(np.mean(specific)) < 0.05
    assert abs(np.mean(gaps)) < 0.04
    assert np.mean(alarms) < 0.02


def test_of_three_classes_the_positive_one_is_set_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 30, 30])
    features = 2 * np.eye(3)[labels] + rng.normal(size=(100, 3))
    groups = np.arange(100)
    with muted():
        fitted = fit_classifier(
            build_probe_recipe(features, labels, groups, num_classes=3, seed=0),
            labels,
            groups,
            classes=("a", "b", "c"),
            positive="b",
            wanted=Wanted("specificity", 0.8),
            unit="patients",
            num_folds=5,
            seed=0,
        )
    card = fitted.card
    assert isinstance(card, OperatingCard) and (card.num_positive, card.num_negative) == (30, 70)
    assert 0.8 <= card.specificity.value < 0.83 and card.sensitivity.value > 0.6
    figures = compute_figures(labels, groups, fitted.nested.probabilities, ("a", "b", "c"), "b", seed=0)
    assert figures.judged == "the probability of b" and figures.overall["auroc"].value > 0.8
    assert fitted.reference_probabilities.shape == (3, 101) and fitted.reference_quantiles.shape == (3, 101)


def test_temperature_brings_back_what_logits_were_multiplied_by() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3))
    labels = (compute_probabilities(logits, 1.0).cumsum(1) > rng.random((4000, 1))).argmax(1)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    sure = np.array([[9.0, -9.0], [-9.0, 9.0]] * 10)
    assert fit_temperature(sure, np.array([0, 1] * 10)) > 0.2  # all right: the prior keeps it from 0


@pytest.mark.parametrize(("num_positive", "num_negative"), [(19, 60), (60, 19)])
def test_below_twenty_patients_of_a_side_there_is_no_operating_point(num_positive: int, num_negative: int) -> None:
    labels = np.repeat([1, 0], [num_positive, num_negative])
    scores, groups = np.linspace(1, 0, len(labels)), np.arange(len(labels))
    said = choose_operating_point(labels, scores, groups, positive="melanoma", wanted=WANTED, unit="patients")
    which = "with" if num_positive == 19 else "without"
    assert said == f"19 patients {which} melanoma; at least 20 are needed"


def test_the_promise_is_made_for_the_next_patients() -> None:
    labels, scores, groups = np.repeat([1, 0], [20, 30]), np.linspace(1, 0, 50), np.arange(50)

    def choose(target: float, side: str = "sensitivity", of: np.ndarray = groups) -> OperatingCard | str:
        return choose_operating_point(
            labels, scores, of, positive="melanoma", wanted=Wanted(side, target), unit="patients"
        )

    card = choose(0.95)
    assert isinstance(card, OperatingCard)
    assert card.threshold == scores[19]  # the lowest of 20: the next one is above it 20 times in 21
    assert card.sensitivity.value == pytest.approx(20 / 21)
    assert card.sensitivity.low == pytest.approx(0.025 ** (1 / 20))  # of Beta(20, 1)
    assert card.num_positive == 20 and card.num_negative == 30
    assert "can be promised from 49 patients on" in choose(0.98)
    # Ten patients with two images each are not twenty, whatever the number of images.
    pairs = np.concatenate([np.repeat(np.arange(22), [1] * 18 + [1] * 2 + [0] * 2), np.arange(100, 130)])
    assert isinstance(choose(0.95, of=pairs), OperatingCard)
    card = choose(0.9, "specificity")
    assert isinstance(card, OperatingCard) and card.specificity.value >= 0.9 and card.sensitivity.value == 1


def test_images_of_one_patient_count_less_than_as_many_patients() -> None:
    labels = np.repeat([1, 0], [60, 60])
    scores = np.linspace(1, 0, 120)
    uneven = np.concatenate([np.repeat(np.arange(21), [40] + [1] * 20), 100 + np.arange(60)])  # one with 40 images
    said = choose_operating_point(
        labels, scores, uneven, positive="x", wanted=Wanted("sensitivity", 0.9), unit="patients"
    )
    assert isinstance(said, str) and "those with x count as 2.2" in said


def test_predictive_values_are_bayes() -> None:
    ppv, npv = compute_predictive_values(0.9, 0.8, 0.1)
    assert ppv == pytest.approx(0.09 / (0.09 + 0.18)) and npv == pytest.approx(0.72 / 0.73)
    assert compute_predictive_values(0.0, 1.0, 0.1)[0] is None


def test_a_feature_that_hardly_varied_makes_no_limit_of_thousands() -> None:
    """One image of a hundred woke a channel: the limit must not be that image's distance in units of nearly nothing."""
    features, labels, groups = draw(100, 3)
    features = np.hstack([features, 1e-4 * np.random.default_rng(0).normal(size=(len(features), 4))])
    features[0, -1] = 1.0
    fitted = fit(features, labels, groups, None)
    assert fitted.outlier_threshold < 20
    far = features.mean(axis=0) + 8 * np.eye(12)[2]
    assert compute_scores(fitted.learned.standardise(far[None]), fitted.outliers)[0] > 2
    with muted():
        probe = fit_probe(features, labels, num_classes=2, C=float(fitted.learned.chosen["C"]))
    np.testing.assert_allclose(
        compute_probabilities(fitted.learned.compute_logits(features), 1.0), probe.predict(features), atol=1e-3
    )


def test_the_modality_of_a_feature_is_told() -> None:
    features, labels, groups = draw(60, 0)
    fitted = fit(features, labels, groups, None)
    others = features + 6 * np.eye(8)[3]
    head = fit_modality_head(
        fitted.learned, groups, "dermoscopic", others, ["clinical"] * len(others), groups + 1000, seed=0
    )
    assert head.names == ("dermoscopic", "clinical")
    new, *_ = draw(200, 7)
    for shift, place in ((0, 0), (6, 1)):
        z = fitted.learned.standardise(new + shift * np.eye(8)[3])
        assert ((z @ head.weight.T + head.bias).argmax(1) == place).mean() > 0.95
    assert min(head.right) > 0.95


def test_figures_of_few_patients_are_not_shown() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [50, 40, 10])
    probabilities = rng.dirichlet(np.ones(3), 100)
    figures = compute_figures(labels, np.arange(100), probabilities, ("a", "b", "c"), None, seed=0)
    assert figures.classes[2].area.value is None and "at least 20" in figures.classes[2].recall.reason
    assert figures.classes[0].area.value is not None
    assert all(one.num_groups >= 20 for one in figures.bins) and len(figures.bins) == 5
    few = compute_figures(labels[40:59], np.arange(19), probabilities[40:59], ("a", "b", "c"), None, seed=0)
    assert all(estimate.value is None for estimate in few.overall.values()) and not few.bins
