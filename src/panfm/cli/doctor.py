"""`panfm doctor`: is this machine ready, and under torchrun: are all ranks, for this run?"""

import os
from pathlib import Path
from typing import Annotated

import typer


def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value pairs that change the config that --config names.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the run will write: its disk is measured.")] = Path(),
    shards: Annotated[
        list[str] | None, typer.Option(help="Shard set that the run will read; repeat for several.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Pretraining config, a file or a shipped name: its memory, speed and hours.")
    ] = None,
) -> None:
    """Check this machine: versions, devices, threads, disk, matrix rate; says what to do where it is not well.

    Under torchrun every rank is checked, and what they are to each other: versions, all-reduce, disk, shards.

    Example: panfm doctor

    Example: torchrun --nproc_per_node=8 -m panfm doctor --config panfm_vitb --shards shards/mine --folder runs
    """
    from panfm.config import load_config
    from panfm.errors import UserError
    from panfm.training.doctor_ranks import examine
    from panfm.training.plan import PretrainConfig

    if overrides and config is None:
        raise UserError(f"{overrides[0]}: changes a config, and none is named; add --config NAME")
    settings = None if config is None else load_config(PretrainConfig, config, overrides or (), "configs/pretrain")
    checks = examine(folder.resolve(), tuple(shards or ()), settings)
    width = max(len(check.name) for check in checks)
    if os.environ.get("RANK", "0") == "0":  # every rank has the same list
        for check in checks:
            typer.echo(f"{'ok ' if check.ok else 'NO '} {check.name:<{width}}  {check.detail}")
            if not check.ok:
                typer.echo(f"    {'':<{width}}  -> {check.way_out}")
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)
