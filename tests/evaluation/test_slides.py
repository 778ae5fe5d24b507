"""Slides: which tiles make a bag, that pooling is the mean of all of them, that attention finds the few that tell."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.evaluation.protocol import Material, Trial, build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.slides import GatedAttention, SlidesConfig, build_bags, score_slides
from panfm.evaluation.small_heads import HeadConfig
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.metrics import compute_metric
from panfm.measures.probe import fit_probe_cv
from panfm.shards.index import ShardSet

COLUMNS = {
    "columns": {
        "path": "file", "patient_id": "patient", "lesion_id": "lesion", "slide_id": "slide", "official_split": "fold",
    },
    "modality": "histopathology",
}  # fmt: skip
OFFICIAL = {"kind": "official", "train": ["learn"], "test": ["exam"]}
Rows = list[dict[str, str]]


def list_tiles(num_patients: int = 24) -> Rows:
    """A patient has one slide of 2 to 4 tiles, every sixth patient a second slide of one tile."""
    rows: Rows = []
    for patient in range(num_patients):
        slides = [f"S{patient}"] * (2 + patient % 3) + [f"S{patient}b"] * (patient % 6 == 0)
        for slide in slides:
            label = ("naevus", "melanoma")[patient % 2]
            rows.append({
                "file": f"{len(rows)}.jpg", "patient": f"P{patient}", "lesion": f"L{patient}", "slide": slide,
                "fold": "exam" if patient % 3 == 2 else "learn", "colour": label, "diagnosis": label,
            })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("timm:test_vit@random:0?image_size=32")


def make_card(make_task: Callable[..., TaskCard], **changes: object) -> TaskCard:
    target = {"bag": changes.pop("bag", "slide")}
    return make_task(family="slides", modality="histopathology", split=OFFICIAL, target=target, **changes)


def make_trial(card: TaskCard, bags: Split, shard_set: ShardSet, variant: str) -> Trial:
    encoder = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=3, image_size=32, pooling="mean")
    return build_trial(
        card, bags, encoder, shard_set, protocol="slides", recipe={"variant": variant}, evaluated_on="test",
        label_fraction=1.0, draw=0, seed=0, num_replicates=100, unit="slide",
    )  # fmt: skip


def test_bags_hold_all_tiles_of_a_slide_or_of_a_patient(
    build_rows: Callable[..., ShardSet], make_task: Callable[..., TaskCard]
) -> None:
    rows = list_tiles()
    rows[0]["slide"] = ""
    shard_set = build_rows(rows, **COLUMNS)
    card = make_card(make_task)
    split = load_split(card, shard_set)
    table = shard_set.table.to_pydict()
    for kind, num_bags in (("slide", 28), ("patient", 24)):
        bags = build_bags(make_card(make_task, bag=kind), split, shard_set)
        assert len(bags.keys) == num_bags and len(set(bags.keys.tolist())) == num_bags
        for key, members in zip(bags.keys.tolist(), bags.members, strict=True):
            assert set(members.tolist()) == {row for row, name in enumerate(table[f"{kind}_id"]) if name == key}
        places = {row: place for place, row in enumerate(split.rows.tolist())}
        first = [places[int(members[0])] for members in bags.members]
        for name in ("labels", "groups", "folds"):
            np.testing.assert_array_equal(getattr(bags, name), getattr(split, name)[first])
    assert bags.hash != build_bags(card, split, shard_set).hash
    assert build_bags(card, split, shard_set).notes[-1] == "1 tiles without a slide id"


def test_a_bag_of_two_classes_or_two_groups_is_refused(
    build_rows: Callable[..., ShardSet], make_task: Callable[..., TaskCard]
) -> None:
    rows = list_tiles(8)
    rows[1]["diagnosis"] = "melanoma"
    shard_set = build_rows(rows, **COLUMNS)
    card = make_card(make_task)
    split = load_split(card, shard_set)
    with pytest.raises(UserError, match=r"are of several classes \(1 naevus, 1 melanoma\); repair the labels"):
        build_bags(card, split, shard_set)
    labels = np.zeros_like(split.labels)
    cut = replace(split, labels=labels, groups=np.array([f"G{place}" for place in range(len(split.groups))]))
    with pytest.raises(UserError, match=r"are of \d groups .* set group: slide in the card"):
        build_bags(card, cut, shard_set)
    with pytest.raises(UserError, match="has a slide_id, which makes the bags"):
        table = shard_set.table
        nameless = pa.nulls(table.num_rows, pa.string())
        build_bags(
            card,
            split,
            replace(shard_set, table=table.set_column(table.column_names.index("slide_id"), "slide_id", nameless)),
        )


def test_the_mean_is_probed_and_attention_finds_the_tile_that_tells(
    build_rows: Callable[..., ShardSet], make_task: Callable[..., TaskCard], encoder: Encoder
) -> None:
    shard_set = build_rows(list_tiles(30), **COLUMNS)
    card = make_card(make_task)
    bags = build_bags(card, load_split(card, shard_set), shard_set)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(shard_set.num_samples, 6)).astype(np.float32)
    features[:, 1] += 100  # a feature whose mean is large beside its spread
    for label, members in zip(bags.labels, bags.members, strict=True):
        features[members[0], 0] = 9  # one tile of each bag is marked, and it alone tells
        features[members[0], 2] = 3 * (2 * label - 1)
        features[members[1:], 2] *= 4
    material = Material(features, encoder, shard_set)

    trial = make_trial(card, bags, shard_set, "mean")
    mean = score_slides(trial, material, SlidesConfig())
    pooled = np.stack([features[rows].astype(np.float64).mean(axis=0) for rows in bags.members])
    fit = fit_probe_cv(pooled[trial.train], bags.labels[trial.train], bags.groups[trial.train], num_classes=2, seed=0)
    np.testing.assert_allclose(mean.scores, fit.probe.predict(pooled[trial.test]), rtol=1e-6)
    assert mean.chosen["tiles_a_bag"] == {"least": 1, "median": 3.0, "most": 4}

    quick = SlidesConfig(abmil=HeadConfig(lrs=(1e-3,), max_epochs=10, num_seeds=2, num_folds=3))
    trial = make_trial(card, bags, shard_set, "abmil")
    attention = score_slides(trial, material, quick)
    labels = bags.labels[trial.test]
    assert compute_metric("auroc", labels, attention.scores).value > 0.95
    assert compute_metric("auroc", labels, mean.scores).value < 0.9

    # In training some tiles a step are enough; a test bag is looked at whole, and the order of its tiles says nothing.
    some = score_slides(trial, material, replace(quick, tiles_a_step=1))
    assert np.abs(some.scores - attention.scores).max() > 1e-3
    others = bags.labels.copy()
    others[trial.test] = 1 - labels
    turned = replace(bags, labels=others, members=tuple(
        rows[::-1] if place in set(trial.test.tolist()) else rows for place, rows in enumerate(bags.members)
    ))  # fmt: skip
    again = score_slides(replace(trial, split=turned), material, quick)
    np.testing.assert_allclose(again.scores, attention.scores, atol=1e-5)


def test_gated_attention_is_the_formula_of_its_paper() -> None:
    torch.manual_seed(0)
    mean, scale = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 0.5])
    module = GatedAttention(mean, scale, num_classes=2).eval()
    tiles = torch.randn(5, 3)
    hidden = torch.relu(((tiles - mean) / scale) @ module.project[0].weight.T + module.project[0].bias)
    value = torch.tanh(hidden @ module.value[0].weight.T + module.value[0].bias)
    gate = torch.sigmoid(hidden @ module.gate[0].weight.T + module.gate[0].bias)
    energy = torch.exp((value * gate) @ module.weigh.weight[0] + module.weigh.bias)
    pooled = (energy / energy.sum()) @ hidden
    torch.testing.assert_close(module(tiles), module.classify(pooled))
    torch.testing.assert_close(module(tiles.flip(0)), module(tiles))
