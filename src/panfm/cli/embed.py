"""`panfm embed`: images or shards -> features.parquet."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    encoder: Annotated[str, typer.Argument(help="Encoder address: panfm:DIR, timm:NAME, timm:NAME@FILE, hf:DIR, ...")],
    paths: Annotated[list[str], typer.Argument(help="Image files, or shard sets: folders or URLs.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: key, feature.")] = Path("features.parquet"),
    cache: Annotated[Path, typer.Option(help="Feature cache for shards; a second run goes on from it.")] = Path(
        "cache/features"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Compute frozen features of images or shards.

    Example: panfm embed panfm:exports/first shards/synthetic --out features.parquet
    """
    import numpy as np

    from panfm.encoder import load_encoder
    from panfm.errors import UserError
    from panfm.features import compute_features, write_features
    from panfm.shards.index import open_shard_set
    from panfm.shards.storage import ShardUrl, parse_location

    locations = [parse_location(path) for path in paths]
    folders = [path for path in locations if isinstance(path, ShardUrl) or path.is_dir()]
    files = [path for path in locations if isinstance(path, Path) and not path.is_dir()]
    model = load_encoder(encoder, device=device)
    if folders and files:
        raise UserError(f"{files[0]} is a file and {folders[0]} a folder of shards; embed the two in separate calls")
    if files:
        keys, values = [str(path) for path in files], model.embed(files)
    else:
        parts = [compute_features(model, open_shard_set(folder), cache_dir=cache) for folder in folders]
        keys = [key for part in parts for key in part.keys]
        values = np.concatenate([part.values for part in parts])
    write_features(out, keys, values, {"encoder": model.address, "encoder_hash": model.hash})
    typer.echo(f"{out}: {len(keys)} features of {model.embed_dim} dimensions from {model.name}")
