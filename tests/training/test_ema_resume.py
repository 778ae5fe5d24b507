"""Runs with an EMA teacher: what a checkpoint holds of it, and that a resumed run is the run that never stopped.

The same on two ranks under ZeRO 1 and 2: tests/objectives/test_ranks.py.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from panfm.config import load_config
from panfm.errors import UserError
from panfm.files import read_json, write_json
from panfm.shards.index import Exclusion
from panfm.tracking import read_metrics
from panfm.training.checkpoint import list_checkpoints
from panfm.training.pretrain import PretrainConfig, PretrainSummary, pretrain

MASK = "mask: {kind: random, ratio: 0.5}"
DISTILLATION = (
    f"{{kind: self_distillation, {MASK}, centring: mean, koleo_weight: 0.0, masked_views: 2, ema: {{momentum: 0.9}}, "
    "teacher_temperature: 0.07, warmup_teacher_samples: 32, "
    "prototypes: {num_prototypes: 64, hidden_dim: 64, bottleneck_dim: 32}}"
)
LATENTS = (
    f"{{kind: masked_image, {MASK}, predictor: {{depth: 1, width: 64}}, "
    "target: {kind: ema_teacher, num_blocks: 3, ema: {momentum: 0.9}}}"
)
# Four steps of sixteen images in two micro batches, a checkpoint every two steps.
OVERRIDES = (
    f"objectives=[{DISTILLATION}, {LATENTS}]",
    "augment.views=2",
    "augment.local_views=2",
    "augment.local_size=16",
    "optim.base_lr=1.0e-3",
    "schedule.total_samples=64",
    "data.workers=0",
    "monitor.every=0",
    "monitor.pictures_every=0",
)
EXACT = ("step", "loss", "grad_norm", *(f"self_distillation/{name}" for name in ("centre_norm", "teacher_temperature")))


def run(config: Path, out: Path, *overrides: str) -> PretrainSummary:
    return pretrain(load_config(PretrainConfig, config, [*OVERRIDES, *overrides]), out=out, excluded=Exclusion())


def read_run(out: Path) -> tuple[list[tuple[object, ...]], dict[str, str]]:
    """The curve of a run, and the hashes of all that its newest checkpoint holds of weights, optimizer and teacher."""
    curve = [tuple(record[key] for key in EXACT) for record in read_metrics(out / "metrics.jsonl")]
    files = read_json(list_checkpoints(out)[-1] / "manifest.json")["files"]
    return curve, {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.mark.slow
def test_a_resumed_run_has_the_same_teacher_to_the_bit(config: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(list_checkpoints(tmp_path / "resumed")[-1])
    run(config, tmp_path / "resumed")
    assert [path.name for path in list_checkpoints(tmp_path / "resumed")] == ["step-00000002", "step-00000004"]
    whole, resumed = read_run(tmp_path / "whole"), read_run(tmp_path / "resumed")
    assert whole == resumed and "extra.safetensors" in whole[1]
    assert len({line[1] for line in whole[0]}) == 4  # it is another loss in each of the four steps
    temperatures = [line[-1] for line in resumed[0]]  # a schedule is a function of the step, before and after
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])

    newest = list_checkpoints(tmp_path / "whole")[-1]
    extra, shipped = load_file(newest / "extra.safetensors"), load_file(newest / "encoder.safetensors")
    assert all(torch.equal(extra[f"teacher.encoder.{name}"], tensor) for name, tensor in shipped.items())
    assert extra["objectives.self_distillation.patch_centre.value"].abs().max() > 0
    assert any(name.startswith("teacher.objectives.self_distillation.head.") for name in extra)
    earlier = load_file(list_checkpoints(tmp_path / "whole")[0] / "extra.safetensors")
    assert not torch.equal(extra["teacher.encoder.pos_embed"], earlier["teacher.encoder.pos_embed"])

    # A checkpoint that was whole without a teacher: put together by hand.
    manifest = read_json(newest / "manifest.json")
    del manifest["files"]["extra.safetensors"]
    write_json(newest / "manifest.json", manifest)
    (newest / "extra.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000004: teacher\..* is missing; it must hold the EMA teacher"):
        run(config, tmp_path / "whole")


@pytest.mark.slow
def test_a_step_that_was_not_applied_leaves_the_teacher_alone(config: Path, tmp_path: Path) -> None:
    overrides = ("optim.base_lr=1.0e+20", "engine.clip_grad_norm=null", "schedule.warmup_samples=0")
    overrides += ("monitor.alarm.max_skipped_steps=0", "checkpoint.save_every=1")
    summary = run(config, tmp_path / "run", *overrides)
    assert summary.outcome == "diverged"
    for folder in list_checkpoints(tmp_path / "run"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "extra.safetensors").values())
