"""`panfm runs`: what pretraining runs there are, and how they stand."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders, or one run folder.")] = Path("runs"),
) -> None:
    """List runs: state, step, last loss, best probe, last change, the newest last.

    finished, interrupted (start the same command again), diverged, alarmed, unreadable: as the run wrote it down.
    unknown: it was killed, or ended by an error; the same command goes on from its newest whole checkpoint.

    Example: panfm runs runs
    """
    from panfm.progress import print_output
    from panfm.training.runs import format_runs, list_runs

    print_output(format_runs(list_runs(folder)))
