"""The audit from shards to report, and what its list does: images kept out of pretraining, cells flagged."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from panfm.errors import UserError
from panfm.evaluation.contamination import AuditSettings, AuditSummary, run_audit
from panfm.evaluation.contamination_list import AUDIT_SCHEMA, Audit, find_copied, find_seen, read_audit
from panfm.evaluation.protocol import build_trial
from panfm.evaluation.results import EncoderCard, TrainedOn
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import load_task
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.packing import BuildOptions
from panfm.shards.writer import build_shards
from tests.archives import make_source_card, write_table
from tests.shards.pictures import COPIES, draw_skin

NUM_PATIENTS = 12  # two images each; every third patient tests
RANDOM = "timm:vit_tiny_patch16_224@random:0?image_size=64"
TASK = {
    "version": 1, "name": "clinic_diagnosis", "title": "Diagnosis", "source": "clinic", "label": "diagnosis",
    "classes": ["naevus", "melanoma"], "group": "patient",
    "split": {"kind": "official", "train": ["learn"], "test": ["exam"]},
    "metrics": ["auroc"], "primary_metric": "auroc", "licence": "CC0 1.0", "citation": "none", "synthetic": True,
}  # fmt: skip


def build(folder: Path, name: str, rows: list[dict[str, str]], images: list[Image.Image | bytes], **more: str) -> Path:
    root = folder / f"{name}-raw"
    root.mkdir(parents=True)
    for row, image in zip(rows, images, strict=True):
        if isinstance(image, bytes):
            (root / row["file"]).write_bytes(image)
        else:
            image.save(root / row["file"], quality=95)
    write_table(root / "table.csv", rows)
    columns = {"path": "file", "patient_id": "patient", "official_split": "fold"}
    labels = {"diagnosis": {"column": "diagnosis"}}
    card = make_source_card(name, modality="dermoscopic", columns=columns, labels=labels, **more)
    build_shards(card, root, folder / name, options=BuildOptions(min_side=16))
    return folder / name


def make_row(file: str, patient: str, fold: str = "", diagnosis: str = "") -> dict[str, str]:
    return {"file": file, "patient": patient, "fold": fold, "diagnosis": diagnosis}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clinic: 24 images, 8 of them test. atlas: copies of four test images, one test file itself, others' lesions.

    archive: of the clinic's own patients (one namespace), a test patient's other photograph among them.
    """
    folder = tmp_path_factory.mktemp("world")
    rows, images = [], []
    for number in range(2 * NUM_PATIENTS):
        patient = number // 2
        fold, label = ("exam", "learn", "learn")[patient % 3], ("naevus", "melanoma")[(patient // 3 + number) % 2]
        rows.append(make_row(f"{number}.jpg", f"P{patient}", fold, label))
        images.append(draw_skin(number))
    build(folder, "clinic", rows, images)
    names = list(COPIES)[:4]
    changed = [COPIES[name](draw_skin(number)) for name, number in zip(names, (0, 1, 6, 7), strict=True)]
    same = (folder / "clinic-raw" / "12.jpg").read_bytes()
    train_copy = COPIES["resized"](draw_skin(2))  # of a training image: no matter
    files = [*changed, same, train_copy, *(draw_skin(500 + number) for number in range(4))]
    build(folder, "atlas", [make_row(f"a{number}.jpg", f"Q{number}") for number in range(len(files))], files)
    strangers = [draw_skin(600 + number) for number in range(3)]
    of = [make_row(f"r{number}.jpg", patient) for number, patient in enumerate(("P0", "P1", "P99"))]
    build(folder, "archive", of, strangers, id_namespace="clinic")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "clinic_diagnosis.yaml").write_text(yaml.safe_dump(TASK))
    return folder


@pytest.fixture(scope="module")
def audited(world: Path) -> tuple[AuditSummary, Audit]:
    summary = run_audit(
        [world / "atlas", world / "archive"],
        [world / "clinic"],
        out=world / "audit",
        tasks=["clinic_diagnosis"],
        task_dir=world / "tasks",
    )
    return summary, read_audit(world / "audit")


def compute_result_hash(world: Path) -> str:
    """The data hash that a result of the task holds, by the code that writes results."""
    task, clinic = load_task("clinic_diagnosis", world / "tasks"), open_shard_set(world / "clinic")
    split = load_split(task, clinic, world / "tasks")
    trial = build_trial(
        task, split, make_card(world), clinic, protocol="linear_probe", recipe={}, evaluated_on="test",
        label_fraction=1.0, draw=0, seed=0, num_replicates=0,
    )  # fmt: skip
    return trial.data_hash


def find_key(shard_set: ShardSet, file: str, world: Path) -> str:
    """The key of an original file, by its bytes."""
    from panfm.files import compute_sha256

    sha256 = compute_sha256((world / f"{shard_set.source}-raw" / file).read_bytes())
    return str(shard_set.table["key"][shard_set.table["source_sha256"].to_pylist().index(sha256)].as_py())


def make_card(world: Path, *sources: str, **more: object) -> EncoderCard:
    trained_on = tuple(
        TrainedOn(source=name, data_hash=open_shard_set(world / name).compute_data_hash(), num_kept=5)
        for name in sources
    )
    values: dict[str, object] = {
        "name": "first", "address": "panfm:x", "hash": "h", "num_parameters": 1, "embed_dim": 2, "image_size": 8,
        "pooling": "mean", "sources": trained_on, **more,
    }  # fmt: skip
    return EncoderCard.model_validate(values)


def test_the_audit_finds_the_planted_images_and_no_others(world: Path, audited: tuple[AuditSummary, Audit]) -> None:
    summary, audit = audited
    clinic, atlas, archive = (open_shard_set(world / name) for name in ("clinic", "atlas", "archive"))
    found = {
        (row["method"], row["pretrain_source"], row["pretrain_key"], row["evaluation_key"])
        for row in audit.table.to_pylist()
    }
    copies = {
        ("phash", "atlas", find_key(atlas, f"a{place}.jpg", world), find_key(clinic, f"{number}.jpg", world))
        for place, number in enumerate((0, 1, 6, 7))
    }
    exact = {("sha256", "atlas", find_key(atlas, "a4.jpg", world), find_key(clinic, "12.jpg", world))}
    patient = {
        ("same_group", "archive", find_key(archive, "r0.jpg", world), find_key(clinic, f"{number}.jpg", world))
        for number in (0, 1)
    }
    assert found == copies | exact | patient
    assert summary.counts["clinic_diagnosis"]["any"] == {"pairs": 7, "test_images": 5, "pretrain_images": 6}
    assert audit.manifest["tasks"][0]["num_test"] == 8
    assert {entry["source"]: entry["data_hash"] for entry in audit.manifest["pretrain"]} == {
        "atlas": atlas.compute_data_hash(),
        "archive": archive.compute_data_hash(),
    }


def test_the_report_is_whole_offline_and_the_same_each_time(
    world: Path, audited: tuple[AuditSummary, Audit], tmp_path: Path
) -> None:
    page = (world / "audit" / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * (4 + 1 + 2)
    assert "http" not in page and "<script" not in page and "images of patients" in page and "not detected" in page
    rows = list(csv.DictReader(io.StringIO((world / "audit" / "audit.csv").read_text())))
    assert len(rows) == 7 and list(rows[0]) == AUDIT_SCHEMA.names
    run_audit(
        [world / "atlas", world / "archive"], [world / "clinic"], out=tmp_path, tasks=["clinic_diagnosis"],
        task_dir=world / "tasks",
    )  # fmt: skip
    for path in (world / "audit").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_pretraining_sets_alone_are_compared_with_each_other(world: Path, tmp_path: Path) -> None:
    summary = run_audit([world / "atlas", world / "clinic"], [], out=tmp_path)
    assert summary.inside is not None and summary.inside.num_groups == 6
    assert {key[:2] for key in summary.inside.num_pairs} == {("atlas", "clinic")}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "duplicates.csv").read_text())))
    assert len(rows) == 12 and {row["source"] for row in rows} == {"atlas", "clinic"}
    assert len(read_audit(tmp_path).table) == 0


def test_features_find_larger_crops_and_pixels_judge_them(world: Path, tmp_path: Path) -> None:
    square = draw_skin(13).crop((20, 0, 140, 120))  # test patient P6
    build(tmp_path, "web", [make_row("w0.jpg", "W"), make_row("w1.jpg", "V")], [square, draw_skin(700)])
    settings = AuditSettings(encoder=RANDOM, cosine=-1.0, inside=False, cache_dir=tmp_path / "cache")
    options = {"tasks": ["clinic_diagnosis"], "task_dir": world / "tasks"}
    run_audit([tmp_path / "web"], [world / "clinic"], out=tmp_path / "audit", settings=settings, **options)
    audit = read_audit(tmp_path / "audit")
    clinic, web = open_shard_set(world / "clinic"), open_shard_set(tmp_path / "web")
    assert [(row["method"], row["pretrain_key"], row["evaluation_key"]) for row in audit.table.to_pylist()] == [
        ("embedding", find_key(web, "w0.jpg", tmp_path), find_key(clinic, "13.jpg", world))
    ]
    assert audit.manifest["settings"]["encoder_hash"]
    with pytest.raises(UserError, match=r"pairs of test images are of known different .*--cosine"):
        own = AuditSettings(encoder=RANDOM, inside=False, cache_dir=tmp_path / "cache")
        run_audit([tmp_path / "web"], [world / "clinic"], out=tmp_path / "b", settings=own, **options)


def test_pretraining_leaves_out_what_the_audit_lists(world: Path, audited: tuple[AuditSummary, Audit]) -> None:
    atlas, archive = open_shard_set(world / "atlas"), open_shard_set(world / "archive")
    keys = find_copied(audited[1], [atlas])
    assert keys == {"atlas": frozenset(find_key(atlas, f"a{number}.jpg", world) for number in range(5))}
    assert find_copied(audited[1], [archive]) == {"archive": frozenset({find_key(archive, "r0.jpg", world)})}


def test_an_audit_of_other_data_is_refused(world: Path, audited: tuple[AuditSummary, Audit], tmp_path: Path) -> None:
    other = open_shard_set(build(tmp_path, "atlas", [make_row("x.jpg", "X")], [draw_skin(900)]))
    old = open_shard_set(world / "atlas").compute_data_hash()
    with pytest.raises(UserError, match=f"made for atlas with data hash {old}, but .* {other.compute_data_hash()}"):
        find_copied(audited[1], [other])
    with pytest.raises(UserError, match=r"source clinic was not audited \(audited: atlas, archive\)"):
        find_copied(audited[1], [open_shard_set(world / "clinic")])


def test_an_unfinished_or_changed_audit_is_refused(
    world: Path, audited: tuple[AuditSummary, Audit], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no audit\.json"):
        read_audit(tmp_path)
    shutil.copytree(world / "audit", tmp_path / "audit")
    (tmp_path / "audit" / "audit.parquet").write_bytes(b"another")
    with pytest.raises(UserError, match=r"not the file that audit\.json names"):
        read_audit(tmp_path / "audit")
    manifest = json.loads((tmp_path / "audit" / "audit.json").read_text())
    (tmp_path / "audit" / "audit.json").write_text(json.dumps({**manifest, "audit_version": 9}))
    with pytest.raises(UserError, match="audit version 9"):
        read_audit(tmp_path / "audit")


def test_what_an_encoder_has_seen_depends_on_what_it_left_out(world: Path, audited: tuple[AuditSummary, Audit]) -> None:
    _, audit = audited
    data_hash = compute_result_hash(world)

    def look(card: EncoderCard, task: str = "clinic_diagnosis", of: str = data_hash) -> object:
        seen = find_seen(audit, card, task, of)
        return seen.reason if seen.keys is None else (len(seen.keys), seen.choice)

    assert look(make_card(world, "atlas")) == (5, "flagged")
    assert look(make_card(world, "atlas", "archive")) == (5, "flagged")
    assert look(make_card(world, "archive")) == (2, "flagged")
    assert look(make_card(world, "atlas", excluded_tasks=("clinic_diagnosis",))) == (5, "flagged")
    assert look(make_card(world, "atlas", "archive", audit=audit.hash)) == (0, "excluded")
    assert look(make_card(world, "atlas", audit="another")) == (5, "flagged")
    assert look(make_card(world)) == (0, "flagged")
    assert look(make_card(world, "clinic")) == "clinic was not audited"
    assert look(make_card(world, sources=None)) == "pretraining data unknown"
    assert look(make_card(world, "atlas"), of="other") == "the audit is of other test images"
    assert look(make_card(world, "atlas"), task="other") == "the audit is not of this task"


def test_test_groups_that_a_run_left_out_were_not_seen(world: Path, tmp_path: Path) -> None:
    run_audit(
        [world / "clinic"], [world / "clinic"], out=tmp_path, tasks=["clinic_diagnosis"], task_dir=world / "tasks",
        settings=AuditSettings(inside=False),
    )  # fmt: skip
    audit = read_audit(tmp_path)
    data_hash = compute_result_hash(world)
    card = make_card(world, "clinic")
    assert len(find_seen(audit, card, "clinic_diagnosis", data_hash).keys or ()) == 8, "every test image, by itself"
    careful = make_card(world, "clinic", excluded_tasks=("clinic_diagnosis",))
    assert find_seen(audit, careful, "clinic_diagnosis", data_hash).keys == frozenset()


def test_what_cannot_be_audited_is_said(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 folders hold source atlas"):
        run_audit([world / "atlas", world / "atlas"], [], out=tmp_path)
    with pytest.raises(UserError, match="no known task is on the sources archive"):
        run_audit([world / "atlas"], [world / "archive"], out=tmp_path)
    named = {"tasks": ["clinic_diagnosis"], "task_dir": world / "tasks"}
    with pytest.raises(UserError, match="task clinic_diagnosis: is on source clinic, and no --evaluation set"):
        run_audit([world / "clinic"], [world / "atlas"], out=tmp_path, **named)
    with pytest.raises(UserError, match="nothing to compare"):
        run_audit([world / "atlas"], [], out=tmp_path, settings=AuditSettings(inside=False))
    assert not (tmp_path / "audit.json").exists()
