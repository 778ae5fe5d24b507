"""What a classifier says: PyTorch's features, the mathematics against its textbook form, an answer for every image."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from panfm.encoder.load import load_encoder
from panfm_predict import Classifier, ImageError, PredictError, Prediction, load_classifier
from panfm_predict.classifier import BATCH, compute_probabilities
from panfm_predict.outliers import Outliers, compute_scores, project
from panfm_predict.prior import complete_prevalence, correct, parse_prevalence
from tests.predict.made import CLASSES, ENCODER, draw_bytes, draw_page, make_classifier

FITTED = {"melanoma": 0.2, "nevus": 0.5, "other": 0.3}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = tmp_path_factory.mktemp("classifier") / "clinic"
    return load_classifier(make_classifier(folder, num_cases=8, card={"prevalence": FITTED}), threads=1)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [draw_bytes(7000 + number, (80 + number, 60)) for number in range(BATCH + 5)]


def test_the_features_are_those_of_pytorch(classifier: Classifier, pictures: list[bytes], tmp_path: Path) -> None:
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(picture)
    found = classifier.embed(paths)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, load_encoder(ENCODER).embed(paths), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(classifier.embed(pictures), found, rtol=1e-5, atol=1e-6)
    assert classifier.embed([]).shape == (0, found.shape[1])


def test_a_prediction_is_the_contract_s_arithmetic(classifier: Classifier, pictures: list[bytes]) -> None:
    head = np.load(classifier.folder / "head.npz")
    card = json.loads((classifier.folder / "classifier.json").read_text())
    z = (classifier.embed(pictures) - head["mean"]) / head["scale"]
    expected = softmax((z @ head["weight"].T + head["bias"]) / card["temperature"], axis=1)
    predictions = classifier.predict(pictures)
    for row, prediction in enumerate(predictions):
        assert list(prediction.probabilities) == list(CLASSES)
        assert list(prediction.probabilities.values()) == pytest.approx(expected[row], rel=1e-4)
        assert prediction.top == CLASSES[expected[row].argmax()]
        assert prediction.flagged == (expected[row, 0] >= card["threshold_card"]["threshold"])
        assert prediction.corrected_for is None and "gives no diagnosis" in prediction.warning
        assert prediction.is_outlier == (prediction.outlier_score > card["outlier"]["threshold"])
    assert {one.flagged for one in predictions} == {True, False}
    assert classifier.predict_features(classifier.embed(pictures)) == predictions


def test_probabilities_of_logits_that_would_overflow() -> None:
    logits = np.array([[1e4, 0.0], [-1e4, 1.0], [0.3, 0.1]])
    np.testing.assert_allclose(compute_probabilities(logits, 2.0), softmax(logits / 2.0, axis=1), atol=1e-15)


def test_the_outlier_score_is_a_mahalanobis_distance() -> None:
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.normal(size=(12, 5)))[0].T  # [5, 12], orthonormal
    outliers = Outliers(rng.normal(size=12), rows, np.array([9.0, 5.0, 2.0, 1.0, 0.5]), 0.3)
    covariance = rows.T @ np.diag(outliers.variances) @ rows + 0.3 * (np.eye(12) - rows.T @ rows)
    z = rng.normal(size=(40, 12)) * 3
    away = z - outliers.centre
    expected = np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away) / 12
    np.testing.assert_allclose(compute_scores(z, outliers), expected, rtol=1e-10)
    assert compute_scores(outliers.centre[None], outliers)[0] == 0
    np.testing.assert_allclose(project(z, outliers), away @ rows.T)
    # What the model was fitted on scores 1 on average; so do new draws of it.
    drawn = rng.multivariate_normal(outliers.centre, covariance, 20_000)
    assert compute_scores(drawn, outliers).mean() == pytest.approx(1, abs=0.02)


def test_prevalence_is_corrected_by_bayes_rule() -> None:
    """A test of sensitivity 0.9 and specificity 0.8 at 50 % and at 1 %: the positive predictive value of textbooks."""
    at_half = 0.9 / (0.9 + 0.2)
    expected = 0.9 * 0.01 / (0.9 * 0.01 + 0.2 * 0.99)
    found = correct(np.array([[at_half, 1 - at_half]]), np.array([0.5, 0.5]), np.array([0.01, 0.99]))
    assert found[0, 0] == pytest.approx(expected)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    old, new = np.array([0.2, 0.5, 0.3]), np.array([0.02, 0.9, 0.08])
    there = correct(probabilities, old, new)
    np.testing.assert_allclose(there.sum(1), 1)
    np.testing.assert_allclose(correct(there, new, old), probabilities)
    two = np.random.default_rng(1).dirichlet(np.ones(2), 50)
    moved = correct(two, np.array([0.5, 0.5]), np.array([0.1, 0.9]))
    np.testing.assert_array_equal(np.argsort(two[:, 0]), np.argsort(moved[:, 0]))  # the order of images stays


def test_the_operating_point_is_applied_before_the_correction(classifier: Classifier, pictures: list[bytes]) -> None:
    plain, rare = classifier.predict(pictures), classifier.predict(pictures, {"melanoma": 0.01})
    assert [one.flagged for one in plain] == [one.flagged for one in rare]
    assert all(b.probabilities["melanoma"] < a.probabilities["melanoma"] for a, b in zip(plain, rare, strict=True))
    assert rare[0].corrected_for == pytest.approx({"melanoma": 0.01, "nevus": 0.99 * 5 / 8, "other": 0.99 * 3 / 8})


def test_a_prevalence_is_completed_in_proportion() -> None:
    assert complete_prevalence({"melanoma": 0.05}, FITTED) == pytest.approx(
        {"melanoma": 0.05, "nevus": 0.95 * 5 / 8, "other": 0.95 * 3 / 8}
    )
    whole = {"other": 0.5, "nevus": 0.4, "melanoma": 0.1}
    assert list(complete_prevalence(whole, FITTED).items()) == [("melanoma", 0.1), ("nevus", 0.4), ("other", 0.5)]
    assert parse_prevalence(["melanoma=0.05", "a=b=0.1"]) == {"melanoma": 0.05, "a=b": 0.1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["acne=0.1"], "prevalence of 'acne': no such class; it has melanoma, nevus, other"),
        (["melanoma=5"], "prevalence melanoma=5: must lie between 0 and 1, both excluded; try melanoma=0.05"),
        (["melanoma=0"], "must lie between 0 and 1"),
        (["melanoma=inf"], "must lie between 0 and 1"),
        (["melanoma=0.6", "nevus=0.4"], "prevalences add up to 1: they must leave room for other; lower them"),
        (["melanoma=0.1", "nevus=0.1", "other=0.1"], "add up to 0.3: those of all classes must add up to 1"),
        (["melanoma"], "--prevalence melanoma: must be CLASS=SHARE, such as melanoma=0.05"),
        (["melanoma=much"], "must be CLASS=SHARE"),
        (["melanoma=nan"], "must be CLASS=SHARE"),
        (["melanoma=0.1", "melanoma=0.2"], "--prevalence melanoma: stated twice"),
    ],
)
def test_a_prevalence_that_cannot_be(given: list[str], message: str) -> None:
    with pytest.raises(PredictError) as caught:
        complete_prevalence(parse_prevalence(given), FITTED)
    assert message in str(caught.value)


def test_an_image_unlike_the_fitted_ones_is_said(classifier: Classifier) -> None:
    usual, page = classifier.predict([draw_bytes(0), draw_page()])
    assert not usual.is_outlier and usual.notes == () and usual.modality == "dermoscopic"
    assert page.is_outlier and page.modality == "clinical" and page.modality_unexpected
    assert page.outlier_score > classifier.card.outlier.threshold > usual.outlier_score
    first, second = page.notes
    assert first.startswith("This image is unlike those that the classifier was fitted on (outlier score ")
    assert second == "This image looks clinical; the classifier was fitted on dermoscopic images."


def change(classifier: Classifier, **card: object) -> Classifier:
    return Classifier(classifier.folder, replace(classifier.card, **card), classifier.head, classifier._session)


def test_what_is_unknown_is_none(classifier: Classifier) -> None:
    page = [draw_page()]
    (without,) = change(classifier, threshold_card=None, threshold_reason="9 patients").predict(page)
    assert without.flagged is None
    (blind,) = change(classifier, modalities=None).predict(page)
    assert blind.modality is None and not blind.modality_unexpected and len(blind.notes) == 1
    (unstated,) = change(classifier, modality=None).predict(page)
    assert unstated.modality == "clinical" and not unstated.modality_unexpected


def test_a_damaged_image_does_not_lose_the_others(
    classifier: Classifier, pictures: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "torn.jpg").write_bytes(pictures[0][:-400])
    images: list[bytes | Path | str] = [*pictures]
    images[3], images[BATCH], images[BATCH + 2] = b"no image", tmp_path / "torn.jpg", b""
    images += [str(tmp_path / "absent.png"), tmp_path]
    answers = list(classifier.iterate_predictions(images))
    failed = {place: str(answer) for place, answer in enumerate(answers) if isinstance(answer, ImageError)}
    assert failed == {
        3: "image 4: is no image that can be read; save it as JPEG or PNG",
        BATCH: f"{tmp_path}/torn.jpg: the file is cut short; copy it again",
        BATCH + 2: f"image {BATCH + 3}: is no image that can be read; save it as JPEG or PNG",
        len(pictures): f"{tmp_path}/absent.png: cannot be read (No such file or directory)",
        len(pictures) + 1: f"{tmp_path}: cannot be read (Is a directory)",
    }
    alone = classifier.predict([pictures[place] for place in range(len(pictures)) if place not in failed])
    kept = [answer for answer in answers if isinstance(answer, Prediction)]
    for one, other in zip(kept, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-5)
    with pytest.raises(ImageError, match="image 4: "):
        classifier.predict(images)
    with pytest.raises(ImageError, match="image 4: "):
        classifier.embed(images)


def test_all_damaged_and_none_at_all(classifier: Classifier) -> None:
    answers = list(classifier.iterate_predictions([b"", b"x"]))
    assert [type(answer) for answer in answers] == [ImageError, ImageError]
    assert classifier.predict([]) == []


def test_similar_cases_come_the_most_similar_first(classifier: Classifier) -> None:
    feature = classifier.embed([draw_bytes(5, kind="PNG")])[0]  # case 5 was made from this picture
    similar = classifier.find_similar(feature, k=3)
    assert similar[0].thumbnail.name == "0005.jpg" and similar[0].label == CLASSES[5 % 3]
    assert similar[0].similarity == pytest.approx(1, abs=1e-5)
    assert [case.similarity for case in similar] == sorted((case.similarity for case in similar), reverse=True)
    assert len(classifier.find_similar(feature, k=99)) == 8 and max(case.similarity for case in similar) <= 1 + 1e-9
    with Image.open(similar[0].thumbnail) as thumbnail:
        assert thumbnail.format == "JPEG"


def test_without_kept_cases_none_are_similar(tmp_path: Path) -> None:
    plain = load_classifier(make_classifier(tmp_path / "plain", classes=("benign", "melanoma"), positive="melanoma"))
    assert plain.cases is None and plain.find_similar(plain.embed([draw_bytes(0)])[0]) == []
    (prediction,) = plain.predict([draw_bytes(0)])
    assert sum(prediction.probabilities.values()) == pytest.approx(1) and len(prediction.probabilities) == 2


def test_a_graph_that_fails_is_one_line(classifier: Classifier) -> None:
    class NotFinite:
        def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((len(given["images"]), len(classifier.head.mean)), np.nan, dtype=np.float32)]

    class NoMemory:
        def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            raise RuntimeError("Failed to allocate\nmemory for requested buffer")

    for session, message in (
        (NotFinite(), "encoder.onnx gives a feature that is not finite; export the encoder anew"),
        (NoMemory(), "encoder.onnx could not be computed (Failed to allocate memory for requested buffer); free some"),
    ):
        broken = Classifier(classifier.folder, classifier.card, classifier.head, session)
        check: Callable[[list[bytes]], object]
        for check in (broken.predict, broken.embed):
            with pytest.raises(PredictError, match=re.escape(message)):
                check([draw_bytes(0)])
