"""Numbers and grades from frozen features: what is learned from, within which range, and that the order helps."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from panfm.encoder.load import load_encoder
from panfm.errors import UserError
from panfm.evaluation.families import read_numbers
from panfm.evaluation.linear_probe import LinearProbeConfig, score_linear_probe
from panfm.evaluation.protocol import Material, Trial, build_trial
from panfm.evaluation.protocols import PROTOCOLS
from panfm.evaluation.regression import OrdinalConfig, RegressionConfig, score_ordinal, score_regression
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.tasks import TaskCard, load_task
from panfm.measures.numbers import MEASURES_ORDINAL, MEASURES_REGRESSION
from panfm.measures.outcomes import Outcome
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]
BuildClinic = Callable[..., ShardSet]
COLUMNS = {"path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold", "age": "age"}
AGE = {
    "family": "regression", "label": None, "classes": [], "ignore": [], "metrics": list(MEASURES_REGRESSION),
    "primary_metric": "mean_absolute_error", "target": {"column": "age", "unit": "years", "low": 0, "high": 100},
}  # fmt: skip
GRADES = ["clear", "mild", "moderate", "severe"]


def grade(row: dict[str, str]) -> None:
    """The patient's number gives the age, 20 to 90, and the grade of one image after the other."""
    number = int(row["file"].removesuffix(".jpg"))
    row |= {"age": str(20 + 2 * (number // 2)), "diagnosis": GRADES[(number // 2 + number) % 4]}


def make_trial(card: TaskCard, split: Split, shard_set: ShardSet, protocol: str, fraction: float = 1.0) -> Trial:
    encoder = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=3, image_size=32, pooling="mean")
    return build_trial(
        card, split, encoder, shard_set, protocol=protocol, recipe={"variant": "default"}, evaluated_on="test",
        label_fraction=fraction, draw=0, seed=0, num_replicates=100,
    )  # type: ignore[arg-type]  # fmt: skip


def make_material(shard_set: ShardSet, features: np.ndarray) -> Material:
    return Material(features.astype(np.float32), load_encoder("timm:test_vit@random:0?image_size=32"), shard_set)


def load_ages(card: TaskCard, shard_set: ShardSet) -> Split:
    build_units = PROTOCOLS["regression"].build_units
    assert build_units is not None
    return build_units(card, load_split(card, shard_set), shard_set)


def test_numbers_outside_the_range_of_the_card_are_left_out(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    shard_set = build_clinic(grade, columns=COLUMNS)
    every = load_ages(make_task(**AGE), shard_set)
    narrow = {**AGE, "target": {"column": "age", "unit": "years", "low": 30, "high": 70}}
    kept = load_ages(make_task(**narrow), shard_set)
    assert every.targets.min() == 20 and every.targets.max() == 90
    assert kept.targets.min() == 30 and kept.targets.max() == 70
    inside = (every.targets[:, 0] >= 30) & (every.targets[:, 0] <= 70)
    assert kept.keys.tolist() == every.keys[inside].tolist() and kept.hash != every.hash
    assert kept.notes == (
        *every.notes,
        f"{(~inside).sum()} images whose age lies outside 30.0 to 70.0: errors of the source",
    )


def test_a_number_is_learned_within_its_range_and_no_test_number_is_seen(
    build_clinic: BuildClinic, make_task: MakeTask
) -> None:
    shard_set = build_clinic(grade, columns=COLUMNS)
    card = make_task(**AGE)
    split = load_ages(card, shard_set)
    rng = np.random.default_rng(0)
    ages = read_numbers(shard_set.table, "age")
    features = np.stack([ages / 10 + rng.normal(0, 0.3, 72), *rng.normal(0, 1, (2, 72))], axis=1)
    test = split.find("test")
    features[split.rows[test[0]], 0] = 1000  # as far out as no training image: clipped to what an age can be
    trial = make_trial(card, split, shard_set, "regression")
    scored = score_regression(trial, make_material(shard_set, features), RegressionConfig())
    assert scored.scores.shape == (24, 1) and scored.scores.max() == 100 and scored.chosen["num_clipped"] == 1
    outcome = Outcome(split.labels[test], scored.scores, split.groups[test], split.targets[test]).take(np.arange(1, 24))
    measure = MEASURES_REGRESSION["mean_absolute_error"]
    assert measure.compute(outcome, np.ones((1, 23)))[0] < 0.4 * measure.chance(outcome)
    hidden = split.targets.copy()
    hidden[test] = 1.0
    blind = make_trial(card, replace(split, targets=hidden), shard_set, "regression")
    np.testing.assert_array_equal(
        score_regression(blind, make_material(shard_set, features), RegressionConfig()).scores, scored.scores
    )
    assert set(scored.chosen) == {"C", "at_boundary", "num_folds", "num_clipped"} and scored.chosen["num_folds"] == 5


def test_half_of_the_patients_teach_half_of_the_numbers(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    shard_set = build_clinic(grade, columns=COLUMNS)
    card = make_task(**AGE)
    split = load_ages(card, shard_set)
    trial = make_trial(card, split, shard_set, "regression", fraction=0.5)
    assert len(trial.train) == 24 and len(np.unique(split.groups[trial.train])) == 12
    left_out = np.setdiff1d(split.find("train", "val"), trial.train)
    features = np.random.default_rng(0).normal(0, 1, (72, 3))
    first = score_regression(trial, make_material(shard_set, features), RegressionConfig()).scores
    features[split.rows[left_out]] = np.nan  # never looked at
    again = score_regression(trial, make_material(shard_set, features), RegressionConfig()).scores
    np.testing.assert_array_equal(first, again)


def test_equal_numbers_teach_nothing(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    shard_set = build_clinic(grade, columns=COLUMNS)
    card = make_task(**AGE)
    split = load_ages(card, shard_set)
    split = replace(split, targets=np.full_like(split.targets, 50))
    trial = make_trial(card, split, shard_set, "regression")
    with pytest.raises(UserError, match="targets of all 48 training rows are equal"):
        score_regression(trial, make_material(shard_set, np.zeros((72, 3))), RegressionConfig())


def test_grades_are_learned_in_their_order(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    shard_set = build_clinic(grade, columns=COLUMNS)
    card = make_task(
        family="ordinal", classes=GRADES, ignore=[], metrics=list(MEASURES_ORDINAL), primary_metric="quadratic_kappa"
    )
    split = load_split(card, shard_set)
    grades = np.empty(72)
    grades[split.rows] = split.labels
    rng = np.random.default_rng(1)
    features = np.stack([grades + rng.normal(0, 0.7, 72), *rng.normal(0, 1, (10, 72))], axis=1)
    material = make_material(shard_set, features)
    trial = make_trial(card, split, shard_set, "ordinal")
    scored = score_ordinal(trial, material, OrdinalConfig())
    np.testing.assert_allclose(scored.scores.sum(axis=1), 1)
    assert scored.chosen["converged"] and scored.chosen["num_folds"] == 5
    unordered = score_linear_probe(make_trial(card, split, shard_set, "linear_probe"), material.features[split.rows],
                                   LinearProbeConfig())  # fmt: skip
    kappas = []
    for scores in (scored.scores, unordered.scores):
        outcome = Outcome(split.labels[trial.test], scores, split.groups[trial.test], np.zeros((24, 0)))
        kappas.append(MEASURES_ORDINAL["quadratic_kappa"].compute(outcome, np.ones((1, 24)))[0])
    assert kappas[0] > 0.6 and kappas[0] >= kappas[1]


def test_the_drawn_grades_are_an_ordinal_task() -> None:
    card = load_task("synthetic_threat_dermoscopic")
    assert card.family == "ordinal" and card.classes == ("harmless", "locally_destructive", "can_spread")
    assert card.primary_metric in MEASURES_ORDINAL
