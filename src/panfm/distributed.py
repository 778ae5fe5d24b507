"""Ranks talking to each other; every function is safe without a process group (one rank, nothing to send).

    initialise(device)  ->  collectives used by objectives, training and tracking  ->  teardown()

gloo on CPU, NCCL on GPU. Under torchrun the group is built from the environment that torchrun sets; a single process
gets a group of one from an in-process store, so that nothing has to be set by hand and no port is taken.
"""
# ruff: noqa: TID251  this file and training/engine.py are the two that touch torch.distributed

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from panfm.errors import UserError

Value = TypeVar("Value")
# Longer than any checkpoint write that the other ranks wait for, and than what monitor.hang_seconds allows at most:
# whoever hangs is reported by the watchdog, with its stacks, before the others give up on it.
COLLECTIVE_TIMEOUT = timedelta(minutes=60)


def is_initialised() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Number of this process among all of the run, 0 without a group."""
    return dist.get_rank() if is_initialised() else 0


def get_world_size() -> int:
    """Number of processes in the run, 1 without a group."""
    return dist.get_world_size() if is_initialised() else 1


def get_local_rank() -> int:
    """Number of this process on its machine (torchrun's LOCAL_RANK), 0 on a single process."""
    return _read_launcher_number("LOCAL_RANK", default=0)


def get_local_world_size() -> int:
    """Number of processes on this machine (torchrun's LOCAL_WORLD_SIZE), 1 on a single process."""
    return _read_launcher_number("LOCAL_WORLD_SIZE", default=1)


def is_main() -> bool:
    """Whether this is rank 0: the one that prints and writes what is written once."""
    return get_rank() == 0


def is_launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def find_device() -> torch.device:
    """The device of this rank: its own GPU where there is one, else the CPU."""
    return torch.device("cuda", get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def initialise(device: torch.device) -> None:
    """Build the process group of this run for `device`; does nothing where one exists already.

    Raises UserError when the launcher set only some of the variables that a group is built from.
    """
    if is_initialised():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if is_launched():
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"RANK and WORLD_SIZE are set but {', '.join(missing)} is not; start with torchrun, or unset all four"
            )
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        return
    # HashStore lives in this process: a group of one needs neither MASTER_ADDR nor a free port.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)


def teardown() -> None:
    """Leave the process group, if there is one."""
    if is_initialised():
        dist.destroy_process_group()


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank ended, is out of reach or kept it waiting too long."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)  # gloo's are plain RuntimeErrors


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A process group for the length of a `with`; one that existed before is used and left standing."""
    existed = is_initialised()
    initialise(device)
    try:
        yield
    finally:
        if not existed:
            teardown()


def barrier() -> None:
    """Wait until every rank is here."""
    if get_world_size() > 1:
        dist.barrier()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over ranks, as a new tensor of the same shape (no gradient)."""
    if get_world_size() == 1:
        return tensor.detach().clone()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / get_world_size()


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Largest value over ranks, element by element, as a new tensor of the same shape (no gradient)."""
    largest = tensor.detach().clone()
    if get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate `tensor` [B, ...] over ranks in rank order -> [world_size * B, ...], with exact gradients.

    Every rank must pass the same shape. Backward sums what all ranks say about this rank's rows. Together with the
    averaging of parameter gradients over ranks (DDP, DeepSpeed) this is the gradient of the mean of the ranks' losses:
    exact both where each rank's loss covers its own rows and where every rank computes the same loss of all rows.
    """
    if get_world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


def gather_objects(value: Value) -> list[Value]:
    """The picklable `value` of every rank, in rank order, on every rank."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Value) -> Value:
    """The picklable `value` of rank 0, on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _Gather(torch.autograd.Function):
    """all_gather whose backward is the sum over ranks of the gradients that concern this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)  # [world_size * B, ...]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()  # autograd may share this tensor, and all_reduce writes into it
        dist.all_reduce(total)
        size = total.shape[0] // get_world_size()
        return total[get_rank() * size : (get_rank() + 1) * size]


def _read_launcher_number(name: str, default: int) -> int:
    value = os.environ.get(name)
    return int(value) if value else default
