"""Subgroup tables: one threshold, counts always, figures where they suffice, and a test that keeps patients whole."""

import numpy as np
import pytest
from sklearn import metrics as sk

from panfm.errors import UserError
from panfm.measures.intervals import estimate_mean, estimate_proportion
from panfm.measures.subgroups import (
    MIN_SHOWN_GROUPS,
    _studentise,
    compare_confirmation,
    compare_subgroups,
    permute_groups,
)


def make_images(seed: int = 0, num_groups: int = 150) -> dict[str, np.ndarray]:
    """Patients with two images of one label; the level 'dark' loses sensitivity."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), 2)
    labels = np.repeat((rng.random(num_groups) < 0.5).astype(int), 2)
    levels = np.repeat(rng.choice(["light", "dark"], num_groups, p=[0.6, 0.4]), 2)
    logit = 3 * labels - 1.5 - 2.5 * ((levels == "dark") & (labels == 1)) + rng.normal(size=len(labels))
    return {"labels": labels, "probabilities": 1 / (1 + np.exp(-logit)), "groups": groups, "levels": levels}


def test_table_counts_and_measures_each_level_at_one_threshold() -> None:
    images = make_images()
    images["levels"] = np.where(np.arange(300) < 4, None, images["levels"].astype(object))
    site = ["face" if row % 4 else None for row in range(300)]
    table = compare_subgroups(
        **images, threshold=0.5, reference="light", seed=0, case_mix={"site": site}, num_replicates=200
    )
    assert (table.threshold, table.reference, table.num_unknown) == (0.5, "light", 4)
    light, dark = table.levels
    assert (light.level, dark.level) == ("light", "dark")
    called = images["probabilities"] >= 0.5
    for row in table.levels:
        inside = images["levels"] == row.level
        tn, fp, fn, tp = sk.confusion_matrix(images["labels"][inside], called[inside]).ravel()
        assert (row.num_positive, row.num_negative) == (tp + fn, tn + fp)
        assert 2 * row.num_positive_groups == row.num_positive
        assert row.prevalence == pytest.approx((tp + fn) / inside.sum())
        assert row.sensitivity.value == pytest.approx(tp / (tp + fn), abs=1e-12)
        assert row.specificity.value == pytest.approx(tn / (tn + fp), abs=1e-12)
        positives = inside & (images["labels"] == 1)
        assert row.sensitivity == estimate_proportion(called[positives], images["groups"][positives])
        gap = images["labels"][inside] - images["probabilities"][inside]
        assert row.calibration_gap == estimate_mean(gap, images["groups"][inside])
        assert row.calibration.slope.low < row.calibration.slope.value < row.calibration.slope.high
        assert row.case_mix["site"]["face"] == pytest.approx(
            np.mean([site[i] == "face" for i in np.flatnonzero(inside)])
        )
        assert sum(row.case_mix["site"].values()) == pytest.approx(1)
    assert light.sensitivity_difference is None
    found = dark.sensitivity_difference
    assert found.value == pytest.approx(dark.sensitivity.value - light.sensitivity.value)
    assert found.p_value < 0.01 <= 3 * found.p_value + 0.01 and found.p_adjusted == pytest.approx(3 * found.p_value)
    assert dark.specificity_difference.p_value > 0.05 < dark.specificity_difference.p_adjusted


def test_small_levels_are_counted_and_not_shown() -> None:
    images = make_images(1)
    rare = np.isin(images["groups"], np.unique(images["groups"])[: MIN_SHOWN_GROUPS - 2])
    images["levels"] = np.where(rare, "rare", images["levels"])
    table = compare_subgroups(**images, threshold=0.5, reference="light", seed=0, num_replicates=100)
    row = table.levels[-1]
    assert row.level == "rare" and row.num_positive + row.num_negative == rare.sum()
    for hidden in (row.sensitivity, row.specificity, row.calibration.slope, row.calibration_gap):
        assert hidden.value is None and f"at least {MIN_SHOWN_GROUPS} are needed" in str(hidden.reason)
    assert row.sensitivity_difference.value is None and row.sensitivity_difference.p_adjusted is None
    assert "rare: not shown" in str(row.sensitivity_difference.reason)


def test_level_without_positives_has_its_specificity() -> None:
    images = make_images(2)
    negative = (images["labels"] == 0) & (images["groups"] % 2 == 0)
    images["levels"] = np.where(negative, "follow-up", "histology")
    table = compare_subgroups(**images, threshold=0.5, reference="histology", seed=0, num_replicates=100)
    row = table.levels[1]
    assert row.specificity.value is not None and row.specificity_difference.p_value is not None
    assert row.num_positive == 0 and row.sensitivity.value is None and row.sensitivity_difference.value is None


def test_reference_must_occur() -> None:
    with pytest.raises(UserError, match="'other': no image has it; levels with images: dark, light"):
        compare_subgroups(**make_images(), threshold=0.5, reference="other", seed=0)


def test_permutation_is_by_whole_group_and_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    levels = np.arange(40) % 2 == 0
    values = (rng.random(40) < np.where(levels, 0.8, 0.45)).astype(float)
    single = permute_groups(values, np.arange(40), levels, generator=np.random.default_rng(1))
    copies = permute_groups(
        np.repeat(values, 5), np.repeat(np.arange(40), 5), np.repeat(levels, 5), generator=np.random.default_rng(1)
    )
    assert single == copies  # five copies of an image are no more evidence than one
    images = permute_groups(
        np.repeat(values, 5), np.arange(200), np.repeat(levels, 5), generator=np.random.default_rng(1)
    )
    assert images < single / 3
    assert permute_groups(levels, np.arange(40), levels, generator=np.random.default_rng(1)) < 0.002
    same = permute_groups(np.tile([1, 0], 20), np.arange(40), np.arange(40) < 20, generator=np.random.default_rng(1))
    assert same == 1.0


def test_permuted_statistic_is_the_difference_over_its_clustered_error() -> None:
    rng = np.random.default_rng(5)
    sizes = np.array([[3.0, 0, 2, 1, 0, 4], [0, 2, 1, 0, 5, 2]])  # of six groups, in the level and in the reference
    sums = np.floor(sizes * rng.random(sizes.shape) + 0.5)
    swapped = rng.random((4, 6)) < 0.5
    for found, row in zip(_studentise(sizes, sums, swapped), swapped, strict=True):
        means, variance = [], 0.0
        for side in (0, 1):
            n, s = (np.where(row, part[1 - side], part[side]) for part in (sizes, sums))
            n, s = n[n > 0], s[n > 0]
            means.append(s.sum() / n.sum())
            variance += len(n) / (len(n) - 1) * ((s - n * means[-1]) ** 2).sum() / n.sum() ** 2
        assert found == pytest.approx((means[0] - means[1]) / np.sqrt(variance + 1e-12), abs=1e-9)


def test_permutation_is_exact_on_a_small_case() -> None:
    # Four single groups, two in the level, right 2 of 2 against 0 of 2: two of the six choices are as extreme.
    p_value = permute_groups([1, 1, 0, 0], [0, 1, 2, 3], [True, True, False, False],
                             generator=np.random.default_rng(0), num_permutations=20_000)  # fmt: skip
    assert p_value == pytest.approx(2 / 6, abs=0.02)
    # Three patients with one image in each level swap within themselves: two of eight swaps are as extreme.
    p_value = permute_groups([1, 0] * 3, [0, 0, 1, 1, 2, 2], [True, False] * 3,
                             generator=np.random.default_rng(0), num_permutations=20_000)  # fmt: skip
    assert p_value == pytest.approx(2 / 8, abs=0.02)


def test_confirmation_types() -> None:
    images = make_images(3)
    scores = np.stack([1 - images["probabilities"], images["probabilities"]], axis=1)
    benign = images["labels"] == 0
    kind = np.where(benign & (images["groups"] % 3 == 0), "follow_up", "histopathology").astype(object)
    kind[:6] = None
    table = compare_confirmation(
        ["auroc", "accuracy"], images["labels"], scores, images["groups"], kind.tolist(), threshold=0.5, seed=0
    )
    proven = kind == "histopathology"
    assert table.histology["auroc"].value == pytest.approx(
        sk.roc_auc_score(images["labels"][proven], images["probabilities"][proven]), abs=1e-12
    )
    assert (table.num_histology, table.num_unknown) == (proven.sum(), 6)
    for name in ("follow_up", "histopathology"):
        rows = benign & (kind == name)
        assert table.num_negative[name] == rows.sum()
        assert table.specificity[name].value == pytest.approx((images["probabilities"][rows] < 0.5).mean())
    assert list(table.specificity) == ["follow_up", "histopathology"]
