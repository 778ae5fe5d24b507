"""One `run_tasks(function, tasks)` for every stage that falls into independent pieces: in-process or local processes.

The function must be importable and its tasks small and picklable by the standard library; what it returns comes back in
the order of the tasks. A task's exception ends the run with that exception; finished pieces stay on disk, so that a
second run goes on from there (each stage keeps its own record of what is done).
"""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from panfm.progress import progress_bar

Task = TypeVar("Task")
Answer = TypeVar("Answer")


def run_tasks(
    function: Callable[[Task], Answer],
    tasks: Iterable[Task],
    *,
    description: str,
    processes: int = 1,
    unit: str = "tasks",
    size: Callable[[Task], int] = lambda task: 1,
) -> list[Answer]:
    """Apply `function` to every task and return the answers in order; progress counts `size(task)` items of `unit`.

    With `processes` <= 1 everything runs in this process, which is what tests and debuggers want.
    """
    todo: Sequence[Task] = list(tasks)
    answers: dict[int, Answer] = {}
    with progress_bar(description, sum(size(task) for task in todo), unit=unit) as advance:
        if processes <= 1 or len(todo) <= 1:
            for number, task in enumerate(todo):
                answers[number] = function(task)
                advance(size(task))
        else:
            # spawn: forking a process that holds threads (torch, pyarrow) can deadlock its child.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
                futures = {pool.submit(function, task): number for number, task in enumerate(todo)}
                try:
                    for future in as_completed(futures):
                        number = futures[future]
                        answers[number] = future.result()
                        advance(size(todo[number]))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [answers[number] for number in range(len(todo))]
