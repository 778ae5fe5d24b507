"""The classifier: image -> features (ONNX) -> probabilities, operating point, outlier score, and what to say about it.

    bytes  --prepare-->  uint8 [3, S, S]  --encoder.onnx-->  features [B, D]  --standardise-->  z [B, D]
    z  --weight, bias, temperature-->  probabilities at the fitted prevalence  -->  flagged or not
    probabilities  --prior.correct-->  those at this clinic's prevalence          z  --outliers-->  score

The mathematics is here once: panfm.clinic measures its out-of-fold figures with these functions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm_predict.card import Card, read_card
from panfm_predict.errors import ImageError, PredictError
from panfm_predict.folder import CARD, GRAPH, HEAD, Cases, Head, read_cases, read_head, verify
from panfm_predict.outliers import compute_scores
from panfm_predict.prior import complete_prevalence, correct
from panfm_predict.transform import prepare

BATCH = 16  # images at once: what a small computer's memory holds beside the weights of a ViT-L

Floats = NDArray[np.floating]
Image = Path | str | bytes  # a path, or the bytes of a file


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one image.

    probabilities: {class: probability}, in the classes' order; under `corrected_for` where it is not None. top: the
    class of the largest. flagged: whether the probability at the fitted prevalence reaches the operating point; None
    where there is none. modality: what the image looks like; None where examples of other modalities were never given.
    notes: sentences that a reader must see.
    """

    probabilities: dict[str, float]
    top: str
    flagged: bool | None
    outlier_score: float
    is_outlier: bool
    modality: str | None
    modality_unexpected: bool
    corrected_for: dict[str, float] | None
    notes: tuple[str, ...]
    warning: str


@dataclass(frozen=True)
class SimilarCase:
    """A fitted image that was kept: its label, the cosine similarity of standardised features, its thumbnail."""

    label: str
    similarity: float
    thumbnail: Path


def compute_probabilities(logits: Floats, temperature: float) -> NDArray[np.float64]:
    """Softmax of logits [B, K] over the temperature: float64 [B, K] (Guo et al. 2017)."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def load_classifier(folder: Path | str, threads: int = 0) -> "Classifier":
    """Load a classifier folder whose files are what was locked. threads: 0 = as many as there are cores.

    Raises PredictError: no such folder, a file that differs, is missing or was added, or a format that is not known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PredictError(f"{folder}: no such folder; name one that `panfm adapt` wrote")
    verify(folder)
    card = read_card(folder / CARD)
    head = read_head(folder / HEAD, len(card.classes), None if card.modalities is None else len(card.modalities))
    session = _open_graph(folder / GRAPH, card.transform.image_size, len(head.mean), threads)
    return Classifier(folder, card, head, session)


class Classifier:
    """A loaded classifier folder; made by `load_classifier`. It keeps nothing of the images that it sees."""

    def __init__(self, folder: Path, card: Card, head: Head, session: Any) -> None:
        self.folder = folder
        self.card = card
        self.head = head
        self._session = session

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, in the order of all arrays."""
        return self.card.classes

    @cached_property
    def cases(self) -> Cases | None:
        """The fitted images that were kept (`panfm adapt --keep-cases`); None where none were."""
        return read_cases(self.folder, len(self.head.mean), len(self.classes))

    def predict(self, images: Sequence[Image], prevalence: Mapping[str, float] | None = None) -> list[Prediction]:
        """Predict images given as paths or bytes.

        prevalence: {class: share} where the images come from; classes that are not named share the rest as fitted.

        Raises ImageError at the first image that cannot be read (`iterate_predictions` goes on), PredictError for a
        prevalence that cannot be.
        """
        predictions = []
        for answer in self.iterate_predictions(images, prevalence):
            if isinstance(answer, ImageError):
                raise answer
            predictions.append(answer)
        return predictions

    def iterate_predictions(
        self, images: Sequence[Image], prevalence: Mapping[str, float] | None = None
    ) -> Iterator[Prediction | ImageError]:
        """Yield a Prediction of each image in order, or the ImageError that names it: the others are not lost."""
        shares = self._complete(prevalence)
        for start in range(0, len(images), BATCH):
            batch = range(start, min(start + BATCH, len(images)))
            pixels: dict[int, NDArray[np.uint8]] = {}
            answers: dict[int, Prediction | ImageError] = {}
            for number in batch:
                try:
                    pixels[number] = _prepare(images[number], number, self.card)
                except ImageError as error:
                    answers[number] = error
            if pixels:
                predictions = self._predict_features(self._run(np.stack(list(pixels.values()))), shares)
                answers.update(zip(pixels, predictions, strict=True))
            yield from (answers[number] for number in batch)

    def embed(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Compute the features of images given as paths or bytes: float32 [B, D]. Raises ImageError."""
        parts = [np.empty((0, len(self.head.mean)), dtype=np.float32)]
        for start in range(0, len(images), BATCH):
            batch = enumerate(images[start : start + BATCH], start)
            parts.append(self._run(np.stack([_prepare(image, number, self.card) for number, image in batch])))
        return np.concatenate(parts)

    def predict_features(self, features: Floats, prevalence: Mapping[str, float] | None = None) -> list[Prediction]:
        """Predict from features [B, D] as `embed` gives them. Raises PredictError."""
        return self._predict_features(features, self._complete(prevalence))

    def find_similar(self, feature: Floats, k: int = 5) -> list[SimilarCase]:
        """Return the k kept cases most like a feature [D], the most similar first; none where no cases were kept."""
        if self.cases is None or len(self.cases.labels) == 0:
            return []
        similarities = (
            _unit(self.head.standardise(self.cases.features)) @ _unit(self.head.standardise(feature[None]))[0]
        )
        nearest = np.argsort(-similarities, kind="stable")[:k]
        return [
            SimilarCase(
                self.classes[int(self.cases.labels[place])], float(similarities[place]), self.cases.thumbnails[place]
            )
            for place in nearest
        ]

    def _complete(self, prevalence: Mapping[str, float] | None) -> dict[str, float] | None:
        return complete_prevalence(prevalence, self.card.prevalence) if prevalence else None

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            features: NDArray[np.float32] = self._session.run(None, {"images": pixels})[0]
        except Exception as error:  # out of memory, above all; onnxruntime's classes derive from nothing narrower
            line = " ".join(str(error).split())
            raise PredictError(f"{self.folder}: {GRAPH} could not be computed ({line}); free some memory") from None
        if not np.isfinite(features).all():
            raise PredictError(f"{self.folder}: {GRAPH} gives a feature that is not finite; export the encoder anew")
        return features

    def _predict_features(self, features: Floats, shares: dict[str, float] | None) -> list[Prediction]:
        z = self.head.standardise(features)  # [B, D]
        fitted = compute_probabilities(z @ self.head.weight.T + self.head.bias, self.card.temperature)  # [B, K]
        shown = fitted
        if shares is not None:
            old, new = ([share[name] for name in self.classes] for share in (self.card.prevalence, shares))
            shown = correct(fitted, np.array(old), np.array(new))
        scores = compute_scores(z, self.head.outliers)
        looks = self._compute_modalities(z)
        return [
            self._describe(fitted[row], shown[row], float(scores[row]), looks[row], shares) for row in range(len(z))
        ]

    def _compute_modalities(self, z: Floats) -> list[str | None]:
        names, weight, bias = self.card.modalities, self.head.modality_weight, self.head.modality_bias
        if names is None or weight is None or bias is None:
            return [None] * len(z)
        return [names[place] for place in (z @ weight.T + bias).argmax(axis=1)]

    def _describe(
        self, fitted: Floats, shown: Floats, score: float, looks: str | None, shares: dict[str, float] | None
    ) -> Prediction:
        card, notes = self.card, []
        flagged = None
        if card.threshold_card is not None:
            place = self.classes.index(card.threshold_card.positive)
            flagged = bool(fitted[place] >= card.threshold_card.threshold)  # at the prevalence that it was measured at
        is_outlier = score > card.outlier.threshold
        if is_outlier:
            notes.append(
                f"This image is unlike those that the classifier was fitted on (outlier score {score:.2f}, above "
                f"{card.outlier.threshold:.2f}); do not rely on its probabilities."
            )
        unexpected = None not in (looks, card.modality) and looks != card.modality
        if unexpected:
            notes.append(f"This image looks {looks}; the classifier was fitted on {card.modality} images.")
        return Prediction(
            probabilities={name: float(value) for name, value in zip(self.classes, shown, strict=True)},
            top=self.classes[int(shown.argmax())],
            flagged=flagged,
            outlier_score=score,
            is_outlier=is_outlier,
            modality=looks,
            modality_unexpected=unexpected,
            corrected_for=shares,
            notes=tuple(notes),
            warning=card.warning,
        )


def _prepare(image: Image, number: int, card: Card) -> NDArray[np.uint8]:
    """Pixels of one image; its errors name it, by its place where it came as bytes."""
    name = f"image {number + 1}" if isinstance(image, bytes) else str(image)
    try:
        return prepare(image if isinstance(image, bytes) else Path(image).read_bytes(), card.transform)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from None
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None


def _unit(vectors: Floats) -> NDArray[np.float64]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float64] = vectors / np.maximum(lengths, 1e-12)
    return unit


def _open_graph(path: Path, image_size: int, num_features: int, threads: int) -> Any:
    """The graph as a session of onnxruntime, if it is one of pixels to features of the head's length."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # Microsoft's builds for Windows report use to the system's diagnostics
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings are for who makes graphs
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes derive from nothing narrower
        line = " ".join(str(error).split())
        raise PredictError(f"{path}: onnxruntime cannot load it ({line}); update onnxruntime") from None
    given, found = session.get_inputs(), session.get_outputs()
    facts = [(one.name, one.type, list(one.shape)[1:]) for one in (*given, *found)]
    wanted = [
        ("images", "tensor(uint8)", [3, image_size, image_size]),
        ("features", "tensor(float)", [num_features]),
    ]
    if facts != wanted:
        raise PredictError(f"{path}: computes {facts}; must be {wanted}: fit the classifier anew")
    return session
