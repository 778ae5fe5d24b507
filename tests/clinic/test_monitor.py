"""`panfm monitor` on real small folders: verdicts, exit codes, history, page, and what must not be in them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from panfm.cli.main import app
from panfm.clinic.monitor import monitor
from panfm.errors import UserError
from tests.predict.made import draw_bytes, draw_page, make_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("watch") / "clf")


def write_images(folder: Path, contents: Sequence[bytes], per_patient: int = 1) -> Path:
    folder.mkdir(parents=True)
    lines = ["image,patient"]
    for number, data in enumerate(contents):
        (folder / f"secret{number}.png").write_bytes(data)
        lines.append(f"secret{number}.png,Smith{number // per_patient}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def draw(start: int, num: int = 40) -> list[bytes]:
    """Pictures; 0 to 39 are those that the folder was made from."""
    return [draw_bytes(start + number, kind="PNG") for number in range(num)]


def test_same_images_pass_others_alarm_and_the_history_goes_on(classifier: Path, tmp_path: Path) -> None:
    same, out = write_images(tmp_path / "same", draw(0)), tmp_path / "drift"
    found = monitor(classifier, [same], out, label="week 1")
    assert found.drift.verdict == "no_drift"
    pages = [draw_page() + bytes([number]) for number in range(30)]  # bytes after the end: other files, same picture
    other = write_images(tmp_path / "pages", pages)
    found = monitor(classifier, [other], out, label="week <2>")
    assert found.drift.verdict == "drift"
    checks = {check["name"]: check for check in found.report["checks"]}
    assert checks["outliers"]["value"] == 1 and checks["outliers"]["is_alarm"]
    assert found.report["unexpected_modality"] == 1

    assert [run["label"] for run in found.history] == ["week 1", "week <2>"]
    again = monitor(classifier, [same], out, label="week 1")  # replaces its row
    assert sorted(run["label"] for run in again.history) == ["week 1", "week <2>"]
    stored = json.loads((out / "history.json").read_text())
    assert [run["verdict"] for run in stored["runs"]] == ["drift", "no_drift"]

    page = (out / "drift.html").read_text()
    assert "week &lt;2&gt;" in page and "week <2>" not in page
    assert "<polygon" in page and "no diagnosis" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    for written in out.iterdir():
        assert "secret" not in written.read_text() and "Smith" not in written.read_text()


def test_exit_codes(classifier: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        out = ["--out", str(tmp_path / "d")]
        result = CliRunner().invoke(app, ["monitor", str(classifier), *map(str, arguments), *out])
        return result.exit_code, result.output

    same = write_images(tmp_path / "same", draw(0))
    code, said = run(same, "--label", "a")
    assert code == 0 and "no drift" in said and "drift.html" in said
    (same.parent / "secret3.png").write_bytes(b"no image")
    code, said = run(same, "--label", "a")
    assert code == 1 and "secret3.png" in said  # named on the screen of who asked
    report = json.loads((tmp_path / "d" / "drift.json").read_text())
    assert report["images"]["unreadable"] == 1 and "secret" not in json.dumps(report)
    few = write_images(tmp_path / "few", draw(0, 36), per_patient=2)  # 18 patients
    code, said = run(few, "--label", "b")
    report = json.loads((tmp_path / "d" / "drift.json").read_text())
    assert code == 4 and report["checks"] == [] and report["images"]["compared"] is None and report["classes"] == {}
    code, said = run(write_images(tmp_path / "pages", [draw_page() + bytes([n]) for n in range(30)]))
    assert code == 3
    # A folder without patients is compared all the same, and it is said what that means.
    code, said = run(few.parent, "--label", "c")
    assert code == 0 and "patients are not named" in said
    assert "Patients are not known" in (tmp_path / "d" / "drift.html").read_text()


def test_copies_count_once(classifier: Path, tmp_path: Path) -> None:
    images = draw(0, 22)
    table = write_images(tmp_path / "copies", [*images, *images[:5]], per_patient=30)
    found = monitor(classifier, [table], tmp_path / "out")
    assert found.report["images"]["repeated"] == 5 and found.drift.num_images == 22


@pytest.mark.parametrize("wrong", ["rate", "history", "patients", "folder", "missing"])
def test_wrong_input_is_one_line_and_writes_nothing(classifier: Path, tmp_path: Path, wrong: str) -> None:
    table, out, folder, rate = write_images(tmp_path / "a", draw(0, 3)), tmp_path / "out", classifier, 0.01
    if wrong == "rate":
        rate, expected = 0.5, "--rate 0.5: must lie between"
    elif wrong == "history":
        out.mkdir()
        (out / "history.json").write_text('{"panfm_drift_history": 1, "classifier": "another", "runs": []}')
        expected = "is the history of 'another'"
    elif wrong == "patients":
        (table.parent / "table.csv").write_text("image,patient\nsecret0.png,Smith\nsecret1.png,\n")
        expected = "line 3: patient is empty"
    elif wrong == "folder":
        folder, expected = tmp_path / "a", "holds no lock.json"
    else:
        table.write_text("image\ngone.png\n")
        expected = "no such file; correct the path"
    before = sorted(out.iterdir()) if out.exists() else []
    with pytest.raises(UserError, match=expected) as error:
        monitor(folder, [table], out, rate=rate)
    assert "\n" not in str(error.value)
    assert (sorted(out.iterdir()) if out.exists() else []) == before
