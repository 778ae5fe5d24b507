"""`panfm embed`: images, folders of images, or shards -> features.parquet."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from panfm.encoder.load import Encoder
    from panfm.shards.storage import Location


def run(
    encoder: Annotated[str, typer.Argument(help="Encoder address: panfm:DIR, timm:NAME, timm:NAME@FILE, hf:DIR, ...")],
    paths: Annotated[
        list[str], typer.Argument(help="Images and folders of images, or shard sets: folders with index.json, URLs.")
    ],
    out: Annotated[
        Path, typer.Option(help="Parquet file to write: key, feature; of shards also source, group_id.")
    ] = Path("features.parquet"),
    cache: Annotated[
        Path, typer.Option(help="Folder that keeps what is done: a second run goes on from it. Ranks must share it.")
    ] = Path("cache/features"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Threads a rank that read and decode ahead.")] = 4,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; default: a GPU where there is one, each rank its own.")
    ] = None,
) -> None:
    """Compute frozen features of images or shards.

    A folder without index.json is searched for images, with all below it; an image that cannot be read is left out and
    named at the end (exit code 1). Under torchrun the ranks share the work and rank 0 writes the file.

    Example: panfm embed panfm:exports/first photos/ --out features.parquet

    Example: torchrun --nproc-per-node 8 -m panfm embed panfm:exports/first shards/clinic --workers 12
    """
    from contextlib import ExitStack, nullcontext

    from panfm.distributed import find_device, is_launched, is_main, process_group
    from panfm.encoder import load_encoder
    from panfm.errors import UserError
    from panfm.progress import muted
    from panfm.shards.storage import ShardUrl, parse_location

    if device is not None and device.startswith("cuda") and is_launched():
        raise UserError(f"--device {device}: under torchrun each rank takes its own GPU; leave it out, or give cpu")
    locations = [parse_location(path) for path in paths]
    sets = [path for path in locations if isinstance(path, ShardUrl) or (path / "index.json").is_file()]
    others = [path for path in locations if isinstance(path, Path) and path not in sets]
    if sets and others:
        raise UserError(f"{sets[0]} is a shard set and {others[0]} is not; embed the two in separate calls")
    model = load_encoder(encoder, device=device or find_device())
    with process_group(model.device) if is_launched() else nullcontext(), ExitStack() as quiet:
        if is_main():
            typer.echo(model.describe())
        else:
            quiet.enter_context(muted())
        if sets:
            _embed_shards(model, sets, out, cache, batch_size, workers)
        else:
            _embed_files(model, others, out, cache, batch_size, workers)


def _embed_shards(
    model: "Encoder", sets: "list[Location]", out: Path, cache: Path, batch_size: int, workers: int
) -> None:
    import numpy as np

    from panfm.distributed import barrier, get_rank, get_world_size, is_main
    from panfm.features import compute_features, compute_share, write_features
    from panfm.shards.index import open_shard_set

    shard_sets = [open_shard_set(location) for location in sets]
    if get_world_size() > 1:
        for shard_set in shard_sets:
            compute_share(
                model, shard_set, get_rank(), get_world_size(),
                cache_dir=cache, batch_size=batch_size, workers=workers,
            )  # fmt: skip
        barrier()
    if not is_main():
        return
    parts = [
        compute_features(model, shard_set, cache_dir=cache, batch_size=batch_size, workers=workers)
        for shard_set in shard_sets
    ]
    columns = {
        name: [value for shard_set in shard_sets for value in shard_set.table[name].to_pylist()]
        for name in ("source", "group_id")
    }
    keys = [key for part in parts for key in part.keys]
    write_features(out, keys, np.concatenate([part.values for part in parts]), model.list_facts(), columns)
    typer.echo(f"{out}: {len(keys)} features of {model.embed_dim} dimensions from {model.name}")


def _embed_files(model: "Encoder", given: list[Path], out: Path, cache: Path, batch_size: int, workers: int) -> None:
    from panfm.errors import UserError
    from panfm.features import write_features
    from panfm.file_features import compute_file_features, group_faults, list_images

    images = list_images(given)
    found = compute_file_features(model, images.paths, cache_dir=cache, batch_size=batch_size, workers=workers)
    if found is None:  # rank 0 has it
        return
    names = [str(path) for path in images.paths]
    faults = group_faults(found.faults, names)
    if not found.numbers:
        raise UserError(f"no image of {len(names)} can be read, so nothing is written: {faults}")
    write_features(out, [names[number] for number in found.numbers], found.values, model.list_facts())
    ignored = f"; {images.num_others} other files in the folders were not looked at" if images.num_others else ""
    typer.echo(f"{out}: {len(found.numbers)} features of {model.embed_dim} dimensions from {model.name}{ignored}")
    if found.faults:
        typer.echo(f"left out, {len(found.faults)} of {len(names)} images: {faults}", err=True)
        raise typer.Exit(1)
