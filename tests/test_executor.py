import os

import pytest

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
