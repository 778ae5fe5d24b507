"""Rows from tables, listings, joins and derived columns: what comes out, and which fault is named where."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panfm.errors import UserError
from panfm.shards.cards import SourceCard
from panfm.shards.drafting.files import list_images
from panfm.shards.raw_files import read_raw
from panfm.shards.sources import compute_code_report, read_records
from panfm.shards.tables import iterate_rows
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import make_source_card, write_table
from tests.shards.conftest import draw_picture
from tests.shards.dicom_files import write_dicom


def make_card(**values: Any) -> SourceCard:
    return make_source_card("small", **({"modality": "clinical", "table": None, "synthetic": None} | values))


def write_images(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw_picture(number).save(root / name)


# ------------------------------------------------------------------------------------------------ listings


def test_a_listing_makes_columns_of_the_parts_of_paths(tmp_path: Path) -> None:
    write_images(tmp_path, "train/melanoma/a.jpg", "train/nevus/b.PNG", "test/nevus/c.jpeg", "other/d.jpg")
    (tmp_path / "train" / "nevus" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "nevus" / ".hidden.jpg").write_bytes(b"")
    card = make_card(
        listing=["train/{kind}/{name}", "test/{kind}/{name}"],
        columns={"official_split": "folder", "key": "stem"},
        labels={"diagnosis": {"column": "kind"}},
    )
    records = list(read_records(card, tmp_path))
    assert [(one.path.relative_to(tmp_path).as_posix(), one.raw_id) for one in records] == [
        ("test/nevus/c.jpeg", "c"),
        ("train/melanoma/a.jpg", "a"),
        ("train/nevus/b.PNG", "b"),
    ]
    assert [one.metadata["official_split"] for one in records] == ["test", "train", "train"]
    assert [one.labels["diagnosis"] for one in records] == ["nevus", "melanoma", "nevus"]


def test_a_placeholder_may_hold_a_regular_expression_and_repeat(tmp_path: Path) -> None:
    write_images(tmp_path, "IMD002/IMD002_image.jpg", "IMD003/IMD004_image.jpg", "XX2/XX2_image.jpg")
    card = make_card(listing="{case:[A-Z]{3}[0-9]+}/{case}_image.jpg", columns={"lesion_id": "case"})
    assert [one.lesion_id for one in read_records(card, tmp_path)] == ["IMD002"]


def test_a_listing_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(listing\): has no rows"):
        read_records(make_card(listing="{name}.jpg"), tmp_path)


# ------------------------------------------------------------------------------------------------ joins


def two_tables(root: Path) -> dict[str, Any]:
    write_table(root / "a.csv", [{"image": "i1", "sex": "m"}, {"image": "i2", "sex": ""}])
    write_table(root / "b.csv", [{"id": "i2", "MEL": "0", "NV": "1.0"}, {"id": "i1", "MEL": "1.0", "NV": "0"}])
    return {
        "table": "a.csv",
        "joins": [{"table": "b.csv", "match": {"image": "id"}}],
        "images": {"image": {"path": "photos/{image}.jpg"}},
        "columns": {"key": "image", "sex": "sex"},
        "values": {"sex": {"m": "male"}},
        "labels": {
            "diagnosis": {"one_hot": {"MEL": "melanoma", "NV": "nevus"}, "codes": {"icd10": {"melanoma": "C43.9"}}}
        },
    }


def test_a_joined_table_gives_its_columns(tmp_path: Path) -> None:
    card = make_card(**two_tables(tmp_path))
    records = read_records(card, tmp_path)
    assert [one.labels for one in records] == [
        {"diagnosis": "melanoma", "diagnosis#icd10": "C43.9"},
        {"diagnosis": "nevus"},
    ]
    assert compute_code_report(card, records) == {"diagnosis#icd10": {"melanoma": (1, "C43.9"), "nevus": (1, None)}}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "i1", "MEL": "1", "NV": "0"}], ["a.csv, line 3", "image = i2", "b.csv", "required: false"]),
        (
            [{"id": "i1", "MEL": "1", "NV": "0"}, {"id": "i1", "MEL": "0", "NV": "1"}],
            ["b.csv, line 3", "second row", "i1"],
        ),
        (
            [{"id": "i1", "MEL": "1", "NV": "1"}, {"id": "i2", "MEL": "0", "NV": "1"}],
            ["line 2", "MEL 1, NV 1", "exactly one"],
        ),
        (
            [{"id": "i1", "MEL": "0.5", "NV": "1"}, {"id": "i2", "MEL": "0", "NV": "1"}],
            ["line 2", "MEL 0.5", "exactly one"],
        ),
        ([{"id": "i1", "MEL": "x", "NV": "1"}, {"id": "i2", "MEL": "0", "NV": "1"}], ["line 2", "exactly one"]),
    ],
)
def test_faulty_joins_and_one_hot_cells_are_named(tmp_path: Path, rows: list[dict[str, str]], words: list[str]) -> None:
    card = make_card(**two_tables(tmp_path))
    write_table(tmp_path / "b.csv", rows)
    with pytest.raises(UserError) as error:
        read_records(card, tmp_path)
    for word in words:
        assert word in str(error.value)


def test_a_join_may_mark_the_rows_that_it_lists(tmp_path: Path) -> None:
    write_table(tmp_path / "meta.csv", [{"file": f"{number}.jpg"} for number in range(3)])
    write_table(tmp_path / "train.csv", [{"indexes": "0"}, {"indexes": "2"}])
    write_table(tmp_path / "test.csv", [{"indexes": "1"}])
    joins = [
        {"table": f"{part}.csv", "match": {"row_number": "indexes"}, "required": False, "mark": {"split": part}}
        for part in ("train", "test")
    ]
    card = make_card(table="meta.csv", joins=joins, columns={"path": "file", "official_split": "split"})
    assert [one.metadata["official_split"] for one in read_records(card, tmp_path)] == ["train", "test", "train"]
    write_table(tmp_path / "test.csv", [{"indexes": "0"}])
    with pytest.raises(UserError, match=r"column split: 'train' here, 'test' in test.csv"):
        read_records(card, tmp_path)


def test_parts_of_one_table_fill_one_column_and_contradictions_are_errors(tmp_path: Path) -> None:
    write_images(tmp_path, "a/i1.jpg", "b/i2.jpg", "b/i3.jpg")
    write_table(tmp_path / "a.csv", [{"image": "i1", "dx": "nv"}])
    write_table(tmp_path / "b.csv", [{"image": "i2", "dx": "mel"}])
    values: dict[str, Any] = {
        "listing": "{part}/{image}.jpg",
        "joins": [{"table": name, "match": {"image": "image"}, "required": False} for name in ("a.csv", "b.csv")],
        "labels": {"diagnosis": {"column": "dx"}},
    }
    assert [one.labels.get("diagnosis") for one in read_records(make_card(**values), tmp_path)] == ["nv", "mel", None]
    write_table(tmp_path / "b.csv", [{"image": "i1", "dx": "mel"}])
    with pytest.raises(UserError, match=r"column dx: 'nv' here, 'mel' in b.csv; .*prefix"):
        read_records(make_card(**values), tmp_path)
    values["joins"][1]["prefix"] = "second_"
    values["labels"]["diagnosis@second"] = {"column": "second_dx"}
    first = read_records(make_card(**values), tmp_path)[0]
    assert first.labels == {"diagnosis": "nv", "diagnosis@second": "mel"}  # two readers, side by side


# ------------------------------------------------------------------------------------------------ files of a row


def test_a_row_with_two_images_gives_two_records_of_one_lesion(tmp_path: Path) -> None:
    write_table(tmp_path / "meta.csv", [{"case": "7", "derm": "d/7.jpg", "clinic": "c/7.jpg"}])
    card = make_card(
        modality=None,
        table="meta.csv",
        images={
            "derm": {"path": "images/{derm}", "modality": "dermoscopic"},
            "clinic": {"path": "images/{clinic}", "modality": "clinical"},
        },
        columns={"lesion_id": "case", "key": "case"},
    )
    derm, clinic = read_records(card, tmp_path)
    assert (derm.modality, derm.raw_id, derm.lesion_id) == ("dermoscopic", "7#derm", "7")
    assert (clinic.modality, clinic.raw_id, clinic.lesion_id) == ("clinical", "7#clinic", "7")
    assert clinic.path == tmp_path / "images/c/7.jpg"


def test_the_first_template_whose_file_exists_is_taken(tmp_path: Path) -> None:
    write_images(tmp_path, "part_1/a.jpg", "part_2/b.jpg", "masks/b.png")
    write_table(tmp_path / "t.csv", [{"id": "a"}, {"id": "b"}, {"id": "c"}])
    card = make_card(
        table="t.csv", images={"image": {"path": ["part_1/{id}.jpg", "part_2/{id}.jpg"], "mask": "masks/{id}.png"}}
    )
    records = list(read_records(card, tmp_path))
    assert [one.path.relative_to(tmp_path).as_posix() for one in records] == [
        "part_1/a.jpg",
        "part_2/b.jpg",
        "part_1/c.jpg",  # nowhere: named as the first template says, and counted as missing by the build
    ]
    assert [one.mask_path is not None for one in records] == [False, True, False]


@pytest.mark.parametrize("kind", ["zip", "hdf5"])
def test_members_of_containers_are_read_in_place(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path / "loose", "a.jpg", "b.jpg")
    files = {name: (tmp_path / "loose" / f"{name}.jpg").read_bytes() for name in "ab"}
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"part/{name}.jpg", data)
        template = "images.zip::part/{id}.jpg"
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "images.hdf5", "w") as archive:
            for name, data in files.items():
                archive[name] = np.void(data)  # as the ISIC 2024 file holds its JPEGs
        template = "images.hdf5::{id}"
    write_table(tmp_path / "t.csv", [{"id": "a"}, {"id": "b"}, {"id": "gone"}])
    card = make_card(table="t.csv", images={"image": {"path": template}}, columns={"key": "id"})
    records = read_records(card, tmp_path)
    assert read_raw(records[0].path, records[0].member) == files["a"]
    with pytest.raises(FileNotFoundError):
        read_raw(records[2].path, records[2].member)
    report = build_shards(card, tmp_path, tmp_path / "out", options=BuildOptions(max_rejected_share=0.5))
    assert (report.num_samples, report.num_rejected) == (2, {"missing_file": 1})


def test_paths_that_leave_the_root_are_refused(tmp_path: Path) -> None:
    for text in ("../secret.jpg", "/etc/passwd", "C:\\\\photos\\\\a.jpg"):
        write_table(tmp_path / "t.csv", [{"file": text}])
        with pytest.raises(UserError, match=r"line 2, column file: .*below --root"):
            read_records(make_card(table="t.csv", columns={"path": "file"}), tmp_path)
    write_table(tmp_path / "t.csv", [{"file": "photos\\a.jpg"}])  # as Windows writes it
    assert (
        read_records(make_card(table="t.csv", columns={"path": "file"}), tmp_path)[0].path == tmp_path / "photos/a.jpg"
    )


# ------------------------------------------------------------------------------------------------ derived, amended


def test_derived_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"file": "TCGA-D3-A1Q1-01Z.jpg", "n": "4"}])
    card = make_card(
        table="t.csv",
        derive={
            "patient": {"column": "file", "pattern": "^(TCGA-..-....)"},
            "lesion": {"template": "{patient}/{n}"},
        },
        columns={"path": "file", "patient_id": "patient", "lesion_id": "lesion", "key": "stem"},
    )
    record = read_records(card, tmp_path)[0]
    assert (record.patient_id, record.lesion_id, record.raw_id) == (
        "TCGA-D3-A1Q1",
        "TCGA-D3-A1Q1/4",
        "TCGA-D3-A1Q1-01Z",
    )
    write_table(tmp_path / "t.csv", [{"file": "x.jpg", "n": "4"}])
    with pytest.raises(UserError, match=r"line 2, column file: 'x.jpg' does not fit pattern .*derive.patient"):
        read_records(card, tmp_path)


def test_aliases_join_patients_and_corrections_keep_what_the_table_said(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.jpg", "pat": name, "dx": "nv"} for n, name in enumerate(("DOE J", "Doe, J", "ROE"))]
    write_table(tmp_path / "t.csv", rows)
    write_table(tmp_path / "patient_aliases.csv", [{"patient_id": "Doe, J", "same_as": "DOE J"}])
    correction = {"key": "1.jpg", "label": "diagnosis", "old": "nevus", "new": "melanoma", "version": "1", "reason": ""}
    write_table(tmp_path / "fix.csv", [correction | {"old": "melanoma", "new": "", "version": "2"}, correction])
    values: dict[str, Any] = {
        "table": "t.csv",
        "columns": {"path": "file", "patient_id": "pat"},
        "labels": {"diagnosis": {"column": "dx", "values": {"nv": "nevus", "mel": "melanoma"}}},
        "patient_aliases": "patient_aliases.csv",
        "corrections": "fix.csv",
    }
    records = read_records(make_card(**values), tmp_path)
    assert [one.patient_id for one in records] == ["DOE J", "DOE J", "ROE"]
    assert [one.labels for one in records] == [
        {"diagnosis": "nevus"},
        {"diagnosis@original": "nevus"},  # version 2 made it unknown after all
        {"diagnosis": "nevus"},
    ]
    assert records.label_version == 2
    write_table(tmp_path / "fix.csv", [correction | {"old": "keratosis"}])
    with pytest.raises(UserError, match=r"fix.csv, line 2: diagnosis of '1.jpg' is 'nevus', not 'keratosis'"):
        read_records(make_card(**values), tmp_path)
    write_table(tmp_path / "fix.csv", [correction | {"new": "melanom"}])
    with pytest.raises(UserError, match=r"line 2: new value 'melanom' is none of diagnosis .* \(melanoma, nevus\)"):
        read_records(make_card(**values), tmp_path)
    write_table(tmp_path / "fix.csv", [correction | {"key": "9.jpg"}])
    with pytest.raises(UserError, match=r"fix.csv, line 2: no image has the key '9.jpg'"):
        read_records(make_card(**values), tmp_path)
    write_table(
        tmp_path / "patient_aliases.csv", [{"patient_id": "a", "same_as": "b"}, {"patient_id": "b", "same_as": "a"}]
    )
    with pytest.raises(UserError, match="in a circle"):
        read_records(make_card(**values), tmp_path)


def test_phototypes_in_roman_numerals_and_ranges(tmp_path: Path) -> None:
    texts = ["3", "3.0", "III", "ii-iv", "2-3", ""]
    write_table(tmp_path / "t.csv", [{"file": f"{n}.jpg", "skin": text} for n, text in enumerate(texts)])
    card = make_card(table="t.csv", columns={"path": "file", "phototype": "skin"})
    found = [
        (one.metadata.get("phototype_low"), one.metadata.get("phototype_high")) for one in read_records(card, tmp_path)
    ]
    assert found == [(3, 3), (3, 3), (3, 3), (2, 4), (2, 3), (None, None)]


def test_cells_that_a_label_does_not_list(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"file": "a.jpg", "dx": "rare"}])

    def read(others: str) -> dict[str, str]:
        labels = {"diagnosis": {"column": "dx", "values": {"nv": "nevus"}, "others": others}}
        return read_records(make_card(table="t.csv", columns={"path": "file"}, labels=labels), tmp_path)[0].labels

    assert read("keep") == {"diagnosis": "rare"}
    assert read("unknown") == {}
    with pytest.raises(UserError, match=r"column dx: 'rare'; labels.diagnosis lists only nv"):
        read("error")


def test_identifying_columns_come_along_and_others_are_not_read(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"file": "a.jpg", "name": "Jane Roe", "born": "1960-02-03", "phone": "555"}])
    card = make_card(table="t.csv", columns={"path": "file"}, identifying_columns=["name", "born"])
    assert read_records(card, tmp_path)[0].identifying == ("Jane Roe", "1960-02-03")
    assert [set(row) for _, row in iterate_rows(card, tmp_path)] == [{"file", "name", "born"}]


def test_a_column_that_some_downloads_lack(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"file": "a.jpg"}])
    values: dict[str, Any] = {"table": "t.csv", "columns": {"path": "file", "age": "age_approx"}}
    with pytest.raises(UserError, match="has no column age_approx"):
        read_records(make_card(**values), tmp_path)
    record = read_records(make_card(**values, optional_columns=["age_approx"]), tmp_path)[0]
    assert record.metadata == {}


def test_dicom_headers_are_columns(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.PatientID, dataset.PatientSex = "00123", "F"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.4"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.save_as(tmp_path / "photo.dcm", enforce_file_format=True)
    card = make_card(
        listing="{name}.dcm",
        dicom_tags=["PatientID", "PatientSex", "StudyDate"],
        columns={"patient_id": "PatientID", "sex": "PatientSex", "visit_date": "StudyDate"},
        values={"sex": {"F": "female", "M": "male"}},
    )
    record = read_records(card, tmp_path)[0]
    assert (record.patient_id, record.metadata, record.visit_day) == ("00123", {"sex": "female"}, None)


def test_dicom_files_need_no_suffix(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    data = write_dicom(np.zeros((40, 40, 3), np.uint8), PatientAge="018M")
    for name in ("a/IM00001", "a/1.2.840.7", "a/photo.dcm", "a/DICOMDIR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a/README").write_text("no image")
    (tmp_path / "a/notes.txt").write_bytes(data)
    card = make_card(listing="{who}/{name}", dicom_tags=["PatientAge"], columns={"age": "PatientAge", "key": "stem"})
    records = read_records(card, tmp_path)
    assert [one.raw_id for one in records] == ["1.2.840.7", "IM00001", "photo"]
    assert [one.metadata["age"] for one in records] == [1.5, 1.5, 1.5]
    assert list_images(tmp_path) == ["a/1.2.840.7", "a/IM00001", "a/photo.dcm"]


# ------------------------------------------------------------------------------------------------ the table of records


def test_slices_of_records_are_small_and_equal(tmp_path: Path) -> None:
    import pickle

    rows = [{"file": f"folder/{n:05d}.jpg", "pat": f"P{n // 3}", "dx": f"text {n}"} for n in range(20_000)]
    write_table(tmp_path / "t.csv", rows)
    card = make_card(
        table="t.csv", columns={"path": "file", "patient_id": "pat"}, labels={"diagnosis": {"column": "dx"}}
    )
    records = read_records(card, tmp_path)
    chosen = np.random.default_rng(0).permutation(len(records))[:100]
    part = pickle.loads(pickle.dumps(records.take(chosen)))
    assert [one.raw_id for one in part] == [records[int(place)].raw_id for place in chosen]
    assert part[3] == records[int(chosen[3])]
    assert len(pickle.dumps(part)) < 40_000  # not the 20,000 distinct texts of the whole column
    assert records.table.nbytes / len(records) < 200  # bytes a record, texts included


def test_masks_may_be_named_by_cells_and_then_must_exist(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg")
    Image.new("L", (80, 60)).save(tmp_path / "m.png")
    write_table(tmp_path / "t.csv", [{"file": "a.jpg", "mask": "gone.png"}])
    card = make_card(table="t.csv", columns={"path": "file", "mask_path": "mask"})
    assert read_records(card, tmp_path)[0].mask_path == tmp_path / "gone.png"
