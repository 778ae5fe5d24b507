"""`panfm pretrain`: train an encoder; the same command on one process and under torchrun."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one: debug_cpu.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key.sub=value pairs that change the config, for example optim.base_lr=1e-3"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name of the config>.")] = None,
    task_dir: Annotated[
        Path | None, typer.Option(help="Folder with task cards of your own: their test groups are kept out too.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: go on from the newest whole checkpoint in the run folder; never: refuse one there."),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, take two steps, print the plan; write nothing.")
    ] = False,
) -> None:
    """Pretrain an encoder on shards; the test groups of every known task are kept out (data.exclude).

    data.exclude.audit=DIR keeps out what `panfm audit` listed, too: copies of test images.

    Example: panfm pretrain debug_cpu optim.base_lr=5e-4 --out runs/first

    On several processes: torchrun --nproc_per_node=2 -m panfm pretrain debug_cpu ...

    Exit codes: 0 finished; 75 stopped by SIGTERM or SIGUSR1 and saved: run the same command again; 2 a wrong setting or
    a full disk; 4 diverged; 5 alarmed; 6 a rank hung; 7 shards that cannot be read any more; 8 another rank was lost.
    Whatever it was, the same command goes on from the newest checkpoint (docs/reliability.md).
    """
    from panfm.config import load_config
    from panfm.evaluation.contamination_list import find_copied, read_audit
    from panfm.evaluation.splits import compute_excluded
    from panfm.shards.index import open_shard_set
    from panfm.training.pretrain import PretrainConfig, pretrain

    settings = load_config(PretrainConfig, config, overrides or (), folder="configs/pretrain")
    # The evaluation room knows which groups are tested on, the training room must not see them: both meet here.
    shard_sets = [open_shard_set(path) for path in settings.data.shards]
    excluded = compute_excluded(settings.data.exclude.tasks, shard_sets, task_dir)
    if settings.data.exclude.audit is not None:
        audit = read_audit(settings.data.exclude.audit)
        excluded = replace(excluded, keys=find_copied(audit, shard_sets), audit=audit.hash)
    del shard_sets  # their tables, about 1 KB a row, are not needed any more
    if dry_run:
        from panfm.training.dry_run import dry_run as run_dry

        run_dry(settings, excluded=excluded)
        raise typer.Exit(0)
    folder = out or Path("runs") / Path(config).stem
    summary = pretrain(settings, out=folder, excluded=excluded, resume=resume)
    raise typer.Exit(summary.exit_code)
