from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml

from panfm.errors import UserError
from panfm.evaluation.families import Family, list_metrics
from panfm.evaluation.splits import find_split_file, load_split, read_split_table, write_split
from panfm.evaluation.task_check import find_card_faults, find_source_card
from panfm.evaluation.task_rows import select_rows
from panfm.evaluation.tasks import RuleSplit, TaskCard, list_tasks, load_task
from panfm.shards.cards import load_card
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.writer import BuildOptions, build_shards
from tests.shards.official_layouts import LAYOUTS
from tests.shards.official_layouts_b import PUBLIC

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


CARDS = {name: load_task(name) for name in list_tasks()}
PANDERM = [  # the 28 benchmarks in the order of the paper; the 22nd is two tasks
    "ham10000_diagnosis", "bcn20000_diagnosis", "mskcc_malignancy", "hiba_malignancy", "derm7pt_melanoma_dermoscopic",
    "derm7pt_melanoma_clinical", "pad_ufes20_diagnosis", "ddi_melanoma", "isic2024_malignancy", "ph2_melanoma",
    "med_node_melanoma", "dermnet_diagnosis", "fitzpatrick17k_condition", "mmt09_diagnosis", "mmt74_diagnosis",
    "sd128_diagnosis", "patch16_tissue", "cptac_cm_tumour", "sddi_alfred_melanoma", "sddi1_change", "sddi2_change",
    "combinemel_metastasis", "combinemel_recurrence", "isic2018_lesion", "ham10000_lesion", "tbp_photodamage",
    "tbp_nevus", "tbp_lesion_risk", "tbp_malignancy",
]  # fmt: skip
PRIVATE = {
    "mmt09_diagnosis", "mmt74_diagnosis", "sddi2_change", "combinemel_metastasis", "combinemel_recurrence",
    "tbp_photodamage", "tbp_nevus", "tbp_lesion_risk", "tbp_malignancy",
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_every_shipped_card_fits_its_source_and_one_screen(name: str) -> None:
    card, lines = CARDS[name], list_tasks()[name].read_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120 and lines[0].startswith("# ")
    assert set(card.metrics) <= set(list_metrics(card.family)) and card.licence and card.citation
    source = find_source_card(card)
    if source is None:
        assert card.needs is not None and f"source card {card.source}" in card.needs
        return
    assert card.access == source.access
    faults = find_card_faults(card, source)
    # What a card says that it needs must be lacking, and what is lacking must be said.
    assert bool(faults) == (card.needs is not None), faults
    if card.needs is not None:
        assert card.label is not None and card.label in card.needs


def test_all_benchmarks_have_a_card_and_the_private_ones_say_so() -> None:
    assert len(PANDERM) == 29 and set(PANDERM) <= set(CARDS)
    assert {name for name, card in CARDS.items() if card.access == "private"} == PRIVATE
    others = {"isic2019_diagnosis", "isic2020_malignancy", "sd198_diagnosis", "dermis_melanoma", "isic2018_attributes"}
    assert others <= set(CARDS)
    families = {card.family for card in CARDS.values() if card.synthetic}
    assert families == set(get_args(Family))
    # One rule for all real sources: two that share patients put a patient on the same side.
    rules = {(card.split, card.synthetic) for card in CARDS.values() if isinstance(card.split, RuleSplit)}
    assert {(rule.seed, rule.test_share, synthetic) for rule, synthetic in rules} == {(0, 0.2, False), (0, 0.3, True)}


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.split.kind == "committed"])
def test_committed_splits_fit_their_cards(name: str) -> None:
    card = CARDS[name]
    table = read_split_table(find_split_file(card.split_name))
    assert set(table.column("source").to_pylist()) == {card.source}
    if card.split_name == name:
        assert set(table.column("label").to_pylist()) == set(card.classes)
    else:
        assert CARDS[card.split_name].source == card.source
    folds = dict.fromkeys(table.column("group").to_pylist(), "")
    for group, fold in zip(table.column("group").to_pylist(), table.column("fold").to_pylist(), strict=True):
        assert folds[group] in ("", fold)
        folds[group] = fold


def test_images_of_ham10000_are_on_the_same_side_in_isic2019() -> None:
    ham, both = (read_split_table(find_split_file(name)) for name in ("ham10000_diagnosis", "isic2019_diagnosis"))
    fold_of = dict(zip(both.column("key").to_pylist(), both.column("fold").to_pylist(), strict=True))
    groups = dict(zip(both.column("key").to_pylist(), both.column("group").to_pylist(), strict=True))
    assert len(both) == 25_331 and len(ham) == 10_013
    for key, group, fold in zip(*(ham.column(name).to_pylist() for name in ("key", "group", "fold")), strict=True):
        assert (fold_of[key], groups[key]) == (fold, group)


def test_a_split_of_another_task_keeps_its_folds(clinic: ShardSet, make_task: MakeTask, tmp_path: Path) -> None:
    split = load_split(make_task(), clinic)
    write_split(tmp_path / "clinic_diagnosis.parquet", make_task(), split)
    other_names = make_task(
        name="clinic_malignancy",
        classes=["malignant", "benign"],
        merge={"malignant": ["melanoma"], "benign": ["naevus"]},
        split={"kind": "committed", "of": "clinic_diagnosis"},
    )
    other = load_split(other_names, clinic, tmp_path)
    assert other.folds.tolist() == split.folds.tolist() and other.labels.tolist() == (1 - split.labels).tolist()


@pytest.mark.parametrize("source", sorted({card.source for card in CARDS.values()} & {*LAYOUTS, *PUBLIC}))
def test_cards_find_their_rows_in_their_sources_official_layout(source: str, tmp_path: Path) -> None:
    tasks = [task for task in CARDS.values() if task.source == source and task.needs is None]
    {**LAYOUTS, **PUBLIC}[source](tmp_path / "raw")
    build_shards(load_card(source), tmp_path / "raw", tmp_path / "shards", options=BuildOptions())
    shards = open_shard_set(tmp_path / "shards")
    for task in tasks:
        if task.num_classes is None:
            rows = select_rows(task, shards)
            assert len(rows.rows) + rows.num_unlabelled + rows.num_ignored <= len(shards.table)
            assert rows.labels.max() < len(task.class_names)
        else:  # a few images cannot show them all, and that is said
            with pytest.raises(UserError, match=f"the task has {task.num_classes} classes"):
                select_rows(task, shards)
