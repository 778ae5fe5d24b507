"""The lines that every benchmark here ends in, and the file that `--json` writes: a list of rows."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of a table; a ratio above 1 means that panfm is better (each benchmark says what its peer is)."""

    name: str
    ours: float
    peer: float
    ratio: float
    unit: str


def write_rows(path: Path | None, rows: Sequence[Row]) -> None:
    """Write rows as JSON where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
