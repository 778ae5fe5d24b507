from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.errors import UserError
from panfm.evaluation.label_subsets import compute_label_subset
from panfm.evaluation.splits import (
    SPLIT_SCHEMA,
    compute_excluded,
    load_split,
    read_split_table,
    write_split,
)
from panfm.evaluation.tasks import TaskCard
from panfm.shards.index import ShardSet, open_shard_set

MakeTask = Callable[..., TaskCard]
BuildClinic = Callable[..., ShardSet]
RULE = {"kind": "rule", "seed": 3, "test_share": 0.3, "val_share": 0.2}


def choose(labels: object, groups: object, fraction: float, draw: int = 0, split_hash: str = "s") -> set[int]:
    places = compute_label_subset(
        np.asarray(labels), np.asarray(groups), fraction=fraction, draw=draw, task="t", split_hash=split_hash
    )
    return set(places.tolist())


def test_official_folds_are_those_of_the_source(clinic: ShardSet, make_task: MakeTask) -> None:
    split = load_split(make_task(), clinic)
    names = {"learn": "train", "tune": "val", "exam": "test"}
    official = clinic.table.column("official_split").to_pylist()
    assert [names[official[row]] for row in split.rows] == split.folds.tolist()
    assert split.keys.tolist() == sorted(split.keys.tolist())
    assert split.notes == ("6 images without the label diagnosis", "6 images with an ignored value of diagnosis")
    assert set(split.find("train", "val")) == set(range(len(split.rows))) - set(split.find("test"))


def test_official_values_that_no_fold_names_are_left_out_and_counted(clinic: ShardSet, make_task: MakeTask) -> None:
    split = load_split(make_task(split={"kind": "official", "train": ["learn"], "test": ["exam"]}), clinic)
    assert split.notes[-1].endswith("images without a fold") and len(split.find("val")) == 0
    with pytest.raises(UserError, match="no image in the fold 'test'"):
        load_split(make_task(split={"kind": "official", "train": ["learn"], "test": ["EXAM"]}), clinic)


def test_a_patient_in_two_folds_is_refused(build_clinic: BuildClinic, make_task: MakeTask) -> None:
    def cut(row: dict[str, str]) -> None:
        if row["file"] == "8.jpg":
            row["fold"] = "learn"

    with pytest.raises(UserError, match=r"task clinic_diagnosis: patient p\w+ lies in the folds"):
        load_split(make_task(), build_clinic(cut))


def test_a_committed_split_reloads_with_the_same_hash(clinic: ShardSet, make_task: MakeTask, tmp_path: Path) -> None:
    official = load_split(make_task(), clinic)
    write_split(tmp_path / "clinic_diagnosis.parquet", make_task(), official)
    card = make_task(split={"kind": "committed"})
    split = load_split(card, clinic, tmp_path)
    assert split.hash == official.hash and split.folds.tolist() == official.folds.tolist()
    with pytest.raises(UserError, match=r"no clinic_diagnosis\.parquet lies in"):
        load_split(card, clinic)


def change_split(path: Path, column: str, values: list[str]) -> None:
    table = read_split_table(path)
    number = SPLIT_SCHEMA.names.index(column)
    pq.write_table(table.set_column(number, SPLIT_SCHEMA.field(number), pa.array(values)), path)


def test_a_committed_split_must_fit_the_shards(clinic: ShardSet, make_task: MakeTask, tmp_path: Path) -> None:
    path, card = tmp_path / "clinic_diagnosis.parquet", make_task(split={"kind": "committed"})
    split = load_split(make_task(), clinic)

    def columns(name: str) -> list[str]:
        write_split(path, make_task(), split)
        return read_split_table(path).column(name).to_pylist()  # type: ignore[no-any-return]

    keys = columns("key")
    change_split(path, "key", [f"x{key}" if place < 5 else key for place, key in enumerate(keys)])
    some = load_split(card, clinic, tmp_path)
    folds = split.folds[:5].tolist()
    assert any(note.startswith(f"5 of {len(keys)} images of the split are not in the shards") for note in some.notes)
    assert all(f"{folds.count(fold)} {fold}" in " ".join(some.notes) for fold in set(folds))
    assert "5 images without a fold" in some.notes and len(some.rows) == len(keys) - 5 and some.hash != split.hash

    change_split(path, "key", [f"x{key}" for key in columns("key")])
    with pytest.raises(UserError, match=r"none of the 60 keys of .*identifiers: public"):
        load_split(card, clinic, tmp_path)
    change_split(path, "label", ["melanoma"] * len(columns("label")))
    with pytest.raises(UserError, match="is 'melanoma', in the shards 'naevus'"):
        load_split(card, clinic, tmp_path)
    change_split(path, "group", ["p0"] * len(columns("group")))
    with pytest.raises(UserError, match="is of group p0, in the shards of group p"):
        load_split(card, clinic, tmp_path)
    folds = columns("fold")
    place = next(place for place, group in enumerate(split.groups) if (split.groups == group).sum() == 2)
    folds[place] = "train" if folds[place] == "test" else "test"
    change_split(path, "fold", folds)
    with pytest.raises(UserError, match="a patient belongs to one fold"):
        load_split(card, clinic, tmp_path)
    change_split(path, "fold", ["exam"] * len(columns("fold")))
    with pytest.raises(UserError, match="unknown fold 'exam'"):
        load_split(card, clinic, tmp_path)
    path.write_bytes(b"torn")
    with pytest.raises(UserError, match="split cannot be read"):
        load_split(card, clinic, tmp_path)


def test_a_rule_keeps_each_patient_in_its_fold_as_the_archive_grows(
    clinic: ShardSet, build_clinic: BuildClinic, make_task: MakeTask
) -> None:
    card = make_task(split=RULE)
    whole = load_split(card, clinic)
    fold_of = dict(zip(whole.groups.tolist(), whole.folds.tolist(), strict=True))
    assert all(fold_of[group] == fold for group, fold in zip(whole.groups, whole.folds, strict=True))

    def drop_labels(row: dict[str, str]) -> None:
        if int(row["patient"][1:]) % 2:
            row["diagnosis"] = ""

    half = load_split(card, build_clinic(drop_labels))
    assert 0 < len(half.rows) < len(whole.rows)
    assert all(fold_of[group] == fold for group, fold in zip(half.groups, half.folds, strict=True))
    assert load_split(make_task(split={**RULE, "seed": 4}), clinic).folds.tolist() != whole.folds.tolist()


def test_rule_shares_are_those_asked_for(make_task: MakeTask) -> None:
    from panfm.evaluation.splits import _compute_rule_folds

    folds = _compute_rule_folds(make_task(split=RULE).split, np.array([f"p{n}" for n in range(4000)]))
    shares = {fold: float((folds == fold).mean()) for fold in ("train", "val", "test")}
    assert shares["test"] == pytest.approx(0.3, abs=0.03) and shares["val"] == pytest.approx(0.2, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=120),
    fractions=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=4),
    draw=st.integers(0, 5),
)
def test_label_subsets_are_nested_and_never_cut_a_patient(
    images: list[tuple[int, int]], fractions: list[float], draw: int
) -> None:
    groups = [f"p{patient}" for patient, _ in images]
    labels = [label for _, label in images]
    previous: set[int] = set()
    for fraction in [*sorted(fractions), 1.0]:
        chosen = choose(labels, groups, fraction, draw)
        assert previous <= chosen
        inside = {groups[place] for place in chosen}
        assert all(groups[place] not in inside for place in set(range(len(images))) - chosen)
        num_groups = len(set(groups))
        assert round(fraction * num_groups) <= len(inside) <= max(round(fraction * num_groups), 4)
        previous = chosen
    assert len(previous) == len(images)


def test_label_subsets_are_stratified_with_one_patient_of_each_class() -> None:
    labels = np.array([0] * 900 + [1] * 90 + [2] * 10)
    groups = np.array([f"p{number}" for number in range(1000)])
    tenth = np.bincount(labels[sorted(choose(labels, groups, 0.1))], minlength=3)
    assert tenth.sum() == 100 and abs(tenth[1] - 9) <= 1 and 1 <= tenth[2] <= 2
    hundredth = np.bincount(labels[sorted(choose(labels, groups, 0.01))], minlength=3)
    assert hundredth.sum() == 10 and (hundredth > 0).all()
    assert len(choose(labels, groups, 0.001)) == 3  # 1 of 1,000 is not enough for three classes


def test_a_patient_counts_for_the_rarest_class_it_has() -> None:
    # One patient of 50 has the rare class, beside images of the common one: it comes first at any fraction.
    labels = np.array([0] * 100)
    labels[77] = 1
    groups = np.array([f"p{number // 2}" for number in range(100)])
    for draw in range(5):
        assert {76, 77} <= choose(labels, groups, 0.02, draw)


def test_draws_differ_and_repeat() -> None:
    labels, groups = np.arange(200) % 2, np.array([f"p{number}" for number in range(200)])
    assert choose(labels, groups, 0.1) == choose(labels, groups, 0.1)
    draws = [choose(labels, groups, 0.1, draw) for draw in range(4)]
    assert len({frozenset(draw) for draw in draws}) == 4
    assert choose(labels, groups, 0.1, split_hash="other") != draws[0]
    order = np.random.default_rng(0).permutation(200)  # the order of the images does not matter
    assert {int(order[place]) for place in choose(labels[order], groups[order], 0.1)} == draws[0]
    with pytest.raises(UserError, match=r"label fraction 1\.5: it must be above 0"):
        choose(labels, groups, 1.5)


def write_task(folder: Path, card: TaskCard) -> None:
    import yaml

    folder.mkdir(exist_ok=True)
    (folder / f"{card.name}.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json")))


def test_pretraining_keeps_out_test_groups_and_only_those(
    clinic: ShardSet, make_task: MakeTask, tmp_path: Path
) -> None:
    write_task(tmp_path, make_task())
    split = load_split(make_task(), clinic)
    test_groups = set(split.groups[split.find("test")].tolist())
    assert compute_excluded("all", [clinic], tmp_path).groups == {"clinic": frozenset(test_groups)}
    assert compute_excluded(["clinic_diagnosis"], [clinic], tmp_path).groups["clinic"] == test_groups
    assert compute_excluded("none", [clinic], tmp_path).groups == {"clinic": frozenset()}
    assert compute_excluded(["ham10000_diagnosis"], [clinic]).groups == {"clinic": frozenset()}
    with pytest.raises(UserError, match="no such task"):
        compute_excluded(["clinic_diagnosed"], [clinic], tmp_path)
    # A second task adds its own test groups: the union is kept out.
    write_task(tmp_path, make_task(name="second", split=RULE))
    second = load_split(make_task(name="second", split=RULE), clinic)
    union = test_groups | set(second.groups[second.find("test")].tolist())
    assert compute_excluded("all", [clinic], tmp_path).groups["clinic"] == union > test_groups


def test_a_test_patient_is_kept_out_of_every_source_that_shares_identifiers(
    build_clinic: BuildClinic, make_task: MakeTask, tmp_path: Path
) -> None:
    clinic = build_clinic(id_namespace="hospital")
    slides = build_clinic(name="clinic_slides", id_namespace="hospital")
    foreign = build_clinic(name="foreign", id_namespace="another")
    tasks = tmp_path / "tasks"
    for split in (make_task().split.model_dump(), RULE):
        write_task(tasks, make_task(split=split))
        excluded = compute_excluded("all", [clinic, slides, foreign], tasks).groups
        assert excluded["clinic"] and excluded["clinic_slides"] == excluded["clinic"]
        assert excluded["foreign"] == frozenset()


@pytest.mark.parametrize("module", ["splits", "contamination"])
def test_what_is_excluded_and_the_audit_need_no_torch(module: str) -> None:
    import subprocess
    import sys

    code = f"import sys, panfm.evaluation.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.real
def test_shipped_splits_fit_shards_of_the_real_images(real_data: Path, tmp_path: Path) -> None:
    from panfm.evaluation.tasks import load_task
    from panfm.shards.cards import load_card
    from panfm.shards.writer import BuildOptions, build_shards

    build_shards(
        load_card("isic_uda1"), real_data / "dermoscopic" / "isic_uda1", tmp_path / "s", options=BuildOptions()
    )
    shard_set = open_shard_set(tmp_path / "s")
    split = load_split(load_task("isic_uda1_melanoma"), shard_set)
    assert [len(split.find(fold)) for fold in ("train", "val", "test")] == [31, 7, 12]
    assert split.notes == () and split.group_kind == "sample"
    assert len(compute_excluded("all", [shard_set]).groups["isic_uda1"]) == 12
