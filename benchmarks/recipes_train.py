"""Training of benchmarks/recipes.py: each recipe and seed in a process of its own, for the same time by the clock.

recipe  --a short training, thrown away-->  images a second  -->  total_samples, so that the schedule ends in time
seed x recipe  -->  RUN/export, RUN/trained.json (written last: what has it is done)
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
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
    "lightly_mae_bf16": ("--precision", "bf16", "--batch-size", "64", "--lr", "5e-4"),
}
SKIPPED_RECORDS = 2  # at the start of a measurement: the first steps wait for the worker and touch memory first
RESERVE = 0.98  # of the budget that the schedule is planned for; the clock stops what would still take longer
POLL_SECONDS = 0.25


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
    measured_seconds: float  # of a training whose speed is measured
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
    for seed in plan.seeds:
        for recipe in plan.recipes:
            if recipe == UNTRAINED:
                continue
            run, identity = plan.find_run(recipe, seed), identify(plan, recipe)
            if (run / "trained.json").is_file():
                if read_json(run / "trained.json")["identity"] != identity:
                    sys.exit(
                        f"{run}: {recipe} has changed since it was trained; remove the folder, or rename the recipe"
                    )
                continue
            shutil.rmtree(run, ignore_errors=True)  # of a run that was cut
            print(f"training {recipe}, seed {seed}, {plan.minutes:g} minutes", flush=True)
            done = (train_peer if recipe in PEERS else train_ours)(plan, recipe, seed, run)
            facts = {"recipe": recipe, "seed": seed, "identity": identity, "cores": os.cpu_count()}
            write_json(run / "trained.json", {**facts, **done})


def identify(plan: Plan, recipe: str) -> str:
    """A hash of all that decides what a recipe does."""
    settings: Any = [list(PEERS.get(recipe, ())), list(plan.peer)]
    if recipe not in PEERS:
        settings = [read_yaml(find_recipe(recipe)), read_yaml(FOLDER / "common.yaml"), list(plan.overrides)]
    return compute_json_hash([settings, plan.minutes])


def find_recipe(name: str) -> Path:
    path = FOLDER / f"{name}.yaml"
    if name == "common" or not path.is_file():
        known = sorted({UNTRAINED, *PEERS, *(found.stem for found in FOLDER.glob("*.yaml"))} - {"common"})
        sys.exit(f"--recipes {name}: no such recipe; known: {', '.join(known)}")
    return path


def train_peer(plan: Plan, recipe: str, seed: int, run: Path) -> dict[str, Any]:
    script = Path(__file__).resolve().parent / "lightly_mae.py"
    common = read_yaml(FOLDER / "common.yaml")["encoder"]
    command = [sys.executable, str(script), "--shards", *map(str, plan.shards), "--out", str(run), "--seed", str(seed)]
    command += ["--encoder", common["name"], "--image-size", str(common["image_size"])]
    command += ["--seconds", str(plan.seconds), *PEERS[recipe], *plan.peer]
    process = start(command, plan.out, run / "log.txt")
    wait(process, command, run / "log.txt")
    done: dict[str, Any] = read_json(run / "done.json")
    return {**done, "stopped_by_clock": True, "schedule_done": 1.0}  # it has no schedule


def train_ours(plan: Plan, recipe: str, seed: int, run: Path) -> dict[str, Any]:
    """Train for the budget; total_samples follows from the measured speed, alike for all seeds."""
    batch_size = get_batch_size(plan, recipe)
    speed = measure_speed(plan, recipe, batch_size)
    total = max(1, int(speed * plan.seconds * RESERVE / batch_size)) * batch_size
    command = make_command(plan, recipe, seed, total, run)
    clock = stop_after(start(command, plan.out, run / "log.txt"), command, run, plan.seconds)
    records = read_metrics(run / "metrics.jsonl")
    samples, seconds = int(records[-1]["samples_seen"]), sum_seconds(records)
    command = [sys.executable, "-m", "panfm", "export", str(run), "--out", str(run / "export")]
    wait(start(command, plan.out, run / "log.txt"), command, run / "log.txt")
    return {
        "samples_seen": samples,
        "steps": records[-1]["step"],
        "seconds": seconds,
        "loss": records[-1]["loss"],
        "stopped_by_clock": clock,
        "schedule_done": samples / total,
    }


def measure_speed(plan: Plan, recipe: str, batch_size: int) -> float:
    """Images a second of a recipe, from a short training whose weights are thrown away; measured once, then kept."""
    kept = plan.out / "speeds" / f"{recipe}-{identify(plan, recipe)[:12]}.json"
    if not kept.is_file():
        run = plan.out / "speeds" / "run"
        shutil.rmtree(run, ignore_errors=True)
        print(f"measuring the speed of {recipe}", flush=True)
        command = make_command(plan, recipe, 0, 10**7, run)
        stop_after(start(command, plan.out, run.with_suffix(".txt")), command, run, plan.measured_seconds)
        records = read_metrics(run / "metrics.jsonl")
        speeds = [record["images_per_second"] for record in records[SKIPPED_RECORDS:] or records]
        shutil.rmtree(run)
        write_json(kept, {"images_per_second": statistics.median(speeds), "num_records": len(speeds)})
    return float(read_json(kept)["images_per_second"])


def make_command(plan: Plan, recipe: str, seed: int, total: int, run: Path) -> list[str]:
    settings = {
        "data.shards": json.dumps([str(path) for path in plan.shards]),
        "schedule.total_samples": total,
        "schedule.warmup_samples": total // 10,
        "engine.seed": seed,
    }
    changes = [*plan.overrides, *(f"{key}={value}" for key, value in settings.items())]
    return [sys.executable, "-m", "panfm", "pretrain", str(find_recipe(recipe)), *changes, "--out", str(run)]


def get_batch_size(plan: Plan, recipe: str) -> int:
    """engine.global_batch_size as the recipe, its base and the overrides give it."""
    return load_config(PretrainConfig, str(find_recipe(recipe)), plan.overrides).engine.global_batch_size


def start(command: Sequence[str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start in `folder`, where weights/ lies, everything that it says going to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)  # noqa: S603  our own


def wait(process: subprocess.Popen[bytes], command: Sequence[str], log: Path, fine: tuple[int, ...] = (0,)) -> None:
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    if code not in fine:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"{' '.join(command)}\n{tail}\nended with {code}; the log is {log}")


def stop_after(process: subprocess.Popen[bytes], command: Sequence[str], run: Path, seconds: float) -> bool:
    """Let a training run end, or ask it to save and end once its loop has taken `seconds`; True: the clock ended it.

    The loop's clock is read off the first record: when it was written, less what its steps took.
    """
    log = run / "log.txt" if (run / "log.txt").exists() else run.with_suffix(".txt")
    metrics, begun, stopped = run / "metrics.jsonl", None, False
    try:
        while process.poll() is None:
            if begun is None and metrics.is_file() and (records := read_metrics(metrics)):
                begun = time.monotonic() - sum_seconds(records)
            if begun is not None and not stopped and time.monotonic() - begun >= seconds:
                process.send_signal(signal.SIGTERM)
                stopped = True
            time.sleep(POLL_SECONDS)
    except BaseException:
        process.kill()
        raise
    wait(process, command, log, fine=(0, 75))
    return stopped


def sum_seconds(records: Sequence[dict[str, Any]]) -> float:
    """Seconds of the training loop: each record knows how fast the samples since the one before it were."""
    seconds, before = 0.0, 0
    for record in records:
        seconds += (record["samples_seen"] - before) / record["images_per_second"]
        before = record["samples_seen"]
    return seconds
