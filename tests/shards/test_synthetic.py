"""The synthetic archive: equal bytes from equal seeds, drawings that fit masks and tables, nothing half-written."""

import csv
import hashlib
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from panfm.errors import UserError
from panfm.shards import synthetic
from panfm.shards.cards import load_card
from panfm.shards.drawing import draw_photograph
from panfm.shards.privacy import PUBLIC_KEY, pseudonymise
from panfm.shards.scenery import Camera, Scene
from panfm.shards.sources import read_records
from panfm.shards.synthetic import ArchiveSummary, write_archive
from panfm.shards.synthetic_patients import DIAGNOSES, MALIGNANT, TRAITS, LesionTraits, compute_risk, draw_patient, grow

NUM_PATIENTS = 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> ArchiveSummary:
    return write_archive(tmp_path_factory.mktemp("synth") / "archive", num_patients=NUM_PATIENTS, seed=5)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def hash_files(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_bytes_depend_on_the_seed_alone(
    archive: ArchiveSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "PATIENTS_PER_TASK", 2)  # two tasks, so that two processes have work
    write_archive(tmp_path / "two", num_patients=NUM_PATIENTS, seed=5, processes=2)
    write_archive(tmp_path / "other", num_patients=1, seed=6)
    first = hash_files(archive.out)
    assert hash_files(tmp_path / "two") == first
    assert not set(hash_files(tmp_path / "other").values()) & set(first.values())


def test_a_patient_does_not_depend_on_the_archives_size(archive: ArchiveSummary, tmp_path: Path) -> None:
    write_archive(tmp_path / "one", num_patients=1, seed=5)
    larger, smaller = hash_files(archive.out), hash_files(tmp_path / "one")
    drawn = {name: value for name, value in smaller.items() if "/" in name}
    assert drawn and all(larger[name] == value for name, value in drawn.items())


def test_the_files_are_those_of_the_tables(archive: ArchiveSummary) -> None:
    rows, slides = read_table(archive.out / "metadata.csv"), read_table(archive.out / "slides.csv")
    named = {row["path"] for row in rows} | {row["mask_path"] for row in rows} | {row["path"] for row in slides}
    tables = {"metadata.csv", "slides.csv", "README.txt"}
    assert set(hash_files(archive.out)) == named | tables
    assert sum(archive.num_images.values()) == len(rows) and archive.num_slides == len(slides)
    assert set(archive.num_images) == {"clinical", "dermoscopic", "total_body"}
    assert archive.num_patients == len({row["patient_id"] for row in rows}) == NUM_PATIENTS
    assert archive.num_lesions == len({row["lesion_id"] for row in rows})


def test_everything_says_that_it_is_synthetic(archive: ArchiveSummary) -> None:
    assert "SYNTHETIC" in (archive.out / "README.txt").read_text()
    rows, slides = read_table(archive.out / "metadata.csv"), read_table(archive.out / "slides.csv")
    assert {row["synthetic"] for row in rows + slides} == {"true"}
    assert all(row["patient_id"].startswith("SYN-") for row in rows + slides)
    for row in rows:
        with Image.open(archive.out / row["path"]) as image:
            assert image.info["comment"].startswith(b"SYNTHETIC")
    for row in slides:
        with openslide.OpenSlide(archive.out / row["path"]) as slide:
            assert slide.properties["tiff.ImageDescription"].startswith("SYNTHETIC")
    assert load_card("synthetic").synthetic and load_card("synthetic_slides").synthetic


def test_a_lesion_is_one_lesion_in_every_row(archive: ArchiveSummary) -> None:
    rows = read_table(archive.out / "metadata.csv") + read_table(archive.out / "slides.csv")
    by_lesion, by_patient = defaultdict(set), defaultdict(set)
    for row in rows:
        by_lesion[row["lesion_id"]].add(
            (row["patient_id"], row["diagnosis"], row["anatomic_site"], row["confirmed_by"])
        )
        by_patient[row["patient_id"]].add((row["institution"], row["sex"], row["phototype"]))
        assert row["malignant"] == ("malignant" if row["diagnosis"] in MALIGNANT else "benign")
        assert (row["follow_up_days"] == "") == (row["event"] == "")
    assert all(len(facts) == 1 for facts in (*by_lesion.values(), *by_patient.values()))


def test_captions_say_what_was_drawn_into_the_image(archive: ArchiveSummary) -> None:
    rows = read_table(archive.out / "metadata.csv")
    assert "caption" not in read_table(archive.out / "slides.csv")[0]
    patients = {patient.raw_id: patient for patient in (draw_patient(5, number) for number in range(NUM_PATIENTS))}
    told = []
    for row in rows:
        lesion = next(one for one in patients[row["patient_id"]].lesions if one.raw_id == row["lesion_id"])
        visit = next(one for one in lesion.visits if one.date.isoformat() == row["visit_date"])
        if not row["caption"]:
            continue
        kind = row["caption"].partition(" of a ")[0]
        assert (
            kind
            == {
                "clinical": "Clinical photograph",
                "dermoscopic": "Dermoscopic image",
                "total_body": "Overview photograph",
            }[row["modality"]]
        )
        assert ("blue-white veil" in row["caption"]) == (row["modality"] == "dermoscopic" and visit.traits.veil > 0.3)
        assert ("raised" in row["caption"]) == (row["modality"] == "clinical" and visit.traits.elevation > 0.5)
        assert "malignant" not in row["caption"] and "benign" not in row["caption"]
        told.append(lesion.diagnosis.replace("_", " ") in row["caption"])
    assert 0.7 < len(told) / len(rows) < 1.0 and 0.4 < np.mean(told) < 0.95
    records = {record.raw_id: record.caption for record in read_records(load_card("synthetic"), archive.out)}
    assert records == {row["image_id"]: row["caption"] or None for row in rows}


def test_both_cards_read_it_and_name_the_same_patients(archive: ArchiveSummary) -> None:
    photographs, slides = load_card("synthetic"), load_card("synthetic_slides")
    records, slide_records = read_records(photographs, archive.out), read_records(slides, archive.out)
    assert len(records) == sum(archive.num_images.values()) and len(slide_records) == archive.num_slides > 0
    assert {record.modality for record in slide_records} == {"histopathology"}

    def name_patients(card: object, found: list) -> set[str]:
        return {pseudonymise(PUBLIC_KEY, card.namespace, "patient", record.patient_id) for record in found}

    assert name_patients(slides, slide_records) <= name_patients(photographs, records)


def test_a_mask_covers_what_was_drawn(archive: ArchiveSummary) -> None:
    darker = []
    for row in read_table(archive.out / "metadata.csv"):
        with Image.open(archive.out / row["path"]) as picture, Image.open(archive.out / row["mask_path"]) as drawn:
            assert picture.size == drawn.size
            grey, mask = np.asarray(picture.convert("L"), dtype=float), np.asarray(drawn)
        assert set(np.unique(mask)) <= {0, 255} and 0.001 < (mask > 0).mean() < 0.9
        rim = np.asarray(Image.fromarray(mask).resize((40, 40)).resize(drawn.size)) == 0
        darker.append(np.median(grey[rim & (grey > 20)]) - np.median(grey[mask > 0]))
    assert np.mean(np.array(darker) > 0) > 0.8  # the rest are pale lesions: scars, and basal cell carcinomas


@pytest.mark.parametrize("modality", ["clinical", "dermoscopic", "total_body"])
def test_a_mask_is_where_the_lesion_is(modality: str) -> None:
    dark = {field.name: 0.0 for field in fields(LesionTraits)} | {"melanin": 1.0, "edge_mm": 0.1}
    traits = LesionTraits(**dark | {"diameter_mm": 6.0, "asymmetry": 0.5, "irregularity": 0.4, "elongation": 0.3})
    scene = Scene(modality, Camera((1, 1, 1), 1.0, 0.0, 0.0, 0.0, 0.0), 1, 0.0)
    photograph = draw_photograph(traits, scene, (7, 7), np.random.default_rng(2))
    grey = photograph.image.mean(axis=2)
    seen = grey < (np.median(grey[photograph.mask]) + np.median(grey[~photograph.mask])) / 2
    overlap = (seen & photograph.mask).sum() / (seen | photograph.mask).sum()
    assert overlap > 0.65  # lens and light dim the corners too; the mask turned by 180 degrees gives 0.25 to 0.42


def test_a_lesion_grows_as_its_traits_say() -> None:
    traits = LesionTraits(**{field.name: 0.2 for field in fields(LesionTraits)} | {"diameter_mm": 4.0, "growth": 1.5})
    assert grow(traits, 0.0) == traits
    assert grow(traits, 2.0).diameter_mm == pytest.approx(7.0)
    scene = Scene("dermoscopic", Camera((1, 1, 1), 1.0, 0.0, 0.0, 0.0, 0.0), 2, 0.0)
    areas = [
        draw_photograph(grow(traits, years), scene, (1, 2), np.random.default_rng(3)).mask.sum() for years in (0.0, 2.0)
    ]
    assert areas[1] / areas[0] == pytest.approx((7 / 4) ** 2, rel=0.1)


def test_the_same_lesion_has_its_shape_in_another_modality() -> None:
    """Area in mm2 agrees between a dermoscopic image and a total-body tile, both drawn at their own scale."""
    traits = LesionTraits(**{field.name: 0.2 for field in fields(LesionTraits)} | {"diameter_mm": 6.0})
    plain = Camera((1, 1, 1), 1.0, 0.0, 0.0, 0.0, 0.0)
    areas = {}
    for modality, mm in (("dermoscopic", 0.058), ("total_body", 0.117)):
        rng = np.random.default_rng(1)
        zoom = np.random.default_rng(1)
        zoom.uniform(size=3)  # angle and centre come first
        mask = draw_photograph(traits, Scene(modality, plain, 3, 0.0), (4, 4), rng).mask
        areas[modality] = mask.sum() * (mm * zoom.uniform(0.9, 1.1)) ** 2
    assert areas["total_body"] == pytest.approx(areas["dermoscopic"], rel=0.1)
    assert areas["dermoscopic"] == pytest.approx(np.pi * 9, rel=0.3)


def test_numbers_of_the_patients() -> None:
    patients = [draw_patient(0, number) for number in range(400)]
    lesions = [lesion for patient in patients for lesion in patient.lesions]
    assert {patient.phototype for patient in patients} == {1, 2, 3, 4, 5, 6}
    assert {lesion.diagnosis for lesion in lesions} == set(DIAGNOSES)
    assert all(set(row) == {field.name for field in fields(LesionTraits)} for row in [TRAITS])
    assert all(len(values) == len(DIAGNOSES) for values in TRAITS.values())
    malignant = [lesion for lesion in lesions if lesion.diagnosis in MALIGNANT]
    assert 0.25 < len(malignant) / len(lesions) < 0.5
    for lesion in lesions:
        dates = [visit.date for visit in lesion.visits]
        assert dates == sorted(set(dates))
        # every visit's follow-up ends on the same day, after the last visit
        assert len({(visit.date.toordinal() + visit.follow_up_days) for visit in lesion.visits}) == 1
        assert lesion.visits[-1].follow_up_days >= 0
    risky = [lesion.event for lesion in lesions if compute_risk(lesion.visits[0].traits) > 1.5]
    calm = [lesion.event for lesion in lesions if compute_risk(lesion.visits[0].traits) < 0.3]
    assert np.mean(risky) > 2 * np.mean(calm) > 0


def test_tables_have_gaps_that_depend_on_the_institution(archive: ArchiveSummary) -> None:
    missing = defaultdict(list)
    for number in range(300):
        patient = draw_patient(0, number)
        missing[patient.institution].append("phototype" in synthetic._draw_gaps(patient))
    shares = {institution: np.mean(gaps) for institution, gaps in missing.items()}
    assert shares[2] > 0.45 > 0.2 > shares[3]


def test_a_full_folder_is_refused(archive: ArchiveSummary) -> None:
    before = hash_files(archive.out)
    with pytest.raises(UserError, match=r"archive: is not empty; give another folder"):
        write_archive(archive.out, num_patients=1)
    assert hash_files(archive.out) == before


def test_an_interrupted_archive_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()  # an empty folder is welcome
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_write_table", stop)  # the images are written, the tables are not
        with pytest.raises(KeyboardInterrupt):
            write_archive(tmp_path / "out", num_patients=1, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not any((tmp_path / "out").iterdir())
    assert write_archive(tmp_path / "out", num_patients=1, seed=1).num_patients == 1
