"""What the cells of a hospital's columns are called with us, value by value: known, open, or merely suggested.

    texts of a column with their numbers  ->  map_values / map_diagnoses  ->  MappedValue a text  ->  card and report

Only a text that is written in a known way is mapped. Everything else stays open (null in the card, marked TODO): a
wrong label is worse than none, and whether "M" is male or mujer is for the hospital to say.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from panfm.shards.drafting.columns import find_diagnosis, find_word, is_diagnosis_code
from panfm.shards.drafting.vocabulary import (
    CONFIRMATIONS,
    DOUBT,
    ICD10,
    MALIGNANT,
    MODALITY_WORDS,
    NO,
    SEXES,
    SYNONYMS,
    YES,
    fold,
)

MAX_LABEL_VALUES = 300  # more different texts than this are sentences, not classes


@dataclass(frozen=True)
class MappedValue:
    """One text of a column: how often it stands there, what it becomes, and what a person should know about that."""

    field: str  # sex, modality, ..., or the name of a label
    raw: str
    count: int
    value: str | None
    state: Literal["known", "open"]
    code: str | None = None  # ICD-10, of a diagnosis
    remark: str = ""


def map_sex(texts: Counter[str]) -> tuple[MappedValue, ...]:
    """Female, male or other; M is male only beside an F or a W, and numbers are never guessed."""
    folded = {fold(cell) for cell in texts}
    female_is_clear = bool(folded & {"f", "w"}) and "h" not in folded
    mapped = []
    for cell, count in texts.most_common():
        word = fold(cell)
        value, remark = SEXES.get(word), ""
        if word == "m" and female_is_clear:
            value = "male"
        elif word == "m":
            remark = "male (masculin, Mann) or female (mujer)? Say which"
        elif value is None:
            remark = "which sex is this? The table does not say" if cell.isdigit() else "not known to panfm"
        mapped.append(_decide("sex", cell, count, value, remark))
    return tuple(mapped)


def map_modality(texts: Counter[str]) -> tuple[MappedValue, ...]:
    """Clinical, dermoscopic, total_body or histopathology by the word in the cell."""
    return tuple(
        _decide("modality", cell, count, _find_sure(cell, MODALITY_WORDS), "which modality is this?")
        for cell, count in texts.most_common()
    )


def map_confirmation(texts: Counter[str], column: str) -> tuple[MappedValue, ...]:
    """What a diagnosis rests on; yes and no count as histopathology only under a column that is named after it."""
    about_histology = find_word(column, {"it": CONFIRMATIONS["histopathology"]}) is not None
    mapped = []
    for cell, count in texts.most_common():
        word = fold(cell)
        value, remark = _find_sure(cell, CONFIRMATIONS), "one expert, a consensus, or nothing at all?"
        if word in YES | NO:
            value = "histopathology" if about_histology and word in YES else None
            remark = "confirmed by what?"
            if about_histology and word in NO:
                mapped.append(MappedValue("confirmed_by", cell, count, None, "known", remark="not confirmed by it"))
                continue
        mapped.append(_decide("confirmed_by", cell, count, value, remark))
    return tuple(mapped)


def map_malignant(texts: Counter[str], column: str) -> tuple[MappedValue, ...]:
    """Benign or malignant; yes and no count only under a column that is named after malignancy alone."""
    words = fold(column).split()
    asks = any(MALIGNANT.get(word) == "malignant" or word.startswith("malign") for word in words)
    asks = asks and not any(MALIGNANT.get(word) == "benign" for word in words)
    mapped = []
    for cell, count in texts.most_common():
        word = fold(cell)
        value = MALIGNANT.get(word)
        if value is None and asks and word in YES | NO:
            value = "malignant" if word in YES else "benign"
        mapped.append(_decide("malignant", cell, count, value, "benign or malignant?"))
    return tuple(mapped)


def map_diagnoses(label: str, texts: Counter[str]) -> tuple[MappedValue, ...]:
    """Our names of diagnoses with their ICD-10 codes; a known name inside a longer text is only suggested."""
    mapped = []
    for cell, count in texts.most_common():
        value, remark = find_diagnosis(cell), "not known to panfm"
        if value is None:
            inside = _find_inside(cell)
            if is_diagnosis_code(cell):
                remark = "a code that joins several diagnoses, or one unknown to panfm"
            elif len(inside) == 1:
                remark = f"holds the name of {inside[0]}; map it if that is what is meant"
            elif inside:
                remark = f"holds the names of {', '.join(inside)}"
            if DOUBT.search(cell.casefold()):
                remark += "; reads like a question or a list of several"
        mapped.append(_decide(label, cell, count, value, remark, code=ICD10.get(value or "")))
    return tuple(mapped)


def _decide(field: str, cell: str, count: int, value: str | None, remark: str, code: str | None = None) -> MappedValue:
    if value is None:
        return MappedValue(field, cell, count, None, "open", remark=remark)
    return MappedValue(field, cell, count, value, "known", code)


def _find_sure(cell: str, words: Mapping[str, tuple[str, ...]]) -> str | None:
    """As find_word, but "pas d'histologie" and "photo et dermoscopie" are not what the word in them says."""
    found = find_word(cell, words)
    return None if found is None or (fold(cell) not in words[found] and DOUBT.search(cell.casefold())) else found


def _find_inside(cell: str) -> list[str]:
    """Diagnoses whose names stand in a longer text; a name within a longer name does not count."""
    rest = f" {fold(cell)} "
    found = []
    for name in sorted(SYNONYMS, key=len, reverse=True):
        if len(name) > 3 and f" {name} " in rest:
            found.append(SYNONYMS[name])
            rest = rest.replace(f" {name} ", " | ")
    return list(dict.fromkeys(found))


def name_label(column: str) -> str:
    """What the label of a diagnosis column is called: by what the diagnosis rests on, if its name says so."""
    words: Mapping[str, tuple[str, ...]] = {
        "diagnosis_histology": (*CONFIRMATIONS["histopathology"], "histologische", "histologico", "pathological"),
        "diagnosis_clinical": ("clinical", "clinique", "klinisch", "klinische", "clinico", "clinica"),
    }
    return find_word(column, words) or "diagnosis"
