"""The odd lesion of a person, the image of no known class: distances equal loops, nothing unknown trains."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from panfm.config import validate
from panfm.errors import UserError
from panfm.evaluation.out_of_distribution import (
    OutOfDistributionConfig,
    compute_energy,
    compute_kth_distance,
    compute_mahalanobis,
    compute_shrunk_covariance,
    score_out_of_distribution,
)
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.evaluation.ugly_duckling import (
    UglyDucklingConfig,
    build_people,
    compute_distances,
    score_ugly_duckling,
)
from panfm.measures.by_family import compute_point
from panfm.measures.outcomes import Outcome
from panfm.measures.probe import fit_probe
from panfm.shards.index import ShardSet
from tests.evaluation.lesion_archive import list_column, make_card, make_material, make_trial


def test_distances_are_to_the_other_lesions_of_the_person() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 4)) + 2
    lesions = np.array(["a", "a", "b", "c", "c", "c"])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for place, distance in enumerate(compute_distances(features, lesions)):
        others = unit[lesions != lesions[place]].mean(axis=0)
        assert distance == pytest.approx(1 - unit[place] @ others / np.linalg.norm(others), abs=1e-12)
    with pytest.raises(AssertionError, match="one lesion has no others"):
        compute_distances(features[:2], lesions[:2])


def test_a_planted_duckling_is_found(lesions: ShardSet) -> None:
    card = make_card("ugly_duckling", {"min_lesions": 2}, "recall_at_1", ignore=[])
    images = load_split(card, lesions)
    split = build_people(card, images, lesions)
    np.testing.assert_array_equal(split.rows, images.rows)
    # Two lesions are each other's other, so a third is planted: each image is a lesion of its own here.
    loose = lesions.table.set_column(
        lesions.table.schema.get_field_index("lesion_id"),
        "lesion_id",
        [[f"{row}" for row in range(len(lesions.table))]],
    )
    lone = type(lesions)(**{**vars(lesions), "table": loose})
    rng = np.random.default_rng(0)
    patients, diagnoses = (
        list_column(lesions, "patient_id"),
        [dict(v)["diagnosis"] for v in list_column(lesions, "labels")],
    )
    own = {patient: rng.normal(size=8) for patient in sorted(set(patients))}
    first = {patient: row for row, patient in reversed(list(enumerate(patients))) if diagnoses[row] == "melanoma"}
    features = np.stack([own[patient] + 0.1 * rng.normal(size=8) for patient in patients])
    for row in first.values():
        features[row] += 2 * rng.normal(size=8)
    material = make_material(lone, features)
    trial = make_trial(card, split, material, label_fraction=0)
    scored = score_ugly_duckling(trial, material, UglyDucklingConfig())
    assert ((scored.scores > 0) & (scored.scores < 1)).all()
    np.testing.assert_allclose(scored.scores.sum(axis=1), 1)
    planted = np.isin(split.rows[trial.test], list(first.values())).astype(np.int64)
    outcome = Outcome(planted, scored.scores, split.groups[trial.test], np.zeros((len(planted), 0)))
    recall = compute_point("ugly_duckling", "recall_at_1", outcome).value
    assert recall is not None and recall > 0.9


def test_people_with_too_few_lesions_are_left_out(lesions: ShardSet) -> None:
    card = make_card("ugly_duckling", {"min_lesions": 3}, "recall_at_1", ignore=[])
    images = load_split(card, lesions)
    with pytest.raises(UserError, match=r"none of 30 patients has 3 lesions .target.min_lesions; the most is 2."):
        build_people(card, images, lesions)  # six images a patient, of two lesions
    card = make_card("ugly_duckling", {"min_lesions": 2}, "recall_at_1", ignore=[])
    one = np.array(list_column(lesions, "lesion_id"))[images.rows] != list_column(lesions, "lesion_id")[images.rows[0]]
    fields = ("rows", "keys", "groups", "labels", "folds")
    thinned = type(images)(**{**vars(images), **{name: getattr(images, name)[one] for name in fields}})
    split = build_people(card, thinned, lesions)
    assert images.groups[0] not in set(split.groups) and len(np.unique(split.groups)) == 29
    assert split.notes[-1] == "3 images of 1 patients with fewer than 2 lesions" and split.hash != images.hash


def test_shrinkage_is_ledoit_and_wolfs() -> None:
    rng = np.random.default_rng(0)
    for shape in ((200, 12), (30, 60)):
        rows = rng.normal(size=shape) @ rng.normal(size=(shape[1], shape[1]))
        rows -= rows.mean(axis=0)
        covariance, shrinkage = compute_shrunk_covariance(rows)
        expected = LedoitWolf(assume_centered=True).fit(rows)
        assert shrinkage == pytest.approx(expected.shrinkage_, rel=1e-9) and 0 < shrinkage < 1
        np.testing.assert_allclose(covariance, expected.covariance_, rtol=1e-9, atol=1e-12)


def test_the_four_ways_equal_their_formulas() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 90)
    train, test = rng.normal(size=(90, 5)) + np.eye(5)[labels] * 2, rng.normal(size=(20, 5))
    distances, _ = compute_mahalanobis(train, labels, test)
    means = [train[labels == k].mean(axis=0) for k in range(3)]
    inverse = np.linalg.inv(LedoitWolf(assume_centered=True).fit(train - np.stack(means)[labels]).covariance_)
    expected = [min((row - mean) @ inverse @ (row - mean) for mean in means) for row in test]
    np.testing.assert_allclose(distances, expected, rtol=1e-8)
    unit = lambda values: values / np.linalg.norm(values, axis=1, keepdims=True)  # noqa: E731
    similarity = np.sort(unit(test) @ unit(train).T, axis=1)
    np.testing.assert_allclose(compute_kth_distance(train, test, 7), 1 - similarity[:, -7], atol=1e-12)
    np.testing.assert_allclose(compute_kth_distance(train, test, 500), 1 - similarity[:, 0], atol=1e-12)
    probe = fit_probe(train, labels, num_classes=3, C=1.0)
    logits = (test - probe.mean) / probe.scale @ probe.weight.T + probe.bias
    np.testing.assert_allclose(compute_energy(probe, test), -np.log(np.exp(logits).sum(axis=1)), rtol=1e-10)


@pytest.mark.parametrize("variant", ["max_probability", "energy", "mahalanobis", "relative_mahalanobis", "knn"])
def test_an_unknown_class_is_noticed_and_never_trains(lesions: ShardSet, variant: str) -> None:
    card = make_unknown_card()
    split = load_split(card, lesions)
    rng = np.random.default_rng(0)
    classes = np.array(list_column(lesions, "visit_day")) + (np.array(list_column(lesions, "modality")) == "clinical")
    # Known classes lie along two axes, the unknown one beyond neither: between them and to the side.
    centre = {0: [6.0, 0, 0], 90: [0, 6.0, 0], 1: [0.5, 0.5, -5.0]}
    features = np.stack([np.array(centre[int(value)]) for value in classes]) + 0.7 * rng.normal(size=(len(classes), 3))
    labels = np.array([{0: 0, 90: 1, 1: 2}[int(value)] for value in classes])[split.rows]
    split = type(split)(**{**vars(split), "labels": labels})
    material = make_material(lesions, features)
    trial = make_trial(card, split, material, variant)
    assert set(split.labels[trial.train]) == {0, 1} and set(split.labels[trial.test]) == {0, 1, 2}
    scored = score_out_of_distribution(trial, material, OutOfDistributionConfig())
    assert scored.scores.shape == (len(trial.test), 3) and np.isfinite(scored.scores).all()
    np.testing.assert_allclose(scored.scores[:, :2].sum(axis=1), 1, atol=1e-9)
    outcome = Outcome(split.labels[trial.test], scored.scores, split.groups[trial.test], np.zeros((len(trial.test), 0)))
    area = compute_point("out_of_distribution", "unknown_auroc", outcome).value
    assert area is not None and area > 0.9
    accuracy = compute_point("out_of_distribution", "accuracy", outcome).value
    assert accuracy is not None and accuracy > 0.95
    wrong = type(trial)(**{**vars(trial), "train": np.append(trial.train, trial.test[:3])})
    if (split.labels[wrong.train] == 2).any():
        with pytest.raises(AssertionError, match="an unknown class never trains"):
            score_out_of_distribution(wrong, material, OutOfDistributionConfig())
    assert validate(OutOfDistributionConfig, {}, where="test").k == 10


def make_unknown_card() -> TaskCard:
    return make_card(
        "out_of_distribution", {"unknown": ["wart"]}, "unknown_auroc", ignore=[], metrics=["unknown_auroc", "accuracy"]
    )
