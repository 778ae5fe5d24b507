"""Records: the rows of a source's table before anything is hashed, kept compactly because an archive has millions.

    sources.read_records -> RecordBuilder.add(Record), ... -> RecordTable -> table[i], table.take(rows)

A Record is a view on one row; the table holds them as Arrow columns (about 100 bytes a row and its texts). Raw ids
live in here only, in memory; the writer hashes them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from panfm.shards.schema import Modality

CHUNK = 16_384  # rows that are held as Python objects at a time
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Record:
    """One image of a source, as its table says. `line` is its line in the table."""

    line: int
    path: Path
    raw_id: str  # what the sample's key is computed from: the key column, else the path in the archive
    modality: Modality
    member: str | None = None  # of the .zip or .hdf5 file that `path` then is
    mask_path: Path | None = None
    mask_member: str | None = None
    caption: str | None = None
    patient_id: str | None = None
    lesion_id: str | None = None
    slide_id: str | None = None
    visit_day: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # further fields of Sample, typed
    labels: dict[str, str] = field(default_factory=dict)
    tabular: dict[str, float | str | bool] = field(default_factory=dict)
    identifying: tuple[str, ...] = ()  # texts of the card's identifying_columns: looked for, never stored


_JSON = pa.dictionary(pa.int32(), pa.string())  # few distinct texts among many rows
_SCHEMA = pa.schema(
    [
        ("line", pa.int32()),
        ("path", pa.string()),
        ("raw_id", pa.string()),
        ("modality", _JSON),
        ("member", pa.string()),
        ("mask_path", pa.string()),
        ("mask_member", pa.string()),
        ("caption", pa.string()),
        ("patient_id", pa.string()),
        ("lesion_id", pa.string()),
        ("slide_id", pa.string()),
        ("visit_day", pa.int32()),
        ("metadata", _JSON),
        ("labels", _JSON),
        ("tabular", pa.string()),
        ("identifying", pa.string()),
    ]
)
_IN_JSON = ("metadata", "labels", "tabular", "identifying")


class RecordTable(Sequence[Record]):
    """Records as Arrow columns: a sequence, picklable, cheap to slice with `take`."""

    def __init__(self, table: pa.Table, root: Path, tabular_types: Mapping[str, type], label_version: int = 0) -> None:
        self.table = table
        self.root = root
        self.tabular_types = dict(tabular_types)
        self.label_version = label_version  # of the last correction that was applied; 0: none

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> "RecordTable": ...
    def __getitem__(self, place: int | slice) -> "Record | RecordTable":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._view(self.table.slice(place % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Record]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from (self._view(row) for row in batch.to_pylist())

    def take(self, rows: npt.ArrayLike) -> "RecordTable":
        """The records at `rows` (int [n]), in that order, as a table of their own."""
        taken = self.table.take(pa.array(np.asarray(rows, dtype=np.int64)))
        # A slice that is sent elsewhere must not carry the texts of all other rows along in its dictionaries.
        columns = [
            column.cast(pa.string()).dictionary_encode() if pa.types.is_dictionary(column.type) else column
            for column in taken.combine_chunks().columns
        ]
        return RecordTable(pa.table(columns, schema=_SCHEMA), self.root, self.tabular_types, self.label_version)

    def replace_column(self, name: str, values: pa.Array) -> "RecordTable":
        """The same records with another column."""
        place = _SCHEMA.get_field_index(name)
        changed = self.table.set_column(place, _SCHEMA.field(place), values)
        return RecordTable(changed, self.root, self.tabular_types, self.label_version)

    def count_labels(self) -> dict[str, Counter[str]]:
        """Count images by label name and value."""
        counts: dict[str, Counter[str]] = {}
        for pair in pc.value_counts(self.table["labels"].cast(pa.string())).to_pylist():
            for name, value in json.loads(pair["values"]).items():
                counts.setdefault(name, Counter())[value] += pair["counts"]
        return counts

    def _view(self, row: dict[str, Any]) -> Record:
        values = row | {name: json.loads(row[name]) for name in _IN_JSON}
        values["path"] = self.root / row["path"]
        values["mask_path"] = None if row["mask_path"] is None else self.root / row["mask_path"]
        values["identifying"] = tuple(values["identifying"])
        values["tabular"] = {
            column: TRUTH[text.lower()] if kind is bool else kind(text)
            for (column, kind), text in zip(self.tabular_types.items(), values["tabular"], strict=True)
            if text is not None
        }
        return Record(**values)


class RecordBuilder:
    """Collects rows into a RecordTable. Tabular values and paths are kept as text until a record is looked at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._chunks: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Add one row: the fields of Record; paths relative to the root, `tabular` a list of texts or None."""
        for name in _IN_JSON:
            row[name] = json.dumps(row[name], ensure_ascii=False)
        self._rows.append(row)
        if len(self._rows) >= CHUNK:
            self._flush()

    def build(self, tabular_types: Mapping[str, type], label_version: int = 0) -> RecordTable:
        """The table of all rows added; `tabular_types` names the tabular columns in the order of their values."""
        self._flush()
        table = pa.concat_tables(self._chunks).unify_dictionaries() if self._chunks else _SCHEMA.empty_table()
        return RecordTable(table, self.root, tabular_types, label_version)

    def _flush(self) -> None:
        if self._rows:
            self._chunks.append(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
            self._rows = []
