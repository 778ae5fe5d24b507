"""Run a function on several real gloo ranks of this machine, each a process of its own with one thread."""

import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.forks import SECONDS_FOR_OTHERS, be_panfm, call_all, start


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank inside a process group; return what each rank returned, in rank order."""
    environments = list_rank_environments(world_size)
    return call_all([(call_in_group, (function, args), environment) for environment in environments])


def run_panfm_ranks(words: Sequence[str], world_size: int, log: Path, timeout: float = 300) -> tuple[int, str]:
    """`panfm WORDS` on so many ranks as under torchrun, 0: as one process; its exit code and all that it printed.

    Where a rank fails the others are ended, as torchrun does it, some seconds later. log: a rank's lies beside it, with
    its number.
    """
    environments = list_rank_environments(world_size) if world_size else [{}]
    processes = [
        start(be_panfm, words, log=log.with_name(f"{log.name}.{rank}"), environment=environment)
        for rank, environment in enumerate(environments)
    ]
    deadline, has_failed = time.monotonic() + timeout, False
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if not has_failed and any(process.returncode for process in processes):
            has_failed, deadline = True, time.monotonic() + SECONDS_FOR_OTHERS
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    codes = [process.wait(10) for process in processes]
    return next((code for code in codes if code > 0), min(codes)), "".join(process.read() for process in processes)


def list_rank_environments(world_size: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | sizes | address for rank in range(world_size)]


def call_in_group(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Be a rank."""
    import torch

    from panfm.distributed import process_group

    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        return function(*args)
