"""The plan of a run: what is computed is what a run then shows, and nothing is written."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from panfm.config import load_config
from panfm.shards.index import Exclusion
from panfm.training.dry_run import DryRun, describe_dry_run, dry_run
from panfm.training.flops import compute_run_cost, compute_run_memory
from panfm.training.memory import SavedTensors, compute_state_bytes
from panfm.training.plan import PretrainConfig
from tests.ranks import run_panfm_ranks


def load(config: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, config, overrides)


def test_each_stage_shards_one_thing_more() -> None:
    stages = [compute_state_bytes(1000, stage, 4) for stage in range(4)]
    assert (stages[0].weights, stages[0].gradients, stages[0].optimizer) == (4000, 4000, 8000)
    assert (stages[1].weights, stages[1].gradients, stages[1].optimizer) == (4000, 4000, 3000)
    assert (stages[2].weights, stages[2].gradients, stages[2].optimizer) == (4000, 1000, 3000)
    assert (stages[3].weights, stages[3].gradients, stages[3].optimizer) == (1000, 1000, 2000)
    assert compute_state_bytes(1000, 2, 1) == stages[0]  # one rank has nothing to share


def test_saved_tensors_are_counted_once_and_let_go() -> None:
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second)
    images = torch.randn(10, 8)
    watched = SavedTensors(model)
    for _ in range(2):  # the second pass finds the memory of the first let go
        with watched:
            loss = model(images).sum()
        loss.backward()
    # The input, kept for the first layer, and ReLU's output, kept for itself and for the second layer; no weight.
    assert watched.peak == 4 * (10 * 8 + 10 * 16)


@pytest.mark.slow
def test_counted_memory_is_that_of_a_real_step(config: Path) -> None:
    """Activations counted on shapes alone, of another batch size, beside those watched in a step."""
    settings = load(config, "encoder.drop_path_rate=0", "engine.precision=bf16")
    plan = dry_run(settings, excluded=Exclusion())
    counted = compute_run_memory(settings)
    assert counted.activations == pytest.approx(plan.activation_bytes, rel=0.05)
    assert counted.teachers == plan.teacher_bytes == 0
    assert plan.cost == compute_run_cost(settings)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_the_command_prints_the_plan_once_and_writes_nothing(
    ranks: int, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    words = ["pretrain", str(config), "--dry-run", "--out", str(here / "run")]
    code, printed = run_panfm_ranks(words, ranks, tmp_path / "log")
    assert code == 0, printed
    assert list(here.iterdir()) == []
    for said in (
        "operations: ",
        "ZeRO 3: weights",
        "checkpoint: ",
        "images/s",
        "MFU",
        "GB an hour",
        "hours",
        " kWh if",
    ):
        assert said in printed, printed
    assert printed.count("operations: ") == 1, printed
    assert "estimate: 10 W a busy core" in printed or "RAPL counters" in printed
    assert "dry run: nothing was written" in printed


def test_lines_follow_from_the_numbers(config: Path) -> None:
    settings = load(config)
    plan = DryRun(
        cost=compute_run_cost(settings),
        num_steps=1000,
        global_batch_size=100,
        world_size=2,
        zero_stage=1,
        activation_bytes=2 * 10**9,
        teacher_bytes=10**9,
        memory_gib=3.0,
        checkpoint_bytes=5 * 10**8,
        sample_bytes=50_000,
        step_seconds=0.5,
        data_wait_share=0.25,
        peak_flops=None,
        step_joules=1800.0,
        energy_source="RAPL counters",
    )
    assert plan.images_per_second == 200
    assert plan.hours == pytest.approx(1000 * 0.5 / 3600)
    assert plan.energy_kwh == pytest.approx(0.5)
    assert plan.data_bytes_per_hour == pytest.approx(36e9)
    lines = describe_dry_run(plan, settings.checkpoint)
    this = [line for line in lines if "<- this run" in line]
    assert len(this) == 1 and re.search(r"2 ranks ZeRO 1", this[0])
    assert any("MFU unknown" in line for line in lines)
