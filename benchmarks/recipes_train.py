"""Training of benchmarks/recipes.py: each recipe and seed in a process of its own, for the same time.

recipes  --trainings in turns of seconds, thrown away-->  images a second  --minutes-->  samples that each may see
seed x recipe  --trained on that many-->  RUN/export, RUN/trained.json (written last: what has it is done)
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panfm.config import load_config, read_yaml
from panfm.files import compute_json_hash, read_json, write_json
from panfm.tracking import read_metrics
from panfm.training.plan import PretrainConfig

FOLDER = Path(__file__).resolve().parent / "recipes"
UNTRAINED = "random"
PEERS: dict[str, tuple[str, ...]] = {  # arguments of lightly_mae.py
    "lightly_mae": (),
    "lightly_mae_bf16": ("--precision", "bf16", "--lr", "5e-4"),
}
PEER_BATCH_SIZES = {"lightly_mae": 256, "lightly_mae_bf16": 64}  # samples; the example has 256
NUM_TURNS = 3  # of each training whose speed is measured
WARM_STEPS = 2  # before its first turn: they wait for the worker and touch memory first
POLL_SECONDS = 0.02
STEP_LINE = "step "  # how lightly_mae.py says that it has done one


@dataclass(frozen=True)
class Plan:
    """What is trained and measured. overrides: for every panfm recipe; peer: arguments for lightly's example."""

    out: Path
    minutes: float
    seeds: tuple[int, ...]
    recipes: tuple[str, ...]
    tasks: tuple[str, ...]
    fractions: tuple[float, ...]
    draws: int
    turn_seconds: float  # of a training whose speed is measured
    shards: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    peer: tuple[str, ...] = ()
    complete: bool = True  # whether the teacher is measured, and the peers by their class token too

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    def find_run(self, recipe: str, seed: int) -> Path:
        return self.out / "runs" / f"{recipe}-{self.minutes:g}min-s{seed}"


def train_all(plan: Plan) -> None:
    """Train what is not trained yet; seeds outside, recipes inside."""
    measure_speeds(plan)
    for seed in plan.seeds:
        for recipe in plan.recipes:
            if recipe == UNTRAINED:
                continue
            run, identity = plan.find_run(recipe, seed), identify(plan, recipe, minutes=plan.minutes)
            if (run / "trained.json").is_file():
                if read_json(run / "trained.json")["identity"] != identity:
                    sys.exit(
                        f"{run}: {recipe} has changed since it was trained; remove the folder, or rename the recipe"
                    )
                continue
            batch_size = find_batch_size(plan, recipe)
            speed = read_json(get_speed_path(plan, recipe))["images_per_second"]
            total = max(1, int(speed * plan.seconds / batch_size)) * batch_size
            print(f"training {recipe}, seed {seed}, {total} samples ({plan.minutes:g} minutes)", flush=True)
            done = (train_peer if recipe in PEERS else train_ours)(plan, recipe, seed, total, run)
            facts = {"recipe": recipe, "seed": seed, "identity": identity, "cores": os.cpu_count()}
            write_json(run / "trained.json", {**facts, "minutes": total / speed / 60, **done})


def identify(plan: Plan, recipe: str, *, minutes: float | None = None) -> str:
    """A hash of all that decides what a recipe does, and for how long."""
    settings: Any = [list(PEERS.get(recipe, ())), list(plan.peer)]
    if recipe not in PEERS:
        settings = [read_yaml(find_recipe(recipe)), read_yaml(FOLDER / "common.yaml"), list(plan.overrides)]
    return compute_json_hash([settings, minutes])


def find_recipe(name: str) -> Path:
    path = FOLDER / f"{name}.yaml"
    if name == "common" or not path.is_file():
        known = sorted({UNTRAINED, *PEERS, *(found.stem for found in FOLDER.glob("*.yaml"))} - {"common"})
        sys.exit(f"--recipes {name}: no such recipe; known: {', '.join(known)}")
    return path


def train_peer(plan: Plan, recipe: str, seed: int, total: int, run: Path) -> dict[str, Any]:
    """lightly's example from its start: it has no checkpoints, so what was cut is done again."""
    shutil.rmtree(run, ignore_errors=True)
    command = make_peer_command(plan, recipe, seed, run, ("--samples", str(total)))
    wait(start(command, plan.out, run / "log.txt"), command, run / "log.txt")
    done = read_json(run / "done.json")
    return {key: done[key] for key in ("samples_seen", "steps", "seconds", "loss")}


def train_ours(plan: Plan, recipe: str, seed: int, total: int, run: Path) -> dict[str, Any]:
    """Train; what was cut goes on from its last checkpoint, which is bit-exact."""
    command = make_command(plan, recipe, seed, total, run)
    wait(start(command, plan.out, run / "log.txt"), command, run / "log.txt")
    last = read_metrics(run / "metrics.jsonl")[-1]
    seconds = sum_seconds(read_metrics(run / "metrics.jsonl"))
    command = [sys.executable, "-m", "panfm", "export", str(run), "--out", str(run / "export")]
    wait(start(command, plan.out, run / "log.txt"), command, run / "log.txt")
    return {"samples_seen": last["samples_seen"], "steps": last["step"], "seconds": seconds, "loss": last["loss"]}


def measure_speeds(plan: Plan) -> None:
    """Images a second of each recipe, measured once.

    A machine's speed may drift within minutes, and would favour the recipe whose minute was the better one. So all
    trainings are started, stopped, and let run in turns. A turn is timed from the end of a step to the end of a step:
    with the first seconds after a pause counted, speeds came out 4 to 10 % too low, and not all by the same.
    """
    recipes = [recipe for recipe in plan.recipes if recipe != UNTRAINED and not get_speed_path(plan, recipe).is_file()]
    if not recipes:
        return
    print(f"measuring the speed of {', '.join(recipes)}", flush=True)
    shutil.rmtree(plan.out / "speeds" / "runs", ignore_errors=True)
    with ExitStack() as stack:
        trainings = [Training(plan, recipe, stack) for recipe in recipes]
        for training in trainings:
            training.warm_up()
        order = random.Random(0)
        for _ in range(NUM_TURNS):
            for training in order.sample(trainings, len(trainings)):
                training.take_turn(plan.turn_seconds)
        for training in trainings:
            speeds = [steps * training.batch_size / seconds for steps, seconds in training.turns]
            speed = sum(steps for steps, _ in training.turns) * training.batch_size
            speed /= sum(seconds for _, seconds in training.turns)
            facts = {"images_per_second": speed, "in_each_turn": speeds, "measured_beside": recipes}
            write_json(get_speed_path(plan, training.recipe), facts)
    shutil.rmtree(plan.out / "speeds" / "runs")


class Training:
    """A training, its worker included, that runs when it is told to; killed when the stack closes."""

    def __init__(self, plan: Plan, recipe: str, stack: ExitStack) -> None:
        self.recipe = recipe
        self.batch_size = find_batch_size(plan, recipe)
        run = plan.out / "speeds" / "runs" / recipe
        self.log = run.with_suffix(".txt")
        if recipe in PEERS:
            self.steps = self.log
            self.command = make_peer_command(plan, recipe, 0, run, ("--samples", str(10**9)))
        else:
            self.steps = run / "metrics.jsonl"
            self.command = [*make_command(plan, recipe, 0, 10**9, run), "tracking.log_every=1"]
        self.process = start(self.command, plan.out, self.log, new_session=True)
        stack.callback(self._end)
        self._signal(signal.SIGSTOP)
        self.turns: list[tuple[int, float]] = []  # steps, seconds

    def warm_up(self) -> None:
        self._signal(signal.SIGCONT)
        self._wait_for(WARM_STEPS)
        self._signal(signal.SIGSTOP)

    def take_turn(self, seconds: float) -> None:
        """Go on for this long, and to the end of a step; what is left of the step that was cut is not counted."""
        self._signal(signal.SIGCONT)
        first = self._wait_for(self._count() + 1)
        started = time.perf_counter()
        last, elapsed = first, 0.0
        while elapsed < seconds:
            last = self._wait_for(last + 1)
            elapsed = time.perf_counter() - started
        self._signal(signal.SIGSTOP)
        self.turns.append((last - first, elapsed))

    def _wait_for(self, num_steps: int) -> int:
        """Wait until so many steps are done; returns how many are."""
        while (count := self._count()) < num_steps:
            if self.process.poll() is not None:
                wait(self.process, self.command, self.log, fine=())
            time.sleep(POLL_SECONDS)
        return count

    def _count(self) -> int:
        if not self.steps.is_file():
            return 0
        return sum(line.startswith(("{", STEP_LINE)) for line in self.steps.read_text(errors="replace").splitlines())

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def _end(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()


def get_speed_path(plan: Plan, recipe: str) -> Path:
    return plan.out / "speeds" / f"{recipe}-{identify(plan, recipe)[:12]}.json"


def make_peer_command(plan: Plan, recipe: str, seed: int, run: Path, length: tuple[str, str]) -> list[str]:
    script = Path(__file__).resolve().parent / "lightly_mae.py"
    common = read_yaml(FOLDER / "common.yaml")["encoder"]
    command = [sys.executable, str(script), "--shards", *map(str, plan.shards), "--out", str(run), "--seed", str(seed)]
    command += ["--encoder", common["name"], "--image-size", str(common["image_size"])]
    return [*command, "--batch-size", str(PEER_BATCH_SIZES[recipe]), *length, *PEERS[recipe], *plan.peer]


def make_command(plan: Plan, recipe: str, seed: int, total: int, run: Path) -> list[str]:
    settings = {
        "data.shards": json.dumps([str(path) for path in plan.shards]),
        "schedule.total_samples": total,
        "schedule.warmup_samples": total // 10,
        "engine.seed": seed,
    }
    changes = [*plan.overrides, *(f"{key}={value}" for key, value in settings.items())]
    return [sys.executable, "-m", "panfm", "pretrain", str(find_recipe(recipe)), *changes, "--out", str(run)]


def find_batch_size(plan: Plan, recipe: str) -> int:
    """Samples a step: as a recipe, its base and the overrides give it."""
    if recipe in PEERS:
        return PEER_BATCH_SIZES[recipe]
    return load_config(PretrainConfig, str(find_recipe(recipe)), plan.overrides).engine.global_batch_size


def start(command: Sequence[str], folder: Path, log: Path, *, new_session: bool = False) -> subprocess.Popen[bytes]:
    """Start in `folder`, where weights/ lies, everything that it says going to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603  our own
            command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=new_session
        )


def wait(process: subprocess.Popen[bytes], command: Sequence[str], log: Path, fine: tuple[int, ...] = (0,)) -> None:
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    if code not in fine:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"{' '.join(command)}\n{tail}\nended with {code}; the log is {log}")


def sum_seconds(records: Sequence[dict[str, Any]]) -> float:
    """Seconds of the training loop: each record knows how fast the samples since the one before it were."""
    seconds, before = 0.0, 0
    for record in records:
        seconds += (record["samples_seen"] - before) / record["images_per_second"]
        before = record["samples_seen"]
    return seconds
