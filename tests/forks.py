"""Real processes born in a blink: forked from a server that has imported torch, DeepSpeed and panfm once a session.

    start(function, *args, log=...)      ->  Forked: a process of its own session, with Popen's poll, wait, send_signal
    start(be_panfm, words, log=...)      ->  what `panfm WORDS` is

An import of them all takes six seconds of processor time, a tiny run one; a start through here takes 0.05. A forked
process has its own session, environment, folder, output and exit code, and ends as an interpreter ends; what it has not
is an import of its own. Tests of that (torchrun, a PATH without a compiler) start the interpreter.

Not multiprocessing's fork server: panfm's loader uses that one, of which a process has one alone.
"""

import atexit
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from panfm.files import CHECKOUT

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]  # function, arguments, what the environment gets
Job = tuple[Callable[..., Any], tuple[Any, ...], Path | None]
MESSAGE_BYTES = 1 << 17
SECONDS_FOR_OTHERS = 5.0  # to end by themselves when a process has failed that they wait for
WARM = (
    "deepspeed.module_inject", "deepspeed.ops", "setuptools", "panfm.cli.main", "panfm.training.pretrain",
    "panfm.training.dry_run", "panfm.training.doctor_ranks", "panfm.evaluation.splits",
    "panfm.evaluation.contamination_list", "torch._dynamo",
)  # fmt: skip


class Forked:
    """A process that `start` began. returncode: as Popen has it, -9 where it was killed, None while it runs."""

    def __init__(self, status: int, log: Path) -> None:
        self.log = log
        self.returncode: int | None = None
        self._status = open(status)  # noqa: SIM115  # its keeper's: the process's number, later its exit code
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """Its exit code, or None."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code; TimeoutError, and its end, after so many seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                self.wait(10)
                raise TimeoutError(f"did not end in {timeout:g} s: {self.read()}")
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Wait for its end: all that it printed, on both streams."""
        self.wait(timeout)
        return self.read(), None

    def send_signal(self, number: int) -> None:
        """To the process alone, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def read(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace")


def start(
    function: Callable[..., Any],
    *args: Any,
    log: Path,
    environment: dict[str, str] | None = None,
    result: Path | None = None,
) -> Forked:
    """Call a module's function in a forked process, in this one's folder and environment + `environment`.

    log: takes both streams. result: takes, pickled, what the function returned. Exit code: what it gave sys.exit, 0
    where it returned, 1 where it raised.
    """
    reads, writes = os.pipe()
    with log.open("wb") as file:
        job = (function, args, result, {**os.environ, **(environment or {})}, Path.cwd())
        socket.send_fds(_get_server(), [pickle.dumps(job)], [writes, file.fileno()])
    os.close(writes)
    return Forked(reads, log)


def call_all(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]], timeout: float = 300
) -> list[Any]:
    """Call (function, args, environment) each in a process of its own, all at once; what they returned, in order.

    A failure ends the others, which would wait for it, and is raised with what the process printed.
    """
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / str(number) for number in range(len(calls))]
        processes = [
            start(function, *args, log=path.with_suffix(".log"), environment=environment, result=path)
            for path, (function, args, environment) in zip(paths, calls, strict=True)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.returncode for process in processes):
                    deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHERS)
                time.sleep(0.005)
            failed = [number for number, process in enumerate(processes) if process.returncode]
            assert not failed, "".join(
                f"process {number} of {len(calls)}: {processes[number].read()}" for number in failed
            )
            assert all(process.returncode == 0 for process in processes), f"not done in {timeout:g} s"
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait(10)
        return [pickle.loads(path.read_bytes()) for path in paths]


def be_panfm(words: Sequence[str]) -> None:
    """Be `panfm WORDS`."""
    from panfm.cli.main import main

    sys.argv = ["panfm", *words]
    main()


# ------------------------------------------------------------------------------------------------ the server

_server: socket.socket | None = None


def _get_server() -> socket.socket:
    """This session's server, started at the first call; it ends with the session."""
    global _server
    if _server is None:
        _server, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(other.fileno())],
                cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[other.fileno()],
                # CUDA must not be touched before a fork: torch then asks NVML whether there is a GPU.
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )  # fmt: skip
        atexit.register(_end, _server, process)
    return _server


def _end(server: socket.socket, process: subprocess.Popen[bytes]) -> None:
    server.close()
    process.wait(30)


def _serve(connection: socket.socket) -> Job | None:
    """Fork for every request: returns its job in the process that is to do it, and None at the end, in the server."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
        if not message:
            return None
        if not os.fork():  # the keeper: it waits for the process and says how it ended
            connection.close()
            status, log = descriptors
            pid = os.fork()
            if not pid:
                os.setsid()
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.close(status)
                os.close(log)
                function, args, result, environment, folder = pickle.loads(message)
                os.environ.clear()
                os.environ.update(environment)
                os.chdir(folder)
                return function, args, result
            os.write(status, f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(status, f"{code}\n".encode())
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        while _reap():
            pass


def _reap() -> bool:
    """Let go of a keeper that has ended; False where there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _main() -> None:
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()  # else the first collection of every forked process would copy all that was imported
    job = _serve(socket.socket(fileno=int(sys.argv[1])))
    if job is not None:
        function, args, result = job
        value = function(*args)
        if result is not None:
            result.write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    _main()
