"""Signals, launchers that die, streams that end: each with real processes. Lost ranks: see faults.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from panfm.config import load_config
from panfm.errors import UserError
from panfm.training.endings import catch_signals, read_next
from panfm.training.plan import PretrainConfig, check_config
from tests.reliability.setting import make_setting

WAITS = """
import ctypes, signal, sys, time
from panfm.training.endings import catch_signals

with catch_signals() as stop:
    print("ready", flush=True)
    for _ in range({loops}):
        {wait}
        if stop.requested:
            print("asked", flush=True)
"""


def start(wait: str, loops: int) -> subprocess.Popen[str]:
    code = WAITS.replace("{wait}", wait).replace("{loops}", str(loops))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_the_same_request_twice_is_one_and_a_later_one_ends_at_once() -> None:
    process = start("time.sleep(0.2)", 100)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)  # as torchrun sends a second one where the whole job was signalled
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    time.sleep(2.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    with process:
        assert process.wait(10) == 128 + signal.SIGTERM


def test_a_second_signal_ends_what_waits_in_c_code() -> None:
    """ctypes waits without the interpreter's lock, as collectives do; Python's handlers do not run meanwhile."""
    process = start("ctypes.CDLL(None).usleep(1); [ctypes.CDLL(None).poll(None, 0, 1000) for _ in range(60)]", 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.3)
    process.send_signal(signal.SIGTERM)
    with process:
        assert process.wait(10) == 128 + signal.SIGTERM


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)]
    with catch_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.requested
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_a_stream_cannot_bring_is_one_line() -> None:
    def fail(error: Exception) -> str | None:
        def stream():  # type: ignore[no-untyped-def]
            raise error
            yield

        return read_next(stream())[1]

    assert read_next(iter([5])) == (5, None)
    assert fail(UserError("shard.tar: cut short")) == "shard.tar: cut short"
    assert fail(OSError(5, "Input/output error", "shard.tar")) == "shard.tar: Input/output error"
    assert "killed" in (fail(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")) or "")
    with pytest.raises(RuntimeError, match="ours"):
        fail(RuntimeError("a defect of ours"))


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import time
from panfm.training.endings import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(60)
'''], env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"})
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_a_rank_ends_with_its_launcher() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    lines = {launcher.stdout.readline().strip(), launcher.stdout.readline().strip()}
    (pid,) = (int(line) for line in lines - {"ready"})
    with launcher:
        launcher.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_number_of_ranks_that_may_come_must_divide_the_batch(tmp_path: Path) -> None:
    config = make_setting(tmp_path).config
    check_config(load_config(PretrainConfig, config, ["engine.world_sizes=[1,2]"]), "auto")
    with pytest.raises(UserError, match=r"global_batch_size \(8\) must be divisible by .* x world_size \(3\)"):
        check_config(load_config(PretrainConfig, config, ["engine.world_sizes=[1,2,3]"]), "auto")
