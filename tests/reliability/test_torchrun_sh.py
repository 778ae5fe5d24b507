"""launch/torchrun.sh: what it hands to torchrun, and what becomes of signals; a short script is torchrun here."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from panfm.files import CHECKOUT

TORCHRUN = """#!/bin/bash
printf '%s\\n' "$@" ready
trap 'exit 1' TERM  # as torchrun says when it was signalled, whatever its ranks said
[ "$FAILS" ] && exit 3
while :; do sleep 0.05; done
"""


def start(folder: Path, **environment: str) -> tuple[subprocess.Popen[str], list[str]]:
    torchrun = folder / "torchrun"
    torchrun.write_text(TORCHRUN)
    torchrun.chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(CHECKOUT / "launch" / "torchrun.sh"), "debug_cpu", "--out", "run"],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, [line.strip() for line in iter(process.stdout.readline, "ready\n")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_torchrun_and_asks_for_a_requeue(tmp_path: Path, number: signal.Signals) -> None:
    process, arguments = start(tmp_path, RANKS="2")
    assert arguments[:3] == ["--nnodes=1", "--nproc_per_node=2", "--max_restarts=0"]
    assert arguments[3:] == ["--standalone", "-m", "panfm", "pretrain", "debug_cpu", "--out", "run"]
    with process:
        process.send_signal(number)
        assert process.wait(20) == 75


def test_other_codes_are_torchruns(tmp_path: Path) -> None:
    process, _ = start(tmp_path, RANKS="1", FAILS="yes")
    with process:
        assert process.wait(20) == 3


def test_machines_that_come_and_go(tmp_path: Path) -> None:
    process, arguments = start(
        tmp_path,
        RANKS="4",
        NNODES="2:4",
        HEAD="node1",
        ADDRESS="10.0.0.7",
        RDZV_CONF="last_call_timeout=5",
        FAILS="yes",
    )
    with process:
        process.wait(20)
    assert arguments[:4] == ["--nnodes=2:4", "--nproc_per_node=4", "--max_restarts=20", "--rdzv_backend=c10d"]
    assert arguments[4:6] == ["--rdzv_endpoint=node1:29400", "--rdzv_id=panfm"]
    assert arguments[6:8] == ["--local_addr=10.0.0.7", "--rdzv_conf=last_call_timeout=5"]
    assert arguments[-3:] == ["--out", "run", "engine.world_sizes=[8,12,16]"]
