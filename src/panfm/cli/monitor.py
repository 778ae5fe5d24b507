"""`panfm monitor`: do new images still look like those that a classifier was fitted on?"""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = {"no_drift": 0, "drift": 3, "too_few": 4}
EXIT_FAILED = 1


def run(
    folder: Annotated[Path, typer.Argument(help="Classifier folder that `panfm adapt` wrote.")],
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders of them, or a table (CSV, Excel): image[, patient].")
    ],
    out: Annotated[Path, typer.Option(help="Folder for drift.html, drift.json and the history of all runs.")] = Path(
        "drift"
    ),
    label: Annotated[
        str | None, typer.Option(help="Name of this run, default the week; the same name replaces its earlier run.")
    ] = None,
    rate: Annotated[float, typer.Option(help="How often an alarm may be raised where nothing changed.")] = 0.01,
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0: as many as there are cores.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the randomisation tests.")] = 0,
) -> None:
    """Compare new images with what a classifier was fitted on; run it weekly. For research only, no diagnosis.

    Exit code: 0 no change found, 3 the images have changed, 4 too few patients to tell, 1 no change found but some
    image could not be read, 2 wrong input. Name patients (a table with image, patient) where somebody has several.

    Example: panfm monitor my_classifier this_week.csv --out drift

    Example: panfm monitor my_classifier photos/2026-11/ --label november
    """
    from panfm.errors import UserError

    if find_spec("panfm_predict") is None:
        raise UserError("panfm monitor needs panfm_predict; run `pip install ./predict` in the checkout")
    from panfm.clinic.monitor import PAGE, monitor

    found = monitor(folder, images, out, label=label, rate=rate, threads=threads, seed=seed)
    for line in found.failed:
        typer.echo(line, err=True)
    if found.report["images"]["grouping"] == "image":
        typer.echo("WARNING: patients are not named; alarms are too frequent where one has several images", err=True)
    typer.echo(f"{found.report['label']}: {found.drift.verdict.replace('_', ' ')}")
    for sentence in found.report["advice"]:
        typer.echo(f"- {sentence}")
    typer.echo(f"read {out / PAGE}. {found.report['warning']}")
    code = EXIT_CODES[found.drift.verdict]
    raise typer.Exit(EXIT_FAILED if code == 0 and found.failed else code)
