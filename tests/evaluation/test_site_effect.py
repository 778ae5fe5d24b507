from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from panfm.encoder.load import load_encoder
from panfm.errors import UserError
from panfm.evaluation.protocol import Material, Trial, build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.site_effect import (
    POOLED,
    LeaveInstitutionOutConfig,
    build_institutions,
    pool_small,
    read_institutions,
    score_leave_institution_out,
)
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.metrics import compute_metric
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]


def make_trial(card: TaskCard, shard_set: ShardSet, variant: str = "none") -> Trial:
    split = build_institutions(card, load_split(card, shard_set), shard_set)
    described = EncoderCard(
        name="e", address="a", hash="h", num_parameters=1, embed_dim=6, image_size=32, pooling="cls"
    )
    return build_trial(
        card, split, described, shard_set, protocol="leave_institution_out", recipe={"variant": variant},
        evaluated_on="test", label_fraction=1.0, draw=0, seed=0, num_replicates=200,
    )  # fmt: skip


def make_features(trial: Trial, shard_set: ShardSet, *, offset: float = 0.0) -> np.ndarray:
    """Of all rows: the first feature tells the diagnosis, the second the hospital; offset: of the first, a hospital."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(shard_set.table), 6))
    of = dict(zip(["North", "South", "West", ""], range(4), strict=True))
    hospital = np.array([of[name] for name in read_institutions(shard_set, np.arange(len(features)))])
    sign = np.zeros(len(features))
    sign[trial.split.rows] = 2 * trial.split.labels - 1
    features[:, 0] += 2 * sign + offset * hospital
    features[:, 1] = hospital + 0.01 * rng.normal(size=len(features))
    return features.astype(np.float32)


def score(trial: Trial, shard_set: ShardSet, features: np.ndarray, **changes: object) -> tuple[np.ndarray, dict]:
    encoder = load_encoder("timm:test_vit@random:0?image_size=32")
    config = LeaveInstitutionOutConfig(**{"min_images": 4, **changes})
    scored = score_leave_institution_out(trial, Material(features, encoder, shard_set), config)
    return scored.scores, scored.chosen["institutions"]


@pytest.mark.parametrize("variant", ["none", "same_size", "combat", "balanced", "group_dro"])
def test_no_label_of_an_institution_reaches_the_probe_that_scores_it(
    hospitals: ShardSet, make_task: MakeTask, variant: str
) -> None:
    trial = make_trial(make_task(), hospitals, variant)
    features = make_features(trial, hospitals)
    scores, chosen = score(trial, hospitals, features)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0)
    institutions = read_institutions(hospitals, trial.split.rows)
    assert set(chosen) == {"North", "South", "West"}
    for name, facts in chosen.items():
        assert facts["num_test"] == (institutions[trial.test] == name).sum()
        assert facts["num_train_institutions"] == (3 if variant == "same_size" else 2)
        others = (institutions[trial.train] != name).sum()
        assert abs(facts["num_train"] - others) <= (4 if variant == "same_size" else 0)
    # Turn every label of one hospital round, in training and in test: its own scores must not move.
    own = institutions == "South"
    turned = replace(
        trial, split=replace(trial.split, labels=np.where(own, 1 - trial.split.labels, trial.split.labels))
    )
    again, _ = score(turned, hospitals, features)
    mine = institutions[trial.test] == "South"
    if variant == "same_size":
        assert not np.allclose(again[mine], scores[mine])
    else:
        np.testing.assert_array_equal(again[mine], scores[mine])
        assert not np.allclose(again[~mine], scores[~mine])
    auroc = compute_metric("auroc", trial.split.labels[trial.test], scores).value
    assert auroc is not None and auroc > 0.8


@pytest.mark.parametrize("variant", ["none", "combat"])
def test_a_test_image_is_scored_as_if_it_came_alone(hospitals: ShardSet, make_task: MakeTask, variant: str) -> None:
    trial = make_trial(make_task(), hospitals, variant)
    features = make_features(trial, hospitals, offset=3.0)
    scores, _ = score(trial, hospitals, features)
    few = replace(trial, test=trial.test[::3])
    changed = features.copy()
    changed[trial.split.rows[np.setdiff1d(trial.test, few.test)]] = 1e3  # other test images are looked at by nobody
    again, _ = score(few, hospitals, changed)
    np.testing.assert_allclose(again, scores[::3], atol=1e-9)


def test_combat_helps_where_hospitals_differ_by_an_offset(hospitals: ShardSet, make_task: MakeTask) -> None:
    losses = {}
    for variant in ("none", "combat"):
        trial = make_trial(make_task(), hospitals, variant)
        features = make_features(trial, hospitals, offset=6.0)
        features[:, 1] = features[:, 2]  # no other feature tells the hospital, by which a probe could undo the offset
        scores, chosen = score(trial, hospitals, features)
        losses[variant] = compute_metric("log_loss", trial.split.labels[trial.test], scores).value
    assert losses["combat"] < 0.8 * losses["none"]
    assert all(facts["harmonised"] and facts["num_unlabelled"] >= 4 for facts in chosen.values())
    _, chosen = score(trial, hospitals, make_features(trial, hospitals), min_images=500)
    assert not any(facts["harmonised"] for facts in chosen.values())


def test_combat_does_not_take_the_case_mix_for_the_hospital(hospitals: ShardSet, make_task: MakeTask) -> None:
    trial = make_trial(make_task(), hospitals, "combat")
    split, institutions = trial.split, read_institutions(hospitals, trial.split.rows)
    # North sends nearly only melanomas to the training, South nearly only naevi; West is scored.
    common = np.where(institutions == "North", 1, np.where(institutions == "South", 0, split.labels))
    rare = trial.train[split.labels[trial.train] != common[trial.train]]
    kept = [places[:1] for name in ("North", "South") for places in [rare[institutions[rare] == name]]]
    train = np.union1d(np.setdiff1d(trial.train, rare), np.concatenate(kept))
    features = make_features(trial, hospitals)
    features[split.rows, 0] -= 1.2 * (2 * split.labels - 1)  # not so easy that any map of it would do
    features[:, 1:] = 0  # the hospital is told by nothing but its case mix
    west = replace(trial, train=train, test=trial.test[institutions[trial.test] == "West"])
    losses = {}
    for variant in ("none", "combat"):
        scores, _ = score(replace(west, recipe={"variant": variant}), hospitals, features)
        losses[variant] = compute_metric("log_loss", split.labels[west.test], scores).value
    # Blind to the diagnosis, it would take the hospitals' melanomas and naevi for their cameras: 0.6 times the loss.
    assert losses["combat"] < 0.2 * losses["none"]


def test_small_institutions_are_taken_as_one() -> None:
    names = np.array(["a"] * 5 + ["b"] * 3 + ["c"] * 2)
    assert set(pool_small(names, 4)) == {"a", POOLED} and (pool_small(names, 4) == "a").sum() == 5
    assert set(pool_small(names[:8], 4)) == {"a"}  # three more would not be enough by themselves
    assert set(pool_small(names, 6)) == {POOLED} and set(pool_small(names, 2)) == {"a", "b", "c"}


def test_units_are_images_of_known_institution(hospitals: ShardSet, clinic: ShardSet, make_task: MakeTask) -> None:
    card = make_task()
    whole = load_split(card, hospitals)
    split = build_institutions(card, whole, hospitals)
    assert len(split.rows) == len(whole.rows) - 1 and split.notes[-1] == "1 images of unknown institution"
    assert split.hash != whole.hash and (read_institutions(hospitals, split.rows) != "").all()
    with pytest.raises(UserError, match=r"clinic_diagnosis: no image has an institution, so none can be left out; map"):
        build_institutions(card, load_split(card, clinic), clinic)
    places = [place for place, name in enumerate(whole.keys) if name not in split.keys]
    trial = replace(make_trial(card, hospitals), split=whole, test=np.array(places), train=whole.find("train"))
    with pytest.raises(UserError, match="1 of 1 test images have no institution"):
        score(trial, hospitals, np.zeros((len(hospitals.table), 6), dtype=np.float32))


def test_one_class_elsewhere_is_a_clear_line(hospitals: ShardSet, make_task: MakeTask) -> None:
    trial = make_trial(make_task(), hospitals)
    institutions = read_institutions(hospitals, trial.split.rows)
    labels = np.where(institutions == "South", trial.split.labels, 0)
    one_sided = replace(trial, split=replace(trial.split, labels=labels))
    with pytest.raises(UserError, match=r"without institution South the .* hold fewer than two classes"):
        score(one_sided, hospitals, make_features(trial, hospitals))
