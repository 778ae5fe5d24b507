"""`panfm predict`: what a classifier folder says of images; the work is panfm_predict's, which needs no torch."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    folder: Annotated[Path, typer.Argument(help="Classifier folder that `panfm adapt` wrote.")],
    images: Annotated[
        list[str] | None, typer.Argument(help="Image files, or folders of images, with those inside them.")
    ] = None,
    prevalence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=SHARE", help="How common a class is where the images come from; repeat for several."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object with all answers.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="A table, one row an image.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0: as many as there are cores.")] = 0,
) -> None:
    """Predict images with a classifier folder: probabilities, operating point, and what is unlike the fitted images.

    For research only; gives no diagnosis. Without images: what the classifier is. An image that cannot be read is named
    and the others are predicted (exit code 1). `panfm-predict`, without panfm and torch, is the same.

    Example: panfm predict my_classifier a.jpg photos/ --prevalence melanoma=0.05
    """
    from panfm.errors import UserError

    try:
        from panfm_predict import PredictError
        from panfm_predict.cli import run as predict
    except ImportError as error:
        raise UserError(f"panfm predict needs {error.name}; run `pip install ./predict` in the checkout") from None
    if json and csv:
        raise UserError("--json and --csv are two forms of one answer; leave one out")
    try:
        code = predict(folder, images or [], prevalence or [], "json" if json else "csv" if csv else "text", threads)
    except PredictError as error:
        raise UserError(str(error)) from None
    raise typer.Exit(code)
