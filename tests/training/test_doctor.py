"""The doctor on one process and on ranks: each check finds the fault that it is for, and says a way out."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from panfm.config import load_config
from panfm.training.doctor import Check, check_folder, find_versions, run_checks
from panfm.training.doctor_ranks import (
    AllReduce,
    check_plan,
    check_shards,
    compare_versions,
    measure_disk_rate,
    merge_checks,
)
from panfm.training.plan import PretrainConfig
from tests.ranks import run_panfm_ranks

CPU = torch.device("cpu")


def test_every_check_says_something_and_a_failed_one_says_what_to_do() -> None:
    checks = run_checks(Path.cwd())
    assert [check.name for check in checks[:3]] == ["versions", "torch and torchvision", "devices"]
    for check in checks:
        assert check.detail
        assert check.ok == (check.way_out == "")
    assert checks[0].ok and f"torch {torch.__version__.split('+')[0]}" in checks[0].detail
    assert checks[1].ok


def test_a_folder_that_cannot_be_written_is_found() -> None:
    check = check_folder(Path("/proc"))
    assert not check.ok
    assert "change to a folder" in check.way_out


def test_the_first_rank_that_is_not_well_speaks() -> None:
    well, other = Check("disk", True, "10 GiB"), Check("disk", True, "20 GiB")
    ill = Check("disk", False, "0 GiB", "free some")
    assert merge_checks([[well], [well]]) == [well]
    assert merge_checks([[well], [other]]) == [Check("disk", True, "10 GiB (rank 0; the other 1 are well too)")]
    assert merge_checks([[well], [ill], [ill]]) == [Check("disk", False, "rank 1 and 1 more: 0 GiB", "free some")]


def test_different_versions_are_a_fault_that_names_the_rank() -> None:
    own = find_versions()
    assert compare_versions([own, dict(own)]).ok
    check = compare_versions([own, own | {"torch": "1.0"}])
    assert not check.ok
    assert "torch is " in check.detail and "1.0 on rank 1" in check.detail
    assert check.way_out


def test_the_disk_rate_is_that_of_the_folder(tmp_path: Path) -> None:
    written, read = measure_disk_rate(tmp_path)
    assert written > 0 and read > 0
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_looked_at_and_a_damaged_one_is_found(shards: Path, tmp_path: Path) -> None:
    check, workers = check_shards([str(shards)], 0, CPU)
    assert check.ok and "40 images" in check.detail and "1 ranks read" in check.detail
    assert workers.ok
    _, crowd = check_shards([str(shards)], 255, CPU)
    assert not crowd.ok and "data.workers" in crowd.way_out
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    next(damaged.glob("*.tar")).unlink()
    check, _ = check_shards([str(damaged)], 0, CPU)
    assert not check.ok and "rank 0: " in check.detail and check.way_out


def test_what_a_run_needs_is_held_against_what_there_is(config: Path) -> None:
    settings = load_config(PretrainConfig, config)
    memory, speed = check_plan(settings, CPU, 1, None)
    assert memory.ok and "activations" in memory.detail
    assert speed.ok and "images/s" in speed.detail and "hours" in speed.detail
    large = replace(settings.engine, micro_batch_size=2**22, global_batch_size=2**22)
    memory, _ = check_plan(replace(settings, engine=large), CPU, 1, None)
    assert not memory.ok and "engine.micro_batch_size" in memory.way_out
    odd = replace(settings.engine, global_batch_size=12)
    (batches,) = check_plan(replace(settings, engine=odd), CPU, 1, None)
    assert not batches.ok and "must be divisible" in batches.detail


def test_ranks_that_talk_more_than_they_work_are_told(config: Path) -> None:
    settings = load_config(PretrainConfig, config)
    fast, slow = AllReduce(bandwidth=1e15, latency=0.0), AllReduce(bandwidth=1.0, latency=1.0)
    assert check_plan(settings, CPU, 2, fast)[1].ok
    speed = check_plan(settings, CPU, 2, slow)[1]
    assert not speed.ok and "more images a rank" in speed.way_out


@pytest.mark.slow
def test_two_ranks_are_examined_and_rank_0_prints_one_list(
    config: Path, shards: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = ["doctor", "--config", str(config), "--shards", str(shards), "--folder", str(tmp_path)]
    _, printed = run_panfm_ranks(words, 2, tmp_path_factory.mktemp("doctor") / "log")
    lines = printed.splitlines()
    for name, said in {
        "same versions": "on all 2 ranks",
        "all-reduce": "gloo, 2 ranks: ",
        "disk rate": "2 ranks write",
        "shards": "40 images",
        "memory of the run": "activations",
        "speed": "images/s",
    }.items():
        (line,) = [line for line in lines if line[4:].startswith(f"{name} ")]
        assert said in line
    assert list(tmp_path.iterdir()) == []
