"""Survival: one row a patient from its first visit, the model's baselines beside it, and no test label ever seen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from panfm.config import validate
from panfm.encoder.load import load_encoder
from panfm.errors import UserError
from panfm.evaluation.protocol import Material, Scored, Trial, build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.survival import SurvivalConfig, build_patients, choose_days, score_survival
from panfm.evaluation.tasks import TaskCard
from panfm.measures.outcomes import Outcome
from panfm.measures.survival import MEASURES, compute_event_free
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]
BuildClinic = Callable[..., ShardSet]
COLUMNS = {
    "path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold", "age": "age",
    "visit_day": "visit", "event": "event", "follow_up_days": "days",
}  # fmt: skip
CARD = {
    "family": "survival", "label": None, "classes": [], "ignore": [], "metrics": list(MEASURES),
    "primary_metric": "uno_c", "target": {"outcome": "recurrence", "time_zero": "first visit"},
}  # fmt: skip


def follow(row: dict[str, str]) -> None:
    """Each patient was seen on day 0 and on day 90; the event comes early where the patient's number is a small one."""
    number = int(row["file"].removesuffix(".jpg"))
    patient, image = number // 2, number % 2
    days = 200 + 40 * patient
    row |= {
        "visit": str(90 * image), "days": str(days - 90 * image), "event": str(patient % 3 != 1).lower(),
        "age": str(90 - patient) if patient % 5 else "",
    }  # fmt: skip


@pytest.fixture
def followed(build_clinic: BuildClinic) -> ShardSet:
    return build_clinic(follow, columns=COLUMNS)


def make_trial(card: TaskCard, split: Split, shard_set: ShardSet, variant: str = "cox", **changes: Any) -> Trial:
    encoder = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=3, image_size=32, pooling="mean")
    values = {"label_fraction": 1.0, "draw": 0, "evaluated_on": "test", **changes}
    return build_trial(
        card, split, encoder, shard_set, protocol="survival", recipe={"variant": variant}, seed=0, num_replicates=100,
        unit="patient", **values,
    )  # fmt: skip


def make_material(shard_set: ShardSet, features: np.ndarray) -> Material:
    return Material(features.astype(np.float32), load_encoder("timm:test_vit@random:0?image_size=32"), shard_set)


def draw_features(shard_set: ShardSet, seed: int = 0) -> np.ndarray:
    """One feature in which the days to the event show, for each row of the shard set, and two of noise."""
    rng = np.random.default_rng(seed)
    table = shard_set.table
    days = np.array(table.column("follow_up_days").to_pylist()) + np.array(table.column("visit_day").to_pylist())
    return np.stack([-days / 300 + rng.normal(0, 0.3, len(days)), *rng.normal(0, 1, (2, len(days)))], axis=1)


def measure(trial: Trial, scored: Scored) -> dict[str, float]:
    split, test = trial.split, trial.test
    outcome = Outcome(split.labels[test], scored.scores, split.groups[test], split.targets[test], np.array(scored.grid))
    return {name: float(measure.compute(outcome, np.ones((1, len(test))))[0]) for name, measure in MEASURES.items()}


def test_a_patient_is_one_row_of_the_images_of_the_first_visit(followed: ShardSet, make_task: MakeTask) -> None:
    card = make_task(**CARD)
    images = load_split(card, followed)
    split = build_patients(card, images, followed)
    assert len(images.keys) == 72 and len(split.keys) == 36 == len(set(split.keys)) == len(set(split.groups))
    assert list(split.keys) == sorted(split.keys) and split.hash != images.hash
    assert "36 images of later visits, which were not there at time zero" in split.notes
    visits = followed.table.column("visit_day").to_pylist()
    keys = followed.table.column("key").to_pylist()
    for rows, row, key, group in zip(split.members, split.rows, split.keys, split.groups, strict=True):
        assert [visits[number] for number in rows] == [0] and rows[0] == row and keys[row] == key
        assert images.groups[images.rows == row] == [group]
    assert sorted(split.targets[:, 0]) == [200 + 40 * patient for patient in range(36)]
    assert (split.targets[:, 1] == 1).sum() == 24 and (split.labels == 0).all()
    assert split.compute_data_hash(followed) != images.compute_data_hash(followed)
    assert {fold: len(split.find(fold)) for fold in ("train", "val", "test")} == {"train": 18, "val": 6, "test": 12}


def test_of_several_courses_the_first_to_end_counts(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    """Two lesions of one visit: patient 0 event after censoring, 1 before it, 2 both on one day, 3 never followed."""
    courses = {0: ((100, 0), (300, 1)), 1: ((300, 0), (100, 1)), 2: ((100, 0), (100, 1)), 3: ((0, 1), (50, 0))}

    def change(row: dict[str, str]) -> None:
        follow(row)
        number = int(row["file"].removesuffix(".jpg"))
        if number // 2 in courses:
            days, event = courses[number // 2][number % 2]
            row |= {"visit": "", "days": str(days), "event": ("false", "true")[event]}

    shard_set = build_clinic(change, columns=COLUMNS)
    card = make_task(**CARD)
    split = build_patients(card, load_split(card, shard_set), shard_set)
    pairs = [members for members in split.members if len(members) == 2]
    assert len(split.keys) == 35 and len(pairs) == 3  # where no visit is dated, all images are of time zero
    found = {tuple(split.targets[place]) for place, members in enumerate(split.members) if len(members) == 2}
    assert found == {(100, 0), (100, 1)}
    assert "1 patients without a day of follow-up" in split.notes
    assert "of 3 patients with several courses all but the first to end" in split.notes


def test_competing_events_are_declared_or_refused(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    def change(row: dict[str, str]) -> None:
        follow(row)
        row["kind"] = {"true": "1", "false": "2"}[row["event"]]

    shard_set = build_clinic(change, columns=COLUMNS, tabular=["kind"])
    target = {"outcome": "recurrence", "time_zero": "first visit", "event": "tabular.kind"}
    card = make_task(**{**CARD, "target": target})
    images = load_split(card, shard_set)
    with pytest.raises(UserError, match=r"tabular.kind has the value 2; it is 0 = none, 1 = recurrence; name further"):
        build_patients(card, images, shard_set)
    card = make_task(**{**CARD, "target": {**target, "competing_events": ["death of other causes"]}})
    split = build_patients(card, images, shard_set)
    assert (split.targets[:, 1] == 2).sum() == 12 and (split.targets[:, 1] == 0).sum() == 0
    trial = make_trial(card, split, shard_set)
    scored = score_survival(trial, make_material(shard_set, draw_features(shard_set)), SurvivalConfig())
    assert scored.chosen["num_competing"] == 6 and scored.chosen["num_events"] == 18
    # Whom something else carried off will never have the event, whatever day that was: to be ranked behind everybody.
    as_censored = replace(split, targets=np.where(split.targets == 2, 0, split.targets))
    late = measure(make_trial(card, as_censored, shard_set), scored)["harrell_c"]
    assert measure(trial, scored)["harrell_c"] < 0.7 < 0.8 < late


def test_images_foretell_and_are_compared_with_what_age_foretells(followed: ShardSet, make_task: MakeTask) -> None:
    card = make_task(**CARD)
    split = build_patients(card, load_split(card, followed), followed)
    features = draw_features(followed)
    found = {}
    for variant in ("cox", "covariates", "both"):
        trial = make_trial(card, split, followed, variant)
        scored = score_survival(trial, make_material(followed, features), SurvivalConfig())
        assert scored.scores.shape == (12, 1 + len(scored.grid)) and np.isfinite(scored.scores).all()
        free = scored.scores[:, 1:]
        assert (np.diff(free, axis=1) <= 0).all() and 0 <= free.min() <= free.max() <= 1
        found[variant] = measure(trial, scored)
        assert scored.chosen["covariates"] == ([] if variant == "cox" else ["age"])
        assert scored.chosen["converged"] and scored.chosen["num_folds"] == 5
        # A patient's score does not depend on who else is scored.
        alone = score_survival(replace(trial, test=trial.test[:3]), make_material(followed, features), SurvivalConfig())
        np.testing.assert_allclose(alone.scores, scored.scores[:3], atol=1e-12)
    assert found["cox"]["uno_c"] > 0.8 and found["covariates"]["harrell_c"] > 0.7
    # The images of later visits say nothing: they are not looked at, whatever is in them.
    later = np.array(followed.table.column("visit_day").to_pylist()) > 0
    garbage = np.where(later[:, None], 1e6, features)
    trial = make_trial(card, split, followed, "cox")
    again = score_survival(trial, make_material(followed, garbage), SurvivalConfig())
    assert measure(trial, again) == found["cox"]


def test_no_test_label_is_seen_and_the_days_are_those_of_the_task(followed: ShardSet, make_task: MakeTask) -> None:
    card = make_task(**CARD)
    split = build_patients(card, load_split(card, followed), followed)
    material = make_material(followed, draw_features(followed))
    scored = score_survival(make_trial(card, split, followed), material, SurvivalConfig())
    hidden = split.targets.copy()
    hidden[split.find("test")] = [7.0, 1.0]
    blind = score_survival(make_trial(card, replace(split, targets=hidden), followed), material, SurvivalConfig())
    np.testing.assert_array_equal(scored.scores, blind.scores)
    assert scored.grid == blind.grid and scored.chosen == blind.chosen
    few = make_trial(card, split, followed, label_fraction=0.5)
    assert len(few.train) == 12
    assert score_survival(few, material, SurvivalConfig()).grid == scored.grid == choose_days(split)
    days, event = split.targets[split.find("train")].T
    assert ((days > scored.grid[-1]).mean() >= 0.19) and (days[event == 1] <= scored.grid[0]).mean() >= 0.1
    own = score_survival(
        make_trial(card, split, followed), material, validate(SurvivalConfig, {"days": [365, 730]}, where="test")
    )
    assert own.grid == (365, 730) and own.scores.shape == (12, 3)
    with pytest.raises(UserError, match="must be above 0 and ascending"):
        validate(SurvivalConfig, {"days": [730, 365]}, where="test")


def test_the_cut_off_and_its_curves_come_from_training_patients_out_of_fold(
    followed: ShardSet, make_task: MakeTask
) -> None:
    card = make_task(**CARD)
    split = build_patients(card, load_split(card, followed), followed)
    noise = np.random.default_rng(3).normal(0, 1, (72, 40))
    trial = make_trial(card, split, followed)
    scored = score_survival(trial, make_material(followed, noise), SurvivalConfig())
    curves = scored.chosen["training_curves"]
    assert curves["low_risk"]["num_patients"] + curves["high_risk"]["num_patients"] == len(trial.train) == 24
    assert curves["low_risk"]["num_events"] + curves["high_risk"]["num_events"] == 18
    # Forty columns of noise part 24 patients perfectly in the fit; out of fold they part nothing.
    gap = np.array(curves["low_risk"]["event_free"]) - np.array(curves["high_risk"]["event_free"])
    assert np.abs(gap).mean() < 0.35
    told = score_survival(trial, make_material(followed, draw_features(followed)), SurvivalConfig())
    parted = told.chosen["training_curves"]
    assert np.mean(np.array(parted["low_risk"]["event_free"]) - parted["high_risk"]["event_free"]) > 0.4
    days, event = split.targets[trial.train].T
    both = compute_event_free(days, event).read(told.grid)
    assert (np.array(parted["high_risk"]["event_free"]) <= both + 1e-9).all()


def test_what_cannot_be_had_is_said(followed: ShardSet, build_clinic: BuildClinic, make_task: MakeTask) -> None:
    card = make_task(**CARD)
    split = build_patients(card, load_split(card, followed), followed)
    material = make_material(followed, draw_features(followed))
    nobody = replace(split, targets=split.targets * [1, 0])
    with pytest.raises(UserError, match="none of the 24 training rows has the event"):
        score_survival(make_trial(card, nobody, followed), material, SurvivalConfig())

    def forget(row: dict[str, str]) -> None:
        follow(row)
        row["age"] = ""

    bare = build_clinic(forget, columns=COLUMNS, name="bare")
    card = make_task(**{**CARD, "source": "bare"})
    split = build_patients(card, load_split(card, bare), bare)
    with pytest.raises(UserError, match=r"nothing for survival \(covariates\); map columns"):
        score_survival(
            make_trial(card, split, bare, "covariates"), make_material(bare, draw_features(bare)), SurvivalConfig()
        )
