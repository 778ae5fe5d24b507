"""`panfm export`: a checkpoint becomes a folder that timm and panfm read."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its newest whole checkpoint) or one checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    use: Annotated[
        Literal["research", "education", "commercial"] | None,
        typer.Option(help="What for; default: what it was trained for. Every source of its training must permit it."),
    ] = None,
) -> None:
    """Export the encoder: safetensors weights, config and evaluation transform in one folder, readable by timm.

    Example: panfm export runs/first --out exports/first
    """
    from panfm.encoder.export import export_encoder

    folder = export_encoder(checkpoint, out, use=use)
    typer.echo(f'{folder}: load it with timm.create_model("local-dir:{folder}", pretrained=True) or panfm:{folder}')
