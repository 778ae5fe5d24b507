"""A hospital's first hour: drafted cards of archives as hospitals write them load, read and build as they are."""

import csv
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from panfm.cli.main import app
from panfm.errors import UserError
from panfm.shards.cards import SourceCard, load_card
from panfm.shards.drafting.draft import Draft, draft_card, write_draft
from panfm.shards.sources import read_records
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import write_table

FRENCH = (
    "IPP;Nom;Prénom;Date de naissance;Sexe;Âge;Phototype;N° lésion;Localisation;Diagnostic;Histologie;"
    "Date de consultation;Type d'image;Appareil;Fichier;Diamètre (mm);Commentaire;Lecteur 1;Lecteur 2"
)
PATIENTS = [  # IPP, name, first name, birth date, sex
    ("007123", "Dupont", "Élodie", "03/02/1960", "F"),
    ("007124", "Durand", "Paul", "14/05/1971", "H"),
    ("7123", "DUPONT", "Elodie", "03/02/1960", "F"),  # the first one, zeros lost
    ("008001", "Martin", "Luc", "01/01/1950", "H"),
]


def draw(path: Path, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(path, quality=90)


def french_rows() -> list[list[str]]:
    rows = []
    for i in range(12):
        patient = PATIENTS[i // 3]
        rows.append(
            [
                *patient,
                ["45,5", "60", "NR", "70"][i // 3],
                ["II", "III-IV", "", "VI"][i // 3],
                f"L{i // 3}",
                "épaule",
                ["Nævus", "mélanome", "CBC", "mélanome SSM 0,8 mm"][i // 3],
                ["oui", "non"][i % 2],
                f"{12 + i}/03/2019",
                ["dermoscopie", "photo"][i % 2],
                "Canon G7",
                f"D:\\export\\IMG_{i:04d}.JPG",
                f"{i},5",
                "voir courrier",
                ["naevus", "MEL"][i % 2],
                "naevus",
            ]
        )
    return rows


def write_french(root: Path, rows: list[list[str]], header: str = FRENCH) -> Path:
    text = "Export dermatologie;;\r\n" + "\r\n".join([header, *(";".join(row) for row in rows)]) + "\r\n"
    table = root / "export.csv"
    table.write_bytes(text.encode("cp1252"))
    return table


@pytest.fixture
def french(tmp_path: Path) -> Path:
    root = tmp_path / "chu"
    for i in range(12):
        draw(root / "photos" / f"IMG_{i:04d}.jpg", i)
    write_french(root, french_rows())
    return root


def load(draft: Draft, out: Path) -> SourceCard:
    write_draft(draft, out, force=True)
    return load_card(out / f"{draft.name}.yaml")


def find(draft: Draft, kind: str, words: str) -> Any:
    found = [one for one in draft.findings if one.kind == kind and words in one.text]
    assert len(found) == 1, (words, [one.text for one in draft.findings])
    return found[0]


def test_a_french_archive_drafts_and_builds(french: Path, tmp_path: Path) -> None:
    draft = draft_card(french, "export.csv")
    card = load(draft, tmp_path)
    assert card.name == "chu" and card.identifiers == "private" and card.permitted_uses == ("research",)
    assert (card.dialect.encoding, card.dialect.delimiter, card.dialect.decimal) == ("cp1252", ";", ",")
    assert card.dialect.header_line == 2 and card.date_format == "%d/%m/%Y"
    assert card.identifying_columns == ("Nom", "Prénom", "Date de naissance")
    assert card.patient_aliases is None  # proposed, not made
    assert card.columns == {
        "patient_id": "IPP",
        "lesion_id": "N° lésion",
        "visit_date": "Date de consultation",
        "age": "Âge",
        "sex": "Sexe",
        "phototype": "Phototype",
        "anatomic_site": "Localisation",
        "modality": "Type d'image",
        "device": "Appareil",
        "confirmed_by": "Histologie",
    }
    records = read_records(card, french)
    first, fourth, last = records[0], records[3], records[11]
    assert first.patient_id == "007123" and records[6].patient_id == "7123"  # zeros kept, nothing merged
    assert first.path == french / "photos/IMG_0000.jpg" and first.modality == "dermoscopic"
    assert first.metadata["age"] == 45.5 and first.metadata["sex"] == "female"
    assert first.metadata["confirmed_by"] == "histopathology" and "confirmed_by" not in records[1].metadata
    assert (fourth.metadata["phototype_low"], fourth.metadata["phototype_high"]) == (3, 4)
    assert records[2].visit_day == 2 and "age" not in records[6].metadata
    assert first.labels == {
        "diagnosis": "nevus",
        "diagnosis#icd10": "D22.9",
        "diagnosis@reader_1": "nevus",
        "diagnosis@reader_1#icd10": "D22.9",
        "diagnosis@reader_2": "nevus",
        "diagnosis@reader_2#icd10": "D22.9",
    }
    assert "diagnosis" not in last.labels  # a longer text is suggested, not mapped
    assert not any(finding.blocks for finding in draft.findings)
    options = BuildOptions(key_file=tmp_path / "secret.key", create_key=True, processes=1)
    with pytest.raises(UserError, match="TODO is left in consent_scope and legal_basis"):
        build_shards(card, french, tmp_path / "shards", options=options)
    decided = {"legal_basis": "approved by the ethics committee", "consent_scope": "research in this hospital"}
    build_shards(card.model_copy(update=decided), french, tmp_path / "shards", options=options)
    table = pq.read_table(tmp_path / "shards" / "samples.parquet")
    assert table.num_rows == 12 and len(set(table["patient_id"].to_pylist())) == 4
    for file in (tmp_path / "shards").iterdir():
        data = file.read_bytes()
        assert not any(word.encode() in data for word in ("Dupont", "DUPONT", "007123", "03/02/1960")), file


def test_what_a_draft_writes(french: Path, tmp_path: Path) -> None:
    draft = draft_card(french, french / "export.csv", "north")
    paths = write_draft(draft, tmp_path / "out")
    assert [path.name for path in paths] == ["north.yaml", "north.report.md", "patient_aliases.proposed.csv"]
    card, report, aliases = (path.read_text() for path in paths)
    assert '"Fichier": 12 of 12 rows have a file' in card and '"mélanome SSM 0,8 mm": null  # TODO 3 cells' in card
    assert '"Diamètre (mm)": 12 cells' in card and "free text may name people" in card
    for secret in ("007123", "Dupont", "Élodie", "03/02/1960"):
        assert secret not in card and secret not in str(draft)
    assert "must not leave it" in report and "'007123'" not in card
    assert list(csv.reader(aliases.splitlines())) == [
        ["patient_id", "same_as", "why"],
        ["7123", "007123", "differ in leading zeros"],
    ]
    assert "| diagnosis | Nævus | 3 | nevus | D22.9 |" in report
    assert "| diagnosis | mélanome SSM 0,8 mm | 3 | **open** |" in report
    paths[0].write_text("answered")
    with pytest.raises(UserError, match=r"north.yaml: is there already and may hold your answers; give --force"):
        write_draft(draft, tmp_path / "out")
    assert paths[0].read_text() == "answered"
    write_draft(draft, tmp_path / "out", force=True)
    assert paths[0].read_text() == card


def test_approved_aliases_merge(french: Path, tmp_path: Path) -> None:
    write_draft(draft_card(french, "export.csv"), french)
    (french / "patient_aliases.proposed.csv").rename(french / "patient_aliases.csv")
    text = (french / "chu.yaml").read_text()
    (tmp_path / "chu.yaml").write_text(text.replace("# patient_aliases:", "patient_aliases:"))
    records = read_records(load_card(tmp_path / "chu.yaml"), french)
    assert {record.patient_id for record in records} == {"007123", "007124", "008001"}


def test_an_english_workbook(tmp_path: Path) -> None:
    root = tmp_path / "North Clinic"
    book = openpyxl.Workbook()
    book.active.title = "Legend"
    book.active.append(["SCC = squamous cell carcinoma"])
    sheet = book.create_sheet("Images")
    sheet.append(["MRN", "Visit date", "DOB", "Gender", "Age", "Skin type", "Body site", "Diagnosis", "Photo", "Ward"])
    for i in range(9):
        name = f"{i:03d}_{'abc'[i % 3]}"
        draw(root / f"camera {i % 2}" / f"{name}.{'png' if i == 8 else 'jpg'}", i)
        day, birth = datetime.datetime(2020, 1, 1 + i), datetime.datetime(1960 + i // 3, 5, 1)
        diagnosis = ["SCC", "BCC", "Nevus"][i % 3]
        sheet.append([120 + i // 3, day, birth, "FMM"[i // 3], 45 + i // 3, 2 + i % 2, "arm", diagnosis, name, "x"])
        sheet.cell(sheet.max_row, 1).number_format = "00000"
    book.save(root / "export.xlsx")
    draft = draft_card(root, root / "export.xlsx")
    card = load(draft, tmp_path)
    assert card.name == "north_clinic" and card.dialect.sheet == "Images"
    assert card.date_format == "%Y-%m-%d" and card.identifying_columns == ("DOB",)
    assert set(card.images["image"].path) == {
        *("camera 0/{Photo}.jpg", "camera 1/{Photo}.jpg", "camera 0/{Photo}.png"),
    }
    records = read_records(card, root)
    assert [record.patient_id for record in records] == ["00120"] * 3 + ["00121"] * 3 + ["00122"] * 3
    assert records[8].path == root / "camera 0/008_c.png" and records[8].visit_day == 2
    assert records[0].metadata == {"age": 45.0, "sex": "female", "phototype_low": 2, "phototype_high": 2} | {
        "anatomic_site": "arm"
    }
    assert records[0].labels == {"diagnosis": "squamous_cell_carcinoma", "diagnosis#icd10": "C44.9"}
    find(draft, "columns", "of 2 sheets only 'Images' is read")


def test_a_german_table(tmp_path: Path) -> None:
    root = tmp_path / "klinik"
    lines = [
        "Patienten-Nr\tGeschlecht\tAlter\tHauttyp\tLokalisation\tDiagnose\tDignität\tDatum\tBilddatei\tAufnahmeart"
    ]
    for i in range(8):
        draw(root / "bilder" / f"b{i}.jpg", i)
        sex, diagnosis = ["m", "w"][i // 4], ["Basaliom", "Nävus", "aktinische Keratose", "V.a. Melanom"][i % 4]
        kind = ["bösartig", "gutartig"][i % 2]
        cells = [f"{i // 2}-07", sex, f"{40 + i} Jahre", "Typ III", "Rücken", diagnosis, kind, f"{13 + i}.02.2021"]
        lines.append("\t".join([*cells, f"bilder/b{i}.jpg", "Auflicht"]))
    (root / "tabelle.tsv").write_text("\n".join(lines), encoding="utf-8")
    draft = draft_card(root, "tabelle.tsv")
    card = load(draft, tmp_path)
    assert card.columns["path"] == "Bilddatei" and card.date_format == "%d.%m.%Y"
    records = read_records(card, root)
    assert records[0].metadata == {"age": 40.0, "sex": "male", "anatomic_site": "Rücken"} | {
        "phototype_low": 3,
        "phototype_high": 3,
    }
    assert records[0].modality == "dermoscopic" and records[1].visit_day == 1
    assert records[0].labels["malignant"] == "malignant" and records[0].labels["diagnosis"] == "basal_cell_carcinoma"
    assert records[2].labels["diagnosis"] == "actinic_keratosis" and "diagnosis" not in records[3].labels
    open_ones = [one for one in draft.mapping if one.state == "open"]
    assert [(one.raw, one.count) for one in open_ones] == [("V.a. Melanom", 2)]
    assert "melanoma" in open_ones[0].remark and "question" in open_ones[0].remark


# ------------------------------------------------------------------------------------------------ files


def small_table(root: Path, rows: list[dict[str, str]]) -> Path:
    table = root / "table.csv"
    write_table(table, rows)
    return table


def test_ids_inside_file_names_become_a_list(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for name in ("SP_0012_a", "SP_0012_b", "SP_0013_a", "SP_0014_a", "SP_0013_0014"):
        draw(root / "img" / f"{name}.jpg", len(name))
    rows = [{"case": case, "patient": f"P{case}", "dx": "nevus"} for case in ("12", "13", "14", "15")]
    draft = draft_card(root, small_table(root, rows))
    assert draft.listed == (
        ("path", "case"),
        ("img/SP_0012_a.jpg", "12"),
        ("img/SP_0012_b.jpg", "12"),
        ("img/SP_0013_a.jpg", "13"),
        ("img/SP_0014_a.jpg", "14"),
    )
    write_draft(draft, root)
    records = read_records(load_card(root / "raw.yaml"), root)
    assert [(record.path.name, record.patient_id) for record in records[:3]] == [
        ("SP_0012_a.jpg", "P12"),
        ("SP_0012_b.jpg", "P12"),
        ("SP_0013_a.jpg", "P13"),
    ]
    find(draft, "files", "3 cells have other leading zeros than their files")
    assert find(draft, "files", "1 of 4 rows have no file").examples == ("line 5: '15'",)
    assert find(draft, "files", "1 of 5 files belong to no row").examples == ("img/SP_0013_0014.jpg",)
    find(draft, "files", "1 files hold the texts of two rows and were left out")


def test_another_case_becomes_a_list(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for name in ("Img_A", "Img_B"):
        draw(root / f"{name}.jpg", 1)
    rows = [{"file": file, "patient": "1"} for file in ("IMG_A.JPG", "img_b.jpg", "img_c.jpg")]
    draft = draft_card(root, small_table(root, rows))
    write_draft(draft, root)
    records = read_records(load_card(root / "raw.yaml"), root)
    assert [record.path.name for record in records] == ["Img_A.jpg", "Img_B.jpg", "img_c.jpg"]  # the last is missing
    find(draft, "files", "differ from their files in upper and lower case")


def test_files_and_rows_that_do_not_meet(french: Path) -> None:
    rows = french_rows()
    rows[1][14] = rows[0][14]  # two rows, one file
    rows[2][14] = ""
    rows[3][14] = "IMG_9999.JPG"
    draw(french / "photos" / "IMG_0001_mask.png", 3)
    write_french(french, rows)
    draft = draft_card(french, "export.csv")
    doubled = find(draft, "files", "1 files stand in two rows")
    assert doubled.blocks and doubled.examples == ("photos/IMG_0000.jpg: lines 3, 4",)
    empty = find(draft, "files", "1 rows name no file")
    assert empty.blocks and empty.examples == ("line 5",)
    assert find(draft, "files", "1 of 12 rows have no file").examples == ("line 6: 'IMG_9999.JPG'",)
    unused = find(draft, "files", "4 of 13 files belong to no row; 1 of them look like masks")
    assert "photos/IMG_0001.jpg" in unused.examples
    assert "IMG_9999" not in str(draft) and "! 1 files stand in two rows" in str(draft)


def test_masks_in_a_column(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    rows = []
    for i in range(3):
        draw(root / "img" / f"{i}.jpg", i)
        draw(root / "masks" / f"{i}.png", i)
        rows.append({"image": f"img/{i}.jpg", "mask": f"masks/{i}.png" if i else "", "patient": f"P{i}"})
    (root / "masks" / "0.png").unlink()
    draft = draft_card(root, small_table(root, rows))
    assert [record.mask_path for record in read_records(load(draft, tmp_path), root)] == [
        *(None, root / "masks/1.png", root / "masks/2.png")
    ]
    assert [one.text for one in draft.findings if one.kind == "files"] == []


def test_a_table_that_names_no_files(tmp_path: Path) -> None:
    draw(tmp_path / "raw" / "holiday.jpg", 1)
    draft = draft_card(tmp_path / "raw", small_table(tmp_path / "raw", [{"patient": "1", "age": "3"}]))
    assert find(draft, "files", "no column names the 1 image files").blocks
    assert load(draft, tmp_path).images["image"].path == ("TODO/{patient}",)


# ------------------------------------------------------------------------------------------------ findings


def change(root: Path, *changes: tuple[int, int, str]) -> Draft:
    rows = french_rows()
    for row, column, text in changes:
        rows[row][column] = text
    write_french(root, rows)
    return draft_card(root, "export.csv")


def test_conflicting_sex_birth_date_and_age(french: Path) -> None:
    draft = change(
        french, (1, 4, "H"), (4, 3, "14/05/1917"), (9, 11, "21/03/2019"), (10, 11, "21/03/2019"), (10, 5, "71")
    )
    assert find(draft, "sex", "1 patients").examples == ("patient '007123': female, male",)
    assert find(draft, "birth_date", "1 patients").examples == ("patient '007124': 1917-05-14, 1971-05-14",)
    same_day = find(draft, "age", "several ages on one day")
    assert same_day.examples == ("patient '008001': 70 (line 12), 71 (line 13)",)
    assert find(draft, "age", "younger at a later visit").examples == ("patient '008001': 71 (line 13), 70 (line 14)",)
    assert "008001" not in str(draft)


def test_ages_without_dates_and_without_ages(french: Path) -> None:
    draft = change(french, *((row, 11, "") for row in range(12)), (10, 5, "31"))
    find(draft, "age", "more than 5 years apart in rows without a date")
    rows = [row[:5] + row[6:] for row in french_rows()]
    write_french(french, rows, FRENCH.replace("Âge;", ""))
    find(draft_card(french, "export.csv"), "age", "nothing is computed from them")


def test_a_lesion_of_two_patients_or_labels(french: Path) -> None:
    draft = change(french, (3, 7, "L0"), (11, 9, "CBC"))
    torn = find(draft, "lesion", "1 lesions have two patients")
    assert torn.blocks and torn.examples == ("lesion 'L0': '007123' (line 3), '007124' (line 6)",)
    several = [
        one for one in draft.findings if one.kind == "labels" and one.text.endswith("several values of diagnosis")
    ]
    assert "lesion 'L3': 'mélanome SSM 0,8 mm' (line 12), 'basal_cell_carcinoma' (line 14)" in several[0].examples
    assert [alias.why for alias in draft.aliases] == ["differ in leading zeros"]  # a woman and a man share it: two
    numbered = change(french, *((row, 7, str(row % 3)) for row in range(12)))
    assert not find(numbered, "lesion", "numbered patient by patient").blocks
    assert "lesion_id_scope: patient" in numbered.card


def test_spellings_of_one_label_are_no_conflict(french: Path) -> None:
    draft = change(french, (1, 9, "naevus"), (2, 9, "NÆVUS"))
    assert not any(one.text.endswith("several values of diagnosis") for one in draft.findings)


def test_cells_that_a_build_would_refuse(french: Path, tmp_path: Path) -> None:
    draft = change(french, (0, 5, "vieux"), (1, 11, "mars 2019"), (2, 12, "autre"), (3, 12, ""))
    assert find(draft, "values", "1 ages").blocks
    assert find(draft, "dates", "1 dates in column 'Date de consultation'").examples == ("line 4",)
    assert find(draft, "values", "2 rows do not say a modality").examples == ("line 5: 'autre'", "line 6: ''")
    load(draft, tmp_path)


def test_day_and_month_are_not_guessed(french: Path, tmp_path: Path) -> None:
    early = [(row, 11, f"0{1 + row % 9}/03/2019") for row in range(12)]
    draft = change(french, *early)
    assert not any(one.kind == "dates" for one in draft.findings)  # the birth dates have days above 12
    other_way = [(row, 3, f"05/{14 + row}/1971") for row in range(12)]  # and now they are American ones
    assert load(change(french, *early, *other_way), tmp_path).date_format == "%m/%d/%Y"
    births = [(row, 3, "03/02/1960") for row in range(12)]
    draft = change(french, *early, *births)
    find(draft, "dates", "'Date de consultation': day and month could be the other way round")
    assert '"%d/%m/%Y"' in draft.card and "TODO: %m/%d/%Y fits as well" in draft.card
    american = [(row, 11, f"03/{13 + row}/2019") for row in range(12)]
    assert load(change(french, *american), tmp_path).date_format == "%m/%d/%Y"


def test_ids_that_excel_has_damaged(french: Path) -> None:
    draft = change(french, *((row, 0, f"1,2345E+1{row // 3}") for row in range(12)))
    assert "4 ids in column 'IPP' are numbers that Excel has rounded" in find(draft, "ids", "rounded").text


def test_rows_without_a_patient(french: Path) -> None:
    assert find(change(french, (1, 0, ""), (2, 0, "")), "ids", "2 rows name no patient").examples == (
        "line 4",
        "line 5",
    )
    write_french(french, [row[1:] for row in french_rows()], FRENCH.removeprefix("IPP;"))
    find(draft_card(french, "export.csv"), "ids", "no column names the patients")


# ------------------------------------------------------------------------------------------------ without a table


def test_class_folders_without_a_table(tmp_path: Path) -> None:
    root = tmp_path / "atlas"
    for split in ("train", "test"):
        for place, name in enumerate(("Melanoma", "naevus", "Etwas")):
            for i in range(2):
                draw(root / split / name / f"{i}.{'png' if place else 'jpg'}", i)
    draw(root / "cover.jpg", 9)
    draft = draft_card(root)
    card = load(draft, tmp_path)
    assert card.listing == ("{split}/{class}/{name}",) and card.columns == {"official_split": "split"}
    records = read_records(card, root)
    assert len(records) == 12 and records[0].metadata["official_split"] == "test"
    labels = records.count_labels()
    assert dict(labels["diagnosis"]) == {"melanoma": 4, "nevus": 4} and dict(labels["diagnosis#icd10"])["D22.9"] == 4
    assert find(draft, "files", "1 of 13 files lie at another depth").examples == ("cover.jpg",)
    find(draft, "ids", "nothing names the patients")


def test_folders_of_patients_are_no_classes(tmp_path: Path) -> None:
    for patient in range(8):
        draw(tmp_path / "raw" / "nevus" / f"K{patient}" / "a.jpg", patient)
        draw(tmp_path / "raw" / "bcc" / f"B{patient}" / "a.jpg", patient)
    card = load(draft_card(tmp_path / "raw"), tmp_path)
    assert card.listing == ("{class}/{patient}/{name}",) and card.columns == {"patient_id": "patient"}


# ------------------------------------------------------------------------------------------------ errors, command


def test_what_cannot_be_drafted(tmp_path: Path, french: Path) -> None:
    with pytest.raises(UserError, match="no such folder; name the folder"):
        draft_card(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image files"):
        draft_card(tmp_path / "empty")
    with pytest.raises(UserError, match=r"other.csv: no such file, here or in"):
        draft_card(french, "other.csv")
    (tmp_path / "outside.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match="lies outside"):
        draft_card(french, tmp_path / "outside.csv")
    with pytest.raises(UserError, match="name 'Nord-Klinik': a source's name has only"):
        draft_card(french, "export.csv", "Nord-Klinik")
    (french / "export.csv").write_text("IPP;Fichier\n")
    with pytest.raises(UserError, match="has no rows below its header"):
        draft_card(french, "export.csv")


def test_the_command(french: Path, tmp_path: Path, monkeypatch: Callable[..., Any]) -> None:
    arguments = [
        "shards",
        "draft",
        str(french),
        "--table",
        "export.csv",
        "--name",
        "north",
        "--out",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "north: 12 rows, 12 image files" in result.output and "007123" not in result.output
    assert "none was merged" in result.output and str(tmp_path / "o" / "north.yaml") in result.output
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, UserError) and "--force" in str(again.exception)
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
