"""Real `panfm pretrain` processes, started in a blink: forked from this process, which has imported everything once.

    Life(setting, out, world_size)  ->  ranks 0 ... N-1 in sessions of their own, output in one log
    Life.wait_for(...)              ->  a moment in the middle of its work
    Life.kill(rank, signal), Life.wait()  ->  exit codes

Importing torch and DeepSpeed takes ten seconds a process, a tiny run one: with forks, fifty interruptions take minutes.
What a launcher does about a rank that is left over (torchrun ends it), `wait` does after some time.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NoReturn

from tests.reliability import hooks
from tests.reliability.setting import Setting

PATIENCE = 240.0  # seconds that a life may take to reach a moment, or to end: far above what a busy machine needs
LEFT_OVER = 90.0  # seconds after which ranks that outlive another's failure are ended, as torchrun would


def import_everything() -> None:
    """Import what a run needs, so that forks need not."""
    import deepspeed.module_inject
    import deepspeed.ops
    import setuptools  # noqa: F401

    import panfm.cli.main
    import panfm.evaluation.contamination_list
    import panfm.evaluation.splits
    import panfm.training.pretrain  # noqa: F401

    assert deepspeed.ops.__compatible_ops__  # probes what could be compiled, once


class Life:
    """One start of a run: from its processes' birth until all have ended."""

    def __init__(
        self,
        setting: Setting,
        out: Path,
        *overrides: str,
        world_size: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.out = out
        self.log = out.with_suffix(".log")
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        arguments = ["pretrain", str(setting.config), *overrides, "--out", str(out)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        for rank in range(world_size):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            launched = {name: str(number) for name, number in numbers.items()} | address if world_size > 1 else {}
            self.pids[rank] = self._fork(arguments, launched | (environment or {}))

    def _fork(self, arguments: list[str], environment: dict[str, str]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        _be_panfm(arguments, environment, self.log)

    def has_rank(self) -> bool:
        """Whether a rank is still there; takes the exit codes of those that are not (-9: killed)."""
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def kill(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to the ranks named, to all where none is; those that have ended get none."""
        self.has_rank()
        for rank in ranks or tuple(self.pids):
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def wait_for(self, is_there: Callable[[], bool]) -> bool:
        """Wait until something is the case; False where all ranks end before."""
        deadline = time.monotonic() + PATIENCE
        while not is_there():
            if not self.has_rank():
                return False
            if time.monotonic() > deadline:
                self.kill(signal.SIGABRT)
                raise TimeoutError(f"{self.log}: no such moment in {PATIENCE:g} s")
            time.sleep(0.001)
        return True

    def wait_for_moment(self, rng: Random) -> bool:
        """Wait for a random moment, some steps or the writing of a checkpoint from now; False: it ended before."""
        if rng.random() < 0.4:
            folder = self.out / "checkpoints"
            newest = max((path.name for path in folder.glob("step-*")), default="")
            came = self.wait_for(lambda: any(path.name > newest for path in folder.glob("step-*.tmp")))
            time.sleep(rng.uniform(0, 0.03))
            return came
        step = read_step(self.out) + rng.randint(1, 8)
        came = self.wait_for(lambda: read_step(self.out) >= step)
        time.sleep(rng.uniform(0, 0.05))
        return came

    def wait(self) -> list[int]:
        """Wait for the end of all ranks; their exit codes, in their order."""
        deadline = time.monotonic() + PATIENCE
        failed_at: float | None = None
        while self.has_rank():
            now = time.monotonic()
            if failed_at is None and any(self.codes.values()):
                failed_at = now
            if now > deadline or (failed_at is not None and now > failed_at + LEFT_OVER):
                self.kill(signal.SIGKILL)
                raise TimeoutError(
                    f"{self.log}: ranks {sorted(self.pids.keys() - self.codes)} did not end by themselves"
                )
            time.sleep(0.002)
        return [self.codes[rank] for rank in sorted(self.codes)]

    def read_log(self) -> str:
        """What this life printed."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")


def read_step(out: Path) -> int:
    """Steps in metrics.jsonl: cheap, and harmless while it is being written."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _be_panfm(arguments: list[str], environment: dict[str, str], log: Path) -> NoReturn:
    """Be what `panfm ARGUMENTS` is, in a process that was just forked."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        sys.argv = ["panfm", *arguments]
        hooks.install()
        from panfm.cli.main import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
