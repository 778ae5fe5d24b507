import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from panfm.config import load_config, validate
from panfm.encoder.facts import EncoderFacts
from panfm.encoder.load import load_encoder
from panfm.errors import UserError
from panfm.evaluation.planning import describe_encoder
from panfm.evaluation.results import get_scores, read_predictions, read_result
from panfm.evaluation.run import check_evaluation, run_evaluation
from panfm.evaluation.run_config import EncoderEntry, EvaluateConfig
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard, load_task
from panfm.measures.metrics import compute_metric
from panfm.measures.statistics import compute_bootstrap_seed, estimate_metrics
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]
ENCODER = "timm:test_vit@random:0?image_size=32"


def write_task(folder: Path, card: TaskCard) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{card.name}.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json")))


@pytest.fixture
def make_config(tmp_path: Path, clinic: ShardSet, make_task: MakeTask) -> Callable[..., EvaluateConfig]:
    write_task(tmp_path / "tasks", make_task())

    def make(**changes: object) -> EvaluateConfig:
        values = {
            "encoders": [{"address": ENCODER, "name": "tiny"}], "shards": [str(clinic.path)], "draws": 2,
            "task_dir": str(tmp_path / "tasks"), "out": str(tmp_path / "results"), "fractions": [0.5, 1.0],
            "cache_dir": str(tmp_path / "cache"), "num_replicates": 100, "device": "cpu", **changes,
        }  # fmt: skip
        return validate(EvaluateConfig, values, where="test")

    return make


def test_a_task_added_by_hand_runs_and_a_second_run_skips_what_exists(
    make_config: Callable[..., EvaluateConfig], clinic: ShardSet, make_task: MakeTask, tmp_path: Path
) -> None:
    config = make_config()
    summary = run_evaluation(config)
    assert summary.failures == () and summary.num_skipped == 0
    folder = tmp_path / "results" / "clinic_diagnosis" / "tiny"
    stems = [f"{protocol}-default-{rest}-s0" for protocol in ("knn", "linear_probe")
             for rest in ("f0.5-d0", "f0.5-d1", "f1-d0")]  # fmt: skip
    assert sorted(path.stem for path in folder.glob("*.json")) == stems
    assert "6 images without the label diagnosis" in str(summary) and "6 results written" in str(summary)

    result = read_result(folder / "linear_probe-default-f1-d0-s0.json")
    predictions = read_predictions(folder / result.predictions)
    split = load_split(make_task(), clinic)
    test = split.find("test")
    assert predictions.column("key").to_pylist() == split.keys[test].tolist()
    assert predictions.column("group").to_pylist() == split.groups[test].tolist()
    assert set(predictions.column("fold").to_pylist()) == {"test"}
    labels, scores = np.array(predictions.column("label")), get_scores(predictions)
    assert labels.tolist() == split.labels[test].tolist()
    # Every metric can be recomputed from the predictions, interval included.
    seed = compute_bootstrap_seed("clinic_diagnosis", split.hash)
    again = estimate_metrics(list(result.metrics), labels, scores, split.groups[test], seed=seed, num_replicates=100)
    for name, metric in result.metrics.items():
        assert metric.value == compute_metric(name, labels, scores).value
        assert (metric.low, metric.high) == (again[name].low, again[name].high)
    assert result.metrics["log_loss"].direction == "lower" and result.metrics["auroc"].direction == "higher"
    assert (result.num_train, result.num_test) == (len(split.rows) - len(test), len(test))
    assert result.group_kind == "patient" and result.synthetic and result.encoder.contamination == "none"

    half = read_result(folder / "linear_probe-default-f0.5-d1-s0.json")
    assert half.num_train_groups == round(0.5 * result.num_train_groups)
    assert sum(half.settings["train_counts"].values()) == half.num_train < result.num_train
    other = read_result(folder / "linear_probe-default-f0.5-d0-s0.json")
    assert half.settings["train_keys_hash"] != other.settings["train_keys_hash"]

    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = run_evaluation(config)
    assert (len(second.written), second.num_skipped) == (0, 6)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    wider = run_evaluation(make_config(draws=3))
    assert (len(wider.written), wider.num_skipped) == (2, 6)


def test_a_stale_result_is_made_again(
    make_config: Callable[..., EvaluateConfig], make_task: MakeTask, tmp_path: Path
) -> None:
    given = {"protocols": ["knn"], "fractions": [1.0]}

    def run(**changes: object) -> int:
        return len(run_evaluation(make_config(**{**given, **changes})).written)

    assert run() == 1 and run() == 0
    # Another encoder under the same name: its features and scores are other ones, and so must the Result be.
    path = next((tmp_path / "results").rglob("*.json"))
    before = read_result(path)
    assert run(encoders=[{"address": ENCODER.replace("random:0", "random:1"), "name": "tiny"}]) == 1
    after = read_result(path)
    assert after.encoder.hash != before.encoder.hash and after.predictions_sha256 != before.predictions_sha256
    assert run() == 1
    assert run(knn={"k": 3}) == 1 and run() == 1  # another recipe under the same variant
    assert run(num_replicates=150) == 1 and run() == 1
    path.with_suffix(".parquet").unlink()
    assert run() == 1
    path.write_text("{torn")
    assert run() == 1
    write_task(tmp_path / "tasks", make_task(version=2))
    assert run() == 1 and read_result(path).task_version == 2
    write_task(tmp_path / "tasks", make_task(version=2, split={"kind": "rule"}))
    assert run() == 1 and read_result(path).split_hash != before.split_hash
    # The same images in the same folds, but the two diagnoses have changed places: only the split hash tells.
    swap = {"naevus": ["melanoma"], "melanoma": ["naevus"]}
    write_task(tmp_path / "tasks", make_task(version=2, split={"kind": "rule"}, merge=swap))
    assert run() == 1
    assert run() == 0


def test_a_failing_task_does_not_stop_the_others(
    make_config: Callable[..., EvaluateConfig], make_task: MakeTask, tmp_path: Path
) -> None:
    write_task(tmp_path / "tasks", make_task(name="broken", ignore=[]))
    write_task(tmp_path / "tasks", make_task(name="elsewhere", source="ham10000"))
    names = ["broken", "clinic_diagnosis", "elsewhere"]
    summary = run_evaluation(make_config(protocols=["knn"], fractions=[1.0], tasks=names))
    assert [failure.task for failure in summary.failures] == ["broken", "elsewhere"]
    assert "'wart' (6 images), which the task does not know" in str(summary)
    assert "no shard set of source ham10000 was given (given: clinic)" in summary.failures[1].message
    assert len(summary.written) == 1
    everything = run_evaluation(make_config(protocols=["knn"], fractions=[1.0]))
    assert [failure.task for failure in everything.failures] == ["broken"]  # what is elsewhere is not asked for


def test_no_positive_in_the_test_fold_is_null_with_a_reason(
    make_config: Callable[..., EvaluateConfig], build_clinic: Callable[..., ShardSet]
) -> None:
    def flatten(row: dict[str, str]) -> None:
        if row["fold"] == "exam" and row["diagnosis"]:
            row["diagnosis"] = "naevus"

    shards = build_clinic(flatten)
    (path,) = run_evaluation(
        make_config(shards=[str(shards.path)], protocols=["linear_probe"], fractions=[1.0])
    ).written
    result = read_result(path)
    assert result.metrics["auroc"].value is None and result.metrics["auroc"].reason
    assert result.metrics["log_loss"].value is not None
    assert json.loads(path.read_text())["metrics"]["auroc"]["value"] is None


def test_one_class_in_training_fails_by_name(
    make_config: Callable[..., EvaluateConfig], build_clinic: Callable[..., ShardSet]
) -> None:
    def flatten(row: dict[str, str]) -> None:
        if row["fold"] != "exam" and row["diagnosis"]:
            row["diagnosis"] = "naevus"

    shards = build_clinic(flatten)
    summary = run_evaluation(make_config(shards=[str(shards.path)], protocols=["knn"], fractions=[1.0]))
    assert summary.written == () and "at least two classes are needed" in summary.failures[0].message


def test_development_results_stand_beside_test_results(
    make_config: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    given = {"protocols": ["knn"], "fractions": [1.0]}
    (test,) = run_evaluation(make_config(**given)).written
    (development,) = run_evaluation(make_config(**given, evaluate_on="development")).written
    assert development.name == "knn-default-f1-d0-s0-development.json" and development.parent == test.parent
    assert set(read_predictions(development.with_suffix(".parquet")).column("fold").to_pylist()) == {"val"}
    assert read_result(development).evaluated_on == "development"


def test_finetune_runs_beside_the_probe(make_config: Callable[..., EvaluateConfig]) -> None:
    finetune = {"epochs": 1, "batch_size": 16, "variants": ["short"], "recipes": {"short": {}}}
    config = make_config(protocols=["finetune"], fractions=[0.5], draws=1, seeds=[0, 1], finetune=finetune)
    summary = run_evaluation(config)
    assert [path.name for path in summary.written] == [f"finetune-short-f0.5-d0-s{seed}.json" for seed in (0, 1)]
    assert read_result(summary.written[0]).settings["chosen"]["num_steps"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": []}, "encoders is empty.*--encoder ADDRESS"),
        ({"fractions": [0.0]}, r"fractions \(0\): a label fraction is above 0"),
        ({"encoders": [ENCODER, ENCODER]}, "both named"),
        ({"encoders": ["timm:no_such_vit@random:0"]}, "no_such_vit"),
        ({"tasks": ["no_such_task"]}, "no such task"),
    ],
)
def test_what_makes_the_whole_run_pointless_stops_it(
    make_config: Callable[..., EvaluateConfig], changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_evaluation(make_config(**changes))


def test_two_shard_sets_of_one_source_are_refused(make_config: Callable[..., EvaluateConfig], clinic: ShardSet) -> None:
    with pytest.raises(UserError, match="both hold source clinic"):
        run_evaluation(make_config(shards=[str(clinic.path), str(clinic.path)]))


@pytest.mark.parametrize("name", ["default", "finetune_10"])
def test_shipped_configs_are_valid(name: str) -> None:
    config = load_config(EvaluateConfig, name, ["encoders=[timm:test_vit@random:0]"], folder="configs/evaluate")
    assert 0.1 in config.fractions and config.evaluate_on == "test"


def test_contamination_is_told_task_by_task(make_task: MakeTask) -> None:
    encoder = load_encoder(ENCODER)
    entry = EncoderEntry(address=ENCODER, licence="CC0 1.0", access="open")

    def tell(names: tuple[str, ...], card: TaskCard) -> str:
        facts = EncoderFacts.model_validate({
            "timm_name": "test_vit", "samples_seen": 1, "step": 1, "code_version": "0", "excluded_tasks": names,
            "transform": encoder.transform.to_plain(),
        })  # fmt: skip
        return describe_encoder(replace(encoder, facts=facts), entry, "tiny", card).contamination

    shipped, own = load_task("ham10000_diagnosis"), make_task()
    assert tell(("ham10000_diagnosis",), shipped) == "excluded" and tell(("ham10000_diagnosis",), own) == "unknown"
    assert tell((), shipped) == "unknown"
    described = describe_encoder(encoder, entry, "tiny", shipped)
    assert (described.licence, described.access) == ("CC0 1.0", "open")  # as the run's config declares
    assert describe_encoder(encoder, entry, "tiny", shipped).contamination == "none"  # random weights have seen nothing


def test_the_labelled_keys_are_saved_and_a_fraction_that_cannot_be_had_is_said(
    make_config: Callable[..., EvaluateConfig], clinic: ShardSet, make_task: MakeTask, tmp_path: Path
) -> None:
    summary = run_evaluation(make_config(protocols=["knn"], fractions=[0.01, 0.5, 1.0], draws=1))
    results = {result.label_fraction: result for result in map(read_result, summary.written)}
    split = load_split(make_task(), clinic)
    group_of = dict(zip(split.keys.tolist(), split.groups.tolist(), strict=True))
    for fraction in (0.01, 0.5):
        keys = (tmp_path / "results" / "clinic_diagnosis" / f"labelled-f{fraction:g}-d0.txt").read_text().split()
        assert len(keys) == results[fraction].num_train
        assert len({group_of[key] for key in keys}) == results[fraction].num_train_groups
        assert set(keys) <= set(split.keys[split.find("train", "val")].tolist())
    pool = results[1.0].num_train_groups
    assert results[0.5].num_pool_groups == pool and results[0.5].settings["label_note"] is None
    assert results[0.01].settings["label_note"] == (
        f"0.01 of {pool} training groups is less than one a class: 2 ({2 / pool:.1%}) were labelled"
    )


@pytest.mark.slow
def test_processes_write_what_one_process_writes(make_config: Callable[..., EvaluateConfig], tmp_path: Path) -> None:
    given = {"protocols": ["knn", "prototype"], "fractions": [1.0]}
    alone = run_evaluation(make_config(**given, out=str(tmp_path / "alone")))
    several = run_evaluation(make_config(**given, out=str(tmp_path / "several"), executor="processes", processes=2))
    assert several.failures == () and len(several.written) == len(alone.written) == 2
    for first, second in zip(sorted(alone.written), sorted(several.written), strict=True):
        assert first.relative_to(tmp_path / "alone") == second.relative_to(tmp_path / "several")
        ours, theirs = read_result(first), read_result(second)
        assert ours.metrics == theirs.metrics and ours.predictions_sha256 == theirs.predictions_sha256


def test_the_status_counts_what_is_there_and_what_is_not(make_config: Callable[..., EvaluateConfig]) -> None:
    before = check_evaluation(make_config())
    assert "tiny  clinic_diagnosis  knn: 0 of 3" in str(before)
    assert str(before).endswith("0 results are there, 6 are missing or stale")
    run_evaluation(make_config(protocols=["knn"]))
    after = check_evaluation(make_config())
    assert [(piece.protocol, piece.num_done, piece.num_open) for piece in after.pieces] == [
        ("linear_probe", 0, 3),
        ("knn", 3, 0),
    ]


def test_small_fractions_get_more_draws_and_all_protocols_are_those_of_the_family(
    make_config: Callable[..., EvaluateConfig],
) -> None:
    config = make_config(draws=None, fractions=[0.05, 0.1, 1.0], protocols=["knn"])
    (piece,) = check_evaluation(config).pieces
    assert piece.num_open == 20 + 10 + 1
    every = check_evaluation(make_config(protocols="all", fractions=[1.0]))
    measured = {piece.protocol for piece in every.pieces}
    assert {"linear_probe", "knn", "prototype", "metadata_fusion"} <= measured
    assert not measured & {"finetune", "panderm_compat", "survival", "segmentation"}
