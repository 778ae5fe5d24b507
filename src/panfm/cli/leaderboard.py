"""`panfm leaderboard build`: Result files become one static page and its tables."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The board: a pure function of Result files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `build` a sub-command although it is the only one yet."""


@app.command("build")
def build(
    results: Annotated[list[Path], typer.Argument(help="Results folders, as `panfm evaluate run --out` wrote them.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html and what belongs to it.")] = Path("leaderboard"),
    audit: Annotated[
        Path | None, typer.Option(help="Audit folder: cells show how many test images pretraining may have seen.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Local processes, a task each.")] = 2,
) -> None:
    """Build index.html, a page a task, LEADERBOARD.md, leaderboard.csv and .json; equal inputs give equal bytes.

    Example: panfm leaderboard build results --out leaderboard
    """
    from panfm.board.build import build_leaderboard, format_table
    from panfm.progress import print_output

    summary = build_leaderboard(results, out, audit, processes=processes)
    print_output(format_table(summary))
    typer.echo(f"{out / 'index.html'}: open it in a browser")
