import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from panfm.errors import UserError
from panfm.executor import run_tasks


def square(task: int) -> tuple[int, int]:
    if task < 0:
        raise ValueError(f"task {task} is negative")
    return task * task, os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_come_back_in_the_order_of_the_tasks(processes: int) -> None:
    answers = run_tasks(square, [3, 1, 2, 5], description="squares", processes=processes)
    assert [answer for answer, _ in answers] == [9, 1, 4, 25]
    assert (os.getpid() in {pid for _, pid in answers}) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_task_ends_the_run_with_its_own_exception(processes: int) -> None:
    with pytest.raises(ValueError, match="task -4 is negative"):
        run_tasks(square, [1, -4, 2], description="squares", processes=processes)


def leave_mark(task: tuple[Path, int]) -> int:
    folder, number = task
    (folder / str(number)).touch()
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_tasks_are_drawn_as_there_is_room(tmp_path: Path, processes: int) -> None:
    ahead: list[int] = []

    def draw() -> Iterator[tuple[Path, int]]:
        for number in range(30):
            ahead.append(number - len(list(tmp_path.iterdir())))  # drawn before, and not yet done
            yield tmp_path, number

    assert run_tasks(leave_mark, draw(), description="marks", processes=processes, total=30) == list(range(30))
    assert max(ahead) <= (0 if processes == 1 else 4)


def die(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told_of() -> None:
    with pytest.raises(UserError, match=r"a process of 2 was killed.*memory.*fewer processes"):
        run_tasks(die, [1, 2], description="deaths", processes=2)


def test_a_cluster_must_be_there() -> None:
    with pytest.raises(UserError, match=r"needs the scheduler of a running cluster; give --scheduler ADDRESS"):
        run_tasks(square, [1], description="squares", executor="dask")
    with pytest.raises(UserError, match=r"scheduler nonsense://nowhere: cannot be reached"):
        run_tasks(square, [1], description="squares", executor="dask", scheduler="nonsense://nowhere")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the signal masks of processes from /proc")
def test_an_interrupt_ends_the_processes_at_once_and_quietly() -> None:
    program = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run may ignore it
        "from panfm.executor import run_tasks; run_tasks(time.sleep, [60] * 4, description='', processes=2)"
    )
    # A group of its own, all of which a terminal would interrupt.
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(psutil.Process(child.pid).children()) < 3 and time.monotonic() < deadline:  # two and a resource tracker
        time.sleep(0.01)
    workers = psutil.Process(child.pid).children()
    names = [psutil.Process(worker.pid).cmdline()[-1] for worker in workers]
    masks = [re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text()) for worker in workers]
    held = [bool(int(mask[1], 16) & 1 << signal.SIGINT - 1) for mask in masks if mask]
    assert len(held) == 3 and all(held), names  # else they print what they were importing when it came
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    assert not psutil.wait_procs(workers, timeout=10)[1]
