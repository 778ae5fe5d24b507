"""`panfm export`: a checkpoint becomes a folder that timm and panfm read, or an encoder a graph that needs no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from panfm.encoder.load import Encoder
    from panfm.encoder.onnx import Images, OnnxCheck


def run(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A run folder (its newest whole checkpoint) or one checkpoint; for onnx also any encoder."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    to: Annotated[
        Literal["timm", "hf", "onnx"],
        typer.Option(help="timm: read by timm and panfm; hf: by transformers, too; onnx: without torch."),
    ] = "timm",
    use: Annotated[
        Literal["research", "education", "commercial"] | None,
        typer.Option(help="What for; default: what it was trained for. Every source of its training must permit it."),
    ] = None,
    shards: Annotated[
        list[str] | None, typer.Option(help="onnx: shard set whose images calibrate int8; repeat for several.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=2, help="onnx: how many of them, half to calibrate, all to check.")] = (
        256
    ),
) -> None:
    """Export the encoder: safetensors weights, config and evaluation transform in one folder, readable by timm.

    --to onnx takes a run or an encoder address (panfm:DIR, panderm:FILE, ...) and writes model.onnx, with --shards also
    model.int8.onnx, each checked against PyTorch.

    Example: panfm export runs/first --out exports/first

    Example: panfm export panfm:exports/first --to onnx --shards shards/clinic --out exports/first-onnx
    """
    from tempfile import TemporaryDirectory

    from panfm.encoder.export import export_encoder
    from panfm.errors import UserError

    if to == "onnx" and Path(checkpoint).is_dir():
        with TemporaryDirectory() as scratch:
            folder = export_encoder(Path(checkpoint), Path(scratch) / out.name, use=use)
            typer.echo(_export_onnx(f"panfm:{folder}", out, shards or [], num_images))
        return
    if to == "onnx":
        if use is not None:
            raise UserError("--use is decided when a run is exported; an encoder's ONNX folder carries its use on")
        typer.echo(_export_onnx(checkpoint, out, shards or [], num_images))
        return
    if shards:
        raise UserError("--shards calibrates int8, which --to onnx writes; leave it out, or add --to onnx")
    folder = export_encoder(Path(checkpoint), out, use=use, layout=to)
    typer.echo(f'{folder}: load it with timm.create_model("local-dir:{folder}", pretrained=True) or panfm:{folder}')


def _export_onnx(address: str, out: Path, shards: list[str], num_images: int) -> str:
    from panfm.encoder.load import load_encoder
    from panfm.encoder.onnx import export_onnx
    from panfm.errors import UserError

    if ":" not in address:
        raise UserError(f"{address}: no such run, and no encoder address; name a run folder, or panfm:DIR of an export")
    encoder = load_encoder(address)
    images = _draw_images(encoder, shards, num_images) if shards else None
    return f"{out}: {_describe(export_onnx(encoder, out, images))}"


def _draw_images(encoder: "Encoder", shards: list[str], num_images: int) -> "Images":
    """Images of the shard sets, as many of each, chosen by a fixed seed, as the encoder's transform delivers them."""
    import numpy as np

    from panfm.shards.index import open_shard_set

    drawn = []
    for folder in shards:
        shard_set = open_shard_set(folder)
        number = min(shard_set.num_samples, max(2, num_images // len(shards)))
        rows = np.random.default_rng(0).choice(shard_set.num_samples, number, replace=False)
        drawn += [encoder.transform.apply(shard_set.read_image(int(row))) for row in rows]
    return np.stack([drawn[place] for place in np.random.default_rng(1).permutation(len(drawn))])


def _describe(check: "OnnxCheck") -> str:
    text = f"differs from PyTorch by at most {check.fp32_difference:.1e} of the largest feature"
    if check.int8_cosine_mean is None or check.int8_cosine_min is None:
        return f"{text} ({check.num_images} images of random pixels); no int8 without --shards"
    return (
        f"{text}; int8: cosine {check.int8_cosine_mean:.5f} on average, {check.int8_cosine_min:.5f} at worst "
        f"({check.num_images} images)"
    )
