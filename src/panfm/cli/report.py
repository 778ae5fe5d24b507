"""`panfm report --privacy`: what a data protection officer asks for, as one page."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    privacy: Annotated[
        list[str], typer.Option("--privacy", help="A shard set, a folder or URL; repeat the option for several.")
    ],
    more: Annotated[list[str] | None, typer.Argument(help="Further shard sets.")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file; the same page lies beside it as .html.")] = Path(
        "privacy.md"
    ),
    age_band: Annotated[int, typer.Option(min=1, help="Width of age classes for k-anonymity, in years.")] = 5,
) -> None:
    """Write data flow, fields kept, k-anonymity of the metadata, retention and key custody; open points come first.

    Pseudonymised is not anonymous, and the page says so. It shows counts, never rows.

    Example: panfm report --privacy shards/clinic --out privacy.md
    """
    from panfm.shards.index import open_shard_set
    from panfm.shards.privacy_report import build_privacy_report, write_privacy_report

    shard_sets = [open_shard_set(folder) for folder in [*privacy, *(more or ())]]
    report = build_privacy_report(shard_sets, age_band=age_band)
    paths = write_privacy_report(report, out)
    for path in paths:
        typer.echo(str(path))
    typer.echo(f"{report.num_open} open points" if report.num_open else "no open points")
