"""`panfm data`: what the loader makes of a run's images, before a GPU hour is spent on it."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at what a pretraining run will be fed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """With one command typer would drop its name; more will follow."""


@app.command("preview")
def preview(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one: debug_cpu.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key.sub=value pairs that change the config, for example augment.views=2"),
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG file to write; it shows pixels of patients.")] = Path("preview.png"),
    per_modality: Annotated[int, typer.Option(min=1, max=32, help="Samples of every modality.")] = 3,
    task_dir: Annotated[
        Path | None, typer.Option(help="Folder with task cards of your own: their test groups are kept out too.")
    ] = None,
) -> None:
    """Draw what training will see: stored images, their crops, the augmented views and the masks, by modality.

    The pictures are those of the run's first steps, bit for bit: the same config, shards, seed and exclusions.

    Example: panfm data preview debug_cpu augment.views=2 --out preview.png
    """
    from dataclasses import replace

    import torch

    from panfm.config import load_config
    from panfm.data.loader import build_loader
    from panfm.data.preview import write_preview
    from panfm.evaluation.contamination_list import find_copied, read_audit
    from panfm.evaluation.splits import compute_excluded
    from panfm.models.vit import build_vit, get_patch_grid
    from panfm.objectives.demands import get_mask_config
    from panfm.shards.index import open_shard_set
    from panfm.training.plan import PretrainConfig, check_config, check_local_size

    settings = load_config(PretrainConfig, config, overrides or (), folder="configs/pretrain")
    check_config(settings, "auto")
    shard_sets = [open_shard_set(path) for path in settings.data.shards]
    excluded = compute_excluded(settings.data.exclude.tasks, shard_sets, task_dir)
    if settings.data.exclude.audit is not None:
        excluded = replace(excluded, keys=find_copied(read_audit(settings.data.exclude.audit), shard_sets))
    with torch.device("meta"):  # the patches are asked for, not the weights
        vit = build_vit(replace(settings.encoder, init=None), seed=0)
    check_local_size(settings, vit.patch_embed.patch_size[0])
    mask, grid = get_mask_config(settings.objectives), get_patch_grid(vit)
    with build_loader(
        replace(settings.data, workers=0),
        settings.mixture,
        settings.augment,
        mask=mask,
        mask_grid=grid,
        seed=settings.engine.seed,
        global_batch_size=settings.engine.global_batch_size,
        micro_batch_size=settings.engine.micro_batch_size,
        excluded=excluded.groups,
        excluded_keys=excluded.keys,
    ) as loader:
        written = write_preview(
            loader,
            shard_sets,
            settings.augment,
            mask,
            grid,
            out,
            per_modality=per_modality,
            title=f"{Path(config).stem}: augmented views and masks",
        )
    typer.echo(str(written))
