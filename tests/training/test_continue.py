"""Continuing from weights, as a whole run: what it starts from is reported, and the heads warm up alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from panfm.config import load_config
from panfm.files import compute_file_sha256, read_json
from panfm.models.vit import EncoderConfig, build_vit
from panfm.shards.index import Exclusion
from panfm.training.pretrain import PretrainConfig, pretrain
from tests.training.conftest import run_pretrain

# Four steps of sixteen images, a checkpoint after each; the encoder waits for two.
OVERRIDES = (
    "encoder.name=test_vit",
    "schedule.total_samples=64",
    "schedule.warmup_samples=0",
    "checkpoint={save_every: 1, keep_last: 9}",
    "optim.freeze_encoder_samples=32",
    "monitor.every=0",
    "data.workers=0",
)


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as MAE writes it, of 16 patches where the run has 4."""
    state = build_vit(EncoderConfig(name="test_vit", image_size=64), seed=3).state_dict()
    path = tmp_path_factory.mktemp("initial") / "mae.pth"
    torch.save({"model": state | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.bias": torch.zeros(8)}}, path)
    return path


def run(config: Path, initial: Path, out: Path) -> None:
    settings = load_config(PretrainConfig, config, (*OVERRIDES, f"encoder.init={initial}"))
    assert pretrain(settings, out=out, excluded=Exclusion()).outcome == "finished"


def read_encoder(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "encoder.safetensors")


def hash_state(out: Path) -> dict[str, str]:
    folder = out / "checkpoints" / "step-00000004"
    return {path.name: compute_file_sha256(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_heads_warm_up_alone_and_a_resume_across_the_border_is_exact(
    config: Path, initial: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(config, initial, whole)
    report = read_json(whole / "init_report.json")
    weights = torch.load(initial, weights_only=True)["model"]
    assert report["counts"] == {"copied": len(weights) - 3, "resized": 1, "ignored": 2}

    first = read_encoder(whole, 1)
    assert all(torch.equal(first[name], tensor) for name, tensor in weights.items() if "blocks" in name)
    later = [read_encoder(whole, step) for step in (2, 3)]
    assert all(torch.equal(tensor, first[name]) for name, tensor in later[0].items())
    assert not any(torch.equal(tensor, first[name]) for name, tensor in later[1].items() if name.endswith("qkv.weight"))

    shutil.copytree(whole, resumed)
    for step in (2, 3, 4):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    run(config, initial, resumed)
    assert hash_state(resumed) == hash_state(whole) != {}


@pytest.mark.slow
def test_heads_warm_up_alone_under_zero_on_two_ranks(config: Path, initial: Path, tmp_path: Path) -> None:
    code, printed = run_pretrain(config, tmp_path / "two", *OVERRIDES, f"encoder.init={initial}", ranks=2)
    assert code == 0 and printed.count("start from encoder.init") == 1, printed  # only one rank speaks
    assert "  resized pos_embed: from 4 x 4 to 2 x 2 patches" in printed and "  ignored mask_token: " in printed
    first, second, third = (read_encoder(tmp_path / "two", step) for step in (1, 2, 3))
    assert all(torch.equal(tensor, first[name]) for name, tensor in second.items())
    assert not any(torch.equal(tensor, first[name]) for name, tensor in third.items() if name.endswith("qkv.weight"))
