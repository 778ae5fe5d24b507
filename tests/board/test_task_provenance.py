"""The command of a page measures the same cell: it is parsed as the command line parses it."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

from panfm.board.task_provenance import describe_provenance, hide_folders, write_command
from panfm.cli.evaluate import _read_settings, app
from panfm.evaluation.results import Result, read_results
from panfm.evaluation.run_config import EncoderEntry, EvaluateConfig, count_draws, list_recipes
from tests.board.fabricated import GOOD, RANDOM, write_trial


def make_results(tmp_path: Path, draws: int = 1, seeds: tuple[int, ...] = (0,), **changes: Any) -> list[Result]:
    """Results of one cell with other values in places."""
    write_trial(tmp_path, changes.pop("encoder_name", GOOD), "lesions", 1.0)
    ((_, one),) = read_results([tmp_path])
    address = changes.pop("address", None)
    card = one.encoder if address is None else one.encoder.model_copy(update={"address": address})
    return [
        one.model_copy(update={"draw": draw, "seed": seed, "encoder": card, **changes})
        for draw in range(draws)
        for seed in seeds
    ]


def parse(command: str) -> EvaluateConfig:
    """The config that the command line makes of it."""
    words = shlex.split(command)
    assert words[:3] == ["panfm", "evaluate", "run"]
    run = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    given = run.make_context("run", words[3:]).params
    return _read_settings(**{name: value or None for name, value in given.items()})  # as typer hands them on


def test_the_plain_command_of_a_shipped_task(tmp_path: Path) -> None:
    results = make_results(tmp_path, address="timm:vit_tiny@random:0", encoder_name="vit_tiny@random:0")
    assert write_command(results, "ham10000") == (
        "panfm evaluate run --encoder timm:vit_tiny@random:0 --shards SHARDS/ham10000 --tasks lesions "
        "--protocols linear_probe --fractions 1"
    )


@pytest.mark.parametrize(
    ("protocol", "variant", "recipe"),
    [
        ("linear_probe", "default", {"num_folds": 5}),
        ("linear_probe", "three folds; rm -rf $HOME", {"num_folds": 3}),
        ("knn", "default", {"k": 10, "temperature": 1e-05}),
        ("slides", "mean", {"num_folds": 4}),
        ("metadata_fusion", "metadata", {"num_folds": 5}),
        ("survival", "cox", {"num_folds": 5, "days": [30.0, 60.0]}),
        ("finetune", "lora", {}),
    ],
)
def test_the_parsed_command_asks_for_this_cell(tmp_path: Path, protocol: str, variant: str, recipe: Any) -> None:
    settings = {"recipe": {**recipe, "variant": variant}, "num_replicates": 500}
    results = make_results(
        tmp_path, draws=3, seeds=(0, 7), protocol=protocol, variant=variant, label_fraction=0.05, settings=settings
    )
    config = parse(write_command(results, None))
    assert config.encoders == (f"panfm:{GOOD}",)
    assert (config.tasks, config.protocols, config.fractions) == (("lesions",), (protocol,), (0.05,))
    assert (config.shards, config.task_dir, config.evaluate_on) == (("SHARDS",), "TASKS", "test")
    assert (count_draws(config, 0.05), config.seeds, config.num_replicates) == (3, (0, 7), 500)
    ((_, made),) = list_recipes(config)
    assert made["variant"] == variant
    for name, value in recipe.items():
        assert json.loads(json.dumps(made[name])) == value


def test_an_encoder_of_another_name_keeps_it(tmp_path: Path) -> None:
    results = make_results(tmp_path, encoder_name="it's $(ours) <b>", address="timm:vit_tiny@/data/us/w.safetensors")
    (encoder,) = parse(write_command(results, "ham10000")).encoders
    assert isinstance(encoder, EncoderEntry)
    assert (encoder.address, encoder.name) == ("timm:vit_tiny@WEIGHTS/w.safetensors", "it's $(ours) <b>")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("panfm:/data/us/exports/first?image_size=64", "panfm:WEIGHTS/first?image_size=64"),
        ("timm:resnet50@~/w/r.safetensors", "timm:resnet50@WEIGHTS/r.safetensors"),
        ("hf:/models/dinov2/", "hf:WEIGHTS/dinov2/"),
        ("panfm:exports/first", "panfm:exports/first"),
        ("timm:vit_tiny@random:0", "timm:vit_tiny@random:0"),
    ],
)
def test_absolute_folders_stay_at_home(address: str, shown: str) -> None:
    assert hide_folders(address) == shown


def test_provenance_names_the_first_run_and_what_it_chose(tmp_path: Path) -> None:
    chosen = {"C": 0.0031622776, "thresholds": [{"value": 0.1}], "columns": ["age", "sex"], "label": None}
    results = make_results(tmp_path, draws=2, settings={"chosen": chosen}, versions={"torch": "2", "numpy": "1"})
    found = describe_provenance(results[::-1], None)
    assert found.chosen == (("C", "0.003162"), ("columns", '["age", "sex"]'))
    assert (found.num_runs, found.versions) == (2, (("numpy", "1"), ("torch", "2")))
    assert (found.encoder_hash, found.data_hash, found.split_hash, found.predictions_sha256) == (
        f"hash-of-{GOOD}", "data-lesions", "split-lesions", results[0].predictions_sha256,
    )  # fmt: skip
    assert RANDOM not in found.command and len(fields(found)) == 9
