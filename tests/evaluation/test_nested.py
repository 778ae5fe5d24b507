"""Nested cross-validation: every group scored by probes that saw nothing of it, and no fold that tests alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from panfm.config import validate
from panfm.errors import UserError
from panfm.evaluation.nested import score_nested
from panfm.evaluation.protocol import Scored, Trial, build_trial
from panfm.evaluation.results import EncoderCard, get_scores, make_outcome, read_predictions, read_result
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EvaluateConfig
from panfm.evaluation.splits import compute_excluded, load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.metrics import compute_metric
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]
NESTED = {"kind": "nested", "folds": 4, "repeats": 3}


def make_trial(card: TaskCard, shard_set: ShardSet, fraction: float = 1.0) -> Trial:
    encoder = EncoderCard(
        name="e", address="timm:e", hash="0", num_parameters=1, embed_dim=2, image_size=16, pooling="mean"
    )
    return build_trial(
        card, load_split(card, shard_set), encoder, shard_set, protocol="linear_probe", recipe={"variant": "default"},
        evaluated_on="test", label_fraction=fraction, draw=0, seed=0, num_replicates=100,
    )  # fmt: skip


def test_every_unit_is_scored_once_a_repeat_by_folds_without_its_group(clinic: ShardSet, make_task: MakeTask) -> None:
    trial = make_trial(make_task(split=NESTED), clinic)
    groups = trial.split.groups
    seen: list[tuple[frozenset[int], frozenset[int]]] = []

    def score(inner: Trial) -> Scored:
        assert not set(groups[inner.train]) & set(groups[inner.test])
        assert len(inner.train) + len(inner.test) == len(groups)
        seen.append((frozenset(inner.train.tolist()), frozenset(inner.test.tolist())))
        scores = np.full((len(inner.test), 2), float(len(seen)))
        scores[:, 0] = inner.test
        return Scored(scores)

    scored = score_nested(trial, score)
    assert len(seen) == 12 and len(set(seen)) == 12  # other folds in each repeat
    assert scored.repeats is not None and scored.repeats.shape == (3, len(groups), 2)
    np.testing.assert_array_equal(scored.repeats[:, :, 0], np.tile(np.arange(len(groups)), (3, 1)))
    np.testing.assert_allclose(scored.scores, scored.repeats.mean(axis=0))
    assert scored.outer_folds is not None
    for repeat in range(3):
        tested = [test for _, test in seen[4 * repeat : 4 * repeat + 4]]
        assert frozenset().union(*tested) == frozenset(range(len(groups)))


def test_labels_are_few_within_every_fold(clinic: ShardSet, make_task: MakeTask) -> None:
    card = make_task(split=NESTED)
    sizes: dict[float, list[int]] = {0.25: [], 1.0: []}
    for fraction, found in sizes.items():

        def score(inner: Trial, found: list[int] = found) -> Scored:
            found.append(len(np.unique(inner.split.groups[inner.train])))
            return Scored(np.full((len(inner.test), 2), 0.5))

        score_nested(make_trial(card, clinic, fraction), score)
    shares = np.array(sizes[0.25]) / np.array(sizes[1.0])
    assert (abs(shares - 0.25) < 0.05).all()


def test_a_run_stores_every_repeat_and_measures_their_mean(
    clinic: ShardSet, make_task: MakeTask, tmp_path: Path
) -> None:
    card = make_task(split=NESTED)
    (tmp_path / "clinic_diagnosis.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json")))
    values = {
        "encoders": [{"address": "timm:test_vit@random:0?image_size=32", "name": "tiny"}], "protocols": ["knn"],
        "shards": [str(clinic.path)], "task_dir": str(tmp_path), "out": str(tmp_path / "results"), "fractions": [1.0],
        "cache_dir": str(tmp_path / "cache"), "num_replicates": 100, "device": "cpu",
    }  # fmt: skip
    summary = run_evaluation(validate(EvaluateConfig, values, where="test"))
    assert summary.failures == ()
    (path,) = summary.written
    result = read_result(path)
    predictions = read_predictions(path.with_suffix(".parquet"))
    assert len(predictions) == 3 * result.num_test
    assert set(predictions["fold"].to_pylist()) == {"outer0", "outer1", "outer2", "outer3"}
    _, outcome = make_outcome(predictions)
    scores = get_scores(predictions).reshape(3, result.num_test, 2)  # written repeat by repeat, in order of key
    np.testing.assert_allclose(outcome.scores, scores.mean(axis=0), atol=1e-12)
    assert result.metrics["auroc"].value == compute_metric("auroc", outcome.labels, outcome.scores).value
    # Nothing of such a task may be pretrained on.
    excluded = compute_excluded(["clinic_diagnosis"], [clinic], tmp_path)
    assert excluded.groups["clinic"] == frozenset(load_split(card, clinic).groups.tolist())


def test_what_nested_validation_cannot_do_is_said(
    clinic: ShardSet, make_task: MakeTask, build_clinic: Callable
) -> None:  # type: ignore[type-arg]
    trial = make_task(split=NESTED)
    split = load_split(trial, clinic)
    assert set(split.folds.tolist()) == {"test"}

    def lonely(row: dict[str, str]) -> None:
        row["diagnosis"] = "melanoma" if row["patient"] == "P0" else "naevus"

    with pytest.raises(UserError, match="a class has one patient only"):
        make_trial(trial, build_clinic(lonely))
