"""What people found out after the table was written: patients written several ways, and labels that were wrong.

    ROOT/patient_aliases.csv (patient_id, same_as)                      one patient, not three: a wrong split is leakage
    ROOT/corrections.csv (key, label, old, new, version[, reason, ...]) the new value counts, the first one is kept

Both are files of the archive, written by a person. panfm proposes aliases (`panfm shards draft`) and never makes them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from panfm.errors import UserError
from panfm.shards.cards import SourceCard
from panfm.shards.dialects import detect_dialect
from panfm.shards.spreadsheets import read_spreadsheet


@dataclass(frozen=True)
class Correction:
    """One corrected label of one image; `old` must be the value that it replaces."""

    line: int
    key: str
    label: str
    old: str
    new: str  # empty: the label is unknown after all
    version: int


@dataclass
class Amendments:
    """Both files of a source, looked up by id; remembers which corrections found their image."""

    corrections_path: Path | None = None
    patients: dict[str, str] = field(default_factory=dict)
    corrections: dict[str, list[Correction]] = field(default_factory=dict)  # key -> in order of version
    label_version: int = 0  # the newest version among the corrections
    used: set[str] = field(default_factory=set)

    def find_patient(self, patient_id: str | None) -> str | None:
        """The id under which a patient is known."""
        return None if patient_id is None else self.patients.get(patient_id, patient_id)

    def correct(self, key: str, labels: dict[str, str]) -> dict[str, str]:
        """The labels of an image with its corrections applied; NAME@original keeps what the table said."""
        for one in self.corrections.get(key, ()):
            self.used.add(key)
            if (found := labels.get(one.label, "")) != one.old:
                raise UserError(
                    f"{self.corrections_path}, line {one.line}: {one.label} of {key!r} is {found!r}, "
                    f"not {one.old!r}; a correction must name the value that it replaces, so look at this one again"
                )
            labels.setdefault(f"{one.label}@original", one.old or "unknown")
            if one.new:
                labels[one.label] = one.new
            else:
                labels.pop(one.label, None)
        return labels

    def check_all_used(self) -> None:
        """Raise UserError for a correction whose image is not in the table: probably a misspelt key."""
        for key, corrections in self.corrections.items():
            if key not in self.used:
                raise UserError(
                    f"{self.corrections_path}, line {corrections[0].line}: no image has the key {key!r}; keys are "
                    "those of columns.key, else the path of the image in the archive"
                )


def read_amendments(card: SourceCard, root: Path) -> Amendments:
    """Read the aliases and corrections that a card names; empty ones where it names none."""
    amendments = Amendments()
    if card.patient_aliases is not None:
        amendments.patients = _read_aliases(root / card.patient_aliases)
    if card.corrections is not None:
        path = amendments.corrections_path = root / card.corrections
        for one in sorted(_read_corrections(card, path), key=lambda one: (one.version, one.line)):
            amendments.corrections.setdefault(one.key, []).append(one)
            amendments.label_version = max(amendments.label_version, one.version)
    return amendments


def _read_aliases(path: Path) -> dict[str, str]:
    """patient_id -> the id at the end of its chain of same_as."""
    same: dict[str, str] = {}
    for line, row in _read(path, ("patient_id", "same_as")):
        name, other = row["patient_id"], row["same_as"]
        if not name or not other or same.setdefault(name, other) != other:
            raise UserError(
                f"{path}, line {line}: patient {name!r} is {other!r} here and {same.get(name)!r} before; "
                "give each patient_id one same_as"
            )
    ends = {}
    for name, first in same.items():
        seen, end = {name}, first
        while end in same:
            if end in seen:
                raise UserError(f"{path}: {name!r} and {end!r} name each other in a circle; keep one of them as the id")
            seen.add(end)
            end = same[end]
        ends[name] = end
    return ends


def _read_corrections(card: SourceCard, path: Path) -> list[Correction]:
    corrections = []
    for line, row in _read(path, ("key", "label", "old", "new", "version")):
        if row["label"] not in card.labels:
            raise UserError(
                f"{path}, line {line}: {row['label']!r} is no label of card {card.name}, which has "
                f"{', '.join(card.labels)}"
            )
        known = card.labels[row["label"]].known_values
        if row["new"] and known is not None and row["new"] not in known:
            raise UserError(
                f"{path}, line {line}: new value {row['new']!r} is none of {row['label']} in card {card.name} "
                f"({', '.join(sorted(known))}); correct its spelling, or add it to the card's values"
            )
        if not row["version"].isdigit() or int(row["version"]) < 1:
            raise UserError(f"{path}, line {line}: version {row['version']!r}; it must be a whole number from 1 on")
        corrections.append(Correction(line, row["key"], row["label"], row["old"], row["new"], int(row["version"])))
    return corrections


def _read(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the card names it, so put it there or take it out of the card")
    header, rows = read_spreadsheet(path, detect_dialect(path))  # a person saved it, in whatever Excel they have
    for column in columns:
        if column not in header:
            raise UserError(f"{path}: has no column {column}; it needs {', '.join(columns)}")
    return list(rows)
