"""`panfm audit` and its readers as a user meets them: several folders after one option, the list used."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.archives import describe_source_card, write_table
from tests.cli.commands import assert_one_line, panfm
from tests.shards.pictures import COPIES, draw_skin


def build(folder: Path, name: str, images: list[Image.Image], folds: list[str]) -> Path:
    root = folder / f"{name}-raw"
    root.mkdir()
    rows = []
    for number, image in enumerate(images):
        image.save(root / f"{number}.jpg", quality=95)
        label = ("naevus", "melanoma")[number % 2]
        rows.append({"file": f"{number}.jpg", "patient": f"{name}{number}", "fold": folds[number], "dx": label})
    write_table(root / "table.csv", rows)
    columns = {"path": "file", "patient_id": "patient", "official_split": "fold"}
    card = describe_source_card(name, modality="dermoscopic", columns=columns, labels={"diagnosis": {"column": "dx"}})
    (root / "card.yaml").write_text(yaml.safe_dump(card))
    run = panfm("shards", "build", root / "card.yaml", "--root", root, "--out", folder / name, "--processes", 1)
    assert run.returncode == 0, run.stderr
    return folder / name


@pytest.mark.slow
def test_audit_then_pretrain_without_what_it_lists(tmp_path: Path) -> None:
    pictures = [draw_skin(number) for number in range(8)]
    clinic = build(tmp_path, "clinic", pictures, ["learn"] * 4 + ["exam"] * 4)
    copies = [COPIES["mirrored"](pictures[5]), COPIES["resized"](pictures[6])]
    atlas = build(tmp_path, "atlas", [*copies, *(draw_skin(50 + number) for number in range(6))], [""] * 8)
    other = build(tmp_path, "other", [draw_skin(90), COPIES["turned"](draw_skin(50))], [""] * 2)
    task = {
        "version": 1, "name": "mine", "title": "Mine", "source": "clinic", "label": "diagnosis",
        "classes": ["naevus", "melanoma"], "group": "patient", "metrics": ["auroc"], "primary_metric": "auroc",
        "split": {"kind": "official", "train": ["learn"], "test": ["exam"]}, "licence": "CC0 1.0", "citation": "none",
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(yaml.safe_dump(task))
    run = panfm(
        "audit", "--pretrain", atlas, other, "--evaluation", clinic, "--tasks", "mine", "--task-dir",
        tmp_path / "tasks", "--out", tmp_path / "audit",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "mine: phash 2 test images (2 in pretraining)" in run.stdout
    assert "2 images in 1 groups of duplicates" in run.stdout and (tmp_path / "audit" / "index.html").is_file()

    pretrain = [
        "pretrain", "debug_cpu", "--out", tmp_path / "run", "data.exclude.tasks=none", "data.workers=0",
        "schedule.total_samples=4", "schedule.warmup_samples=0", "engine.global_batch_size=4",
        "engine.micro_batch_size=4", f"data.exclude.audit={tmp_path / 'audit'}",
    ]  # fmt: skip
    done = panfm(*pretrain, f"data.shards=[{atlas}]")
    assert done.returncode == 0, done.stderr
    assert "source atlas: 6 images kept, 0 excluded (test groups), 2 more listed by the audit" in done.stderr
    assert_one_line(panfm(*pretrain, f"data.shards=[{clinic}]"), "clinic was not audited", "--pretrain")


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert_one_line(panfm("audit", "--pretrain", tmp_path / "none", tmp_path / "nor"), "none: no such folder")
