"""`panfm evaluate`: encoders x tasks x protocols x label fractions -> Result files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from panfm.evaluation.run_config import EvaluateConfig

app = typer.Typer(help="Measure frozen and fine-tuned encoders on tasks.", no_args_is_help=True)


def _names(text: str) -> str | list[str]:
    return text if text == "all" else [name.strip() for name in text.split(",") if name.strip()]


Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value pairs that change the config.")]
Encoders = Annotated[list[str] | None, typer.Option("--encoder", help="Encoder address; repeat for several.")]
Shards = Annotated[list[str] | None, typer.Option(help="Shard set, a folder or URL; repeat for several.")]
Tasks = Annotated[str | None, typer.Option(help="all, or names separated by commas.")]
Protocols = Annotated[str | None, typer.Option(help="all, or names separated by commas: linear_probe,knn,finetune")]
Fractions = Annotated[str | None, typer.Option(help="Shares of training patients with labels: 0.1,1.0")]
TaskDir = Annotated[Path | None, typer.Option(help="Folder with task cards of your own.")]
Out = Annotated[Path | None, typer.Option(help="Results folder.")]


@app.command("run")
def run(
    config: Config = "default",
    overrides: Overrides = None,
    encoder: Encoders = None,
    shards: Shards = None,
    tasks: Tasks = None,
    protocols: Protocols = None,
    fractions: Fractions = None,
    task_dir: TaskDir = None,
    out: Out = None,
    executor: Annotated[
        str | None, typer.Option(help="local, processes (as many as cores, or processes=N) or dask.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address or file of the Dask scheduler.")] = None,
) -> None:
    """Evaluate encoders; what exists already is skipped, a failing task does not stop the others (exit code 1).

    Example: panfm evaluate run --encoder panfm:exports/first --shards shards/synthetic --tasks all --out results
    """
    from panfm.evaluation.run import run_evaluation

    settings = _read_settings(
        config, overrides, encoder, shards, tasks, protocols, fractions, task_dir, out, executor, scheduler
    )
    summary = run_evaluation(settings)
    typer.echo(str(summary))
    raise typer.Exit(1 if summary.failures else 0)


@app.command("status")
def status(
    config: Config = "default",
    overrides: Overrides = None,
    encoder: Encoders = None,
    shards: Shards = None,
    tasks: Tasks = None,
    protocols: Protocols = None,
    fractions: Fractions = None,
    task_dir: TaskDir = None,
    out: Out = None,
) -> None:
    """Say what of an evaluation is measured, what is left and what cannot be had; takes the options of `run`.

    Example: panfm evaluate status --encoder panfm:exports/first --shards shards/synthetic --out results
    """
    from panfm.evaluation.run import check_evaluation

    settings = _read_settings(config, overrides, encoder, shards, tasks, protocols, fractions, task_dir, out)
    typer.echo(str(check_evaluation(settings)))


def _read_settings(
    config: str,
    overrides: list[str] | None,
    encoder: list[str] | None,
    shards: list[str] | None,
    tasks: str | None,
    protocols: str | None,
    fractions: str | None,
    task_dir: Path | None,
    out: Path | None,
    executor: str | None = None,
    scheduler: str | None = None,
) -> "EvaluateConfig":
    from panfm.config import load_config
    from panfm.evaluation.run_config import EvaluateConfig

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
        "executor": executor,
        "scheduler": scheduler,
    }
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return load_config(EvaluateConfig, config, [*changes, *options], folder="configs/evaluate")


@app.command("audit")
def audit(
    encoder: Annotated[str, typer.Option(help="Encoder address.")],
    shards: Annotated[str, typer.Option(help="Shard set of the task's source, a folder or URL.")],
    task: Annotated[str, typer.Option(help="Name of the task.")],
    task_dir: Annotated[Path | None, typer.Option(help="Folder with task cards of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the audit; default: task_audits/TASK/ENCODER.")] = None,
    cache_dir: Annotated[Path, typer.Option(help="Folder of the cached features.")] = Path("cache/features"),
) -> None:
    """Audit a task: institutions told from the features, labels that look wrong, agreement of its readers.

    The page shows images: keep it with the shards.

    Example: panfm evaluate audit --encoder panfm:exports/first --shards shards/ham10000 --task ham10000_diagnosis
    """
    import torch

    from panfm.encoder.load import load_encoder
    from panfm.evaluation.results import make_folder_name
    from panfm.evaluation.splits import load_split
    from panfm.evaluation.task_audit import audit_task
    from panfm.evaluation.task_audit_report import write_task_audit
    from panfm.evaluation.task_rows import find_classes
    from panfm.evaluation.tasks import load_task
    from panfm.features import compute_features
    from panfm.shards.index import open_shard_set

    shard_set = open_shard_set(shards)
    card = find_classes(load_task(task, task_dir), shard_set)
    split = load_split(card, shard_set, task_dir)
    loaded = load_encoder(encoder, device="cuda" if torch.cuda.is_available() else "cpu")
    features = compute_features(loaded, shard_set, cache_dir=cache_dir).values[split.rows]
    folder = out or Path("task_audits") / card.name / make_folder_name(loaded.name)
    typer.echo(write_task_audit(folder, audit_task(card, split, shard_set, features), card, split, shard_set, loaded))
    typer.echo(f"{folder}: audit.json, audit.txt, index.html")


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
