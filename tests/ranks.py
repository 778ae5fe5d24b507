"""Run a function on several real gloo ranks of this machine, each a fresh process with one thread."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank inside a process group; return what each rank returned, in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        calls = [pool.submit(_call, rank, world_size, port, function, args) for rank in range(world_size)]
        return [call.result(timeout=300) for call in calls]


def _call(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from panfm.distributed import process_group

    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        return function(*args)
