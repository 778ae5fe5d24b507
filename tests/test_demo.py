"""The whole way, small: every room of the main path in one run, and what each hands to the next."""

import json
from pathlib import Path

import pytest

from panfm.demo import run_demo
from panfm.evaluation.results import read_predictions, read_results
from panfm.shards.index import open_shard_set


@pytest.mark.slow
def test_the_whole_way_on_a_small_archive(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    small = ("schedule.total_samples=128", "schedule.warmup_samples=64", "checkpoint.save_every=1", "data.workers=0")
    page = run_demo(out, num_patients=40, processes=1, overrides=small)

    # Every modality is in the shards, under one patient's one id.
    photographs, slides = (open_shard_set(out / "shards" / name) for name in ("synthetic", "synthetic_slides"))
    modalities = set(photographs.table["modality"].to_pylist()) | set(slides.table["modality"].to_pylist())
    assert modalities == {"clinical", "dermoscopic", "total_body", "histopathology"}
    assert set(slides.table["patient_id"].to_pylist()) <= set(photographs.table["patient_id"].to_pylist())

    # Pretraining saw no test patient: what the export says was kept out is what the predictions were made on.
    facts = json.loads((out / "encoder" / "panfm.json").read_text())
    assert all(source["synthetic"] and source["num_excluded"] > 0 for source in facts["sources"])
    results = read_results([out / "results"])
    tested = {
        group
        for path, result in results
        for group in read_predictions(path.parent / result.predictions)["group"].to_pylist()
    }
    excluded = sum(source["num_excluded"] for source in facts["sources"])
    groups = photographs.table["group_id"].to_pylist() + slides.table["group_id"].to_pylist()
    assert sum(group in tested for group in groups) == excluded

    # Two encoders x five tasks x two protocols x (three draws of 10 % + one of all labels).
    assert len(results) == 2 * 5 * 2 * (3 + 1)
    assert {result.encoder.contamination for _, result in results if "demo" in result.encoder.name} == {"excluded"}
    assert all(result.synthetic and result.label_fraction in (0.1, 1.0) for _, result in results)

    text = page.read_text()
    assert "pretrained in this demo" in text and "the same at random initialisation" in text
    assert "ynthetic" in text
    assert {path.suffix for path in page.parent.iterdir() if path.is_file()} == {".html", ".md", ".csv", ".json"}
    assert len(list((page.parent / "tasks").glob("*.html"))) == 5  # a page a task
    printed = capfd.readouterr()
    assert str(page.resolve()) in printed.err.replace("\n", "")

    # Once more: nothing is drawn, trained or measured again, and the board is the same to the byte.
    before = {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*.json")}
    again = run_demo(out, num_patients=40, processes=1, overrides=small)
    assert again.read_text() == text
    assert {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*.json")} == before
