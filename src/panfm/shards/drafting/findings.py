"""What contradicts itself in a hospital's table, found before a build does: patients, lesions, files, damaged ids.

    rows + the columns' roles  ->  find_conflicts, find_file_faults, find_damaged_ids  ->  Finding(kind, text, examples)

`text` counts and names columns and is safe to print; `examples` hold raw ids and lines: for the report only.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from typing import Literal

from panfm.shards.drafting.aliases import Person
from panfm.shards.drafting.columns import DateReading, Rows, is_missing, parse_age, parse_date
from panfm.shards.drafting.files import FileMatch
from panfm.shards.drafting.values import MappedValue
from panfm.shards.drafting.vocabulary import Role

Kind = Literal[
    "files", "age", "sex", "birth_date", "lesion", "labels", "dates", "ids", "values", "columns", "aliases", "codes"
]
MAX_EXAMPLES = 10
MAX_YEARS_APART = 5  # ages of one patient without dates
SHARED_LESIONS = 0.5  # above this share of rows whose lesion has two patients, lesions are numbered patient by patient


@dataclass(frozen=True)
class Finding:
    """One thing that a person must know or decide. `blocks`: a build refuses the table until it is settled."""

    kind: Kind
    text: str
    examples: tuple[str, ...] = ()
    blocks: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table with what its columns are taken for; `label_columns` are those that become labels."""

    rows: Rows
    columns: Mapping[Role, str]
    dates: DateReading | None = None
    births: DateReading | None = None
    names: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)  # name -> column, text -> value

    def cell(self, row: Mapping[str, str], role: Role) -> str:
        """The cell of a role, "" where it is unknown or has no column."""
        column = self.columns.get(role)
        return "" if column is None or is_missing(row[column]) else row[column]

    def visit(self, row: Mapping[str, str]) -> date | None:
        """The day of the visit, if it can be read."""
        cell = self.cell(row, "visit_date")
        return parse_date(cell, self.dates.format) if self.dates is not None and cell else None


def gather_persons(sheet: Sheet, sexes: Mapping[str, str | None]) -> dict[str, Person]:
    """What the rows say about each patient id; sexes as mapped, other facts as written (dates as dates)."""
    persons: dict[str, Person] = defaultdict(Person)
    scoped = lesions_are_numbered_by_patient(sheet)
    for _, row in sheet.rows:
        if not (patient := sheet.cell(row, "patient_id")):
            continue
        person = persons[patient]
        person.num_rows += 1
        if sex := sheet.cell(row, "sex"):
            person.sexes.add(sexes.get(sex) or sex)
        if birth := sheet.cell(row, "birth_date"):
            day = parse_date(birth, sheet.births.format) if sheet.births is not None else None
            person.births.add(day.isoformat() if day is not None else birth)
        if (age := parse_age(sheet.cell(row, "age"))) is not None:
            person.ages.add(age)
        if (lesion := sheet.cell(row, "lesion_id")) and not scoped:
            person.lesions.add(lesion)
        if name := " ".join(row[column] for column in sheet.names if not is_missing(row[column])):
            person.names.add(name)
    return dict(persons)


def find_conflicts(sheet: Sheet, persons: Mapping[str, Person]) -> Iterator[Finding]:
    """Patients of two sexes, birth dates or ages, lesions of two patients or labels, rows without a patient."""
    for kind, role, facts in (
        ("sex", "sex", {one: person.sexes for one, person in persons.items()}),
        ("birth_date", "birth_date", {one: person.births for one, person in persons.items()}),
    ):
        torn = [f"patient {one!r}: {', '.join(sorted(said))}" for one, said in sorted(facts.items()) if len(said) > 1]
        if torn:
            yield Finding(kind, f"{len(torn)} patients have several values of {role}", _some(torn))  # type: ignore[arg-type]
    yield from _find_ages(sheet)
    yield from _find_lesions(sheet)
    if "patient_id" in sheet.columns:
        nameless = [f"line {line}" for line, row in sheet.rows if not sheet.cell(row, "patient_id")]
        if nameless:
            yield Finding(
                "ids",
                f"{len(nameless)} rows name no patient; if a cell stands for the rows below it too (a merged cell), "
                "fill it down, else each of these images counts as a patient of its own",
                _some(nameless),
            )


def _find_ages(sheet: Sheet) -> Iterator[Finding]:
    seen: dict[str, list[tuple[date | None, float, int]]] = defaultdict(list)
    for line, row in sheet.rows:
        patient, age = sheet.cell(row, "patient_id"), parse_age(sheet.cell(row, "age"))
        if patient and age is not None:
            seen[patient].append((sheet.visit(row), age, line))
    same_day, falling, apart = [], [], []
    for patient, facts in sorted(seen.items()):
        by_day: dict[date, dict[float, int]] = defaultdict(dict)
        for day, age, line in facts:
            if day is not None:
                by_day[day].setdefault(age, line)
        for said in by_day.values():
            if len(said) > 1:
                same_day.append(f"patient {patient!r}: {_show_ages(said.items())}")
        dated = sorted((day, max(said), said[max(said)]) for day, said in by_day.items())
        for (_, older, line), (_, younger, other) in pairwise(dated):
            if younger < older:
                falling.append(f"patient {patient!r}: {_show_ages([(older, line), (younger, other)])}")
        undated = [(age, line) for day, age, line in facts if day is None]
        if undated and max(undated)[0] - min(undated)[0] > MAX_YEARS_APART:
            apart.append(f"patient {patient!r}: {_show_ages([min(undated), max(undated)])}")
    if same_day:
        yield Finding("age", f"{len(same_day)} visits give one patient several ages on one day", _some(same_day))
    if falling:
        yield Finding("age", f"{len(falling)} times a patient is younger at a later visit", _some(falling))
    if apart:
        yield Finding(
            "age",
            f"{len(apart)} patients have ages more than {MAX_YEARS_APART} years apart in rows without a date",
            _some(apart),
        )


def _show_ages(ages: Iterable[tuple[float, int]]) -> str:
    return ", ".join(f"{age:g} (line {line})" for age, line in ages)


def _find_lesions(sheet: Sheet) -> Iterator[Finding]:
    if "lesion_id" not in sheet.columns:
        return
    scoped = lesions_are_numbered_by_patient(sheet)
    owners: dict[str, dict[str, int]] = defaultdict(dict)
    labels: dict[tuple[str, str], dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for line, row in sheet.rows:
        if not (lesion := sheet.cell(row, "lesion_id")):
            continue
        patient = sheet.cell(row, "patient_id")
        if patient:
            owners[lesion].setdefault(patient, line)
        for label, (column, names) in sheet.labels.items():
            if not is_missing(row[column]):
                value = names.get(row[column], row[column])
                labels[(patient if scoped else "", lesion)][label].setdefault(value, line)
    torn = [f"lesion {one!r}: {_show(patients)}" for one, patients in sorted(owners.items()) if len(patients) > 1]
    if torn and scoped:
        yield Finding(
            "lesion",
            f"{len(torn)} of {len(owners)} lesion numbers belong to several patients: lesions seem to be numbered "
            "patient by patient, and the card says so (lesion_id_scope: patient)",
            _some(torn),
        )
    elif torn:
        yield Finding(
            "lesion",
            f"{len(torn)} lesions have two patients or more; if lesions are numbered patient by patient, set "
            "lesion_id_scope: patient",
            _some(torn),
            blocks=True,
        )
    for label in sheet.labels:
        several = [
            f"lesion {lesion!r}{f' of patient {patient!r}' if patient else ''}: {_show(found[label])}"
            for (patient, lesion), found in sorted(labels.items())
            if len(found[label]) > 1
        ]
        if several:
            yield Finding("labels", f"{len(several)} lesions have several values of {label}", _some(several))


def lesions_are_numbered_by_patient(sheet: Sheet) -> bool:
    """Whether so many lesion numbers come with several patients that each patient's must start anew."""
    if "lesion_id" not in sheet.columns or "patient_id" not in sheet.columns:
        return False
    owners: dict[str, set[str]] = defaultdict(set)
    num_rows: Counter[str] = Counter()
    for _, row in sheet.rows:
        lesion, patient = sheet.cell(row, "lesion_id"), sheet.cell(row, "patient_id")
        if lesion and patient:
            owners[lesion].add(patient)
            num_rows[lesion] += 1
    shared = sum(num_rows[lesion] for lesion, patients in owners.items() if len(patients) > 1)
    return shared > SHARED_LESIONS * num_rows.total()


def _show(texts: Mapping[str, int]) -> str:
    return ", ".join(f"{text!r} (line {line})" for text, line in texts.items())


# ------------------------------------------------------------------------------------------------ files and ids


def find_file_faults(
    rows: Rows, files: Sequence[str], match: FileMatch | None, masks: str | None = None
) -> Iterator[Finding]:
    """Rows without a file, files without a row, files of two rows."""
    if match is None:
        yield Finding(
            "files",
            f"no column names the {len(files)} image files below the folder; add a column with the file names, or "
            "check that the folder is the right one",
            _some(files),
            blocks=True,
        )
        return
    for remark in match.remarks:
        yield Finding("files", remark)
    column = match.column
    empty = [f"line {line}" for line, row in rows if not match.files[line] and is_missing(row[column])]
    if empty and match.way != "by_file":
        yield Finding(
            "files", f"{len(empty)} rows name no file (column {column!r} is empty)", _some(empty), blocks=True
        )
    lost = [
        f"line {line}: {row[column]!r}" for line, row in rows if not match.files[line] and not is_missing(row[column])
    ]
    if lost:
        yield Finding("files", f"{len(lost)} of {len(rows)} rows have no file in the folder", _some(lost))
    used = {file for found in match.files.values() for file in found}
    used |= {row[masks] for _, row in rows} if masks is not None else set()
    unused = [file for file in files if file not in used]
    if unused:
        alike = sum(1 for file in unused if re.search(r"mask|segment|annot|contour", file, re.IGNORECASE))
        more = f"; {alike} of them look like masks (the card can name them: images.image.mask)" if alike else ""
        yield Finding("files", f"{len(unused)} of {len(files)} files belong to no row{more}", _some(unused))
    if match.doubled:
        doubled = [f"{file}: lines {', '.join(map(str, lines))}" for file, lines in sorted(match.doubled.items())]
        yield Finding("files", f"{len(doubled)} files stand in two rows or more", _some(doubled), blocks=True)


def find_damaged_ids(rows: Rows, columns: Iterable[str]) -> Iterator[Finding]:
    """Ids that a spreadsheet program has turned into rounded numbers or dates."""
    for column in columns:
        cells = sorted({row[column] for _, row in rows if not is_missing(row[column])})
        rounded = [cell for cell in cells if re.fullmatch(r"\d(?:[.,]\d+)?E\+?\d+", cell, re.IGNORECASE)]
        rounded += [cell for cell in cells if re.fullmatch(r"\d{13,15}0{2,}", cell)]
        if rounded:
            yield Finding(
                "ids",
                f"{len(rounded)} ids in column {column!r} are numbers that Excel has rounded: different patients may "
                "have become one; export the column anew as text",
                _some(repr(cell) for cell in rounded),
            )


# ------------------------------------------------------------------------------------------------ cells


def find_bad_cells(sheet: Sheet, mapping: Iterable[MappedValue]) -> Iterator[Finding]:
    """Cells that a build would refuse: ages, dates, modalities that cannot be read; and dates that are ambiguous."""
    ages = sheet.columns.get("age")
    if ages is not None:
        bad = [
            f"line {line}: {row[ages]!r}"
            for line, row in sheet.rows
            if not is_missing(row[ages]) and parse_age(row[ages]) is None
        ]
        if bad:
            yield Finding(
                "values", f"{len(bad)} ages in column {ages!r} are no number of years", _some(bad), blocks=True
            )
    elif "birth_date" in sheet.columns:
        yield Finding(
            "age",
            f"there are birth dates (column {sheet.columns['birth_date']!r}) but no ages; birth dates are never stored "
            "and nothing is computed from them: add the age at the visit to the export",
        )
    dated: tuple[tuple[Role, DateReading | None], ...] = (("visit_date", sheet.dates), ("birth_date", sheet.births))
    for role, dates in dated:
        if dates is None:
            continue
        column = sheet.columns[role]
        if dates.misfits:
            lines = _some(f"line {line}" for line in dates.misfits)
            text = f"{len(dates.misfits)} dates in column {column!r} are not written like {dates.format}"
            yield Finding("dates", text, lines, blocks=role == "visit_date")
        if dates.alternative is not None:
            yield Finding(
                "dates",
                f"column {column!r}: day and month could be the other way round ({dates.format} was taken, "
                f"{dates.alternative} fits as well); ask whoever made the export",
            )
    if (modality := sheet.columns.get("modality")) is not None:
        unread = {one.raw for one in mapping if one.field == "modality" and one.value is None}
        bad = [
            f"line {line}: {row[modality]!r}"
            for line, row in sheet.rows
            if row[modality] in unread or is_missing(row[modality])
        ]
        if bad:
            text = f"{len(bad)} rows do not say a modality that panfm knows (column {modality!r}); map or complete them"
            yield Finding("values", text, _some(bad), blocks=True)


def _some(examples: Iterable[str]) -> tuple[str, ...]:
    found = list(examples)
    more = [f"... and {len(found) - MAX_EXAMPLES} more"] if len(found) > MAX_EXAMPLES else []
    return tuple(found[:MAX_EXAMPLES] + more)
