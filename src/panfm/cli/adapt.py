"""`panfm adapt`: a clinic's own few labelled images -> a classifier folder, with a report of what it is worth."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    encoder: Annotated[str, typer.Argument(help="Encoder address: panfm:DIR, timm:NAME@FILE, panderm:FILE, ...")],
    csv: Annotated[
        Path,
        typer.Option("--csv", help="Table (CSV, Excel, ...) with the columns image, label[, patient][, modality]."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder to write. An earlier version in it is kept beside it, as OUT-v1."),
    ] = Path("my_classifier"),
    images: Annotated[
        Path | None, typer.Option(help="Folder that the table's paths start in; default: the table's own.")
    ] = None,
    method: Annotated[
        Literal["probe", "lora"],
        typer.Option(help="probe: frozen encoder, seconds. lora: the encoder changes a little; wants a GPU."),
    ] = "probe",
    positive: Annotated[str | None, typer.Option(help="Label of interest, for the operating point.")] = None,
    sensitivity: Annotated[
        float | None, typer.Option(help="Share of the positives to be flagged, 0.95; needs --positive.")
    ] = None,
    specificity: Annotated[
        float | None, typer.Option(help="Or: share of the others not to be flagged, 0.9; needs --positive.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="What the images are: dermoscopic, clinical, total_body, histopathology, ...")
    ] = None,
    other_modalities: Annotated[
        Path | None,
        typer.Option(help="Table of images that do not belong: columns image, modality[, patient]; ten of each."),
    ] = None,
    keep_cases: Annotated[
        bool,
        typer.Option(
            "--keep-cases", help="Keep small copies for 'similar cases': the folder then holds patients' data."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode images.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="lora: passes over the images, fixed beforehand.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Of folds and LoRA; the same seed gives the same classifier.")] = 0,
) -> None:
    """Fit a classifier on your own labelled images and say honestly what it is worth; research only.

    Writes a folder for `panfm predict` and `panfm app`: encoder, head, threshold card, report.md, report.html, lock.

    Example: panfm adapt panfm:exports/first --csv my_labels.csv --out my_classifier

    Example: panfm adapt panfm:exports/first --csv my_labels.csv --positive melanoma --sensitivity 0.95
    """
    from panfm.errors import UserError

    if find_spec("panfm_predict") is None:
        raise UserError("panfm adapt needs panfm_predict; run `pip install ./predict` in the checkout")
    from panfm.clinic.adapt import adapt
    from panfm.clinic.page import show
    from panfm.clinic.threshold import OperatingCard, Wanted

    if sensitivity is not None and specificity is not None:
        raise UserError("--sensitivity and --specificity: a threshold can be set for one of them; give one")
    wanted = None
    if sensitivity is not None:
        wanted = Wanted("sensitivity", sensitivity)
    elif specificity is not None:
        wanted = Wanted("specificity", specificity)
    made = adapt(
        encoder, csv, out, images=images, method=method, positive=positive, wanted=wanted, modality=modality,
        other_modalities=other_modalities, keep_cases=keep_cases, device=device, workers=workers, epochs=epochs,
        seed=seed,
    )  # fmt: skip
    table, point = made.table, made.fitted.card
    if table.num_repeated:
        typer.echo(f"{table.num_repeated} lines repeat an image and were left out")
    if table.grouping == "image":
        typer.echo("WARNING: no column `patient`: figures may be too good where a patient has several images", err=True)
    if made.copies:
        first, second = (table.paths[place] for place in made.copies[0])
        typer.echo(
            f"WARNING: {len(made.copies)} times two images of different {table.grouping}s look like one photograph, "
            f"first {first} and {second}; they were held together in all folds",
            err=True,
        )
    people = f" of {len(set(table.groups)):,} patients" if table.grouping == "patient" else ""
    typer.echo(f"{out}: version {made.place.version}, {len(table.paths):,} images{people}")
    if made.place.previous is not None:
        typer.echo(f"the version before it is kept in {made.place.previous}")
    typer.echo(f"AUROC {show(made.figures.overall['auroc'])}")
    if isinstance(point, OperatingCard):
        typer.echo(
            f"flags {point.positive} from {point.threshold:.3g}: sensitivity {show(point.sensitivity, percent=True)}, "
            f"specificity {show(point.specificity, percent=True)}"
        )
    else:
        typer.echo(f"no operating point: {point}")
    typer.echo(f"read {out / 'report.html'} first. For research only, not a diagnosis.")
