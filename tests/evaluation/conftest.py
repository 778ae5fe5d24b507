"""A small archive as shards: 36 patients, 72 photographs, a colour that tells the diagnosis in most of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.config import validate
from panfm.evaluation.tasks import TaskCard
from panfm.shards.cards import SourceCard
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import describe_source_card, write_table

NUM_PATIENTS = 36
COLOURS = {"naevus": (190, 120, 90), "melanoma": (110, 90, 110), "wart": (200, 170, 120)}
SOURCE = describe_source_card(
    "clinic", modality="clinical", labels={"diagnosis": {"column": "diagnosis"}},
    columns={"path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold"},
)  # fmt: skip
TASK = {
    "version": 1, "name": "clinic_diagnosis", "title": "Diagnosis", "source": "clinic", "label": "diagnosis",
    "classes": ["naevus", "melanoma"], "ignore": ["wart"], "group": "patient",
    "split": {"kind": "official", "train": ["learn"], "val": ["tune"], "test": ["exam"]},
    "metrics": ["auroc", "balanced_accuracy", "log_loss"], "primary_metric": "auroc", "licence": "CC0 1.0",
    "citation": "none", "synthetic": True,
}  # fmt: skip


def make_source(**changes: object) -> SourceCard:
    return validate(SourceCard, {**SOURCE, **changes}, where="test card")


def make_task(**changes: object) -> TaskCard:
    return validate(TaskCard, {**TASK, **changes}, where="test task")


def list_rows() -> list[dict[str, str]]:
    """Two images a patient; every 12th image has no label, every 9th patient has warts; folds by patient."""
    rows = []
    for patient in range(NUM_PATIENTS):
        fold = ("learn", "learn", "learn", "tune", "exam", "exam")[patient % 6]
        for image in range(2):
            number = 2 * patient + image
            label = (
                "wart" if patient % 9 == 8 else ("naevus", "melanoma")[(patient // 6 + image * (patient % 4 == 0)) % 2]
            )
            rows.append({
                "file": f"{number}.jpg", "patient": f"P{patient}", "lesion": f"P{patient}-{image}", "fold": fold,
                "colour": label, "diagnosis": "" if number % 12 == 11 else label,
            })  # fmt: skip
    return rows


def write_archive(root: Path, rows: list[dict[str, str]]) -> None:
    root.mkdir(parents=True)
    for row in rows:
        rng = np.random.default_rng(int(row["file"].removesuffix(".jpg")))
        pixels = rng.normal(COLOURS[row["colour"]], 45.0, (40, 48, 3)) + rng.normal(0, 25, 3)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / row["file"], quality=90)
    write_table(root / "table.csv", rows)


def build(folder: Path, rows: list[dict[str, str]], **changes: object) -> ShardSet:
    """Write `rows` as an archive and build its shards under `folder`."""
    write_archive(folder / "raw", rows)
    build_shards(make_source(**changes), folder / "raw", folder / "shards", options=BuildOptions(min_side=16))
    return open_shard_set(folder / "shards")


@pytest.fixture(scope="session")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return build(tmp_path_factory.mktemp("clinic"), list_rows())


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The archive with its patients in three hospitals, one image of unknown origin, a second reader's diagnosis."""
    rows = list_rows()
    for row in rows:
        patient = int(row["patient"][1:])
        row["hospital"] = ("North", "South", "West")[patient % 5 % 3]
        row["second"] = {"naevus": "melanoma", "melanoma": "naevus"}.get(row["diagnosis"], "wart")
        if patient % 4:  # the second reader agrees on three patients of four, and skips the unread
            row["second"] = row["diagnosis"]
    rows[1]["hospital"] = ""
    columns = {**SOURCE["columns"], "institution": "hospital"}  # type: ignore[dict-item]
    columns_of = {"diagnosis": "diagnosis", "diagnosis@second": "second", "diagnosis@original": "second"}
    labels = {name: {"column": column} for name, column in columns_of.items()}
    return build(tmp_path_factory.mktemp("hospitals"), rows, columns=columns, labels=labels)


@pytest.fixture(scope="session")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Another archive: lesions with masks, in two modalities, at two visits, with captions (see lesion_archive)."""
    from tests.evaluation.lesion_archive import build_lesions  # which takes its cards' common fields from here

    return build_lesions(tmp_path_factory.mktemp("lesions"))


@pytest.fixture(scope="session", name="make_task")
def give_make_task() -> Callable[..., TaskCard]:
    return make_task


@pytest.fixture(name="build_clinic")
def give_build(tmp_path: Path) -> Callable[..., ShardSet]:
    """build_clinic(change, **card): the archive with `change` applied to each row, or with other rows."""

    def build_changed(change: Callable[[dict[str, str]], object] = lambda row: None, **card: object) -> ShardSet:
        rows = list_rows()
        for row in rows:
            change(row)
        return build(tmp_path / str(card.get("name", "clinic")), rows, **card)

    return build_changed


@pytest.fixture(name="build_rows")
def give_build_rows(tmp_path: Path) -> Callable[..., ShardSet]:
    """build_rows(rows, **card): an archive of these rows, each with `file` (N.jpg), `colour` and what the card maps."""

    def build_given(rows: list[dict[str, str]], **card: object) -> ShardSet:
        return build(tmp_path / str(card.get("name", "clinic")), rows, **card)

    return build_given
