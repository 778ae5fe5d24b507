"""What must be shown on GPUs (launch/gpu_check.sh runs it): NCCL parity, resume, throughput. Not run on one yet."""

import json
from pathlib import Path

import pytest
import torch

from panfm.tracking import read_metrics
from panfm.training.checkpoint import list_checkpoints
from tests.training.conftest import launch_pretrain

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
TOLERANCE = 2e-3  # of a loss after 8 steps: other kernels, other orders of sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here: launch/gpu_check.sh runs this where there is one"),
]


def read_losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


def train(config: Path, out: Path, *overrides: str, ranks: int = 0, gpus: bool = True) -> list[float]:
    environment = None if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    code, printed = launch_pretrain(config, out, *overrides, ranks=ranks, environment=environment)
    assert code == 0, printed
    return read_losses(out)


def test_one_gpu_has_the_losses_of_the_cpu(config: Path, tmp_path: Path) -> None:
    on_gpu = train(config, tmp_path / "gpu")
    on_cpu = train(config, tmp_path / "cpu", gpus=False)
    assert on_gpu == pytest.approx(on_cpu, rel=TOLERANCE)


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_gpus_have_the_losses_of_one(config: Path, tmp_path: Path, stage: int) -> None:
    alone = train(config, tmp_path / "one", "encoder.drop_path_rate=0")
    together = train(config, tmp_path / "two", "encoder.drop_path_rate=0", f"engine.zero_stage={stage}", ranks=2)
    assert together == pytest.approx(alone, rel=TOLERANCE)


def test_a_resumed_run_has_the_losses_of_one_never_stopped(config: Path, tmp_path: Path) -> None:
    whole = train(config, tmp_path / "whole")
    out = tmp_path / "parts"
    train(config, out)
    newest = list_checkpoints(out)[-1]
    (newest / "manifest.json").unlink()  # as if it had never been completed: the run goes on from the one before
    resumed = train(config, out)
    assert resumed == pytest.approx(whole, rel=TOLERANCE)


def test_bf16_trains_and_its_speed_energy_and_share_of_the_peak_are_recorded(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "bf16"
    losses = train(config, out, "engine.precision=bf16")
    assert losses[-1] < losses[0]
    last = read_metrics(out / "metrics.jsonl")[-1]
    assert last["images_per_second"] > 0
    assert last["mfu"] is None or 0 < last["mfu"] < 1
    assert last["energy_kwh"] is None or last["energy_kwh"] > 0
    print(json.dumps({key: last[key] for key in ("images_per_second", "mfu", "energy_kwh", "energy_source")}))
