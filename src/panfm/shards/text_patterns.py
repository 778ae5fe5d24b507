"""What identifies a person in any text, without knowing the person: regular expressions and their stated limits.

    "seen on 12 mars 2019 by Dr. Martin" -> find_patterns -> date at 8..20, name at 24..34

English, French and German. A pattern is a net with holes: a name without a title, a nickname or a village in a sentence
passes it. Names, birth dates and numbers of the archive's own patients are found by text_scan, which knows them.
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

PatternKind = Literal["email", "phone", "national_id", "date", "file_name", "name", "long_number"]


class Span(NamedTuple):
    """Characters `start` to `end` of a text, and what they are."""

    start: int
    end: int
    kind: str


# Their own words are all that makes these months; "may", "march", "mar" and "mars" are common words besides.
_MONTHS = (
    "january|february|april|june|july|august|september|october|november|december"
    "|janvier|février|fevrier|avril|juin|juillet|août|aout|septembre|octobre|novembre|décembre|decembre"
    "|januar|februar|märz|maerz|juni|juli|oktober|dezember|jänner"
)
_SHORT_MONTHS = (
    "jan|feb|apr|jun|jul|aug|sept?|oct|nov|dec|janv|févr?|fevr?|avr|juil|déc|mär|okt|dez|may|mai|march|mars|mar"
)
_ANY_MONTH = rf"(?:{_MONTHS}|{_SHORT_MONTHS})\b\.?"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_MONTH = r"(?:0?[1-9]|1[0-2])"
_YEAR = r"(?:19|20)\d\d"
_EDGE, _END = r"(?<![\w.,/-])", r"(?![\w/-]|[.,]\d)"  # no part of a longer number, code or fraction

_TITLES = (
    r"(?:(?:M[Rr][Ss]?|Ms|D[Rr]|Prof|Pr|Hr|Sr|Sra|M[Mm][Ee]|M[Ll][Ll][Ee]|Vve)\b\.?|Miss|M\.|Monsieur|Madame"
    r"|MONSIEUR|MADAME|Mademoiselle|Docteure?|Doctor|Professeur|Professor|Herrn?|HERRN?|Frau|FRAU|Señora?|Signora?)"
)
_NAME = r"(?:[A-ZÀ-ÖØ-Þ]\.[\s-]?){0,3}[A-ZÀ-ÖØ-Þ][\w'’-]+"
_PARTICLES = r"(?:(?:de|du|des|la|le|von|van|der|den|zu|di|da|el|al|bin|ben)\s+|d['’])*"
_FULL_NAME = rf"{_PARTICLES}{_NAME}(?:\s+{_PARTICLES}{_NAME}){{0,3}}"
_NAME_FIELDS = (
    r"(?:patient(?:in|e)?|pat|name|surname|first name|last name|nom|prénom|prenom|nachname|vorname|née?|geb|geboren)"
)

# In this order: where two overlap the first counts.
PATTERNS: dict[PatternKind, re.Pattern[str]] = {
    "email": re.compile(r"[\w.+-]+\s?@\s?[\w-]+(?:\.[\w-]+)+"),
    "national_id": re.compile(
        # French NIR, 13 digits and a check of 2; Swiss AHV; US social security.
        r"(?<!\d)[12]\s?\d\d\s?(?:0[1-9]|1[0-2]|[2-9]\d)\s?(?:\d\d|2[ABab])\s?\d{3}\s?\d{3}(?:\s?\d\d)?(?!\d)"
        r"|(?<!\d)756\.\d{4}\.\d{4}\.\d\d(?!\d)"
        r"|(?<![\d-])\d{3}-\d\d-\d{4}(?![\d-])"
    ),
    "phone": re.compile(
        r"(?<![\w.+])(?:\+|00)(?=[1-9](?:[\s./()-]*\d){7})\d{1,3}(?:[\s./-]?\(?\d{1,5}\)?){2,6}(?!\d)"  # +33 1 ...
        r"|(?<![\w.,-])0[1-9](?:([\s.-])\d\d)(?:\1\d\d){3}(?![\w-])"  # 01 42 49 49 49
        r"|(?<![\w.,-])0[1-9]\d{8,9}(?!\d)"  # 0142494949
        r"|(?<![\w.,-])0[1-9]\d{1,3}[\s/-]\s?\d{3,}(?:[\s-]?\d{2,4}){0,3}(?![\w-])"  # 044 255 11 11, 030/1234567
        r"|(?<![\w.,-])(?:\([2-9]\d\d\)\s?|[2-9]\d\d[\s.-])\d{3}[\s.-]\d{4}(?![\w-])"  # (212) 555-0123
        r"|(?i:\b(?:tel|tél|phone|téléphone|telefon|fon|mobile?|handy|fax)\b)\.?\s*:?\s*\+?\d(?:[\s./()-]*\d){5,}"
    ),
    "date": re.compile(
        rf"{_EDGE}{_DAY}([./-]){_MONTH}\1(?:{_YEAR}|\d\d){_END}"  # 12.03.2019
        rf"|{_EDGE}{_MONTH}([./-]){_DAY}\2(?:{_YEAR}|\d\d){_END}"  # 03/12/2019
        rf"|(?<!\d){_YEAR}([./:-]){_MONTH}\3{_DAY}(?!\d)"  # 2019-03-12, and 2019:03:12 as EXIF has it
        rf"|(?<![\w.]){_DAY}(?:st|nd|rd|th|er|\.)?\s+(?:of\s+)?(?i:{_MONTHS})\b(?:,?\s+{_YEAR})?"  # 12th of March
        rf"|(?<![\w.]){_DAY}(?:st|nd|rd|th|er|\.)?[\s-]+(?:of\s+)?(?i:{_ANY_MONTH}),?[\s-]+(?:{_YEAR}|\d\d)(?!\w)"
        rf"|\b(?i:{_MONTHS})\s+{_DAY}(?:st|nd|rd|th)?(?![\w%.])(?:,?\s+{_YEAR}\b)?"  # February 12, 2019
        rf"|\b(?i:{_ANY_MONTH})\s+{_DAY}(?:st|nd|rd|th)?,?\s+{_YEAR}\b"
        rf"|\b(?i:{_ANY_MONTH})\s+{_YEAR}\b"  # mars 2019
    ),
    "file_name": re.compile(
        r"[^\s,;:'\"()\[\]]+\.(?i:jpe?g|png|tiff?|bmp|gif|webp|heic|dcm|dicom|svs|ndpi|mrxs|scn|raw|cr2|nef|dng)\b"
    ),
    "name": re.compile(
        rf"(?<!\w){_TITLES}\s+{_FULL_NAME}"
        rf"|(?<!\w)(?i:{_NAME_FIELDS})\.?\s*:\s*{_FULL_NAME}"
        rf"|\b{_NAME}['’]s\s+(?:i?[Pp]hone|iPad|[Cc]amera|[Gg]alaxy)"  # what phones call themselves
    ),
    # Six digits are fewer than any hospital's patients; decimals ("0.123456") are measurements.
    "long_number": re.compile(r"(?<!\d)(?<!\d[.,])\d{6,}(?![.,]?\d)"),
}


def find_patterns(text: str) -> Iterator[Span]:
    """Yield every match of every pattern, which may overlap."""
    for kind, pattern in PATTERNS.items():
        for match in pattern.finditer(text):
            yield Span(match.start(), match.end(), kind)
