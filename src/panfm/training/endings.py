"""How a run ends: its outcomes and exit codes, the signals that ask for it, and what befalls a rank from outside.

    SIGTERM, SIGUSR1  ->  catch_signals    ->  StopRequest: the loop finishes its step, saves, ends with code 75
    the launcher dies ->  end_with_parent  ->  SIGKILL: a rank that nobody watches would train on beside its successor
    a rank dies       ->  explain_lost     ->  one line on each of the others instead of gloo's or NCCL's traceback
    shards vanish     ->  read_next, share_fault  ->  every rank knows, and all save together

`EXIT_CODES` is the whole list; docs/reliability.md says what to do about each.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch

from panfm.distributed import all_reduce_max, gather_objects, get_rank, is_launched, is_lost_contact
from panfm.errors import UserError

Value = TypeVar("Value")

Outcome = Literal["finished", "interrupted", "diverged", "alarmed", "unreadable"]
# 75 is sysexits.h's EX_TEMPFAIL, "try again": what a scheduler requeues on. Under torchrun the agent reports its own.
EXIT_CODES: dict[Outcome, int] = {"finished": 0, "interrupted": 75, "diverged": 4, "alarmed": 5, "unreadable": 7}
EXIT_HUNG = 6  # the watchdog's; not in the dict, since such a run does not return
EXIT_LOST = 8  # on the ranks that are left when another one died

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Schedulers signal every process of a job, and torchrun, signalled too, sends its ranks a second one at once.
SAME_REQUEST_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Whether a signal asked the run to end."""

    requested = False


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """SIGTERM and SIGUSR1 ask the loop to save and end; one more, two seconds later or more, ends the process at once.

    Only the main thread may call this. Signals are read in a thread of their own, so that the second one has its effect
    while the main thread waits inside of C code, where Python's handlers do not run.
    """
    stop = StopRequest()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        first: float | None = None
        while received := reader.recv(1):
            if received[0] not in STOP_SIGNALS:  # Python writes the number of every signal that has a handler
                continue
            if first is None:
                first, stop.requested = time.monotonic(), True
            elif time.monotonic() - first >= SAME_REQUEST_SECONDS:
                os._exit(128 + received[0])

    handlers = {name: signal.signal(name, lambda number, frame: None) for name in STOP_SIGNALS}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, name="panfm-signals", daemon=True)
    listener.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        writer.close()  # ends the listener
        listener.join()
        reader.close()


def end_with_parent() -> None:
    """Let Linux kill this rank when its launcher dies; elsewhere, and without a launcher, nothing happens.

    Ranks of a torchrun that was killed live on: they would write into the run folder that the next start continues.
    """
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def read_next(stream: Iterator[Value]) -> tuple[Value, None] | tuple[None, str]:
    """The next of a loader's stream, or in one line why there is none: a shard that was cut short or taken away, a
    disk that fails, a loader process that was killed (for the memory it took, most often).
    """
    try:
        return next(stream), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or 'shards'}: {error.strerror}"
    except RuntimeError as error:  # torch has no class of its own for it
        if "DataLoader worker" not in str(error):
            raise
        return None, "a loader process was killed; it may have run out of memory: try a smaller data.prefetch"


def share_fault(fault: str | None, device: torch.device) -> str | None:
    """One of the faults that ranks have, on every rank; None where none has any. Every rank must call it."""
    has_fault = torch.tensor(float(fault is not None), device=device)
    if not all_reduce_max(has_fault):
        return None
    return next(text for text in gather_objects(fault) if text is not None)


@contextmanager
def explain_lost() -> Iterator[None]:
    """End this rank with one line and code 8 where another rank went away in the middle of a collective."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        line = " ".join(str(error).split())
        sys.stderr.write(
            f"panfm: rank {get_rank()}: another rank ended or is out of reach ({line[:160]}); its own lines say why. "
            "The same command goes on from the newest checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_LOST)  # leaving the process group in order would wait for the rank that is gone
