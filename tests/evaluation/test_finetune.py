import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.evaluation.finetune import (
    FinetuneConfig,
    _build_optimizer,
    _compute_lr_share,
    _copy_probe,
    _plan_batches,
    _set_train_mode,
    score_finetune,
)
from panfm.evaluation.protocol import Trial, build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.features import compute_features
from panfm.measures.metrics import compute_metric
from panfm.measures.probe import fit_probe
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.set_num_threads(1)
    return load_encoder("timm:test_vit@random:0?image_size=32")


def make_trial(card: TaskCard, clinic: ShardSet, encoder: Encoder, seed: int = 0) -> Trial:
    described = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=encoder.embed_dim,
                            image_size=32, pooling="mean")  # fmt: skip
    return build_trial(
        card, load_split(card, clinic), described, clinic, protocol="finetune", recipe={"variant": "default"},
        evaluated_on="test", label_fraction=1.0, draw=0, seed=seed, num_replicates=200,
    )  # fmt: skip


@pytest.fixture
def trial_and_features(
    clinic: ShardSet, make_task: MakeTask, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trial, np.ndarray]:
    trial = make_trial(make_task(), clinic, encoder)
    features = compute_features(encoder, clinic, cache_dir=tmp_path_factory.getbasetemp() / "finetune_cache")
    return trial, features.values[trial.split.rows]


def test_training_learns_repeats_and_leaves_the_encoder_alone(
    trial_and_features: tuple[Trial, np.ndarray], clinic: ShardSet, encoder: Encoder
) -> None:
    trial, features = trial_and_features
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    config = FinetuneConfig(epochs=6, batch_size=8, base_lr=2e-3, layer_decay=0.9, head="zero")
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    scored = score_finetune(trial, features, encoder, clinic, config)
    assert torch.equal(torch.random.get_rng_state(), state)  # whoever comes after draws what it would have drawn
    torch.manual_seed(2)
    again = score_finetune(trial, features, encoder, clinic, config)
    np.testing.assert_array_equal(scored.scores, again.scores)
    assert all(torch.equal(value, before[name]) for name, value in encoder.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    np.testing.assert_allclose(scored.scores.sum(axis=1), 1.0)
    auroc = compute_metric("auroc", trial.split.labels[trial.test], scored.scores).value
    assert auroc is not None and auroc > 0.8
    assert scored.chosen["num_steps"] == 6 * -(-len(trial.train) // 8) and scored.chosen["precision"] == "fp32"


def test_without_training_the_head_is_the_linear_probe(
    trial_and_features: tuple[Trial, np.ndarray], clinic: ShardSet, encoder: Encoder
) -> None:
    from panfm.evaluation.linear_probe import LinearProbeConfig, score_linear_probe

    trial, features = trial_and_features
    still = FinetuneConfig(epochs=1, base_lr=1e-12, weight_decay=0)
    scored = score_finetune(trial, features, encoder, clinic, still)
    probe = score_linear_probe(trial, features, LinearProbeConfig())
    np.testing.assert_allclose(scored.scores, probe.scores, atol=2e-4)
    assert scored.chosen["head"] == probe.chosen


def test_a_class_without_images_starts_improbable_but_finite() -> None:
    features = np.random.default_rng(0).normal(size=(20, 3))
    probe = fit_probe(features, [0, 2] * 10, num_classes=3, C=1.0)
    head = torch.nn.Linear(3, 3)
    _copy_probe(probe, head)
    scores = head(torch.from_numpy(features).float()).softmax(1).detach().numpy()
    assert np.isfinite(scores).all() and scores[:, 1].max() < 0.02
    expected = probe.predict(features)[:, [0, 2]]
    np.testing.assert_allclose(scores[:, [0, 2]] / scores[:, [0, 2]].sum(1, keepdims=True), expected, atol=1e-5)


def test_each_layer_learns_slower_than_the_one_above(encoder: Encoder) -> None:
    head = torch.nn.Linear(encoder.embed_dim, 2)
    network = copy.deepcopy(encoder.module).requires_grad_(True)
    optimizer = _build_optimizer(network, head, FinetuneConfig(base_lr=1e-2, layer_decay=0.5))
    model = network.model
    lr_of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(lr_of) == {id(parameter) for parameter in [*model.parameters(), *head.parameters()]}
    rates = [lr_of[id(block.mlp.fc1.weight)] for block in model.blocks]
    assert all(above == pytest.approx(2 * below) for below, above in pairwise(rates))
    assert lr_of[id(model.patch_embed.proj.weight)] < rates[0] and lr_of[id(head.weight)] == 1e-2
    assert (
        decay_of[id(head.weight)] == 0.05 and decay_of[id(head.bias)] == decay_of[id(model.blocks[0].norm1.weight)] == 0
    )


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    shares = [_compute_lr_share(step, 100, 10) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 and shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5) and shares[-1] < 0.001
    assert _compute_lr_share(0, 1, 0) == 1.0


def test_every_image_is_seen_once_an_epoch_and_a_sampler_balances(
    clinic: ShardSet, make_task: MakeTask, encoder: Encoder
) -> None:
    trial = make_trial(make_task(), clinic, encoder)
    batches = list(_plan_batches(trial, FinetuneConfig(epochs=3, batch_size=7)))
    items = [item for batch in batches for item in batch]
    assert [position for position, _ in items] == list(range(3 * len(trial.train)))
    for epoch in range(3):
        seen = [place for _, place in items[epoch * len(trial.train) : (epoch + 1) * len(trial.train)]]
        assert sorted(seen) == list(range(len(trial.train)))
    drawn = list(_plan_batches(trial, FinetuneConfig(epochs=60, batch_size=8, balance="sampler")))
    labels = trial.split.labels[trial.train]
    assert np.mean([labels[place] for batch in drawn for _, place in batch]) == pytest.approx(0.5, abs=0.05)


def test_a_loss_that_explodes_is_a_clear_line(
    trial_and_features: tuple[Trial, np.ndarray], clinic: ShardSet, encoder: Encoder
) -> None:
    trial, features = trial_and_features
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+; lower finetune.base_lr \(1e\+30\)"):
        score_finetune(trial, features, encoder, clinic, FinetuneConfig(base_lr=1e30, epochs=2, warmup_epochs=0))


@pytest.mark.slow
def test_a_cnn_keeps_its_batch_norm_statistics(clinic: ShardSet, make_task: MakeTask, tmp_path: Path) -> None:
    cnn = load_encoder("timm:test_resnet@random:0?image_size=32")
    network = copy.deepcopy(cnn.module)
    _set_train_mode(network)
    network(torch.randn(4, 3, 32, 32))
    for name, value in network.state_dict().items():
        assert torch.equal(value, cnn.module.state_dict()[name])
    trial = make_trial(make_task(), clinic, cnn)
    features = compute_features(cnn, clinic, cache_dir=tmp_path).values[trial.split.rows]
    scored = score_finetune(trial, features, cnn, clinic, FinetuneConfig(epochs=1, balance="loss"))
    assert np.isfinite(scored.scores).all()
