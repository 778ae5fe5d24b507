"""`panfm adapt` from a table of images to a folder that panfm_predict uses: whole, locked, repeatable, honest."""

import csv
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from panfm.cli.main import app
from panfm.clinic.adapt import Adapted, adapt, hide_folders
from panfm.clinic.copies import hold_together
from panfm.clinic.fit import fit_classifier, fit_modality_head
from panfm.clinic.folder import pack_head
from panfm.clinic.lora import build_lora_recipe, embed_files
from panfm.clinic.page import Page, Section, render_html, render_markdown
from panfm.clinic.recipes import build_probe_recipe
from panfm.clinic.threshold import OperatingCard, Wanted
from panfm.encoder.load import load_encoder
from panfm.errors import UserError
from panfm_predict import PredictError, load_classifier
from panfm_predict.classifier import compute_probabilities

ENCODER = "timm:test_vit@random:0?image_size=48"
SECRET = "Meyer"  # in file names and patients: must be nowhere in the folder


@dataclass(frozen=True)
class Made:
    table: Path
    out: Path
    adapted: Adapted


def draw(path: Path, rng: np.random.Generator, brightness: float) -> None:
    coarse = rng.integers(0, 60, (6, 6, 3)) + brightness
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((60, 52), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x010E] = SECRET  # ImageDescription
    image.save(path, quality=90, exif=exif)


def read_rows(table: Path) -> list[list[str]]:
    with table.open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """71 pictures of 61 patients; melanomas are brighter, mostly. Ten blue ones beside them are of another modality.

    The last patient's is the first one's, saved again.
    """
    folder = tmp_path_factory.mktemp("clinic")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(70):
        patient = number if number < 60 else number - 60
        name = f"{SECRET}_{number}.jpg"
        draw(folder / name, rng, (90 if patient % 2 else 130) + rng.normal() * 12)
        rows.append((name, "melanoma <b>" if patient % 2 else "naevus", f"{SECRET}{patient}", "dermoscopic"))
    with Image.open(folder / f"{SECRET}_0.jpg") as first:
        first.save(folder / f"{SECRET}_copy.jpg", quality=90)
    rows.append((f"{SECRET}_copy.jpg", "naevus", f"{SECRET}copy", "dermoscopic"))
    for number in range(10):
        Image.fromarray(np.tile(np.array([0, 20 * number, 255], np.uint8), (50, 50, 1))).save(folder / f"b{number}.png")
        rows.append((f"b{number}.png", "none", "other", "clinical"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "patient", "modality"), *rows])
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def made(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("out") / "classifier"
    wanted = Wanted("sensitivity", 0.9)
    made = adapt(
        ENCODER, table, out, positive="melanoma <b>", wanted=wanted, modality="dermoscopic", keep_cases=True, seed=3
    )
    return Made(table, out, made)


@pytest.mark.slow
def test_the_folder_predicts_what_was_fitted(made: Made) -> None:
    classifier = load_classifier(made.out)
    fitted, labelled = made.adapted.fitted, made.adapted.table
    expected = compute_probabilities(fitted.learned.compute_logits(fitted.learned.learned_from), fitted.temperature)
    predictions = classifier.predict([path.read_bytes() for path in labelled.paths])
    found = np.array([[one.probabilities[name] for name in labelled.classes] for one in predictions])
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert isinstance(fitted.card, OperatingCard)
    assert [one.flagged for one in predictions] == (expected[:, 0] >= fitted.card.threshold).tolist()
    assert (
        np.mean([one.top == labelled.classes[label] for one, label in zip(predictions, labelled.labels, strict=True)])
        > 0.8
    )
    assert np.mean([one.is_outlier for one in predictions]) < 0.05
    assert {one.modality for one in predictions} == {"dermoscopic"}
    blue = classifier.predict([path.read_bytes() for path in labelled.others.paths])
    assert all(one.is_outlier and one.modality_unexpected for one in blue)
    assert classifier.find_similar(fitted.learned.learned_from[0], 1)[0].label == labelled.classes[labelled.labels[0]]


@pytest.mark.slow
def test_the_card_says_what_it_was_fitted_on(made: Made) -> None:
    card = json.loads((made.out / "classifier.json").read_text())
    assert card["fitted_on"]["images"] == 71 and card["fitted_on"]["patients"] == 61
    assert card["fitted_on"]["by_class"]["naevus"] == {"images": 36, "patients": 30}  # the copy's patient is one more's
    assert (
        card["version"] == 1 and card["modality"] == "dermoscopic" and card["modalities"] == ["dermoscopic", "clinical"]
    )
    point = card["threshold_card"]
    assert point["sensitivity"]["value"] >= point["target"] == 0.9 and point["sensitivity"]["n"] == 30
    assert sum(card["prevalence"].values()) == pytest.approx(1) and card["threshold_reason"] is None


@pytest.mark.slow
def test_nothing_in_the_folder_says_who_the_patients_are(made: Made) -> None:
    assert len(list((made.out / "cases").iterdir())) == 71
    for path in made.out.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    for thumbnail in (made.out / "cases").iterdir():
        with Image.open(thumbnail) as image:
            assert not image.getexif() and max(image.size) <= 160
    assert (made.out.stat().st_mode & 0o077) == 0  # with cases: for its owner alone


@pytest.mark.slow
def test_the_report_is_one_file_that_fetches_nothing_and_escapes_labels(made: Made) -> None:
    page, text = (made.out / "report.html").read_text(), (made.out / "report.md").read_text()
    assert (
        "melanoma &lt;b&gt;" in page
        and "melanoma <b>" not in page
        and "<b>" not in text.split("```")[0].replace("\\<b>", "")
    )
    assert not re.search(r"(src|href)=|url\(|@import|<script", page) and "default-src 'none'" in page
    assert page.count("<svg") == 1 and "For research only" in page and "must not leave the house" in page
    for said in (
        "AUROC",
        "Threshold card",
        "must not be used for",
        "Slope",
        "71 images of 61 patients",
        "look like one photograph: 1 times",
        "seed 3",
    ):
        assert said in page and said in text, said


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(made: Made) -> None:
    labelled = made.adapted.table
    groups = np.array(hold_together(labelled.groups, made.adapted.copies))
    features = embed_files(load_encoder(ENCODER), labelled.paths)
    recipe = build_probe_recipe(features, labelled.labels, groups, num_classes=2, seed=3)
    fitted = fit_classifier(
        recipe, labelled.labels, groups, classes=labelled.classes, positive=None, wanted=None, unit="patients",
        num_folds=10, seed=3,
    )  # fmt: skip
    head = fit_modality_head(
        fitted.learned,
        groups,
        "dermoscopic",
        embed_files(load_encoder(ENCODER), labelled.others.paths),
        labelled.others.modalities,
        np.array(labelled.others.groups),
        seed=3,
    )
    assert pack_head(fitted, head) == (made.out / "head.npz").read_bytes()


@pytest.mark.slow
def test_adapting_again_with_lora_keeps_the_version_before(made: Made, tmp_path: Path) -> None:
    """By the command line, and without patients: said loudly, on the screen and on the page."""
    out = tmp_path / "again"
    shutil.copytree(made.out, out)
    (out / "report.md").write_text("changed by hand")  # even a folder that no longer fits its lock is kept
    rows = read_rows(made.table)[:40]
    own = made.table.parent / "ungrouped.csv"
    with own.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *(row[:2] for row in rows)])
    answer = CliRunner().invoke(
        app, ["adapt", ENCODER, "--csv", str(own), "--out", str(out), "--method", "lora", "--epochs", "1"]
    )
    assert answer.exit_code == 0, answer.output
    assert "WARNING: no column `patient`" in answer.output and "no operating point: no class was named" in answer.output
    assert "every figure on this page may be too good" in (out / "report.html").read_text()
    classifier = load_classifier(out)
    assert classifier.card.version == 2 and classifier.card.threshold_card is None
    assert classifier.card.fitted_on["patients"] is None and classifier.card.encoder["changed_by"] == "lora"
    plain = load_encoder(ENCODER).embed([made.table.parent / rows[0][0]])
    changed = classifier.embed([made.table.parent / rows[0][0]])
    assert np.abs(changed - plain).max() > 1e-3  # the graph is the changed encoder; `adapt` itself compared the two
    assert (tmp_path / "again-v1" / "report.md").read_text() == "changed by hand"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "again-v1"]  # nothing half-written
    with (out / "head.npz").open("ab") as file:
        file.write(b"!")
    with pytest.raises(PredictError, match="is not what was locked"):
        load_classifier(out)
    (tmp_path / "again-v2").mkdir()
    with pytest.raises(UserError, match="again-v2: exists, and version 2"):
        adapt(ENCODER, own, out)


def test_lora_learns_and_leaves_the_encoder_as_it_was(table: Path) -> None:
    encoder = load_encoder(ENCODER)
    paths = [table.parent / row[0] for row in read_rows(table)[:24]]
    labels, groups = np.arange(24) % 2, np.arange(24)
    features = embed_files(encoder, paths)
    recipe = build_lora_recipe(
        encoder, paths, features, labels, groups, num_classes=2, modality="dermoscopic", seed=0, epochs=2
    )
    train, test = np.arange(16), np.arange(16, 24)
    learned = recipe.learn(train, test, None)
    again = recipe.learn(train, test, None)
    np.testing.assert_array_equal(learned.weight, again.weight)
    np.testing.assert_allclose(embed_files(encoder, paths), features)
    assert learned.network is not None and learned.learned_from.shape == (16, 64) and learned.to_score.shape == (8, 64)
    adapted = embed_files(replace(encoder, module=learned.network), paths)
    np.testing.assert_allclose(adapted[16:], learned.to_score, atol=1e-5)
    assert np.abs(adapted - features).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sensitivity", "0.95"], "--sensitivity 0.95: of which class? name it"),
        (["--positive", "x", "--sensitivity", "95"], "--sensitivity 95: must lie between 0.5 and 1"),
        (["--positive", "x", "--sensitivity", "0.9", "--specificity", "0.9"], "give one"),
        (["--positive", "x"], "--positive x: no image has this label"),
        (["--out", "."], "must name the folder to write"),
    ],
)
def test_what_a_user_gets_wrong_is_told_before_anything_is_computed(
    table: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    arguments = ["adapt", "timm:none", "--csv", str(table), "--modality", "dermoscopic", *out, *options]
    answer = CliRunner().invoke(app, arguments)
    assert isinstance(answer.exception, UserError) and says in str(answer.exception)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(table: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no classifier folder"):
        adapt(ENCODER, table, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_page_escapes_what_people_wrote() -> None:
    section = Section("A | B", ("<script>alert(1)</script>",), heads=("a", "b"), rows=(("x|y", "*z* [l](u)"),))
    page = Page("t <i>", "lead", "warning", ("c",), (section,), "footer")
    html, text = render_html(page), render_markdown(page)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "x\\|y" in text and "\\*z\\*" in text and "\\[l\\]" in text and "\\<script" in text


def test_an_address_tells_the_encoder_and_not_whose_it_was() -> None:
    assert hide_folders("panfm:/home/meyer/exports/first") == "panfm:first"
    assert (
        hide_folders("timm:vit_tiny@../w/meyer/w.safetensors?pooling=cls") == "timm:vit_tiny@w.safetensors?pooling=cls"
    )
    assert hide_folders(ENCODER) == ENCODER
