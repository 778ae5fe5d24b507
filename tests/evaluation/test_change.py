"""Change: which visits make a pair, that the later image is laid on the earlier one, and that no test label is seen."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from panfm.data.decode import decode_rgb
from panfm.encoder.load import load_encoder
from panfm.errors import UserError
from panfm.evaluation.change import ChangeConfig, SiameseHead, _get_registered, build_pairs, score_change
from panfm.evaluation.protocol import Material, Scored, Trial, build_trial
from panfm.evaluation.registration import align_pixels
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.small_heads import HeadConfig
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.tasks import TaskCard
from panfm.features import compute_features
from panfm.measures.metrics import compute_metric
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import make_source_card

CARD = {
    "columns": {
        "path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold",
        "modality": "modality", "visit_day": "day",
    },
    "modality": None,
}  # fmt: skip
OFFICIAL = {"kind": "official", "train": ["learn"], "test": ["exam"]}
MakeTask = Callable[..., TaskCard]
QUICK = HeadConfig(lrs=(1e-3,), max_epochs=8, num_seeds=1, num_folds=2)


def make_card(make_task: MakeTask, *, pairs: str = "consecutive", **target: int) -> TaskCard:
    return make_task(
        family="change", modality="dermoscopic", split=OFFICIAL, target={"pairs": pairs, **target},
        classes=["naevus", "melanoma"],
    )  # fmt: skip


def make_row(number: int, lesion: str, day: str, label: str, modality: str = "dermoscopic") -> dict[str, str]:
    patient = lesion[:1] or "Z"
    return {
        "file": f"{number}.jpg", "patient": patient, "lesion": lesion, "day": day, "diagnosis": label,
        "modality": modality, "fold": "exam" if patient in "CZ" else "learn", "colour": "naevus",
    }  # fmt: skip


# Lesion, day, label, modality; the number of a row is its place.
VISITS = [
    ("A1", "0", ""), ("A1", "30", "naevus"), ("A1", "400", "melanoma"), ("A1", "30", "naevus", "clinical"),
    ("A2", "0", "naevus"), ("A2", "5", "naevus"), ("A2", "5", "naevus"),  # 5, 6: one visit, two images
    ("B1", "0", "naevus"), ("B1", "90", ""), ("B1", "180", "melanoma"),
    ("B2", "7", "naevus"), ("", "3", "naevus"), ("B3", "", "naevus"),
    ("C1", "0", "naevus"), ("C1", "60", "naevus"),
    ("A1", "400", "melanoma", "clinical"),  # a pair of another modality: not of this task, and not counted
]  # fmt: skip


def find_pairs(card: TaskCard, split: Split, shard_set: ShardSet) -> tuple[set[tuple[str, str]], Split]:
    """Pairs as days of visits, (lesion's first row, days)."""
    pairs = build_pairs(card, split, shard_set)
    table = shard_set.table.to_pydict()
    named = {(table["visit_day"][a], table["visit_day"][b], pairs.folds[i]) for i, (a, b) in enumerate(pairs.members)}
    for place, (a, b) in enumerate(pairs.members):
        assert table["lesion_id"][a] == table["lesion_id"][b] and pairs.rows[place] == a
        assert pairs.keys[place] == f"{table['key'][a]}+{table['key'][b]}"
        assert dict(table["labels"][b])["diagnosis"] == card.classes[pairs.labels[place]]
        assert pairs.groups[place] == table["group_id"][a] == table["group_id"][b]
    return named, pairs


def test_visits_are_paired_as_the_card_says_and_what_is_left_out_is_counted(
    build_rows: Callable[..., ShardSet], make_task: MakeTask
) -> None:
    shard_set = build_rows([make_row(number, *visit) for number, visit in enumerate(VISITS)], **CARD)
    card = make_card(make_task)
    split = load_split(card, shard_set)
    found, pairs = find_pairs(card, split, shard_set)
    # Earlier images need no label (A1 at 0); the later one does (B1 at 90), and stands in the split's order of keys.
    assert found == {(0, 30, "train"), (30, 400, "train"), (0, 5, "train"), (90, 180, "train"), (0, 60, "test")}
    assert {note for note in pairs.notes if note not in split.notes} == {
        "1 further images of a visit", "1 pairs whose later image has no label or fold", "1 lesions of one visit",
        "2 images without a lesion id or a day of the visit",
    }  # fmt: skip
    twice = {key for key, lesion, day in zip(*(shard_set.table.column(name).to_pylist() for name in (
        "key", "lesion_id", "visit_day")), strict=True) if day == 5 and lesion is not None}  # fmt: skip
    assert min(twice) in {key.split("+")[1] for key in pairs.keys.tolist()} and len(twice) == 2

    found, ends = find_pairs(make_card(make_task, pairs="first_and_last"), split, shard_set)
    assert found == {(0, 400, "train"), (0, 5, "train"), (0, 180, "train"), (0, 60, "test")}
    found, some = find_pairs(make_card(make_task, min_days=30, max_days=100), split, shard_set)
    assert found == {(0, 30, "train"), (90, 180, "train"), (0, 60, "test")}
    assert "2 pairs too close or too far apart in days" in some.notes
    assert len({split.hash, pairs.hash, ends.hash, some.hash}) == 4

    split_up = shard_set.table.column("group_id").to_pylist()
    first = shard_set.table.column("visit_day").to_pylist().index(400)
    split_up[first] = "another"
    table = shard_set.table
    moved = replace(shard_set, table=table.set_column(table.column_names.index("group_id"), "group_id", [split_up]))
    assert "1 pairs across two groups (patient)" in build_pairs(card, split, moved).notes
    with pytest.raises(UserError, match=r"no lesion has two visits to pair .* it needs lesion_id and visit_date"):
        build_pairs(make_card(make_task, min_days=5000), split, shard_set)


def draw_lesion(rng: np.random.Generator, shape: np.ndarray, skin: np.ndarray, *, spot: bool) -> np.ndarray:
    """A lobed lesion, turned and shifted at random, with or without a blue spot: uint8 [64, 72, 3]."""
    rows, columns = np.mgrid[:64, :72] - np.array([32, 36])[:, None, None]
    turn, (down, right) = rng.uniform(0, 2 * np.pi), rng.uniform(-6, 6, 2)
    y, x = rows - down, columns - right
    x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    angle = np.arctan2(y, x)
    radius = 15 + sum(size * np.cos(order * angle + phase) for order, (size, phase) in enumerate(shape, start=1))
    picture = np.where((np.hypot(x, y) < radius)[..., None], skin * [0.5, 0.4, 0.35], skin)
    if spot:
        picture = np.where((np.hypot(x - 5, y) < 6)[..., None], [60, 70, 200], picture)
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """24 lesions seen twice; a third have the spot from the start, a third get it (changed), a third never."""
    root = tmp_path_factory.mktemp("grown")
    (root / "raw").mkdir()
    lines = ["file,patient,lesion,day,fold,change"]
    for number in range(24):
        rng = np.random.default_rng(number)
        shape, skin = rng.uniform([1, 0], [3, 6], (4, 2)), np.array([210, 160, 130]) * rng.uniform(0.75, 1.1)
        kind = number % 3
        for visit, spot in enumerate((kind == 0, kind < 2)):
            Image.fromarray(draw_lesion(rng, shape, skin, spot=spot)).save(root / "raw" / f"{number}-{visit}.png")
            label = ("", "yes" if kind == 1 else "no")[visit]
            fold = "exam" if number % 4 == 0 else "learn"
            lines.append(f"{number}-{visit}.png,P{number},L{number},{visit * (20 + number // 4 % 2)},{fold},{label}")
    (root / "raw" / "table.csv").write_text("\n".join(lines) + "\n")
    columns = {
        "path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold", "visit_day": "day",
    }  # fmt: skip
    card = make_source_card("clinic", modality="dermoscopic", columns=columns, labels={"change": {"column": "change"}})
    build_shards(card, root / "raw", root / "shards", options=BuildOptions(min_side=16))
    return open_shard_set(root / "shards")


@pytest.fixture(scope="module")
def material(grown: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Material:
    encoder = load_encoder("timm:test_vit@random:0?image_size=32")
    features = compute_features(encoder, grown, cache_dir=tmp_path_factory.mktemp("cache"), workers=0)
    return Material(features.values, encoder, grown)


@pytest.fixture
def trial(grown: ShardSet, make_task: MakeTask) -> Trial:
    card = make_task(
        family="change", modality="dermoscopic", split=OFFICIAL, target={"pairs": "consecutive"}, label="change",
        classes=["no", "yes"], ignore=[],
    )  # fmt: skip
    encoder = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=3, image_size=32, pooling="mean")
    pairs = build_pairs(card, load_split(card, grown), grown)
    return build_trial(
        card, pairs, encoder, grown, protocol="change", recipe={"variant": "difference"}, evaluated_on="test",
        label_fraction=1.0, draw=0, seed=0, num_replicates=100, unit="pair",
    )  # fmt: skip


def score(trial: Trial, material: Material, variant: str) -> Scored:
    return score_change(replace(trial, recipe={"variant": variant}), material, ChangeConfig(siamese=QUICK))


def test_two_visits_show_what_one_cannot(trial: Trial, material: Material) -> None:
    labels = trial.split.labels[trial.test]
    found = {name: score(trial, material, name) for name in ChangeConfig().variants}
    aurocs = {name: compute_metric("auroc", labels, scored.scores).value for name, scored in found.items()}
    assert aurocs["difference"] > 0.9 > max(aurocs["single_image"], aurocs["interval_only"]), aurocs
    for name, scored in found.items():
        assert ("num_registered" in scored.chosen) == (name not in ("interval_only", "single_image"))


def test_the_later_image_is_encoded_as_it_lies_on_the_earlier_one(trial: Trial, material: Material) -> None:
    config = ChangeConfig()
    registered = _get_registered(material, trial, config)
    assert _get_registered(material, replace(trial, label_fraction=0.5), config) is registered  # encoded once
    kept = [alignment.is_kept for alignment in registered.alignments]
    chosen = score(trial, material, "difference").chosen
    assert chosen["num_pairs"] == 24 and chosen["num_registered"] == sum(kept) >= 20
    assert chosen["match_after"] > chosen["match_before"] + 0.1
    distances = {"as it is": [], "registered": []}
    for place, (earlier, later) in enumerate(trial.split.members):
        alignment = registered.alignments[place]
        pixels = decode_rgb(material.shard_set.read_image(int(later)))
        if alignment.is_kept:
            data = io.BytesIO()
            Image.fromarray(align_pixels(pixels, alignment)).save(data, "PNG")
            view = torch.from_numpy(material.encoder.transform.apply(data.getvalue()))[None]
            expected = material.encoder.forward(view)[0].numpy()
        else:
            expected = material.features[later]
        np.testing.assert_allclose(registered.later[place], expected, atol=1e-4)
        distances["as it is"].append(np.linalg.norm(material.features[later] - material.features[earlier]))
        distances["registered"].append(np.linalg.norm(registered.later[place] - material.features[earlier]))
    same = trial.split.labels == 0
    assert np.mean(np.array(distances["registered"])[same]) < np.mean(np.array(distances["as it is"])[same])


def test_the_interval_alone_tells_no_two_pairs_of_one_interval_apart(trial: Trial, material: Material) -> None:
    scores = score(trial, material, "interval_only").scores[:, 1]
    days = np.array(material.shard_set.table.column("visit_day").to_pylist())[np.stack(trial.split.members)]
    intervals = (days[:, 1] - days[:, 0])[trial.test]
    assert set(intervals.tolist()) == {20, 21}
    for interval in set(intervals.tolist()):
        assert len(np.unique(scores[intervals == interval])) == 1


def test_no_test_label_takes_part(trial: Trial, material: Material) -> None:
    labels = trial.split.labels.copy()
    labels[trial.test] = 1 - labels[trial.test]
    blind = replace(trial, split=replace(trial.split, labels=labels))
    for variant in ChangeConfig().variants:
        first, second = score(trial, material, variant), score(blind, material, variant)
        np.testing.assert_array_equal(first.scores, second.scores)


def test_the_siamese_head_does_not_depend_on_the_order() -> None:
    torch.manual_seed(0)
    head, pairs = SiameseHead(6, 3).eval(), torch.randn(5, 2, 6)
    torch.testing.assert_close(head(pairs), head(pairs.flip(1)))
    assert head(pairs).shape == (5, 3)
