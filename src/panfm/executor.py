"""One `run_tasks(function, tasks)` for all work that falls into independent pieces: here, in processes, on a cluster.

The function must be importable, and its tasks small and picklable by the standard library; what it returns comes back
in the order of the tasks. Tasks are drawn from their iterator as there is room, so a million of them are never in
memory together. A task's exception ends the run with that exception; finished pieces stay on disk, so that a second
run goes on from there (each stage keeps its own record of what is done). A task must be safe to run twice: on a
cluster the tasks of a lost worker are given to another.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from panfm.errors import UserError
from panfm.progress import progress_bar

Task = TypeVar("Task")
Answer = TypeVar("Answer")
ExecutorName = Literal["local", "dask"]
IN_FLIGHT = 2  # tasks a worker: one that it works on and one that waits for it
CONNECT_SECONDS = 30


def run_tasks(
    function: Callable[[Task], Answer],
    tasks: Iterable[Task],
    *,
    description: str,
    processes: int = 1,
    unit: str = "tasks",
    size: Callable[[Task], int] = lambda task: 1,
    total: int | None = None,
    done: int = 0,
    executor: ExecutorName = "local",
    scheduler: str | None = None,
) -> list[Answer]:
    """Apply `function` to every task and return the answers in order; progress counts `size(task)` items of `unit`.

    total: number of items, where `tasks` is an iterator that cannot be counted; done: of these, finished before.
    executor: "local" (with `processes` <= 1 everything runs in this process, which is what tests and debuggers want)
    or "dask", a cluster whose `scheduler` is an address ("tcp://host:8786") or the path of its scheduler file.

    Raises what a task raises, and UserError for a scheduler that cannot be reached and for workers that die.
    """
    if isinstance(tasks, list | tuple):
        total = done + sum(size(task) for task in tasks)
    with progress_bar(description, total, unit=unit, done=done) as advance:
        if executor == "dask":
            return _run_on_dask(function, tasks, size, advance, scheduler)
        if processes <= 1 or (isinstance(tasks, list | tuple) and len(tasks) <= 1):
            return [_run_here(function, task, size, advance) for task in tasks]
        return _run_in_processes(function, tasks, size, advance, processes)


def _run_here(
    function: Callable[[Task], Answer], task: Task, size: Callable[[Task], int], advance: Callable[[int], None]
) -> Answer:
    answer = function(task)
    advance(size(task))
    return answer


def _run_in_processes(
    function: Callable[[Task], Answer],
    tasks: Iterable[Task],
    size: Callable[[Task], int],
    advance: Callable[[int], None],
    processes: int,
) -> list[Answer]:
    # spawn: forking a process that holds threads (torch, pyarrow) can deadlock its child.
    context = multiprocessing.get_context("spawn")
    answers: dict[int, Answer] = {}
    running: dict[Future[Answer], tuple[int, int]] = {}  # -> number of the task, its size
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            for number, task in _draw(tasks, running, lambda: processes * IN_FLIGHT):
                if task is not None:
                    with _hold_interrupts():  # submit starts processes, and they inherit it
                        running[pool.submit(function, task)] = number, size(task)
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place, count = running.pop(future)
                    answers[place] = future.result()
                    advance(count)
        except BrokenProcessPool:
            raise UserError(
                f"a process of {processes} was killed, as systems do where memory runs out; start the same command "
                "again, which goes on where it stopped, with fewer processes"
            ) from None
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):  # what they write is whole or not there
                for process in multiprocessing.active_children():
                    process.terminate()
            raise
    return [answers[number] for number in range(len(answers))]


@contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes started in it never see one: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _draw(
    tasks: Iterable[Task], running: dict[Any, Any], limit: Callable[[], int]
) -> Iterator[tuple[int, Task | None]]:
    """Yield numbered tasks while fewer than `limit` are running, else (-1, None): wait for one. Ends when none runs."""
    source = iter(tasks)
    number = 0
    exhausted = False
    while True:
        if not exhausted and len(running) < limit():
            try:
                task = next(source)
            except StopIteration:
                exhausted = True
                continue
            yield number, task
            number += 1
        elif running:
            yield -1, None
        else:
            return


# ------------------------------------------------------------------------------------------------ Dask


def _run_on_dask(
    function: Callable[[Task], Answer],
    tasks: Iterable[Task],
    size: Callable[[Task], int],
    advance: Callable[[int], None],
    scheduler: str | None,
) -> list[Answer]:
    answers: dict[int, Answer] = {}
    running: dict[Any, tuple[int, int]] = {}
    with _connect(scheduler) as client:
        from distributed import KilledWorker
        from distributed import wait as wait_for

        try:
            for number, task in _draw(tasks, running, lambda: _count_slots(client) * IN_FLIGHT):
                if task is not None:
                    # pure=False: without it Dask would hash every task, to find out whether it had it before.
                    running[client.submit(function, task, pure=False)] = number, size(task)
                    continue
                for future in wait_for(list(running), return_when="FIRST_COMPLETED").done:
                    place, count = running.pop(future)
                    answers[place] = future.result()
                    advance(count)
        except KilledWorker as error:
            raise UserError(
                f"the cluster lost worker after worker over one task ({error.task}); where memory ran out, give the "
                "workers more of it, then start the same command again, which goes on where it stopped"
            ) from None
        finally:
            if running:
                client.cancel(list(running))
    return [answers[number] for number in range(len(answers))]


@contextmanager
def _connect(scheduler: str | None) -> Iterator[Any]:
    """A Dask client. What it prints about tasks are their keys and reprs, which must not tell what is in them."""
    if scheduler is None:
        raise UserError(
            "executor: dask needs the scheduler of a running cluster; give --scheduler ADDRESS (such as "
            "tcp://host:8786) or the path of its scheduler file, or use executor: local"
        )
    try:
        from distributed import Client
    except ImportError:
        raise UserError('executor: dask needs distributed; install it with: pip install "panfm[cluster]"') from None
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"scheduler {scheduler}: cannot be reached ({text}); check the address and the cluster"
        ) from None
    with client, client.as_current():
        yield client


def _count_slots(client: Any) -> int:
    """Tasks that the cluster can run at a time. Asked again and again: workers come and go."""
    threads: dict[str, int] = client.nthreads()
    return max(4, sum(threads.values()))  # a few even for a cluster whose workers are still queueing
