"""Each family has just its own fields and metrics; what the shards must hold for it; what a run says of it."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import yaml

from panfm.config import validate
from panfm.errors import UserError
from panfm.evaluation.families import SECTIONS, WITHOUT_CLASSES, Family, find_rows, list_metrics, read_numbers
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EvaluateConfig
from panfm.evaluation.splits import compute_excluded, load_split
from panfm.evaluation.task_rows import can_run, find_classes, select_rows
from panfm.evaluation.tasks import TaskCard
from panfm.measures.metrics import METRICS
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]
BuildClinic = Callable[..., ShardSet]
NO_CLASSES = {"label": None, "classes": [], "ignore": []}
TARGETS: dict[Family, dict[str, object]] = {
    "regression": {"column": "labels.score", "unit": "points", "low": 0, "high": 72},
    "segmentation": {"structures": ["lesion"]},
    "survival": {"outcome": "recurrence", "time_zero": "excision"},
    "change": {"pairs": "consecutive"},
    "slides": {"bag": "patient"},
    "retrieval": {"match": "lesion", "query": "clinical", "gallery": "dermoscopic"},
    "zero_shot": {"phrases": {"naevus": ["mole"], "melanoma": ["melanoma"]}},
    "ugly_duckling": {"min_lesions": 3},
    "out_of_distribution": {"unknown": ["wart"]},
}


def make_family(make_task: MakeTask, family: Family, **changes: object) -> TaskCard:
    metric = next(iter(set(list_metrics(family)) - set(METRICS)), "auroc")
    values = {"family": family, "target": TARGETS.get(family), "metrics": [metric], "primary_metric": metric}
    more = NO_CLASSES if family in WITHOUT_CLASSES else {"ignore": []} if family == "out_of_distribution" else {}
    return make_task(**{**values, **more, **changes})


@pytest.mark.parametrize("family", get_args(Family))
def test_a_card_of_each_family_is_valid_and_survives_a_file(
    family: Family, make_task: MakeTask, tmp_path: Path
) -> None:
    card = make_family(make_task, family)
    assert (card.target is None) == (family not in SECTIONS) and card.family == family
    again = yaml.safe_load(yaml.safe_dump(card.model_dump(mode="json")))
    assert validate(TaskCard, again, where="again") == card
    assert set(card.metrics) <= set(list_metrics(family))
    with pytest.raises(UserError, match="unknown metric 'dices'") as error:
        make_family(make_task, family, metrics=["dices"], primary_metric="dices")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("segmentation", {"target": {"structres": ["lesion"]}}, "has no key structres; did you mean structures"),
        ("segmentation", {"target": None}, "target of family segmentation lacks structures"),
        ("segmentation", {"target": ["lesion"]}, "must map structures, overlapping to values"),
        ("segmentation", {"label": "diagnosis"}, "label has no place in family segmentation"),
        ("survival", {"target": {"outcome": "recurrence"}}, "lacks time_zero"),
        ("survival", {"target": {**TARGETS["survival"], "days": "days"}}, r"target\.days: String should match"),
        ("regression", {"target": {**TARGETS["regression"], "low": 80}}, "low .80. must be below high .72."),
        ("regression", {"metrics": ["auroc"], "primary_metric": "auroc"}, "unknown metric .auroc. of family reg"),
        ("retrieval", {"target": {**TARGETS["retrieval"], "gallery": "caption"}}, "gallery of another modality"),
        ("retrieval", {"target": {"match": "lesion", "query": "image", "gallery": "caption"}}, "match: caption goes"),
        ("zero_shot", {"target": {"phrases": {"naevus": ["mole"]}}}, "it must name the classes"),
        ("zero_shot", {"target": {**TARGETS["zero_shot"], "templates": ["a photo"]}}, "needs one {}"),
        ("ugly_duckling", {"classes": ["a", "b", "c"]}, "needs exactly two"),
        ("out_of_distribution", {"target": {"unknown": ["naevus"]}}, "'naevus' is assigned twice"),
        ("ordinal", {"classes": [], "num_classes": 3}, "their order is the task"),
        ("classification", {"target": {"unit": "points"}}, "family classification has no target"),
        ("classification", {"label": None}, "family classification needs the name of a label"),
        ("classification", {"num_classes": 2}, "give classes"),
        ("classification", {"classes": []}, "give classes"),
        ("classification", {"others": "rest"}, "others is 'rest'; it is error, ignore, or one of classes"),
        ("classification", {"classes": [], "num_classes": 2, "others": "ignore"}, "with merge or others, name the"),
        ("clasification", {}, "family.*Input should be 'classification', 'regression'"),
    ],
)  # fmt: skip
def test_fields_of_another_family_are_refused(
    make_task: MakeTask, family: Family, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_family(make_task, family, **changes)
    assert "\n" not in str(error.value)


def test_numbers_are_read_from_fields_labels_and_tabular_columns() -> None:
    table = pa.table(
        {
            "age": pa.array([41.0, None, 7.0]),
            "event": pa.array([True, False, None]),
            "labels": pa.array([[("score", "12.5")], [("score", "?")], None], pa.map_(pa.string(), pa.string())),
            "tabular": ['{"diameter": 3}', '{"diameter": "yes"}', None],
            "follow_up_days": pa.array([10, None, 20]),
            "mask_length": pa.array([None, 5, 6]),
        }
    )
    for column, expected in {
        "age": [41, np.nan, 7], "event": [1, 0, np.nan], "labels.score": [12.5, np.nan, np.nan],
        "labels.none": [np.nan] * 3, "tabular.diameter": [3, 1, np.nan],
    }.items():  # fmt: skip
        np.testing.assert_array_equal(read_numbers(table, column), expected)
    survival, masks = SECTIONS["survival"], SECTIONS["segmentation"]
    assert find_rows(survival(outcome="a", time_zero="b"), table).tolist() == [True, False, False]
    assert find_rows(masks(structures=("lesion",)), table).tolist() == [False, True, True]


def test_rows_of_a_family_without_classes(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    def score(row: dict[str, str]) -> None:
        row["score"] = "" if int(row["file"].removesuffix(".jpg")) % 4 == 3 else str(len(row["patient"]) * 10)

    labels = {"diagnosis": {"column": "diagnosis"}, "score": {"column": "score"}}
    shards = build_clinic(score, labels=labels)
    card = make_family(make_task, "regression")
    rows = select_rows(card, shards)
    assert len(rows.rows) == 54 and rows.num_unlabelled == 18 and set(rows.labels.tolist()) == {0}
    split = load_split(card, shards)
    assert split.notes == ("18 images without a number in labels.score",) and card.class_names == ("measured",)
    with pytest.raises(UserError, match="none of the 72 images has a mask; name another"):
        select_rows(make_family(make_task, "segmentation"), shards)
    with pytest.raises(UserError, match="none of the 72 images has a mask; the card needs masks of the clinic"):
        select_rows(make_family(make_task, "segmentation", needs="masks of the clinic"), shards)


def test_unknown_classes_are_numbered_behind_the_known_ones(clinic: ShardSet, make_task: MakeTask) -> None:
    card = make_family(make_task, "out_of_distribution")
    rows = select_rows(card, clinic)
    assert card.class_names == ("naevus", "melanoma", "unknown")
    assert (rows.labels == 2).sum() == 6 and len(load_split(card, clinic).rows) == 66


def test_others_and_counted_classes(clinic: ShardSet, make_task: MakeTask) -> None:
    rest = make_task(classes=["other", "melanoma"], ignore=[], others="other", merge={"melanoma": ["melanoma"]})
    plain = select_rows(make_task(), clinic)
    rows = select_rows(rest, clinic)
    assert (rows.labels == 1).sum() == (plain.labels == 1).sum() and (
        rows.labels == 0
    ).sum() == 60 - rows.labels.sum() + 6
    assert select_rows(make_task(ignore=[], others="ignore"), clinic).num_ignored == 6

    counted = make_task(classes=[], num_classes=3, ignore=[])
    assert find_classes(counted, clinic).classes == ("melanoma", "naevus", "wart")
    assert set(select_rows(counted, clinic).labels.tolist()) == {0, 1, 2}
    assert load_split(counted, clinic).hash == load_split(find_classes(counted, clinic), clinic).hash
    two = make_task(classes=[], num_classes=2)
    turned = make_task(classes=["melanoma", "naevus"])
    assert load_split(two, clinic).hash == load_split(turned, clinic).hash
    with pytest.raises(UserError, match=r"has 3 values \(melanoma, naevus, wart, ...\), the task has 7 classes"):
        select_rows(make_task(classes=[], num_classes=7, ignore=[]), clinic)


def test_pretraining_is_not_stopped_by_a_task_that_these_shards_cannot_run(
    clinic: ShardSet, build_clinic: BuildClinic, make_task: MakeTask, tmp_path: Path
) -> None:
    cards = [make_task(), make_family(make_task, "segmentation", name="clinic_masks")]
    for card in cards:
        (tmp_path / f"{card.name}.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json")))
    assert not can_run(cards[1], clinic)
    excluded = compute_excluded("all", [clinic], tmp_path)
    assert "clinic_diagnosis" in excluded.tasks and "clinic_masks" not in excluded.tasks
    with pytest.raises(UserError, match="none of the 72 images has a mask"):
        compute_excluded(["clinic_masks"], [clinic], tmp_path)
    # By a rule the test patients can be told without any mask, and are kept out.
    rule = make_family(make_task, "segmentation", name="clinic_masks", split={"kind": "rule", "seed": 5})
    (tmp_path / "clinic_masks.yaml").write_text(yaml.safe_dump(rule.model_dump(mode="json")))
    more = compute_excluded("all", [clinic], tmp_path)
    assert "clinic_masks" in more.tasks and more.groups["clinic"] > excluded.groups["clinic"]


def test_a_family_without_a_protocol_is_said_in_one_line(clinic: ShardSet, make_task: MakeTask, tmp_path: Path) -> None:
    cards = [make_task(), make_family(make_task, "segmentation", name="clinic_masks")]
    for card in cards:
        (tmp_path / f"{card.name}.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json")))
    values = {
        "encoders": [{"address": "timm:test_vit@random:0?image_size=32", "name": "tiny"}], "protocols": ["knn"],
        "shards": [str(clinic.path)], "task_dir": str(tmp_path), "out": str(tmp_path / "results"), "fractions": [1.0],
        "cache_dir": str(tmp_path / "cache"), "num_replicates": 100, "device": "cpu",
    }  # fmt: skip
    every = run_evaluation(validate(EvaluateConfig, values, where="test"))
    assert every.failures == () and len(every.written) == 1
    assert (
        "tasks left out, none of the protocols asked for measures their families: segmentation (clinic_masks)"
        in every.notes
    )
    named = run_evaluation(validate(EvaluateConfig, {**values, "tasks": ["clinic_masks"]}, where="test"))
    (message,) = [failure.message for failure in named.failures]
    assert message == "none of the protocols knn measures a task of family segmentation; those that do: segmentation"
    assert named.written == ()
