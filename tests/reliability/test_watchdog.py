"""A process that hangs, in ways that Python can see and in one that it cannot: a real one each, with its stacks."""

import subprocess
import sys
import time
from pathlib import Path

from panfm.training.endings import EXIT_HUNG
from panfm.training.watchdog import Watchdog, get_path, read_line, summarise

PROGRAM = """
import ctypes, signal, sys, threading, time
from pathlib import Path
from panfm.training.watchdog import Watchdog

def wait_for_data():
    time.sleep(60)

with Watchdog(Path(sys.argv[1]), seconds=0.5) as watchdog:
    watchdog.begin("start", slow=True)
    time.sleep(0.7)  # longer than a step may take, and shorter than a start
    for step in range(4):
        watchdog.begin(f"step {step + 1}")
        time.sleep(0.3)
    print("well so far", flush=True)
    watchdog.begin("step 5")
    {hang}
"""


def run(hang: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.replace("{hang}", hang), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_what_hangs_is_named_with_all_its_threads(tmp_path: Path) -> None:
    ended = run("wait_for_data()", tmp_path)
    assert (ended.returncode, ended.stdout) == (EXIT_HUNG, "well so far\n")
    line = "rank 0 of 1, step 5, not done after 0.5 s: does not wait for other ranks in <string>:7 wait_for_data"
    for said in (ended.stderr, get_path(tmp_path, 0).read_text()):
        assert line in said
        assert "in wait_for_data" in said and said.count("(most recent call first)") == 2
    assert ended.stderr.splitlines()[-1].startswith(f"panfm: hung: {line}. Stacks of all threads: {tmp_path}")


def test_c_code_that_keeps_the_interpreters_lock_is_ended_too(tmp_path: Path) -> None:
    ended = run("ctypes.PyDLL(None).sleep(60)", tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "well so far\n")
    assert "Timeout" in get_path(tmp_path, 0).read_text()


def test_a_process_that_was_stopped_and_goes_on_is_not_late(tmp_path: Path) -> None:
    wake = "subprocess.Popen(['sh', '-c', f'sleep 1.1; kill -CONT {os.getpid()}']); os.kill(os.getpid(), 19)"
    ended = run(f"import os, subprocess; {wake}; time.sleep(0.1)", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir())  # and a run that ends well leaves nothing


def test_null_watches_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "run", None) as watchdog:
        watchdog.begin("step 1")
    assert not (tmp_path / "run").exists()


def test_the_last_line_says_who_is_at_fault(tmp_path: Path) -> None:
    waits = "rank {} of 4, step 9, not done after 600 s: waits for other ranks in distributed.py:150 all_reduce_mean"
    busy = "rank 2 of 4, step 9, not done after 600 s: does not wait for other ranks in loader.py:288 _generate"
    for rank, line in ((0, waits.format(0)), (2, "rank 2 of 4, step 3, of an earlier hang\n" + busy)):
        get_path(tmp_path, rank).write_text(f"{line}\nThread 0x01 (most recent call first):\n")
    lines = {rank: read_line(tmp_path, rank, since=0) for rank in range(4)}
    assert lines == {0: waits.format(0), 1: None, 2: busy, 3: None}
    assert read_line(tmp_path, 0, since=time.time() + 60) is None  # of an earlier hang
    said = summarise(lines, tmp_path)
    assert said.startswith(f"hung: {busy}; no word from ranks 1, 3. Stacks of all threads: {tmp_path}/stacks-*.txt.")
    assert "every rank waits for others" in summarise({rank: waits.format(rank) for rank in range(4)}, tmp_path)
