"""Published probes and prototypes as protocols: what they see, how they are named, and which token they want."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from panfm.config import validate
from panfm.errors import UserError
from panfm.evaluation.compat import (
    Dinov2CompatConfig,
    PandermCompatConfig,
    score_dinov2_compat,
    score_panderm_compat,
)
from panfm.evaluation.protocol import build_trial
from panfm.evaluation.prototype import PrototypeConfig, score_prototype
from panfm.evaluation.results import EncoderCard, read_results
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EvaluateConfig
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.prototype import predict_prototype
from panfm.measures.published_probes import fit_dinov2_probe, fit_panderm_probe
from panfm.shards.index import ShardSet

PROTOCOLS = ("panderm_compat", "dinov2_compat", "prototype")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_fitted_sees_the_labelled_images_and_scores_the_test_fold(
    clinic: ShardSet, make_task: Callable[..., TaskCard], protocol: str
) -> None:
    card = make_task()
    encoder = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=3, image_size=32, pooling="cls")
    trial = build_trial(
        card, load_split(card, clinic), encoder, clinic, protocol=protocol, recipe={"variant": "default"},
        evaluated_on="test", label_fraction=0.5, draw=1, seed=0, num_replicates=200,
    )  # fmt: skip
    labels, train = trial.split.labels, trial.train
    features = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    features[:, 0] += 3 * labels
    features *= 20  # else the published penalty, 1 / (2 C) = 8.3, switches the probe off
    if protocol == "panderm_compat":
        scored = score_panderm_compat(trial, features, PandermCompatConfig(), has_cls=True)
        expected = fit_panderm_probe(features[train], labels[train], num_classes=2).predict(features[trial.test])
        assert scored.chosen == {"C": pytest.approx(0.06), "is_zero": False, "converged": True}
    elif protocol == "dinov2_compat":
        scored = score_dinov2_compat(trial, features, Dinov2CompatConfig(), has_cls=True)
        probe = fit_dinov2_probe(features[train], labels[train], num_classes=2, seed=0)
        expected = probe.predict(features[trial.test])
        assert scored.chosen == {"C": probe.C, "converged": probe.converged}
    else:
        scored = score_prototype(trial, features, PrototypeConfig())
        expected = predict_prototype(features[train], labels[train], features[trial.test], num_classes=2)
    np.testing.assert_allclose(scored.scores, expected)


def test_an_encoder_with_a_class_token_must_be_read_by_it(
    clinic: ShardSet, make_task: Callable[..., TaskCard], tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "clinic_diagnosis.yaml").write_text(yaml.safe_dump(make_task().model_dump(mode="json")))
    vit = "timm:test_vit@random:0?image_size=32"
    values = {
        "encoders": [
            {"address": f"{vit}&pooling=cls", "name": "cls"},
            {"address": f"{vit}&pooling=mean", "name": "mean"},
            {"address": "timm:test_efficientnet@random:0?image_size=32", "name": "cnn"},
        ],
        "shards": [str(clinic.path)], "task_dir": str(tmp_path / "tasks"), "out": str(tmp_path / "results"),
        "fractions": [1.0], "cache_dir": str(tmp_path / "cache"), "num_replicates": 100, "device": "cpu",
        "protocols": list(PROTOCOLS),
    }  # fmt: skip
    summary = run_evaluation(validate(EvaluateConfig, values, where="test"))
    assert {(failure.encoder, failure.what.split()[0]) for failure in summary.failures} == {
        ("mean", "panderm_compat"),
        ("mean", "dinov2_compat"),
    }
    message = summary.failures[0].message
    assert "its pooling is mean, and panderm_compat reads the class token" in message and "?pooling=cls" in message
    found = {(result.encoder.name, result.protocol) for _, result in read_results([tmp_path / "results"])}
    assert found == {(name, protocol) for name in ("cls", "cnn") for protocol in PROTOCOLS} | {("mean", "prototype")}


def test_a_protocol_of_no_known_name_is_refused() -> None:
    with pytest.raises(UserError, match="protocols"):
        validate(EvaluateConfig, {"encoders": [], "shards": [], "protocols": ["panderm"]}, where="test")
