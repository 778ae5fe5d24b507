"""Tables as people keep them -> rows of text: the lowest step under every source card. Knows nothing of cards.

    .csv .tsv .txt .xlsx .xlsm .json .jsonl .parquet + Dialect  ->  read_spreadsheet  ->  header, (line, cells) ...

Every cell is text, as a person sees it in the table: "00123" keeps its zeros, a date is 2020-01-31, a whole number has
no ".0", an empty cell is "". What a text means (a number, a date, an unknown) is decided by whoever reads the card.
"""

import codecs
import csv
import datetime
import json
import re
import warnings
import zipfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from panfm.errors import UserError

Line = tuple[int, list[str]]  # line number in the file, cells
Lines = Generator[Line, None, None]

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
EXCEL_SUFFIXES = (".xlsx", ".xlsm")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, *EXCEL_SUFFIXES, ".json", ".jsonl", ".parquet")


class Dialect(BaseModel):
    """How a table is written. Text files: encoding, delimiter; workbooks: sheet; both: decimal and header_line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    encoding: str = "utf-8-sig"  # a byte order mark is no part of the first column's name
    delimiter: str | None = None  # null: a comma, and in a .tsv file a tab
    decimal: Literal[".", ","] = "."
    sheet: str | None = None  # null: the first visible one
    header_line: Annotated[int, Field(ge=1)] = 1  # titles above it are not read

    @field_validator("encoding", mode="after")
    @classmethod
    def _check_encoding(cls, encoding: str) -> str:
        try:
            b"ab".decode(encoding)  # not b"": that is decoded without a look at the name
        except UnicodeError:
            pass  # fewer bytes than one sign has
        except LookupError:  # an unknown name, or a codec that does not make text
            raise ValueError("no such text encoding; Excel writes utf-8-sig, cp1252 or utf-16") from None
        return encoding

    @field_validator("delimiter", mode="after")
    @classmethod
    def _check_delimiter(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise ValueError('the delimiter is one character, for example ";" or "\\t"')
        return delimiter


def read_spreadsheet(
    path: Path, dialect: Dialect | None = None
) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Read the header of a table at once; its rows follow as (line, {column: text}), one at a time.

    Empty rows are left out. Texts are stripped of the blanks around them; a column without a name is called "column 3"
    after its place. Lines count from 1 with the header: lines of a text file, rows of a sheet. In .json and .parquet
    the first row is 1.

    Raises UserError for a missing or unreadable file, a kind of file that is no table, an unknown sheet, no header, two
    columns of one name; and, as rows are read, for a row that does not fit the header.
    """
    path, dialect = Path(path), dialect or Dialect()
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        way = "open it in Excel or LibreOffice and save it as .xlsx" if suffix in (".xls", ".ods") else "export it anew"
        raise UserError(f"{path}: a table must be one of {', '.join(TABLE_SUFFIXES)}; {way}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the folder and the name of the table")
    lines = _read_lines(path, dialect)
    line, names = next(lines, (0, []))
    header = [" ".join(name.split()) for name in names]
    if suffix in EXCEL_SUFFIXES:
        while header and not header[-1]:
            header.pop()  # coloured cells beside the table
    if not any(header):
        raise UserError(
            f"{path}: has no header in line {dialect.header_line}; name the line of the column names under "
            "dialect.header_line of the card"
        )
    header = [name or f"column {place}" for place, name in enumerate(header, 1)]
    for place, name in enumerate(header):
        if name in header[:place]:
            raise UserError(
                f"{path}, line {line}: two columns ({header.index(name) + 1} and {place + 1}) are called {name!r}; "
                "names must differ, so rename one"
            )
    return header, _read_rows(path, lines, header)


def _read_rows(path: Path, lines: Lines, header: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    width = len(header)
    is_text = path.suffix.lower() in TEXT_SUFFIXES
    with closing(lines):
        for line, cells in lines:
            texts = [cell.strip() for cell in cells]
            if not any(texts):
                continue
            # A sheet ends each row at its last filled cell; in a text file a missing cell is a shifted row.
            if len(texts) != width and (is_text or any(texts[width:])):
                raise UserError(
                    f"{path}, line {line}: has not as many cells as the header ({len(texts)}, not {width}); repair the "
                    "row, or correct the card's dialect (delimiter, header_line)"
                )
            texts += [""] * (width - len(texts))
            yield line, dict(zip(header, texts, strict=False))


def to_decimal_point(text: str, dialect: Dialect) -> str:
    """Turn a number's text into the form that float() reads: "1.234,5" of a decimal comma is "1234.5".

    A text without a comma stays as it is: Excel hands over numbers with a point whatever its language.
    """
    if dialect.decimal == "." or "," not in text:
        return text
    return re.sub(r"[.\s]", "", text).replace(",", ".")


def list_sheets(path: Path) -> tuple[str, ...]:
    """The names of a workbook's visible sheets, in order."""
    workbook = _open_workbook(path)
    try:
        return tuple(sheet.title for sheet in workbook.worksheets if sheet.sheet_state == "visible")
    finally:
        workbook.close()


def read_top(path: Path, dialect: Dialect, num_lines: int) -> list[Line]:
    """The first lines of a table as they stand, titles and header too; for whoever must find out its dialect."""
    top = dialect.model_copy(update={"header_line": 1})
    with closing(_read_lines(path, top)) as lines:
        return [line for line, _ in zip(lines, range(num_lines), strict=False)]


# ------------------------------------------------------------------------------------------------ kinds of files


def _read_lines(path: Path, dialect: Dialect) -> Lines:
    """Yield (line, cells) from the header on."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return _read_text(path, dialect)
    if suffix in EXCEL_SUFFIXES:
        return _read_workbook(path, dialect)
    return _read_parquet(path) if suffix == ".parquet" else _read_json(path)


def _read_text(path: Path, dialect: Dialect) -> Lines:
    delimiter = dialect.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    skipped = dialect.header_line - 1
    with path.open(encoding=dialect.encoding, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for _ in range(skipped):  # by lines, not by rows: a title may hold a lone quotation mark
                file.readline()
            for cells in reader:
                if cells:
                    yield skipped + reader.line_num, cells
        except UnicodeError:
            raise UserError(
                f"{path}: byte {_find_undecodable(path, dialect.encoding)} is not {_show(dialect.encoding)}; save the "
                "table as UTF-8 CSV, or name its encoding (Excel: cp1252 or utf-16) under dialect.encoding of the card"
            ) from None
        except csv.Error as error:
            raise UserError(
                f"{path}, line {skipped + reader.line_num}: not valid CSV ({error}); repair the quotation marks there"
            ) from None


def _find_undecodable(path: Path, encoding: str) -> int:
    try:
        path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        return error.start
    return 0  # utf-16 without its byte order mark


def _show(encoding: str) -> str:
    return "UTF-8" if codecs.lookup(encoding).name.startswith("utf-8") else encoding


def _open_workbook(path: Path, *, formulas: bool = False) -> Any:
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on styles and drop-down lists, which are not read
        try:
            return openpyxl.load_workbook(path, read_only=True, data_only=not formulas)
        except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError, OSError) as error:
            raise UserError(
                f"{path}: not a readable workbook ({type(error).__name__}); a password or another format does this, so "
                "open it in Excel and save it as .xlsx without a password"
            ) from None


def _read_workbook(path: Path, dialect: Dialect) -> Lines:
    books = [_open_workbook(path)]
    try:
        if _has_formulas(path):
            books.append(_open_workbook(path, formulas=True))
        sheets = [_find_sheet(book, path, dialect.sheet) for book in books]
        for sheet in sheets:
            sheet.reset_dimensions()  # exporters state a wrong size, and the cells beyond it would be lost
        rows = [sheet.iter_rows(min_row=dialect.header_line) for sheet in sheets]
        for line, (row, *others) in enumerate(zip(*rows, strict=True), dialect.header_line):
            for place, (cell, formula) in enumerate(zip(row, *others, strict=True) if others else ()):
                if cell.value is None and isinstance(formula.value, str) and formula.value.startswith("="):
                    raise UserError(
                        f"{path}, line {line}, column {place + 1}: a formula whose result was never computed; open the "
                        "file in Excel and save it once"
                    )
            texts = [_show_cell(cell.value, cell.number_format) if cell.value is not None else "" for cell in row]
            if line == dialect.header_line or any(texts):
                yield line, texts
    finally:
        for book in books:
            book.close()


def _find_sheet(book: Any, path: Path, name: str | None) -> Any:
    visible = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
    found = [sheet for sheet in book.worksheets if sheet.title == name] if name is not None else visible
    if not found:
        shown = ", ".join(sheet.title for sheet in book.worksheets) or "none"
        raise UserError(f"{path}: has no sheet {name or 'that is visible'}; it has {shown}: correct dialect.sheet")
    return found[0]


def _has_formulas(path: Path) -> bool:
    """Whether any sheet holds a formula: only then are the cells compared with their formulas, at twice the time."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith("xl/worksheets/"):
                with archive.open(name) as file:
                    tail = b""
                    while block := file.read(1 << 20):
                        if re.search(rb"<(\w+:)?f[ >]", tail + block):
                            return True
                        tail = block[-8:]
    return False


def _read_parquet(path: Path) -> Lines:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield 0, list(file.schema_arrow.names)
            line = 0
            for batch in file.iter_batches():
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    line += 1
                    yield line, [_show_value(value) for value in values]
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({type(error).__name__}); export it anew") from None


def _read_json(path: Path) -> Lines:
    """Objects need not have the same keys: the header is all keys in the order in which they first come."""
    header = list(dict.fromkeys(key for _, item in _iterate_objects(path) for key in item))
    yield 0, header
    for line, item in _iterate_objects(path):
        yield line, [_show_value(item.get(key)) for key in header]


def _iterate_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    items: Iterable[tuple[int, Any]]
    line = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".json":
                whole = json.load(file)
                if not isinstance(whole, list):
                    raise UserError(f"{path}: holds no list; a table in JSON is a list of objects, one a row")
                items = enumerate(whole, 1)
            else:
                items = ((place, json.loads(text)) for place, text in enumerate(file, 1) if text.strip())
            for line, item in items:
                if not isinstance(item, dict):
                    raise UserError(f"{path}, line {line}: is no object; every row must be one, as {{column: value}}")
                yield line, item
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}, after line {line}: not valid JSON ({error}); export it anew") from None


# ------------------------------------------------------------------------------------------------ values as text


def _show_value(value: Any) -> str:
    """A typed value as the text that a person would read in its cell."""
    if value is None or value != value:  # noqa: PLR0124  NaN
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _show_cell(value: Any, number_format: str | None) -> str:
    """As _show_value; a whole number also gets the leading zeros and signs that its Excel format shows."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.15g}"  # all that Excel keeps and shows: 0.3, not 0.30000000000000004
    text = _show_value(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and text.isascii() and text.isdigit():
        parts = _parse_format(number_format or "General")
        if parts is not None:
            return _fill_format(text, parts)
    return text


@lru_cache(maxsize=256)
def _parse_format(number_format: str) -> tuple[str, ...] | None:
    """The digits and literals of a format such as 00000, "P"0000 or 00\\-000; None for one that shows no zeros.

    Thousands, decimals, percent, units and colours only change how a number looks, and are left out.
    """
    parts: list[str] = []
    first = number_format.split(";", maxsplit=1)[0]
    for piece in re.findall(r'"[^"]*"|\\.|\[[^\]]*\]|_.|\*.|.', first):
        if piece[0] == "[" or piece[0] in "_*":
            continue
        if piece in ("0", "#", "?"):
            parts.append(piece)
        elif piece[0] in '"\\' and len(piece) > 1:
            parts.append("=" + (piece[1:-1] if piece[0] == '"' else piece[1:]))
        elif piece in "-/ +()":
            parts.append("=" + piece)
        else:
            return None
    return tuple(parts) if parts.count("0") >= 2 else None


def _fill_format(digits: str, parts: tuple[str, ...]) -> str:
    """Put digits into a format from the right, as Excel does; what is too long goes in front of the first place."""
    shown: list[str] = []
    left = list(digits)
    places = sum(1 for part in parts if not part.startswith("="))
    for part in reversed(parts):
        if part.startswith("="):
            shown.append(part[1:])
            continue
        places -= 1
        if left:
            shown.append(left.pop() if places else "".join(left))
            left = left if places else []
        elif part == "0":
            shown.append("0")
    return "".join(reversed(shown)).strip()
