from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from panfm.errors import UserError
from panfm.evaluation.linear_probe import LinearProbeConfig, score_linear_probe, score_linear_probes
from panfm.evaluation.protocol import Trial, build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.metrics import compute_metric
from panfm.shards.index import ShardSet

ENCODER = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=4, image_size=32, pooling="mean")


def make_trial(card: TaskCard, shard_set: ShardSet, **changes: object) -> Trial:
    given: dict = {
        "protocol": "linear_probe", "recipe": {"variant": "default"}, "evaluated_on": "test", "label_fraction": 1.0,
        "draw": 0, "seed": 0, "num_replicates": 200, **changes,
    }  # fmt: skip
    return build_trial(card, load_split(card, shard_set), ENCODER, shard_set, **given)


def draw_features(trial: Trial) -> np.ndarray:
    """Four noise directions, and the class in a fifth."""
    labels = trial.split.labels
    features = np.random.default_rng(0).normal(size=(len(labels), 5)).astype(np.float32)
    features[:, 4] += 2.0 * labels
    return features


def test_train_and_val_folds_train_and_the_test_fold_is_scored(
    clinic: ShardSet, make_task: Callable[..., TaskCard]
) -> None:
    trial = make_trial(make_task(), clinic)
    folds = trial.split.folds
    assert set(folds[trial.train]) == {"train", "val"} and set(folds[trial.test]) == {"test"}
    assert len(trial.train) + len(trial.test) == len(folds)
    development = make_trial(make_task(), clinic, evaluated_on="development")
    assert set(folds[development.train]) == {"train"} and set(folds[development.test]) == {"val"}


def test_the_probe_finds_the_informative_direction_and_never_looks_at_the_test_part(
    clinic: ShardSet, make_task: Callable[..., TaskCard]
) -> None:
    trial = make_trial(make_task(), clinic)
    features = draw_features(trial)
    scored = score_linear_probe(trial, features, LinearProbeConfig())
    np.testing.assert_allclose(scored.scores.sum(axis=1), 1.0)
    auroc = compute_metric("auroc", trial.split.labels[trial.test], scored.scores).value
    assert auroc is not None and auroc > 0.75
    assert scored.chosen["converged"] and scored.chosen["num_folds"] == 5 and scored.chosen["C"] > 0
    # Other test images change no other test image's score: nothing is fitted on them.
    changed = features.copy()
    changed[trial.test[1:]] += 100
    again = score_linear_probe(trial, changed, LinearProbeConfig())
    np.testing.assert_array_equal(again.scores[0], scored.scores[0])


def test_a_class_without_training_images_gets_probability_zero(
    clinic: ShardSet, make_task: Callable[..., TaskCard]
) -> None:
    trial = make_trial(make_task(classes=["naevus", "melanoma", "never"]), clinic)
    scored = score_linear_probe(trial, draw_features(trial), LinearProbeConfig())
    assert scored.scores.shape[1] == 3 and (scored.scores[:, 2] == 0).all()


def test_one_class_only_is_refused(build_clinic: Callable[..., ShardSet], make_task: Callable[..., TaskCard]) -> None:
    def flatten(row: dict[str, str]) -> None:
        if row["fold"] != "exam" and row["diagnosis"] == "melanoma":
            row["diagnosis"] = "naevus"

    with pytest.raises(UserError, match="labelled training images are all 'naevus'; at least two classes"):
        make_trial(make_task(), build_clinic(flatten))


def test_development_needs_a_val_fold(clinic: ShardSet, make_task: Callable[..., TaskCard]) -> None:
    card = make_task(split={"kind": "official", "train": ["learn"], "test": ["exam"]})
    assert len(make_trial(card, clinic).test) > 0
    with pytest.raises(UserError, match="no image in the fold 'val', which evaluate_on: development"):
        make_trial(card, clinic, evaluated_on="development")


def test_many_trials_at_once_say_what_each_says_alone(clinic: ShardSet, make_task: Callable[..., TaskCard]) -> None:
    trial = make_trial(make_task(), clinic)
    groups = trial.split.groups[trial.train]
    half = replace(trial, train=trial.train[np.isin(groups, np.unique(groups)[::2])], seed=1)
    features = draw_features(trial)
    together = score_linear_probes([trial, half], features, LinearProbeConfig(), torch.device("cpu"))
    for one, scored in zip((trial, half), together, strict=True):
        alone = score_linear_probe(one, features, LinearProbeConfig())
        np.testing.assert_allclose(scored.scores, alone.scores, atol=2e-4)
        assert scored.chosen["C"] == alone.chosen["C"] and scored.chosen.keys() == alone.chosen.keys()
