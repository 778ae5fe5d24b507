"""A classifier folder is read whole and unchanged or not at all, and says what is wrong in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panfm_predict import PredictError, load_classifier
from panfm_predict.folder import IGNORED, read_lock, verify, write_lock
from tests.predict.made import CLASSES, IMAGE_SIZE, draw_bytes, make_classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("folder") / "clinic", num_cases=4)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "clinic"))


def load_error(folder: Path, relock: bool = False) -> str:
    """The one line that a folder is refused with; relock: as if it had been written so."""
    if relock:
        write_lock(folder)
    with pytest.raises(PredictError) as caught:
        _ = load_classifier(folder).cases
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text.replace(str(folder), "DIR")


def change_card(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "classifier.json").read_text())
    change(values)
    (folder / "classifier.json").write_text(json.dumps(values))


def change_arrays(path: Path, **changes: np.ndarray | None) -> None:
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_the_lock_names_every_file_and_is_stable(folder: Path) -> None:
    before = (folder / "lock.json").read_bytes()
    locked = verify(folder)
    assert locked == read_lock(folder) == write_lock(folder) and (folder / "lock.json").read_bytes() == before
    thumbnails = {f"cases/{number:04d}.jpg" for number in range(4)}
    assert set(locked) == {"classifier.json", "head.npz", "encoder.onnx", "cases.npz", "report.md"} | thumbnails
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_any_file_that_differs_is_refused(folder: Path) -> None:
    for name in read_lock(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert load_error(folder) == f"DIR: {name} is not what was locked; copy the folder again, or fit it anew"
        (folder / name).unlink()
        assert load_error(folder) == f"DIR: {name} is locked but missing; copy the whole folder again"
        (folder / name).write_bytes(content)
    load_classifier(folder)


def test_the_operating_point_cannot_be_moved_by_hand(folder: Path) -> None:
    change_card(folder, lambda card: card["threshold_card"].update(threshold=0.9))
    assert "classifier.json is not what was locked" in load_error(folder)


def test_what_was_added_is_refused_but_for_what_file_managers_leave(folder: Path) -> None:
    for name in IGNORED:
        (folder / name).write_bytes(b"icons")
        (folder / "cases" / name).write_bytes(b"icons")
    load_classifier(folder)
    (folder / "cases/9999.jpg").write_bytes(b"mine")
    assert load_error(folder) == "DIR: cases/9999.jpg was added after the folder was locked; remove it"


def test_a_folder_that_is_none(tmp_path: Path, folder: Path) -> None:
    assert load_error(tmp_path / "absent") == "DIR: no such folder; name one that `panfm adapt` wrote"
    assert load_error(folder / "cases") == "DIR: holds no lock.json; name a folder that `panfm adapt` wrote, whole"
    for content in ("{", "[]", '{"format": 2, "files": {}}', '{"format": 1}'):
        (folder / "lock.json").write_text(content)
        assert "lock.json: " in load_error(folder)
    (folder / "lock.json").write_text('{"format": 1, "files": {}}')
    assert load_error(folder) == "DIR: classifier.json is not locked; copy the whole folder again"


CARDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda card: card.update(panfm_classifier=2), "panfm_classifier is 2; this panfm_predict reads format 1"),
    "no name": (lambda card: card.pop("name"), "name is missing; must be text"),
    "version": (lambda card: card.update(version="1"), "version is '1'; must be a whole number"),
    "one class": (lambda card: card.update(classes=["melanoma"]), "must be a list of 2 or more texts"),
    "twice": (lambda card: card.update(classes=["nevus", "nevus"]), "must be a list of different texts"),
    "positive": (lambda card: card.update(positive="acne"), "positive is 'acne'; must be one of the classes"),
    "share": (lambda card: card["prevalence"].pop("nevus"), "must be the share of each class"),
    "no share": (lambda card: card["prevalence"].update(nevus=0), "prevalence.nevus is 0; must be a number from 1e-09"),
    "cold": (lambda card: card.update(temperature=0), "temperature is 0; must be a number from 1e-06"),
    "text": (lambda card: card["outlier"].update(threshold=None), "outlier.threshold is None; must be a number"),
    "beyond": (lambda card: card["threshold_card"].update(threshold=1.5), "threshold_card.threshold is 1.5; must be"),
    "n": (lambda card: card["threshold_card"]["sensitivity"].pop("n"), "threshold_card.sensitivity.n is missing"),
    "small": (lambda card: card["transform"].update(resize_size=8), "transform.image_size is 48; must be from 1 to"),
    "nearest": (lambda card: card["transform"].update(interpolation="nearest"), "must be bicubic or bilinear"),
    "another size": (lambda card: card["transform"].update(image_size=32), "DIR/encoder.onnx: computes"),
    "warning": (lambda card: card.pop("warning"), "warning is missing; must be text"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_read_strictly(folder: Path, name: str) -> None:
    change, message = CARDS[name]
    change_card(folder, change)
    assert message in load_error(folder, relock=True)


def test_a_card_without_an_operating_point_is_whole(folder: Path) -> None:
    change_card(folder, lambda card: card.update(threshold_card=None, threshold_reason="9 patients", modalities=None))
    write_lock(folder)
    card = load_classifier(folder).card
    assert card.threshold_card is None and card.threshold_reason == "9 patients" and card.modalities is None
    assert card.transform.image_size == IMAGE_SIZE and card.classes == CLASSES


ARRAYS: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "absent": ({"weight": None}, "weight is missing; fit the classifier anew with this panfm"),
    "shape": ({"weight": np.zeros((2, 64))}, "weight is float64 [2, 64]; must be 3 x 64 finite floats: fit it anew"),
    "whole numbers": ({"bias": np.zeros(3, dtype=int)}, "bias is int64 [3]; must be 3 finite floats: fit it anew"),
    "not finite": ({"bias": np.array([0, np.nan, 0])}, "bias is float64 [3]; must be 3 finite floats: fit it anew"),
    "no spread": ({"scale": np.zeros(64)}, "scale is float64 [64]; must be 64 positive floats: fit it anew"),
    "scalar": ({"outlier_residual": np.array(1.0)}, "outlier_residual is float64 []; must be 1 positive floats"),
    "another encoder": ({"mean": np.zeros(7)}, "outlier_components is float64 [8, 64]; must be any x 7 finite floats"),
    "modality": ({"modality_bias": None}, "modality_bias is missing"),
    "quantiles": ({"reference_scores": np.zeros(11)}, "reference_scores is float64 [11]; must be 101 finite floats"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_head_is_read_strictly(folder: Path, name: str) -> None:
    changes, message = ARRAYS[name]
    change_arrays(folder / "head.npz", **changes)
    assert message in load_error(folder, relock=True)


def test_a_head_without_components_is_whole(folder: Path) -> None:
    """Where the fitted images did not differ there is no direction, and the outlier score is a plain distance."""
    nothing = {"outlier_components": np.zeros((0, 64)), "outlier_variances": np.zeros(0)}
    change_arrays(folder / "head.npz", **nothing, reference_quantiles=np.zeros((0, 101)))
    write_lock(folder)
    classifier = load_classifier(folder, threads=1)
    feature = classifier.embed([draw_bytes(0)])
    expected = (classifier.head.standardise(feature) ** 2).mean() / classifier.head.outliers.residual
    assert classifier.predict_features(feature)[0].outlier_score == pytest.approx(float(expected))


def test_nothing_is_unpickled(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "sprung",))

    change_arrays(folder / "head.npz", bias=np.array([Trap()], dtype=object))
    assert "head.npz: cannot be read (Object arrays cannot be loaded" in load_error(folder, relock=True)
    assert not (folder / "sprung").exists()


def test_damage_that_was_locked_in_is_one_line(folder: Path) -> None:
    (folder / "head.npz").write_bytes(b"PK no archive")
    assert "head.npz: cannot be read" in load_error(folder, relock=True)
    shutil.copy(folder / "report.md", folder / "encoder.onnx")
    assert "head.npz" in load_error(folder, relock=True)


def test_a_graph_that_is_none(folder: Path) -> None:
    shutil.copy(folder / "report.md", folder / "encoder.onnx")
    assert "DIR/encoder.onnx: onnxruntime cannot load it" in load_error(folder, relock=True)


def test_cases_belong_together(folder: Path) -> None:
    kept = dict(np.load(folder / "cases.npz"))
    change_arrays(folder / "cases.npz", label=np.array([0, 1, 2, 3]))
    assert "cases.npz: label must lie in 0 to 2" in load_error(folder, relock=True)
    change_arrays(folder / "cases.npz", label=kept["label"][:3])
    assert "cases.npz: label must be 4 whole numbers" in load_error(folder, relock=True)
    change_arrays(folder / "cases.npz", label=kept["label"])
    (folder / "cases/0002.jpg").unlink()
    assert "cases: 0002.jpg is missing" in load_error(folder, relock=True)
