import shutil
from pathlib import Path

import pytest
from PIL import Image

from panfm.config import load_config
from panfm.shards.index import Exclusion
from panfm.tracking import read_metrics
from panfm.training.checkpoint import check_checkpoint, compute_folder, list_checkpoints, remove_checkpoints
from panfm.training.plan import PretrainConfig
from panfm.training.pretrain import PretrainSummary, pretrain
from panfm.training.watch import every
from tests.training.test_pretrain import hash_state, read_curve

SHORT = (  # six steps of a small encoder
    "schedule.total_samples=96",
    "data.workers=0",
    "augment.views=2",
    "encoder.name=test_vit",
    "encoder.patch_size=8",
)
OFF = ("monitor.every=0", "monitor.pictures_every=0", "monitor.alarm.action=none")


def run(config: Path, out: Path, *overrides: str) -> PretrainSummary:
    return pretrain(load_config(PretrainConfig, config, [*SHORT, *overrides]), out=out, excluded=Exclusion())


@pytest.mark.slow
def test_a_watched_run_trains_as_an_unwatched_one_and_resumes(config: Path, held_out: Path, tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    everything = (
        "monitor.every=2",
        "monitor.pictures_every=3",
        f"monitor.probe={{shards: [{held_out}], every: 2, num_samples: 40}}",
    )
    run(config, plain, *OFF)
    run(config, watched, *everything)
    assert read_curve(watched) == read_curve(plain)
    assert hash_state(watched) == hash_state(plain)

    records = read_metrics(watched / "metrics.jsonl")
    looked = ("rankme", "feature_std_ratio", "uniformity", "alignment", "attention_entropy")
    for record in records:
        assert all((name in record) == (record["step"] in (2, 4, 6)) for name in looked)
        assert ("probe/dermoscopic/auroc" in record) == (record["step"] in (1, 2, 4, 6))
    last = records[-1]
    assert 0 < last["attention_entropy"] <= 1 and last["uniformity"] < 0 < last["alignment"]
    assert 0 <= last["probe/dermoscopic/auroc"] <= 1 and last["probe/clinical/auroc"] is None
    assert 0 < last["watch_share"] < 1 and last["probe/seconds"] > 0 and last["pictures_seconds"] > 0
    pictures = sorted(path.name for path in (watched / "pictures").iterdir())
    assert pictures == ["step-00000001.png", "step-00000003.png", "step-00000006.png"]
    with Image.open(watched / "pictures" / "step-00000006.png") as image:
        assert image.format == "PNG" and image.size[0] > 5 * 192 and not image.info
    assert not (plain / "pictures").exists() and not (watched / "alarms").exists()

    # As after a kill behind step 4: what comes again is what was there.
    picture = watched / "pictures" / "step-00000006.png"
    drawn = picture.read_bytes()
    picture.unlink()
    shutil.rmtree(list_checkpoints(watched)[-1])
    run(config, watched, *everything)
    assert read_curve(watched) == read_curve(plain) and hash_state(watched) == hash_state(plain)
    names = (*looked, "probe/dermoscopic/auroc", "probe/dermoscopic/balanced_accuracy")
    again = read_metrics(watched / "metrics.jsonl")[-1]
    assert {name: again[name] for name in names} == {name: last[name] for name in names}
    assert picture.read_bytes() == drawn


@pytest.mark.slow
def test_an_alarm_rolls_back_twice_on_other_samples_and_then_stops(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No run has a std ratio above 10: it rings at steps 2 and 4, so that step 1 is the last good one."""
    alarm = "monitor.alarm={action: rollback, min_std_ratio: 10, patience: 2}"
    settings = (
        "monitor.every=2",
        "monitor.pictures_every=0",
        "checkpoint.save_every=1",
        "checkpoint.keep_last=4",
        alarm,
    )
    out, plain = tmp_path / "run", tmp_path / "plain"
    summary = run(config, out, *settings)
    assert (summary.outcome, summary.exit_code, summary.step) == ("alarmed", 5, 4)
    printed = capfd.readouterr().err
    for number in (1, 2):
        assert f"rollback {number} of 2: from step 4 back to 1, then on other samples" in printed
    assert printed.count("alarm at step 4: feature_std_ratio ") == 3
    assert (
        "at the last 2 looks, since step 2: all images get nearly the same features; try optim.base_lr=0.005" in printed
    )

    run(config, plain, *OFF)
    records, unwatched = read_metrics(out / "metrics.jsonl"), read_metrics(plain / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["loss"] == unwatched[0]["loss"] and "rollbacks" not in records[0]
    assert all(record["loss"] != other["loss"] for record, other in zip(records[1:], unwatched[1:4], strict=True))
    assert {(record["rollbacks"], record["discarded_samples"]) for record in records[1:]} == {(2, 2 * 3 * 16)}
    # What it came from and what it came to; the run's own folder ends with what no alarm rang at.
    assert [folder.name for folder in list_checkpoints(out / "alarms")] == ["step-00000001", "step-00000004"]
    assert all(check_checkpoint(folder) is None for folder in list_checkpoints(out / "alarms"))
    assert summary.checkpoint == list_checkpoints(out)[-1] and summary.checkpoint.name == "step-00000003"

    # The same command meets the alarm again at the same step; as a warning it goes on to the end.
    assert run(config, out, *settings).outcome == "alarmed"
    summary = run(config, out, *settings[:-1], alarm.replace("rollback", "warn"))
    assert (summary.outcome, summary.step) == ("finished", 6)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_rolls_back_before_it_ends_the_run(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("optim.base_lr=1e30", "engine.clip_grad_norm=null", "checkpoint.save_every=1")
    summary = run(config, tmp_path / "run", *settings, "monitor.alarm={action: rollback, max_rollbacks: 1}")
    assert (summary.outcome, summary.exit_code) == ("diverged", 4)
    printed = capfd.readouterr().err
    assert printed.count("rollback 1 of 1: from step") == 1 and "optim.base_lr (1e+30)" in printed


def test_checkpoints_of_steps_that_were_thrown_away_are_removed(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        compute_folder(tmp_path, step).mkdir(parents=True)
    remove_checkpoints(tmp_path, after=9)
    assert list_checkpoints(tmp_path) == [compute_folder(tmp_path, 9)]


def test_every() -> None:
    assert [step for step in range(1, 7) if every(step, 3)] == [3, 6]
    assert not any(every(step, 0) for step in range(1, 7))
