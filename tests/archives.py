"""Archives that tests draw: the card that states what every card must, and the table beside the images."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from panfm.shards.cards import SourceCard


def describe_source_card(name: str, **values: Any) -> dict[str, Any]:
    """The content of a card of drawn public images in table.csv; `values` add to it or change it, None takes away."""
    card = {
        "version": 1,
        "name": name,
        "title": name,
        "origin": "drawn by a test",
        "licence": "CC0 1.0",
        "permitted_uses": ["research"],
        "identifiers": "public",
        "synthetic": True,
        "access": "open",
        "how_to_obtain": "run the test",
        "table": "table.csv",
    }
    return {key: value for key, value in (card | values).items() if value is not None}


def make_source_card(name: str, **values: Any) -> SourceCard:
    """The same as a card."""
    return SourceCard.model_validate(describe_source_card(name, **values))


def write_table(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows of the same keys as a CSV file."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
