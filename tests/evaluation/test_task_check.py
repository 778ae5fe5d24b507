"""The check counts what is there, and warns of each thing that would make a task's numbers unsound."""

from collections.abc import Callable

import pytest

from panfm.errors import UserError
from panfm.evaluation.linear_probe import LinearProbeConfig
from panfm.evaluation.splits import load_split
from panfm.evaluation.task_check import NUM_FOLDS, check_task, find_card_faults, format_tasks
from panfm.evaluation.tasks import TaskCard, load_task
from panfm.shards.cards import load_card
from panfm.shards.index import ShardSet
from tests.evaluation.conftest import make_source

MakeTask = Callable[..., TaskCard]
BuildClinic = Callable[..., ShardSet]


def find_line(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line.split()


def test_counts_are_those_of_the_split(clinic: ShardSet, make_task: MakeTask) -> None:
    card = make_task(subgroups=["age", "sex", "modality"])
    check = check_task(card, [clinic])
    split, screen = load_split(card, clinic), str(check)
    assert check.split is not None and check.split.hash == split.hash
    for label, name in enumerate(card.classes):
        expected = []
        for fold in ("train", "val", "test"):
            places = [place for place in split.find(fold) if split.labels[place] == label]
            expected += [str(len(places)), f"({len({split.groups[place] for place in places})})"]
        assert find_line(screen, name) == [name, *expected]
    assert find_line(screen, "all")[1::2] == [str(len(split.find(fold))) for fold in ("train", "val", "test")]
    assert "60 of the 72 images in" in screen and "(grouped by patient)" in screen
    assert "left out: 6 images without the label diagnosis; 6 images with an ignored value of diagnosis" in screen
    num_test = len(split.find("test"))
    assert f"  age: unknown {num_test}" in screen and f"  modality: clinical {num_test} (" in screen
    assert "log_loss-" in screen and "auroc+" in screen and "primary auroc" in screen
    assert len(screen.splitlines()) <= 40 and max(map(len, screen.splitlines())) <= 120


def test_a_sound_task_has_no_warning_and_the_probe_has_as_many_folds(clinic: ShardSet, make_task: MakeTask) -> None:
    assert LinearProbeConfig().num_folds == NUM_FOLDS
    assert [text for text in check_task(make_task(), [clinic]).warnings if not text.startswith("fewer than 10")] == []


def warn(card: TaskCard, shards: ShardSet) -> str:
    return "\n".join(check_task(card, [shards]).warnings)


def test_each_unsoundness_is_named(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    def change(row: dict[str, str]) -> None:
        number = int(row["file"].removesuffix(".jpg"))
        if row["diagnosis"] == "melanoma" and number > 20:  # few patients with melanomas, none in the test fold
            row["diagnosis"] = "naevus"
        if row["fold"] == "exam" and row["diagnosis"] == "melanoma":
            row["diagnosis"] = "naevus"

    text = warn(make_task(), build_clinic(change))
    assert "fewer groups in train and val than the 5 inner folds: melanoma 4" in text
    assert "no image in the test fold, so metrics over all classes are null: melanoma" in text


def test_unknown_groups_equal_files_and_a_missing_val_fold_are_named(
    build_clinic: BuildClinic, make_task: MakeTask
) -> None:
    def change(row: dict[str, str]) -> None:
        if row["file"] in ("0.jpg", "8.jpg"):  # one photograph under two names, in train and test
            row["colour"] = "naevus"

    columns = {"path": "file", "official_split": "fold"}
    shards = build_clinic(change, columns=columns)
    raw = shards.path.parent / "raw"
    (raw / "8.jpg").write_bytes((raw / "0.jpg").read_bytes())
    from panfm.shards.index import open_shard_set
    from panfm.shards.writer import BuildOptions, build_shards

    build_shards(make_source(columns=columns), raw, raw.parent / "twice", options=BuildOptions(min_side=16))
    shards = open_shard_set(raw.parent / "twice")
    card = make_task(group="unknown", split={"kind": "official", "train": ["learn", "tune"], "test": ["exam"]})
    text = warn(card, shards)
    assert "groups are unknown: images of one person or lesion can lie in two folds" in text
    assert "2 images lie in two folds under different keys" in text
    assert "no val fold" in text
    with pytest.raises(UserError, match=r"group is 'patient', but 60 of 60 images are known by sample only"):
        check_task(make_task(), [shards])


def test_what_is_wrong_is_one_clear_line(clinic: ShardSet, build_clinic: BuildClinic, make_task: MakeTask) -> None:
    def cut(row: dict[str, str]) -> None:
        if row["file"] == "8.jpg":
            row["fold"] = "learn"

    for card, shards, said in (
        (make_task(label="stage"), clinic, "none of the 72 images has the label 'stage'; name another label"),
        (make_task(source="elsewhere"), clinic, "is on source elsewhere, the shards hold clinic; give --shards of it"),
        (make_task(), build_clinic(cut), "lies in the folds"),
        (load_task("ham10000_diagnosis").model_copy(update={"label": "dx"}), clinic, "source ham10000 has no label dx"),
    ):
        with pytest.raises(UserError) as error:
            check_task(card, [shards])
        assert said in str(error.value) and "\n" not in str(error.value)


def test_without_shards_the_card_alone_is_checked() -> None:
    ham, mmt = check_task(load_task("ham10000_diagnosis")), check_task(load_task("mmt09_diagnosis"))
    assert ham.split is None and ham.warnings == () and "published numbers: 30 in" in str(ham)
    assert "source ham10000 (source card ham10000)" in str(ham)
    assert [text for text in mmt.warnings if text.startswith("cannot run yet, it needs a source card mmt")]
    assert any(text.startswith("supports no claim: the published split leaks") for text in
               check_task(load_task("dermnet_diagnosis")).warnings)  # fmt: skip


def test_faults_between_a_task_and_its_source() -> None:
    source = load_card("ham10000")
    card = load_task("ham10000_diagnosis")
    assert find_card_faults(card, source) == []
    for changes, said in (
        ({"label": "dx"}, "has no label dx; it has diagnosis, malignant"),
        ({"classes": (*card.classes, "wart")}, "never is wart"),
        ({"classes": card.classes[1:]}, "also is nevus, which no class takes"),
        ({"classes": (), "num_classes": 8}, "has 7 values, not 8"),
        ({"synthetic": True}, "synthetic is True in the task and False"),
    ):
        (fault,) = find_card_faults(card.model_copy(update=changes), source)
        assert said in fault
    masks = load_task("ham10000_lesion")
    assert find_card_faults(masks, source) == []
    assert find_card_faults(masks, load_card("isic2020")) == ["source isic2020 names no masks"]


def test_the_list_says_what_the_shards_hold(clinic: ShardSet, make_task: MakeTask) -> None:
    cards = [make_task(), make_task(name="clinic_stage", label="stage"), load_task("isic2018_lesion")]
    lines = format_tasks(cards, [clinic]).splitlines()
    assert [line.split()[0] for line in lines if line] == [
        "classification", "all", "clinic_diagnosis", "clinic_stage", "segmentation", "dermoscopic", "isic2018_lesion",
    ]  # fmt: skip
    assert [line.split()[2] for line in lines if line.startswith("    ")] == ["here", "lacking", "-"]
    assert [line.split()[2] for line in format_tasks(cards, []).splitlines() if "clinic" in line] == ["clinic"] * 2
