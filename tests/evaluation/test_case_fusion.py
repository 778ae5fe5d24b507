"""Cases: which images make a lesion, that a missing view says nothing, and that two views are more than one."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.evaluation.case_fusion import CaseFusionConfig, build_cases, score_case_fusion
from panfm.evaluation.protocol import Material, Scored, Trial, build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.metrics import compute_metric
from panfm.measures.probe import fit_probe_cv
from panfm.shards.index import ShardSet

Rows = list[dict[str, str]]
CARD = {
    "columns": {
        "path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold",
        "modality": "modality", "age": "age",
    },
    "modality": None,
}  # fmt: skip


def make_row(number: int, patient: str, lesion: str, modality: str, label: str, fold: str, age: str = "") -> dict:
    return {
        "file": f"{number}.jpg", "patient": patient, "lesion": lesion, "modality": modality, "diagnosis": label,
        "fold": fold, "age": age, "colour": "naevus",
    }  # fmt: skip


def list_case_rows() -> Rows:
    """40 patients of one lesion: each clinical, two of three dermoscopic, some twice; dermoscopic ones unlabelled."""
    rows: Rows = []
    for patient in range(40):
        label, fold = ("naevus", "melanoma")[patient % 2], "exam" if patient % 3 == 0 else "learn"
        views = ["clinical", *["dermoscopic"] * (patient % 5 > 0), *["clinical"] * (patient % 7 == 0)]
        for modality in views:
            own = label if modality == "clinical" else ""
            rows.append(
                make_row(len(rows), f"P{patient}", f"L{patient}", modality, own, fold, str(40 + 10 * (patient % 2)))
            )
    return rows


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("timm:test_vit@random:0?image_size=32")


def make_trial(card: TaskCard, shard_set: ShardSet, variant: str) -> Trial:
    encoder = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=3, image_size=32, pooling="mean")
    cases = build_cases(card, load_split(card, shard_set), shard_set)
    return build_trial(
        card, cases, encoder, shard_set, protocol="case_fusion", recipe={"variant": variant}, evaluated_on="test",
        label_fraction=1.0, draw=0, seed=0, num_replicates=100, unit="lesion",
    )  # fmt: skip


def test_a_case_is_all_images_of_a_lesion_and_what_is_no_case_is_counted(
    build_rows: Callable[..., ShardSet], make_task: Callable[..., TaskCard]
) -> None:
    given = [
        ("A", "A1", "clinical", "naevus"), ("A", "A1", "dermoscopic", ""), ("A", "A1", "clinical", "naevus"),
        ("A", "A2", "clinical", "melanoma"), ("A", "", "dermoscopic", "naevus"),  # which of the two?
        ("B", "B1", "clinical", "naevus"), ("B", "B1", "clinical", "melanoma"),  # two classes
        ("C", "", "clinical", "melanoma"), ("C", "", "dermoscopic", ""),  # the patient's only one
        ("D", "", "clinical", "melanoma"), ("D", "", "clinical", "naevus"),  # two lesions or one
        ("E", "E1", "dermoscopic", "naevus"),  # no clinical image: not of this task
    ]  # fmt: skip
    folds = {"A": "learn", "B": "learn", "C": "exam", "D": "learn", "E": "exam"}
    rows = [make_row(number, *row, folds[row[0]]) for number, row in enumerate(given)]
    shard_set = build_rows(rows, **CARD)
    card = make_task(modality="clinical", split={"kind": "official", "train": ["learn"], "test": ["exam"]})
    split = load_split(card, shard_set)
    cases = build_cases(card, split, shard_set)
    table = shard_set.table.to_pydict()
    expected = {  # by what the shards call the lesion, or the patient
        name: {key for key, *owner in zip(table["key"], table["lesion_id"], table["patient_id"], strict=True)
               if name == (owner[0] or owner[1])}
        for name in cases.keys.tolist()
    }  # fmt: skip
    found = {
        name: {table["key"][row] for row in rows} for name, rows in zip(cases.keys.tolist(), cases.members, strict=True)
    }
    assert found == expected and sorted(map(len, found.values())) == [1, 2, 3]
    by_size = dict(zip(map(len, cases.members), zip(cases.labels, cases.folds, strict=True), strict=True))
    assert by_size == {3: (0, "train"), 1: (1, "train"), 2: (1, "test")}
    assert "1 lesions whose images are of several classes" in cases.notes
    assert "2 images of which nobody says which lesion they show" in cases.notes  # those of D; A's has no label here
    assert cases.hash != split.hash
    # An image that is kept apart from its lesion by the groups could lie in another fold: it is no part of the case.
    largest = max(cases.members, key=len)
    strange = next(row for row in largest if table["modality"][row] == "dermoscopic")
    groups = [*table["group_id"][:strange], "another", *table["group_id"][strange + 1 :]]
    moved = shard_set.table.set_column(shard_set.table.column_names.index("group_id"), "group_id", [groups])
    apart = build_cases(card, split, replace(shard_set, table=moved))
    assert max(map(len, apart.members)) == 2 and not any(strange in rows for rows in apart.members)
    assert "1 images of another group (patient) than their lesion" in apart.notes
    with pytest.raises(UserError, match="none of its 3 lesions has images of two modalities, which case_fusion joins"):
        only = np.flatnonzero(np.isin(table["modality"], ["clinical"]))
        build_cases(card, split, replace(shard_set, table=_hide(shard_set, only)))


def _hide(shard_set: ShardSet, clinical: np.ndarray) -> object:
    """The table as if the other images were not of the lesions: their lesion and patient unknown."""
    table = shard_set.table
    for name in ("lesion_id", "patient_id"):
        values = table.column(name).to_pylist()
        kept = [value if row in set(clinical.tolist()) else None for row, value in enumerate(values)]
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), [kept])
    return table


def score(trial: Trial, shard_set: ShardSet, encoder: Encoder, features: np.ndarray) -> Scored:
    return score_case_fusion(trial, Material(features, encoder, shard_set), CaseFusionConfig())


def test_views_are_joined_and_a_missing_one_says_nothing(
    build_rows: Callable[..., ShardSet], make_task: Callable[..., TaskCard], encoder: Encoder
) -> None:
    shard_set = build_rows(list_case_rows(), **CARD)
    card = make_task(modality="clinical", split={"kind": "official", "train": ["learn"], "test": ["exam"]})
    trial = make_trial(card, shard_set, "images")
    split, table = trial.split, shard_set.table.to_pydict()
    label_of = {row: label for rows, label in zip(split.members, split.labels, strict=True) for row in rows}
    # Each view tells the class in a feature of its own, half of the time; the third is noise.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(table["key"]), 3)).astype(np.float32)
    for row, label in label_of.items():
        features[row, table["modality"][row] == "dermoscopic"] += 1.2 * (2 * label - 1)
    aurocs = {}
    for variant in ("images", "images_metadata", "clinical", "dermoscopic"):
        scored = score(replace(trial, recipe={"variant": variant}), shard_set, encoder, features)
        aurocs[variant] = compute_metric("auroc", split.labels[trial.test], scored.scores).value
    assert aurocs["images_metadata"] == 1.0  # age tells it all
    assert aurocs["images"] > max(aurocs["clinical"], aurocs["dermoscopic"])

    alone = score(replace(trial, recipe={"variant": "dermoscopic"}), shard_set, encoder, features)
    lacking = np.array([all(table["modality"][row] == "clinical" for row in split.members[i]) for i in trial.test])
    assert lacking.sum() == alone.scores.shape[0] - alone.chosen["num_dermoscopic"]["test"] > 1
    assert len(np.unique(alone.scores[lacking, 1])) == 1 < len(np.unique(alone.scores[~lacking, 1]))

    # By hand: standardised by the training cases that have the view, and nothing where there is none.
    views = [[row for row in rows if table["modality"][row] == "dermoscopic"] for rows in split.members]
    known = np.stack([features[views[i]].mean(axis=0) for i in trial.train if views[i]]).astype(np.float64)
    inputs = np.array(
        [(features[v].mean(axis=0) - known.mean(axis=0)) / known.std(axis=0) if v else [0] * 3 for v in views]
    )
    fit = fit_probe_cv(inputs[trial.train], split.labels[trial.train], split.groups[trial.train], num_classes=2, seed=0)
    np.testing.assert_allclose(alone.scores, fit.probe.predict(inputs[trial.test]), atol=1e-5)

    # An image counts as much as another of its modality; the order of a lesion's images does not matter.
    turned = replace(split, members=tuple(rows[::-1] for rows in split.members))
    again = score(replace(trial, split=turned), shard_set, encoder, features)
    np.testing.assert_allclose(again.scores, score(trial, shard_set, encoder, features).scores, atol=1e-9)
    others = split.labels.copy()
    others[trial.test] = 0
    blind = score(replace(trial, split=replace(split, labels=others)), shard_set, encoder, features)
    np.testing.assert_array_equal(blind.scores, score(trial, shard_set, encoder, features).scores)
    with pytest.raises(UserError, match="training cases has an image of modality total_body"):
        score(replace(trial, recipe={"variant": "total_body"}), shard_set, encoder, features)
