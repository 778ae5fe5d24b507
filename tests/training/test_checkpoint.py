import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from panfm.distributed import process_group
from panfm.encoder.facts import EncoderFacts, TransformFacts
from panfm.errors import UserError
from panfm.files import compute_sha256, read_json, write_json
from panfm.optim import OptimConfig
from panfm.training.checkpoint import (
    TrainingState,
    check_checkpoint,
    find_checkpoint,
    find_difference,
    list_checkpoints,
    load_checkpoint,
    write_checkpoint,
)
from panfm.training.engine import Engine, EngineConfig

FACTS = EncoderFacts(
    timm_name="vit_tiny_patch16_224",
    transform=TransformFacts(
        image_size=32, resize_size=36, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
    ),
    samples_seen=8,
    step=1,
    code_version="0",
)


def write_fake(run: Path, step: int) -> Path:
    """A folder that looks like a checkpoint to whoever only reads manifests."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "training.json").write_text("{}")
    files = {"training.json": {"sha256": compute_sha256(b"{}"), "size": 2}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def test_the_newest_whole_checkpoint_is_found_and_others_are_named(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])
    good, changed, shorter, lost, torn, strange = (write_fake(tmp_path, step) for step in range(1, 7))
    (tmp_path / "checkpoints" / "step-00000009.tmp").mkdir()
    (changed / "training.json").write_text("[]")
    (shorter / "training.json").write_text("{")
    (lost / "training.json").unlink()
    (torn / "manifest.json").write_text('{"files"')
    (strange / "extra.pt").write_text("code")
    found, passed_over = find_checkpoint(tmp_path)
    assert found == good
    assert passed_over == [
        "passing over step-00000006: extra.pt is not in the manifest",
        "passing over step-00000005: manifest.json is missing or damaged, so the checkpoint was never completed",
        "passing over step-00000004: training.json is missing",
        "passing over step-00000003: training.json has 1 bytes, its manifest says 2",
        "passing over step-00000002: training.json is not what was written (its SHA-256 differs from the manifest)",
    ]


def test_difference_names_the_first_key_that_matters() -> None:
    saved: dict[str, Any] = {
        "optim": {"base_lr": 1.0, "eps": 1e-8},
        "tracking": {"log_every": 1},
        "data": {"workers": 1},
    }
    now: dict[str, Any] = {"optim": {"base_lr": 1.0, "eps": 1e-6}, "tracking": {"log_every": 2}, "data": {"workers": 4}}
    assert find_difference(saved, now) == ("optim.eps", 1e-8, 1e-6)
    assert find_difference(saved, {**now, "optim": saved["optim"]}) is None
    assert find_difference(saved, {**saved, "deepspeed": {"a": 1}}) == ("deepspeed", None, {"a": 1})
    assert find_difference({**saved, "gone": 1}, saved) == ("gone", 1, None)


@pytest.mark.slow
def test_written_whole_and_rotated_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.encoder = nn.Linear(4, 4)
    with process_group(torch.device("cpu")):
        engine = Engine(model, model.encoder, EngineConfig(), OptimConfig(), {})
        for step in (1, 2, 3):
            state = TrainingState(step=step, samples_seen=8 * step, salts=((0, 0), (1, 7)))
            write_checkpoint(tmp_path, engine, state, config={"a": 1}, facts=FACTS, keep_last=2)
        assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
        newest = list_checkpoints(tmp_path)[-1]
        assert check_checkpoint(newest) is None
        assert not list(newest.rglob("*.py"))
        assert load_checkpoint(newest, engine, {"a": 1}, FACTS) == state == TrainingState(3, 24, ((0, 0), (1, 7)))
        older = list_checkpoints(tmp_path)[0]
        write_json(older / "training.json", read_json(older / "training.json") | {"format": 1})
        with pytest.raises(UserError, match="format 1; this panfm reads 2: use the panfm that wrote it"):
            load_checkpoint(older, engine, {"a": 1}, FACTS)

        def refuse(*arguments: object, **keywords: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", refuse)
        with pytest.raises(UserError, match=r"checkpoint of step 4 not written: .*No space left on device"):
            state = TrainingState(step=4, samples_seen=32)
            write_checkpoint(tmp_path, engine, state, config={"a": 1}, facts=FACTS, keep_last=2)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
        engine.close()


class Payload:
    """What a tampered checkpoint could hold: something that runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


@pytest.mark.slow
def test_loading_runs_no_code_from_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Module()
    model.encoder = nn.Linear(4, 4)
    with process_group(torch.device("cpu")):
        engine = Engine(
            model,
            model.encoder,
            EngineConfig(zero_stage=2),
            OptimConfig(),
            {"zero_optimization": {"overlap_comm": False}},
        )
        assert engine.save(tmp_path) is None
        engine.load(tmp_path)
        path = next((tmp_path / "state").glob("*optim_states.pt"))
        torch.save({"optimizer_state_dict": Payload()}, path)
        with pytest.raises(Exception, match="Unsupported global"):
            engine.load(tmp_path)
        engine.close()
    assert "code ran" not in capfd.readouterr().out
