"""Writes the synthetic archive: the raw files that a hospital would have, all of them drawn and marked as synthetic.

    seed -> patients -> images/, masks/, slides/ -> metadata.csv, slides.csv (cards: data_shards/synthetic*.yaml)

Everything that panfm does later can be tried on it: several lesions a patient and visits a lesion, one lesion in three
kinds of photograph and sometimes in a slide, institutions with their own cameras and stains, table cells that are
missing (not at random), outcomes that depend on what can be seen. The same seed gives the same bytes, whatever the
number of processes. The folder gets its name when it is whole.
"""

import csv
import io
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from panfm.errors import UserError
from panfm.executor import run_tasks
from panfm.files import write_text
from panfm.shards.drawing import draw_photograph
from panfm.shards.scenery import Camera, PhotographModality, Scene
from panfm.shards.synthetic_captions import write_caption
from panfm.shards.synthetic_patients import MALIGNANT, NOTICE, Lesion, Patient, Visit, draw_patient
from panfm.shards.tissue import Stain, draw_section, write_slide

PATIENTS_PER_TASK = 10


@dataclass(frozen=True)
class Institution:
    """What makes the images of one institution look alike, and its table have the gaps that it has."""

    name: str
    device: str
    camera: Camera
    stain: Stain
    jpeg_quality: int
    sex_missing: float  # shares of patients
    phototype_missing: float


CAMERAS = (
    Camera((1.0, 1.0, 1.0), gamma=1.0, noise=0.008, blur=0.3, ring=0.1, ruler=0.10),
    Camera((1.06, 1.0, 0.92), gamma=0.92, noise=0.012, blur=0.5, ring=0.5, ruler=0.25),
    Camera((0.95, 1.0, 1.07), gamma=1.08, noise=0.020, blur=0.7, ring=0.0, ruler=0.10),
    Camera((1.02, 0.96, 1.0), gamma=1.0, noise=0.015, blur=0.6, ring=0.3, ruler=0.40),
)
INSTITUTIONS = (
    Institution("Synthetic A", "Drawn One", CAMERAS[0], Stain(1.0, 1.0), 92, sex_missing=0.05, phototype_missing=0.20),
    Institution(
        "Synthetic B", "Drawn Two", CAMERAS[1], Stain(1.15, 0.85), 85, sex_missing=0.08, phototype_missing=0.35
    ),
    Institution(
        "Synthetic C", "Drawn Three", CAMERAS[2], Stain(0.85, 1.15), 78, sex_missing=0.3, phototype_missing=0.6
    ),
    Institution("Synthetic D", "Drawn Four", CAMERAS[3], Stain(1.1, 1.1), 88, sex_missing=0.10, phototype_missing=0.05),
)
LESION_COLUMNS = (
    "image_id",
    "patient_id",
    "lesion_id",
    "visit_date",
    "institution",
    "device",
    "anatomic_site",
    "diagnosis",
    "malignant",
    "confirmed_by",
    "follow_up_days",
    "event",
    "age",
    "sex",
    "phototype",
    "phototype_source",
    "synthetic",
)
PHOTOGRAPH_COLUMNS = ("path", "mask_path", "modality", "caption", *LESION_COLUMNS)
SLIDE_COLUMNS = ("path", *LESION_COLUMNS)

Row = dict[str, str]


@dataclass(frozen=True)
class ArchiveSummary:
    """What was written."""

    out: Path
    num_patients: int
    num_lesions: int
    num_images: dict[str, int]  # by modality
    num_slides: int

    def __str__(self) -> str:
        """One line for the terminal."""
        images = ", ".join(f"{count:,} {modality}" for modality, count in sorted(self.num_images.items()))
        return (
            f"{self.out}: SYNTHETIC archive of {self.num_patients:,} patients with {self.num_lesions:,} lesions: "
            f"{images} images, {self.num_slides:,} slides"
        )


@dataclass(frozen=True)
class _Chunk:
    """One task: draw patients first .. first + count - 1 into `folder`."""

    folder: Path
    seed: int
    first: int
    count: int


@dataclass(frozen=True)
class _Drawn:
    photographs: tuple[Row, ...]
    slides: tuple[Row, ...]


def write_archive(out: Path, *, num_patients: int = 200, seed: int = 0, processes: int = 1) -> ArchiveSummary:
    """Draw an archive into the folder `out`, which must not exist or be empty, and say what it holds.

    Raises UserError where `out` already holds something. An interrupted call leaves only a hidden folder beside it.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; give another folder, or remove this one")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give the name of a folder")
    if num_patients < 1:
        raise UserError(f"--patients {num_patients}: it must be at least 1")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        for name in ("images", "masks", "slides"):
            (folder / name).mkdir()
        chunks = [
            _Chunk(folder, seed, first, min(PATIENTS_PER_TASK, num_patients - first))
            for first in range(0, num_patients, PATIENTS_PER_TASK)
        ]
        drawn = run_tasks(
            _draw_chunk, chunks, description="drawing", processes=processes, unit="patients", size=_count_patients
        )
        photographs = [row for chunk in drawn for row in chunk.photographs]
        slides = [row for chunk in drawn for row in chunk.slides]
        _write_table(folder / "metadata.csv", PHOTOGRAPH_COLUMNS, photographs)
        _write_table(folder / "slides.csv", SLIDE_COLUMNS, slides)
        write_text(folder / "README.txt", f"{NOTICE}\nMade by: panfm synth, {num_patients} patients, seed {seed}\n")
        folder.chmod(0o755)  # mkdtemp's 0700 would hide it from colleagues
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return ArchiveSummary(
        out=out,
        num_patients=num_patients,
        num_lesions=len({row["lesion_id"] for row in photographs}),
        num_images=dict(Counter(row["modality"] for row in photographs)),
        num_slides=len(slides),
    )


def _count_patients(chunk: _Chunk) -> int:
    return chunk.count


def _draw_chunk(chunk: _Chunk) -> _Drawn:
    photographs: list[Row] = []
    slides: list[Row] = []
    for number in range(chunk.first, chunk.first + chunk.count):
        patient = draw_patient(chunk.seed, number)
        gaps = _draw_gaps(patient)
        for lesion in patient.lesions:
            for visit in lesion.visits:
                for modality in visit.modalities:
                    photographs.append(_write_photograph(chunk.folder, patient, lesion, visit, modality, gaps))
            if lesion.has_slide:
                slides.append(_write_slide(chunk.folder, patient, lesion, gaps))
    return _Drawn(tuple(photographs), tuple(slides))


def _write_photograph(
    folder: Path, patient: Patient, lesion: Lesion, visit: Visit, modality: str, gaps: frozenset[str]
) -> Row:
    institution = INSTITUTIONS[patient.institution]
    kinds: tuple[PhotographModality, ...] = ("clinical", "dermoscopic", "total_body")
    kind = next(kind for kind in kinds if kind == modality)
    rng = np.random.default_rng([*lesion.seed, visit.number, kinds.index(kind)])
    hairy = max(0.0, float(np.random.default_rng([*patient.seed, 1]).uniform(-0.4, 1.0)))
    scene = Scene(kind, institution.camera, patient.phototype, hairy)
    photograph = draw_photograph(visit.traits, scene, lesion.seed, rng)
    name = f"{lesion.raw_id}-V{visit.number}-{kind}"
    data = io.BytesIO()
    # 4:4:4: the colours of a lesion are what the images are about.
    Image.fromarray(photograph.image).save(
        data, "JPEG", quality=institution.jpeg_quality, subsampling=0, comment=NOTICE
    )
    (folder / "images" / f"{name}.jpg").write_bytes(data.getvalue())
    Image.fromarray(photograph.mask.astype(np.uint8) * 255).save(folder / "masks" / f"{name}.png", optimize=False)
    paths = {"path": f"images/{name}.jpg", "mask_path": f"masks/{name}.png", "modality": kind}
    return paths | {"caption": write_caption(lesion, visit, kind)} | _describe(name, patient, lesion, visit, gaps)


def _write_slide(folder: Path, patient: Patient, lesion: Lesion, gaps: frozenset[str]) -> Row:
    visit = lesion.visits[-1]  # tissue is taken at the last visit
    name = f"{lesion.raw_id}-slide"
    rng = np.random.default_rng([*lesion.seed, 8])
    section = draw_section(visit.traits, INSTITUTIONS[patient.institution].stain, lesion.seed, rng)
    write_slide(folder / "slides" / f"{name}.tiff", section)
    return {"path": f"slides/{name}.tiff"} | _describe(name, patient, lesion, visit, gaps)


def _draw_gaps(patient: Patient) -> frozenset[str]:
    """Which columns this patient's rows leave empty: it depends on the institution, and on who is asked."""
    institution = INSTITUTIONS[patient.institution]
    rng = np.random.default_rng([*patient.seed, 2])
    shares = {
        "age": 0.06,
        "sex": institution.sex_missing,
        # Phototype is asked of fair patients more often: missing not at random, as in the real tables.
        "phototype": min(institution.phototype_missing * (1.3 if patient.phototype >= 4 else 0.9), 0.9),
        "anatomic_site": 0.08,
        "follow_up_days": 0.25,
    }
    return frozenset(column for column, share in shares.items() if rng.random() < share)


def _describe(name: str, patient: Patient, lesion: Lesion, visit: Visit, gaps: frozenset[str]) -> Row:
    institution = INSTITUTIONS[patient.institution]
    row = {
        "image_id": name,
        "patient_id": patient.raw_id,
        "lesion_id": lesion.raw_id,
        "visit_date": visit.date.isoformat(),
        "institution": institution.name,
        "device": institution.device,
        "anatomic_site": lesion.anatomic_site,
        "diagnosis": lesion.diagnosis,
        "malignant": "malignant" if lesion.diagnosis in MALIGNANT else "benign",
        "confirmed_by": lesion.confirmed_by,
        "follow_up_days": str(visit.follow_up_days),
        "event": str(lesion.event).lower(),
        "age": str((visit.date - patient.birth).days // 365),
        "sex": patient.sex,
        "phototype": str(patient.phototype),
        "phototype_source": "drawn",
        "synthetic": "true",
    }
    for column in gaps:
        row[column] = ""
    if "follow_up_days" in gaps:
        row["event"] = ""
    if "phototype" in gaps:
        row["phototype_source"] = ""
    return row


def _write_table(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
