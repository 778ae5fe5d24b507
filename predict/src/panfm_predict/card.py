"""classifier.json: what a classifier is, what it was fitted on and what it is not; read strictly.

    classifier.json  --read_card-->  Card

A file that misses a key, or has a value of another type, was not written by panfm or was changed by hand; it is refused
with the key's name rather than understood in part.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panfm_predict.errors import PredictError
from panfm_predict.transform import Transform

FORMAT = 1
WARNING = "For research only. Not a medical device; gives no diagnosis."


@dataclass(frozen=True)
class Rate:
    """A share measured on n patients (images where patients are not known), with its 95 % interval; None: undefined."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class ThresholdCard:
    """The operating point: an image whose uncorrected probability of `positive` is at least `threshold` is flagged.

    wanted, target: what the threshold was chosen for, such as "sensitivity" 0.9. The rates are out-of-fold.
    """

    positive: str
    wanted: str
    target: float
    threshold: float
    sensitivity: Rate
    specificity: Rate


@dataclass(frozen=True)
class OutlierRule:
    """An outlier score above `threshold` marks an image; `quantile` of the fitted images lie below it, out of fold."""

    threshold: float
    quantile: float
    method: str


@dataclass(frozen=True)
class Card:
    """The content of classifier.json. threshold_reason: why there is no operating point; None where there is one."""

    name: str
    version: int
    created: str
    panfm_version: str
    classes: tuple[str, ...]
    positive: str | None
    modality: str | None
    modalities: tuple[str, ...] | None
    transform: Transform
    temperature: float
    prevalence: dict[str, float]
    threshold_card: ThresholdCard | None
    threshold_reason: str | None
    outlier: OutlierRule
    encoder: dict[str, Any]
    fitted_on: dict[str, Any]
    warning: str


def read_card(path: Path) -> Card:
    """Read classifier.json. Raises PredictError that names the file and the key."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PredictError(f"{path.parent}: holds no {path.name}; name a folder that `panfm adapt` wrote") from None
    except (OSError, ValueError) as error:
        raise PredictError(f"{path}: cannot be read ({error}); copy the folder again") from None
    found = values.get("panfm_classifier") if isinstance(values, dict) else None
    if found != FORMAT:
        raise PredictError(
            f"{path}: panfm_classifier is {found!r}; this panfm_predict reads format {FORMAT}: install the one that "
            "came with the panfm that wrote it"
        )
    return _parse(_Reader(path, values))


@dataclass(frozen=True)
class _Reader:
    """One object of the file; every look at it checks the type. prefix: where it lies, for errors."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def fail(self, key: str, rule: str) -> PredictError:
        found = "missing" if key not in self.values else repr(self.values[key])
        return PredictError(f"{self.path}: {self.prefix}{key} is {found}; must be {rule}: copy the folder again")

    def text(self, key: str) -> str:
        if not isinstance(value := self.values.get(key), str):
            raise self.fail(key, "text")
        return value

    def text_or_none(self, key: str) -> str | None:
        return None if key in self.values and self.values[key] is None else self.text(key)

    def whole(self, key: str) -> int:
        if not isinstance(value := self.values.get(key), int) or isinstance(value, bool) or value < 0:
            raise self.fail(key, "a whole number")
        return value

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, "a number" if low == -math.inf else f"a number from {low:g} to {high:g}")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return None if key in self.values and self.values[key] is None else self.number(key, 0, 1)

    def texts(self, key: str, least: int) -> tuple[str, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) < least or not all(isinstance(text, str) for text in value):
            raise self.fail(key, f"a list of {least} or more texts")
        if len(set(value)) < len(value):
            raise self.fail(key, "a list of different texts")
        return tuple(value)

    def inner(self, key: str) -> "_Reader":
        if not isinstance(value := self.values.get(key), dict):
            raise self.fail(key, "an object")
        return _Reader(self.path, value, f"{self.prefix}{key}.")


def _parse(top: _Reader) -> Card:
    classes = top.texts("classes", 2)
    shares = top.inner("prevalence")
    if set(shares.values) != set(classes):
        raise top.fail("prevalence", "the share of each class")
    positive, threshold_card = top.text_or_none("positive"), None
    if top.values.get("threshold_card") is not None:
        threshold_card = _parse_threshold(top.inner("threshold_card"))
    for name in (positive, threshold_card.positive if threshold_card else None):
        if name is not None and name not in classes:
            raise top.fail("positive", "one of the classes")
    outlier = top.inner("outlier")
    return Card(
        name=top.text("name"),
        version=top.whole("version"),
        created=top.text("created"),
        panfm_version=top.text("panfm_version"),
        classes=classes,
        positive=positive,
        modality=top.text_or_none("modality"),
        modalities=None if top.values.get("modalities") is None else top.texts("modalities", 2),
        transform=_parse_transform(top.inner("transform")),
        temperature=top.number("temperature", 1e-6, 1e6),
        prevalence={name: shares.number(name, 1e-9, 1) for name in classes},
        threshold_card=threshold_card,
        threshold_reason=top.text_or_none("threshold_reason"),
        outlier=OutlierRule(outlier.number("threshold"), outlier.number("quantile", 0, 1), outlier.text("method")),
        encoder=dict(top.inner("encoder").values),
        fitted_on=dict(top.inner("fitted_on").values),
        warning=top.text("warning"),
    )


def _parse_threshold(card: _Reader) -> ThresholdCard:
    wanted = card.text("wanted")
    if wanted not in ("sensitivity", "specificity"):
        raise card.fail("wanted", "sensitivity or specificity")
    rates = []
    for side in ("sensitivity", "specificity"):
        rate = card.inner(side)
        bounds = (rate.number_or_none("value"), rate.number_or_none("low"), rate.number_or_none("high"))
        rates.append(Rate(*bounds, n=rate.whole("n")))
    return ThresholdCard(
        card.text("positive"), wanted, card.number("target", 0, 1), card.number("threshold", 0, 1), rates[0], rates[1]
    )


def _parse_transform(plain: _Reader) -> Transform:
    size, resize = plain.whole("image_size"), plain.whole("resize_size")
    if not 0 < size <= resize:
        raise plain.fail("image_size", f"from 1 to resize_size, {resize}")
    if plain.text("interpolation") not in ("bicubic", "bilinear"):
        raise plain.fail("interpolation", "bicubic or bilinear")
    colours = []
    for key in ("mean", "std"):
        value = plain.values.get(key)
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(part, int | float) for part in value):
            raise plain.fail(key, "three numbers")
        colours.append((float(value[0]), float(value[1]), float(value[2])))
    return Transform(size, resize, plain.text("interpolation"), colours[0], colours[1])
