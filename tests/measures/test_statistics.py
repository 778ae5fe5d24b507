"""The patient-clustered bootstrap: weights by group, intervals that cover, paired comparison on shared replicates."""

import numpy as np
import pytest

from panfm.measures.intervals import MIN_AREA_GROUPS, Estimate
from panfm.measures.metrics import compute_metric
from panfm.measures.statistics import (
    FEW_AREA_GROUPS,
    FEW_GROUPS,
    compare_paired,
    compute_bootstrap_seed,
    compute_interval,
    count_rarer_groups,
    draw_group_weights,
    estimate_metrics,
)


def make_clustered(num_groups: int, seed: int, per_group: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of a patient share their label and most of the score's noise: the case that image bootstraps get wrong."""
    generator = np.random.default_rng(seed)
    group_label = (generator.random(num_groups) < 0.5).astype(int)
    group_label[:2] = [0, 1]
    shift = group_label + generator.normal(size=num_groups)
    score = np.repeat(shift, per_group) + 0.3 * generator.normal(size=num_groups * per_group)
    positive = 1 / (1 + np.exp(-score))
    groups = np.repeat([f"p{number}" for number in range(num_groups)], per_group)
    return np.repeat(group_label, per_group), np.stack([1 - positive, positive], axis=1), groups


def test_whole_groups_are_drawn() -> None:
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    weights = draw_group_weights(groups, 500, seed=3)
    assert weights.shape == (500, 6)
    for name in "abc":
        rows = weights[:, groups == name]
        assert (rows == rows[:, :1]).all()
    assert (weights[:, [1, 0, 3]].sum(axis=1) == 3).all()  # as many draws as groups
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.15)
    assert not (weights == weights[0]).all()


def test_weights_do_not_depend_on_the_order_of_rows() -> None:
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    order = np.array([5, 3, 1, 0, 2, 4])
    np.testing.assert_array_equal(
        draw_group_weights(groups[order], 50, seed=1), draw_group_weights(groups, 50, seed=1)[:, order]
    )


def test_seed_depends_on_task_and_split_and_stays() -> None:
    seed = compute_bootstrap_seed("ham10000", "abc")
    assert seed == 3804631921573185456
    assert len({seed, compute_bootstrap_seed("ham10000", "abd"), compute_bootstrap_seed("ham1000", "0abc")}) == 3
    assert 0 <= seed < 2**63


def test_point_is_of_all_data_and_interval_holds_it() -> None:
    labels, scores, groups = make_clustered(60, seed=0)
    estimate = estimate_metrics(["auroc", "accuracy"], labels, scores, groups, seed=7)["auroc"]
    assert estimate.value == compute_metric("auroc", labels, scores).value
    assert estimate.low is not None and estimate.high is not None and estimate.value is not None
    assert estimate.low < estimate.value < estimate.high
    # The standard error of an AUROC of independent patients (Hanley and McNeil) is near the interval's quarter width.
    positives, negatives = len(set(groups[labels == 1])), len(set(groups[labels == 0]))
    area = estimate.value
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    expected = 2 * 1.96 * np.sqrt(variance / (positives * negatives))
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.2)


def test_interval_covers_under_clustering_and_image_bootstrap_does_not() -> None:
    truth = compute_metric("auroc", *make_clustered(40_000, seed=999)[:2]).value
    assert truth == pytest.approx(0.75, abs=0.02)
    covered = covered_by_images = 0
    num_trials = 150
    for trial in range(num_trials):
        labels, scores, groups = make_clustered(80, seed=trial, per_group=3)
        by_patient = estimate_metrics(["auroc"], labels, scores, groups, seed=trial, num_replicates=400)["auroc"]
        images = np.arange(len(labels)).astype(str)
        by_image = estimate_metrics(["auroc"], labels, scores, images, seed=trial, num_replicates=400)["auroc"]
        covered += by_patient.low <= truth <= by_patient.high
        covered_by_images += by_image.low <= truth <= by_image.high
    # Binomial(150, 0.95) lies in 131 .. 150 with probability 0.999; the image bootstrap has half the width.
    assert 131 <= covered <= 149
    assert covered_by_images < 120


def test_undefined_replicates_are_counted_and_too_many_leave_no_interval() -> None:
    labels = np.array([1] + [0] * 19)
    scores = np.stack([1 - np.linspace(0.9, 0.1, 20), np.linspace(0.9, 0.1, 20)], axis=1)
    groups = np.arange(20).astype(str)
    estimate = estimate_metrics(["auprc", "brier"], labels, scores, groups, seed=1)
    assert estimate["auprc"].value == 1.0
    assert estimate["auprc"].low is None and estimate["auprc"].high is None and estimate["auprc"].method is None
    assert estimate["auprc"].num_undefined == pytest.approx(2000 * (1 - 1 / 20) ** 20, rel=0.1)
    assert "undefined in" in str(estimate["auprc"].reason)
    assert estimate["brier"].low is not None and estimate["brier"].num_undefined == 0


def test_the_number_of_groups_in_the_rarer_class_decides_the_method() -> None:
    labels, scores, groups = make_clustered(400, seed=2)
    positives, negatives = (np.unique(groups[labels == k]) for k in (1, 0))
    assert min(len(positives), len(negatives)) > FEW_AREA_GROUPS

    def estimate(num_positive: int, num_negative: int = 60) -> dict[str, Estimate]:
        kept = np.isin(groups, np.concatenate([positives[:num_positive], negatives[:num_negative]]))
        names = ["auroc", "accuracy", "kappa", "ece", "auprc"]
        return estimate_metrics(names, labels[kept], scores[kept], groups[kept], seed=0, num_replicates=500)

    many, few, fewer = estimate(FEW_GROUPS), estimate(FEW_GROUPS - 1), estimate(MIN_AREA_GROUPS - 1)
    assert [many[name].method for name in many] == ["delong_logit", "bootstrap", "bootstrap", None, "bootstrap"]
    assert [few[name].method for name in few] == ["delong_logit", "wilson", "bootstrap", None, "bootstrap"]
    assert many["kappa"].reason is None and few["auroc"].reason is None and few["accuracy"].reason is None
    assert f"{FEW_GROUPS - 1} groups in the rarer class" in str(few["kappa"].reason) and few["kappa"].low is not None
    assert "shown to cover from 100 on" in str(many["auprc"].reason) and many["auprc"].low is not None
    assert "outside its declared regime" in str(fewer["auroc"].reason)
    assert (few["accuracy"].low, few["accuracy"].high) == pytest.approx(  # another method, and little else
        (many["accuracy"].low, many["accuracy"].high), abs=0.06
    )
    below, above = estimate(FEW_AREA_GROUPS - 1, 300)["auroc"], estimate(FEW_AREA_GROUPS, 300)["auroc"]
    assert (below.method, above.method) == ("delong_logit", "bootstrap")
    assert (below.low, below.high) == pytest.approx((above.low, above.high), abs=0.03)
    assert many["ece"].value is not None and many["ece"].low is None and "sit too high" in str(many["ece"].reason)


def test_one_group_has_a_value_and_no_interval() -> None:
    estimate = estimate_metrics(["accuracy"], [0, 1], [[0.9, 0.1], [0.8, 0.2]], ["p", "p"], seed=0)["accuracy"]
    assert (estimate.value, estimate.low) == (0.5, None)
    assert "1 test group" in str(estimate.reason)


def test_undefined_value_keeps_its_reason() -> None:
    estimate = estimate_metrics(["auroc"], [0, 0], [[0.9, 0.1], [0.8, 0.2]], ["p", "q"], seed=0)["auroc"]
    assert (estimate.value, estimate.low, estimate.reason) == (None, None, "no test image of class 1")


def test_interval_is_the_percentiles() -> None:
    interval = compute_interval(np.append(np.arange(1001) / 1000, np.nan), num_groups=5)
    assert (interval.low, interval.high, interval.num_undefined) == (pytest.approx(0.025), pytest.approx(0.975), 1)


def test_paired_difference_is_antisymmetric_and_narrower_than_unpaired() -> None:
    labels, scores, groups = make_clustered(80, seed=4)
    noise = np.random.default_rng(0).normal(scale=0.5, size=len(labels))
    logit = np.log(scores[:, 1] / scores[:, 0]) + noise
    worse = np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit))], axis=1)
    ours = compare_paired("auroc", labels, scores, worse, groups, seed=5)
    theirs = compare_paired("auroc", labels, worse, scores, groups, seed=5)
    expected = compute_metric("auroc", labels, scores).value - compute_metric("auroc", labels, worse).value
    assert ours.difference == pytest.approx(expected) and theirs.difference == pytest.approx(-expected)
    assert ours.low == pytest.approx(-theirs.high) and ours.high == pytest.approx(-theirs.low)
    single = estimate_metrics(["auroc"], labels, scores, groups, seed=5)["auroc"]
    assert ours.high - ours.low < 0.6 * (single.high - single.low)


def test_same_scores_differ_by_exactly_nothing() -> None:
    labels, scores, groups = make_clustered(30, seed=4)
    same = compare_paired("auroc", labels, scores, scores, groups, seed=5)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_rarer_class_is_counted_in_groups() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0])
    groups = np.array(["a", "a", "b", "c", "d", "e"])
    assert count_rarer_groups(labels, groups) == 2
