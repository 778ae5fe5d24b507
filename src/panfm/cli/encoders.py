"""`panfm encoders`: what can be loaded, and what must be fetched first."""

from typing import Annotated

import typer


def run(
    ready: Annotated[bool, typer.Option("--ready", help="Only those that load as things stand.")] = False,
) -> None:
    """List encoders: address, licence, size, feature (dimension, pooling, image size), and whether they are here.

    Nothing is downloaded. Where weights are missing, the command that fetches them is shown: run it where there is a
    network, and carry the cache or the file over.

    Example: panfm encoders --ready
    """
    from rich.table import Table
    from rich.text import Text

    from panfm.encoder.catalogue import format_size, list_encoders
    from panfm.progress import print_output

    table = Table(title="Encoders that panfm reads", title_justify="left")
    for head in ("Encoder", "Address", "Licence", "Size", "Feature", "Trained on", "Weights"):
        table.add_column(head, overflow="fold")
    offers = [offer for offer in list_encoders() if offer.ready or not ready]
    for offer in offers:
        texts = (offer.title, offer.address, offer.licence, format_size(offer), offer.feature, offer.training_data)
        table.add_row(*map(Text, texts), Text("here" if offer.ready else "to be fetched"))
    print_output(table)
    commands = [offer.fetch for offer in offers if offer.fetch.startswith("hf ")]
    if commands:
        typer.echo("Where there is a network, into the cache that is then carried over:")
        typer.echo("\n".join(f"  {command}" for command in commands))
    typer.echo(
        "Options: ?image_size=PIXELS&pooling=cls|mean|cls_mean|map&dtype=fp32|bf16. Files: .safetensors, or torch's "
        ".pth read as tensors only. The licence that binds is the publisher's own text."
    )
