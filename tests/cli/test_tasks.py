"""`panfm tasks check` and `panfm evaluate list` as a user meets them, on drawn shards and on real ones."""

import csv
import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml

from panfm.evaluation.families import Family
from panfm.evaluation.tasks import list_tasks, load_task
from panfm.shards.cards import load_card
from panfm.shards.synthetic import write_archive
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import write_table
from tests.cli.commands import panfm


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of a synthetic archive of 14 patients, by source."""
    root = tmp_path_factory.mktemp("drawn")
    write_archive(root / "archive", num_patients=14, seed=2)
    for name in ("synthetic", "synthetic_slides"):
        build_shards(load_card(name), root / "archive", root / name, options=BuildOptions())
    return {name: root / name for name in ("synthetic", "synthetic_slides")}


@pytest.mark.slow
def test_every_synthetic_task_is_checked_on_one_screen(drawn: dict[str, Path]) -> None:
    tasks = [name for name in list_tasks() if load_task(name).synthetic]
    for name in tasks:
        card = load_task(name)
        code, screen, fault = panfm("tasks", "check", name, "--shards", drawn[card.source])
        assert (code, fault) == (0, ""), name
        lines = screen.splitlines()
        assert lines[0] == f"{name}, version {card.version}: {card.title}"
        assert len(lines) <= 40 and max(map(len, lines)) <= 120, name
        assert "subgroups of the test fold" in screen or not card.subgroups
    said = {
        "synthetic_age_clinical": "age in years: ", "synthetic_follow_up": "a drawn event, days since the visit",
        "synthetic_change_dermoscopic": "pairs of visits: train ", "synthetic_slides_malignancy": "slides: train ",
        "synthetic_pairs": "queries with a partner in the gallery: ", "synthetic_visits": "queries with a partner",
        "synthetic_ugly_duckling": "patients with at least 3 lesions", "synthetic_unknown_dermoscopic": "\nunknown ",
    }  # fmt: skip
    for name, text in said.items():
        assert text in panfm("tasks", "check", name, "--shards", drawn[load_task(name).source])[1], name

    code, listed, _ = panfm("evaluate", "list", "--shards", drawn["synthetic"], "--shards", drawn["synthetic_slides"])
    held = {line.split()[0]: line.split()[2] for line in listed.splitlines() if line.startswith("    ")}
    assert code == 0 and set(held) == set(list_tasks())
    assert {name for name, state in held.items() if state == "here"} == set(tasks)
    families = [line for line in listed.splitlines() if line and not line.startswith(" ")]
    assert families == [family for family in get_args(Family) if family in families] and len(families) == 11


def test_what_a_user_gets_wrong_is_one_clear_line(tmp_path: Path) -> None:
    card = yaml.safe_load(list_tasks()["ham10000_malignancy"].read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**card, "name": "mine", "clases": ["a", "b"]}))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**card, "name": "other", "label": "dx"}))
    (tmp_path / "third.yaml").write_text(yaml.safe_dump({**card, "name": "third", "split": {"kind": "rule"}}))
    for words, said in (
        (["mine"], "unknown key clases (value ['a', 'b']); did you mean classes?"),
        (["other"], "task other: source ham10000 has no label dx; it has diagnosis, malignant"),
        (["no_such_task"], "no_such_task: no such task"),
        (["third", "--shards", tmp_path], "has no index.json"),
    ):
        code, shown, fault = panfm("tasks", "check", *words, "--task-dir", tmp_path)
        assert (code, shown) == (2, "") and said in fault and fault.count("\n") == 1
    code, shown, _ = panfm("tasks", "check", tmp_path / "third.yaml")  # a path does, too
    assert code == 0 and shown.startswith("third, version 1: HAM10000, malignant or benign")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "folder", "task", "left_out"),
    [
        ("ham10000_200px", "dermoscopic/ham10000", "ham10000_diagnosis", 10_013),
        ("pad_ufes20_320px", "clinical/pad_ufes20", "pad_ufes20_malignancy", 1_646),
    ],
)
def test_real_shards_built_small(
    card: str, folder: str, task: str, left_out: int, real_data: Path, tmp_path: Path
) -> None:
    raw, num_images = tmp_path / "raw", 240
    with (real_data / folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:num_images]
    for row in rows:
        for column in ("path", "mask_path"):
            (raw / row[column]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(real_data / folder / row[column], raw / row[column])
    write_table(raw / "manifest.csv", rows)
    report = build_shards(load_card(card), raw, tmp_path / "shards", options=BuildOptions())
    code, screen, fault = panfm("tasks", "check", task, "--shards", tmp_path / "shards")
    assert (code, fault) == (0, "") and len(screen.splitlines()) <= 40
    kind = load_task(task).group
    assert f"{report.num_samples} of the {report.num_samples} images in" in screen and f"(grouped by {kind})" in screen
    assert f"{left_out - report.num_samples} of {left_out} images of the split are not in the shards" in screen
    assert "warning: not all images of the committed split are there" in screen
    assert "anatomic_site: " in screen
    # Masks lie in these shards, so HAM10000's segmentation runs by the same folds.
    if card == "ham10000_200px":
        code, masks, _ = panfm("tasks", "check", "ham10000_lesion", "--shards", tmp_path / "shards")
        assert code == 0 and "split committed, that of ham10000_diagnosis" in masks
        everything = next(line for line in screen.splitlines() if line.startswith("all "))
        measured = next(line for line in masks.splitlines() if line.startswith("measured"))
        assert measured.split()[1:] == everything.split()[1:]
