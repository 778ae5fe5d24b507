"""Texts as the scan compares them: ids and names without case, accents and separators, and their places in a sentence.

    "see PAT-0042_b.jpg" -> read_words -> runs see, pat, 0042, b, jpg and windows pat0042, pat0042b, ... with places
                         -> find_hashes -> which of them are ids that must not be there

Millions of ids are kept as sorted 8-byte hashes; with a million captions the odds of one false alarm are 1 : 10,000.
"""

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from panfm.shards.text_patterns import Span

MAX_RUNS = 8  # runs of letters or digits that one id may be spread over in a sentence

_RUN = re.compile(r"[^\W\d_]+|\d+")
_GLUE = re.compile(r"[ _./'’#:-]?")  # between two runs of one id
_NUMBER_GLUE = re.compile(r"[_-]")  # between two runs of digits: "2.5 x 10 12" are no ids
_TOKEN = re.compile(r"[^\s,;:()\[\]\"]+")
_CHUNK = re.compile(r"[^\W_](?:\S*[^\W_])?")
_DECIMAL = re.compile(r"\d+[.,/]\d+")  # a ratio too
_SENTENCE = re.compile(r"[.!?:\n]\s*\W*$")


@dataclass(frozen=True)
class Words:
    """A text as it is compared; the kind of each span is its text in that form."""

    runs: tuple[Span, ...]  # runs of letters or of digits
    windows: tuple[Span, ...]  # up to MAX_RUNS neighbouring runs as one, 4 characters or more; whole tokens


def split(text: str) -> list[str]:
    """Runs of letters or of digits, without case and accents: "Pat-007 é" -> pat, 007, e."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _RUN.findall(text.casefold())


def shorten(form: str) -> str:
    """Leading zeros are lost where spreadsheets take ids for numbers: 0042 is 42."""
    return form.lstrip("0") if form.isdigit() else form


def read_words(text: str) -> Words:
    """Split a text into what may be an id or a name."""
    runs = tuple(Span(match.start(), match.end(), "".join(split(match[0]))) for match in _RUN.finditer(text))
    windows: list[Span] = []
    for first, start in enumerate(runs):
        form = ""
        for place in range(first, min(first + MAX_RUNS, len(runs))):
            run = runs[place]
            if place > first:
                both_digits = runs[place - 1].kind.isdigit() and run.kind.isdigit()
                glue = _NUMBER_GLUE if both_digits else _GLUE
                if not glue.fullmatch(text, runs[place - 1].end, run.start):
                    break
            form += run.kind
            if len(form) >= 4:
                windows.append(Span(start.start, run.end, shorten(form)))
    for match in _CHUNK.finditer(text):  # an id of many runs, or with dots: 12.345.678, a UUID
        if not _DECIMAL.fullmatch(match[0]):
            windows.append(Span(match.start(), match.end(), shorten("".join(split(match[0])))))
    return Words(runs, tuple(windows))


def compute_hash(form: str, kind: int = 0) -> int:
    """61 bits of a text in compared form, and below them a kind of 0..7."""
    digest = hashlib.blake2b(shorten(form).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 3 << 3 | kind


def get_kind(value: int) -> int:
    """The kind that `compute_hash` was given."""
    return int(value) & 7


def sort_hashes(values: array) -> npt.NDArray[np.uint64]:
    """Sorted, each text once, with the lowest of its kinds."""
    table = np.array(values, dtype=np.uint64)
    table.sort()
    first = np.ones(len(table), dtype=bool)
    first[1:] = table[1:] >> np.uint64(3) != table[:-1] >> np.uint64(3)
    return table[first]


def find_hashes(
    table: npt.NDArray[np.uint64], spans: Sequence[Span]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Places in `spans` whose text is in the sorted `table` of hashes, and their rows there."""
    if not len(table) or not spans:
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)
    hashes = np.array([compute_hash(span.kind) for span in spans], dtype=np.uint64)
    rows = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
    places = np.nonzero(table[rows] >> np.uint64(3) == hashes >> np.uint64(3))[0]
    return places, rows[places]


def is_written_as_name(text: str, span: Span) -> bool:
    """A capital letter that no beginning of a sentence explains, or capitals in a text that is not all capitals."""
    word, before = text[span.start : span.end], text[: span.start]
    if not word[0].isupper():
        return False
    inside = bool(re.search(r"\w", before)) and not _SENTENCE.search(before)
    return inside or (len(word) >= 4 and word.isupper() and not text.isupper())


def expand(text: str, span: Span) -> Span:
    """Take the whole of a composite: what stands beside an id in DUPONT_1234_2.jpg is as telling."""
    start, end = span.start, span.end
    for match in _TOKEN.finditer(text):
        if match.start() < span.end and span.start < match.end():
            start, end = min(start, match.start()), max(end, match.end())
    while end > span.end and text[end - 1] in ".!?":
        end -= 1
    return Span(start, end, span.kind)


def merge(spans: Iterable[Span], order: Sequence[str]) -> list[Span]:
    """Overlapping spans as one, of the kind among them that comes first in `order`."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            merged[-1] = Span(last.start, max(last.end, span.end), min(last.kind, span.kind, key=order.index))
        else:
            merged.append(span)
    return merged
