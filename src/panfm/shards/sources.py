"""From a source's table to Records: the first step on the user's own files. No image is opened here.

    SourceCard + ROOT/table.csv  ->  one Record a row: files, raw ids, typed metadata  ->  writer.build_shards

Raw ids and dates live in Records only, in memory; the writer hashes the ids, and dates are days since the first visit
by the time that they are here. Every fault of the table is a UserError that names file, line, column, value and rule.
"""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from panfm.errors import UserError
from panfm.shards.cards import ColumnField, SourceCard
from panfm.shards.schema import MODALITIES, Confirmation, Modality

CLOSED: dict[ColumnField, tuple[str, ...]] = {
    "modality": MODALITIES,
    "sex": ("female", "male", "other"),
    "confirmed_by": get_args(Confirmation),
}
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Record:
    """One row of a source's table, before anything is hashed. `line` is its line in the table."""

    line: int
    path: Path
    raw_id: str  # what the sample's key is computed from: the key column, else the path in the archive
    modality: Modality
    mask_path: Path | None = None
    caption: str | None = None
    patient_id: str | None = None
    lesion_id: str | None = None
    slide_id: str | None = None
    visit_day: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # further fields of Sample, typed
    labels: dict[str, str] = field(default_factory=dict)
    tabular: dict[str, float | str | bool] = field(default_factory=dict)


def read_records(card: SourceCard, root: Path) -> list[Record]:
    """Read the table of a source below `root` into Records, in the table's order.

    Raises UserError for a missing or empty table, a column that the card names and the table lacks, a value outside a
    closed map or set, a number or date that is none, two rows with one key, and ids that contradict each other.
    """
    table = root / card.table
    lines = _read_table(card, table)
    tabular_types = {column: _infer_type(card, (row[column] for _, row in lines)) for column in card.tabular}
    records: list[Record] = []
    dates: list[date | None] = []
    for line, row in lines:
        cells = _Cells(card, table, line, row)
        records.append(_read_record(card, root, cells, tabular_types))
        dates.append(cells.parse("visit_date", lambda text: datetime.strptime(text, card.date_format).date()))
    _check_keys(records, table)
    records = _complete_patients(card, records, table)
    if "visit_date" in card.columns:
        records = _compute_visit_days(records, dates)
    return records


def compare_with_expected(card: SourceCard, records: Iterable[Record]) -> tuple[str, ...]:
    """Say where the counts of the records differ from those that the card expects; empty if nowhere."""
    records = list(records)
    differences = []
    if card.expected.images is not None and len(records) != card.expected.images:
        differences.append(f"{len(records)} images, {card.expected.images} expected")
    for label, expected in card.expected.labels.items():
        found = Counter(record.labels[label] for record in records if label in record.labels)
        for value in sorted(set(expected) | set(found)):
            if found[value] != expected.get(value, 0):
                differences.append(f"{label} {value}: {found[value]}, {expected.get(value, 0)} expected")
    return tuple(differences)


def _read_table(card: SourceCard, table: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of the CSV with their line numbers, cells stripped; columns checked against the card."""
    if not table.parent.is_dir():
        raise UserError(f"{table.parent}: no such folder; --root must be the folder that holds {card.table}")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise UserError(
            f"{table}: no such file; card {card.name} reads its table there, so check --root or the card's table"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: byte {error.start} is not UTF-8; save the table as UTF-8 CSV") from None
    except csv.Error as error:
        raise UserError(f"{table}, line {reader.line_num}: not valid CSV ({error})") from None
    named = [(f"columns.{name}", column) for name, column in card.columns.items()]
    named += [(f"labels.{name}", label.column) for name, label in card.labels.items()]
    named += [("tabular", column) for column in card.tabular]
    named += [("only", column) for column in card.only]
    for where, column in named:
        if column not in header:
            near = get_close_matches(column, header, n=1, cutoff=0.4)
            hint = f"the nearest is {near[0]}" if near else f"it has {', '.join(header) or 'none'}"
            raise UserError(f"{table}: has no column {column}, which {where} of card {card.name} names; {hint}")
    if not rows:
        raise UserError(f"{table}: has no rows; an empty archive cannot become shards")
    for line, row in rows:
        if None in row or None in row.values():
            raise UserError(
                f"{table}, line {line}: has not as many cells as the header ({len(header)}); repair the row"
            )
    stripped = [(line, {name: cell.strip() for name, cell in row.items()}) for line, row in rows]
    kept = [(line, row) for line, row in stripped if all(row[name] in texts for name, texts in card.only.items())]
    if not kept:
        raise UserError(f"{table}: none of its {len(rows)} rows is among those that `only` of card {card.name} keeps")
    return kept


@dataclass(frozen=True)
class _Cells:
    """One row seen through the card: unknown cells are None, values are mapped, faults name their place."""

    card: SourceCard
    table: Path
    line: int
    row: Mapping[str, str]

    def text(self, name: ColumnField) -> str | None:
        """The mapped value of a field, or None where it is unknown or has no column."""
        if (column := self.card.columns.get(name)) is None:
            return None
        value = self.mapped(column, self.card.values.get(name), f"values.{name}")
        if value is not None and name in CLOSED and value not in CLOSED[name]:
            self.fail(column, value, f"it must be one of {', '.join(CLOSED[name])}; map it under values.{name}")
        return value

    def mapped(self, column: str, values: Mapping[str, str | None] | None, where: str) -> str | None:
        """The cell of `column` through a closed map, if there is one."""
        cell = self.row[column]
        if cell == "" or cell in self.card.missing:
            return None
        if values is None:
            return cell
        if cell not in values:
            self.fail(column, cell, f"{where} lists only {', '.join(values)}; add it there, null if it means unknown")
        return values[cell]

    def parse(self, name: ColumnField, function: Callable[[str], Any]) -> Any:
        """The value of a field through `function`; its ValueError becomes a UserError."""
        if (value := self.text(name)) is None:
            return None
        try:
            return function(value)
        except (ValueError, KeyError):
            rule = f"a date like {self.card.date_format}" if name == "visit_date" else RULES[name]
            self.fail(
                self.card.columns[name], value, f"{name} must be {rule}; correct it or map it under values.{name}"
            )

    def fail(self, column: str, value: str, rule: str) -> NoReturn:
        """Raise the UserError for one cell."""
        raise UserError(f"{self.table}, line {self.line}, column {column}: {value!r}; {rule} in card {self.card.name}")


def _parse_number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = float(text)
        if not low <= number <= high:  # false for NaN too
            raise ValueError
        return number

    return parse


def _parse_whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = _parse_number(low, high)(text)
        if number != int(number):  # pandas writes whole numbers with gaps as "2.0"
            raise ValueError
        return int(number)

    return parse


PARSERS: dict[ColumnField, Callable[[str], Any]] = {
    "age": _parse_number(0, 130),
    "mpp": _parse_number(0.01, 1000),
    "visit_day": _parse_whole(0, 100_000),
    "follow_up_days": _parse_whole(0, 100_000),
    "event": lambda text: TRUTH[text.lower()],
    "phototype": _parse_whole(1, 6),
    "phototype_low": _parse_whole(1, 6),
    "phototype_high": _parse_whole(1, 6),
}
RULES: dict[ColumnField, str] = {
    "age": "a number of years from 0 to 130",
    "mpp": "a number of microns per pixel",
    "visit_day": "a whole number of days from 0 on",
    "follow_up_days": "a whole number of days from 0 on",
    "event": "true or false",
    "phototype": "a whole number from 1 to 6",
    "phototype_low": "a whole number from 1 to 6",
    "phototype_high": "a whole number from 1 to 6",
}
PASSED_ON: tuple[ColumnField, ...] = (
    "institution",
    "device",
    "anatomic_site",
    "confirmed_by",
    "follow_up_days",
    "event",
    "age",
    "sex",
    "phototype_low",
    "phototype_high",
    "phototype_source",
    "official_split",
    "mpp",
)


def _read_record(card: SourceCard, root: Path, cells: _Cells, tabular_types: Mapping[str, type]) -> Record:
    path = _read_path(root, cells, "path")
    if path is None:
        cells.fail(card.columns["path"], "", "every row must name an image file; complete or delete the row")
    metadata: dict[str, Any] = dict(card.constants.items())
    for name in PASSED_ON:
        value = cells.parse(name, PARSERS.get(name, str))
        if value is not None:
            metadata[name] = value
    if (phototype := cells.parse("phototype", PARSERS["phototype"])) is not None:
        metadata |= {"phototype_low": phototype, "phototype_high": phototype}
    if "phototype_low" not in metadata and "phototype_high" not in metadata:
        metadata.pop("phototype_source", None)  # nobody is the source of what is unknown
    labels = {name: cells.mapped(label.column, label.values, f"labels.{name}") for name, label in card.labels.items()}
    tabular = {column: cells.mapped(column, None, "") for column in card.tabular}
    modality: Any = card.modality or cells.text("modality")
    if modality is None:
        cells.fail(card.columns["modality"], "", f"every row must name one of {', '.join(MODALITIES)}")
    return Record(
        line=cells.line,
        path=path,
        raw_id=cells.text("key") or path.relative_to(root).as_posix(),
        modality=modality,
        mask_path=_read_path(root, cells, "mask_path"),
        caption=cells.text("caption"),
        patient_id=cells.text("patient_id"),
        lesion_id=cells.text("lesion_id"),
        slide_id=cells.text("slide_id"),
        visit_day=cells.parse("visit_day", PARSERS["visit_day"]),
        metadata=metadata,
        labels={name: value for name, value in labels.items() if value is not None},
        tabular={
            column: TRUTH[value.lower()] if tabular_types[column] is bool else tabular_types[column](value)
            for column, value in tabular.items()
            if value is not None
        },
    )


def _read_path(root: Path, cells: _Cells, name: Literal["path", "mask_path"]) -> Path | None:
    if (text := cells.text(name)) is None:
        return None
    path = Path(text)
    if path.is_absolute() or ".." in path.parts:
        cells.fail(cells.card.columns[name], text, "paths must lie below --root and be relative to it")
    return root / path


def _infer_type(card: SourceCard, cells: Iterable[str]) -> type:
    """The narrowest of bool, float and str that every cell of a column fits, decided for the column as a whole."""
    known = [cell for cell in cells if cell != "" and cell not in card.missing]
    if known and all(cell.lower() in ("true", "false") for cell in known):
        return bool
    return float if known and all(_is_number(cell) for cell in known) else str


def _is_number(text: str) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    # "007" is a code, not a seven; "nan" is for the card's `missing`.
    return math.isfinite(number) and not (len(text) > 1 and text[0] == "0" and text[1].isdigit())


def _check_keys(records: Iterable[Record], table: Path) -> None:
    lines: dict[str, int] = {}
    for record in records:
        if (first := lines.setdefault(record.raw_id, record.line)) != record.line:
            raise UserError(
                f"{table}, lines {first} and {record.line}: both name the image {record.raw_id!r}; one row an image: "
                "delete one, or name another column under columns.key"
            )


def _complete_patients(card: SourceCard, records: list[Record], table: Path) -> list[Record]:
    """Give a lesion's patient to those of its rows that do not name one; a lesion of two patients is an error.

    Without this a lesion could stand in two groups, and a split could cut through it.
    """
    if card.lesion_id_scope == "patient":
        return records
    owners: dict[str, Record] = {}
    for record in records:
        if record.lesion_id is None or record.patient_id is None:
            continue
        first = owners.setdefault(record.lesion_id, record)
        if first.patient_id != record.patient_id:
            raise UserError(
                f"{table}, lines {first.line} and {record.line}: lesion {record.lesion_id!r} has two patients "
                f"({first.patient_id!r}, {record.patient_id!r}); correct the table, or, if lesions are numbered "
                f"patient by patient, set lesion_id_scope: patient in card {card.name}"
            )
    return [
        replace(record, patient_id=owners[record.lesion_id].patient_id)
        if record.patient_id is None and record.lesion_id in owners
        else record
        for record in records
    ]


def _compute_visit_days(records: list[Record], dates: list[date | None]) -> list[Record]:
    """Dates -> days since the patient's (else the lesion's) first dated row; the dates themselves end here."""
    first: dict[str, date] = {}
    owners = [record.patient_id or record.lesion_id for record in records]
    for owner, day in zip(owners, dates, strict=True):
        if owner is not None and day is not None:
            first[owner] = min(first.get(owner, day), day)
    return [
        replace(record, visit_day=(day - first[owner]).days) if owner is not None and day is not None else record
        for record, owner, day in zip(records, owners, dates, strict=True)
    ]
