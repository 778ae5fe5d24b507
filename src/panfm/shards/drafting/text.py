"""A draft in words: the card as commented YAML, and the report as Markdown.

    Reading  ->  write_card_text    ->  NAME.yaml: every guess says what it rests on, every open question is a TODO
    Reading, findings, aliases      ->  write_report_text  ->  NAME.report.md: with raw ids, to stay with the archive

The card names columns and the texts of closed lists (sex, diagnosis, ...), never an id or a name.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from panfm.shards.drafting.aliases import Alias
from panfm.shards.drafting.columns import Guess, count_known, is_missing, parse_age
from panfm.shards.drafting.files import FILE_NAME, LIST_HEADER
from panfm.shards.drafting.findings import Finding, Sheet, lesions_are_numbered_by_patient
from panfm.shards.drafting.reading import Reading
from panfm.shards.drafting.values import MappedValue
from panfm.shards.drafting.vocabulary import NEVER_STORED, Role
from panfm.shards.spreadsheets import Dialect

# Roles that are fields of a card's `columns`, in its order.
FIELDS: tuple[Role, ...] = (
    "patient_id",
    "lesion_id",
    "visit_date",
    "age",
    "sex",
    "phototype",
    "anatomic_site",
    "modality",
    "device",
    "institution",
    "confirmed_by",
    "official_split",
)
AGE_COLUMN = "age in years"
AGE_PATTERN = "^((?:[0-9]+(?:[.,][0-9]+)?)?)"  # empty for a cell that means unknown


def quote(text: str) -> str:
    """A text as a YAML (and JSON) string that is that text whatever it holds."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def write_head(name: str, origin: str) -> list[str]:
    """What no table says: the first part of every drafted card."""
    return [
        f"# Drafted by `panfm shards draft` from {origin}.",
        "# What is marked `guessed` rests on a look at the files: check it. Every TODO is yours to answer.",
        "version: 1",
        f"name: {name}",
        'title: "TODO: what this archive is, in a line for a reader"',
        'origin: "TODO: hospital, department, years"',
        'licence: "TODO: for example: internal use, not to be passed on"',
        "permitted_uses: [research]  # TODO: what consent and ethics vote allow: research, education, commercial",
        'consent_scope: "TODO: what the patients agreed to"',
        'legal_basis: "TODO: ethics vote, consent or law"',
        'retention: "TODO: how long it may be kept, and what ends it"',
        'key_custodian: "TODO: who keeps the key of the hashed ids; not who holds the shards"',
        "identifiers: private  # ids become hashes under a secret key (panfm shards build --key-file)",
        "# id_namespace: TODO: one name for all archives with the same patients, so that their hashed ids agree",
        "access: private",
        'how_to_obtain: "TODO: whom to ask"',
    ]


def write_card_text(reading: Reading) -> str:
    """The card of an archive with a table; load_card accepts it as it is."""
    sheet = reading.sheet
    listed = f"{reading.name}.files.csv"
    by_file = reading.match is not None and reading.match.way == "by_file"
    lines = write_head(reading.name, f"{quote(reading.table)} ({len(reading.rows):,} rows)")
    lines += _write_cohort(sheet)
    lines += [""]
    dialect = _write_dialect(reading.dialect, reading.table)
    if by_file:
        assert reading.match is not None
        column = quote(reading.match.column)
        lines += [
            f"table: {quote(listed)}  # written by the draft, one line a file; TODO: put it into the folder",
            "joins:",
            f"  - {{table: {quote(reading.table)}, dialect: {dialect}, match: {{{column}: {column}}}}}"
            "  # guessed: encoding, delimiter, decimal, header_line",
        ]
    else:
        lines += [f"table: {quote(reading.table)}", f"dialect: {dialect}  # guessed by looking at its first lines"]
        if reading.match is not None and reading.match.way == "by_cell":
            lines += [
                "joins:",
                f"  - {{table: {quote(listed)}, match: {{{quote(reading.match.column)}: {LIST_HEADER[0]}}}}}"
                "  # written by the draft; TODO: put it into the folder",
            ]
    lines += _write_files(reading)
    lines += _write_columns(reading)
    lines += _write_values(reading)
    lines += _write_labels(reading)
    lines += _write_privacy(reading)
    lines += _write_unread(reading)
    number = len(reading.match.listed) if by_file and reading.match is not None else len(reading.rows)
    lines += ["", f"expected: {{images: {number}}}  # as drafted; a build reports any difference"]
    return "\n".join(lines) + "\n"


def _write_cohort(sheet: Sheet) -> Iterator[str]:
    years = sorted({day.year for _, row in sheet.rows if (day := sheet.visit(row)) is not None})
    yield "cohort:"
    yield "  design: unknown  # TODO: retrospective, prospective or mixed"
    yield "  kind: clinical  # TODO: registry, clinical or trial"
    if years:
        yield f'  period: "{years[0]}-{years[-1]}"  # guessed from column {quote(sheet.columns["visit_date"])}'
    yield '  inclusion: "TODO: who is in it, and what proved the diagnosis"'


def _write_dialect(dialect: Dialect, table: str) -> str:
    """The parts of a dialect that matter for this kind of file, as one YAML mapping."""
    suffix = PurePosixPath(table).suffix.lower()
    parts = [f"decimal: {quote(dialect.decimal)}", f"header_line: {dialect.header_line}"]
    if suffix in (".csv", ".tsv", ".txt"):
        parts = [f"encoding: {dialect.encoding}", f"delimiter: {quote(dialect.delimiter or ',')}", *parts]
    elif dialect.sheet is not None:
        parts = [f"sheet: {quote(dialect.sheet)}", *parts]
    return f"{{{', '.join(parts)}}}"


def _write_files(reading: Reading) -> Iterator[str]:
    match = reading.match
    derived = []
    if match is not None and match.pattern is not None:
        what = "file name" if match.pattern == FILE_NAME else "file name without its extension"
        derived.append((match.derived, match.column, match.pattern, what))
    if _ages_have_units(reading):
        age = reading.sheet.columns["age"]
        derived.append((AGE_COLUMN, age, AGE_PATTERN, "number of years without its unit"))
    if derived:
        yield "derive:"
    for name, column, pattern, what in derived:
        yield f"  {quote(name)}:  # the {what}"
        yield f"    {{column: {quote(column)}, pattern: {quote(pattern)}}}"
    if match is None:
        path = f"TODO/{{{reading.header[0]}}}"
        yield f"images: {{image: {{path: {quote(path)}}}}}  # TODO: no column names the files"
    elif match.way == "templates":
        found = sum(1 for files in match.files.values() if files)
        yield "images:"
        yield "  image:"
        yield f"    path:  # guessed from column {quote(match.column)}: {found} of {len(reading.rows)} rows have a file"
        yield from (f"      - {quote(template)}" for template in match.templates)
    if "modality" not in reading.sheet.columns:
        if reading.modality is not None:
            yield f"modality: {reading.modality}  # guessed from the names of folders and files"
        else:
            yield "modality: clinical  # TODO: clinical, dermoscopic, total_body or histopathology? No column says it"


def _ages_have_units(reading: Reading) -> bool:
    """Whether ages are written like "45 ans", and all of them can be read."""
    if "age" not in reading.sheet.columns:
        return False
    texts = count_known(reading.rows, reading.sheet.columns["age"])
    return all(parse_age(text) is not None for text in texts) and any(not _is_number(text) for text in texts)


def _write_columns(reading: Reading) -> Iterator[str]:
    match, sheet = reading.match, reading.sheet
    lines = []
    if match is not None and match.way != "templates":
        path = {"path": match.column, "by_cell": LIST_HEADER[1], "by_file": "path"}[match.way]
        found = sum(1 for files in match.files.values() if files)
        lines.append(f"path: {quote(path)}  # guessed: {found} of {len(reading.rows)} rows have a file")
    if reading.masks is not None:
        masks = count_known(reading.rows, reading.masks).total()
        lines.append(f"mask_path: {quote(reading.masks)}  # guessed: {masks} of {len(reading.rows)} rows have a mask")
    by_role = {guess.role: guess for guess in reversed(reading.guesses)}
    for role in FIELDS:
        if role in sheet.columns:
            guess = by_role[role]
            doubt = ""
            if role == "visit_date" and sheet.dates is None:
                lines.append(
                    f"# visit_date: {quote(guess.column)}  # TODO: its dates are written in no way known to panfm"
                )
                continue
            if role == "patient_id":
                doubt = "; TODO: does one patient have one such number in all years and departments?"
            column = AGE_COLUMN if role == "age" and _ages_have_units(reading) else guess.column
            lines.append(f"{role}: {quote(column)}  # {_explain(guess)}{doubt}")
    if any(not line.startswith("#") for line in lines):
        yield "columns:"
        yield from (f"  {line}" for line in lines)
    if lesions_are_numbered_by_patient(sheet):
        yield "lesion_id_scope: patient  # guessed: most lesion numbers come with several patients; TODO: check"
    if "phototype" in sheet.columns:
        yield "# constants: {phototype_source: clinician}  # TODO: who said the phototype: clinician, patient, estimate"
    if sheet.dates is not None:
        doubt = f"; TODO: {sheet.dates.alternative} fits as well" if sheet.dates.alternative else ""
        column = sheet.columns["visit_date"]
        total = count_known(reading.rows, column).total()
        fits = total - len(sheet.dates.misfits)
        basis = f"guessed from column {quote(column)}: {fits} of {total} cells"
        yield f"date_format: {quote(sheet.dates.format)}  # {basis}{doubt}"


def _explain(guess: Guess) -> str:
    how = "its name" if guess.by == "name" else "its cells alone"
    return f"guessed from {how}: {guess.fits} of {guess.known} cells"


def _write_values(reading: Reading) -> Iterator[str]:
    fields = [role for role in FIELDS if any(one.field == role for one in reading.mapping)]
    if fields:
        yield "values:"
    for field in fields:
        yield f"  {field}:"
        yield from write_map([one for one in reading.mapping if one.field == field], "    ")
    missing = sorted(
        {row[column] for column in _list_used(reading) for _, row in reading.rows if is_missing(row[column])}
    )
    if missing := [text for text in missing if text]:
        yield f"missing: [{', '.join(map(quote, missing))}]  # guessed: these mean unknown, besides the empty cell"


def _list_used(reading: Reading) -> list[str]:
    columns = [reading.sheet.columns[role] for role in FIELDS if role in reading.sheet.columns]
    return list(dict.fromkeys([*columns, *reading.labels.values()]))


def write_map(values: Sequence[MappedValue], indent: str) -> Iterator[str]:
    """A map of values as YAML lines, open ones as null with a TODO."""
    for one in values:
        shown = "null" if one.value is None else quote(one.value) if one.value[0].isdigit() else one.value
        if one.state == "open":
            yield f"{indent}{quote(one.raw)}: {shown}  # TODO {one.count} cells: {one.remark}"
        else:
            yield f"{indent}{quote(one.raw)}: {shown}  # {one.count} cells{f': {one.remark}' if one.remark else ''}"


def _write_labels(reading: Reading) -> Iterator[str]:
    if not reading.labels:
        yield "# labels: TODO: no column looks like a diagnosis; pretraining needs none"
        return
    yield "labels:"
    for label, column in reading.labels.items():
        values = [one for one in reading.mapping if one.field == label]
        known = sum(one.count for one in values if one.state == "known")
        total = sum(one.count for one in values)
        yield f"  {quote(label)}:"
        yield f"    column: {quote(column)}  # guessed: {known} of {total} cells hold a known name"
        if not values:
            yield "    values: {}  # TODO: the column is empty"
            continue
        yield "    values:"
        yield from write_map(values, "      ")
        codes = {one.value: one.code for one in values if one.value is not None and one.code is not None}
        if codes:
            yield "    codes:  # ICD-10 (WHO); check against the edition that you report in"
            yield "      icd10:"
            yield from (f"        {value}: {quote(code)}" for value, code in sorted(codes.items()))


def _write_privacy(reading: Reading) -> Iterator[str]:
    columns = [guess.column for guess in reading.guesses if guess.role in NEVER_STORED]
    if columns:
        yield f"identifying_columns: [{', '.join(map(quote, columns))}]  # never stored, but looked for in all that is"
    yield "# patient_aliases: patient_aliases.csv  # after somebody has gone through patient_aliases.proposed.csv"
    yield "# corrections: corrections.csv  # corrected labels: key,label,old,new,version,reason,date"


def _write_unread(reading: Reading) -> Iterator[str]:
    used = {*_list_used(reading), *(guess.column for guess in reading.guesses if guess.role in NEVER_STORED)}
    used |= {reading.match.column} if reading.match is not None else set()
    used |= {reading.masks} if reading.masks is not None else set()
    unread = [column for column in reading.header if column not in used]
    if unread:
        yield "# Columns that are not read; for those that matter: tabular: [COLUMN, ...]"
    for column in unread:
        texts = count_known(reading.rows, column)
        kind = "numbers" if texts and all(_is_number(text) for text in texts) else "texts"
        free = any(guess.column == column and guess.role == "free_text" for guess in reading.guesses)
        more = "; free text may name people" if free else ""
        yield f"#   {quote(column)}: {texts.total()} cells, {len(texts)} different {kind}{more}"


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").lstrip("-").isdigit()


# ------------------------------------------------------------------------------------------------ the report


def write_report_text(
    name: str,
    reading: Reading | None,
    findings: Sequence[Finding],
    aliases: Sequence[Alias],
    mapping: Sequence[MappedValue],
) -> str:
    """What was found, with raw ids and line numbers, for the people who look after the archive."""
    lines = [
        f"# {name}: what a first look found",
        "",
        "**This report names patients by their raw ids. It belongs where the archive lies and must not leave it: not "
        "into a repository, a ticket, an e-mail or the folder of a shard set. Delete it when its questions are "
        "answered.**",
        "",
    ]
    if reading is not None:
        lines += _report_columns(reading)
    lines += ["## Findings", ""]
    if not findings:
        lines.append("Nothing contradicts itself.")
    for finding in sorted(findings, key=lambda one: not one.blocks):
        lines.append(f"- {'**Blocks a build:** ' if finding.blocks else ''}{finding.text}")
        lines += [f"  - `{_flat(example)}`" for example in finding.examples]
    lines.append("")
    if reading is not None:
        lines += _report_aliases(aliases)
    lines += _report_mapping(mapping)
    lines += [
        "## Next",
        "",
        f"1. Answer every TODO in `{name}.yaml`, and check what is marked `guessed`.",
        f"2. `panfm shards check {name}.yaml --root FOLDER` says what a build would still trip over.",
        f"3. `panfm shards build {name}.yaml --root FOLDER --out SHARDS --key-file KEY --create-key`, with the key "
        "outside of SHARDS.",
    ]
    return "\n".join(lines) + "\n"


def _report_columns(reading: Reading) -> list[str]:
    roles = {guess.column: guess for guess in reading.guesses}
    rows = []
    for column in reading.header:
        guess = roles.get(column)
        role: str = "not read" if guess is None or guess.role == "free_text" else guess.role
        if reading.match is not None and column == reading.match.column:
            role = f"names the files{'' if guess is None or guess.role == 'path' else f'; {role}'}"
        labels = [label for label, labelled in reading.labels.items() if labelled == column]
        fits = f"{guess.fits} of {guess.known}, by {guess.by}" if guess is not None else ""
        rows.append((column, f"label {labels[0]}" if labels else role, fits))
    dialect = _write_dialect(reading.dialect, reading.table)
    return [
        f"## The table: `{reading.table}`, {len(reading.rows):,} rows",
        "",
        f"Read as `{dialect}`.",
        "",
        *_table(("column", "taken for", "cells that fit"), rows),
        "",
    ]


def _report_aliases(aliases: Sequence[Alias]) -> list[str]:
    lines = ["## Ids that look like one patient", ""]
    if not aliases:
        return [*lines, "None.", ""]
    return [
        *lines,
        "Nothing was merged. One patient under two ids can stand in training and test at once, and two patients under "
        "one id are lost to each other: look at every line of `patient_aliases.proposed.csv`, strike out what is "
        "wrong, save the rest as `patient_aliases.csv` in the archive's folder (a text editor keeps leading zeros, "
        "Excel does not), and take the comment sign off `patient_aliases` in the card.",
        "",
        *_table(
            ("patient_id", "same_as", "why", "weak"),
            [(one.patient_id, one.same_as, one.why, "weak" if one.weak else "") for one in aliases],
        ),
        "",
    ]


def _report_mapping(mapping: Sequence[MappedValue]) -> list[str]:
    rows = [
        (
            one.field,
            one.raw,
            str(one.count),
            one.value or ("**open**" if one.state == "open" else "unknown"),
            one.code or "",
            one.remark,
        )
        for one in mapping
    ]
    if not rows:
        return []
    return [
        "## What texts are mapped to",
        "",
        *_table(("field", "text", "cells", "mapped to", "ICD-10", "remark"), rows),
        "",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    shown = [f"| {' | '.join(_flat(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *shown]


def _flat(text: str) -> str:
    return " ".join(text.split())
