"""`panfm tasks`: is a task card sound, on its own and on the shards at hand?"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check task cards.", no_args_is_help=True)


@app.callback()
def _tasks() -> None:  # one command only: without a callback typer would drop its name
    pass


@app.command("check")
def check(
    card: Annotated[str, typer.Argument(help="Task card: a YAML file, or a name (panfm evaluate list).")],
    shards: Annotated[
        list[str] | None, typer.Option(help="Shard set, a folder or URL, to count in; repeat for several.")
    ] = None,
    task_dir: Annotated[Path | None, typer.Option(help="Folder with task cards of your own.")] = None,
) -> None:
    """Check a task card, count its classes, groups, folds and subgroups, and warn of what makes its numbers unsound.

    Example: panfm tasks check ham10000_malignancy --shards shards/ham10000
    """
    from panfm.evaluation.task_check import check_task
    from panfm.evaluation.tasks import load_task
    from panfm.shards.index import open_shard_set

    shard_sets = [open_shard_set(folder) for folder in shards or ()]
    typer.echo(str(check_task(load_task(card, task_dir), shard_sets, task_dir)))
