"""Steps that are not finite: left out, then rolled back, then the end; counted, and the same after a resume."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from panfm.config import load_config
from panfm.files import read_json
from panfm.shards.index import Exclusion
from panfm.tracking import read_metrics
from panfm.training import pretrain as loop
from panfm.training.checkpoint import compute_folder, list_checkpoints
from panfm.training.plan import PretrainConfig
from panfm.training.pretrain import PretrainSummary, pretrain
from tests.reliability.setting import BATCH_SIZE, Setting, hash_state, make_setting

KEEP = ("checkpoint.save_every=1", "checkpoint.keep_last=20", "schedule.total_samples=96")  # 12 steps


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


def train(setting: Setting, out: Path, is_bad: Callable[[int], bool], *overrides: str) -> PretrainSummary:
    """Train where the loss is infinite in each step (counted from 1) that is bad, though its gradient is not."""
    with pytest.MonkeyPatch.context() as patch:

        def build(*arguments: Any) -> Any:
            built = build_run(*arguments)
            begin, forward, steps = built.model.begin_step, built.model.forward, []

            def begin_step(step: int) -> None:
                begin(step)
                steps.append(is_bad(step + 1))

            def poison(*batch: Any) -> Any:
                output = forward(*batch)
                return output._replace(loss=output.loss + torch.inf) if steps[-1] else output

            patch.setattr(built.model, "begin_step", begin_step)
            patch.setattr(built.model, "forward", poison)
            return built

        build_run = loop.build_run
        patch.setattr(loop, "build_run", build)
        config = load_config(PretrainConfig, setting.config, [*KEEP, *overrides])
        return pretrain(config, out=out, excluded=Exclusion())


def read_skipped(out: Path) -> list[int]:
    return [record["step"] for record in read_metrics(out / "metrics.jsonl") if record.get("skipped") == "not finite"]


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_but_the_place_in_the_stream(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    summary = train(setting, out, lambda step: step in (4, 9))
    assert (summary.outcome, summary.step, summary.samples_seen) == ("finished", 12, 12 * BATCH_SIZE)
    assert "step 4: loss inf, gradient norm None; weights left alone" in capfd.readouterr().err
    assert read_skipped(out) == [4, 9]
    records = read_metrics(out / "metrics.jsonl")
    assert [record["samples_seen"] for record in records] == [BATCH_SIZE * step for step in range(1, 13)]
    assert records[3]["loss"] is None and records[4]["loss"] is not None
    weights = [read_json(folder / "manifest.json")["files"] for folder in list_checkpoints(out)]
    names = [name for name in weights[0] if name.endswith(".safetensors")]
    assert {"encoder.safetensors", "extra.safetensors"} <= set(names) and len(names) > 2  # and those of the engine
    for name in names:  # of steps 3, 4 and 5
        assert weights[2][name]["sha256"] == weights[3][name]["sha256"], name
    assert weights[3]["encoder.safetensors"]["sha256"] != weights[4]["encoder.safetensors"]["sha256"]


@pytest.mark.slow
def test_a_resumed_run_remembers_what_was_skipped(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(setting, out, lambda step: step in (3, 4, 7, 9)).outcome == "diverged"  # three may be, not four
    assert train(setting, tmp_path / "other", lambda step: step in (3, 4, 7)).outcome == "finished"
    whole = hash_state(out)
    assert list_checkpoints(out)[-1].name == "step-00000008"
    for step in range(6, 9):
        shutil.rmtree(compute_folder(out, step))  # as if it had been killed after step 5
    summary = train(setting, out, lambda step: step in (3, 4, 7, 9))
    assert (summary.outcome, summary.exit_code, summary.step) == ("diverged", 4, 8)
    assert hash_state(out) == whole and read_skipped(out) == [3, 4, 7]


@pytest.mark.slow
def test_more_of_them_roll_back_onto_other_samples_and_the_window_is_accounted_for(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, bad = tmp_path / "run", [7, 8]

    def is_bad(step: int) -> bool:
        if step in bad:
            bad.remove(step)  # other samples are well there
            return True
        return False

    alarm = ("monitor.alarm.action=rollback", "monitor.alarm.max_skipped_steps=1", "checkpoint.save_every=5")
    summary = train(setting, out, is_bad, *alarm)
    assert (summary.outcome, summary.step) == ("finished", 12) and not bad
    printed = capfd.readouterr().err
    assert "rollback 1 of 2: from step 7 back to 5, then on other samples" in printed
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13)) and not read_skipped(out)
    assert records[-1]["rollbacks"] == 1 and records[-1]["discarded_samples"] == 2 * BATCH_SIZE
    assert read_json(list_checkpoints(out)[-1] / "training.json")["salts"] == [[0, 0], [5, 1]]
