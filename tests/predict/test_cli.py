"""`panfm-predict` and `panfm predict`: the same answers as text, JSON and CSV; what failed is named, the rest kept."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from panfm_predict import cli, load_classifier
from tests.cli.commands import Ended, assert_one_line, panfm
from tests.predict.made import CLASSES, draw_bytes, draw_page, make_classifier

WARNING = "For research only. Not a medical device; gives no diagnosis."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_classifier(tmp_path_factory.mktemp("cli") / "clinic"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a clinic has it: two images, one torn, and a table."""
    out = tmp_path_factory.mktemp("photos")
    (out / "a.JPG").write_bytes(draw_bytes(0))
    (out / "b.png").write_bytes(draw_page())
    (out / "c.jpg").write_bytes(draw_bytes(1)[:-100])
    (out / "table.csv").write_text("not an image")
    return out


@pytest.fixture
def predict(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def call(*words: str) -> Ended:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        out = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, out.out, out.err)

    return call


def test_text(predict: Callable[..., Ended], folder: str, photos: Path) -> None:
    ended = predict(folder, str(photos), "--prevalence", "melanoma=0.05")
    lines = ended.stdout.splitlines()
    assert ended.returncode == 1 and ended.stderr == ""
    assert lines[0].startswith(f"{photos}/a.JPG: other 0.") and lines[0].endswith("; not flagged")
    assert lines[1].startswith(f"{photos}/b.png: ") and lines[2].startswith("    This image is unlike those that ")
    assert lines[3] == "    This image looks clinical; the classifier was fitted on dermoscopic images."
    assert lines[4] == f"{photos}/c.jpg: the file is cut short; copy it again"
    assert lines[5] == (
        "operating point: flagged where the probability of melanoma is at least 0.300 (chosen for sensitivity 0.9; out "
        "of fold sensitivity 0.91 [0.72 to 0.98], specificity 0.64 [0.52 to 0.75])"
    )
    assert lines[6].startswith(
        "probabilities are those at the prevalence melanoma 0.05, nevus 0.475, other 0.475; the "
    )
    assert lines[7:] == ["1 of the images could not be read", WARNING]


def test_json(predict: Callable[..., Ended], folder: str, photos: Path) -> None:
    image = photos / "b.png"
    ended = predict(folder, str(image), str(photos / "absent.jpg"), "--json", "--prevalence", "melanoma=0.05")
    found = json.loads(ended.stdout)
    (expected,) = load_classifier(folder).predict([image], {"melanoma": 0.05})
    good, bad = found["predictions"]
    assert ended.returncode == 1 and found["warning"] == WARNING
    assert good["image"] == str(image) and good["probabilities"] == pytest.approx(expected.probabilities)
    assert good["is_outlier"] is True and good["modality"] == "clinical" and good["notes"] == list(expected.notes)
    assert bad == {
        "image": f"{photos}/absent.jpg",
        "error": f"{photos}/absent.jpg: cannot be read (No such file or directory)",
    }
    assert found["corrected_for"] == pytest.approx({"melanoma": 0.05, "nevus": 0.475, "other": 0.475})
    assert found["threshold_card"]["sensitivity"]["n"] == 22 and found["classifier"]["classes"] == list(CLASSES)


def test_csv(predict: Callable[..., Ended], folder: str, photos: Path) -> None:
    ended = predict(folder, str(photos), "--csv")
    rows = list(csv.DictReader(io.StringIO(ended.stdout)))
    (expected,) = load_classifier(folder).predict([photos / "a.JPG"])
    assert ended.returncode == 1 and [Path(row["image"]).name for row in rows] == ["a.JPG", "b.png", "c.jpg"]
    assert float(rows[0]["p_melanoma"]) == pytest.approx(expected.probabilities["melanoma"], abs=1e-6)
    assert (rows[0]["flagged"], rows[0]["is_outlier"], rows[1]["is_outlier"]) == ("false", "false", "true")
    assert rows[1]["modality"] == "clinical" and "unlike" in rows[1]["notes"] and rows[1]["error"] == ""
    assert rows[2]["p_melanoma"] == "" and "cut short" in rows[2]["error"]
    assert {row["warning"] for row in rows} == {WARNING} and {row["corrected_for"] for row in rows} == {""}
    corrected = predict(folder, str(photos / "a.JPG"), "--csv", "--prevalence", "melanoma=0.05")
    assert corrected.returncode == 0
    (row,) = csv.DictReader(io.StringIO(corrected.stdout))
    assert row["corrected_for"] == "melanoma=0.05 nevus=0.475 other=0.475"


def test_without_images_it_says_what_it_is(predict: Callable[..., Ended], folder: str) -> None:
    ended = predict(folder)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[:5] == [
        "made for tests, version 1 of 2026-11-23 (panfm 0.1.0)",
        "classes: melanoma, nevus, other",
        "modality: dermoscopic",
        "fitted on: 60 images of 40 patients",
        "encoder: test_vit, licences of its training data: Apache-2.0",
    ]
    assert ended.stdout.splitlines()[-1] == WARNING


def test_no_operating_point_has_a_reason(predict: Callable[..., Ended], tmp_path: Path, photos: Path) -> None:
    folder = make_classifier(tmp_path / "few", threshold=None)
    ended = predict(str(folder), str(photos / "a.JPG"))
    assert "flagged" not in ended.stdout
    assert "operating point: none (12 patients with melanoma; at least 20 are needed)" in ended.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["FOLDER", "PHOTOS", "--prevalence", "acne=0.1"], "prevalence of 'acne': no such class"),
        (["FOLDER", "PHOTOS", "--prevalence", "melanoma"], "must be CLASS=SHARE"),
        (["FOLDER", "EMPTY"], "holds no image (.jpg, .jpeg, .png"),
        (["EMPTY", "PHOTOS"], "holds no lock.json"),
        (["nowhere", "PHOTOS"], "nowhere: no such folder"),
    ],
)
def test_a_user_s_mistake_is_one_line(
    predict: Callable[..., Ended], folder: str, photos: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"FOLDER": folder, "PHOTOS": str(photos), "EMPTY": str(tmp_path)}
    words = [places.get(word, word) for word in words]
    ended = predict(*words)
    assert ended.returncode == 2 and ended.stdout == "" and message in ended.stderr
    assert ended.stderr.startswith("panfm-predict: ") and ended.stderr.count("\n") == 1
    assert_one_line(panfm("predict", *words), message)


def test_panfm_predict_gives_the_same(predict: Callable[..., Ended], folder: str, photos: Path) -> None:
    for options in ([], ["--json"], ["--csv", "--prevalence", "melanoma=0.05"]):
        theirs, ours = predict(folder, str(photos), *options), panfm("predict", folder, str(photos), *options)
        assert ours.stdout == theirs.stdout and ours.returncode == theirs.returncode == 1
    assert panfm("predict", folder).stdout == predict(folder).stdout
    assert_one_line(panfm("predict", folder, "--json", "--csv"), "--json and --csv are two forms of one answer")


def test_without_panfm_predict_the_way_out_is_said(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "panfm_predict", None)  # as Python marks what cannot be imported
    assert_one_line(panfm("predict", folder), "needs panfm_predict; run `pip install ./predict` in the checkout")
