from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from panfm.errors import UserError
from panfm.evaluation.tasks import TaskCard, list_tasks, load_task, select_rows
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]


def test_rows_without_a_label_and_ignored_values_are_left_out_and_counted(
    clinic: ShardSet, make_task: MakeTask
) -> None:
    rows = select_rows(make_task(), clinic)
    table = clinic.table.to_pylist()
    labels = [dict(row["labels"]).get("diagnosis") for row in table]
    assert rows.num_unlabelled == labels.count(None) == 6
    assert rows.num_ignored == labels.count("wart") == 6  # 4 patients, 8 images, two of them without a label
    assert len(rows.rows) == 72 - 6 - 6
    for place, row in enumerate(rows.rows):
        assert ("naevus", "melanoma")[rows.labels[place]] == labels[row]
        assert (rows.keys[place], rows.groups[place]) == (table[row]["key"], table[row]["group_id"])
    assert rows.group_kind == "patient"


def test_classes_keep_the_order_of_the_card_and_merge(clinic: ShardSet, make_task: MakeTask) -> None:
    plain = select_rows(make_task(), clinic)
    turned = select_rows(make_task(classes=["melanoma", "naevus"]), clinic)
    np.testing.assert_array_equal(turned.labels, 1 - plain.labels)
    merged = make_task(classes=["benign", "malignant"], ignore=[],
                       merge={"malignant": ["melanoma"], "benign": ["naevus", "wart"]})  # fmt: skip
    rows = select_rows(merged, clinic)
    assert len(rows.rows) == 66 and (rows.labels == 1).sum() == (plain.labels == 1).sum()


def test_an_unknown_label_is_named(clinic: ShardSet, make_task: MakeTask) -> None:
    with pytest.raises(UserError, match=r"value 'wart' \(6 images\).*known: naevus, melanoma.*`ignore`"):
        select_rows(make_task(ignore=[]), clinic)
    with pytest.raises(UserError, match="none of the 72 images has the label 'stage'"):
        select_rows(make_task(label="stage"), clinic)
    with pytest.raises(UserError, match="none of the 0 images of modality dermoscopic"):
        select_rows(make_task(modality="dermoscopic"), clinic)
    with pytest.raises(UserError, match="source 'clinic'; the task is on source 'elsewhere'"):
        select_rows(make_task(source="elsewhere"), clinic)


def test_a_promise_of_patients_needs_patients(build_clinic: Callable[..., ShardSet], make_task: MakeTask) -> None:
    columns = {"path": "file", "lesion_id": "lesion", "official_split": "fold"}
    by_lesion = build_clinic(columns=columns)
    with pytest.raises(UserError, match=r"group is 'patient', but 60 of 60 images are known by lesion only.*lesion"):
        select_rows(make_task(), by_lesion)
    assert select_rows(make_task(group="lesion"), by_lesion).group_kind == "lesion"


def test_coarser_groups_than_promised_are_fine(clinic: ShardSet, make_task: MakeTask) -> None:
    assert select_rows(make_task(group="lesion"), clinic).group_kind == "patient"
    assert select_rows(make_task(group="unknown"), clinic).group_kind == "patient"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["auroc", "aurok"]}, "unknown metric 'aurok'; did you mean auroc"),
        ({"primary_metric": "brier"}, "primary_metric 'brier' must be one of"),
        ({"classes": ["a", "b", "c"], "metrics": ["sensitivity_at_90_specificity"],
          "primary_metric": "sensitivity_at_90_specificity"}, "defined for two classes; this task has 3"),
        ({"classes": ["naevus", "naevus"]}, "a class is named twice"),
        ({"ignore": ["naevus"]}, "'naevus' is assigned twice"),
        ({"merge": {"naevus": ["x"]}}, "it must have those of `classes`"),
        ({"claim": False}, "claim_note"),
        ({"split": {"kind": "rule", "test_share": 0.8, "val_share": 0.2}}, "leave some for training"),
        ({"split": {"kind": "official", "train": ["a"], "test": ["a"]}}, "'a' is listed twice"),
        ({"clases": ["a"]}, "unknown key clases.*did you mean classes"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_meant_is_refused(make_task: MakeTask, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(**changes)


def test_cards_are_found_by_name_path_and_task_dir(tmp_path: Path, make_task: MakeTask) -> None:
    values = make_task().model_dump(mode="json")
    (tmp_path / "clinic_diagnosis.yaml").write_text(yaml.safe_dump(values))
    assert load_task("clinic_diagnosis", tmp_path) == make_task()
    assert load_task(tmp_path / "clinic_diagnosis.yaml") == make_task()
    assert "clinic_diagnosis" in list_tasks(tmp_path) and "clinic_diagnosis" not in list_tasks()
    with pytest.raises(UserError, match="nearest: clinic_diagnosis"):
        load_task("clinic_diagnoses", tmp_path)
    with pytest.raises(UserError, match="nearest: ham10000_diagnosis"):
        load_task("ham10000_diagnose")
    with pytest.raises(UserError, match="no such task folder"):
        list_tasks(tmp_path / "gone")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="a task carries the name of its file, 'other'"):
        load_task("other", tmp_path)


def test_every_shipped_card_is_valid_and_has_its_split() -> None:
    from panfm.evaluation.splits import find_split_file, read_split_table
    from panfm.shards.cards import load_card

    for name in list_tasks():
        card = load_task(name)
        source = load_card(card.source)
        assert card.label in source.labels
        assert card.synthetic == source.synthetic
        if card.split.kind == "committed":
            table = read_split_table(find_split_file(name))
            assert set(table.column("source").to_pylist()) == {card.source}
            assert set(table.column("label").to_pylist()) == set(card.classes)
            folds = dict.fromkeys(table.column("group").to_pylist(), "")
            for group, fold in zip(table.column("group").to_pylist(), table.column("fold").to_pylist(), strict=True):
                assert folds[group] in ("", fold)
                folds[group] = fold
