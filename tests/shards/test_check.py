"""The check before a build: silent where all is as the card says, and naming each thing that is not."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tifffile

from panfm.errors import UserError
from panfm.shards.check import Findings, check_archive
from tests.archives import describe_source_card
from tests.shards.conftest import draw_picture


@pytest.fixture
def archive(make_archive: Callable[..., Any]) -> Any:
    archive = make_archive()
    archive.values["expected"] = {
        "images": 12,
        "patients": 2,
        "lesions": 6,
        "labels": {"diagnosis": {"nevus": 4, "melanoma": 4}},
    }
    return archive


def test_an_archive_as_the_card_says(archive: Any) -> None:
    found = check_archive(archive.card, archive.root)
    assert found.is_as_expected and str(found).endswith("\nas the card says") and "!" not in str(found)
    assert (found.num_images, found.num_patients, found.num_without_patient) == (12, 2, 4)
    assert (found.num_lesions, found.num_without_lesion, found.largest_group, found.num_masks) == (6, 0, 4, 4)
    assert found.labels == {"diagnosis": {"nevus": 4, "melanoma": 4}} and found.unlabelled == {"diagnosis": 4}
    assert found.values["sex"] == {"female": 6, "male": 6} and found.values["institution"] == {"north": 12}
    assert found.values["modality"] == {"clinical": 12} and found.values["phototype_source"]["unknown"] == 6
    assert found.num_known["age"] == 11 and found.num_known["visit_day"] == 12
    assert found.sampled.num == 12 and found.sampled.rejected == {}
    assert found.sampled.seconds is not None and found.sampled.num_bytes is not None
    assert "a build takes about" in str(found) and "permitted uses: research" in str(found)
    assert json.loads(json.dumps(found.to_plain()))["is_as_expected"] is True


def test_missing_and_unnamed_files_are_named(archive: Any) -> None:
    for number in range(7):
        (archive.root / "images" / f"photo{number}.jpg").unlink()
    (archive.root / "masks" / "photo9.png").unlink()
    shutil.copy(archive.root / "images" / "photo11.jpg", archive.root / "forgotten.JPG")
    (archive.root / "images" / ".hidden.jpg").write_bytes(b"")
    found = check_archive(archive.card, archive.root, num_sampled=0)
    assert not found.is_as_expected
    images, mask = found.missing
    assert (images.kind, images.pattern, images.num) == ("image", "images/*.jpg", 7)
    assert images.named == tuple(f"images/photo{number}.jpg" for number in range(5))
    assert (mask.kind, mask.num, mask.named) == ("mask", 1, ("masks/photo9.png",))
    assert (found.num_unnamed, found.unnamed) == (1, ("forgotten.JPG",))
    page = str(found)
    assert "! 7 images missing, images/*.jpg: images/photo0.jpg" in page and "and 2 more" in page
    assert "1 image files that no row names: forgotten.JPG" in page and "NOT as the card says" in page


def test_counts_that_differ(archive: Any) -> None:
    archive.values["expected"] |= {"images": 13, "patients": 3}
    found = check_archive(archive.card, archive.root)
    assert found.differences == ("12 images, 13 expected", "2 patients, 3 expected") and not found.is_as_expected
    assert "! 12 images, 13 expected" in str(found)
    archive.values["expected"] = {}
    found = check_archive(archive.card, archive.root)
    assert found.is_as_expected and "expects none to compare with" in str(found)


def test_what_a_draft_left_open_is_named(archive: Any) -> None:
    archive.values |= {"consent_scope": "TODO: what did the patients consent to?", "cohort": {"design": "unknown"}}
    archive.values["cohort"] |= {"kind": "clinical", "inclusion": "TODO"}
    found = check_archive(archive.card, archive.root, num_sampled=0)
    assert found.open_questions == ("consent_scope", "cohort.inclusion") and not found.is_as_expected
    assert "! the card still says TODO: consent_scope, cohort.inclusion" in str(found)


def test_a_table_that_a_build_would_refuse_is_refused(archive: Any) -> None:
    archive.values["columns"]["patient_id"] = "pid"
    with pytest.raises(UserError, match="has no column pid"):
        check_archive(archive.card, archive.root)


def test_the_sample_shows_what_a_build_would_reject(archive: Any) -> None:
    for number in (3, 4):
        (archive.root / "images" / f"photo{number}.jpg").write_bytes(b"\xff\xd8\xff broken")
    found = check_archive(archive.card, archive.root, num_sampled=64)
    assert found.sampled.rejected == {"undecodable": 2} and not found.is_as_expected
    assert "! 2 of 12 files opened would be rejected: images/photo3.jpg: undecodable" in str(found)
    one = check_archive(archive.card, archive.root, num_sampled=5, seed=1)
    assert (
        one.sampled.num == 5
        and one.sampled.rejected == check_archive(archive.card, archive.root, num_sampled=5, seed=1).sampled.rejected
    )


def test_terms_keys_and_codes(archive: Any) -> None:
    archive.values |= {"identifiers": "private", "consent_scope": "care and research"}
    archive.values["labels"]["diagnosis"]["codes"] = {"icd10": {"melanoma": "C43.9"}}
    found = check_archive(archive.card, archive.root)
    assert found.needs_key and found.is_as_expected
    assert found.uncoded == {"diagnosis#icd10": {"nevus": 4}}
    page = str(found)
    assert "--key-file FILE" in page and "care and research" in page and "no code for nevus 4" in page


def test_members_of_a_zip_are_looked_for(archive: Any) -> None:
    with zipfile.ZipFile(archive.root / "images.zip", "w") as file:
        for number in range(11):
            file.write(archive.root / "images" / f"photo{number}.jpg", f"images/photo{number}.jpg")
        file.write(archive.root / "images" / "photo0.jpg", "images/stray.jpg")
        file.writestr("images/LICENSE.txt", "free")
    shutil.rmtree(archive.root / "images")
    del archive.values["columns"]["path"], archive.values["columns"]["mask_path"]
    archive.values["images"] = {"image": {"path": "images.zip::{file}"}}
    shutil.rmtree(archive.root / "masks")
    found = check_archive(archive.card, archive.root)
    assert [missing.named for missing in found.missing] == [("images.zip::images/photo11.jpg",)]
    assert found.unnamed == ("images.zip::images/stray.jpg",) and found.num_unnamed == 1
    assert found.sampled.rejected == {"missing_file": 1}


def test_slides_must_state_their_resolution(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    pixels = draw_picture(1, (512, 512))
    for name, resolution in (("good", 1e4 / 0.5), ("bare", None), ("odd", 1e4 / 50)):
        options = {} if resolution is None else {"resolution": (resolution, resolution), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(
            tmp_path / "slides" / f"{name}.tif", pixels, tile=(256, 256), photometric="rgb", metadata=None, **options
        )
    slides = {"tile_um": 112.0, "mpp": 0.5}
    values = {"modality": "histopathology", "listing": ["slides/{slide}"], "table": None, "slides": slides}
    card = describe_source_card("slides", **values)
    found = check(card, tmp_path)
    assert found.num_slide_faults == 2 and not found.is_as_expected and not found.missing
    page = str(found)
    assert "bare.tif: states no resolution" in page and "odd.tif: states 50 x 50 microns per pixel" in page
    assert "good.tif" not in page
    slides["fallback_mpp"] = 0.5
    assert check(card, tmp_path).num_slide_faults == 0


def check(values: dict[str, Any], root: Path) -> Findings:
    from panfm.shards.cards import SourceCard

    return check_archive(SourceCard.model_validate(values), root)
