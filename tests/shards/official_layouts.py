"""Small archives in the official layouts of the public sources: their folders, files and column names, images drawn.

    LAYOUTS[card](root)  ->  the archive below `root`  +  the records that the card must read from it

Each writer stands for one download. What it writes beside the images is copied from the official tables: the header to
the letter, cells as the source writes them (unknown ones too); the rows themselves are made up.
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
from PIL import Image

from panfm.shards.sources import Record
from tests.shards.conftest import draw_picture

SIZE = (64, 48)  # width, height of every drawn image


@dataclass(frozen=True)
class ExpectedRecord:
    """What a card must read of one image; paths relative to the root."""

    raw_id: str
    path: str
    modality: str
    member: str | None = None
    mask: str | None = None
    caption: str | None = None
    patient_id: str | None = None
    lesion_id: str | None = None
    slide_id: str | None = None
    visit_day: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    tabular: dict[str, float | str | bool] = field(default_factory=dict)


Layout = Callable[[Path], list[ExpectedRecord]]


def describe(record: Record, root: Path) -> ExpectedRecord:
    """A record in the form in which the layouts expect it."""
    return ExpectedRecord(
        raw_id=record.raw_id,
        path=record.path.relative_to(root).as_posix(),
        modality=record.modality,
        member=record.member,
        mask=None if record.mask_path is None else record.mask_path.relative_to(root).as_posix(),
        caption=record.caption,
        patient_id=record.patient_id,
        lesion_id=record.lesion_id,
        slide_id=record.slide_id,
        visit_day=record.visit_day,
        metadata=record.metadata,
        labels=record.labels,
        tabular=record.tabular,
    )


def write_text(path: Path, text: str) -> None:
    """Write an indented block of lines as a file, its indentation removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text).lstrip("\n"), encoding="utf-8")


def write_images(root: Path, *paths: str) -> None:
    """Draw an image at each path, in the format of its suffix; no two of one archive are alike."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(sum(file.name.encode()) * 1000 + len(list(file.parent.iterdir())), SIZE).save(file)


def write_masks(root: Path, *paths: str) -> None:
    """Write masks (0 background, 255 lesion) of the size of the images."""
    mask = np.zeros((SIZE[1], SIZE[0]), dtype=np.uint8)
    mask[12:36, 16:48] = 255
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / path)


def write_rows(path: Path, header: str, rows: Iterable[dict[str, str]]) -> None:
    """Write a CSV of wide rows: what a row does not name is an empty cell, what the header lacks is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header.split(","), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------------ HAM10000, ISIC 2018


def write_ham10000(root: Path) -> list[ExpectedRecord]:
    """Harvard Dataverse: two folders of images, one of masks."""
    write_text(
        root / "HAM10000_metadata.csv",
        """
        lesion_id,image_id,dx,dx_type,age,sex,localization,dataset
        HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp,vidir_modern
        HAM_0000118,ISIC_0025030,bkl,histo,80.0,male,scalp,vidir_modern
        HAM_0002730,ISIC_0029306,akiec,confocal,,unknown,unknown,rosendahl
        HAM_0000550,ISIC_0024306,nv,follow_up,45.0,female,trunk,vienna_dias
        """,
    )
    one, two, masks = "HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_segmentations_lesion_tschandl"
    write_images(
        root,
        f"{one}/ISIC_0024306.jpg",
        f"{one}/ISIC_0025030.jpg",
        f"{one}/ISIC_0027419.jpg",
        f"{two}/ISIC_0029306.jpg",
    )
    write_masks(root, *(f"{masks}/ISIC_{number}_segmentation.png" for number in ("0024306", "0025030", "0027419")))

    def make(image: str, folder: str, lesion: str, diagnosis: str, malignant: str, **more: Any) -> ExpectedRecord:
        mask = f"{masks}/{image}_segmentation.png" if folder == one else None
        labels = {"diagnosis": diagnosis, "malignant": malignant} | more.pop("codes", {})
        return ExpectedRecord(
            image, f"{folder}/{image}.jpg", "dermoscopic", mask=mask, lesion_id=lesion, labels=labels, **more
        )

    vienna = {"institution": "Medical University of Vienna"}
    scalp = vienna | {"anatomic_site": "scalp", "confirmed_by": "histopathology", "age": 80.0, "sex": "male"}
    trunk = vienna | {"anatomic_site": "trunk", "confirmed_by": "follow_up", "age": 45.0, "sex": "female"}
    return [
        make("ISIC_0027419", one, "HAM_0000118", "benign_keratosis", "benign", metadata=scalp),
        make("ISIC_0025030", one, "HAM_0000118", "benign_keratosis", "benign", metadata=scalp),
        make(
            "ISIC_0029306",
            two,
            "HAM_0002730",
            "actinic_keratosis_or_bowen_disease",
            "malignant",
            metadata={"institution": "Rosendahl, Queensland", "confirmed_by": "confocal"},
        ),
        make(
            "ISIC_0024306",
            one,
            "HAM_0000550",
            "nevus",
            "benign",
            metadata=trunk,
            codes={"diagnosis#icd10": "D22.9"},
        ),
    ]


def write_isic2018_classification(root: Path) -> list[ExpectedRecord]:
    """Three parts, each with its own ground truth; lesions of the training part in a table of their own."""
    header = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
    truths = {
        "Training": [
            "ISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0",
            "ISIC_0024307,0.0,1.0,0.0,0.0,0.0,0.0,0.0",
            "ISIC_0024310,1.0,0.0,0.0,0.0,0.0,0.0,0.0",
        ],
        "Validation": ["ISIC_0034321,0.0,0.0,0.0,1.0,0.0,0.0,0.0"],
        "Test": ["ISIC_0034524,0.0,0.0,0.0,0.0,0.0,0.0,1.0"],
    }
    for part, rows in truths.items():
        name = f"ISIC2018_Task3_{part}"
        write_text(root / f"{name}_GroundTruth/{name}_GroundTruth.csv", "\n".join([header, *rows, ""]))
        write_text(root / f"{name}_Input/ATTRIBUTION.txt", "who took the images\n")
        write_images(root, *(f"{name}_Input/{row.split(',')[0]}.jpg" for row in rows))
    write_text(
        root / "ISIC2018_Task3_Training_LesionGroupings.csv",
        """
        image,lesion_id,diagnosis_confirm_type
        ISIC_0024306,HAM_0000550,serial imaging showing no change
        ISIC_0024307,HAM_0003577,single image expert consensus
        ISIC_0024310,HAM_0003521,histopathology
        """,
    )

    def make(part: str, split: str, image: str, diagnosis: str, malignant: str, **more: Any) -> ExpectedRecord:
        return ExpectedRecord(
            image,
            f"ISIC2018_Task3_{part}_Input/{image}.jpg",
            "dermoscopic",
            lesion_id=more.get("lesion"),
            metadata=more.get("metadata", {}) | {"official_split": split},
            labels={"diagnosis": diagnosis, "malignant": malignant} | more.get("codes", {}),
        )

    followed, agreed, proven = ({"confirmed_by": way} for way in ("follow_up", "consensus", "histopathology"))
    nevus = {"diagnosis#icd10": "D22.9"}
    mixed = "actinic_keratosis_or_bowen_disease"
    return [  # in the order of the paths: Test, Training, Validation
        make("Test", "test", "ISIC_0034524", "vascular_lesion", "benign"),
        make(
            "Training", "train", "ISIC_0024306", "nevus", "benign", lesion="HAM_0000550", metadata=followed, codes=nevus
        ),
        make(
            "Training", "train", "ISIC_0024307", "nevus", "benign", lesion="HAM_0003577", metadata=agreed, codes=nevus
        ),
        make("Training", "train", "ISIC_0024310", "melanoma", "malignant", lesion="HAM_0003521", metadata=proven),
        make("Validation", "val", "ISIC_0034321", mixed, "malignant"),
    ]


def write_isic2018_masks(root: Path) -> list[ExpectedRecord]:
    """Three parts, each with a folder of images and one of masks."""
    expected = []
    for part, split, image in (
        ("Test", "test", "ISIC_0012169"),
        ("Training", "train", "ISIC_0000000"),
        ("Training", "train", "ISIC_0000001"),
        ("Validation", "val", "ISIC_0012255"),
    ):
        path = f"ISIC2018_Task1-2_{part}_Input/{image}.jpg"
        mask = f"ISIC2018_Task1_{part}_GroundTruth/{image}_segmentation.png"
        write_images(root, path)
        write_text(root / f"ISIC2018_Task1-2_{part}_Input/LICENSE.txt", "what may be done with the images\n")
        write_masks(root, mask)
        expected.append(ExpectedRecord(image, path, "dermoscopic", mask=mask, metadata={"official_split": split}))
    return expected


# ------------------------------------------------------------------------------------------------ ISIC 2019 to 2024


def write_isic2019(root: Path) -> list[ExpectedRecord]:
    """The training part: images, metadata and ground truth; old image names end in _downsampled."""
    write_text(
        root / "ISIC_2019_Training_Metadata.csv",
        """
        image,age_approx,anatom_site_general,lesion_id,sex
        ISIC_0000000,55,anterior torso,,female
        ISIC_0000002_downsampled,30,upper extremity,,female
        ISIC_0024306,45,,HAM_0000550,male
        ISIC_0053453,,head/neck,BCN_0000003,
        """,
    )
    write_text(
        root / "ISIC_2019_Training_GroundTruth.csv",
        """
        image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK
        ISIC_0000000,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0
        ISIC_0000002_downsampled,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0
        ISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0
        ISIC_0053453,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0
        """,
    )
    nevus = {"diagnosis": "nevus", "malignant": "benign", "diagnosis#icd10": "D22.9"}
    keratosis = {"diagnosis": "actinic_keratosis", "malignant": "indeterminate", "diagnosis#icd10": "L57.0"}
    facts: list[tuple[str, str | None, dict[str, Any], dict[str, str]]] = [
        ("ISIC_0000000", None, {"anatomic_site": "anterior torso", "age": 55.0, "sex": "female"}, nevus),
        (
            "ISIC_0000002_downsampled",
            None,
            {"anatomic_site": "upper extremity", "age": 30.0, "sex": "female"},
            {"diagnosis": "melanoma", "malignant": "malignant"},
        ),
        ("ISIC_0024306", "HAM_0000550", {"age": 45.0, "sex": "male"}, nevus),
        ("ISIC_0053453", "BCN_0000003", {"anatomic_site": "head/neck"}, keratosis),
    ]
    write_images(root, *(f"ISIC_2019_Training_Input/{image}.jpg" for image, *_ in facts))
    return [
        ExpectedRecord(
            image,
            f"ISIC_2019_Training_Input/{image}.jpg",
            "dermoscopic",
            lesion_id=lesion,
            metadata={"official_split": "train"} | metadata,
            labels=labels,
        )
        for image, lesion, metadata, labels in facts
    ]


def write_isic2020(root: Path) -> list[ExpectedRecord]:
    """The training part; its zip unpacks to train/."""
    write_text(
        root / "ISIC_2020_Training_GroundTruth.csv",
        """
        image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target
        ISIC_2637011,IP_7279968,male,45.0,head/neck,unknown,benign,0
        ISIC_0079038,IP_3075186,female,50.0,,seborrheic keratosis,benign,0
        ISIC_0149568,IP_0962375,,,upper extremity,melanoma,malignant,1
        """,
    )
    write_images(root, *(f"train/ISIC_{number}.jpg" for number in ("2637011", "0079038", "0149568")))

    def make(image: str, patient: str, metadata: dict[str, Any], labels: dict[str, str]) -> ExpectedRecord:
        metadata = {"official_split": "train"} | metadata
        return ExpectedRecord(
            image, f"train/{image}.jpg", "dermoscopic", patient_id=patient, metadata=metadata, labels=labels
        )

    keratosis = {"diagnosis": "seborrheic_keratosis", "malignant": "benign", "diagnosis#icd10": "L82"}
    return [
        make(
            "ISIC_2637011",
            "IP_7279968",
            {"anatomic_site": "head/neck", "age": 45.0, "sex": "male"},
            {"malignant": "benign"},
        ),
        make("ISIC_0079038", "IP_3075186", {"age": 50.0, "sex": "female"}, keratosis),
        make(
            "ISIC_0149568",
            "IP_0962375",
            {"anatomic_site": "upper extremity"},
            {"diagnosis": "melanoma", "malignant": "malignant"},
        ),
    ]


# The columns of ISIC 2024, in the official order; training and test tables share those before ISIC2024_SUPPLEMENT.
ISIC2024_MEASURES = (
    "tbp_lv_A,tbp_lv_Aext,tbp_lv_B,tbp_lv_Bext,tbp_lv_C,tbp_lv_Cext,tbp_lv_H,tbp_lv_Hext,tbp_lv_L,tbp_lv_Lext,"
    "tbp_lv_areaMM2,tbp_lv_area_perim_ratio,tbp_lv_color_std_mean,tbp_lv_deltaA,tbp_lv_deltaB,tbp_lv_deltaL,"
    "tbp_lv_deltaLB,tbp_lv_deltaLBnorm,tbp_lv_eccentricity,tbp_lv_location,tbp_lv_location_simple,"
    "tbp_lv_minorAxisMM,tbp_lv_nevi_confidence,tbp_lv_norm_border,tbp_lv_norm_color,tbp_lv_perimeterMM,"
    "tbp_lv_radial_color_std_max,tbp_lv_stdL,tbp_lv_stdLExt,tbp_lv_symm_2axis,tbp_lv_symm_2axis_angle,"
    "tbp_lv_x,tbp_lv_y,tbp_lv_z"
)
ISIC2024_METADATA = (
    "patient_id,age_approx,sex,anatom_site_general,clin_size_long_diam_mm,image_type,tbp_tile_type,"
    f"{ISIC2024_MEASURES},attribution,copyright_license"
)
ISIC2024_SUPPLEMENT = (
    "lesion_id,iddx_full,iddx_1,iddx_2,iddx_3,iddx_4,iddx_5,mel_mitotic_index,mel_thick_mm,tbp_lv_dnn_lesion_confidence"
)


def _make_isic2024() -> tuple[list[dict[str, str]], list[ExpectedRecord]]:
    """Three rows of ISIC 2024 with all columns of the training table, and their records (paths to be filled in)."""
    measures = {name: f"{place + 1}.25" for place, name in enumerate(ISIC2024_MEASURES.split(","))}
    measures |= {"tbp_lv_location": "Torso Back Top Third", "tbp_lv_location_simple": "Torso Back"}
    shared = measures | {"image_type": "TBP tile: close-up", "tbp_tile_type": "3D: XP", "copyright_license": "CC-BY"}
    rows = [
        shared
        | {
            "isic_id": "ISIC_0015670",
            "patient_id": "IP_1235828",
            "age_approx": "60.0",
            "sex": "male",
            "anatom_site_general": "lower extremity",
            "clin_size_long_diam_mm": "3.04",
            "attribution": "Memorial Sloan Kettering Cancer Center",
            "target": "0",
            "iddx_full": "Benign",
            "iddx_1": "Benign",
            "tbp_lv_dnn_lesion_confidence": "97.5",
        },
        shared
        | {
            "isic_id": "ISIC_0082829",
            "patient_id": "IP_3249371",
            "clin_size_long_diam_mm": "9.27",
            "attribution": "FNQH Cairns",
            "target": "1",
            "lesion_id": "IL_6727506",
            "iddx_full": "Malignant::Malignant melanocytic proliferations (Melanoma)::Melanoma Invasive",
            "iddx_1": "Malignant",
            "iddx_2": "Malignant melanocytic proliferations (Melanoma)",
            "iddx_3": "Melanoma Invasive",
            "mel_mitotic_index": "<1/mm^2",
            "mel_thick_mm": "0.5",
            "tbp_lv_dnn_lesion_confidence": "99.5",
        },
        shared
        | {
            "isic_id": "ISIC_0104229",
            "patient_id": "IP_3249371",
            "sex": "female",
            "attribution": "FNQH Cairns",
            "target": "0",
            "lesion_id": "IL_9520694",
            "iddx_full": "Indeterminate::Indeterminate melanocytic proliferations::Atypical melanocytic neoplasm",
            "iddx_1": "Indeterminate",
            "iddx_2": "Indeterminate melanocytic proliferations",
            "iddx_3": "Atypical melanocytic neoplasm",
        },
    ]
    kept: dict[str, Any] = {
        name: float(text) for name, text in measures.items() if not name.startswith("tbp_lv_location")
    }
    kept |= {"tbp_lv_location": "Torso Back Top Third", "tbp_tile_type": "3D: XP"}
    expected = [
        ExpectedRecord(
            "ISIC_0015670",
            "",
            "total_body",
            patient_id="IP_1235828",
            metadata={
                "official_split": "train",
                "institution": "Memorial Sloan Kettering Cancer Center",
                "anatomic_site": "lower extremity",
                "age": 60.0,
                "sex": "male",
            },
            labels={"malignant": "benign", "target": "benign"},
            tabular=kept | {"clin_size_long_diam_mm": 3.04, "tbp_lv_dnn_lesion_confidence": 97.5},
        ),
        ExpectedRecord(
            "ISIC_0082829",
            "",
            "total_body",
            patient_id="IP_3249371",
            lesion_id="IL_6727506",
            metadata={"official_split": "train", "institution": "FNQH Cairns"},
            labels={"diagnosis": "melanoma", "malignant": "malignant", "target": "malignant"},
            tabular=kept | {"clin_size_long_diam_mm": 9.27, "tbp_lv_dnn_lesion_confidence": 99.5, "mel_thick_mm": 0.5},
        ),
        ExpectedRecord(
            "ISIC_0104229",
            "",
            "total_body",
            patient_id="IP_3249371",
            lesion_id="IL_9520694",
            metadata={"official_split": "train", "institution": "FNQH Cairns", "sex": "female"},
            labels={"diagnosis": "Atypical melanocytic neoplasm", "malignant": "indeterminate", "target": "benign"},
            tabular=kept,
        ),
    ]
    return rows, expected


def write_isic2024(root: Path) -> list[ExpectedRecord]:
    """The challenge's site: images and metadata.csv in one folder, ground truth and supplement beside it."""
    rows, expected = _make_isic2024()
    folder = "ISIC_2024_Training_Input"
    write_rows(root / folder / "metadata.csv", f"isic_id,{ISIC2024_METADATA}", rows)
    truth = [row | {"malignant": f"{row['target']}.0"} for row in rows]
    write_rows(root / "ISIC_2024_Training_GroundTruth.csv", "isic_id,malignant", truth)
    write_rows(root / "ISIC_2024_Training_Supplement.csv", f"isic_id,{ISIC2024_SUPPLEMENT}", rows)
    write_images(root, *(f"{folder}/{record.raw_id}.jpg" for record in expected))
    return [replace(record, path=f"{folder}/{record.raw_id}.jpg") for record in expected]


def write_isic2024_hdf5(root: Path) -> list[ExpectedRecord]:
    """Kaggle: one table, and every JPEG a data set of one HDF5 file."""
    import h5py

    rows, expected = _make_isic2024()
    write_rows(root / "train-metadata.csv", f"isic_id,target,{ISIC2024_METADATA},{ISIC2024_SUPPLEMENT}", rows)
    with h5py.File(root / "train-image.hdf5", "w") as file:
        for place, record in enumerate(expected):
            buffer = io.BytesIO()
            draw_picture(place, SIZE).save(buffer, "JPEG")
            file.create_dataset(record.raw_id, data=np.bytes_(buffer.getvalue()))
    return [replace(record, path="train-image.hdf5", member=record.raw_id) for record in expected]


# ------------------------------------------------------------------------------------------------ the ISIC Archive


def write_bcn20000(root: Path) -> list[ExpectedRecord]:
    """The archive's export of 2026: images beside metadata.csv, which has only the columns that hold a value."""
    write_text(
        root / "metadata.csv",
        """
        isic_id,attribution,copyright_license,age_approx,anatom_site_1,anatom_site_special,concomitant_biopsy,\
diagnosis_1,diagnosis_2,diagnosis_3,diagnosis_confirm_type,image_type,lesion_id,melanocytic,sex
        ISIC_0053453,Hospital Clinic de Barcelona,CC-BY-NC,55,Trunk,,True,Malignant,\
Malignant melanocytic proliferations (Melanoma),"Melanoma, NOS",histopathology,dermoscopic,IL_0000001,True,male
        ISIC_0053454,Hospital Clinic de Barcelona,CC-BY-NC,,,acral NOS,,Benign,\
Benign soft tissue proliferations - Vascular,,,dermoscopic,IL_0000002,False,female
        ISIC_0053455,Hospital Clinic de Barcelona,CC-BY-NC,85,Head and neck,,,Indeterminate,\
Indeterminate epidermal proliferations,Solar or actinic keratosis,single image expert consensus,dermoscopic,IL_0000002,,
        ISIC_0053456,Hospital Clinic de Barcelona,CC-BY-NC,40,Trunk,,,Benign,\
Benign soft tissue proliferations - Fibro-histiocytic,Scar,,dermoscopic,,,female
        ISIC_0053457,Hospital Clinic de Barcelona,CC-BY-NC,40,Trunk,,,,,,,dermoscopic,IL_0000005,,female
        """,
    )
    write_images(root, *(f"ISIC_005345{number}.jpg" for number in range(3, 8)))

    def make(number: int, lesion: str | None, metadata: dict[str, Any], labels: dict[str, str], **more: Any) -> Any:
        metadata = {"institution": "Hospital Clinic de Barcelona"} | metadata
        image = f"ISIC_005345{number}"
        return ExpectedRecord(
            image, f"{image}.jpg", "dermoscopic", lesion_id=lesion, metadata=metadata, labels=labels, **more
        )

    trunk = {"anatomic_site": "Trunk", "age": 40.0, "sex": "female"}
    return [
        make(
            3,
            "IL_0000001",
            {"anatomic_site": "Trunk", "confirmed_by": "histopathology", "age": 55.0, "sex": "male"},
            {"diagnosis": "melanoma", "malignant": "malignant"},
            tabular={"concomitant_biopsy": True},
        ),
        make(4, "IL_0000002", {"sex": "female"}, {"diagnosis": "vascular_lesion", "malignant": "benign"}),
        make(
            5,
            "IL_0000002",
            {"anatomic_site": "Head and neck", "confirmed_by": "consensus", "age": 85.0},
            {"diagnosis": "actinic_keratosis", "malignant": "indeterminate", "diagnosis#icd10": "L57.0"},
        ),
        make(6, None, trunk, {"diagnosis": "Scar", "malignant": "benign"}),
        make(7, "IL_0000005", trunk, {}),
    ]


def write_mskcc(root: Path) -> list[ExpectedRecord]:
    """The zip of a collection's page, as exported in 2024; a confocal image is among the rows."""
    write_text(
        root / "metadata.csv",
        """
        isic_id,attribution,copyright_license,acquisition_day,age_approx,anatom_site_general,concomitant_biopsy,\
clin_size_long_diam_mm,diagnosis_1,diagnosis_2,diagnosis_3,diagnosis_confirm_type,dermoscopic_type,family_hx_mm,\
fitzpatrick_skin_type,image_type,lesion_id,mel_thick_mm,mel_ulcer,melanocytic,patient_id,personal_hx_mm,sex
        ISIC_1000001,MSKCC,CC-BY,1,60,posterior torso,True,6.5,Malignant,\
Malignant melanocytic proliferations (Melanoma),Melanoma Invasive,histopathology,contact polarized,False,II,\
dermoscopic,IL_1000001,0.4,False,True,IP_1000001,True,male
        ISIC_1000002,MSKCC,CC-BY,1,60,posterior torso,True,6.5,Malignant,\
Malignant melanocytic proliferations (Melanoma),Melanoma Invasive,histopathology,,,II,\
clinical: close-up,IL_1000001,0.4,False,True,,,male
        ISIC_1000003,MSKCC,CC-BY,1,60,posterior torso,True,6.5,Malignant,\
Malignant melanocytic proliferations (Melanoma),Melanoma Invasive,histopathology,,,II,\
RCM: mosaic,IL_1000001,0.4,False,True,IP_1000001,,male
        """,
    )
    write_images(root, *(f"ISIC_100000{number}.jpg" for number in (1, 2, 3)))
    metadata = {
        "institution": "Memorial Sloan Kettering Cancer Center",
        "anatomic_site": "posterior torso",
        "confirmed_by": "histopathology",
        "age": 60.0,
        "sex": "male",
        "phototype_low": 2,
        "phototype_high": 2,
    }
    labels = {"diagnosis": "melanoma", "malignant": "malignant"}
    measures: dict[str, Any] = {"clin_size_long_diam_mm": 6.5, "mel_thick_mm": 0.4, "mel_ulcer": False}
    measures["concomitant_biopsy"] = True
    polarised = {"dermoscopic_type": "contact polarized", "personal_hx_mm": True, "family_hx_mm": False}
    return [
        ExpectedRecord(
            f"ISIC_100000{number}",
            f"ISIC_100000{number}.jpg",
            modality,
            patient_id="IP_1000001",  # the second row names none: its lesion does
            lesion_id="IL_1000001",
            metadata=metadata,
            labels=labels,
            tabular=measures | more,
        )
        for number, modality, more in ((1, "dermoscopic", polarised), (2, "clinical", {}))
    ]


def write_hiba(root: Path) -> list[ExpectedRecord]:
    """The archive's export of 2026, as its command line tool leaves it."""
    write_text(
        root / "metadata.csv",
        """
        isic_id,attribution,copyright_license,age_approx,anatom_site_1,anatom_site_2,anatom_site_special,\
concomitant_biopsy,dermoscopic_type,diagnosis_1,diagnosis_2,diagnosis_3,diagnosis_confirm_type,family_hx_mm,\
fitzpatrick_skin_type,image_type,lesion_id,patient_id,personal_hx_mm,sex
        ISIC_2000001,Hospital Italiano de Buenos Aires,CC-BY,70,Head and neck,Face,,True,contact polarized,Malignant,\
Malignant adnexal epithelial proliferations - Follicular,Basal cell carcinoma,histopathology,,III,dermoscopic,\
IL_2000001,IP_2000001,False,female
        ISIC_2000002,Hospital Italiano de Buenos Aires,CC-BY,70,Head and neck,Face,,True,,Malignant,\
Malignant adnexal epithelial proliferations - Follicular,Basal cell carcinoma,histopathology,,III,clinical: overview,\
IL_2000001,IP_2000001,False,female
        """,
    )
    write_text(root / "attribution.txt", "Hospital Italiano de Buenos Aires\n")
    write_images(root, "ISIC_2000001.jpg", "ISIC_2000002.jpg")
    return _make_hiba("Head and neck", "ISIC_2000001", "ISIC_2000002", phototype=3)


def write_hiba_before_2024(root: Path) -> list[ExpectedRecord]:
    """The archive's earlier export: one flat diagnosis, benign_malignant, coarse image types."""
    write_text(
        root / "metadata.csv",
        """
        isic_id,attribution,copyright_license,age_approx,anatom_site_general,anatom_site_special,benign_malignant,\
concomitant_biopsy,dermoscopic_type,diagnosis,diagnosis_confirm_type,family_hx_mm,fitzpatrick_skin_type,image_type,\
lesion_id,mel_class,melanocytic,nevus_type,patient_id,personal_hx_mm,sex
        ISIC_2000001,Hospital Italiano de Buenos Aires,CC-BY,70,head/neck,,malignant,True,contact polarized,\
basal cell carcinoma,histopathology,,,dermoscopic,IL_2000001,,False,,IP_2000001,False,female
        ISIC_2000002,Hospital Italiano de Buenos Aires,CC-BY,70,head/neck,,malignant,True,,\
basal cell carcinoma,histopathology,,,overview,IL_2000001,,False,,IP_2000001,False,female
        """,
    )
    write_images(root, "ISIC_2000001.jpg", "ISIC_2000002.jpg")
    return _make_hiba("head/neck", "ISIC_2000001", "ISIC_2000002", phototype=None)


def _make_hiba(site: str, dermoscopic: str, clinical: str, phototype: int | None) -> list[ExpectedRecord]:
    metadata: dict[str, Any] = {
        "institution": "Hospital Italiano de Buenos Aires",
        "anatomic_site": site,
        "confirmed_by": "histopathology",
        "age": 70.0,
        "sex": "female",
    }
    if phototype is not None:
        metadata |= {"phototype_low": phototype, "phototype_high": phototype}
    both: dict[str, Any] = {"concomitant_biopsy": True, "personal_hx_mm": False}
    return [
        ExpectedRecord(
            image,
            f"{image}.jpg",
            modality,
            patient_id="IP_2000001",
            lesion_id="IL_2000001",
            metadata=metadata,
            labels={"diagnosis": "basal_cell_carcinoma", "malignant": "malignant", "diagnosis#icd10": "C44.9"},
            tabular=both | more,
        )
        for image, modality, more in (
            (dermoscopic, "dermoscopic", {"dermoscopic_type": "contact polarized"}),
            (clinical, "clinical", {}),
        )
    ]


def write_milk10k(root: Path) -> list[ExpectedRecord]:
    """One folder a lesion with its two images; truth is given lesion by lesion, all else image by image."""
    concepts = (
        "MONET_ulceration_crust,MONET_hair,MONET_vasculature_vessels,MONET_erythema,MONET_pigmented,"
        "MONET_gel_water_drop_fluid_dermoscopy_liquid,MONET_skin_markings_pen_ink_purple_pen"
    )
    header = (
        "lesion_id,image_type,isic_id,attribution,copyright_license,image_manipulation,age_approx,sex,skin_tone_class,"
        f"site,{concepts}"
    )
    lesions = {
        "IL_0000652": ("ISIC_4671410", "ISIC_8149219", {"age_approx": "65", "sex": "male", "site": "trunk"}),
        "IL_0003176": ("ISIC_0671410", "ISIC_3149219", {"sex": "female"}),
    }
    rows, supplement = [], []
    for lesion, (derm, clinical, facts) in lesions.items():
        for image, kind in ((clinical, "clinical: close-up"), (derm, "dermoscopic")):
            shared = {"attribution": "MILK study team", "copyright_license": "CC-BY-NC"}
            row = {"lesion_id": lesion, "image_type": kind, "isic_id": image, "image_manipulation": "instrument only"}
            scores = {name: f"0.{place + 1}" for place, name in enumerate(concepts.split(","))}
            rows.append(row | shared | facts | scores | {"skin_tone_class": "3"})
            proven = {"diagnosis_full": "Basal cell carcinoma", "diagnosis_confirm_type": "histopathology"}
            judged = {
                "diagnosis_full": "Squamous cell carcinoma in situ",
                "diagnosis_confirm_type": "single contributor clinical assessment",
                "invasion_thickness_interval": "<1.0",
            }
            supplement.append({"isic_id": image} | (proven if lesion == "IL_0000652" else judged))
            write_images(root, f"MILK10k_Training_Input/{lesion}/{image}.jpg")
    write_rows(root / "MILK10k_Training_Metadata.csv", header, rows)
    write_rows(
        root / "MILK10k_Training_Supplement.csv",
        "isic_id,diagnosis_full,diagnosis_confirm_type,invasion_thickness_interval",
        supplement,
    )
    write_text(
        root / "MILK10k_Training_GroundTruth.csv",
        """
        lesion_id,AKIEC,BCC,BEN_OTH,BKL,DF,INF,MAL_OTH,MEL,NV,SCCKA,VASC
        IL_0000652,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0
        IL_0003176,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0
        """,
    )
    scored: dict[str, Any] = {name: (place + 1) / 10 for place, name in enumerate(concepts.split(","))}
    scored |= {"skin_tone_class": 3.0, "image_manipulation": "instrument only"}
    carcinoma_labels = {
        "diagnosis": "basal_cell_carcinoma",
        "malignant": "malignant",
        "diagnosis_full": "Basal cell carcinoma",
        "diagnosis#icd10": "C44.9",
    }
    mixed_labels = {
        "diagnosis": "actinic_keratosis_or_bowen_disease",
        "diagnosis_full": "Squamous cell carcinoma in situ",
    }
    known = {"anatomic_site": "trunk", "confirmed_by": "histopathology", "age": 65.0, "sex": "male"}
    meant = {"IL_0000652": (known, carcinoma_labels)}
    meant["IL_0003176"] = ({"confirmed_by": "single_expert", "sex": "female"}, mixed_labels)
    return [
        ExpectedRecord(
            image,
            f"MILK10k_Training_Input/{lesion}/{image}.jpg",
            modality,
            lesion_id=lesion,
            metadata={"official_split": "train"} | meant[lesion][0],
            labels=meant[lesion][1],
            tabular=scored | ({"invasion_thickness_interval": "<1.0"} if lesion == "IL_0003176" else {}),
        )
        for lesion, (derm, clinical, _) in lesions.items()
        for image, modality in ((clinical, "clinical"), (derm, "dermoscopic"))
    ]


# ------------------------------------------------------------------------------------------------ clinical photographs


def write_pad_ufes20(root: Path) -> list[ExpectedRecord]:
    """Mendeley Data: one table, the photographs in three folders; half of the patients have no history."""
    write_text(
        root / "metadata.csv",
        """
        patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,\
cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,hurt,\
changed,bleed,elevation,img_id,biopsed
        PAT_1516,1765,,,,,8,,,,,,,,ARM,,,NEV,False,False,False,False,False,False,PAT_1516_1765_530.png,False
        PAT_46,881,False,False,POMERANIA,POMERANIA,55,False,FEMALE,True,True,True,True,3.0,NECK,6.0,5.0,BCC,True,True,\
False,True,True,True,PAT_46_881_939.png,True
        PAT_47,881,True,False,UNK,ITALY,77,True,MALE,False,True,True,True,1.0,FACE,10.0,8.0,ACK,UNK,UNK,False,UNK,\
False,False,PAT_47_881_140.png,False
        """,
    )
    files = [
        "images/imgs_part_1/PAT_1516_1765_530.png",
        "images/imgs_part_2/PAT_46_881_939.png",
        "images/imgs_part_3/PAT_47_881_140.png",
    ]
    write_images(root, *files)
    signs = ("itch", "grew", "hurt", "changed", "bleed", "elevation")
    carcinoma: dict[str, Any] = dict.fromkeys(("itch", "grew", "changed", "bleed", "elevation"), True) | {"hurt": False}
    carcinoma |= {"diameter_1": 6.0, "diameter_2": 5.0} | dict.fromkeys(("smoke", "drink", "pesticide"), False)
    keratosis: dict[str, Any] = dict.fromkeys(("hurt", "bleed", "elevation", "drink", "skin_cancer_history"), False)
    keratosis |= {"diameter_1": 10.0, "diameter_2": 8.0} | dict.fromkeys(("smoke", "pesticide", "cancer_history"), True)

    def make(path: str, patient: str, lesion: str, **more: Any) -> ExpectedRecord:
        return ExpectedRecord(Path(path).stem, path, "clinical", patient_id=patient, lesion_id=lesion, **more)

    return [
        make(
            files[0],
            "PAT_1516",
            "1765",
            metadata={"anatomic_site": "arm", "age": 8.0},
            labels={"diagnosis": "nevus", "malignant": "benign", "diagnosis#icd10": "D22.9"},
            tabular=dict.fromkeys(signs, False),
        ),
        make(
            files[1],
            "PAT_46",
            "881",
            metadata={
                "anatomic_site": "neck",
                "confirmed_by": "histopathology",
                "age": 55.0,
                "sex": "female",
                "phototype_low": 3,
                "phototype_high": 3,
            },
            labels={"diagnosis": "basal_cell_carcinoma", "malignant": "malignant", "diagnosis#icd10": "C44.9"},
            tabular=carcinoma | dict.fromkeys(("skin_cancer_history", "cancer_history"), True),
        ),
        make(
            files[2],
            "PAT_47",
            "881",
            metadata={"anatomic_site": "face", "age": 77.0, "sex": "male", "phototype_low": 1, "phototype_high": 1},
            labels={"diagnosis": "actinic_keratosis", "malignant": "benign", "diagnosis#icd10": "L57.0"},
            tabular=keratosis,
        ),
    ]


def write_fitzpatrick17k(root: Path) -> list[ExpectedRecord]:
    """The table of the repository, the photographs saved under their hashes."""
    site = "https://atlas.example/images"
    write_text(
        root / "fitzpatrick17k.csv",
        f"""
        md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,three_partition_label,qc,url,url_alphanum
        5e82a45bc5d78bd24ae9202d194423f8,3,3,psoriasis,inflammatory,non-neoplastic,,{site}/a1.jpg,httpsatlasa1.jpg
        fa2911a9b13b6f8af79cb700937cc14f,-1,2,malignant melanoma,malignant melanoma,malignant,1 Diagnostic,\
{site}/b2.jpg,httpsatlasb2.jpg
        d2bac3c9e4499032ca8e9b07c7d3bc40,6,-1,syringoma,benign dermal,benign,,,httpsatlasc3.jpg
        """,
    )
    hashes = (
        "5e82a45bc5d78bd24ae9202d194423f8",
        "fa2911a9b13b6f8af79cb700937cc14f",
        "d2bac3c9e4499032ca8e9b07c7d3bc40",
    )
    write_images(root, *(f"images/{name}.jpg" for name in hashes))

    def make(name: str, phototype: int | None, tabular: dict[str, Any], **labels: str) -> ExpectedRecord:
        metadata: dict[str, Any] = {}
        if phototype is not None:
            metadata = {"phototype_low": phototype, "phototype_high": phototype, "phototype_source": "annotator"}
        path = f"images/{name}.jpg"
        return ExpectedRecord(name, path, "clinical", metadata=metadata, labels=labels, tabular=tabular)

    return [
        make(
            hashes[0],
            3,
            {"fitzpatrick_centaur": 3.0},
            condition="psoriasis",
            partition_3="non-neoplastic",
            partition_9="inflammatory",
        ),
        make(
            hashes[1],
            None,
            {"fitzpatrick_centaur": 2.0, "qc": "1 Diagnostic"},
            condition="malignant melanoma",
            diagnosis="melanoma",
            malignant="malignant",
            partition_3="malignant",
            partition_9="malignant melanoma",
        ),
        make(
            hashes[2],
            6,
            {},
            condition="syringoma",
            malignant="benign",
            partition_3="benign",
            partition_9="benign dermal",
        ),
    ]


def write_ddi(root: Path) -> list[ExpectedRecord]:
    """Stanford: the photographs beside their table, whose first column numbers the rows."""
    write_text(
        root / "ddi_metadata.csv",
        """
        ,DDI_ID,DDI_file,skin_tone,malignant,disease
        0,1,000001.png,56,True,melanoma-in-situ
        1,2,000002.png,12,False,seborrheic-keratosis-irritated
        2,3,000003.png,34,True,mycosis-fungoides
        """,
    )
    write_images(root, "000001.png", "000002.png", "000003.png")
    rows = [
        ("000001", (5, 6), {"disease": "melanoma-in-situ", "diagnosis": "melanoma", "malignant": "malignant"}),
        (
            "000002",
            (1, 2),
            {"disease": "seborrheic-keratosis-irritated", "diagnosis": "seborrheic_keratosis", "malignant": "benign"},
        ),
        ("000003", (3, 4), {"disease": "mycosis-fungoides", "malignant": "malignant"}),
    ]
    return [
        ExpectedRecord(
            name,
            f"{name}.png",
            "clinical",
            metadata={
                "institution": "Stanford Clinics",
                "confirmed_by": "histopathology",
                "phototype_low": low,
                "phototype_high": high,
                "phototype_source": "clinician",
            },
            labels=labels,
        )
        for name, (low, high), labels in rows
    ]


LAYOUTS: dict[str, Layout] = {
    "ham10000": write_ham10000,
    "isic2018_classification": write_isic2018_classification,
    "isic2018_masks": write_isic2018_masks,
    "isic2019": write_isic2019,
    "isic2020": write_isic2020,
    "isic2024": write_isic2024,
    "isic2024_hdf5": write_isic2024_hdf5,
    "bcn20000": write_bcn20000,
    "mskcc": write_mskcc,
    "hiba": write_hiba,
    "pad_ufes20": write_pad_ufes20,
    "milk10k": write_milk10k,
    "fitzpatrick17k": write_fitzpatrick17k,
    "ddi": write_ddi,
}
