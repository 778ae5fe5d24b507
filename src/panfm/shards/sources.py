"""From a source's table to Records: the first step on the user's own files. No image is opened here.

    SourceCard + ROOT  ->  tables.iterate_rows  ->  one Record an image: files, raw ids, typed metadata  ->  RecordTable

Raw ids and dates live in Records only, in memory; the writer hashes the ids, and dates are days since the first visit
by the time that they are here. Every fault of the table is a UserError that names file, line, column, value and rule.
"""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from panfm.errors import UserError
from panfm.shards.amendments import Amendments, read_amendments
from panfm.shards.cards import MEMBER_MARK, TEMPLATE, SourceCard
from panfm.shards.cells import PARSERS, PASSED_ON, Cells, ColumnType
from panfm.shards.raw_files import FileFinder, find_stem
from panfm.shards.records import Record, RecordBuilder, RecordTable
from panfm.shards.schema import MODALITIES
from panfm.shards.spreadsheets import to_decimal_point
from panfm.shards.tables import STEM, describe_table, iterate_rows

__all__ = ["Record", "RecordTable", "compare_with_expected", "compute_code_report", "read_records"]

NO_DATE = np.iinfo(np.int32).min


def read_records(card: SourceCard, root: Path) -> RecordTable:
    """Read the rows of a source below `root` into Records, in the table's order; a row with two images gives two.

    Raises UserError for a missing or empty table, a column that the card names and the table lacks, a value outside a
    closed map or set, a number or date that is none, two rows with one key, ids that contradict each other, and a
    correction that does not fit.
    """
    root = Path(root)
    where = describe_table(card, root)
    amendments = read_amendments(card, root)
    finder = FileFinder(root)
    builder = RecordBuilder(root)
    types = {column: ColumnType() for column in card.tabular}
    days: list[int] = []
    for line, row in iterate_rows(card, root):
        cells = Cells(card, where, line, row)
        facts = _read_facts(cells, types, amendments)
        day = cells.parse("visit_date", lambda text: datetime.strptime(text, card.date_format).date().toordinal())
        for image in _read_images(cells, finder, amendments, facts["labels"]):
            builder.add(**(facts | image))
            days.append(NO_DATE if day is None else day)
    amendments.check_all_used()
    records = builder.build({name: kind.decide() for name, kind in types.items()}, amendments.label_version)
    _check_keys(records, where)
    records = _complete_patients(card, records, where)
    if "visit_date" in card.columns:
        records = _compute_visit_days(records, np.array(days, dtype=np.int32))
    return records


def compare_with_expected(card: SourceCard, records: RecordTable) -> tuple[str, ...]:
    """Say where the counts of the records differ from those that the card expects; empty if nowhere."""
    differences = []
    table, expected = records.table, card.expected
    numbers = [
        ("images", len(records), expected.images),
        ("patients", len(pc.unique(table["patient_id"].drop_null())), expected.patients),
        ("lesions", _count_lesions(card, table), expected.lesions),
        ("masks", len(records) - table["mask_path"].null_count, expected.masks),
    ]
    differences += [
        f"{found} {name}, {wanted} expected"
        for name, found, wanted in numbers
        if wanted is not None and found != wanted
    ]
    labels = records.count_labels()
    for label, values in card.expected.labels.items():
        counts = labels.get(label, Counter())
        for value in sorted(set(values) | set(counts)):
            if counts[value] != values.get(value, 0):
                differences.append(f"{label} {value}: {counts[value]}, {values.get(value, 0)} expected")
    return tuple(differences)


def compute_code_report(card: SourceCard, records: RecordTable) -> dict[str, dict[str, tuple[int, str | None]]]:
    """How labels map to codes: "diagnosis#icd10" -> value -> (number of images, its code or None)."""
    counts = records.count_labels()
    return {
        f"{name}#{system}": {
            value: (number, codes.get(value)) for value, number in counts.get(name, Counter()).most_common()
        }
        for name, label in card.labels.items()
        for system, codes in label.codes.items()
    }


def _count_lesions(card: SourceCard, table: pa.Table) -> int:
    lesions = table["lesion_id"]
    if card.lesion_id_scope == "patient":
        lesions = pc.binary_join_element_wise(table["patient_id"], lesions, "\0")
    return len(pc.unique(lesions.drop_null()))


# ------------------------------------------------------------------------------------------------ one row


def _read_facts(cells: Cells, types: Mapping[str, "ColumnType"], amendments: Amendments) -> dict[str, Any]:
    """Everything of a row but its images."""
    card = cells.card
    metadata: dict[str, Any] = dict(card.constants.items())
    for name in PASSED_ON:
        value = cells.parse(name, PARSERS.get(name, str))
        if value is not None:
            metadata[name] = value
    if (phototypes := cells.parse("phototype", PARSERS["phototype"])) is not None:
        metadata |= {"phototype_low": phototypes[0], "phototype_high": phototypes[1]}
    if "phototype_low" not in metadata and "phototype_high" not in metadata:
        metadata.pop("phototype_source", None)  # nobody is the source of what is unknown
    labels = {name: cells.label(name, label) for name, label in card.labels.items()}
    texts = {column: cells.mapped(column, None, "") for column in card.tabular}
    tabular = [
        None if text is None else types[column].add(text, to_decimal_point(text, card.dialect))
        for column, text in texts.items()
    ]
    return {
        "line": cells.line,
        "caption": cells.text("caption"),
        "patient_id": amendments.find_patient(cells.text("patient_id")),
        "lesion_id": cells.text("lesion_id"),
        "slide_id": cells.text("slide_id"),
        "visit_day": cells.parse("visit_day", PARSERS["visit_day"]),
        "metadata": metadata,
        "labels": {name: value for name, value in labels.items() if value is not None},
        "tabular": tabular,
        "identifying": [text for column in card.identifying_columns if (text := cells.mapped(column, None, ""))],
    }


def _read_images(
    cells: Cells, finder: FileFinder, amendments: Amendments, labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What differs between the images of one row: their files, keys, modalities, and labels as corrected for them."""
    card, entries, images = cells.card, cells.card.image_entries, []
    for name, entry in entries.items():
        found = _find_file(cells, finder, name, entry.path, required=True)
        if found is None:
            continue
        path, member = found
        place = path if member is None else f"{path}{MEMBER_MARK}{member}"
        key = find_stem(member or path) if card.columns.get("key") == STEM else cells.text("key")
        if key is not None and len(entries) > 1 and card.columns.get("key") != STEM:
            key = f"{key}#{name}"
        raw_id = key or place
        modality = entry.modality or card.modality or cells.text("modality")
        if modality is None:
            cells.fail(card.columns["modality"], "", f"every row must name one of {', '.join(MODALITIES)}")
        mask = _find_file(cells, finder, name, entry.mask, required=False) if entry.mask else None
        corrected = amendments.correct(raw_id, dict(labels))
        images.append(
            {
                "path": path,
                "member": member,
                "raw_id": raw_id,
                "modality": modality,
                "mask_path": mask[0] if mask else None,
                "mask_member": mask[1] if mask else None,
                "labels": corrected | _find_codes(card, corrected),
            }
        )
    if not images:
        columns = sorted(
            {match[1] for entry in entries.values() for text in entry.path for match in TEMPLATE.finditer(text)}
        )
        cells.fail(", ".join(columns), "", "every row must name an image file; complete or delete the row")
    return images


def _find_file(
    cells: Cells, finder: FileFinder, name: str, templates: tuple[str, ...], *, required: bool
) -> tuple[str, str | None] | None:
    """(Path relative to the root, member) of the first template whose file exists; None where a cell is unknown.

    Where no file exists: the first template, so that the build counts it as missing; but None for a mask named by a
    template, which only some images have. A mask that a cell names outright must be there.
    """
    first: tuple[str, str | None] | None = None
    for template in templates:
        cells_of = [cells.row.get(match[1], "") for match in TEMPLATE.finditer(template)]
        if any(cell == "" or cell in cells.card.missing for cell in cells_of):
            continue
        text = TEMPLATE.sub(lambda match: cells.row[match[1]], template).replace("\\", "/")  # as Windows writes paths
        path, _, member = text.partition(MEMBER_MARK)
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or (len(path) > 1 and path[1] == ":"):
            column = next((match[1] for match in TEMPLATE.finditer(template)), f"images.{name}")
            cells.fail(column, text, "paths must lie below --root and be relative to it")
        found = (pure.as_posix(), member or None)
        named_outright = TEMPLATE.fullmatch(template) is not None
        if len(templates) == 1 and (required or named_outright):
            return found  # whether it exists is found out when it is read
        if finder.has(*found):
            return found
        if required or named_outright:
            first = first or found
    return first


def _find_codes(card: SourceCard, labels: Mapping[str, str]) -> dict[str, str]:
    """The codes of a row's labels: {"diagnosis#icd10": "C43.9"}."""
    return {
        f"{name}#{system}": codes[labels[name]]
        for name, label in card.labels.items()
        if name in labels
        for system, codes in label.codes.items()
        if labels[name] in codes
    }


# ------------------------------------------------------------------------------------------------ all rows together


def _encode(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A text column as numbers, equal texts equal numbers; -1 where unknown."""
    codes = column.combine_chunks().dictionary_encode().indices
    return codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]


def _check_keys(records: RecordTable, where: str) -> None:
    codes = _encode(records.table["raw_id"])
    _, firsts = np.unique(codes, return_index=True)
    if len(firsts) == len(codes):
        return
    second = int(np.setdiff1d(np.arange(len(codes)), firsts)[0])
    first = int(np.flatnonzero(codes == codes[second])[0])
    raise UserError(
        f"{where}, lines {records[first].line} and {records[second].line}: both name the image "
        f"{records[first].raw_id!r}; one row an image: delete one, or name another column under columns.key"
    )


def _complete_patients(card: SourceCard, records: RecordTable, where: str) -> RecordTable:
    """Give a lesion's patient to those of its rows that do not name one; a lesion of two patients is an error.

    Without this a lesion could stand in two groups, and a split could cut through it.
    """
    if card.lesion_id_scope == "patient":
        return records
    lesions, patients = _encode(records.table["lesion_id"]), _encode(records.table["patient_id"])
    both = np.flatnonzero((lesions >= 0) & (patients >= 0))
    if not len(both):
        return records
    found, firsts = np.unique(lesions[both], return_index=True)
    owner = np.full(int(lesions.max()) + 1, -1)  # lesion -> the first row that names its patient
    owner[found] = both[firsts]
    torn = both[patients[both] != patients[owner[lesions[both]]]]
    if len(torn):
        second = records[int(torn[0])]
        first = records[int(owner[lesions[torn[0]]])]
        raise UserError(
            f"{where}, lines {first.line} and {second.line}: lesion {second.lesion_id!r} has two patients "
            f"({first.patient_id!r}, {second.patient_id!r}); correct the table, or, if lesions are numbered "
            f"patient by patient, set lesion_id_scope: patient in card {card.name}"
        )
    rows = np.arange(len(lesions))
    orphans = (patients < 0) & (lesions >= 0)
    rows[orphans] = owner[lesions[orphans]]
    taken = records.table["patient_id"].take(pa.array(rows, mask=rows < 0))
    return records.replace_column("patient_id", taken)


def _compute_visit_days(records: RecordTable, days: npt.NDArray[np.int32]) -> RecordTable:
    """Dates (as ordinals) -> days since the patient's (else the lesion's) first dated row; the dates end here."""
    patients, lesions = _encode(records.table["patient_id"]), _encode(records.table["lesion_id"])
    owners = np.where(patients >= 0, patients, np.where(lesions >= 0, patients.max() + 1 + lesions, -1))
    dated = (owners >= 0) & (days != NO_DATE)
    first = np.full(int(owners.max()) + 1 if len(owners) else 0, np.iinfo(np.int32).max)
    np.minimum.at(first, owners[dated], days[dated])
    visit_days = np.zeros(len(days), dtype=np.int32)
    visit_days[dated] = days[dated] - first[owners[dated]]
    known = pa.array(visit_days, mask=~dated)
    return records.replace_column("visit_day", pc.coalesce(known, records.table["visit_day"].combine_chunks()))
