"""How many threads a fit may use: one for each of its products, several fits side by side.

The products of a probe are narrow (7 x 1,024 by 1,024 x 8,000 at most). Cut among threads they wait for each other
longer than they compute: on two cores a fit to 400 images took 17 times as long with two BLAS threads as with one, a
fit to 8,000 1.5 times as long. So BLAS gets one thread here, and folds run side by side.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Answer = TypeVar("Answer")
SMALL = 200_000  # values of a problem's matrix below which starting threads costs more than they save
_num_threads: ContextVar[int | None] = ContextVar("num_threads", default=None)


@contextmanager
def share_cores(num_threads: int) -> Iterator[None]:
    """Let fits inside use at most so many threads: for work that is itself one of several processes."""
    token = _num_threads.set(max(1, num_threads))
    try:
        yield
    finally:
        _num_threads.reset(token)


@contextmanager
def narrow_products() -> Iterator[None]:
    """Give BLAS one thread inside."""
    with _get_controller().limit(limits=1, user_api="blas"):
        yield


def map_side_by_side(function: Callable[[Item], Answer], items: Iterable[Item], *, size: int) -> list[Answer]:
    """Apply `function` to each item, in threads where `size` (values of one item's matrix) makes that worth it.

    For work inside `narrow_products` that spends its time in numpy, which lets other threads run meanwhile.
    """
    work = list(items)
    num_threads = min(len(work), _num_threads.get() or _count_cores())
    if num_threads < 2 or size < SMALL:
        return [function(item) for item in work]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, work))


@lru_cache(maxsize=1)
def _get_controller() -> ThreadpoolController:
    return ThreadpoolController()  # looking for the libraries takes milliseconds: once


def _count_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # the cores of this process, where the system tells
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
