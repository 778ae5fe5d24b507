"""The command line as a user meets it: quick help, and one clear line with exit code 2 for what a user got wrong."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from panfm.cli.main import app
from tests.archives import describe_source_card, write_table
from tests.cli.commands import Ended, assert_one_line, launch_panfm, panfm


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tiny photographs of six patients, a table, and a card for them."""
    root = tmp_path_factory.mktemp("archive")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(12):
        coarse = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 72)).save(root / f"{number}.jpg")
        rows.append(
            {"file": f"{number}.jpg", "patient": f"P{number // 2}", "dx": "nevus" if number % 2 else "melanoma"}
        )
    write_table(root / "table.csv", rows)
    columns, labels = {"path": "file", "patient_id": "patient"}, {"diagnosis": {"column": "dx"}}
    card = describe_source_card(
        "tiny", synthetic=None, modality="dermoscopic", columns=columns, labels=labels, expected={"images": 12}
    )
    (root / "tiny.yaml").write_text(yaml.safe_dump(card))
    return root


@pytest.fixture(scope="module")
def shards(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "tiny"
    run = panfm("shards", "build", archive / "tiny.yaml", "--root", archive, "--out", out, "--processes", 1)
    assert run.returncode == 0, run.stderr
    return out


def test_help_is_instant_and_every_command_has_an_example() -> None:
    launch_panfm("--help")  # warm the disk cache
    started = time.monotonic()
    plain = subprocess.run([sys.executable, "-c", "pass"], check=True)
    interpreter = time.monotonic() - started
    run = launch_panfm("--help")
    help_time = time.monotonic() - started - interpreter
    assert plain.returncode == run.returncode == 0
    heavy = subprocess.run(
        [sys.executable, "-c", "import panfm.cli.main, sys; print([m for m in ('torch', 'numpy', 'pyarrow', 'pydantic')"
         " if m in sys.modules])"], capture_output=True, text=True, check=True)  # fmt: skip
    assert heavy.stdout.strip() == "[]", "the command line imports a heavy package before it is asked to work"
    assert help_time < 60 * max(interpreter, 0.05), "a help text is text"
    commands = dict(walk(typer.main.get_command(app)))
    assert {"demo", "audit", "report", "shards build", "shards forget", "evaluate run"} <= set(commands)
    for name, command in commands.items():
        assert f"panfm {name}" in (command.help or "").partition("Example:")[2], name


def walk(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below a group, by the words that call it."""
    for word, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from walk(inner, f"{name}{word} ")
        else:
            yield name + word, inner


def test_shards_are_built_and_inspected(shards: Path) -> None:
    assert (shards / "index.json").is_file()
    run = launch_panfm("shards", "inspect", shards)
    assert run.returncode == 0, run.stderr
    assert "dermoscopic" in run.stdout
    assert "melanoma" in run.stdout


def test_a_disk_that_takes_no_more_is_one_line(archive: Path, tmp_path: Path) -> None:
    # -B: Python would leave compiled files of ours that end at the limit, for the next process to fall over.
    command = f"ulimit -f 8; exec {sys.executable} -B -m panfm shards build {archive}/tiny.yaml"
    run = subprocess.run(
        ["sh", "-c", f"{command} --root {archive} --out {tmp_path}/shards --processes 1"],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in run.stderr
    assert run.returncode == 2 and "panfm: File too large" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "shards" / "index.json").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    run = launch_panfm("--debug", "shards", "inspect", tmp_path)
    assert run.returncode != 0
    assert "Traceback" in run.stderr


@pytest.mark.slow
def test_bad_cards_and_archives(archive: Path, tmp_path: Path) -> None:
    card = yaml.safe_load((archive / "tiny.yaml").read_text())

    def build(changed: dict[str, object], root: Path = archive) -> Ended:
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(card | changed))
        return panfm("shards", "build", tmp_path / "card.yaml", "--root", root, "--out", tmp_path / "out")

    assert_one_line(build({"licences": "x"}), "card.yaml", "licences", "licence")
    assert_one_line(build({"modality": "xray"}), "card.yaml", "modality", "xray")
    assert_one_line(build({"columns": {"path": "file", "patient_id": "pid"}}), "table.csv", "pid", "patient")
    assert_one_line(build({}, tmp_path / "gone"), "gone")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "table.csv").write_text("file,patient,dx\n")
    assert_one_line(build({}, empty), "table.csv")
    assert_one_line(panfm("shards", "build", "ham1000", "--root", archive, "--out", tmp_path / "out"), "ham10000")
    assert not (tmp_path / "out" / "index.json").exists()


def test_undecodable_images_are_set_aside_and_too_many_stop_the_build(archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for path in archive.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    for number in range(12):
        (root / f"{number}.jpg").write_bytes(b"\xff\xd8\xff broken")
    out = tmp_path / "out"
    run = panfm("shards", "build", root / "tiny.yaml", "--root", root, "--out", out, "--processes", 1)
    assert_one_line(run, "undecodable", "12")
    assert not (out / "index.json").exists()


@pytest.mark.slow
def test_bad_runs(shards: Path, tmp_path: Path) -> None:
    def pretrain(*overrides: str) -> Ended:
        return panfm("pretrain", "debug_cpu", f"data.shards=[{shards}]", *overrides, "--out", tmp_path / "run")

    # In a process of its own one line is all that is said, too: torch and DeepSpeed, which it imports, are silent.
    wrong = ("pretrain", "debug_cpu", f"data.shards=[{shards}]", "optim.base_lrr=1", "--out", tmp_path / "run")
    assert_one_line(launch_panfm(*wrong), "optim.base_lrr", "base_lr")
    assert_one_line(pretrain("engine.micro_batch_size=many"), "engine.micro_batch_size", "many")
    assert_one_line(pretrain("engine.global_batch_size=10", "engine.micro_batch_size=4"), "10", "4")
    assert_one_line(pretrain(f"data.shards=[{tmp_path / 'gone'}]"), "gone")
    assert_one_line(panfm("pretrain", "nothing.yaml"), "nothing.yaml")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_bad_encoders_and_tasks(shards: Path, tmp_path: Path) -> None:
    def embed(address: str) -> Ended:
        return panfm("embed", address, shards, "--out", tmp_path / "f.parquet", "--cache", tmp_path / "cache")

    assert_one_line(embed("gopher:vit"), "gopher", "timm:")
    assert_one_line(embed(f"panfm:{tmp_path / 'gone'}"), "gone")
    assert_one_line(embed("timm:vit_tinny_patch16_224@random:0"), "vit_tinny_patch16_224", "vit_tiny_patch16_224")
    assert not (tmp_path / "f.parquet").exists()

    task = {
        "version": 1, "name": "mine", "title": "Mine", "source": "tiny", "label": "diagnosis",
        "classes": ["nevus", "basal_cell_carcinoma"], "group": "patient",
        "split": {"kind": "rule", "seed": 0, "test_share": 0.3, "val_share": 0.0}, "metrics": ["auroc"],
        "primary_metric": "auroc", "licence": "CC0-1.0", "citation": "none",
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(yaml.safe_dump(task))
    run = panfm(
        "evaluate", "run", "--encoder", "timm:vit_tiny_patch16_224@random:0?image_size=32", "--shards", shards,
        "--tasks", "mine", "--task-dir", tmp_path / "tasks", "--out", tmp_path / "results",
        f"cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert run.returncode in (1, 2)
    assert "melanoma" in run.stderr + run.stdout
    assert "Traceback" not in run.stderr
    assert_one_line(panfm("leaderboard", "build", tmp_path / "nothing"), "nothing")


@pytest.mark.slow
def test_shards_of_another_schema_version_and_torn_builds_are_refused(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    index = (copy / "index.json").read_text()
    assert '"schema_version": 1' in index
    (copy / "index.json").write_text(index.replace('"schema_version": 1', '"schema_version": 99', 1))
    assert_one_line(panfm("shards", "inspect", copy), "99", "1")
    (copy / "index.json").unlink()
    assert_one_line(panfm("shards", "inspect", copy), "index.json")
