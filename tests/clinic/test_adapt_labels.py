"""The list of labelled images: what is read of it, and every way in which it would make figures wrong."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from openpyxl import Workbook
from PIL import Image

from panfm.clinic.labels import Examples, join_examples, read_examples, read_labels
from panfm.errors import UserError

Write = Callable[..., Path]
HEADER = ("image", "label", "patient")
GOOD = [("0.png", "nevus", "a"), ("1.png", "nevus", "b"), ("2.png", "melanoma", "c"), ("3.png", "melanoma", "b")]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write 30 different images and a table of them."""
    for number in range(30):
        Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(tmp_path / f"{number}.png")

    def write(rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER, delimiter: str = ",") -> Path:
        with (tmp_path / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *rows])
        return tmp_path / "labels.csv"

    return write


def test_a_table_gives_classes_patients_and_paths(write: Write, tmp_path: Path) -> None:
    table = read_labels(write(GOOD))
    assert table.classes == ("melanoma", "nevus")
    assert table.labels.tolist() == [1, 1, 0, 0]
    assert table.groups == ("a", "b", "c", "b") and table.grouping == "patient"
    assert table.paths[2] == tmp_path / "2.png" and table.modality is None
    assert table.count_groups(0) == 2


def test_tables_come_as_people_export_them(write: Write, tmp_path: Path) -> None:
    semicolons = read_labels(write(GOOD, ("Image", "Label", "Patient"), ";"))
    book = Workbook()
    for row in [HEADER, *GOOD]:
        book.active.append(row)
    book.save(tmp_path / "labels.xlsx")
    workbook = read_labels(tmp_path / "labels.xlsx")
    assert semicolons.groups == workbook.groups == ("a", "b", "c", "b")


def test_without_patients_each_image_is_its_own(write: Write) -> None:
    table = read_labels(write([row[:2] for row in GOOD], HEADER[:2]))
    assert table.grouping == "image" and len(set(table.groups)) == 4


def test_images_may_lie_elsewhere(write: Write, tmp_path: Path) -> None:
    table = write(GOOD)
    (tmp_path / "tables").mkdir()
    moved = table.rename(tmp_path / "tables" / "labels.csv")
    assert read_labels(moved, tmp_path).paths[0] == tmp_path / "0.png"
    with pytest.raises(UserError, match=r"line 2 .*0.png.*; line 4 .* and 1 more: no such file; .*--images DIR"):
        read_labels(moved)
    with pytest.raises(UserError, match=r"--images .*nowhere: no such folder"):
        read_labels(moved, tmp_path / "nowhere")


def test_a_copy_under_another_name_counts_once(write: Write, tmp_path: Path) -> None:
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    table = read_labels(write([*GOOD, ("copy.png", "nevus", "a"), ("0.png", "nevus", "a")]))
    assert len(table.paths) == 4 and table.num_repeated == 2
    with pytest.raises(UserError, match="lines 2 and 6: the same image under two labels \\(nevus, melanoma\\)"):
        read_labels(write([*GOOD, ("copy.png", "melanoma", "a")]))
    with pytest.raises(UserError, match="lines 2 and 6: the same image under two patients") as caught:
        read_labels(write([*GOOD, ("copy.png", "nevus", "secret")]))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        (GOOD, ("file", "label", "patient"), "has no column 'image'; it has file, label, patient"),
        (GOOD, ("image", "class", "patient"), "has no column 'label'"),
        ([], HEADER, "has no rows below its header"),
        ([*GOOD, ("4.png", "", "d")], HEADER, "line 6: label is empty"),
        ([*GOOD, ("4.png", "nevus", "")], HEADER, "line 6: patient is empty; fill it in on every line, or take"),
        ([*GOOD, ("", "nevus", "d")], HEADER, "line 6: no image is named"),
        ([*GOOD, ("4.png", "Nevus", "d")], HEADER, "lines 2 and 6: labels 'nevus' and 'Nevus' differ in capitals"),
        ([row for row in GOOD if row[1] == "nevus"], HEADER, "all images have the label 'nevus'; at least two classes"),
        ([*GOOD, ("4.png", "other", "d"), ("5.png", "other", "d")], HEADER, "class 'other' has 1 patient; at least 2"),
    ],
)
def test_what_would_make_figures_wrong_is_refused(
    write: Write, rows: list[tuple[str, ...]], header: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        read_labels(write(rows, header))


def test_a_positive_class_must_occur(write: Write) -> None:
    with pytest.raises(UserError, match="--positive Melanom: no image has this label; the labels are melanoma, nevus"):
        read_labels(write(GOOD), positive="Melanom")


def test_rows_of_other_modalities_become_examples(write: Write) -> None:
    header = (*HEADER, "modality")
    rows = [(*row, "dermoscopic") for row in GOOD]
    assert read_labels(write(rows, header)).modality == "dermoscopic"
    mixed = [*rows, *((f"{number}.png", "nevus", "z", "Clinical") for number in range(4, 14))]
    with pytest.raises(UserError, match=r"holds several modalities \(clinical, dermoscopic\); name the one to fit on"):
        read_labels(write(mixed, header))
    table = read_labels(write(mixed, header), modality="dermoscopic")
    assert len(table.paths) == 4 and table.others.modalities == ("clinical",) * 10
    with pytest.raises(UserError, match="--modality total_body: no row of"):
        read_labels(write(mixed, header), modality="total_body")


def test_examples_of_other_modalities_are_checked(write: Write) -> None:
    others = read_examples(write([(f"{number}.png", "clinical") for number in range(10)], ("image", "modality")))
    none = Examples((), (), ())
    assert len(join_examples(none, others, "dermoscopic").paths) == 10
    with pytest.raises(UserError, match="name the one to fit on, as --modality dermoscopic"):
        join_examples(none, others, None)
    with pytest.raises(UserError, match="holds images of clinical, the modality that is fitted on"):
        join_examples(none, others, "clinical")
    few = Examples(others.paths[:9], others.modalities[:9], others.groups[:9])
    with pytest.raises(UserError, match="clinical has 9 images; at least 10"):
        join_examples(none, few, "dermoscopic")
