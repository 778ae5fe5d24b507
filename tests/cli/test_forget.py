"""`panfm shards forget` over the rooms: what had used the patient is listed, caches go, and nothing claims too much."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from panfm.cli.main import app
from panfm.encoder.export import export_encoder
from panfm.encoder.facts import SourceFacts
from panfm.encoder.load import load_encoder
from panfm.errors import UserError
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EvaluateConfig
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import load_task
from panfm.features import compute_features
from panfm.shards.forget import find_patient
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.packing import BuildOptions
from panfm.shards.writer import build_shards
from tests.archives import make_source_card
from tests.encoder.test_export import SMALL, make_checkpoint

ENCODER = "timm:vit_tiny_patch16_224@random:0?image_size=32"
TASK = {
    "version": 1, "name": "mine", "title": "Mine", "source": "clinic", "label": "diagnosis",
    "classes": ["nevus", "melanoma"], "group": "patient", "metrics": ["auroc"], "primary_metric": "auroc",
    "split": {"kind": "rule", "seed": 0, "test_share": 0.4, "val_share": 0.0}, "licence": "CC0", "citation": "none",
}  # fmt: skip


def forget(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["shards", "forget", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two shard sets of twenty patients, a task on them, its results and features: made once, never changed."""
    root = tmp_path_factory.mktemp("world")
    rows = ["path,patient,dx"]
    for number in range(40):
        coarse = np.random.default_rng(number).integers(30, 226, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(root / f"{number}.jpg")
        rows.append(f"{number}.jpg,P{number // 2},{'melanoma' if number % 4 < 2 else 'nevus'}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    columns, labels = {"path": "path", "patient_id": "patient"}, {"diagnosis": {"column": "dx"}}
    card = make_source_card("clinic", modality="dermoscopic", columns=columns, labels=labels)
    folder = root / "made" / "clinic"
    build_shards(card, root, folder, options=BuildOptions(samples_per_shard=8))
    other = card.model_copy(update={"name": "slides", "id_namespace": "clinic"})  # the same patients
    build_shards(other, root, root / "made" / "slides", options=BuildOptions())
    (root / "made" / "tasks").mkdir()
    (root / "made" / "tasks" / "mine.yaml").write_text(yaml.safe_dump(TASK))
    shard_set = open_shard_set(folder)
    run_evaluation(
        EvaluateConfig(
            encoders=(ENCODER,), shards=(str(folder),), tasks=("mine",), task_dir=str(root / "made" / "tasks"),
            protocols=("knn",), fractions=(1.0,), num_replicates=100, out=str(root / "made" / "results"),
            cache_dir=str(root / "made" / "cache"), device="cpu", workers=0,
        )
    )  # fmt: skip
    some = load_encoder("timm:vit_tiny_patch16_224@random:1?image_size=32")
    compute_features(some, shard_set, [0, 1], cache_dir=root / "made" / "cache", workers=0)  # of two images alone
    split = load_split(load_task("mine", root / "made" / "tasks"), shard_set, root / "made" / "tasks")
    test_groups = set(split.groups[split.find("test")].tolist())
    patients: dict[bool, str] = {}
    for number in range(20):
        group = shard_set.table["group_id"][int(find_patient(shard_set, f"P{number}")[0])].as_py()
        patients[group in test_groups] = f"P{number}"
    dropped = sum(group in test_groups for group in shard_set.table["group_id"].to_pylist())
    return {"folder": root / "made", "trained": patients[False], "tested": patients[True], "num_excluded": dropped}


@pytest.fixture
def made(world: dict[str, Any], tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(world["folder"], tmp_path / "made"))


def make_run(folder: Path, shard_set: ShardSet, num_excluded: int, **more: Any) -> Path:
    values = {"source": "clinic", "licence": "CC0", "num_kept": 40 - num_excluded, "num_excluded": num_excluded}
    source = SourceFacts(**values, data_hash=more.pop("data_hash", shard_set.compute_data_hash()))
    tasks = ("mine",) if num_excluded else ()
    make_checkpoint(
        folder / "checkpoints" / "step-00000007", SMALL, sources=more.pop("sources", (source,)), excluded_tasks=tasks,
        config=more.pop("config", {"data": {"modalities": ["dermoscopic"]}}), **more,
    )  # fmt: skip
    return folder


def read_report(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_everything_that_had_used_the_patient_is_named(world: dict[str, Any], made: Path, tmp_path: Path) -> None:
    shard_set, num_excluded = open_shard_set(made / "clinic"), world["num_excluded"]
    whole = make_run(tmp_path / "runs" / "whole", shard_set, 0)
    without = make_run(tmp_path / "runs" / "without", shard_set, num_excluded)
    changed = make_run(tmp_path / "runs" / "changed", shard_set, num_excluded + 2)  # other test groups than today's
    rebuilt = make_run(tmp_path / "runs" / "rebuilt", shard_set, 0, data_hash="0" * 64)
    blind = make_run(tmp_path / "runs" / "blind", shard_set, 0, config={"data": {"modalities": ["histopathology"]}})
    stranger = SourceFacts(source="atlas", licence="CC0", num_kept=9, num_excluded=0, data_hash="ab")
    make_run(tmp_path / "runs" / "stranger", shard_set, 0, sources=(stranger,))
    export = export_encoder(whole, tmp_path / "exports" / "whole")
    taught = {"objectives": [{"target": {"kind": "frozen_teacher", "address": f"panfm:{export}"}}]}
    pupil = make_run(tmp_path / "runs" / "pupil", shard_set, 0, sources=(stranger,), config=taught)
    options = (
        "--runs", tmp_path / "runs", "--exports", tmp_path / "exports", "--results", made / "results",
        "--features", made / "cache", "--task-dir", made / "tasks", "--report", tmp_path / "report.csv",
    )  # fmt: skip

    num_cached = len([path for path in (made / "cache").iterdir() if path.is_dir()])
    assert num_cached > 0

    answer = forget(made / "clinic", "--patient", world["tested"], *options)
    assert answer.exit_code == 0, answer.output
    report = read_report(tmp_path / "report.csv")

    def used(run: Path) -> tuple[str, str]:
        row = report[str(run / "checkpoints" / "step-00000007")]
        return row["used"], row["num_images"]

    assert (used(whole), used(without), used(blind)) == (("trained on", "2"), ("kept out", "0"), ("kept out", "0"))
    assert used(changed)[0] == used(rebuilt)[0] == "cannot be told"
    assert used(pupil) == ("trained on", "2") and "stranger" not in (tmp_path / "report.csv").read_text()
    assert (report[str(export)]["kind"], report[str(export)]["step"], report[str(export)]["used"]) == (
        "export", "7", "trained on",
    )  # fmt: skip
    predictions = [row for row in report.values() if row["kind"] == "predictions"]
    assert [row["num_images"] for row in predictions] == ["2"] and predictions[0]["path"].endswith(".parquet")
    assert not [row for row in report.values() if row["kind"] == "result"]  # the patient was in the test fold
    assert "Weights that were trained on the patient still are" in answer.output
    assert "brings the images back" in answer.output
    assert world["tested"] not in (tmp_path / "report.csv").read_text()

    assert not [path for path in (made / "cache").iterdir() if path.is_dir()]
    assert f"{num_cached} cached sets of features of clinic removed" in answer.output
    assert open_shard_set(made / "clinic").num_samples == 38 and list((made / "results").rglob("*.parquet"))

    # A patient of the training part: the run that kept test groups out has drawn from this one, before and now.
    answer = forget(made / "clinic", "--patient", world["trained"], *options)
    assert answer.exit_code == 0, answer.output
    report = read_report(tmp_path / "report.csv")
    assert used(whole) == ("trained on", "2") and used(without) == ("trained on", "2")
    assert [row["used"] for row in report.values() if row["kind"] == "result"] == ["cannot be told"]  # of 40 images


def test_results_whose_labels_could_come_from_the_patient(world: dict[str, Any], made: Path, tmp_path: Path) -> None:
    answer = forget(
        made / "clinic", "--patient", world["trained"], "--results", made / "results", "--task-dir", made / "tasks",
        "--report", tmp_path / "report.csv",
    )  # fmt: skip
    (row,) = read_report(tmp_path / "report.csv").values()
    assert (row["kind"], row["used"], row["num_images"]) == ("result", "trained on", "2"), answer.output
    assert "Weights that were trained" not in answer.output and "run the evaluation again" in answer.output


def test_several_sets_at_once(world: dict[str, Any], made: Path) -> None:
    """The patient of a shared namespace has one id in both sets; a set without the patient stays as it is."""
    answer = forget(made / "clinic", made / "slides", "--patient", world["tested"])
    assert answer.exit_code == 0
    assert [open_shard_set(made / name).num_samples for name in ("clinic", "slides")] == [38, 38]
    key = open_shard_set(made / "slides").table["key"][0].as_py()
    before = {path.name: path.read_bytes() for path in (made / "clinic").iterdir()}
    only = set(open_shard_set(made / "slides").table["key"].to_pylist()) - set(
        open_shard_set(made / "clinic").table["key"].to_pylist()
    )
    if key in only:
        assert forget(made / "clinic", made / "slides", "--key", key).exit_code == 0
        assert open_shard_set(made / "slides").num_samples == 37
        assert {path.name: path.read_bytes() for path in (made / "clinic").iterdir()} == before
    assert json.loads((made / "slides" / "forgotten.json").read_text())["removals"][0]["reason"] == "consent withdrawn"


def test_what_is_refused_changes_nothing(world: dict[str, Any], made: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    for arguments, message in (
        (("--patient", "P99"), "no samples of this patient, nothing was removed"),
        (("--patient", world["tested"], "--features", tmp_path / "gone"), "gone: no such folder"),
        (("--key", "k0"), "1 of 1 keys are not there"),
        ((), "give one of --patient ID"),
        (("--patient", world["tested"], "--finish"), "give one of --patient ID"),
    ):
        with pytest.raises(UserError, match=message):
            forget(made / "clinic", *arguments)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before
    assert forget(made / "clinic", "--finish").exit_code == 0  # nothing to finish is no fault


def test_features_that_another_process_computes_are_named(world: dict[str, Any], made: Path) -> None:
    import fcntl

    folder = next(path for path in (made / "cache").iterdir() if path.is_dir())
    foreign = made / "cache" / ("a" * 24 + "-" + "b" * 24)
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"source": "atlas"}')
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = forget(made / "clinic", "--patient", world["tested"], "--features", made / "cache")
    assert answer.exit_code == 1 and f"{folder}: is being computed by another process" in answer.output
    assert foreign.is_dir() and open_shard_set(made / "clinic").num_samples == 38


def test_verify_prints_one_line_or_the_faults(made: Path) -> None:
    def verify(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["shards", "verify", *map(str, arguments), "--processes", "1"])

    answer = verify(made / "clinic", made / "slides", "--deep")
    assert answer.exit_code == 0 and "40 samples in 5 shards: all as the index says" in answer.output
    next((made / "slides").glob("*.tar")).unlink()
    answer = verify(made / "clinic", made / "slides")
    assert answer.exit_code == 1 and "shard-000000.tar: is missing" in answer.output


def test_check_has_an_exit_code_and_a_file(world: dict[str, Any], tmp_path: Path) -> None:
    root = world["folder"].parent
    card = json.loads((world["folder"] / "clinic" / "index.json").read_text())["card"]

    def check(expected: dict[str, Any]) -> Result:
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(card | {"expected": expected}))
        arguments = [tmp_path / "card.yaml", "--root", root, "--images", 4, "--json", tmp_path / "found.json"]
        return CliRunner().invoke(app, ["shards", "check", *map(str, arguments)], catch_exceptions=False)

    answer = check({"images": 40, "patients": 20})
    assert answer.exit_code == 0, answer.output
    assert json.loads((tmp_path / "found.json").read_text())["num_patients"] == 20
    assert check({"images": 41}).exit_code == 1
