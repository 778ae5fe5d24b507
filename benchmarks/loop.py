"""What the training loop costs beside the step: loop and logging, waiting for data, and the loader's own work.

    python benchmarks/loop.py [--quick] [--json FILE]

A real `pretrain` of ViT-Small (224 px, MAE) on drawn 600 x 450 photographs, one thread for the step and one worker that
decodes ahead, metrics.jsonl and wandb (offline) as by default, no look, probe or checkpoint inside the measured steps.
Timed from outside: `Engine.step`, the wait for its micro batches, and all that lies between them. Loop and logging are
processor time of the training thread, so that other work on the machine counts little; the wait is the clock's, and
other work is in it. Every second step logs: the table puts the two kinds together as the default log_every does.

There is no peer: the second column is the goal, and a ratio above 1 means that it is kept.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from loader import ARCHIVES, build_set, draw_archive
from rows import Row, write_rows

from panfm.config import validate
from panfm.data.batch import Batch
from panfm.data.loader import Loader
from panfm.shards.index import Exclusion
from panfm.tracking import TrackingConfig
from panfm.training.engine import Engine
from panfm.training.plan import PretrainConfig
from panfm.training.pretrain import pretrain

LOOP_GOAL, WAIT_GOAL = 0.01, 0.03  # shares of the step
WARM_UP = 4  # steps: the workers start and fill their buffers
LOG_EVERY = 2  # in the run that is measured


@dataclass
class Times:
    """What one step took; loop: from its data to its beginning, and from its end to the request for the next data."""

    wait: float = 0.0  # seconds of the clock
    step: float = 0.0  # seconds of the clock
    step_thread: float = 0.0  # seconds of the processor, of this thread
    loop_thread: float = 0.0


@dataclass
class Watch:
    """Collects the times of all steps."""

    steps: list[Times] = field(default_factory=list)
    got: float = 0.0  # thread time at which the last data came
    ended: float | None = None  # thread time at which the last step ended
    workers: list[float] = field(default_factory=list)  # processor seconds of all loader processes after each step


def count_worker_seconds() -> float:
    """Processor time of everything that this process started."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def watch_run(watch: Watch) -> None:
    """Put clocks around what the loop calls."""
    step, iterate = Engine.step, Loader.iterate

    def timed_step(self: Engine, *args: Any, **kwargs: Any) -> Any:
        times = watch.steps[-1]
        times.loop_thread += time.thread_time() - watch.got
        began, thread = time.perf_counter(), time.thread_time()
        output = step(self, *args, **kwargs)
        times.step, times.step_thread = time.perf_counter() - began, time.thread_time() - thread
        watch.workers.append(count_worker_seconds())
        watch.ended = time.thread_time()
        return output

    def timed_iterate(self: Loader, *args: Any, **kwargs: Any) -> Iterator[tuple[Batch, ...]]:
        batches = iterate(self, *args, **kwargs)

        def ask() -> Iterator[tuple[Batch, ...]]:
            while True:
                if watch.ended is not None:
                    watch.steps[-1].loop_thread += time.thread_time() - watch.ended
                watch.steps.append(Times())
                began = time.perf_counter()
                batch = next(batches)
                watch.steps[-1].wait = time.perf_counter() - began
                watch.got = time.thread_time()
                yield batch

        return ask()

    Engine.step, Loader.iterate = timed_step, timed_iterate  # type: ignore[method-assign]


def make_config(shards: Path, batch_size: int, num_steps: int) -> PretrainConfig:
    """ViT-Small in the MAE recipe, as a user would run it on two cores."""
    values = {
        "data": {"shards": [str(shards)], "exclude": {"tasks": "none"}, "workers": 1},
        "encoder": {"name": "vit_small_patch16_224"},
        "objectives": [
            {
                "kind": "masked_image",
                "mask": {"kind": "random", "ratio": 0.75},
                "target": {"kind": "pixels"},
                "predictor": {"depth": 1, "width": 512, "num_heads": 16},
            }
        ],
        "schedule": {"total_samples": batch_size * num_steps},
        "engine": {"global_batch_size": batch_size, "micro_batch_size": batch_size, "num_threads": 1},
        "checkpoint": {"save_every": 10 * num_steps},
        "monitor": {"every": 0, "pictures_every": 0},
        "tracking": {"log_every": LOG_EVERY},
    }
    return validate(PretrainConfig, values, where="benchmarks/loop.py")


def measure(batch_size: int, num_steps: int) -> list[Row]:
    """Run it and put what was seen into rows."""
    watch = Watch()
    watch_run(watch)
    with tempfile.TemporaryDirectory() as folder:
        archive = replace(ARCHIVES[0], num_distinct=8, num_samples=128)  # a step's time does not depend on how many
        draw_archive(Path(folder) / "archive", archive)
        shards = build_set(Path(folder) / "archive", archive.num_samples)
        pretrain(make_config(shards, batch_size, num_steps), out=Path(folder) / "run", excluded=Exclusion())
    # After the last step nothing is asked for, and a checkpoint is written.
    measured = list(enumerate(watch.steps))[WARM_UP : num_steps - 1]
    loops = {
        logged: statistics.fmean(
            times.loop_thread for number, times in measured if ((number + 1) % LOG_EVERY == 0) == logged
        )
        for logged in (False, True)
    }
    step = statistics.fmean(times.step_thread for _, times in measured)
    log_every = TrackingConfig().log_every
    loop = (loops[True] + (log_every - 1) * loops[False]) / log_every
    wait = sum(times.wait for _, times in measured) / sum(times.wait + times.step for _, times in measured)
    num_images = (len(measured) - 1) * batch_size
    decode = 1e3 * (watch.workers[num_steps - 2] - watch.workers[WARM_UP]) / num_images
    print(
        f"ViT-Small, batch {batch_size}, {len(measured)} steps: {step:.2f} s of one thread a step, loop "
        f"{1e3 * loops[False]:.2f} ms and {1e3 * loops[True]:.2f} ms where it logs"
    )
    return [
        Row(f"loop and logging, log_every {log_every}", loop / step, LOOP_GOAL, LOOP_GOAL * step / loop, "of the step"),
        Row(
            "loop and logging, every step logs", loops[True] / step, LOOP_GOAL, LOOP_GOAL * step / loops[True], "of it"
        ),
        Row("waiting for data, decoded ahead", wait, WAIT_GOAL, WAIT_GOAL / max(wait, 1e-9), "of the time"),
        Row(
            "loader beside the step's own time",
            decode,
            1e3 * step / batch_size,
            1e3 * step / batch_size / decode,
            "core-ms",
        ),
    ]


def main() -> None:
    """Measure, print one table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer steps, within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows = measure(8, 12) if arguments.quick else measure(32, 40)
    print(f"{'':<42}  {'ratio':>7}  {'panfm':>9}  {'goal':>9}")
    for row in rows:
        print(f"{row.name:<42}  {row.ratio:>7.2f}  {row.ours:>9.4f}  {row.peer:>9.4f}  {row.unit}")
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
