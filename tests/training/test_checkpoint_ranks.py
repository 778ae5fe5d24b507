"""A run that goes on with more ranks, fewer, under other ZeRO stages: same samples and state, nearly same losses."""

import json
import os
import resource
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from panfm.config import load_config
from panfm.data.failures import FailureLog
from panfm.data.loader import LoaderState
from panfm.distributed import get_rank, get_world_size, process_group
from panfm.errors import UserError
from panfm.shards.index import Exclusion
from panfm.training.build import BuiltRun, build_run
from panfm.training.checkpoint import (
    TrainingState,
    check_checkpoint,
    compute_folder,
    describe_writers,
    find_checkpoint,
    load_checkpoint,
)
from panfm.training.checkpoint_writer import start_checkpoint, write_checkpoint
from panfm.training.plan import PretrainConfig
from tests.forks import call_all
from tests.training.test_checkpoint import FACTS

BATCH_SIZE, STEPS = 12, 2  # of each phase
OVERRIDES = (
    "encoder={name: test_vit, drop_path_rate: 0}",  # stochastic depth draws by rank
    "data.workers=0",
    f"engine.global_batch_size={BATCH_SIZE}",
    "optim={base_lr: 1.0e-2, layer_decay: 0.8}",
    "schedule={total_samples: 1200, warmup_samples: 120}",
)


@dataclass(frozen=True)
class Phase:
    """Two steps of the run with so many ranks under this stage."""

    world_size: int
    zero_stage: int
    micro_batch_size: int = 2
    section: str = "{}"  # of DeepSpeed's zero_optimization; a section of its own keeps the stage on one rank


PHASES = (
    Phase(1, 0),
    Phase(2, 1),
    Phase(3, 2),
    Phase(1, 2, 4, "{round_robin_gradients: false}"),
    Phase(3, 1, 2, "{round_robin_gradients: true}"),  # another order of the parameters in the flat groups
    Phase(2, 0, 3),
    # Some parameters stay whole, most do not. DeepSpeed counts the parameters of a process, so all take part at first.
    Phase(3, 3, 2, "{stage3_param_persistence_threshold: 200}"),
    Phase(2, 3),
    Phase(1, 0),
)


@dataclass(frozen=True)
class Played:
    """What a rank saw of a phase."""

    losses: list[float]
    positions: list[list[int]]  # of its samples, step by step
    is_same_state: bool | None  # what it wrote right after it had loaded, put together over ranks (rank 0's business)


def build(settings: Path, phase: Phase, stack: ExitStack) -> BuiltRun:
    sizes = (f"engine.zero_stage={phase.zero_stage}", f"engine.micro_batch_size={phase.micro_batch_size}")
    section = () if phase.section == "{}" else (f"deepspeed={{zero_optimization: {phase.section}}}",)
    config = load_config(PretrainConfig, settings, [*OVERRIDES, *sizes, *section])
    return build_run(config, Exclusion(), torch.device("cpu"), stack)


def train(built: BuiltRun, state: TrainingState, num_steps: int, out: Path) -> tuple[TrainingState, Played]:
    """So many steps from `state` on, on this rank's share of the stream."""
    losses, positions = [], []
    failed = FailureLog(out, get_rank())
    stream = built.loader.iterate(
        LoaderState(state.step, state.salts), rank=get_rank(), world_size=get_world_size(), failed=failed
    )
    for step in range(state.step, state.step + num_steps):
        batches = next(stream)
        positions.append([int(number) for batch in batches for number in batch.positions])
        output = built.engine.step(batches, step=step, lr=3e-3)
        assert output.applied
        losses.append(output.loss)
    end = state.step + num_steps
    return TrainingState(end, end * BATCH_SIZE, state.salts), Played(losses, positions, None)


def read_whole(folder: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights and moments put together from a checkpoint's parts, without panfm's code; the step of each parameter."""
    whole, steps, covered = {}, {}, {}
    for path in sorted((folder / "state").glob("part-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            entries = json.loads(file.metadata()["panfm"])["fragments"]
            for name, entry in entries.items():
                run = slice(entry["start"], entry["start"] + entry["size"])
                covered.setdefault(name, torch.zeros(entry["numel"]))[run] += 1
                steps[name] = entry["step"]
                for kind in ("weight", "exp_avg", "exp_avg_sq"):
                    whole.setdefault(f"{kind}/{name}", torch.zeros(entry["numel"]))[run] = file.get_tensor(
                        f"{kind}/{name}"
                    )
    assert all((counts == 1).all() for counts in covered.values())  # every number once
    return whole, steps


def is_same(one: Path, other: Path) -> bool:
    (tensors, steps), (other_tensors, other_steps) = read_whole(one), read_whole(other)
    same_keys = tensors.keys() == other_tensors.keys() and steps == other_steps
    return same_keys and all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())


def play(rank: int, ports: list[int], settings: Path, folder: Path) -> list[Played | None]:
    """This rank's part of all phases, each in a process group of its own; None where it takes no part."""
    torch.set_num_threads(1)
    found: list[Played | None] = []
    out = folder / "run"
    for number, (phase, port) in enumerate(zip(PHASES, ports, strict=True)):
        if rank >= phase.world_size:
            found.append(None)
            continue
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": phase.world_size, "MASTER_PORT": port}
        numbers["LOCAL_WORLD_SIZE"] = phase.world_size
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in numbers.items()}
        with process_group(torch.device("cpu")), ExitStack() as stack:
            built = build(settings, phase, stack)
            assert built.engine.zero_stage == phase.zero_stage
            state, same = TrainingState(step=0, samples_seen=0), None
            if number:
                newest, passed_over = find_checkpoint(out)
                assert newest is not None and not passed_over
                state = load_checkpoint(newest, built.engine, {}, FACTS)
                again = write_checkpoint(
                    folder / f"again-{number}", built.engine, state, config={}, facts=FACTS, keep_last=1
                )
                same = is_same(newest, again) if rank == 0 else None
            state, played = train(built, state, STEPS, folder)
            found.append(Played(played.losses, played.positions, same))
            if phase == PHASES[1]:
                check_one_full_disk(built, state, folder / "full")
            write_checkpoint(out, built.engine, state, config={}, facts=FACTS, keep_last=99)
    return found


def check_one_full_disk(built: BuiltRun, state: TrainingState, out: Path) -> None:
    """The second rank cannot write, in the background: both learn it from `finish`, the checkpoint before is whole."""
    rest: dict[str, Any] = {"config": {}, "facts": FACTS, "keep_last": 1}
    first = write_checkpoint(out, built.engine, TrainingState(1, BATCH_SIZE), **rest)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes: the file ends there with an error
    pending = start_checkpoint(out, built.engine, state, **rest)
    pending.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pending.is_done
    with pytest.raises(UserError, match=r"checkpoint of step 4 not written: .*File too large"):
        pending.finish()
    if get_rank() == 0:
        assert [path.name for path in (out / "checkpoints").iterdir()] == [first.name] and not check_checkpoint(first)


@pytest.fixture(scope="module")
def played(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Played | None]]]:
    """All phases on three processes: what each rank saw of each, and the folder of the run."""
    folder = tmp_path_factory.mktemp("phases")
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in PHASES]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    calls = [(play, (rank, ports, config, folder), {}) for rank in range(3)]
    return folder, call_all(calls, timeout=900)


@pytest.mark.slow
def test_more_ranks_fewer_ranks_and_other_stages_go_on_with_the_same_run(
    played: tuple[Path, list[list[Played | None]]], config: Path, tmp_path: Path
) -> None:
    folder, ranks = played
    with process_group(torch.device("cpu")), ExitStack() as stack:
        built = build(config, PHASES[0], stack)
        _, whole = train(built, TrainingState(step=0, samples_seen=0), STEPS * len(PHASES), tmp_path)
    losses = [loss for phase in ranks[0] for loss in phase.losses]
    assert losses == pytest.approx(whole.losses, rel=1e-5)
    for number, phase in enumerate(PHASES):
        parts = [ranks[rank][number] for rank in range(phase.world_size)]
        assert all(part.losses == parts[0].losses for part in parts)
        assert parts[0].is_same_state in (None, True), phase
        for step in range(STEPS):
            drawn = [position for part in parts for position in part.positions[step]]
            assert drawn == whole.positions[number * STEPS + step], phase
    first = compute_folder(folder / "run", 2 * STEPS)
    assert describe_writers(first) == "written by 2 ranks under ZeRO 1"
    assert sorted(path.name for path in (first / "state").iterdir()) == [
        "part-00000-of-00002.safetensors",
        "part-00001-of-00002.safetensors",
    ]
