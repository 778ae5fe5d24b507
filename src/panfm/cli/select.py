"""`panfm select`: which unlabelled images to label next."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    encoder: Annotated[str, typer.Argument(help="Encoder address, or a classifier folder that `panfm adapt` wrote.")],
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders of them, or a table (CSV, Excel): image[, patient].")
    ],
    num: Annotated[int, typer.Option(min=1, help="How many images to propose.")] = 50,
    out: Annotated[
        Path, typer.Option(help="Table to write, label to be filled in: image[, patient], label, reason.")
    ] = Path("to_label.csv"),
    labelled: Annotated[
        Path | None, typer.Option(help="Table of images that have labels: what resembles them is not proposed.")
    ] = None,
    per_patient: Annotated[int, typer.Option(min=1, help="At most so many images of one patient.")] = 2,
    by: Annotated[
        Literal["diversity", "uncertainty", "random"],
        typer.Option(
            help="diversity: unlike each other. uncertainty: and where the classifier doubts, which finds more of a "
            "rare class; needs a classifier folder. random: neither."
        ),
    ] = "diversity",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1; for an encoder address.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Processor threads of a classifier folder; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed proposes the same images.")] = 0,
) -> None:
    """Propose which unlabelled images to label next, with a reason each; fill in the table and give it to panfm adapt.

    Near-duplicates are not proposed twice, nor more than --per-patient images of a patient. Research only.

    Example: panfm select panfm:exports/first photos/ --num 50 --out to_label.csv

    Example: panfm select my_classifier new.csv --labelled my_labels.csv --by uncertainty
    """
    from panfm.errors import UserError

    if find_spec("panfm_predict") is None:
        raise UserError("panfm select needs panfm_predict; run `pip install ./predict` in the checkout")
    from panfm.clinic.select import select
    from panfm_predict.card import WARNING

    made = select(
        encoder, images, out, num=num, labelled=labelled, per_patient=per_patient, by=by, device=device,
        threads=threads, seed=seed,
    )  # fmt: skip
    for line in made.failed:
        typer.echo(line, err=True)
    left_out = [f"{made.num_near_duplicates} resemble a labelled or chosen one too closely"]
    if made.images.grouping == "patient":
        left_out.append(f"{made.num_capped} are of a patient who has {per_patient} already")
    else:
        typer.echo("WARNING: patients are not named; one may have several of these images", err=True)
    typer.echo(f"{out}: {len(made.picks)} of {len(made.images.paths):,} images; {', '.join(left_out)}")
    if len(made.picks) < num:
        typer.echo(f"{num - len(made.picks)} fewer than asked for: no others are left")
    typer.echo(f"fill in the column label, then: panfm adapt ENCODER --csv {out}. {WARNING}")
    raise typer.Exit(1 if made.failed else 0)
