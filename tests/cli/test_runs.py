"""`panfm runs`: states from the run folders' files alone."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from panfm.errors import UserError
from panfm.files import read_json
from panfm.tracking import append_metrics
from panfm.training.runs import SILENT_SECONDS, find_best_probe, format_runs, keep_state, list_runs, read_run


def make_run(folder: Path, *records: dict[str, Any], state: str | None = None, age: float = 0.0) -> Path:
    """A run folder of ten steps of eight images, as pretrain leaves it."""
    folder.mkdir(parents=True)
    config = {"schedule": {"total_samples": 80}, "engine": {"global_batch_size": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if state == "unknown":  # it ended by an error
        with pytest.raises(ZeroDivisionError), keep_state(folder, 10):
            raise ZeroDivisionError
    elif state is not None:
        with keep_state(folder, 10) as end:
            end(state)
    for record in records:
        append_metrics(
            folder / "metrics.jsonl", {"samples_seen": 8 * record["step"], "images_per_second": 4.0} | record
        )
    for path in folder.iterdir():
        os.utime(path, (time.time() - age, time.time() - age))
    return folder


def test_the_state_is_what_the_run_wrote_down(tmp_path: Path) -> None:
    for state in ("finished", "interrupted", "diverged", "alarmed", "unknown"):
        run = read_run(make_run(tmp_path / state, {"step": 3, "loss": 0.5}, state=state))
        assert (run.state, run.step, run.num_steps, run.loss) == (state, 3, 10, 0.5)


def test_inside_it_is_running_and_a_long_silence_makes_it_unknown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"step": 2}, {"step": 4})
    with keep_state(folder, 10):
        assert read_json(folder / "run.json")["state"] == "running"
        assert read_run(folder).state == "running"
        assert read_run(folder, now=time.time() + SILENT_SECONDS - 60).state == "running"
        assert read_run(folder, now=time.time() + SILENT_SECONDS + 60).state == "unknown"


def test_a_slow_run_may_be_silent_for_longer(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run", {"step": 2}, {"step": 4, "images_per_second": 0.1}
    )  # 160 s from record to record
    with keep_state(folder, 10):
        assert read_run(folder, now=time.time() + 1000).state == "running"
        assert read_run(folder, now=time.time() + 2000).state == "unknown"


def test_folders_from_before_run_json_are_read_too(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "whole", {"step": 10})).state == "finished"
    assert read_run(make_run(tmp_path / "cut", {"step": 9})).state == "unknown"


def test_the_best_probe_is_the_best_mean_over_modalities() -> None:
    records = [
        {"probe/clinical/auroc": 0.6, "probe/dermoscopic/auroc": 0.8, "probe/seconds": 3.0},
        {"probe/clinical/auroc": 0.9, "probe/dermoscopic/auroc": 0.6, "probe/clinical/balanced_accuracy": 1.0},
        {"probe/clinical/auroc": None, "probe/dermoscopic/auroc": None},
        {"loss": 0.1},
    ]
    assert find_best_probe(records) == ("auroc", pytest.approx(0.75))
    assert find_best_probe([{"loss": 0.1}]) == (None, None)


def test_runs_are_listed_the_newest_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a_new", {"step": 10, "loss": 0.25, "probe/clinical/auroc": 0.7}, state="finished", age=90)
    make_run(tmp_path / "old", {"step": 1}, state="diverged", age=7300)
    (tmp_path / "no_run").mkdir()
    runs = list_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["old", "a_new"]
    Console(width=160).print(format_runs(runs))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["old", "diverged", "1", "of", "10", "-", "-", "2", "h", "ago"]
    assert lines[2] == ["a_new", "finished", "10", "of", "10", "0.2500", "0.700", "auroc", "2", "min", "ago"]
    assert [run.folder for run in list_runs(tmp_path / "old")] == [tmp_path / "old"]


def test_a_folder_without_runs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in it"):
        list_runs(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        list_runs(tmp_path / "absent")
