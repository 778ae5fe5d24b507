"""A whole run under ZeRO 3: the EMA teacher follows, looks and pictures see whole weights, a checkpoint goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from panfm.config import load_config
from panfm.shards.index import Exclusion
from panfm.tracking import read_metrics
from panfm.training.checkpoint import list_checkpoints
from panfm.training.pretrain import PretrainConfig, pretrain

LATENTS = (
    "{kind: masked_image, mask: {kind: random, ratio: 0.5}, predictor: {depth: 1, width: 64}, "
    "target: {kind: ema_teacher, num_blocks: 3, ema: {momentum: 0.9}}}"
)
SHORT = (
    f"objectives=[{LATENTS}]",
    "optim.base_lr=1.0e-3",
    "schedule.total_samples=48",
    "data.workers=0",
    "monitor.every=2",
    "checkpoint.save_every=2",
)
# A section of its own keeps the stage on one rank, with every parameter sharded.
SHARDED = ("engine.zero_stage=3", "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}")


@pytest.mark.slow
def test_a_run_under_zero_3_is_the_run_under_zero_0(config: Path, tmp_path: Path) -> None:
    for name, overrides in (("whole", ()), ("sharded", SHARDED)):
        pretrain(load_config(PretrainConfig, config, [*SHORT, *overrides]), out=tmp_path / name, excluded=Exclusion())
    shutil.copytree(tmp_path / "sharded", tmp_path / "resumed")
    shutil.rmtree(list_checkpoints(tmp_path / "resumed")[-1])
    pretrain(load_config(PretrainConfig, config, [*SHORT, *SHARDED]), out=tmp_path / "resumed", excluded=Exclusion())

    whole, sharded, resumed = (tmp_path / name for name in ("whole", "sharded", "resumed"))
    for key in ("loss", "grad_norm", "rankme"):
        ours, expected, again = (
            [record[key] for record in read_metrics(run / "metrics.jsonl") if key in record]
            for run in (sharded, whole, resumed)
        )
        assert ours == pytest.approx(expected, rel=1e-4), key
        assert again == ours, key
    assert (sharded / "pictures" / "step-00000001.png").exists()
    for file in ("encoder.safetensors", "extra.safetensors"):
        ours, expected, again = (load_file(list_checkpoints(run)[-1] / file) for run in (sharded, whole, resumed))
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
            assert torch.equal(again[key], ours[key]), key
