"""One row of a table seen through its card: what each cell means, and where to point when it means nothing.

(line, {column: text}) + SourceCard  ->  Cells  ->  mapped texts, numbers, labels; UserError(file, line, column, rule)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

from panfm.errors import UserError
from panfm.shards.cards import ColumnField, LabelColumn, SourceCard
from panfm.shards.records import TRUTH
from panfm.shards.schema import MODALITIES, Confirmation
from panfm.shards.spreadsheets import to_decimal_point

CLOSED: dict[ColumnField, tuple[str, ...]] = {
    "modality": MODALITIES,
    "sex": ("female", "male", "other"),
    "confirmed_by": get_args(Confirmation),
}

MARKS = TRUTH | {"x": True}  # what a one-hot cell may hold


@dataclass(frozen=True)
class Cells:
    """One row seen through the card: unknown cells are None, values are mapped, faults name their place."""

    card: SourceCard
    where: str
    line: int
    row: Mapping[str, str]

    def text(self, name: ColumnField) -> str | None:
        """The mapped value of a field, or None where it is unknown or has no column."""
        if (column := self.card.columns.get(name)) is None:
            return None
        value = self.mapped(column, self.card.values.get(name), f"values.{name}")
        if value is not None and name in CLOSED and value not in CLOSED[name]:
            self.fail(column, value, f"it must be one of {', '.join(CLOSED[name])}; map it under values.{name}")
        return value

    def mapped(
        self, column: str, values: Mapping[str, str | None] | None, where: str, others: str = "error"
    ) -> str | None:
        """The cell of `column` through a map, if there is one; `others`: what a cell is that it does not list."""
        cell = self.row[column]
        if cell == "" or cell in self.card.missing:
            return None
        if values is None:
            return cell
        if cell not in values:
            if others == "error":
                known = ", ".join(list(values)[:20])
                self.fail(column, cell, f"{where} lists only {known}; add it there, null if it means unknown")
            return cell if others == "keep" else None
        return values[cell]

    def label(self, name: str, label: LabelColumn) -> str | None:
        """The value of a label, or None where it is unknown."""
        if label.column is not None:
            return self.mapped(label.column, label.values, f"labels.{name}", label.others)
        assert label.one_hot is not None
        cells = {column: self.mapped(column, None, "") for column in label.one_hot}
        if not any(cells.values()):
            return None
        marks = {column: MARKS.get((cell or "0").lower().removesuffix(".0")) for column, cell in cells.items()}
        hot = [column for column, mark in marks.items() if mark]
        if len(hot) != 1 or None in marks.values():
            shown = ", ".join(f"{column} {cell or 'empty'}" for column, cell in cells.items())
            rule = f"exactly one column of labels.{name}.one_hot must hold 1 (or x), the others 0 or nothing"
            self.fail(next(iter(cells)), shown, rule)
        return label.one_hot[hot[0]]

    def parse(self, name: ColumnField, function: Callable[[str], Any]) -> Any:
        """The value of a field through `function`; its ValueError becomes a UserError."""
        if (value := self.text(name)) is None:
            return None
        try:
            return function(to_decimal_point(value, self.card.dialect) if name in NUMBERS else value)
        except (ValueError, KeyError):
            rule = f"a date like {self.card.date_format}" if name == "visit_date" else RULES[name]
            self.fail(
                self.card.columns[name], value, f"{name} must be {rule}; correct it or map it under values.{name}"
            )

    def fail(self, column: str, value: str, rule: str) -> NoReturn:
        """Raise the UserError for one cell."""
        raise UserError(f"{self.where}, line {self.line}, column {column}: {value!r}; {rule} in card {self.card.name}")


def _parse_number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = float(text)
        if not low <= number <= high:  # false for NaN too
            raise ValueError
        return number

    return parse


def _parse_whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = _parse_number(low, high)(text)
        if number != int(number):  # pandas writes whole numbers with gaps as "2.0"
            raise ValueError
        return int(number)

    return parse


def _parse_phototypes(text: str) -> tuple[int, int]:
    """One Fitzpatrick type or a range of them, in digits or Roman numerals: "3", "3.0", "III", "II-III"."""
    low, _, high = (part.strip().upper() for part in text.replace("–", "-").replace("/", "-").partition("-"))
    parse = _parse_whole(1, 6)
    ends = [ROMAN[end] if end in ROMAN else parse(end) for end in (low, high or low)]
    return min(ends), max(ends)


ROMAN = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6}
PARSERS: dict[ColumnField, Callable[[str], Any]] = {
    "age": _parse_number(0, 130),
    "mpp": _parse_number(0.01, 1000),
    "visit_day": _parse_whole(0, 100_000),
    "follow_up_days": _parse_whole(0, 100_000),
    "event": lambda text: TRUTH[text.lower()],
    "phototype": _parse_phototypes,
    "phototype_low": _parse_whole(1, 6),
    "phototype_high": _parse_whole(1, 6),
}
RULES: dict[ColumnField, str] = {
    "age": "a number of years from 0 to 130",
    "mpp": "a number of microns per pixel",
    "visit_day": "a whole number of days from 0 on",
    "follow_up_days": "a whole number of days from 0 on",
    "event": "true or false",
    "phototype": "a Fitzpatrick type from 1 to 6 or a range like 2-3, in digits or Roman numerals",
    "phototype_low": "a whole number from 1 to 6",
    "phototype_high": "a whole number from 1 to 6",
}
NUMBERS = frozenset(("age", "mpp", "visit_day", "follow_up_days", "phototype_low", "phototype_high"))
PASSED_ON: tuple[ColumnField, ...] = (
    "institution",
    "device",
    "anatomic_site",
    "confirmed_by",
    "follow_up_days",
    "event",
    "age",
    "sex",
    "phototype_low",
    "phototype_high",
    "phototype_source",
    "official_split",
    "mpp",
)


class ColumnType:
    """The narrowest of bool, float and str that every cell of a column fits, decided for the column as a whole."""

    def __init__(self) -> None:
        self.num_known = 0
        self.may_be_bool = self.may_be_float = True

    def add(self, text: str, as_number: str) -> str:
        """Take note of a known cell, and return the text to keep of it."""
        self.num_known += 1
        self.may_be_bool = self.may_be_bool and text.lower() in ("true", "false")
        is_number = _is_number(as_number)
        self.may_be_float = self.may_be_float and is_number
        return as_number if is_number else text

    def decide(self) -> type:
        """The type of the column."""
        if not self.num_known:
            return str
        return bool if self.may_be_bool else float if self.may_be_float else str


def _is_number(text: str) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    # "007" is a code, not a seven; "nan" is for the card's `missing`.
    return math.isfinite(number) and not (len(text) > 1 and text[0] == "0" and text[1].isdigit())
