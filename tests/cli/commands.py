"""The command line as a user meets it, in this process: exit code, both streams, as `panfm WORDS` has them.

`panfm` calls what the console script calls, so imports are paid for once a session and not once a command. What only a
process of its own can show (imports, file limits, --debug's traceback) is run by `launch_panfm`.
"""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

from panfm.cli.main import main


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def panfm(*words: object) -> Ended:
    """`panfm WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with _called_with(words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), code
    return Ended(code, out.getvalue(), err.getvalue())


def launch_panfm(*words: object) -> Ended:
    """`panfm WORDS` with an interpreter of its own."""
    command = [sys.executable, "-m", "panfm", *map(str, words)]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def assert_one_line(ended: Ended, *said: str) -> None:
    """It was the user's fault, and one line says so, with each of these in it."""
    assert ended.returncode == 2, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("panfm: ")
    for part in said:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


@contextlib.contextmanager
def _called_with(words: tuple[object, ...]) -> Iterator[None]:
    with patch.object(sys, "argv", ["panfm", *map(str, words)]), patch.dict(os.environ, {"COLUMNS": "200"}):
        yield
