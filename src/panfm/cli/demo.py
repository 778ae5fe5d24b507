"""`panfm demo`: the whole way on synthetic images."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    patients: Annotated[int, typer.Option(min=40, help="Number of synthetic patients.")] = 200,
) -> None:
    """Go the whole way on synthetic images: archive -> shards -> pretraining -> export -> evaluation -> leaderboard.

    Takes under six minutes on two CPU cores, offline. Example: panfm demo --out demo
    """
    from panfm.demo import run_demo

    run_demo(out, num_patients=patients)
