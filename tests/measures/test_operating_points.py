"""Thresholds come from training scores alone; what the test reaches is counted, and equals scikit-learn's curve."""

import numpy as np
import pytest
from sklearn import metrics as sk

from panfm.errors import UserError
from panfm.measures.operating_points import (
    WANTED,
    Side,
    Threshold,
    choose_threshold,
    choose_thresholds,
    compute_decision_curve,
    measure_operating_point,
)


def make_scores(seed: int, num_images: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(num_images) < 0.3).astype(int)
    return labels, np.round(1 / (1 + np.exp(-2 * (labels - 0.5) - rng.normal(size=num_images))), 2)  # rounded: ties


@pytest.mark.parametrize(("side", "wanted"), WANTED)
def test_threshold_is_the_best_of_sklearns_curve(side: Side, wanted: float) -> None:
    labels, scores = make_scores(0)
    found = choose_threshold(labels, scores, side, wanted)
    false_rate, true_rate, thresholds = sk.roc_curve(labels, scores, drop_intermediate=False)
    if side == "sensitivity":
        enough = np.flatnonzero(true_rate >= wanted - 1e-12)[0]  # thresholds descend: the highest that suffices
        assert found.reached == pytest.approx(true_rate[enough])
    else:
        enough = np.flatnonzero(1 - false_rate >= wanted - 1e-12)[-1]
        assert found.reached == pytest.approx(1 - false_rate[enough])
    assert found.value == thresholds[enough]
    assert (found.side, found.wanted) == (side, wanted) and found.reached >= wanted


def test_nine_of_ten_are_exactly_90_percent() -> None:
    labels = np.array([1] * 10 + [0] * 10)
    scores = np.concatenate([np.arange(10) + 10, np.arange(10)]) / 20
    assert choose_threshold(labels, scores, "sensitivity", 0.9).value == 11 / 20
    assert choose_threshold(labels, scores, "sensitivity", 0.95).value == 10 / 20
    assert choose_threshold(labels, scores, "specificity", 0.9).value == 9 / 20
    above_all = choose_threshold(labels, -scores, "specificity", 0.95)  # the highest score is a negative
    assert above_all.value > 0 - 1e-9 and above_all.reached == 1.0


def test_operating_point_is_counted_on_the_test_images() -> None:
    labels, scores = make_scores(1)
    groups = np.arange(300) // 3
    point = measure_operating_point(Threshold("sensitivity", 0.9, 0.6, 0.91), labels, scores, groups)
    called = scores >= 0.6
    tn, fp, fn, tp = sk.confusion_matrix(labels, called).ravel()
    assert (point.num_positive, point.num_negative, point.num_called) == (tp + fn, tn + fp, tp + fp)
    assert point.prevalence == pytest.approx(labels.mean())
    assert point.sensitivity.value == pytest.approx(sk.recall_score(labels, called), abs=1e-12)
    assert point.specificity.value == pytest.approx(tn / (tn + fp), abs=1e-12)
    assert point.ppv.value == pytest.approx(sk.precision_score(labels, called), abs=1e-12)
    needed = point.number_needed_to_biopsy
    assert needed.value == pytest.approx((tp + fp) / tp)
    assert (needed.low, needed.high) == pytest.approx((1 / point.ppv.high, 1 / point.ppv.low))
    assert point.threshold.reached == 0.91  # what training reached stands beside it
    assert {point.sensitivity.method, point.ppv.method, needed.method} == {"wilson"}


def test_what_cannot_be_had_is_none_with_a_reason() -> None:
    assert choose_threshold([1, 1], [0.2, 0.8], "sensitivity", 0.9).reason == "no training image of class 0"
    thresholds = choose_thresholds([0, 0], [0.2, 0.8])
    point = measure_operating_point(thresholds[0], [0, 1], [0.2, 0.8], ["a", "b"])
    assert point.sensitivity.value is None and "no training image of class 1" in str(point.sensitivity.reason)
    nobody = measure_operating_point(Threshold("specificity", 0.9, 0.9, 1.0), [0, 1], [0.2, 0.8], ["a", "b"])
    assert nobody.ppv.reason == nobody.number_needed_to_biopsy.reason == "no test image is called positive"
    assert nobody.sensitivity.value == 0.0
    wrong = measure_operating_point(Threshold("specificity", 0.9, 0.1, 1.0), [0, 0], [0.2, 0.8], ["a", "b"])
    assert (wrong.ppv.value, wrong.number_needed_to_biopsy.value) == (0.0, None)
    assert wrong.sensitivity.reason == "no positive test image"


def test_bad_input_names_the_row() -> None:
    with pytest.raises(UserError, match="score of row 1 is nan"):
        choose_threshold([0, 1], [0.1, np.nan], "sensitivity", 0.9)
    with pytest.raises(UserError, match="label of row 1 is 2"):
        choose_threshold([0, 2], [0.1, 0.2], "sensitivity", 0.9)


def test_net_benefit_by_hand_and_its_interval() -> None:
    labels, scores = make_scores(2)
    groups = np.arange(300) // 2
    curve = compute_decision_curve(labels, scores, groups, seed=0, thresholds=[0.1, 0.4], num_replicates=500)
    for place, at in enumerate((0.1, 0.4)):
        true, false = ((scores >= at) & (labels == 1)).sum(), ((scores >= at) & (labels == 0)).sum()
        assert curve.net_benefit[place] == pytest.approx(true / 300 - false / 300 * at / (1 - at), abs=1e-12)
        assert curve.treat_all[place] == pytest.approx(labels.mean() - (1 - labels.mean()) * at / (1 - at), abs=1e-12)
        assert curve.low[place] < curve.net_benefit[place] < curve.high[place]
    twice = compute_decision_curve(
        np.repeat(labels, 2),
        np.repeat(scores, 2),
        np.repeat(groups, 2),
        seed=0,
        thresholds=[0.1, 0.4],
        num_replicates=500,
    )
    np.testing.assert_allclose(twice.low, curve.low, atol=1e-12)  # copies of images add nothing
    with pytest.raises(UserError, match="between 0 and 1"):
        compute_decision_curve(labels, scores, groups, seed=0, thresholds=[0.5, 1.0])
    one = compute_decision_curve(labels, scores, np.zeros(300), seed=0)
    assert one.low is None and "1 test group" in str(one.reason) and len(one.net_benefit) == 50
