import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from panfm.config import load_config
from panfm.encoder.export import export_encoder
from panfm.encoder.facts import read_facts, write_facts
from panfm.errors import UserError
from panfm.files import read_json
from panfm.shards.index import Exclusion, open_shard_set
from panfm.tracking import read_metrics
from panfm.training.checkpoint import find_checkpoint, list_checkpoints
from panfm.training.flops import compute_run_cost
from panfm.training.memory import compute_checkpoint_bytes
from panfm.training.pretrain import PretrainConfig, pretrain
from panfm.training.runs import read_run
from tests.encoder.test_export import SMALL, make_checkpoint
from tests.training.conftest import launch_pretrain, run_pretrain, start_pretrain

EXACT = ("step", "samples_seen", "loss", "lr", "grad_norm")


def read_curve(out: Path) -> list[tuple[object, ...]]:
    return [tuple(record[key] for key in EXACT) for record in read_metrics(out / "metrics.jsonl")]


def read_losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


def hash_state(out: Path) -> dict[str, str]:
    """SHA-256 of the newest checkpoint's files that hold weights and optimizer."""
    folder = list_checkpoints(out)[-1]
    files = read_json(folder / "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of eight steps that nothing stopped, by a process that imported everything by itself."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, printed = launch_pretrain(config, out)
    assert code == 0, printed
    return out


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    assert [folder.name for folder in list_checkpoints(whole)] == ["step-00000006", "step-00000008"]
    files = {"config.yaml", "run.json", "metrics.jsonl", "loss.png", "checkpoints", "pictures"}
    assert {path.name for path in whole.iterdir()} == files
    records = read_metrics(whole / "metrics.jsonl")
    assert [record["samples_seen"] for record in records] == [16 * step for step in range(1, 9)]
    assert records[-1]["loss"] < records[0]["loss"]
    assert 1 <= records[3]["rankme"] <= 16 and "rankme" not in records[2]
    facts = read_facts(list_checkpoints(whole)[-1] / "encoder.json")
    assert (facts.step, facts.samples_seen, facts.sources[0].source) == (8, 128, "drawn")
    assert facts.sources[0].num_kept == 40
    assert facts.use == "research" and facts.sources[0].permitted_uses == ("research",)
    encoder = load_file(list_checkpoints(whole)[-1] / "encoder.safetensors")
    assert encoder["patch_embed.proj.weight"].shape == (192, 3, 16, 16)


@pytest.mark.slow
def test_a_run_says_what_it_cost_and_how_it_stands(config: Path, whole: Path) -> None:
    run = read_run(whole)
    assert (run.state, run.step, run.num_steps) == ("finished", 8, 8)
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert last["mfu"] > 0
    assert last["energy_source"] and last["co2_kg"] == pytest.approx(0.473 * last["energy_kwh"])
    checkpoint = list_checkpoints(whole)[-1]
    facts = read_facts(checkpoint / "encoder.json")
    per_sample = compute_run_cost(load_config(PretrainConfig, whole / "config.yaml", [])).sample_flops
    assert facts.training_flops == pytest.approx(per_sample * facts.samples_seen) and per_sample > 0
    assert facts.hardware is not None and facts.hardware.startswith("1 x CPU process with")
    assert facts.energy_kwh is not None and facts.energy_kwh > 0 and last["energy_kwh"] <= facts.energy_kwh
    cost = compute_run_cost(load_config(PretrainConfig, config))
    planned = compute_checkpoint_bytes(cost.num_encoder + cost.num_heads, 4 * cost.num_encoder)
    assert planned == pytest.approx(sum(path.stat().st_size for path in checkpoint.rglob("*")), rel=0.03)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(config: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start_pretrain(config, out)
    wait_for(out / "checkpoints" / "step-00000004", process)
    os.killpg(process.pid, signal.SIGKILL)  # the trainer and its loader workers, as when a machine dies
    process.communicate()
    code, printed = run_pretrain(config, out, "data.workers=0")  # who decodes decides nothing
    assert code == 0, printed
    assert "going on from" in printed
    assert hash_state(out) == hash_state(whole)
    assert read_curve(out) == read_curve(whole)
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_a_signal_ends_the_run_saved_with_code_75(config: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    process = start_pretrain(config, out, "checkpoint.save_every=100", "data.workers=0")
    wait_for(out / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "stopped by a signal after step" in printed
    assert len(list_checkpoints(out)) == 1
    code, printed = run_pretrain(config, out, "data.workers=0")
    assert code == 0, printed
    assert hash_state(out) == hash_state(whole)
    assert read_curve(out) == read_curve(whole)


@pytest.mark.slow
def test_two_ranks_draw_the_same_samples_and_resume_exactly(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Stochastic depth draws by rank, so the comparison with one process is made without it.
    plain = ("encoder.drop_path_rate=0", "schedule.total_samples=64", "data.workers=0")
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(load_config(PretrainConfig, config, plain), out=one, excluded=Exclusion())
    code, printed = run_pretrain(config, two, *plain, ranks=2)
    assert code == 0, printed
    assert read_losses(two) == pytest.approx(read_losses(one), rel=1e-5)
    assert printed.count("source drawn: 40 images kept") == 1  # only one rank speaks

    resumed = tmp_path / "resumed"
    shutil.copytree(two, resumed)
    shutil.rmtree(list_checkpoints(resumed)[-1])
    assert [folder.name for folder in list_checkpoints(resumed)] == ["step-00000002"]
    code, printed = run_pretrain(config, resumed, *plain, ranks=2)
    assert code == 0, printed
    assert hash_state(resumed) == hash_state(two)

    # And with another number of ranks, written while training goes on or not: the same run but for rounding.
    alone = tmp_path / "alone"
    shutil.copytree(two, alone)
    shutil.rmtree(list_checkpoints(alone)[-1])
    pretrain(
        load_config(PretrainConfig, config, (*plain, "checkpoint.background=false")), out=alone, excluded=Exclusion()
    )
    assert "step-00000002, written by 2 ranks under ZeRO 1" in capfd.readouterr().err
    assert read_losses(alone) == pytest.approx(read_losses(one), rel=1e-5)
    assert read_losses(alone)[:2] == read_losses(two)[:2]


@pytest.mark.slow
def test_trains_without_a_compiler(config: Path, tmp_path: Path) -> None:
    """A folder that holds no g++ and no ninja is all of PATH; torch would find ninja's Python module by its script."""
    (tmp_path / "bin").mkdir()
    environment = {"PATH": str(tmp_path / "bin"), "CXX": "", "CC": "", "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    out = tmp_path / "run"
    code, printed = launch_pretrain(config, out, "schedule.total_samples=32", ranks=2, environment=environment)
    assert code == 0, printed
    assert len(read_losses(out)) == 2
    assert not (tmp_path / "built").exists()


@pytest.mark.slow
def test_torn_and_changed_runs(config: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "torn"
    shutil.copytree(whole, out)
    state = next(list_checkpoints(out)[-1].glob("state/part-*"))
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    settings = load_config(PretrainConfig, config)
    summary = pretrain(settings, out=out, excluded=Exclusion())
    assert (summary.outcome, summary.step, summary.exit_code) == ("finished", 8, 0)
    assert find_checkpoint(out)[1] == []  # the torn one was replaced
    assert hash_state(out) == hash_state(whole)

    with pytest.raises(UserError, match=r"optim\.base_lr was 0\.01 and is now 0\.02"):
        pretrain(load_config(PretrainConfig, config, ["optim.base_lr=0.02"]), out=out, excluded=Exclusion())
    with pytest.raises(UserError, match="holds step-00000008; with --resume never"):
        pretrain(settings, out=out, excluded=Exclusion(), resume="never")
    group = next(iter(read_groups(settings)))
    with pytest.raises(UserError, match="the samples changed since the run began"):
        pretrain(settings, out=out, excluded=Exclusion({"drawn": frozenset({group})}))


def read_groups(settings: PretrainConfig) -> set[str]:
    return set(open_shard_set(settings.data.shards[0]).table["group_id"].to_pylist())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_one_line(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ["optim.base_lr=1e30", "engine.clip_grad_norm=null", "data.workers=0", "checkpoint.save_every=1"]
    summary = pretrain(load_config(PretrainConfig, config, overrides), out=tmp_path / "run", excluded=Exclusion())
    assert (summary.outcome, summary.exit_code) == ("diverged", 4)
    printed = capfd.readouterr().err
    assert "optim.base_lr (1e+30)" in printed
    for folder in list_checkpoints(tmp_path / "run"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "encoder.safetensors").values())


def test_config_mistakes_are_named(config: Path, tmp_path: Path) -> None:
    def attempt(*overrides: str, resume: str = "auto") -> None:
        settings = load_config(PretrainConfig, config, overrides)
        pretrain(settings, out=tmp_path / "run", excluded=Exclusion(), resume=resume)

    with pytest.raises(UserError, match=r"augment.image_size \(64\) must equal encoder.image_size \(32\)"):
        attempt("augment.image_size=64")
    with pytest.raises(UserError, match=r"schedule\.warmup_samples"):
        attempt("schedule.warmup_samples=1000")
    with pytest.raises(UserError, match="--resume maybe"):
        attempt(resume="maybe")
    with pytest.raises(UserError, match=r"unknown key optim\.lrr"):
        attempt("optim.lrr=1")
    distillation = ("objectives=[{kind: self_distillation}]", "augment.views=2")
    with pytest.raises(UserError, match=r"Sinkhorn-Knopp .* sees only 8 images together .* of .*global_batch_size 16"):
        attempt(*distillation)
    with pytest.raises(UserError, match=r"augment\.views \(1\) must be at least 2"):
        attempt(distillation[0])
    with pytest.raises(UserError, match=r"augment\.local_size \(24\) must be a multiple of the patch size.*; try 32"):
        attempt(*distillation, "engine.micro_batch_size=16", "augment.local_views=2", "augment.local_size=24")
    with pytest.raises(UserError, match=r"augment\.local_views \(2\): none of the objectives looks at local views"):
        attempt("augment.local_views=2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["debug_cpu", "demo", "masked_latent_cpu", "masked_pixels_cpu"])
def test_every_shipped_config_is_valid(name: str) -> None:
    settings = load_config(PretrainConfig, name, ["data.shards=[x]"], folder="configs/pretrain")
    assert settings.data.exclude.tasks == "all" and settings.tracking.wandb == "disabled"


def test_a_use_that_a_source_or_a_teacher_does_not_permit_is_refused(config: Path, tmp_path: Path) -> None:
    settings = load_config(PretrainConfig, config, ["data.use=commercial"])
    with pytest.raises(UserError, match=r"samples of drawn do not permit the use commercial \(the card permits"):
        pretrain(settings, out=tmp_path / "run", excluded=Exclusion())
    with pytest.raises(UserError, match=r"data\.use"):
        load_config(PretrainConfig, config, ["data.use=anything"])

    export = tmp_path / "export"
    export_encoder(make_checkpoint(tmp_path / "step-1", SMALL), export)
    facts = read_facts(export / "panfm.json")
    bound = facts.sources[0].model_copy(update={"permitted_uses": ("education",)})
    write_facts(export / "panfm.json", facts.model_copy(update={"sources": (bound,)}))
    target = f"objectives=[{{kind: masked_image, target: {{kind: frozen_teacher, address: 'panfm:{export}'}}}}]"
    with pytest.raises(UserError, match=r"data\.use \(research\): panfm:.*ham10000 .*does not permit the use research"):
        pretrain(load_config(PretrainConfig, config, [target]), out=tmp_path / "run", excluded=Exclusion())
    assert not (tmp_path / "run").exists()


def wait_for(path: Path, process: object) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline  # type: ignore[attr-defined]
        time.sleep(0.005)
