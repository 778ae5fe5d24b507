"""A rank that hangs: who does not finish in time what it began writes down where it stands, and ends.

    Watchdog.begin(what)  ->  too late  ->  RUN/stacks-<rank>.txt and stderr: one line, the stack of every thread
                                        ->  one line about all ranks, exit code 6: torchrun or the scheduler starts anew

Every rank has its own. One that hangs keeps the others waiting for it in a collective, so all of them are late, and
the lines tell who waits for others from who does not: there is the fault. A rank that writes nothing at all (stopped,
its machine gone) is named too.

Two clocks. A Python thread looks about once a second; collectives let it run, since they wait without the
interpreter's lock. Where C code hangs with that lock held no Python runs any more: for this the thread winds up
faulthandler's timer, which is a thread of C, and which goes off (stacks into the file, exit code 1) when nobody winds
it up in time.
"""

import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from panfm.distributed import get_rank, get_world_size
from panfm.training.endings import EXIT_HUNG

SLOW = 3.0  # what builds, compiles, saves or looks may take this many times as long as a step
SECONDS_FOR_OTHERS = 3.0  # that a late rank waits for the lines of the others, which are late too
SECONDS_TO_WRITE = 30.0  # a disk that hangs may be what all wait for: writing about it must end as well
# Who has one of these files on its stack waits for other ranks.
COLLECTIVES = re.compile(r"(/torch/distributed/|/deepspeed/comm/|/panfm/distributed\.py$)")
HERE = re.compile(r"/panfm/")


@dataclass(frozen=True)
class Task:
    """What a rank is at, and until when it may be (seconds of time.monotonic)."""

    what: str
    limit: float  # seconds
    deadline: float


class Watchdog:
    """Watches the thread that made it, between `__enter__` and `__exit__`, from the first `begin` on."""

    def __init__(self, out: Path, seconds: float | None) -> None:
        """out: the run folder. seconds: what a step may take; None watches nothing."""
        self._out = out
        self._seconds = seconds
        self._watched = threading.get_ident()
        self._task: Task | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="panfm-watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Start watching."""
        if self._seconds is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            # faulthandler needs a file that is open before anything hangs; those of an earlier hang stay in it.
            self._file = get_path(self._out, get_rank()).open("ab", buffering=0)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching; a file that nothing was written to is taken away."""
        if self._seconds is not None:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            if not os.fstat(self._file.fileno()).st_size:
                get_path(self._out, get_rank()).unlink(missing_ok=True)
            self._file.close()

    def begin(self, what: str, *, slow: bool = False) -> None:
        """Say what this rank does from now on ("step 17"); what it was at before is done."""
        if self._seconds is not None:
            limit = self._seconds * (SLOW if slow else 1.0)
            self._task = Task(what, limit, time.monotonic() + limit)  # one assignment: the thread sees all or nothing

    def _watch(self) -> None:
        assert self._seconds is not None
        pause = min(1.0, self._seconds / 4)
        looked = time.monotonic()
        while not self._ended.wait(pause):
            task, before, looked = self._task, looked, time.monotonic()
            if task is None:
                continue
            # A process that was stopped (Ctrl-Z, a frozen container) and goes on has lost time, and is not late. C's
            # timer cannot tell, and has twice the time.
            faulthandler.dump_traceback_later(2 * task.limit + 5 * pause, exit=True, file=self._file)
            stopped = max(0.0, looked - before - 5 * pause)
            if stopped and task is self._task:
                self._task = Task(task.what, task.limit, task.deadline + stopped)
            elif looked > task.deadline:
                self._end(task)

    def _end(self, task: Task) -> None:
        faulthandler.dump_traceback_later(SECONDS_TO_WRITE, exit=True, file=2)
        frame = sys._current_frames().get(self._watched)
        waits = is_waiting(frame)
        line = (
            f"rank {get_rank()} of {get_world_size()}, {task.what}, not done after {task.limit:g} s: "
            f"{'waits for other ranks' if waits else 'does not wait for other ranks'} in {describe_place(frame)}"
        )
        os.write(2, f"panfm: {line}\n".encode())  # sys.stderr may be locked by the thread that hangs
        faulthandler.dump_traceback(2, all_threads=True)
        os.write(self._file.fileno(), f"{line}\n".encode())
        faulthandler.dump_traceback(self._file, all_threads=True)
        time.sleep(SECONDS_FOR_OTHERS)
        since = time.time() - 3 * SECONDS_FOR_OTHERS
        if not any(read_line(self._out, rank, since) for rank in range(get_rank())):  # the first speaks for all
            lines = {rank: read_line(self._out, rank, since) for rank in range(get_world_size())}
            os.write(2, f"panfm: {summarise(lines, self._out)}\n".encode())
        os._exit(EXIT_HUNG)


def get_path(out: Path, rank: int) -> Path:
    """Where a rank that hangs writes its stacks."""
    return out / f"stacks-{rank}.txt"


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a stack, given by its innermost frame, is inside of a collective."""
    return any(COLLECTIVES.search(name) for name, _, _ in _walk(frame))


def describe_place(frame: FrameType | None) -> str:
    """The innermost line of panfm on a stack, else the innermost at all: "loader.py:288 _generate"."""
    places = list(_walk(frame))
    mine = [place for place in places if HERE.search(place[0])]
    if not places:
        return "no Python code"
    name, line, function = (mine or places)[0]
    return f"{Path(name).name}:{line} {function}"


def read_line(out: Path, rank: int, since: float) -> str | None:
    """The last line that a rank's watchdog wrote, if that was after `since` (seconds of time.time)."""
    path = get_path(out, rank)
    if not path.exists() or path.stat().st_mtime < since:
        return None
    said: list[str] = re.findall(rf"^rank {rank} of .*$", path.read_text(errors="replace"), flags=re.MULTILINE)
    return said[-1] if said else None


def summarise(lines: Mapping[int, str | None], out: Path) -> str:
    """All ranks' lines (None: it wrote none) in one: who was at fault, as far as it can be told."""
    parts = [line for line in lines.values() if line is not None and "does not wait" in line]
    silent = [rank for rank, line in lines.items() if line is None]
    if silent:
        parts.append(f"no word from {'ranks' if len(silent) > 1 else 'rank'} {', '.join(map(str, silent))}")
    if not parts:
        parts = ["every rank waits for others, so the network or a rank's order of collectives is at fault"]
    return (
        f"hung: {'; '.join(parts)}. Stacks of all threads: {out}/stacks-*.txt. The same command goes on from the "
        "newest checkpoint; where it was only slow, raise monitor.hang_seconds"
    )


def _walk(frame: FrameType | None) -> list[tuple[str, int, str]]:
    places = []
    while frame is not None:
        places.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return places
