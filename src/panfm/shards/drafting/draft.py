"""A hospital's first hour: a folder of images and the table that came with it -> a source card to review.

    FOLDER + export.xlsx  ->  draft_card  ->  Draft  ->  write_draft  ->  NAME.yaml, NAME.report.md,
                                                                          patient_aliases.proposed.csv, NAME.files.csv

Everything in the card is a guess that says what it rests on, or a TODO. Nothing is merged, corrected or left out by
itself: what contradicts itself is a finding. The report and the two lists hold raw ids and stay with the archive.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from panfm.errors import UserError
from panfm.files import write_text
from panfm.shards.drafting.aliases import Alias, propose_aliases
from panfm.shards.drafting.columns import is_missing
from panfm.shards.drafting.files import LIST_HEADER, list_images
from panfm.shards.drafting.findings import (
    Finding,
    find_bad_cells,
    find_conflicts,
    find_damaged_ids,
    find_file_faults,
    gather_persons,
)
from panfm.shards.drafting.listing import draft_listing_card
from panfm.shards.drafting.reading import Reading, read_table
from panfm.shards.drafting.text import write_card_text, write_report_text
from panfm.shards.drafting.values import MappedValue
from panfm.shards.drafting.vocabulary import fold
from panfm.shards.spreadsheets import EXCEL_SUFFIXES, list_sheets

ALIASES_FILE = "patient_aliases.proposed.csv"


@dataclass(frozen=True)
class Draft:
    """A proposed card with everything that a person needs to judge it."""

    name: str
    card: str  # YAML with comments; panfm.shards.cards.load_card accepts it
    report: str  # Markdown; holds raw ids
    findings: tuple[Finding, ...]
    aliases: tuple[Alias, ...] = ()
    mapping: tuple[MappedValue, ...] = ()
    listed: tuple[tuple[str, str], ...] = ()  # NAME.files.csv with its header; empty if the card needs none
    num_rows: int = 0
    num_files: int = 0

    @property
    def num_questions(self) -> int:
        """How many TODOs the card holds."""
        return self.card.count("TODO")

    def __str__(self) -> str:
        """A summary for the terminal, without raw ids."""
        rows = f"{self.num_rows:,} rows, " if self.num_rows else ""
        lines = [f"{self.name}: {rows}{self.num_files:,} image files; {self.num_questions} open questions (TODO)"]
        lines += [f"{'! ' if finding.blocks else '- '}{finding.text}" for finding in self.findings]
        if self.aliases:
            weak = sum(1 for alias in self.aliases if alias.weak)
            lines.append(
                f"- {len(self.aliases)} ids look like another patient's ({weak} of them weakly); none was merged"
            )
        for state, words in (("known", "were mapped"), ("open", "are open")):
            found = [one for one in self.mapping if one.state == state]
            if found:
                lines.append(f"- {len(found)} texts in {sum(one.count for one in found):,} cells {words}")
        if any(finding.blocks for finding in self.findings):
            lines.append("! means: a build refuses the archive until this is settled")
        return "\n".join(lines)


def draft_card(folder: str | Path, table: str | Path | None = None, name: str | None = None) -> Draft:
    """Look at a folder of images and its table (None: the folders are the classes) and draft a source card.

    Raises UserError for a folder without images, a table outside of it or without rows, and whatever reading the
    table raises.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder that holds the images")
    name = name or "_".join(fold(folder.resolve().name).split()) or "archive"
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(f"name {name!r}: a source's name has only a-z, 0-9 and _; for example north_clinic")
    files = list_images(folder)
    if not files:
        raise UserError(f"{folder}: holds no image files (.jpg .png .tif .dcm .svs ...); name the folder that does")
    if table is None:
        card, findings, mapping = draft_listing_card(name, files)
        report = write_report_text(name, None, findings, (), mapping)
        return Draft(name, card, report, findings, mapping=mapping, num_files=len(files))
    path = _find_table(folder, Path(table))
    reading = read_table(name, path, path.relative_to(folder.resolve()).as_posix(), files)
    findings = tuple(_find_all(reading, path, files))
    persons = gather_persons(reading.sheet, {one.raw: one.value for one in reading.mapping if one.field == "sex"})
    aliases = propose_aliases(persons)
    return Draft(
        name=name,
        card=write_card_text(reading),
        report=write_report_text(name, reading, findings, aliases, reading.mapping),
        findings=findings,
        aliases=aliases,
        mapping=reading.mapping,
        listed=_list_files(reading),
        num_rows=len(reading.rows),
        num_files=len(files),
    )


def write_draft(draft: Draft, out: str | Path, *, force: bool = False) -> tuple[Path, ...]:
    """Write the card, the report and the lists of a draft into a folder, and return their paths.

    Raises UserError where one of them exists already, unless `force`: it may hold somebody's answers.
    """
    out = Path(out)
    texts = {f"{draft.name}.yaml": draft.card, f"{draft.name}.report.md": draft.report}
    if draft.listed:
        texts[f"{draft.name}.files.csv"] = _to_csv(draft.listed)
    if draft.aliases:
        rows = [("patient_id", "same_as", "why")]
        rows += [(one.patient_id, one.same_as, f"{'weak: ' if one.weak else ''}{one.why}") for one in draft.aliases]
        texts[ALIASES_FILE] = _to_csv(rows)
    for file in texts:
        if (out / file).exists() and not force:
            raise UserError(f"{out / file}: is there already and may hold your answers; give --force to replace it")
    for file, text in texts.items():
        write_text(out / file, text)
    return tuple(out / file for file in texts)


def _to_csv(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _find_table(folder: Path, table: Path) -> Path:
    for path in (table, folder / table):
        if path.is_file():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"{path}: lies outside {folder}; a card names its table below the folder, so copy it there"
                )
            return path.resolve()
    raise UserError(f"{table}: no such file, here or in {folder}; name the table that describes the images")


# ------------------------------------------------------------------------------------------------ what was found


def _find_all(reading: Reading, path: Path, files: Sequence[str]) -> list[Finding]:
    sheet, rows = reading.sheet, reading.rows
    persons = gather_persons(sheet, {one.raw: one.value for one in reading.mapping if one.field == "sex"})
    findings = list(find_file_faults(rows, files, reading.match, reading.masks))
    ids = [sheet.columns[role] for role in ("patient_id", "lesion_id") if role in sheet.columns]
    findings += find_damaged_ids(rows, dict.fromkeys([*ids, *([reading.match.column] if reading.match else [])]))
    if "patient_id" not in sheet.columns:
        findings.append(
            Finding(
                "ids",
                "no column names the patients: images of one patient can stand on both sides of a split; add an id of "
                "the patient to the export, a number that means nothing outside is enough",
            )
        )
    findings += find_conflicts(sheet, persons)
    findings += find_bad_cells(sheet, reading.mapping)
    findings += [Finding("columns", note) for note in reading.notes]
    if path.suffix.lower() in EXCEL_SUFFIXES and len(sheets := list_sheets(path)) > 1:
        findings.append(Finding("columns", f"of {len(sheets)} sheets only {reading.dialect.sheet!r} is read"))
    return findings


def _list_files(reading: Reading) -> tuple[tuple[str, str], ...]:
    """The rows of NAME.files.csv, header first; empty where templates say it all."""
    match = reading.match
    if match is None or not match.listed:
        return ()
    if match.way == "by_file":
        return (("path", match.column), *((path, cell) for cell, path in match.listed))
    # A row without a file must find some name here, so that the build counts it as missing and goes on.
    known = {cell for cell, _ in match.listed}
    lost = {row[match.column] for _, row in reading.rows if not is_missing(row[match.column])} - known
    return (LIST_HEADER, *match.listed, *((cell, re.split(r"[/\\]", cell)[-1] or "unnamed") for cell in sorted(lost)))
