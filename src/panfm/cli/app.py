"""`panfm app`: a classifier folder as a page on this computer; the work is panfm_predict's, which needs no torch."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    folder: Annotated[Path, typer.Argument(help="Classifier folder that `panfm adapt` wrote.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page; --no-browser prints its address only.")] = True,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0: as many as there are cores.")] = 0,
) -> None:
    """Open a classifier as a page in this computer's browser (English, French): drag an image in, see what it says.

    For research only; gives no diagnosis. Nobody but this computer's browser can ask, and only with the address that is
    printed. Images are neither stored nor sent elsewhere. `panfm-predict app`, without panfm and torch, is the same.

    Example: panfm app my_classifier
    """
    from panfm.errors import UserError

    try:
        from panfm_predict import PredictError
        from panfm_predict.app.server import run_app
    except ImportError as error:
        raise UserError(f"panfm app needs {error.name}; run `pip install ./predict` in the checkout") from None
    try:
        run_app(folder, port, browser, threads)
    except PredictError as error:
        raise UserError(str(error)) from None
