"""Queries have partners in their own fold; ranks equal a loop; captions need the text tower of the encoder itself."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from panfm.config import validate
from panfm.encoder.export import export_encoder
from panfm.encoder.text import load_text
from panfm.errors import UserError
from panfm.evaluation.families import ZeroShotTarget
from panfm.evaluation.retrieval import RetrievalConfig, build_queries, rank_partners, score_retrieval
from panfm.evaluation.splits import load_split
from panfm.evaluation.zero_shot import ZeroShotConfig, list_prompts, score_zero_shot
from panfm.objectives.image_text import ImageTextConfig
from panfm.shards.index import ShardSet
from tests.encoder.test_text import TEXT, write_checkpoint
from tests.evaluation.lesion_archive import list_column, make_card, make_material, make_trial

PAIRS = {"match": "lesion", "query": "clinical", "gallery": "dermoscopic"}
VISITS = {"match": "lesion", "query": "first_visit", "gallery": "later_visits"}
CAPTIONS = {"match": "caption", "query": "image", "gallery": "caption"}
needs_text = pytest.mark.skipif(find_spec("open_clip") is None, reason='no open_clip: pip install "panfm[text]"')


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "step-1", ImageTextConfig(output_dim=16, text=TEXT))
    return export_encoder(folder / "step-1", folder / "out")


def draw_features(lesions: ShardSet, noise: float, *, shift: float = 0.0) -> np.ndarray:
    """Each lesion its own direction, noise on each image, and a shift of the clinical ones that says nothing."""
    rng = np.random.default_rng(0)
    own = {name: rng.normal(size=12) for name in sorted(set(list_column(lesions, "lesion_id")))}
    features = np.stack([own[name] for name in list_column(lesions, "lesion_id")])
    clinical = np.array(list_column(lesions, "modality")) == "clinical"
    return features + noise * rng.normal(size=features.shape) + shift * clinical[:, None] * np.eye(12)[0]


def loop_ranks(lesions: ShardSet, queries: np.ndarray, answers: list[int], features: np.ndarray) -> list[float]:
    names = list_column(lesions, "lesion_id")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    ranks = []
    for row in queries:
        similarity = {other: float(unit[row] @ unit[other]) for other in answers}
        best = max(value for other, value in similarity.items() if names[other] == names[row])
        ranks.append(1.0 + sum(value > best for other, value in similarity.items() if names[other] != names[row]))
    return ranks


@pytest.mark.parametrize("target", [PAIRS, VISITS], ids=["pairs", "visits"])
def test_ranks_equal_a_loop_over_the_gallery_of_the_test_fold(lesions: ShardSet, target: dict[str, object]) -> None:
    modality = None if target is PAIRS else "dermoscopic"
    card = make_card("retrieval", target, "median_rank", modality=modality)
    images = load_split(card, lesions)
    split = build_queries(card, images, lesions)
    modalities, days = list_column(lesions, "modality"), list_column(lesions, "visit_day")
    asks = [row for row in images.rows if (modalities[row] == "clinical" if target is PAIRS else days[row] == 0)]
    assert sorted(split.rows) == sorted(asks) and split.hash != images.hash
    assert [list(of_unit) for of_unit in split.members] == [[row] for row in split.rows]
    assert (split.targets == (2 if target is PAIRS else 1)).all()

    material = make_material(lesions, draw_features(lesions, noise=0.8))
    trial = make_trial(card, split, material, "cosine", label_fraction=0)
    scored = score_retrieval(trial, material, RetrievalConfig())
    exam = set(np.flatnonzero(np.array(list_column(lesions, "official_split")) == "exam").tolist())
    answers = [row for row in exam if modalities[row] == "dermoscopic" and (target is PAIRS or days[row] == 90)]
    assert scored.scores[:, 0].tolist() == loop_ranks(lesions, split.rows[trial.test], answers, material.features)
    assert (scored.scores[:, 1] == len(answers)).all() and len(answers) == (40 if target is PAIRS else 20)
    np.testing.assert_array_equal(scored.targets, split.targets[trial.test])
    assert 1 < scored.scores[:, 0].mean() < 8  # found, but not all of them


def test_an_image_without_a_partner_in_its_fold_asks_nothing(lesions: ShardSet) -> None:
    card = make_card("retrieval", PAIRS, "median_rank")
    images = load_split(card, lesions)
    lesion = np.array(list_column(lesions, "lesion_id"))[images.rows]
    gone = lesion == lesion[0]
    folds = np.where(
        gone & (np.array(list_column(lesions, "modality"))[images.rows] == "dermoscopic"), "val", images.folds
    )
    torn = build_queries(card, type(images)(**{**vars(images), "folds": folds}), lesions)
    assert len(torn.rows) == len(build_queries(card, images, lesions).rows) - 1
    assert torn.notes[-1] == "1 queries (clinical) without a partner (dermoscopic)"
    with pytest.raises(UserError, match=r"none of 0 images .histopathology. has a partner"):
        build_queries(make_card("retrieval", {**PAIRS, "query": "histopathology"}, "median_rank"), images, lesions)


def test_centring_takes_away_what_two_modalities_differ_by(lesions: ShardSet) -> None:
    card = make_card("retrieval", PAIRS, "median_rank")
    split = build_queries(card, load_split(card, lesions), lesions)
    material = make_material(lesions, draw_features(lesions, noise=0.3, shift=12.0))
    ranks = {}
    for variant in ("cosine", "centred"):
        trial = make_trial(card, split, material, variant, label_fraction=0)
        ranks[variant] = score_retrieval(trial, material, RetrievalConfig()).scores[:, 0].mean()
    assert ranks["centred"] < 0.6 * ranks["cosine"]
    # The mean is that of other folds: other images of the scored fold change nothing for a query.
    trial = make_trial(card, split, material, "centred", label_fraction=0)
    everything = type(trial)(**{**vars(trial), "test": np.arange(len(split.rows))})
    with pytest.raises(UserError, match=r"no image outside of the scored fold.*variants=\[cosine\]"):
        score_retrieval(everything, material, RetrievalConfig())


def test_equal_images_rank_in_the_middle_and_other_partners_do_not_stand_in_the_way() -> None:
    same = np.ones((7, 3))
    ranks, partners = rank_partners(same[:1], same, np.array(["a"]), np.array([*"abbbbbb"]))
    assert ranks.tolist() == [4.0] and partners.tolist() == [1]  # places 1 to 7
    answers = np.array([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, 0.2]])
    ranks, partners = rank_partners(np.array([[1.0, 0.0]]), answers, np.array(["a"]), np.array([*"baba"]))
    assert ranks.tolist() == [1.0] and partners.tolist() == [2]
    ranks, _ = rank_partners(np.array([[1.0, 0.0]]), answers, np.array(["a"]), np.array([*"bbba"]))
    assert ranks.tolist() == [3.0]


@needs_text
def test_captions_are_found_by_the_text_tower(lesions: ShardSet, export: Path) -> None:
    card = make_card("retrieval", CAPTIONS, "median_rank")
    split = build_queries(card, load_split(card, lesions), lesions)
    assert len(split.rows) == lesions.num_samples and (split.targets == 1).all()
    rng = np.random.default_rng(0)
    material = make_material(lesions, rng.normal(size=(lesions.num_samples, 64)), f"panfm:{export}")
    trial = make_trial(card, split, material, "cosine", label_fraction=0)
    scored = score_retrieval(trial, material, RetrievalConfig())
    rows = split.rows[trial.test]
    captions = [lesions.read_caption(int(row)) or "" for row in rows]
    distinct = sorted(set(captions))  # two dermoscopic images of a lesion share theirs
    assert (scored.scores[:, 1] == len(distinct)).all() and len(distinct) == 40 < len(rows)
    text = load_text(export)
    similarity = text.embed_features(material.features[rows]).astype(np.float64) @ text.embed_texts(distinct).T
    for place, caption in enumerate(captions):
        own = distinct.index(caption)
        assert scored.scores[place, 0] == pytest.approx(1 + (similarity[place] > similarity[place, own] + 1e-9).sum())


@needs_text
def test_zero_shot_compares_with_the_mean_prompt_of_each_class(lesions: ShardSet, export: Path) -> None:
    target = {
        "phrases": {"naevus": ["mole", "naevus"], "melanoma": ["melanoma"]},
        "templates": ["a {}", "this is a {}"],
    }
    card = make_card("zero_shot", target, "auroc")
    split = load_split(card, lesions)
    material = make_material(
        lesions, np.random.default_rng(0).normal(size=(lesions.num_samples, 64)), f"panfm:{export}"
    )
    trial = make_trial(card, split, material, label_fraction=0)
    scored = score_zero_shot(trial, material, ZeroShotConfig())
    text = load_text(export)
    prompts = [["a mole", "this is a mole", "a naevus", "this is a naevus"], ["a melanoma", "this is a melanoma"]]
    assert [list_prompts(ZeroShotTarget(**target), name) for name in card.classes] == prompts
    means = [text.embed_texts(of_class).astype(np.float64).mean(axis=0) for of_class in prompts]
    images = text.embed_features(material.features[split.rows[trial.test]]).astype(np.float64)
    logits = text.scale * np.stack([images @ mean / np.linalg.norm(mean) for mean in means], axis=1)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scored.scores, expected, atol=1e-9)
    assert scored.chosen["num_prompts"] == [4, 2]

    other = make_material(lesions, material.features, f"panfm:{export}?pooling=cls")
    with pytest.raises(UserError, match=r"has pooling cls, its text tower was trained beside mean; leave out"):
        score_zero_shot(trial, other, ZeroShotConfig())
    untrained = make_material(lesions, material.features, f"panfm:{export}@random:0")
    with pytest.raises(UserError, match=r"has no text tower, and the task is asked in words; take an export"):
        score_zero_shot(trial, untrained, ZeroShotConfig())


def test_an_encoder_without_a_text_tower_is_refused_in_one_line(lesions: ShardSet) -> None:
    card = make_card("retrieval", CAPTIONS, "median_rank")
    split = build_queries(card, load_split(card, lesions), lesions)
    material = make_material(lesions)
    with pytest.raises(UserError, match=r"encoder test_vit.* has no text tower") as error:
        score_retrieval(make_trial(card, split, material, "cosine", label_fraction=0), material, RetrievalConfig())
    assert "\n" not in str(error.value)
    assert validate(RetrievalConfig, {}, where="test").variants == ("cosine", "centred")
