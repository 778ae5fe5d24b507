import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from panfm.cli.evaluate import app
from panfm.errors import UserError
from panfm.evaluation.site_effect import read_institutions
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.task_audit import MIN_GROUPS, TaskAudit, audit_task, predict_out_of_fold
from panfm.evaluation.tasks import TaskCard
from panfm.measures.agreement import compute_cohen_kappa
from panfm.shards.index import ShardSet

MakeTask = Callable[..., TaskCard]


def make_features(split: Split, shard_set: ShardSet, *, marked: bool) -> np.ndarray:
    """The first feature tells the diagnosis; the second the hospital, where the images are marked."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(split.rows), 5))
    features[:, 0] += 6 * split.labels
    if marked:
        features[:, 1] = np.unique(read_institutions(shard_set, split.rows), return_inverse=True)[1] * 4
    return features.astype(np.float32)


def audit(card: TaskCard, shard_set: ShardSet, *, marked: bool = True, flipped: tuple[int, ...] = ()) -> TaskAudit:
    split = load_split(card, shard_set)
    features = make_features(split, shard_set, marked=marked)
    labels = split.labels.copy()
    labels[list(flipped)] = 1 - labels[list(flipped)]
    return audit_task(card, replace(split, labels=labels), shard_set, features, num_replicates=200)


def test_hospitals_are_told_where_the_images_are_marked_and_only_there(
    hospitals: ShardSet, make_task: MakeTask
) -> None:
    marked, plain = audit(make_task(), hospitals), audit(make_task(), hospitals, marked=False)
    assert [signal.diagnosis for signal in marked.site.signals] == ["naevus", "melanoma"]
    for signal, chance in zip(marked.site.signals, plain.site.signals, strict=True):
        assert signal.auroc.value > 0.95 and signal.balanced_accuracy.value > 0.9
        assert chance.auroc.value < 0.75
    assert marked.site.num_unknown == 1
    split = load_split(make_task(), hospitals)
    institutions = read_institutions(hospitals, split.rows)
    for name, row in marked.site.counts.items():
        for k, count in enumerate(row):
            number = len(set(split.groups[(institutions == name) & (split.labels == k)]))
            assert count == (number if number == 0 or number >= MIN_GROUPS else None)
    few = next(name for signal in marked.site.signals for name in marked.site.counts if name not in signal.institutions)
    assert None in marked.site.counts[few]


def test_turned_labels_are_suspects_and_the_others_are_not(hospitals: ShardSet, make_task: MakeTask) -> None:
    clean = audit(make_task(), hospitals).labels
    assert not clean.suspects and clean.error_share.value == 0
    turned = audit(make_task(), hospitals, flipped=(3, 11)).labels
    split = load_split(make_task(), hospitals)
    assert {suspect.place for suspect in turned.suspects} == {3, 11}
    for suspect in turned.suspects:
        assert (
            suspect.key == split.keys[suspect.place]
            and suspect.suggested == ("naevus", "melanoma")[split.labels[suspect.place]]
        )
        assert suspect.p_given < 0.5 < suspect.p_suggested
    assert sum(map(sum, turned.joint)) - turned.joint[0][0] - turned.joint[1][1] == 2
    assert turned.error_share.low <= turned.error_share.value <= turned.error_share.high


def test_no_patient_of_an_image_trains_the_probe_that_doubts_it() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(rng.normal(size=(30, 60)), 2, axis=0)  # both images of a patient are the same
    labels, groups = np.repeat(rng.integers(0, 2, 30), 2), np.repeat(np.arange(30), 2).astype(str)
    told = predict_out_of_fold(patients, labels, groups, 2, seed=0)
    assert (told.argmax(axis=1) == labels).mean() < 0.8  # noise: only the other image could tell it
    with pytest.raises(UserError, match="at least two patients"):
        predict_out_of_fold(patients, labels, np.array(["one"] * 60), 2, seed=0)


def test_readers_are_compared_where_both_read(hospitals: ShardSet, clinic: ShardSet, make_task: MakeTask) -> None:
    readers = audit(make_task(), hospitals).readers
    assert readers.readers == ("diagnosis", "diagnosis@second") and len(readers.pairs) == 1
    split = load_split(make_task(), hospitals)
    seconds = [
        dict(entries)["diagnosis@second"] for entries in hospitals.table.column("labels").take(split.rows).to_pylist()
    ]
    other = np.array([{"naevus": 0, "melanoma": 1}.get(value, -1) for value in seconds])
    expected = compute_cohen_kappa(
        split.labels[other >= 0], other[other >= 0], 2, np.ones((1, int((other >= 0).sum())))
    )
    assert readers.pairs[0].kappa.value == pytest.approx(expected[0]) and 0 < expected[0] < 0.9
    alone = audit(make_task(), clinic, marked=False)
    assert alone.readers.reason == "one reader is recorded; a second one's label is diagnosis@NAME in the source card"
    assert alone.site.reason == "the images name 0 institutions; two are needed" and alone.readers.fleiss is None


def test_the_command_writes_what_it_finds_without_a_patient(
    hospitals: ShardSet, make_task: MakeTask, tmp_path: Path
) -> None:
    card = make_task().model_dump(mode="json", exclude_none=True)
    (tmp_path / "clinic_diagnosis.yaml").write_text(yaml.safe_dump(card))
    out = tmp_path / "audit"
    options = {
        "--encoder": "timm:test_vit@random:0?image_size=32", "--shards": hospitals.path, "--task": "clinic_diagnosis",
        "--task-dir": tmp_path, "--out": out, "--cache-dir": tmp_path / "cache",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    answer = CliRunner().invoke(app, ["audit", *words], catch_exceptions=False)
    assert answer.exit_code == 0 and "estimated share of wrong labels" in answer.output
    text, page = (out / "audit.txt").read_text(), (out / "index.html").read_text()
    found = json.loads((out / "audit.json").read_text())
    assert text in answer.output and "Cohen's kappa" in text and "unknown of 1 images" in text
    suspects = found["labels"]["suspects"]
    assert suspects and page.count("<figure>") == len(suspects[:60]) and suspects[0]["key"] in page
    groups = set(hospitals.table.column("patient_id").to_pylist()) | set(
        hospitals.table.column("lesion_id").to_pylist()
    )
    everything = text + page + (out / "audit.json").read_text()
    assert not any(group in everything for group in groups if group)


def test_another_family_is_refused(hospitals: ShardSet, make_task: MakeTask) -> None:
    card = make_task().model_copy(update={"family": "survival"})
    split = load_split(make_task(), hospitals)
    with pytest.raises(UserError, match="is of family survival; only classification and ordinal can be audited"):
        audit_task(card, split, hospitals, np.zeros((len(split.rows), 2), dtype=np.float32))
