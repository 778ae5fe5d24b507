"""From a table to Records: typed values, unknown stays unknown, and every fault names file, line, column and value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from panfm.errors import UserError
from panfm.shards.sources import compare_with_expected, read_records


def test_rows_become_typed_records(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    records = read_records(archive.card, archive.root)
    assert len(records) == 12
    first, second, third = records[:3]
    assert first.line == 2 and first.path == archive.root / "images/photo0.jpg" and first.raw_id == "images/photo0.jpg"
    assert first.mask_path == archive.root / "masks/photo0.png" and second.mask_path is None
    assert first.metadata == {"institution": "north", "age": 30.0, "sex": "female"}  # no phototype, so no source of it
    assert second.metadata == {
        "institution": "north",
        "sex": "male",
        "phototype_low": 3,
        "phototype_high": 3,
        "phototype_source": "clinician",
    }
    assert [record.labels for record in records[:3]] == [{"diagnosis": "nevus"}, {"diagnosis": "melanoma"}, {}]
    assert first.tabular == {"diameter": 0.5}
    assert (first.caption, third.caption) == (None, "a mole of patient number 2")


def test_dates_become_days_since_the_first_visit(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    archive.rows[0]["date"] = "2020-01-20"  # rows need not be in order
    archive.rows[5]["date"] = ""
    archive.rows[11]["lesion"] = ""
    archive.write_table()
    days = [record.visit_day for record in read_records(archive.card, archive.root)]
    # patients P0 (rows 0-3) and P1 (4-7), then lesions L4, L5 of unknown patients, then a row without any owner
    assert days == [18, 0, 1, 2, 0, None, 2, 3, 0, 1, 0, None]


def test_a_lesions_patient_completes_its_other_rows(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    archive.rows[1]["patient"] = ""  # lesion L0, whose other row names P0
    archive.write_table()
    records = read_records(archive.card, archive.root)
    assert records[1].patient_id == "P0"
    assert records[8].patient_id is None  # nothing says whose lesion L4 is


def test_a_lesion_of_two_patients_needs_a_scope(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    for number, row in enumerate(archive.rows):
        row["lesion"] = str(number % 2)
    archive.write_table()
    with pytest.raises(UserError, match=r"lines 2 and 6: lesion '0' has two patients.*lesion_id_scope: patient"):
        read_records(archive.card, archive.root)
    archive.values["lesion_id_scope"] = "patient"
    assert len(read_records(archive.card, archive.root)) == 12


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["True", "false", ""], bool, [True, False]),
        (["1", "2.5", "UNK"], float, [1.0, 2.5]),
        (["007", "12", ""], str, ["007", "12"]),  # leading zeros: a code
        (["1", "nan", ""], str, ["1", "nan"]),
        (["1", "yes", ""], str, ["1", "yes"]),
    ],
)
def test_a_tabular_column_has_one_type(
    make_archive: Callable[..., Any], cells: list[str], kind: type, values: list[Any]
) -> None:
    archive = make_archive(3)
    archive.values["missing"] = ["UNK"]
    for row, cell in zip(archive.rows, cells, strict=True):
        row["diameter"] = cell
    archive.write_table()
    records = read_records(archive.card, archive.root)
    found = [record.tabular["diameter"] for record in records if record.tabular]
    assert found == values and {type(value) for value in found} == {kind}


def test_only_keeps_the_rows_that_the_card_means(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    archive.values["only"] = {"sex": ["f"], "dx": ["nv", "mel"]}
    assert [record.line for record in read_records(archive.card, archive.root)] == [2, 6, 8, 12]
    archive.values["only"] = {"sex": ["x"]}
    with pytest.raises(UserError, match=r"none of its 12 rows.*`only` of card small"):
        read_records(archive.card, archive.root)


def test_expected_counts_are_compared(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    archive.values["expected"] = {"images": 13, "labels": {"diagnosis": {"nevus": 4, "melanoma": 3, "wart": 1}}}
    card = archive.card
    assert compare_with_expected(card, read_records(card, archive.root)) == (
        "12 images, 13 expected",
        "diagnosis melanoma: 4, 3 expected",
        "diagnosis wart: 0, 1 expected",
    )


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("age", "old", ["line 4, column age: 'old'", "years from 0 to 130"]),
        ("age", "nan", ["'nan'"]),
        ("age", "400", ["'400'"]),
        ("sex", "w", ["column sex: 'w'", "values.sex lists only f, m"]),
        ("skin", "7", ["column skin: '7'", "from 1 to 6"]),
        ("skin", "2.5", ["'2.5'"]),
        ("date", "03/01/2020", ["column date: '03/01/2020'", "%Y-%m-%d"]),
        ("dx", "wart", ["column dx: 'wart'", "labels.diagnosis lists only nv, mel, ?"]),
        ("file", "", ["column file", "must name an image file"]),
        ("file", "../secret.jpg", ["column file: '../secret.jpg'", "below --root"]),
        ("file", "/etc/passwd", ["below --root"]),
        ("file", "images/photo0.jpg", ["lines 2 and 4", "one row an image"]),
    ],
)
def test_a_bad_cell_is_named(make_archive: Callable[..., Any], column: str, value: str, words: list[str]) -> None:
    archive = make_archive()
    archive.rows[2][column] = value
    archive.write_table()
    with pytest.raises(UserError) as error:
        read_records(archive.card, archive.root)
    message = str(error.value)
    assert "table.csv" in message and "\n" not in message
    for word in words:
        assert word in message


def test_a_closed_set_without_a_map(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    archive.values["values"] = {}
    with pytest.raises(UserError, match=r"line 2, column sex: 'f'; it must be one of female, male, other; map it"):
        read_records(archive.card, archive.root)


def test_a_missing_column_names_the_nearest(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    archive.values["columns"]["lesion_id"] = "lesion_id"
    with pytest.raises(UserError, match=r"has no column lesion_id, which columns.lesion_id .* the nearest is lesion"):
        read_records(archive.card, archive.root)


def test_unusable_tables(make_archive: Callable[..., Any]) -> None:
    archive = make_archive()
    table: Path = archive.root / "table.csv"
    text = table.read_text()
    with pytest.raises(UserError, match="nowhere: no such folder; --root"):
        read_records(archive.card, archive.root / "nowhere")
    table.write_text(text.splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"table.csv: has no rows; an empty archive"):
        read_records(archive.card, archive.root)
    table.write_text("")
    with pytest.raises(UserError, match=r"table.csv: has no header in line 1"):
        read_records(archive.card, archive.root)
    table.write_text(text + "images/photo0.jpg,P1\n")
    with pytest.raises(UserError, match=r"table.csv, line 14: has not as many cells"):
        read_records(archive.card, archive.root)
    table.write_bytes(text.encode() + b"\xe9,,,,,,,,,,\n")
    with pytest.raises(UserError, match=r"table.csv: byte \d+ is not UTF-8"):
        read_records(archive.card, archive.root)
    table.write_text("\ufeff" + text)  # Excel's byte order mark is no part of the first column's name
    assert len(read_records(archive.card, archive.root)) == 12
    table.unlink()
    with pytest.raises(UserError, match=r"table.csv: no such file; card small"):
        read_records(archive.card, archive.root)
