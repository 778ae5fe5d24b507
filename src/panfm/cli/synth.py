"""`panfm synth`: draw a synthetic archive."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet or be empty.")],
    patients: Annotated[int, typer.Option(min=1, help="Number of patients.")] = 200,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Local processes to draw with.")] = 2,
) -> None:
    """Draw a synthetic archive: four modalities, lesions over visits, slides, masks, metadata with gaps, outcomes.

    Example: panfm synth archive --patients 200 --seed 0
    """
    from panfm.shards.synthetic import write_archive

    summary = write_archive(out, num_patients=patients, seed=seed, processes=processes)
    typer.echo(str(summary))
    typer.echo(f"next: panfm shards build synthetic --root {out} --out shards/synthetic")
