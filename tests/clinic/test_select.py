"""`panfm select`: diversity, doubt, patients, near-duplicates, seeds; and the table that comes out of it."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from panfm.cli.main import app
from panfm.clinic.labels import read_labels
from panfm.clinic.select import choose_images, compute_doubts, select
from panfm.errors import UserError
from tests.archives import write_table
from tests.predict.made import ENCODER, draw_bytes, make_classifier


def choose_rows(*arguments: object, **named: object) -> list[int]:
    return [pick.row for pick in choose_images(*arguments, **named)[0]]  # type: ignore[arg-type]


def make_archive() -> np.ndarray:
    """190 images of one kind and 10 of another, far from it."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 8)) * 0.5
    z[:, 0] += 4
    z[190:, 0] = -4
    return z


def test_the_rare_kind_is_found_more_often_than_at_random() -> None:
    z, groups = make_archive(), np.arange(200)
    found = {
        by: np.mean([np.sum(np.array(choose_rows(z, groups, 8, by=by, seed=seed)) >= 190) for seed in range(40)])
        for by in ("diversity", "random")
    }
    assert found["diversity"] > 2 * found["random"]
    assert found["random"] < 1  # 8 x 10 / 200 = 0.4 on average


def test_what_is_labelled_is_not_asked_again() -> None:
    z, groups = make_archive(), np.arange(200)
    rows = [row for seed in range(20) for row in choose_rows(z, groups, 4, labelled=z[190:], seed=seed)]
    assert np.mean(np.array(rows) >= 190) == 0  # near-duplicates of the labelled ones
    picks, num_near, _ = choose_images(z, groups, 4, labelled=z[190:])
    assert num_near >= 10 and all(pick.similarity is not None for pick in picks)


def test_doubt_draws_what_the_classifier_is_unsure_of() -> None:
    rng = np.random.default_rng(1)
    z, doubts = rng.normal(size=(300, 20)), np.where(np.arange(300) < 60, 0.9, 0.1)
    for by, low, high in (("uncertainty", 0.5, 1.0), ("diversity", 0.05, 0.4)):
        rows = choose_rows(z, np.arange(300), 40, doubts=doubts, by=by)
        assert low < np.mean(np.array(rows) < 60) < high
    np.testing.assert_allclose(compute_doubts(np.array([[0.5, 0.5, 0], [0.9, 0.1, 0]])), [1, 0.2])


def test_patients_are_capped_near_duplicates_left_out_and_seeds_reproduce() -> None:
    rng = np.random.default_rng(2)
    z = np.repeat(rng.normal(size=(30, 16)), 2, axis=0) + 0.001 * rng.normal(size=(60, 16))  # each image twice
    groups = np.arange(60) // 12  # 5 patients
    picks, num_near, num_capped = choose_images(z, groups, 60, per_patient=3)
    rows = np.array([pick.row for pick in picks])
    assert len(np.unique(rows // 2)) == len(rows) == 15
    assert np.bincount(groups[rows]).max() == 3
    assert num_near >= 15 and num_near + num_capped == 45
    assert choose_rows(z, groups, 10, seed=1) == choose_rows(z, groups, 10, seed=1)
    assert choose_rows(z, groups, 10, seed=1) != choose_rows(z, groups, 10, seed=2)


def test_a_copy_that_the_encoder_takes_for_something_else_is_told_by_its_picture() -> None:
    rng = np.random.default_rng(3)
    z, hashes = rng.normal(size=(6, 16)), rng.integers(0, 256, (6, 32), dtype=np.uint8)
    hashes[5], hashes[3:5] = hashes[0], 0  # 0 and 5 are copies; 3 and 4 have nothing to recognise
    rows = choose_rows(z, np.arange(6), 6, hashes=hashes)
    assert len(rows) == 5 and {0, 5} - set(rows) and {1, 2, 3, 4} <= set(rows)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of six patients, and a small turned copy of one of them, whose features are others."""
    folder = tmp_path_factory.mktemp("archive")
    lines = ["image,patient"]
    for number in range(12):
        (folder / f"{number}.png").write_bytes(draw_bytes(number, (96, 80), "PNG"))
        lines.append(f"{number}.png,p{number // 2}")
    # Rich in detail, as photographs are: a perceptual hash of smooth pictures is mostly rounding.
    blocks = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(blocks).resize((192, 160), Image.Resampling.BICUBIC)
    picture.save(folder / "0.png")
    picture.transpose(Image.Transpose.ROTATE_90).resize((128, 154)).save(folder / "copy.png")
    (folder / "table.csv").write_text("\n".join([*lines, "copy.png,p9"]) + "\n")
    (folder / "known.csv").write_text("image,patient\n0.png,p0\n")
    return folder


@pytest.mark.parametrize("model", ["encoder", "classifier"])
def test_the_table_is_what_adapt_reads(archive: Path, tmp_path: Path, model: str) -> None:
    address = ENCODER if model == "encoder" else str(make_classifier(tmp_path / "clf"))
    out = archive / f"{model}.csv"
    named = [] if model == "encoder" else ["--by", "uncertainty"]
    arguments = ["select", address, str(archive / "table.csv"), "--out", str(out), "--num", "13", "--per-patient", "1"]
    result = CliRunner().invoke(app, [*arguments, "--labelled", str(archive / "known.csv"), *named])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    chosen = {row["image"] for row in rows}
    assert "0.png" not in chosen and "copy.png" not in chosen  # labelled, and a turned copy of it
    assert len(rows) == len({row["patient"] for row in rows}) >= 5
    assert all(row["reason"] and row["label"] == "" and "research" in row["warning"] for row in rows)
    assert ("doubt" in rows[0]["reason"]) == (model == "classifier")
    filled = [{**row, "label": "ab"[number % 2]} for number, row in enumerate(rows)]
    write_table(out, filled)
    assert read_labels(out).classes == ("a", "b")
    with pytest.raises(UserError, match="exists, and labels may have been filled in"):
        select(address, [archive / "table.csv"], out)


def test_doubt_needs_a_classifier(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no classifier folder; run `panfm adapt` first"):
        select(ENCODER, [archive], tmp_path / "x.csv", by="uncertainty")
