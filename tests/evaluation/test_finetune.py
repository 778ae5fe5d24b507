import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath

from panfm.config import load_config
from panfm.encoder.load import Encoder, load_encoder
from panfm.encoder.network import EncoderNetwork
from panfm.errors import UserError
from panfm.evaluation.finetune import score_finetune
from panfm.evaluation.finetune_images import mix_batch, plan_batches, turn_views
from panfm.evaluation.finetune_network import (
    Trained,
    build_optimizer,
    choose_trained,
    merge_lora,
    set_drop_path,
    set_train_mode,
)
from panfm.evaluation.finetune_recipes import FinetuneConfig, describe_recipe, resolve_recipe
from panfm.evaluation.finetune_training import build_head, list_lr_shares
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
    assert scored.chosen["head"].items() <= probe.chosen.items()


def test_a_class_without_images_starts_improbable_but_finite() -> None:
    features = np.random.default_rng(0).normal(size=(20, 3))
    probe = fit_probe(features, [0, 2] * 10, num_classes=3, C=1.0)
    head = build_head(probe)
    scores = head(torch.from_numpy(features).float()).softmax(1).detach().numpy()
    assert np.isfinite(scores).all() and scores[:, 1].max() < 0.02
    expected = probe.predict(features)[:, [0, 2]]
    np.testing.assert_allclose(scores[:, [0, 2]] / scores[:, [0, 2]].sum(1, keepdims=True), expected, atol=1e-5)


def choose(encoder: Encoder, trained: Trained, **changes: int) -> torch.nn.Module:
    network = copy.deepcopy(encoder.module)
    choose_trained(network, trained, **{"lora_rank": 2, "lora_alpha": 4, "num_last_blocks": 2, **changes})
    return network


def list_rates(network: torch.nn.Module, head: torch.nn.Linear, layer_decay: float) -> dict[int, tuple[float, float]]:
    """Rate and weight decay of each parameter that learns, by its id."""
    optimizer = build_optimizer(
        network, head, optimizer="adamw", base_lr=1e-2, layer_decay=layer_decay, weight_decay=0.05
    )
    return {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def test_each_layer_learns_slower_than_the_one_above(encoder: Encoder) -> None:
    head = torch.nn.Linear(encoder.embed_dim, 2)
    model = (network := choose(encoder, "full")).model
    of = list_rates(network, head, 0.5)
    assert set(of) == {id(parameter) for parameter in [*model.parameters(), *head.parameters()]}
    rates = [of[id(block.mlp.fc1.weight)][0] for block in model.blocks]
    assert all(above == pytest.approx(2 * below) for below, above in pairwise(rates))
    assert rates[-1] == of[id(head.weight)][0] == 1e-2
    assert of[id(model.patch_embed.proj.weight)][0] < rates[0]
    assert of[id(head.weight)][1] == 0.05 and of[id(head.bias)][1] == of[id(model.blocks[0].norm1.weight)][1] == 0


@pytest.mark.parametrize("address", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_lora_begins_as_the_encoder_learns_few_numbers_and_merges_to_the_same_function(address: str) -> None:
    encoder = load_encoder(f"timm:{address}@random:0?image_size=32")
    images = torch.randn(2, 3, 32, 32)
    expected = encoder.module(images)
    network, names = choose(encoder, "lora"), set(encoder.module.state_dict())
    torch.testing.assert_close(network(images), expected)
    free = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert 0 < sum(p.numel() for p in free) < 0.25 * sum(p.numel() for p in encoder.module.parameters())
    optimizer = torch.optim.SGD(free, lr=1.0)
    network(images).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(free, 1.0)
    optimizer.step()
    learned = network(images)
    assert not torch.allclose(learned, expected)
    merge_lora(network)
    assert set(network.state_dict()) == names
    torch.testing.assert_close(network(images), learned)
    changed = [
        name
        for name, value in network.state_dict().items()
        if not torch.equal(value, encoder.module.state_dict()[name])
    ]
    assert changed and all(encoder.module.state_dict()[name].ndim > 1 for name in changed)


def test_a_models_own_reading_of_its_weights_sees_the_low_rank_change() -> None:
    # BEiT joins qkv.weight with biases of its own and never calls the layer.
    model = timm.create_model("beit_base_patch16_224", num_classes=0, depth=1, embed_dim=32, num_heads=2, img_size=32)
    network = EncoderNetwork(model, None, where="beit").eval()
    images = torch.randn(1, 3, 32, 32)
    before = network(images)
    choose_trained(network, "lora", lora_rank=2, lora_alpha=4, num_last_blocks=1)
    network.model.blocks[0].attn.qkv.parametrizations.weight[0].up.data.fill_(1.0)
    assert not torch.allclose(network(images), before)


def test_the_last_blocks_learn_and_nothing_before_them(encoder: Encoder) -> None:
    network = choose(encoder, "last_blocks", num_last_blocks=2)
    free = {name for name, parameter in network.model.named_parameters() if parameter.requires_grad}
    last = tuple(f"blocks.{number}." for number in range(len(network.model.blocks))[-2:])
    assert {name for name in free if name.startswith("blocks.")} == {
        name for name, _ in network.model.named_parameters() if name.startswith(last)
    }
    assert {name for name in free if not name.startswith("blocks.")} == {
        name for name, _ in network.model.named_parameters() if name.startswith(("norm.", "fc_norm."))
    }
    assert len(list_rates(network, torch.nn.Linear(encoder.embed_dim, 2), 0.5)) == len(free) + 2
    cnn = choose(load_encoder("timm:test_resnet@random:0?image_size=32"), "last_blocks", num_last_blocks=1)
    stages = {name.split(".")[0] for name, parameter in cnn.model.named_parameters() if parameter.requires_grad}
    assert stages == {"layer4"}
    # Behind ConvNeXt's blocks comes a norm that timm counts as a layer of its own: no block.
    next_cnn = choose(load_encoder("timm:test_convnext@random:0?image_size=32"), "last_blocks", num_last_blocks=1)
    free = {name for name, parameter in next_cnn.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in free} == {"stages", "head"}
    everything = choose(encoder, "last_blocks", num_last_blocks=99)
    assert all(parameter.requires_grad for parameter in everything.parameters())


@pytest.mark.parametrize("address", ["test_vit", "test_resnet"])
def test_drop_path_grows_with_depth_and_a_network_without_branches_is_refused(address: str) -> None:
    encoder = load_encoder(f"timm:{address}@random:0?image_size=32")
    for name, value in encoder.module.named_parameters():
        if name.endswith(".weight") and value.ndim == 1:
            value.data.fill_(1.0)  # fresh ResNets scale their branches by 0, and leaving them out would not show
    network = choose(encoder, "full")
    set_drop_path(network, 0.4)
    shares = [module.drop_prob for module in network.modules() if isinstance(module, DropPath)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(0.4)
    images = torch.randn(2, 3, 32, 32)
    network.eval()
    torch.testing.assert_close(network(images), encoder.module(images))
    set_train_mode(network, "frozen")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(network(images), network(images))
    plain = EncoderNetwork(timm.create_model("dla46_c", num_classes=0), None, where="dla")
    with pytest.raises(UserError, match=r"DLA has no residual branches .* finetune.drop_path \(0.1\) must be 0"):
        set_drop_path(plain, 0.1)


def test_the_rate_warms_up_and_falls() -> None:
    shares = list_lr_shares(100, FinetuneConfig(epochs=10, warmup_epochs=1))
    assert len(shares) == 100 and shares[0] == 0.1 and shares[9] == 1.0 and shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5) and shares[-1] < 0.001
    assert list_lr_shares(1, FinetuneConfig(epochs=1, warmup_epochs=0)) == [1.0]
    stairs = list_lr_shares(130, FinetuneConfig(epochs=65, warmup_epochs=0, schedule="staircase"))
    assert stairs == [1.0] * 60 + [1 / 16] * 60 + [1 / 256] * 10


def test_every_image_is_seen_once_an_epoch_and_a_sampler_balances(
    clinic: ShardSet, make_task: MakeTask, encoder: Encoder
) -> None:
    trial = make_trial(make_task(), clinic, encoder)
    num = len(trial.train)
    items = [item for batch in plan_batches(trial, epochs=3, batch_size=7, balanced=False) for item in batch]
    assert [position for position, _ in items] == list(range(3 * num))
    for epoch in range(3):
        assert sorted(place for _, place in items[epoch * num : (epoch + 1) * num]) == list(range(num))
    drawn = list(plan_batches(trial, epochs=60, batch_size=8, balanced=True))
    labels = trial.split.labels[trial.train]
    assert np.mean([labels[place] for batch in drawn for _, place in batch]) == pytest.approx(0.5, abs=0.05)
    lonely = [len(batch) for batch in plan_batches(trial, epochs=1, batch_size=num - 1, balanced=False)]
    joined = [len(batch) for batch in plan_batches(trial, epochs=1, batch_size=num - 1, balanced=False, min_batch=2)]
    assert lonely == [num - 1, 1] and joined == [num]


def test_mixing_keeps_the_share_of_every_image() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 24, 16)  # an image is its number
    labels = torch.arange(4)
    kinds = set()
    for step in range(20):
        mixed = mix_batch(images, labels, mixup=0.4, cutmix=1.0, seed=3, step=step)
        partner = mixed.partner_labels.float()
        torch.testing.assert_close(
            mixed.images.mean(dim=(1, 2, 3)), mixed.share * labels + (1 - mixed.share) * partner, atol=1e-4, rtol=0
        )
        torch.testing.assert_close(mixed.labels, labels)
        moved = (partner != labels).nonzero().flatten()
        if len(moved) and 0.01 < mixed.share < 0.99:
            kinds.add(len(mixed.images[moved[0]].unique()))  # cut: two values; mixed: one between them
        again = mix_batch(images, labels, mixup=0.4, cutmix=1.0, seed=3, step=step)
        assert torch.equal(mixed.images, again.images)
    assert kinds == {1, 2}
    assert torch.equal(images, torch.arange(4.0)[:, None, None, None].expand(4, 3, 24, 16))
    plain = mix_batch(images, labels, mixup=0.0, cutmix=0.0, seed=3, step=0)
    assert plain.images is images and plain.share == 1.0


def test_eight_views_are_all_turns_and_their_mirror_images() -> None:
    images = torch.arange(18.0).reshape(1, 2, 3, 3)
    views = {tuple(view.flatten().tolist()) for view in turn_views(images, 8)}
    assert len(views) == 8 and tuple(images.flip(2).flatten().tolist()) in views
    assert [view is images for view in turn_views(images, 1)] == [True]


def test_a_variant_is_a_recipe_by_name() -> None:
    config = FinetuneConfig(variants=("default", "lora", "tta"), epochs=3)
    assert resolve_recipe(config, "default").train == "full" and resolve_recipe(config, "default").test_views == 1
    lora = resolve_recipe(config, "lora")
    assert lora.train == "lora" and lora.base_lr == 2e-3 and lora.epochs == 3
    assert resolve_recipe(config, "tta").test_views == 8
    recipe = describe_recipe(config, "lora")
    assert recipe["variant"] == "lora" and recipe["train"] == "lora" and not {"variants", "recipes"} & set(recipe)
    with pytest.raises(
        UserError, match=r"finetune.variants \(lore\): no such recipe; known: default, lora, last_blocks"
    ):
        resolve_recipe(config, "lore")
    with pytest.raises(UserError, match=r"finetune.recipes.x: unknown key base_lrr .*did you mean base_lr\?"):
        resolve_recipe(FinetuneConfig(recipes={"x": {"base_lrr": 1}}), "x")
    with pytest.raises(UserError, match=r"finetune.recipes.x: a recipe has no variants of its own"):
        resolve_recipe(FinetuneConfig(recipes={"x": {"variants": ["y"]}}), "x")


@pytest.mark.parametrize("variant", ["lora", "last_blocks", "mixup", "cutmix", "sampler", "tta"])
def test_every_shipped_recipe_learns(
    trial_and_features: tuple[Trial, np.ndarray], clinic: ShardSet, encoder: Encoder, variant: str
) -> None:
    trial, features = trial_and_features
    config = FinetuneConfig(epochs=8, batch_size=8, base_lr=2e-3, layer_decay=0.9, head="zero")
    scored = score_finetune(replace(trial, recipe={"variant": variant}), features, encoder, clinic, config)
    auroc = compute_metric("auroc", trial.split.labels[trial.test], scored.scores).value
    assert auroc is not None and auroc > 0.7
    num = sum(parameter.numel() for parameter in encoder.module.parameters()) + 2 * (encoder.embed_dim + 1)
    assert (scored.chosen["num_trained_parameters"] < 0.5 * num) == (variant in ("lora", "last_blocks"))


def test_a_loss_that_explodes_is_a_clear_line(
    trial_and_features: tuple[Trial, np.ndarray], clinic: ShardSet, encoder: Encoder
) -> None:
    trial, features = trial_and_features
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+; lower finetune.base_lr \(1e\+30\)"):
        score_finetune(trial, features, encoder, clinic, FinetuneConfig(base_lr=1e30, epochs=2, warmup_epochs=0))


def test_a_cnns_batch_norms_keep_their_statistics_unless_they_are_trained() -> None:
    cnn = load_encoder("timm:test_resnet@random:0?image_size=32")
    network = choose(cnn, "full")
    set_train_mode(network, "frozen")
    network(torch.randn(4, 3, 32, 32))
    for name, value in network.state_dict().items():
        assert torch.equal(value, cnn.module.state_dict()[name])
    last = choose(cnn, "last_blocks", num_last_blocks=1)
    set_train_mode(last, "trained")
    last(torch.randn(4, 3, 32, 32))
    moved = {name for name, value in last.state_dict().items() if not torch.equal(value, cnn.module.state_dict()[name])}
    assert moved and all(name.startswith("model.layer4.") for name in moved)


@pytest.mark.slow
def test_a_cnn_is_fine_tuned(clinic: ShardSet, make_task: MakeTask, tmp_path: Path) -> None:
    cnn = load_encoder("timm:test_resnet@random:0?image_size=32")
    trial = make_trial(make_task(), clinic, cnn)
    features = compute_features(cnn, clinic, cache_dir=tmp_path).values[trial.split.rows]
    for train in ("full", "lora"):
        config = FinetuneConfig(epochs=1, balance="loss", train=train)
        assert np.isfinite(score_finetune(trial, features, cnn, clinic, config).scores).all()


@pytest.mark.slow
def test_the_inception_of_a_published_file_is_fine_tuned_as_esteva_did(
    clinic: ShardSet, make_task: MakeTask, tmp_path: Path
) -> None:
    from panfm.evaluation.run_config import EvaluateConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        published = timm.create_model("inception_v3", num_classes=1000, aux_logits=True)  # as the published files are
    save_file({name: value.contiguous() for name, value in published.state_dict().items()}, tmp_path / "i.safetensors")
    address = f"timm:inception_v3.tv_in1k@{tmp_path / 'i.safetensors'}"
    inception = load_encoder(address)
    assert inception.image_size == 299 and inception.embed_dim == 2048 and inception.card.contamination == "none"
    assert not any(name.startswith(("model.AuxLogits", "model.fc.")) for name in inception.module.state_dict())

    config = load_config(EvaluateConfig, "esteva_inception_v3", ["encoders=[x]", "shards=[x]"], "configs/evaluate")
    recipe = resolve_recipe(config.finetune, config.finetune.variants[0])
    assert (recipe.train, recipe.optimizer, recipe.layer_decay, recipe.schedule) == ("full", "rmsprop", 1, "staircase")
    optimizer = build_optimizer(
        inception.module.requires_grad_(True), torch.nn.Linear(2048, 2), optimizer=recipe.optimizer,
        base_lr=recipe.base_lr, layer_decay=recipe.layer_decay, weight_decay=recipe.weight_decay,
    )  # fmt: skip
    assert {(group["lr"], group["eps"], group["momentum"], group["alpha"]) for group in optimizer.param_groups} == {
        (1e-3, 0.1, 0.9, 0.9)
    }
    inception.module.requires_grad_(False)

    small = load_encoder(f"{address}?image_size=80")  # 299 pixels take a minute here
    trial = make_trial(make_task(), clinic, small)
    trial = replace(trial, train=trial.train[:16], test=trial.test[:4], recipe={"variant": config.finetune.variants[0]})
    features = np.zeros((len(trial.split.rows), 2048), dtype=np.float32)
    short = replace(config.finetune, epochs=1, batch_size=8)
    scored = score_finetune(trial, features, small, clinic, short)
    assert np.isfinite(scored.scores).all() and scored.chosen["num_steps"] == 2
