"""Tables as text: what a person sees in a cell is what is read, and every fault names file, line and way out."""

import datetime
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from panfm.errors import UserError
from panfm.shards.dialects import detect_dialect
from panfm.shards.spreadsheets import Dialect, read_spreadsheet, to_decimal_point


def read(path: Path, **dialect: Any) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    header, rows = read_spreadsheet(path, Dialect(**dialect))
    return header, list(rows)


@pytest.fixture
def make_workbook(tmp_path: Path) -> Callable[..., Path]:
    def make(*rows: list[Any], formats: dict[str, str] | None = None) -> Path:
        book = openpyxl.Workbook()
        sheet = book.active
        for row in rows:
            sheet.append(row)
        for place, number_format in (formats or {}).items():
            sheet[place].number_format = number_format
        path = tmp_path / "table.xlsx"
        book.save(path)
        return path

    return make


def test_a_french_csv(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    text = 'Export\r\nN° IPP;Âge;Siège;Note\r\n00123;45,5;dos;"a;b"\r\n;;;\r\n007; 60 ;épaule;"deux\r\nlignes"\r\n'
    path.write_bytes(text.encode("cp1252"))
    header, rows = read(path, encoding="cp1252", delimiter=";", header_line=2)
    assert header == ["N° IPP", "Âge", "Siège", "Note"]
    assert rows == [
        (3, {"N° IPP": "00123", "Âge": "45,5", "Siège": "dos", "Note": "a;b"}),
        (6, {"N° IPP": "007", "Âge": "60", "Siège": "épaule", "Note": "deux\r\nlignes"}),
    ]


def test_cells_of_a_workbook_are_what_is_seen(make_workbook: Callable[..., Path]) -> None:
    path = make_workbook(
        ["Consultation export", None],
        [],
        ["id", "ward", "visit", "time", "ok", "age", "size", "text", "empty", None],
        [123, 7, datetime.datetime(2020, 1, 31), datetime.datetime(2020, 1, 31, 8, 5), True, 45.0, 0.1 + 0.2, "00123"],
        [None, None],
        [20200131, 12, datetime.date(2021, 2, 1), None, False, 45.5, 1e-3, " é "],
        formats={"A4": "00000", "B4": '"W"000', "A6": "0000-00-00", "F4": "0", "F6": "0.00"},
    )
    header, rows = read(path, header_line=3)
    assert header == ["id", "ward", "visit", "time", "ok", "age", "size", "text", "empty"]
    assert [(line, list(row.values())) for line, row in rows] == [
        (4, ["00123", "W007", "2020-01-31", "2020-01-31T08:05:00", "True", "45", "0.3", "00123", ""]),
        (6, ["2020-01-31", "12", "2021-02-01", "", "False", "45.5", "0.001", "é", ""]),
    ]


def test_sheets_by_name(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.title = "legend"
    book.active.append(["note"])
    book.active.sheet_state = "hidden"
    for name in ("first", "second"):
        book.create_sheet(name).append([f"column of {name}"])
    book.active = 1
    path = tmp_path / "table.xlsx"
    book.save(path)
    assert read(path)[0] == ["column of first"]
    assert read(path, sheet="second")[0] == ["column of second"]
    with pytest.raises(UserError, match=r"has no sheet third; it has legend, first, second: correct dialect.sheet"):
        read(path, sheet="third")


def test_a_wrong_statement_of_size_loses_no_cells(make_workbook: Callable[..., Path], tmp_path: Path) -> None:
    path = make_workbook(["id", "age"], ["1", "45"], ["2", "46"])
    with zipfile.ZipFile(path) as book, zipfile.ZipFile(tmp_path / "wrong.xlsx", "w") as wrong:
        for name in book.namelist():
            data = book.read(name)
            assert name != "xl/worksheets/sheet1.xml" or b'<dimension ref="A1:B3"' in data
            wrong.writestr(name, data.replace(b'<dimension ref="A1:B3"', b'<dimension ref="A1"'))
    assert [line for line, _ in read(tmp_path / "wrong.xlsx")[1]] == [2, 3]


def test_a_formula_without_a_result_is_no_empty_cell(make_workbook: Callable[..., Path]) -> None:
    path = make_workbook(["id", "age"], ["1", "=2020-1960"])
    with pytest.raises(UserError, match=r"table.xlsx, line 2, column 2: a formula whose result was never computed"):
        read(path)


def test_json_and_parquet_as_the_same_text(tmp_path: Path) -> None:
    values = [
        {"id": "007", "age": 45.0, "size": 0.5, "ok": True, "tags": ["a"]},
        {"id": "008", "age": None, "extra": 3},
    ]
    wanted = [
        (1, {"id": "007", "age": "45", "size": "0.5", "ok": "True", "tags": '["a"]', "extra": ""}),
        (2, {"id": "008", "age": "", "size": "", "ok": "", "tags": "", "extra": "3"}),
    ]
    (tmp_path / "t.json").write_text(json.dumps(values))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(value) for value in values) + "\n")
    pq.write_table(pa.Table.from_pylist([values[0] | {"extra": None}, values[1]]), tmp_path / "t.parquet")
    for name in ("t.json", "t.jsonl", "t.parquet"):
        assert read(tmp_path / name)[1] == wanted, name
    day = pa.table({"day": pa.array([datetime.date(2020, 1, 31)]), "at": pa.array([datetime.datetime(2020, 1, 31, 8)])})
    pq.write_table(day, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[1] == [(1, {"day": "2020-01-31", "at": "2020-01-31T08:00:00"})]


def test_a_column_without_a_name_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(",file\n0,a.png\n")  # as pandas writes its row numbers
    assert read(path) == (["column 1", "file"], [(2, {"column 1": "0", "file": "a.png"})])


def test_tabs_are_the_default_of_tsv(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\n1,5\t2\n")
    assert read(path)[1] == [(2, {"a": "1,5", "b": "2"})]


@pytest.mark.parametrize(
    ("name", "data", "dialect", "message"),
    [
        (
            "t.csv",
            b"a;b\n1;2;3\n",
            {"delimiter": ";"},
            r"t.csv, line 2: has not as many cells as the header \(3, not 2\)",
        ),
        ("t.csv", b"a,b\n1\n", {}, r"line 2: has not as many cells"),
        ("t.csv", b"a,b,a\n1,2,3\n", {}, r"line 1: two columns \(1 and 3\) are called 'a'"),
        ("t.csv", b"", {}, r"has no header in line 1"),
        ("t.csv", b"a\n" + b"x" * 9000 + b"\n\xe9\n", {}, r"byte 9003 is not UTF-8; .*dialect.encoding"),
        ("t.csv", b'a,b\n"x"y,1\n', {}, r"line 2: not valid CSV"),
        ("t.xls", b"\xd0\xcf", {}, r"must be one of \.csv.*save it as \.xlsx"),
        ("t.xlsx", b"\xd0\xcf", {}, r"not a readable workbook.*without a password"),
        ("t.json", b'{"a": 1}', {}, r"holds no list"),
        ("t.jsonl", b'{"a": 1}\n{"a": \n', {}, r"after line 1: not valid JSON"),
        ("t.parquet", b"no", {}, r"not a readable parquet file"),
    ],
)
def test_unusable_tables(tmp_path: Path, name: str, data: bytes, dialect: dict[str, Any], message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read(path, **dialect)
    assert str(error.value).startswith(str(path))


def test_dialects_are_strict() -> None:
    for wrong in ({"delimiter": ";;"}, {"encoding": "rot13"}, {"encoding": "x"}, {"header_line": 0}, {"decimal": ";"}):
        with pytest.raises(ValidationError):
            Dialect(**wrong)  # type: ignore[arg-type]


def test_numbers_with_a_comma() -> None:
    comma = Dialect(decimal=",")
    assert [to_decimal_point(text, comma) for text in ("45,5", "1.234,5", "1 234,5", "45.5", "45")] == [
        *("45.5", "1234.5", "1234.5", "45.5", "45")
    ]
    assert to_decimal_point("45,5", Dialect()) == "45,5"


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [
        ("utf-8", "utf-8-sig"),
        ("utf-8-sig", "utf-8-sig"),
        ("cp1252", "cp1252"),
        ("utf-16", "utf-16"),
        ("cp850", "cp850"),
        ("mac_roman", "mac_roman"),
    ],
)
def test_encodings_are_found_out(tmp_path: Path, encoding: str, wanted: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(("id;Siège;Âge\n" + "1;épaule;45,5\n" * 5 + "2;à côté;3,0\n").encode(encoding))
    dialect = detect_dialect(path)
    assert (dialect.encoding, dialect.delimiter, dialect.decimal) == (wanted, ";", ",")
    assert read_spreadsheet(path, dialect)[0] == ["id", "Siège", "Âge"]


@pytest.mark.parametrize(
    ("text", "delimiter", "decimal", "header_line"),
    [
        ("a,b,c\n1.5,2,x\n", ",", ".", 1),
        ("name;text\nx;a, b, c\ny;d, e\n", ";", ".", 1),
        ("a\tb\n1,5\t2,5\n", "\t", ",", 1),
        ("a|b\n1|2\n", "|", ".", 1),
        ("Title\n\nid;age;sex\n1;2;f\n2;3;m\n", ";", ".", 3),
        ("Export;;;\nDate: 2020;;;\nid;age;sex;file\n1;2;f;a\n2;3;m;b\n", ";", ".", 3),
        ("alone\n1\n2\n", ",", ".", 1),
        ('a,b\n"1,5",x\n"2,5",y\n', ",", ",", 1),
    ],
)
def test_delimiter_decimal_and_header_are_found_out(
    tmp_path: Path, text: str, delimiter: str, decimal: str, header_line: int
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    dialect = detect_dialect(path)
    assert (dialect.delimiter, dialect.decimal, dialect.header_line) == (delimiter, decimal, header_line)


def test_the_fullest_sheet_is_the_table(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.title = "legend"
    book.active.append(["F = female"])
    sheet = book.create_sheet("data")
    for row in (["Export of 2020"], [], ["id", "age"], ["1", 45], ["2", 46]):
        sheet.append(row)
    book.save(tmp_path / "t.xlsx")
    assert detect_dialect(tmp_path / "t.xlsx") == Dialect(sheet="data", header_line=3)
