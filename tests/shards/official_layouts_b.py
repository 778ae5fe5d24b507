"""More small archives in official layouts: atlases, class folders, slides, captions, and the templates for own data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openpyxl
import tifffile
from PIL import Image

from tests.shards.official_layouts import ExpectedRecord, Layout, write_images, write_masks, write_rows, write_text


def write_derm7pt(root: Path) -> list[ExpectedRecord]:
    """release_v0: a row a case with both images; the splits name rows by number."""
    header = (
        "case_num,diagnosis,seven_point_score,pigment_network,streaks,pigmentation,regression_structures,"
        "dots_and_globules,blue_whitish_veil,vascular_structures,level_of_diagnostic_difficulty,elevation,location,sex,"
        "clinic,derm,case_id,notes,management"
    )
    points = {
        "seven_point_score": "1",
        "pigment_network": "typical",
        "streaks": "absent",
        "pigmentation": "absent",
        "regression_structures": "absent",
        "dots_and_globules": "irregular",
        "blue_whitish_veil": "absent",
        "vascular_structures": "absent",
        "level_of_diagnostic_difficulty": "low",
        "elevation": "flat",
    }
    cases = [
        ("1", "clark nevus", "nevus", "other", "back", "female", "NEL/Nel025.jpg", "NEL/NEL026.JPG", "train"),
        ("2", "melanoma (in situ)", "melanoma", "melanoma", "abdomen", "male", "AB/Ab1.jpg", "AB/ab2.jpg", "test"),
        ("3", "lentigo", "miscellaneous", "other", "acral", "female", "AC/a.jpg", "AC/b.jpg", "val"),
    ]
    write_rows(
        root / "meta/meta.csv",
        header,
        [
            points | dict(zip(("case_num", "diagnosis", "location", "sex", "clinic", "derm"), values, strict=True))
            for *head, _group, _melanoma, location, sex, clinic, derm, _split in cases
            for values in [(*head, location, sex, clinic, derm)]
        ],
    )
    for name, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        rows = [number for number, case in enumerate(cases) if case[-1] == split]
        write_text(root / f"meta/{name}_indexes.csv", "\n".join(["indexes", *map(str, rows), ""]))
    expected = []
    for number, disease, group, melanoma, location, sex, clinic, derm, split in cases:
        for name, file, modality in (("derm", derm, "dermoscopic"), ("clinic", clinic, "clinical")):
            write_images(root, f"images/{file}")
            expected.append(
                ExpectedRecord(
                    f"{number}#{name}",
                    f"images/{file}",
                    modality,
                    lesion_id=number,
                    metadata={"anatomic_site": location, "sex": sex, "official_split": split},
                    labels={"diagnosis": group, "disease": disease, "melanoma": melanoma},
                    tabular=points | {"seven_point_score": 1.0},
                )
            )
    return expected


def write_ph2(root: Path) -> list[ExpectedRecord]:
    """A workbook whose table begins below a legend, its classes marked with X; a folder a case."""
    root.mkdir(parents=True)
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["PH2 Database"])
    sheet.append(["Legends"])
    for line in range(3, 13):
        sheet.cell(line, 1, f"legend {line}")
    header = ["Image Name", "Histological Diagnosis", "Common Nevus", "Atypical Nevus", "Melanoma"]
    header += ["Asymmetry\n(0/1/2)", "Pigment Network\n(AT/T)"]
    for column, name in enumerate(header, 1):
        sheet.cell(13, column, name)
    rows = [
        ("IMD003", None, "X", None, None),
        ("IMD002", None, None, "X", None),
        ("IMD058", "Melanoma", None, None, "X"),
    ]
    kinds = [
        ("nevus", "common_nevus", "benign"),
        ("nevus", "atypical_nevus", "benign"),
        ("melanoma",) * 2 + ("malignant",),
    ]
    expected = []
    for line, (row, kind) in enumerate(zip(rows, kinds, strict=True), 14):
        for column, cell in enumerate((*row, 0, "T"), 1):
            sheet.cell(line, column, cell)
        name = row[0]
        folder = f"PH2 Dataset images/{name}"
        image, mask = f"{folder}/{name}_Dermoscopic_Image/{name}.bmp", f"{folder}/{name}_lesion/{name}_lesion.bmp"
        write_images(root, image)
        write_masks(root, mask)
        expected.append(
            ExpectedRecord(
                str(name),
                image,
                "dermoscopic",
                mask=mask,
                metadata={"institution": "Hospital Pedro Hispano", "device": "Tuebinger Mole Analyzer"},
                labels=dict(zip(("diagnosis", "lesion_type", "malignant"), kind, strict=True)),
            )
        )
    book.save(root / "PH2_dataset.xlsx")
    return expected


def write_med_node(root: Path) -> list[ExpectedRecord]:
    """Two class folders."""
    kinds = [("melanoma", "100150.jpg", "melanoma", "malignant"), ("naevus", "1002034.jpg", "nevus", "benign")]
    expected = []
    for folder, name, diagnosis, malignant in kinds:
        write_images(root, f"{folder}/{name}")
        expected.append(
            ExpectedRecord(
                f"{folder}/{name}",
                f"{folder}/{name}",
                "clinical",
                metadata={"institution": "University Medical Center Groningen"},
                labels={"diagnosis": diagnosis, "malignant": malignant},
            )
        )
    return expected


def make_class_folders(prefix: str, *paths: str, **metadata: str) -> Layout:
    """An archive of class folders below `prefix`; the class of a path is the folder that holds it."""

    def write(root: Path) -> list[ExpectedRecord]:
        write_images(root, *(prefix + path for path in paths))
        return [
            ExpectedRecord(
                prefix + path, prefix + path, "clinical", metadata=metadata, labels={"diagnosis": path.split("/")[-2]}
            )
            for path in sorted(paths)
        ]

    return write


def write_dermnet(root: Path) -> list[ExpectedRecord]:
    """The copy on Kaggle: train and test, a folder a group of diseases."""
    paths = [
        "test/Melanoma Skin Cancer Nevi and Moles/atypical-nevi-12.jpg",
        "train/Acne and Rosacea Photos/07Acne081101.jpg",
        "train/Melanoma Skin Cancer Nevi and Moles/atypical-nevi-11.jpg",
    ]
    write_images(root, *paths)
    return [
        ExpectedRecord(
            path,
            path,
            "clinical",
            metadata={"official_split": path.split("/")[0]},
            labels={"diagnosis": path.split("/")[1]},
        )
        for path in paths
    ]


def write_dermis(root: Path) -> list[ExpectedRecord]:
    """Originals with their contours; the half from DermQuest must not be read."""
    expected = []
    for folder, name, malignant in (("melanoma", "SSM10", "malignant"), ("notmelanoma", "BN4", "benign")):
        image, mask = f"{folder}/dermis/{name}_orig.jpg", f"{folder}/dermis/{name}_contour.png"
        write_images(root, image, f"{folder}/dermquest/{name}_orig.jpg")
        write_masks(root, mask)
        label = "melanoma" if folder == "melanoma" else "other"
        labels = {"malignant": malignant, "melanoma": label}
        expected.append(ExpectedRecord(image, image, "clinical", mask=mask, labels=labels))
    return expected


def write_patch16(root: Path) -> list[ExpectedRecord]:
    """heiDATA: tiles in class folders, one table with the published split."""
    rows = [
        ("nontumor_skin_dermis_dermis", "ws_44_1", "Train", "dermis", "normal", "train"),
        ("nontumor_skin_dermis_dermis", "ws_44_5", "Train", "dermis", "normal", "train"),
        ("tumor_skin_epithelial_bcc", "ws_190_17", "Validation", "basal_cell_carcinoma", "tumour", "val"),
        ("tumor_skin_melanoma_melanoma", "ws_7_3", "Test", "melanoma", "tumour", "test"),
    ]
    lines, expected = [",file,class,malignicity,set"], []
    for number, (kind, place, part, tissue, tumour, split) in enumerate(rows):
        name = f"{kind}_{place}"
        path = f"data/tiles/{kind}/{name}.jpg"
        write_images(root, path)
        lines.append(f"{number},{path},{kind},{kind.split('_')[0]},{part}")
        expected.append(
            ExpectedRecord(
                name,
                path,
                "histopathology",
                slide_id=place.rpartition("_")[0],
                metadata={"official_split": split},
                labels={"tissue": tissue, "tumour": tumour},
            )
        )
    write_text(root / "data/tiles-v2.csv", "\n".join([*lines, ""]))
    return expected


def write_sddi(root: Path) -> list[ExpectedRecord]:
    """Two visits of one lesion and one of another, in the table that the card describes."""
    write_text(
        root / "sequences.csv",
        """
        image,patient_id,lesion_id,visit_day,diagnosis
        seq/1_0.jpg,A1,A1-1,0,melanoma
        seq/1_1.jpg,A1,A1-1,95,melanoma
        seq/2_0.jpg,A2,A2-1,0,benign
        """,
    )
    rows = [("seq/1_0.jpg", "A1", 0, True), ("seq/1_1.jpg", "A1", 95, True), ("seq/2_0.jpg", "A2", 0, False)]
    write_images(root, *(path for path, *_ in rows))
    return [
        ExpectedRecord(
            path,
            path,
            "dermoscopic",
            patient_id=patient,
            lesion_id=f"{patient}-1",
            visit_day=day,
            metadata={"confirmed_by": "histopathology"},
            labels={
                "diagnosis": "melanoma" if melanoma else "benign_lesion",
                "malignant": "malignant" if melanoma else "benign",
            },
        )
        for path, patient, day, melanoma in rows
    ]


def write_derm1m(root: Path) -> list[ExpectedRecord]:
    """Two tables, a folder a part; an image that no table names is not read."""
    header = "filename,caption,disease_label,hierarchical_disease_label,skin_concept,body_location,age,gender"
    write_rows(
        root / "Derm1M_v2_pretrain.csv",
        header,
        [
            {
                "filename": "edu/3_2.png",
                "caption": "A brown macule, with an irregular border.",
                "disease_label": "melanoma",
                "hierarchical_disease_label": "proliferations, malignant, melanoma",
                "skin_concept": "macule",
                "body_location": "back",
            },
            {
                "filename": "youtube/0_1.png",
                "caption": "Red scaly plaques on both elbows.",
                "disease_label": "no definitive diagnosis",
                "body_location": "No body location information",
            },
        ],
    )
    write_rows(
        root / "Derm1M_v2_validation.csv",
        header,
        [{"filename": "edu/9_1.jpg", "caption": "A blue nodule.", "disease_label": "blue nevus"}],
    )
    write_images(root, "edu/3_2.png", "edu/9_1.jpg", "edu/unnamed.jpg", "youtube/0_1.png")
    concepts = {"hierarchical_disease_label": "proliferations, malignant, melanoma", "skin_concept": "macule"}
    return [
        ExpectedRecord(
            "edu/3_2.png",
            "edu/3_2.png",
            "clinical",
            caption="A brown macule, with an irregular border.",
            metadata={"anatomic_site": "back", "official_split": "train"},
            labels={"diagnosis": "melanoma"},
            tabular=concepts,
        ),
        ExpectedRecord(
            "edu/9_1.jpg",
            "edu/9_1.jpg",
            "clinical",
            caption="A blue nodule.",
            metadata={"official_split": "val"},
            labels={"diagnosis": "blue nevus"},
        ),
        ExpectedRecord(
            "youtube/0_1.png",
            "youtube/0_1.png",
            "clinical",
            caption="Red scaly plaques on both elbows.",
            metadata={"official_split": "train"},
        ),
    ]


def write_skincap(root: Path) -> list[ExpectedRecord]:
    """One table, one folder; further columns are left alone."""
    write_rows(
        root / "skincap_v240623.csv",
        "id,skincap_file_path,ori_file_path,disease,caption_zh,caption_zh_polish_en",
        [
            {
                "id": "1",
                "skincap_file_path": "1.png",
                "disease": "lichen planus",
                "caption_zh_polish_en": "Flat papules.",
            },
            {"id": "2", "skincap_file_path": "2.png", "disease": "melanoma", "caption_zh_polish_en": ""},
        ],
    )
    write_images(root, "skincap/1.png", "skincap/2.png")
    return [
        ExpectedRecord("1", "skincap/1.png", "clinical", caption="Flat papules.", labels={"disease": "lichen planus"}),
        ExpectedRecord("2", "skincap/2.png", "clinical", labels={"disease": "melanoma"}),
    ]


def write_panderm_csv(root: Path) -> list[ExpectedRecord]:
    """The binary form of the layout; the other one is tested apart."""
    write_text(root / "data.csv", "image,split,binary_label\na.jpg,train,0\nb.jpg,test,1\n")
    write_images(root, "a.jpg", "b.jpg")
    return [
        ExpectedRecord(
            "a.jpg", "a.jpg", "clinical", metadata={"official_split": "train"}, labels={"malignant": "benign"}
        ),
        ExpectedRecord(
            "b.jpg", "b.jpg", "clinical", metadata={"official_split": "test"}, labels={"malignant": "malignant"}
        ),
    ]


def write_panderm_csv_classes(root: Path) -> list[ExpectedRecord]:
    """The form with several classes."""
    write_text(root / "data.csv", "image,split,label\na.jpg,train,4\n")
    write_images(root, "a.jpg")
    return [
        ExpectedRecord("a.jpg", "a.jpg", "clinical", metadata={"official_split": "train"}, labels={"diagnosis": "4"})
    ]


def write_csv_columns(root: Path) -> list[ExpectedRecord]:
    """A hospital's table with some of the columns."""
    write_text(
        root / "images.csv",
        """
        image,modality,patient_id,age,sex,phototype,visit_date,diagnosis
        a.jpg,clinical,0012,61,F,III,2020-03-01,nevus
        b.jpg,dermoscopic,0012,61,F,III,2020-05-01,nevus
        """,
    )
    write_images(root, "a.jpg", "b.jpg")
    facts = {"age": 61.0, "sex": "female", "phototype_low": 3, "phototype_high": 3}
    return [
        ExpectedRecord(
            name, name, modality, patient_id="0012", visit_day=day, metadata=facts, labels={"diagnosis": "nevus"}
        )
        for name, modality, day in (("a.jpg", "clinical", 0), ("b.jpg", "dermoscopic", 61))
    ]


# ------------------------------------------------------------------------------------------------ slides


def write_slide(path: Path, seed: int, mpp: float = 0.5) -> None:
    """A slide of 448 x 448 pixels, tissue everywhere, as a tiled TIFF of two levels that states its resolution."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-25, 26, (56, 56, 3))
    tissue = np.clip(np.array((220, 120, 170)) + np.kron(noise, np.ones((8, 8, 1))), 0, 255).astype(np.uint8)
    with tifffile.TiffWriter(path) as file:
        for factor in (1, 2):
            level = np.asarray(Image.fromarray(tissue).reduce(factor))
            stated = {"resolution": (1e4 / mpp / factor,) * 2, "resolutionunit": "CENTIMETER"}
            file.write(level, subfiletype=int(factor > 1), tile=(256, 256), photometric="rgb", metadata=None, **stated)


def write_tcga_skcm(root: Path) -> list[ExpectedRecord]:
    """A folder a file, as gdc-client makes them, with its log beside."""
    names = [
        ("0a1b", "TCGA-D3-A1Q1-06A-02-DX2.33F2A7B1-93C2", "TCGA-D3-A1Q1", "metastasis"),
        ("7f00", "TCGA-EE-A2GH-01Z-00-DX1.0E1C3D5B-1AAF", "TCGA-EE-A2GH", "primary_tumour"),
    ]
    expected = []
    for number, (folder, name, patient, kind) in enumerate(names):
        write_slide(root / folder / f"{name}.svs", number)
        write_text(root / folder / "logs" / f"{name}.svs.parcel", "log\n")
        expected.append(
            ExpectedRecord(
                name,
                f"{folder}/{name}.svs",
                "histopathology",
                patient_id=patient,
                slide_id=name,
                labels={"sample_type": kind},
            )
        )
    return expected


def write_cptac_cm(root: Path) -> list[ExpectedRecord]:
    """Slides of two cases, one below a folder."""
    paths = ["C3L-00275-21.svs", "CM/C3N-00737-22.svs"]
    expected = []
    for number, path in enumerate(paths):
        write_slide(root / path, number)
        stem = Path(path).stem
        expected.append(ExpectedRecord(stem, path, "histopathology", patient_id=stem[:9], slide_id=stem))
    return expected


def write_slide_folder(root: Path) -> list[ExpectedRecord]:
    """Slides with a table."""
    write_text(root / "slides.csv", "slide,patient_id,diagnosis\nscans/1.tiff,P1,melanoma\n")
    write_slide(root / "scans/1.tiff", 0)
    return [
        ExpectedRecord(
            "scans/1.tiff", "scans/1.tiff", "histopathology", patient_id="P1", labels={"diagnosis": "melanoma"}
        )
    ]


PUBLIC: dict[str, Callable[[Path], list[ExpectedRecord]]] = {
    "derm7pt": write_derm7pt,
    "ph2": write_ph2,
    "med_node": write_med_node,
    "sd198": make_class_folders("images/", "Acne_Vulgaris/01.jpg", "Blue_Nevus/02.jpg"),
    "sd128": make_class_folders("images/", "Acne_Vulgaris/01.jpg", "Blue_Nevus/02.jpg"),
    "dermnet": write_dermnet,
    "dermis": write_dermis,
    "patch16": write_patch16,
    "tcga_skcm": write_tcga_skcm,
    "cptac_cm": write_cptac_cm,
    "sddi": write_sddi,
    "derm1m": write_derm1m,
    "skincap": write_skincap,
}
TEMPLATES: dict[str, Callable[[Path], list[ExpectedRecord]]] = {
    "panderm_csv": write_panderm_csv,
    "class_folders": make_class_folders("", "melanoma/a.jpg", "nevus/b.jpg"),
    "csv_columns": write_csv_columns,
    "slide_folder": write_slide_folder,
}
