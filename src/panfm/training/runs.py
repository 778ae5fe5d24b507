"""Which runs there are and how they stand: a pure look at their folders, for `panfm runs`.

    pretrain  --keep_state-->  run/run.json: running, then how it ended
    folder of run folders: run.json, config.yaml, metrics.jsonl, checkpoints/  -->  RunFacts, one a run

A run that was killed has no chance to write that it ended: one that says `running` and has been silent for much longer
than its records are apart is `unknown`. Nothing is written here but run.json, and nothing of torch is needed.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from panfm.config import read_yaml
from panfm.errors import UserError
from panfm.files import read_json, write_json
from panfm.tracking import Record, read_metrics

STATE_FILE = "run.json"
FORMAT = 1
SILENT_SECONDS = 600.0  # at least; looks, probes and checkpoints lie between two records
SILENT_RECORDS = 10  # records' distances without a sign of life
PROBE_METRICS = ("auroc", "balanced_accuracy")  # the first that a run has says which probe was best


@dataclass(frozen=True)
class RunFacts:
    """How one run stands, by its folder."""

    folder: Path
    state: str  # running, finished, unknown, or the outcome that the run wrote down
    step: int  # of the last record
    num_steps: int | None  # None: the folder does not say
    loss: float | None  # of the last record
    best_probe: float | None  # mean over modalities at the best step; None: the run has no probe
    best_probe_name: str | None
    changed: float | None  # Unix time of the newest of its files; None: there is none


@contextmanager
def keep_state(run: Path, num_steps: int) -> Iterator[Callable[[str], None]]:
    """Keep run.json for the length of a `with`: `running` inside it, afterwards what the yielded function was told.

    A run that ends by an error was told nothing, and is `unknown`.
    """
    ended = "unknown"

    def end(outcome: str) -> None:
        nonlocal ended
        ended = outcome

    def write(state: str) -> None:
        write_json(run / STATE_FILE, {"format": FORMAT, "state": state, "num_steps": num_steps})

    write("running")
    try:
        yield end
    finally:
        with suppress(OSError):  # a full disk: what led here is the error to show
            write(ended)


def list_runs(folder: Path) -> list[RunFacts]:
    """The runs in `folder`, which may be one itself, by the time of their last change; the newest is last.

    Raises UserError where there is no such folder or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the one that holds the run folders: panfm runs FOLDER")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    runs = [read_run(path) for path in candidates if (path / "config.yaml").is_file()]
    if not runs:
        raise UserError(
            f"{folder}: no run in it; a run folder holds a config.yaml, as `panfm pretrain --out` writes it"
        )
    return sorted(runs, key=lambda run: run.changed or 0.0)


def read_run(run: Path, now: float | None = None) -> RunFacts:
    """How the run in a folder stands. now: Unix time, by default that of the clock."""
    written = read_json(run / STATE_FILE) if (run / STATE_FILE).is_file() else {}
    records = read_metrics(run / "metrics.jsonl")
    last: Record = records[-1] if records else {}
    config = read_yaml(run / "config.yaml")
    num_steps = written.get("num_steps") or _compute_num_steps(config)
    step = int(last.get("step", 0))
    watched = [run / STATE_FILE, run / "metrics.jsonl", run / "checkpoints", *(run / "checkpoints").glob("step-*")]
    times = [path.stat().st_mtime for path in watched if path.exists()]
    changed = max(times, default=None)
    state = str(written.get("state", "finished" if num_steps is not None and step >= num_steps else "unknown"))
    if state == "running" and changed is not None:
        silent = (time.time() if now is None else now) - changed
        if silent > max(SILENT_SECONDS, SILENT_RECORDS * _estimate_distance(records)):
            state = "unknown"
    name, best = find_best_probe(records)
    return RunFacts(run, state, step, num_steps, last.get("loss"), best, name, changed)


def find_best_probe(records: Sequence[Record]) -> tuple[str | None, float | None]:
    """The probe's metric and its best value: the mean over the modalities of one step."""
    for metric in PROBE_METRICS:
        means = []
        for record in records:
            names = [name for name in record if name.startswith("probe/") and name.endswith(f"/{metric}")]
            values = [record[name] for name in names if record[name] is not None]
            if values:
                means.append(statistics.fmean(values))
        if means:
            return metric, max(means)
    return None, None


def format_runs(runs: Sequence[RunFacts], now: float | None = None) -> Table:
    """The runs as a table. now: Unix time, by default that of the clock."""
    table = Table("run", "state", "step", "last loss", "best probe", "last change", box=None)
    for run in runs:
        probe = "-" if run.best_probe is None else f"{run.best_probe:.3f} {run.best_probe_name}"
        table.add_row(
            run.folder.resolve().name,
            run.state,
            f"{run.step:,} of {'?' if run.num_steps is None else f'{run.num_steps:,}'}",
            "-" if run.loss is None else f"{run.loss:.4f}",
            probe,
            "-" if run.changed is None else _format_age((time.time() if now is None else now) - run.changed),
        )
    return table


def _estimate_distance(records: Sequence[Record]) -> float:
    """Seconds between the last two records of a run; 0 where it has fewer."""
    if len(records) < 2 or not records[-1].get("images_per_second"):
        return 0.0
    samples = records[-1]["samples_seen"] - records[-2]["samples_seen"]
    return float(samples / records[-1]["images_per_second"])


def _compute_num_steps(config: dict[str, Any]) -> int | None:
    """What optim.compute_num_steps says, without torch, of a run older than run.json."""
    try:
        total: int = config["schedule"]["total_samples"]
        size: int = config["engine"]["global_batch_size"]
        return math.ceil(total / size)
    except (KeyError, TypeError):
        return None


def _format_age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
