"""`panfm shards`: raw images and slides -> tar shards + index, and a look inside."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Turn an archive into shards, and look inside them.", no_args_is_help=True)


@app.command("build")
def build(
    card: Annotated[
        str, typer.Argument(help="Source card: a YAML file, or the name of a shipped one (panfm shards cards).")
    ],
    root: Annotated[Path, typer.Option(help="Folder of the raw images, laid out as the card says.")],
    out: Annotated[Path, typer.Option(help="Folder of the shard set to write.")],
    key_file: Annotated[
        Path | None,
        typer.Option(help="Secret key for the ids of private sources, outside --out."),
    ] = None,
    create_key: Annotated[bool, typer.Option(help="Make the key file, once; then keep it safe.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Local processes.")] = 2,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Build option as key=value, for example --set short_side=384")
    ] = None,
) -> None:
    """Build shards; a build that was killed goes on where it stopped, and ends with the same bytes.

    Example: panfm shards build synthetic --root archive --out shards/synthetic
    """
    from panfm.config import merge, parse_override, validate
    from panfm.shards.cards import load_card
    from panfm.shards.writer import BuildOptions, build_shards

    values: dict[str, object] = {
        "processes": processes,
        "key_file": str(key_file) if key_file else None,
        "create_key": create_key,
    }
    for override in overrides or ():
        values = merge(values, parse_override(override))
    report = build_shards(load_card(card), root, out, options=validate(BuildOptions, values, where="--set"))
    typer.echo(str(report))


@app.command("inspect")
def inspect(
    folder: Annotated[Path, typer.Argument(help="A shard set.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of images to this PNG.")] = None,
) -> None:
    """Show what a shard set holds: counts by modality, label, site, phototype, what is missing; a contact sheet.

    Example: panfm shards inspect shards/synthetic --sheet sheet.png
    """
    from panfm.shards.index import open_shard_set
    from panfm.shards.inspect import draw_contact_sheet, summarise

    shard_set = open_shard_set(folder)
    typer.echo(str(summarise(shard_set)))
    if sheet is not None:
        draw_contact_sheet(shard_set, sheet)
        typer.echo(f"{sheet}: contact sheet")


@app.command("cards")
def cards() -> None:
    """List the shipped source cards.

    Example: panfm shards cards
    """
    from panfm.shards.cards import list_cards, load_card

    for name in list_cards():
        card = load_card(name)
        typer.echo(f"{name:<24} {card.licence:<16.16} {card.title}")
