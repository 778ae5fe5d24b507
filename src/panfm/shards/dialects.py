"""How a table is written, found out by looking: the first thing that a draft does.

    export.csv | export.xlsx  ->  detect_dialect  ->  Dialect (encoding, delimiter, decimal sign, sheet, header line)

Nothing in a text file says what it is; every rule here is a guess, and the drafted card marks it as one.
"""

import codecs
import csv
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Literal

from panfm.errors import UserError
from panfm.shards.drafting.vocabulary import HEADERS, fold
from panfm.shards.spreadsheets import EXCEL_SUFFIXES, TEXT_SUFFIXES, Dialect, Line, list_sheets, read_top

LOOKED_AT = 200  # lines that decide on delimiter, decimal sign and header
DELIMITERS = (";", ",", "\t", "|")
LETTERS = set("éèêëàâäîïôöùûüçñáíóúßœæÉÈÊËÀÂÄÎÏÔÖÙÛÜÇÑÁÍÓÚŒ°µ’«»–€²½")  # what western archives write beyond ASCII
NUMBER = re.compile(r"-?\d+([.,])\d+")
KNOWN_HEADERS = frozenset(word for words in HEADERS.values() for word in words)


def detect_dialect(path: Path) -> Dialect:
    """Find out encoding, delimiter, decimal sign, sheet and header line of a table.

    Raises UserError for a file that is no text, and whatever reading its first lines raises.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        encoding = _detect_encoding(path)
        top, delimiter = _detect_delimiter(path, encoding)
        lines = _number_lines(top, delimiter)
        return Dialect(
            encoding=encoding,
            delimiter=delimiter,
            decimal=_detect_decimal(lines),
            header_line=_detect_header_line(lines),
        )
    if suffix in EXCEL_SUFFIXES:
        sheets = list_sheets(path)
        tops = {sheet: read_top(path, Dialect(sheet=sheet), LOOKED_AT) for sheet in sheets}
        if not tops:
            return Dialect()
        # A workbook also holds legends and pivot tables: the sheet with most filled cells is the table.
        largest = max(sheets, key=lambda sheet: sum(1 for _, cells in tops[sheet] for cell in cells if cell))
        return Dialect(
            sheet=largest if len(sheets) > 1 else None,
            decimal=_detect_decimal(tops[largest]),
            header_line=_detect_header_line(tops[largest]),
        )
    return Dialect()


def _detect_encoding(path: Path) -> str:
    """By its byte order mark, else UTF-8 if the whole file is, else whichever code page gives the likeliest letters."""
    with path.open("rb") as file:
        start = file.read(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        if len(start) == 4 and start[1] == 0 == start[3] and start[0] and start[2]:
            return "utf-16-le"
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        foreign: Counter[int] = Counter()
        is_utf8 = True
        while block := file.read(1 << 20):
            if b"\0" in block:
                raise UserError(f"{path}: is no text file, whatever its name says; export the table anew as CSV")
            foreign.update(byte for byte in block if byte >= 0x80)
            try:
                if is_utf8:
                    decoder.decode(block)
            except UnicodeDecodeError:
                is_utf8 = False
        try:
            if is_utf8:
                decoder.decode(b"", final=True)
                return "utf-8-sig"
        except UnicodeDecodeError:
            pass

    def count_letters(encoding: str) -> int:
        return sum(count for byte, count in foreign.items() if bytes([byte]).decode(encoding, "replace") in LETTERS)

    # cp850 and mac_roman: exports of old hospital systems and of Excel on a Mac.
    return max(("cp1252", "cp850", "mac_roman"), key=count_letters)


def _detect_delimiter(path: Path, encoding: str) -> tuple[list[str], str]:
    """The first lines, and the sign that cuts most of them into one number of cells, as many as possible."""
    with path.open(encoding=encoding, newline="") as file:
        top = list(islice(file, LOOKED_AT))
    if not any(line.strip() for line in top):
        raise UserError(f"{path}: is empty; a table has a line of column names and a line for each image")

    def score(delimiter: str) -> tuple[float, int]:
        widths = Counter(len(cells) for _, cells in _number_lines(top, delimiter))
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]))
        return (count / widths.total(), width) if width > 1 else (0.0, 0)

    return top, max(("\t", *DELIMITERS) if path.suffix.lower() == ".tsv" else (",", *DELIMITERS), key=score)


def _number_lines(top: list[str], delimiter: str) -> list[Line]:
    """Lines with the number at which they begin; damaged quotation marks end the look, the reader will name them."""
    reader = csv.reader(top, delimiter=delimiter)
    lines: list[Line] = []
    begin = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((begin, cells))
            begin = reader.line_num + 1
    except csv.Error:
        pass
    return lines


def _detect_decimal(lines: list[Line]) -> Literal[".", ","]:
    found = Counter(match[1] for _, cells in lines for cell in cells if (match := NUMBER.fullmatch(cell.strip())))
    return "," if found[","] > found["."] else "."


def _detect_header_line(lines: list[Line]) -> int:
    """The first line that fills most columns with words, or that holds a known header; titles fill one or two."""
    lines = [(line, [cell.strip() for cell in cells]) for line, cells in lines]
    width = Counter(sum(1 for cell in cells if cell) for _, cells in lines).most_common(1)[0][0] if lines else 0
    for line, cells in lines[:30]:
        filled = [cell for cell in cells if cell]
        known = sum(1 for cell in filled if fold(cell) in KNOWN_HEADERS)
        if len(filled) >= max(1, 0.6 * width) and (known or not any(cell[0].isdigit() for cell in filled)):
            return line
        if known >= 3:
            return line
    return lines[0][0] if lines else 1
