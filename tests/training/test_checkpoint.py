import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from panfm.config import validate
from panfm.distributed import process_group
from panfm.encoder.facts import EncoderFacts, TransformFacts
from panfm.errors import UserError
from panfm.files import compute_sha256, read_json, write_json
from panfm.optim import OptimConfig
from panfm.training.checkpoint import (
    CheckpointConfig,
    TrainingState,
    check_checkpoint,
    find_checkpoint,
    find_difference,
    list_checkpoints,
    load_checkpoint,
)
from panfm.training.checkpoint_writer import start_checkpoint, write_checkpoint
from panfm.training.engine import Engine, EngineConfig
from tests.training.test_engine import build_student, draw_batch

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
        "engine": {"zero_stage": 1, "micro_batch_size": 8},
    }
    now: dict[str, Any] = {"optim": {"base_lr": 1.0, "eps": 1e-6}, "tracking": {"log_every": 2}, "data": {"workers": 4}}
    now["engine"] = {"zero_stage": 2, "micro_batch_size": 4}  # another number of ranks may need it
    assert find_difference(saved, now) == ("optim.eps", 1e-8, 1e-6)
    assert find_difference(saved, {**now, "optim": saved["optim"]}) is None
    assert find_difference(saved, {**saved, "deepspeed": {"a": 1}}) == ("deepspeed", None, {"a": 1})
    assert find_difference({**saved, "gone": 1}, saved) == ("gone", 1, None)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Of a linear layer, on this process."""
    torch.manual_seed(0)
    with process_group(torch.device("cpu")):
        model = build_student()
        engine = Engine(model, model.encoder, EngineConfig(global_batch_size=4, micro_batch_size=4), OptimConfig(), {})
        yield engine
        engine.close()


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: a write that fails like that on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_written_whole_and_rotated_or_not_at_all(tmp_path: Path, engine: Engine) -> None:
    rest: dict[str, Any] = {"config": {"a": 1}, "facts": FACTS, "keep_last": 2, "keep_every": 3}
    for step in (1, 2, 3, 4, 5):
        state = TrainingState(step=step, samples_seen=8 * step, salts=((0, 0), (1, 7)))
        write_checkpoint(tmp_path, engine, state, **rest)
    names = [f"step-0000000{step}" for step in (3, 4, 5)]  # the third stays for ever
    assert [folder.name for folder in list_checkpoints(tmp_path)] == names
    newest = list_checkpoints(tmp_path)[-1]
    assert check_checkpoint(newest) is None
    assert load_checkpoint(newest, engine, {"a": 1}, FACTS) == state == TrainingState(5, 40, ((0, 0), (1, 7)))
    older = list_checkpoints(tmp_path)[0]
    write_json(older / "training.json", read_json(older / "training.json") | {"format": 2})
    with pytest.raises(UserError, match="format 2; this panfm reads 3: use the panfm that wrote it"):
        load_checkpoint(older, engine, {"a": 1}, FACTS)

    with full_disk(1000), pytest.raises(UserError, match=r"checkpoint of step 6 not written: .*too large"):
        write_checkpoint(tmp_path, engine, TrainingState(step=6, samples_seen=48), **rest)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert find_checkpoint(tmp_path) == (newest, [])


@pytest.mark.slow
def test_what_is_copied_is_what_is_written(tmp_path: Path, engine: Engine) -> None:
    """A step between the copy and the write changes nothing, so writing in the background does not either."""
    state, rest = TrainingState(step=1, samples_seen=4), {"config": {}, "facts": FACTS, "keep_last": 1}
    engine.step([draw_batch(0, 4)], step=0, lr=1e-2)  # moments
    waited_for = write_checkpoint(tmp_path / "waited_for", engine, state, **rest)
    part = engine.copy_part()
    engine.step([draw_batch(4, 4)], step=1, lr=1e-2)
    name = part.file
    assert part.write(tmp_path / "later").read_bytes() == (waited_for / name).read_bytes()
    assert engine.copy_part().write(tmp_path / "stepped").read_bytes() != (waited_for / name).read_bytes()

    engine.load(waited_for)
    pending = start_checkpoint(tmp_path / "background", engine, state, **rest)
    engine.step([draw_batch(4, 4)], step=1, lr=1e-2)
    files = [read_json(folder / "manifest.json")["files"] for folder in (waited_for, pending.finish())]
    assert files[0] == files[1] and {"encoder.safetensors", "training.json", name} < files[0].keys()


@pytest.mark.slow
def test_a_torn_part_is_passed_over(tmp_path: Path, engine: Engine) -> None:
    def spoil(step: int, change: Callable[[bytes], bytes | None]) -> str:
        state = TrainingState(step=step, samples_seen=step)
        folder = write_checkpoint(tmp_path, engine, state, config={}, facts=FACTS, keep_last=9)
        path = next((folder / "state").iterdir())
        changed = change(path.read_bytes())
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        return f"passing over {folder.name}: state/{path.name} "

    whole = write_checkpoint(tmp_path, engine, TrainingState(1, 1), config={}, facts=FACTS, keep_last=9)
    expected = [
        spoil(2, lambda data: None) + "is missing",
        spoil(3, lambda data: data[:-1]) + "has ",
        spoil(4, lambda data: data[:-1] + bytes([data[-1] ^ 1])) + "is not what was written",
    ]
    found, passed_over = find_checkpoint(tmp_path)
    assert found == whole
    assert all(line.startswith(start) for line, start in zip(passed_over, reversed(expected), strict=True))


class Payload:
    """What a tampered checkpoint could hold: something that runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


@pytest.mark.slow
def test_loading_runs_no_code_from_a_checkpoint(
    tmp_path: Path, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    path = engine.copy_part().write(tmp_path)
    engine.load(tmp_path)
    torch.save({"weight": Payload()}, path)
    with pytest.raises(SafetensorError):
        engine.load(tmp_path)
    assert "code ran" not in capfd.readouterr().out


def test_what_would_stay_must_be_written() -> None:
    with pytest.raises(UserError, match=r"keep_every \(1500\) must be a multiple of save_every \(1000\).*; try 2000"):
        validate(CheckpointConfig, {"save_every": 1000, "keep_every": 1500}, "test")
    assert validate(CheckpointConfig, {"save_every": 1000, "keep_every": 3000}, "test").keep_every == 3000


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, engine: Engine) -> None:
    engine.copy_part().write(tmp_path)
    engine.model.head = nn.Linear(16, 3)
    with pytest.raises(UserError, match=r"weight of head\.weight has not the 48 numbers .* written by another model"):
        engine.load(tmp_path)
    engine.model.head = nn.Linear(16, 2)
    engine.model.other = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"it holds no parameter other\.weight; it was written by another model"):
        engine.load(tmp_path)
