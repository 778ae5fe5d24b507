"""What the page is told, as plain values: the card once, and for each image its prediction and similar cases.

    Card        --describe_card-->  dict
    bytes       --answer-->         dict       predict, at this clinic's prevalence too, and the most similar cases

Facts only, no sentences: the page has its words in two languages. No number is computed here or in the page.
"""

import base64
from dataclasses import asdict
from typing import Any

import numpy as np

from panfm_predict.card import Card
from panfm_predict.classifier import Classifier, Prediction, SimilarCase
from panfm_predict.errors import ImageError

NUM_SIMILAR = 5


def describe_card(card: Card, num_cases: int, max_bytes: int) -> dict[str, Any]:
    """The card for the page. num_cases: fitted images kept to be shown; max_bytes: of an image that may be sent."""
    transform = card.transform
    return {
        "name": card.name,
        "version": card.version,
        "created": card.created,
        "panfm_version": card.panfm_version,
        "classes": list(card.classes),
        "positive": card.positive,
        "modality": card.modality,
        "prevalence": card.prevalence,
        "threshold_card": None if card.threshold_card is None else asdict(card.threshold_card),
        "threshold_reason": card.threshold_reason,
        "outlier": {"threshold": card.outlier.threshold, "quantile": card.outlier.quantile},
        "knows_modalities": card.modalities is not None,
        "encoder": {key: card.encoder.get(key) for key in ("name", "hash", "licences")},
        "fitted_on": card.fitted_on,
        "warning": card.warning,
        "seen_share": transform.image_size / transform.resize_size,  # of the shorter side, in the middle
        "num_cases": num_cases,
        "max_bytes": max_bytes,
    }


def answer(classifier: Classifier, data: bytes, share: float | None) -> dict[str, Any]:
    """Predict one image, given as stored bytes.

    share: of the class of interest among this clinic's images, for the corrected probabilities; None for none. An image
    that cannot be read is an answer too, {"unreadable": True}: a browser would write any other status to its console.
    Raises PredictError.
    """
    try:
        feature = classifier.embed([data])[0]  # [D], once for all three
    except ImageError:
        return {"unreadable": True}
    prediction = classifier.predict_features(feature[np.newaxis])[0]
    corrected = None
    positive = classifier.card.positive
    if share is not None and positive is not None:
        corrected = classifier.predict_features(feature[np.newaxis], {positive: share})[0]
    return describe(classifier.card, prediction, corrected, classifier.find_similar(feature, NUM_SIMILAR))


def describe(
    card: Card, prediction: Prediction, corrected: Prediction | None, similar: list[SimilarCase]
) -> dict[str, Any]:
    """A prediction for the page; the flag is that of the fitted prevalence, for which the threshold was measured."""
    shown = corrected or prediction
    return {
        "probabilities": shown.probabilities,
        "top": shown.top,
        "uncorrected": prediction.probabilities,
        "corrected_for": shown.corrected_for,
        "flagged": prediction.flagged,
        "outlier_score": prediction.outlier_score,
        "is_outlier": prediction.is_outlier,
        "modality": prediction.modality,
        "modality_unexpected": prediction.modality_unexpected,
        "warning": prediction.warning,
        "similar": [
            {
                "label": case.label,
                "similarity": case.similarity,
                "thumbnail": "data:image/jpeg;base64," + base64.b64encode(case.thumbnail.read_bytes()).decode("ascii"),
            }
            for case in similar
        ],
    }
