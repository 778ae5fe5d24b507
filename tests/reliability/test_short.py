"""The short form of `python -m tests.reliability`: a few random moments, one command, all ends bit-identical."""

import sys
from pathlib import Path

import pytest

from tests.forks import start
from tests.reliability.__main__ import main


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    harness = start(run_harness, ["--moments", "3", "--kinds", "kill_one"], log=tmp_path / "log")
    printed, _ = harness.communicate(timeout=400)
    assert harness.returncode == 0, printed
    assert printed.splitlines()[-1].split() == ["all", "3", "3", "0", "0"], printed


def run_harness(options: list[str]) -> None:
    sys.argv = ["tests.reliability", *options]
    main()
