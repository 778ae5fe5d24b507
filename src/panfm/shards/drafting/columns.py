"""Which column of a hospital's table means what: by its name in four languages, then by what its cells hold.

    header, rows  ->  guess_columns  ->  Guess(role, column, how many cells fit), notes on names that the cells belie

A name alone decides for ids and names of people; everything else must also look like what its name says.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from itertools import islice
from typing import Literal

from panfm.shards.drafting.vocabulary import (
    CODE_GROUPS,
    CONFIRMATIONS,
    DOUBT,
    GENERAL_WORDS,
    HEADERS,
    MALIGNANT,
    MISSING,
    MISSING_SIGNS,
    MODALITY_WORDS,
    NEVER_STORED,
    NO,
    READER,
    SEXES,
    SPLITS,
    SYNONYMS,
    YES,
    Role,
    fold,
)

Row = dict[str, str]
Rows = Sequence[tuple[int, Row]]  # (line, cells)

DATE_FORMATS = (
    *("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%Y%m%d"),
    *("%d/%m/%y", "%m/%d/%y", "%d.%m.%y", "%d-%m-%y", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"),
    *("%d/%m/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%d.%m.%Y %H:%M"),
)
ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6}
AGE = re.compile(r"(\d{1,3}(?:[.,]\d+)?)\s*(?:ans?|years?|yrs?|y|yo|jahre?|j|anos?|años?|a)?", re.IGNORECASE)
PERSONAL = re.compile(
    r"[^@\s]+@[^@\s]+\.[a-z]{2,}"  # e-mail
    r"|(?:\+\d{1,3}|0)[ .]?\d(?:[ .-]?\d{2}){4}"  # telephone
    r"|[12][ .]?\d{2}[ .]?(?:0[1-9]|1[0-2]|[2-9]\d)[ .]?\d[\dAB][ .]?\d{3}[ .]?\d{3}(?:[ .]?\d{2})?",  # French NIR
    re.IGNORECASE,
)
MIN_SHARE = 0.5  # of the known cells that must look like what the name says


@dataclass(frozen=True)
class Guess:
    """A column taken for something. `fits` of its `known` cells look like it; `by` says what decided."""

    role: Role
    column: str
    fits: int
    known: int
    by: Literal["name", "content"]
    reader: str | None = None  # whose label it is, where several readers' stand side by side


@dataclass(frozen=True)
class DateReading:
    """How a column's dates are to be read: the format, the lines that do not fit it, and whether another fits too."""

    format: str
    misfits: tuple[int, ...]
    alternative: str | None  # day and month could be the other way round


def is_missing(cell: str) -> bool:
    """Whether a cell says that something is not known."""
    return cell == "" or cell in MISSING_SIGNS or fold(cell) in MISSING


def count_known(rows: Rows, column: str) -> Counter[str]:
    """The texts of a column and their numbers, without the empty ones and those that mean "unknown"."""
    return Counter(row[column] for _, row in rows if not is_missing(row[column]))


def parse_phototype(cell: str) -> tuple[int, int] | None:
    """Fitzpatrick type or range: "III", "2", "type IV", "II-III", "2 à 3"; None for anything else."""
    words = [word for word in fold(cell).split() if word not in ("type", "phototype", "fitzpatrick", "typ", "a", "to")]
    if words[1:] == ["0"]:  # "3.0"
        words = words[:1]
    numbers = [ROMAN.get(word) or (int(word) if word in ("1", "2", "3", "4", "5", "6") else 0) for word in words]
    if len(numbers) not in (1, 2) or 0 in numbers:
        return None
    return min(numbers), max(numbers)


def parse_age(cell: str) -> float | None:
    """Years from "45", "45,5" or "45 ans"; None for anything else."""
    match = AGE.fullmatch(cell.strip())
    years = float(match[1].replace(",", ".")) if match else None
    return years if years is not None and years <= 130 else None


@lru_cache(maxsize=1 << 17)
def parse_date(cell: str, date_format: str) -> date | None:
    """A date, or None where the cell is none."""
    try:
        return datetime.strptime(cell, date_format).date()
    except ValueError:
        return None


def find_word(cell: str, words: Mapping[str, Iterable[str]]) -> str | None:
    """The first key that has the folded cell, or one of the words in it, among its words."""
    folded = fold(cell)
    for key, known in words.items():
        if folded in known:
            return key
    padded = f" {folded} "
    return next((key for key, known in words.items() if any(f" {word} " in padded for word in known)), None)


def find_diagnosis(cell: str) -> str | None:
    """Our name for a diagnosis that is written in one of its known ways, or as an ICD-10 code; None if in doubt."""
    if DOUBT.search(cell.casefold()):
        return None
    if (name := SYNONYMS.get(fold(cell))) is not None:
        return name
    if re.fullmatch(r"[A-Z]\d\d(?:\.?\d{1,2})?", cell):
        return next(
            (name for code, name in CODE_GROUPS.items() if cell.replace(".", "").startswith(code.replace(".", ""))),
            None,
        )
    return None


def is_diagnosis_code(cell: str) -> bool:
    """Whether a cell looks like an ICD-10 code."""
    return re.fullmatch(r"[A-Z]\d\d(?:\.?\d{1,2})?", cell) is not None


def read_dates(rows: Rows, column: str, *, day_first: bool | None) -> DateReading | None:
    """Find the format that most cells of a column fit; `day_first` decides between equals if it is known."""
    known = [(line, row[column]) for line, row in rows if not is_missing(row[column])]
    texts = Counter(cell for _, cell in known)
    if not any(_looks_like_date(cell) for cell in islice(texts, 100)):
        return None
    fits = {
        one: sum(count for cell, count in texts.items() if parse_date(cell, one) is not None) for one in DATE_FORMATS
    }
    best = max(DATE_FORMATS, key=lambda one: (fits[one], _prefers(one, day_first)))
    if not known or fits[best] < MIN_SHARE * len(known):
        return None
    turned = best.replace("%d", "%_").replace("%m", "%d").replace("%_", "%m")
    is_open = best.find("%Y") != 0 and fits.get(turned) == fits[best] and _differ(texts, best, turned)
    misfits = tuple(line for line, cell in known if parse_date(cell, best) is None)
    return DateReading(best, misfits, turned if is_open else None)


def _prefers(date_format: str, day_first: bool | None) -> int:
    if day_first is None or date_format.startswith("%Y"):
        return 1
    return int(date_format.startswith("%d") == day_first)


def _differ(texts: Iterable[str], one: str, other: str) -> bool:
    return any(parse_date(cell, one) != parse_date(cell, other) for cell in texts)


# ------------------------------------------------------------------------------------------------ roles


def _looks_like_text(cell: str) -> bool:
    return re.search(r"[^\W\d_]", cell) is not None


def _looks_like_date(cell: str) -> bool:
    return any(parse_date(cell, one) is not None for one in DATE_FORMATS)


# What a cell must look like for its column's name to be believed; roles that are not here are believed by name.
LOOKS: dict[Role, Callable[[str], bool]] = {
    "visit_date": _looks_like_date,
    "age": lambda cell: parse_age(cell) is not None,
    "sex": lambda cell: fold(cell) in SEXES or fold(cell) in ("m", "0", "1", "2"),
    "phototype": lambda cell: parse_phototype(cell) is not None,
    "anatomic_site": _looks_like_text,
    "malignant": lambda cell: fold(cell) in YES | NO or fold(cell) in MALIGNANT,
    "confirmed_by": lambda cell: fold(cell) in YES | NO or find_word(cell, CONFIRMATIONS) is not None,
    "modality": lambda cell: find_word(cell, MODALITY_WORDS) is not None,
    "device": _looks_like_text,
    "institution": _looks_like_text,
    "official_split": lambda cell: fold(cell) in SPLITS,
    "birth_date": lambda cell: _looks_like_date(cell) or re.fullmatch(r"(?:18|19|20)\d\d", cell) is not None,
}
# What cells alone give away. A lone "M" or "V" is no proof, so one text in the column is not enough.
TELLING: dict[Role, Callable[[str], bool]] = {
    "identifying": lambda cell: PERSONAL.fullmatch(cell) is not None,
    "sex": lambda cell: fold(cell) in SEXES or fold(cell) == "m",
    "phototype": lambda cell: parse_phototype(cell) is not None and not re.search(r"\d", cell),
    "diagnosis": lambda cell: find_diagnosis(cell) is not None,
    "modality": lambda cell: any(fold(cell) in words for words in MODALITY_WORDS.values()),
}
MANY: tuple[Role, ...] = (*NEVER_STORED, "diagnosis", "free_text")  # roles that several columns may have


def guess_columns(header: Sequence[str], rows: Rows) -> tuple[tuple[Guess, ...], tuple[str, ...]]:
    """Say what the columns are, each at most once, and what seemed to be something but is not.

    Of several columns for one role the best fitting wins; a second patient number becomes an identifying column.
    """
    known = {column: count_known(rows, column) for column in header}
    candidates: list[tuple[tuple[int, float, int], Guess]] = []
    notes = []
    for place, column in enumerate(header):
        texts = known[column]
        total = texts.total()
        role, strength, reader = _read_name(column)
        if role == "confirmed_by" and _share(texts, find_diagnosis) > max(0.3, _share(texts, LOOKS["confirmed_by"])):
            role = "diagnosis"  # "histologie" with what the pathologist wrote
        if role == "diagnosis" and strength == 1 and reader and _share(texts, find_diagnosis) < 0.3:
            role = "identifying"  # "lecteur 1" with the reader's name
        if total == 0 and role not in NEVER_STORED:
            continue
        if role is not None:
            share = _share(texts, LOOKS[role]) if role in LOOKS and total else 1.0
            if share >= MIN_SHARE or (role in NEVER_STORED):
                fits = round(share * total)
                guess = Guess(role, column, fits, total, "name", reader)
                candidates.append(((strength, share, -place), guess))
                continue
            notes.append(
                f"column {column!r} is called like {role}, but {round(share * total)} of its {total} cells look like it"
            )
        for told, looks in TELLING.items():
            share = _share(texts, looks)
            if share >= (0.8 if told != "diagnosis" else MIN_SHARE) and (len(texts) > 1 or told == "identifying"):
                candidates.append(((0, share, -place), Guess(told, column, round(share * total), total, "content")))
                break
    guesses: list[Guess] = []
    taken: set[Role] = set()
    for _, guess in sorted(candidates, key=lambda pair: pair[0], reverse=True):
        if guess.role in MANY or guess.role not in taken:
            taken.add(guess.role)
            guesses.append(guess)
        elif guess.role == "patient_id":
            guesses.append(Guess("identifying", guess.column, guess.known, guess.known, "name"))
        elif guess.role != "path":  # which column names the files, the files will say
            first = next(one.column for one in guesses if one.role == guess.role)
            notes.append(f"column {guess.column!r} could be {guess.role} too; {first!r} was taken")
    return tuple(sorted(guesses, key=lambda guess: header.index(guess.column))), tuple(notes)


def _share(texts: Counter[str], looks: Callable[[str], object]) -> float:
    total = texts.total()
    return sum(count for cell, count in texts.items() if looks(cell)) / total if total else 0.0


def _read_name(column: str) -> tuple[Role | None, int, str | None]:
    """Role by name, how strongly (2: the name itself, 1: words in it), and the reader that it names."""
    folded = fold(column)
    reader = None
    if match := READER.search(folded):
        reader = f"reader_{match[1]}"
        folded = " ".join((folded[: match.start()] + folded[match.end() :]).split())
        if folded == "":
            return "diagnosis", 1, reader
    squeezed = folded.replace(" ", "")
    for role, words in HEADERS.items():
        if folded in words or squeezed in {word.replace(" ", "") for word in words}:
            return role, 2, reader if role == "diagnosis" else None
    # "Sexe du patient": the longest known name inside it; at equal length the names that keep people out go first.
    best: tuple[int, int, Role] | None = None
    for role, words in HEADERS.items():
        for word in words:
            if f" {word} " in f" {folded} " and word not in GENERAL_WORDS and len(word) > 1:
                rank = (len(word.split()), int(role in NEVER_STORED), role)
                best = rank if best is None or rank[:2] > best[:2] else best
    return (best[2], 1, reader if best[2] == "diagnosis" else None) if best else (None, 0, None)
