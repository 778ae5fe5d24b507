"""The short form of `python -m tests.reliability`: a few random moments, one command, all ends bit-identical."""

import subprocess
import sys

import pytest

from panfm.files import CHECKOUT


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_ends_as_if_nothing_had_happened() -> None:
    options = ["--moments", "3", "--kinds", "kill_one"]
    command = [sys.executable, "-m", "tests.reliability", *options]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-2000:]}"
    assert ended.stdout.splitlines()[-1].split() == ["all", "3", "3", "0", "0"], ended.stdout
