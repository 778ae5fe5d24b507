"""`panfm evaluate`: encoders x tasks x protocols x label fractions -> Result files."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure frozen and fine-tuned encoders on tasks.", no_args_is_help=True)


def _names(text: str) -> str | list[str]:
    return text if text == "all" else [name.strip() for name in text.split(",") if name.strip()]


@app.command("run")
def run(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one.")] = "default",
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value pairs that change the config.")] = None,
    encoder: Annotated[list[str] | None, typer.Option(help="Encoder address; repeat for several.")] = None,
    shards: Annotated[list[str] | None, typer.Option(help="Shard set, a folder or URL; repeat for several.")] = None,
    tasks: Annotated[str | None, typer.Option(help="all, or names separated by commas.")] = None,
    protocols: Annotated[str | None, typer.Option(help="linear_probe,knn,finetune")] = None,
    fractions: Annotated[str | None, typer.Option(help="Shares of training patients with labels: 0.1,1.0")] = None,
    task_dir: Annotated[Path | None, typer.Option(help="Folder with task cards of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder.")] = None,
) -> None:
    """Evaluate encoders; what exists already is skipped, a failing task does not stop the others (exit code 1).

    Example: panfm evaluate run --encoder panfm:exports/first --shards shards/synthetic --tasks all --out results
    """
    from panfm.config import load_config
    from panfm.evaluation.run import EvaluateConfig, run_evaluation

    changes = list(overrides or ())
    if "=" in config:  # `panfm evaluate run key=value` without a config: the first word is an override too
        changes, config = [config, *changes], "default"
    given: dict[str, object] = {
        "encoders": encoder,
        "shards": shards or None,
        "tasks": _names(tasks) if tasks else None,
        "protocols": _names(protocols) if protocols else None,
        "fractions": _names(fractions) if fractions else None,
        "task_dir": str(task_dir) if task_dir else None,
        "out": str(out) if out else None,
    }
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    settings = load_config(EvaluateConfig, config, [*changes, *options], folder="configs/evaluate")
    summary = run_evaluation(settings)
    typer.echo(str(summary))
    raise typer.Exit(1 if summary.failures else 0)


@app.command("list")
def list_all(
    task_dir: Annotated[Path | None, typer.Option(help="Folder with task cards of your own.")] = None,
    shards: Annotated[
        list[str] | None, typer.Option(help="Shard sets, folders or URLs: then the list says which tasks they hold.")
    ] = None,
) -> None:
    """List the known tasks by family, modality and access: with --shards whether these hold them (here, lacking, -).

    lacking: shards of the source are there, but not what the task asks for (see panfm tasks check).

    Example: panfm evaluate list --shards shards/ham10000
    """
    from panfm.evaluation.task_check import format_tasks
    from panfm.evaluation.tasks import list_tasks, load_task
    from panfm.shards.index import open_shard_set

    cards = [load_task(name, task_dir) for name in list_tasks(task_dir)]
    typer.echo(format_tasks(cards, [open_shard_set(folder) for folder in shards or ()]))
