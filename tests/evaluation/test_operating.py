"""Thresholds come from scores of classifiers that did not see the image's patient, and survive the way to the board."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from panfm.evaluation.operating import describe_thresholds, read_thresholds
from panfm.measures.operating_points import WANTED, choose_thresholds
from panfm.measures.probe import fit_probe_cv, make_group_folds


def draw_training(num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(0, num_classes, 150)
    return rng.normal(size=(150, 12)) + 0.8 * np.eye(12)[labels], labels, np.arange(150) // 2


@pytest.mark.parametrize("num_classes", [2, 3])
def test_held_out_scores_are_those_of_the_other_folds(num_classes: int) -> None:
    features, labels, groups = draw_training(num_classes)
    fit = fit_probe_cv(features, labels, groups, num_classes=num_classes + 1, seed=4)
    folds = make_group_folds(labels, groups, 5, seed=4)
    scaled = StandardScaler().fit_transform(features)
    expected = np.zeros((150, num_classes + 1))  # the last class has no image
    for fold in range(5):
        inside = folds == fold
        peer = LogisticRegression(C=fit.C, tol=1e-8, max_iter=2000).fit(scaled[~inside], labels[~inside])
        expected[inside, :num_classes] = peer.predict_proba(scaled[inside])
    np.testing.assert_allclose(fit.held_out, expected, atol=5e-3)
    loss = -np.log(fit.held_out[np.arange(150), labels]).mean()
    assert loss == pytest.approx(fit.log_losses[fit.C], rel=1e-9)


def test_thresholds_come_back_as_they_were_chosen() -> None:
    features, labels, groups = draw_training(2)
    fit = fit_probe_cv(features, labels, groups, num_classes=2, seed=4)
    chosen = json.loads(json.dumps(describe_thresholds(labels, fit.held_out)))
    found = read_thresholds({"chosen": {"C": 1.0, **chosen}})
    assert [(one.side, one.wanted) for one in found] == list(WANTED)
    assert found == choose_thresholds(labels, fit.held_out[:, 1].astype(np.float32))
    assert all(one.reached >= one.wanted for one in found)


def test_no_thresholds_without_folds_or_for_several_classes() -> None:
    features, labels, groups = draw_training(3)
    assert describe_thresholds(labels, fit_probe_cv(features, labels, groups, num_classes=3, seed=0).held_out) == {}
    alone = fit_probe_cv(features, labels, labels, num_classes=3, seed=0)  # a group a class: no folds
    assert alone.held_out is None and describe_thresholds(labels, alone.held_out) == {}
    assert read_thresholds({}) == () and read_thresholds({"chosen": {"C": 1.0}}) == ()
