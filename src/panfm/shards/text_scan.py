"""No name, number or date of a patient in any text of a sample: captions, labels, sites, tabular cells, devices.

    card + Records -> TextScanner.from_records -> narrow(one shard's records) -> clean(record) -> Record, counts

Looked for are the patterns of text_patterns and what the archive itself knows: its patient, lesion, slide and image
ids, file names, and the texts of the card's identifying_columns. Of those only 8-byte hashes are kept.

With `identifiers: private` a caption loses what was found ("[removed]"), and a field that was found guilty stops the
build, since half a label is no label. With `identifiers: public` everything stays as published and is only counted,
but for e-mail addresses and telephone numbers, which go there too. What a card maps under `values` a person has read.

Rules against false alarms. Texts are compared without case, accents and separators (PAT-1234 is "pat 1234"), as whole
words or as parts of a composite (DUPONT_1234_2.jpg). Ids of fewer than 4 characters, and numbers in tabular cells, are
found only where a column as a whole repeats an id. An id of another row counts if it holds 5 digits, or letters and
digits (3 of them, if it is no patient's); a name of another row if the caption writes it with a capital letter inside a
sentence, or in capitals. Not found are: nicknames, misspelt names, names of people outside the archive without a title.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from panfm.errors import UserError
from panfm.shards.cards import SourceCard
from panfm.shards.records import Record
from panfm.shards.text_patterns import PATTERNS, Span, find_patterns
from panfm.shards.text_words import (
    compute_hash,
    expand,
    find_hashes,
    get_kind,
    is_written_as_name,
    merge,
    read_words,
    shorten,
    sort_hashes,
    split,
)

REMOVED = "[removed]"
REMOVED_FROM_PUBLIC = ("email", "phone")
KINDS = ("identifying", "patient_id", "lesion_id", "slide_id", "image_id")  # of raw texts, the graver first
PERSONAL = ("identifying", "patient_id")
FREE_FIELDS = ("institution", "device", "anatomic_site", "phototype_source", "official_split")  # of metadata
ORDER = ("email", "national_id", "phone", *KINDS, *PATTERNS, "folder")  # where several hit one place
OLD_AGE = 89  # years; older people are so few that the age itself tells (as in HIPAA's Safe Harbor)
REPEATED_SHARE = 0.2  # of a column's known cells that equal their own row's id: then the column repeats the id
MAX_REMEMBERED = 100_000  # verdicts on texts that recur (labels, sites)


@dataclass(frozen=True)
class _Own:
    """What identifies the row itself: form -> kind."""

    ids: dict[str, str]  # found in any text
    caption_ids: dict[str, str]  # found in captions only
    names: frozenset[str]


@dataclass(frozen=True)
class TextScanner:
    """What must not stand in the texts of a source. Picklable; 8 bytes an id or name word, or less (`narrow`)."""

    private: bool
    allowed: frozenset[str]  # fields that the card exempts
    approved: Mapping[str, frozenset[str]]  # field -> values that the card itself wrote
    ids: npt.NDArray[np.uint64]  # sorted hashes, with places in KINDS
    names: npt.NDArray[np.uint64]  # sorted hashes
    _verdicts: dict[str, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_records(cls, card: SourceCard, records: Sequence[Record]) -> "TextScanner":
        """Learn what identifies, then check every field of every record; `records` is gone through twice.

        Raises UserError for a private card with a field that names somebody, telling field and line, not the text.
        """
        lesions_are_unique = card.lesion_id_scope == "source"  # else they are 1, 2, 3, ... of each patient
        ids, names = array("Q"), array("Q")
        for record in records:
            for kind, form, runs in _read_raw(record):
                if _is_searchable(kind, form, runs, own=False) and (kind != "lesion_id" or lesions_are_unique):
                    ids.append(compute_hash(form, KINDS.index(kind)))
                if kind == "identifying" or (kind == "patient_id" and len(runs) == 1 and form.isalpha()):
                    words = [run for run in runs if len(run) >= 3 and run.isalpha()]
                    names.extend(compute_hash(word) for word in words)
                    if len(runs) == len(words) == 2:  # DUPONT Marie, Marie Dupont
                        ids.append(compute_hash(runs[1] + runs[0], KINDS.index(kind)))
        scanner = cls(
            private=card.identifiers == "private",
            allowed=frozenset(card.text_scan_allow),
            approved=_collect_approved(card),
            ids=sort_hashes(ids),
            names=sort_hashes(names),
        )
        if scanner.private:
            scanner._check_fields(card, records)
        return scanner

    def __reduce__(self) -> tuple[Any, ...]:
        return TextScanner, (self.private, self.allowed, self.approved, self.ids, self.names)

    def narrow(self, records: Iterable[Record]) -> "TextScanner":
        """A scanner that answers the same for these records, and holds no more than that takes: what a task gets."""
        ids, names = np.zeros(len(self.ids), dtype=bool), np.zeros(len(self.names), dtype=bool)
        seen: set[str] = set()
        for record in records:
            for text in (record.caption, *(value for _, value in _iterate_fields(record))):
                if not isinstance(text, str) or text in seen:
                    continue
                if len(seen) < MAX_REMEMBERED:
                    seen.add(text)
                words = read_words(text)
                ids[find_hashes(self.ids, words.windows)[1]] = True
                names[find_hashes(self.names, words.runs)[1]] = True
        return replace(self, ids=self.ids[ids], names=self.names[names], _verdicts={})

    # -------------------------------------------------------------------------------------------- one record

    def clean(self, record: Record) -> tuple[Record, Counter[str]]:
        """The record as it may be stored, and what was found: "caption.date" -> times, "labels.diagnosis.name" -> 1.

        Raises UserError (without the text) for a field of a private source that names somebody.
        """
        own, counts = _find_own(record), Counter[str]()
        changed: dict[str, Any] = {}
        if record.caption is not None and "caption" not in self.allowed:
            spans = self._find_spans(record.caption, own)
            counts.update(f"caption.{span.kind}" for span in spans)
            changed["caption"] = self._cut(record.caption, spans)
        for name, value in _iterate_fields(record):
            for kind in sorted(self._judge(name, value, own), key=ORDER.index):
                if self.private:
                    raise UserError(_describe(name, record.line, kind))
                counts[f"{name}.{kind}"] += 1
                if kind in REMOVED_FROM_PUBLIC and isinstance(value, str):
                    column, _, key = name.partition(".")
                    part = column if key else "metadata"
                    values = changed.setdefault(part, dict(getattr(record, part)))
                    values[key or column] = self._cut(value, merge(find_patterns(value), ORDER)) or REMOVED
        if self.private and (record.metadata.get("age") or 0) > OLD_AGE:
            counts[f"age.above_{OLD_AGE}"] += 1
        return (replace(record, **changed) if changed else record), counts

    def clean_device(self, device: str | None, record: Record) -> tuple[str | None, Counter[str]]:
        """A camera's make and model as the image's own header gave it: None where it names the row's patient or id."""
        if device is None:
            return None, Counter()
        spans = self._find_spans(device, _find_own(record))
        return (None if spans else device), Counter(f"device.{span.kind}" for span in spans)

    def clean_card(self, card: SourceCard) -> dict[str, Any]:
        """The card as it may be stored beside the shards: cell texts in it that name somebody become "[removed 1]"."""
        dump: dict[str, Any] = card.model_dump(mode="json")
        if not self.private:
            return dump
        nobody, removed = _Own({}, {}, frozenset()), Counter[str]()

        def clean(text: str) -> str:
            if any(span.kind != "file_name" for span in self._find_spans(text, nobody)):
                removed["cells"] += 1
                return f"[removed {removed['cells']}]"
            return text

        maps = [*dump["values"].values(), *(label["values"] for label in dump["labels"].values() if label["values"])]
        for values in maps:
            cells = list(values.items())
            values.clear()
            values |= {clean(cell): value for cell, value in cells}
        dump["only"] = {column: [clean(text) for text in texts] for column, texts in dump["only"].items()}
        dump["missing"] = [clean(text) for text in dump["missing"]]
        return dump

    def _cut(self, text: str, spans: Iterable[Span]) -> str | None:
        """The text without what must go; None if nothing is left that says anything."""
        left, place = [], 0
        for span in spans:
            if self.private or span.kind in REMOVED_FROM_PUBLIC:
                left.append(text[place : span.start])
                place = span.end
        left.append(text[place:])
        return REMOVED.join(left) if any(map(str.isalnum, "".join(left))) else None

    # -------------------------------------------------------------------------------------------- finding

    def _find_spans(self, caption: str, own: _Own) -> list[Span]:
        """Everything that identifies in a caption, without overlaps; ids and names with the token around them."""
        words = read_words(caption)
        mine = own.caption_ids | own.ids
        found = [span._replace(kind=mine[span.kind]) for span in words.windows if span.kind in mine]
        found += [span._replace(kind="identifying") for span in words.runs if span.kind in own.names]
        for place, row in zip(*find_hashes(self.ids, words.windows), strict=True):
            found.append(words.windows[place]._replace(kind=KINDS[get_kind(self.ids[row])]))
        for place in find_hashes(self.names, words.runs)[0]:
            if is_written_as_name(caption, words.runs[place]):
                found.append(words.runs[place]._replace(kind="identifying"))
        return merge([*find_patterns(caption), *(expand(caption, span) for span in found)], ORDER)

    def _judge(self, name: str, value: str | float, own: _Own) -> frozenset[str]:
        """The kinds of what identifies in a field; of numbers only their length (see _check_fields for the rest)."""
        if self._is_exempt(name, value):
            return frozenset()
        if not isinstance(value, str):
            return frozenset({"long_number"}) if value == int(value) and abs(value) >= 10**5 else frozenset()
        if (verdict := self._verdicts.get(value)) is None:
            words = read_words(value)
            rows = find_hashes(self.ids, words.windows)[1]
            kinds = {KINDS[get_kind(self.ids[row])] for row in rows} | {span.kind for span in find_patterns(value)}
            forms = {span.kind for span in (*words.windows, *words.runs)}
            verdict = frozenset(kinds), frozenset(forms)
            if len(self._verdicts) < MAX_REMEMBERED:
                self._verdicts[value] = verdict
        kinds_found, forms_found = verdict
        mine = {own.ids[form] for form in forms_found & own.ids.keys()}
        return kinds_found | mine | ({"identifying"} if forms_found & own.names else set())

    def _is_exempt(self, name: str, value: str | float) -> bool:
        """What a person has read: fields that the card exempts, values that it wrote, codes of a coding system."""
        if name in self.allowed or "#" in name:
            return True
        return any(value in self.approved.get(label, ()) for label in (name, name.partition("@")[0]))

    def _check_fields(self, card: SourceCard, records: Iterable[Record]) -> None:
        guilty: dict[str, tuple[int, str, int]] = {}  # field -> first line, kind, number of rows
        columns: dict[str, _Repeats] = {}
        for record in records:
            raw = _read_raw(record)
            own = _find_own(record, raw)
            for name, value in _iterate_fields(record):
                if kinds := self._judge(name, value, own):
                    line, kind, number = guilty.get(name, (record.line, min(kinds, key=ORDER.index), 0))
                    guilty[name] = line, kind, number + 1
                elif not self._is_exempt(name, value):
                    columns.setdefault(name, _Repeats()).add(value, raw, record.line)
        for name, repeats in columns.items():
            if name not in guilty and repeats.is_an_id:
                guilty[name] = repeats.line, repeats.kind, repeats.equal
        if not guilty:
            return
        name, (line, kind, number) = next(iter(guilty.items()))
        others = [other for other in guilty if other != name]
        more = f" (and {number - 1} more rows)" if number > 1 else ""
        also = f"; the same goes for {', '.join(others)}" if others else ""
        raise UserError(f"card {card.name}, {_describe(name, line, kind, more)}{also}")


@dataclass
class _Repeats:
    """Counts where a column repeats the ids of its own rows."""

    known: int = 0
    equal: int = 0
    line: int = 0
    kind: str = ""
    values: set[str] = field(default_factory=set)

    def add(self, value: str | float, raw: list[tuple[str, str, list[str]]], line: int) -> None:
        self.known += 1
        if isinstance(value, str):
            form = shorten("".join(split(value)))
        else:
            form = str(int(value)) if value == int(value) else ""
        if kinds := [kind for kind, own, _ in raw if own == form]:
            self.equal += 1
            self.line, self.kind = self.line or line, self.kind or kinds[0]
            if len(self.values) < 3:
                self.values.add(form)

    @property
    def is_an_id(self) -> bool:
        """Whether this is no coincidence: several ids, or all cells and one long enough."""
        enough = len(self.values) >= 3 or (self.equal == self.known and any(len(form) >= 4 for form in self.values))
        return enough and self.equal >= REPEATED_SHARE * self.known


# ------------------------------------------------------------------------------------------------ records


def _is_searchable(kind: str, form: str, runs: Sequence[str], *, own: bool) -> bool:
    """Whether an id can be looked for inside texts without finding what is none."""
    digits = sum(map(str.isdigit, form))
    if len(form) < 4:
        return False
    if digits == len(form):
        return own or digits >= 5  # four digits are a year
    if digits == 0:  # "nevus.jpg" is a file and no name
        return kind in PERSONAL and (own or len(runs) > 1)
    return own or kind in PERSONAL or digits >= 3


def _read_raw(record: Record) -> list[tuple[str, str, list[str]]]:
    """(kind, form, its runs) of everything raw that a record knows and that must not be stored, the gravest first."""
    texts = [("identifying", text) for text in record.identifying]
    texts += [("patient_id", record.patient_id or ""), ("lesion_id", record.lesion_id or "")]
    texts += [("slide_id", record.slide_id or "")]
    path = record.member or str(record.path)  # pathlib takes longer than all else here
    texts.append(("image_id", _get_stem(path)))  # also found inside of the whole name and path
    if record.mask_path is not None:
        texts.append(("image_id", _get_stem(record.mask_member or str(record.mask_path))))
    if not path.endswith(record.raw_id):
        texts.append(("image_id", record.raw_id))
    raw = []
    for kind, text in texts:
        runs = split(text)
        if form := shorten("".join(runs)):
            raw.append((kind, form, runs))
    return raw


def _get_stem(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _find_own(record: Record, raw: list[tuple[str, str, list[str]]] | None = None) -> _Own:
    ids: dict[str, str] = {}
    caption_ids: dict[str, str] = {}
    names: set[str] = set()
    for kind, form, runs in _read_raw(record) if raw is None else raw:
        if _is_searchable(kind, form, runs, own=kind in PERSONAL):
            ids.setdefault(form, kind)
        elif _is_searchable(kind, form, runs, own=True):
            caption_ids.setdefault(form, kind)
        if kind == "identifying":
            names |= {run for run in runs if len(run) >= 3 and run.isalpha()}
    place = str(record.path) if record.member is None else f"{record.path}/{record.member}"
    for form in _read_folders(place.rpartition("/")[0]):
        caption_ids.setdefault(form, "folder")
    return _Own(ids, caption_ids, frozenset(names))


@lru_cache(maxsize=4096)
def _read_folders(path: str) -> tuple[str, ...]:
    """Folders that may be named after a patient, and not after a class, a year or a camera's hundred."""
    forms = ["".join(split(folder)) for folder in path.split("/")]
    return tuple(form for form in forms if len(form) >= 5 and sum(map(str.isdigit, form)) >= 3)


def _iterate_fields(record: Record) -> Iterator[tuple[str, str | float]]:
    """(field, value) of everything that a sample stores and that is no closed set: texts, and tabular numbers."""
    for name in FREE_FIELDS:
        if isinstance(value := record.metadata.get(name), str):
            yield name, value
    for name, text in record.labels.items():
        yield f"labels.{name}", text
    for name, cell in record.tabular.items():
        if not isinstance(cell, bool):
            yield f"tabular.{name}", cell


def _collect_approved(card: SourceCard) -> dict[str, frozenset[str]]:
    """The values that the card's author chose: mapped ones and constants."""
    approved = {f"labels.{name}": {*(label.values or {}).values()} for name, label in card.labels.items()}
    for name, label in card.labels.items():
        approved[f"labels.{name}"] |= {*(getattr(label, "one_hot", None) or {}).values()}
    for column, values in card.values.items():
        approved.setdefault(column, set()).update(values.values())
    for constant, value in card.constants.items():
        approved.setdefault(constant, set()).add(str(value))
    return {name: frozenset(value for value in values if value is not None) for name, values in approved.items()}


WORDS = {
    "identifying": "a text of the identifying columns",
    "patient_id": "a patient id",
    "lesion_id": "a raw lesion id",
    "slide_id": "a raw slide id",
    "image_id": "the name of an image file",
    "email": "an e-mail address",
    "phone": "a telephone number",
    "national_id": "a national id number",
    "date": "a date",
    "file_name": "a file name",
    "name": "a person's name",
    "long_number": "a number of six or more digits",
}


def _describe(name: str, line: int, kind: str, more: str = "") -> str:
    maps = f"{name}.values" if name.startswith("labels.") else f"values.{name}"
    out = "leave the column out" if name.startswith("tabular.") else f"map it under {maps} (null: unknown)"
    return (
        f"line {line}{more}, {name}: holds {WORDS[kind]}, which must not enter shards of identifiers: private; {out}, "
        f"or, if it names nobody, list {name} under text_scan_allow in the card"
    )
