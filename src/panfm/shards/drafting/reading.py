"""A hospital's table as a draft understands it: dialect, roles of the columns, files, dates, values. Nothing is judged.

export.xlsx + image files  ->  read_table  ->  Reading  ->  draft_findings (what is wrong), draft_text (the card)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from panfm.errors import UserError
from panfm.shards.cells import PARSERS
from panfm.shards.dialects import detect_dialect
from panfm.shards.drafting.columns import (
    DateReading,
    Guess,
    Rows,
    count_known,
    guess_columns,
    parse_phototype,
    read_dates,
)
from panfm.shards.drafting.files import FileMatch, match_files
from panfm.shards.drafting.findings import Sheet
from panfm.shards.drafting.values import (
    MAX_LABEL_VALUES,
    MappedValue,
    map_confirmation,
    map_diagnoses,
    map_malignant,
    map_modality,
    map_sex,
    name_label,
)
from panfm.shards.drafting.vocabulary import MODALITY_WORDS, Role, fold
from panfm.shards.spreadsheets import Dialect, read_spreadsheet


@dataclass(frozen=True)
class Reading:
    """Everything that a draft makes of one table. `labels` maps the names of labels to columns."""

    name: str
    table: str  # relative to the folder
    dialect: Dialect
    header: tuple[str, ...]
    rows: Rows
    guesses: tuple[Guess, ...]
    notes: tuple[str, ...]
    match: FileMatch | None
    sheet: Sheet
    labels: Mapping[str, str]
    mapping: tuple[MappedValue, ...]
    masks: str | None  # the column that holds paths of masks
    modality: str | None  # of all images, where no column says it and all file names agree


def read_table(name: str, path: Path, relative: str, files: Sequence[str]) -> Reading:
    """Read a hospital's table and say what its columns and values mean, as far as they tell."""
    dialect = detect_dialect(path)
    header, lines = read_spreadsheet(path, dialect)
    rows: Rows = list(lines)
    if not rows:
        raise UserError(f"{path}: has no rows below its header; export the table with its rows")
    guesses, notes = guess_columns(header, rows)
    likely = next((guess.column for guess in guesses if guess.role == "path"), None)
    match = match_files(header, rows, files, likely)
    columns: dict[Role, str] = {guess.role: guess.column for guess in reversed(guesses) if guess.role != "path"}
    dates, births = _read_all_dates(header, rows, columns, dialect)
    labels, label_notes = _name_labels(guesses, rows)
    mapping = _map_values(columns, rows) + tuple(
        one for label, column in labels.items() for one in map_diagnoses(label, count_known(rows, column))
    )
    if "malignant" in columns:
        mapping += map_malignant(count_known(rows, columns["malignant"]), columns["malignant"])
        labels["malignant"] = columns["malignant"]
    numbers = Counter(sign for _, row in rows for sign in row.get(columns.get("age", ""), "") if sign in ".,")
    if numbers[","]:
        dialect = dialect.model_copy(update={"decimal": ","})  # a decimal point is understood beside it
    values = {label: {one.raw: one.value or one.raw for one in mapping if one.field == label} for label in labels}
    names = tuple(guess.column for guess in guesses if guess.role in ("family_name", "given_name"))
    sheet = Sheet(
        rows=rows,
        columns=columns,
        dates=dates,
        births=births,
        names=names,
        labels={label: (column, values[label]) for label, column in labels.items()},
    )
    return Reading(
        name=name,
        table=relative,
        dialect=dialect,
        header=tuple(header),
        rows=rows,
        guesses=guesses,
        notes=(*notes, *label_notes),
        match=match,
        sheet=sheet,
        labels=labels,
        mapping=mapping,
        masks=_find_masks(columns, rows, files, match),
        modality=None if "modality" in columns else _guess_modality(files),
    )


def _find_masks(columns: Mapping[Role, str], rows: Rows, files: Sequence[str], match: FileMatch | None) -> str | None:
    """The column of masks, if a card can say so: where images and masks both stand there as paths of the folder."""
    column = columns.get("mask_path")
    if column is None or match is None or match.way != "path":
        return None
    return column if set(count_known(rows, column)) <= set(files) else None


def _read_all_dates(
    header: Sequence[str], rows: Rows, columns: Mapping[Role, str], dialect: Dialect
) -> tuple[DateReading | None, DateReading | None]:
    """How visit and birth dates are read; a column with a day above 12 decides for the others of the table."""
    readings = {column: read_dates(rows, column, day_first=None) for column in header}
    sure = [one for one in readings.values() if one and one.alternative is None and not one.format.startswith("%Y")]
    day_first = sure[0].format.startswith("%d") if sure else dialect.decimal == "," or dialect.delimiter == ";"
    found = []
    for role in ("visit_date", "birth_date"):
        column = columns.get(role)
        one = read_dates(rows, column, day_first=day_first) if column is not None else None
        found.append(replace(one, alternative=None) if one and sure else one)
    return found[0], found[1]


def _name_labels(guesses: Sequence[Guess], rows: Rows) -> tuple[dict[str, str], list[str]]:
    """Label -> column; several readers and several kinds of diagnosis stand side by side."""
    found = [guess for guess in guesses if guess.role == "diagnosis"]
    labels: dict[str, str] = {}
    notes = []
    for guess in found:
        if (number := len(count_known(rows, guess.column))) > MAX_LABEL_VALUES:
            notes.append(
                f"column {guess.column!r} has {number} different texts: free text, not a label; it is not read"
            )
            continue
        base = name_label(guess.column) if sum(1 for one in found if not one.reader) > 1 else "diagnosis"
        label = f"{base}@{guess.reader}" if guess.reader else base
        while label in labels:
            label = f"{base}_{int(label.removeprefix(base).lstrip('_') or 1) + 1}" if not guess.reader else f"{label}x"
        labels[label] = guess.column
    return labels, notes


def _map_values(columns: Mapping[Role, str], rows: Rows) -> tuple[MappedValue, ...]:
    mapped: tuple[MappedValue, ...] = ()
    if column := columns.get("sex"):
        mapped += map_sex(count_known(rows, column))
    if column := columns.get("modality"):
        mapped += map_modality(count_known(rows, column))
    if column := columns.get("confirmed_by"):
        mapped += map_confirmation(count_known(rows, column), column)
    if column := columns.get("phototype"):
        mapped += _map_phototypes(count_known(rows, column))
    return mapped


def _map_phototypes(texts: Counter[str]) -> tuple[MappedValue, ...]:
    """Only where a text is not a type or a range as panfm reads it anyhow."""
    mapped = []
    for cell, count in texts.most_common():
        found = parse_phototype(cell)
        if found is None:
            mapped.append(MappedValue("phototype", cell, count, None, "open", remark="no Fitzpatrick type"))
        else:
            low, high = found
            mapped.append(MappedValue("phototype", cell, count, str(low) if low == high else f"{low}-{high}", "known"))
    try:
        if all(PARSERS["phototype"](one.raw) for one in mapped):
            return ()
    except (ValueError, KeyError):
        pass
    return tuple(mapped)


def _guess_modality(files: Sequence[str]) -> str | None:
    """The modality that the names of all folders and files agree on; None if they say nothing."""
    votes: Counter[str | None] = Counter()
    for file in files:
        words = f" {fold(file)} "
        votes[
            next((name for name, known in MODALITY_WORDS.items() if any(f" {word} " in words for word in known)), None)
        ] += 1
    return next(iter(votes)) if len(votes) == 1 else None
