"""What kinds of tasks there are: the fields that only one family has, and the metrics that it is measured by.

    card.family -> its section `target` of the card, its metrics with direction, the rows that have what it asks for

Families that ask for a class use the card's `label` and `classes`; the others name their target in the section alone.
Metrics of families that have no protocol yet are named here with their direction, so that a card of today stays valid.
Needs no torch.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from panfm.measures.metrics import METRICS
from panfm.shards.schema import Modality

Family = Literal[
    "classification",
    "regression",
    "ordinal",
    "segmentation",
    "survival",
    "change",
    "slides",
    "retrieval",
    "zero_shot",
    "ugly_duckling",
    "out_of_distribution",
]
Direction = Literal["higher", "lower"]
# A field of Sample, or one entry of its labels or of its tabular columns.
Column = Annotated[str, Field(pattern=r"^(age|event|follow_up_days|(labels|tabular)\.[A-Za-z0-9_@#. -]+)$")]


class Section(BaseModel):
    """The fields of one family; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RegressionTarget(Section):
    """A number an image: a severity score, an age, a thickness."""

    column: Column
    unit: str
    low: float | None = None  # values outside [low, high] are errors of the source, and counted by the check
    high: float | None = None

    @model_validator(mode="after")
    def _check_range(self) -> "RegressionTarget":
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class SegmentationTarget(Section):
    """A mask an image (`<key>.mask.png`)."""

    structures: tuple[str, ...] = Field(min_length=1)  # what the mask shows: values 1, 2, ... of its pixels, in order
    overlapping: bool = False  # true: a pixel can be of several, so bits 1, 2, 4, ... of its value stand for them


class SurvivalTarget(Section):
    """Time from `time_zero` to an event, one row a patient."""

    outcome: str  # the event in words: recurrence, death of melanoma
    time_zero: str  # what day 0 is: without it two cohorts cannot be compared
    event: Column = "event"  # whether it occurred
    days: Column = "follow_up_days"  # days from time zero to the event, or to the end of follow-up
    competing_events: tuple[str, ...] = ()  # that end follow-up before it: event is 2 for the first, 3, ...; () = none


class ChangeTarget(Section):
    """Two visits of one lesion; the class is that of the later image."""

    pairs: Literal["consecutive", "first_and_last"]
    min_days: int = Field(default=1, ge=0)  # between the two visits
    max_days: int | None = None


class SlidesTarget(Section):
    """All tiles of a slide, or of all slides of a patient, have one class."""

    bag: Literal["slide", "patient"] = "slide"


class RetrievalTarget(Section):
    """For each query, its partners are looked for in a gallery."""

    match: Literal["lesion", "patient", "caption"]
    query: Modality | Literal["first_visit", "image"]
    gallery: Modality | Literal["later_visits", "caption"]

    @model_validator(mode="after")
    def _check_sides(self) -> "RetrievalTarget":
        pairs = {"first_visit": "later_visits", "image": "caption"}
        if self.query in pairs and self.gallery != pairs[self.query]:
            raise ValueError(f"query {self.query} is looked for in gallery {pairs[self.query]}, not {self.gallery}")
        if self.query not in pairs and (self.gallery in pairs.values() or self.query == self.gallery):
            raise ValueError(f"query {self.query} needs a gallery of another modality, not {self.gallery}")
        if (self.match == "caption") != (self.gallery == "caption"):
            raise ValueError("match: caption goes with query: image and gallery: caption, and with nothing else")
        return self


class ZeroShotTarget(Section):
    """Classes named in words, for encoders with a text tower; nothing is trained."""

    phrases: dict[str, tuple[str, ...]]  # class -> what it is called in a prompt
    templates: tuple[str, ...] = ("a photograph of {}",)

    @model_validator(mode="after")
    def _check_templates(self) -> "ZeroShotTarget":
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} needs one {{}}, where the phrase goes")
        return self


class UglyDucklingTarget(Section):
    """The positive class is what looks unlike the other lesions of the same person."""

    within: Literal["patient"] = "patient"
    min_lesions: int = Field(default=5, ge=2)  # a person with fewer has no pattern to differ from


class OutOfDistributionTarget(Section):
    """`classes` are known in training; these values of the label appear only in the test."""

    unknown: tuple[str, ...] = Field(min_length=1)


Target = (
    RegressionTarget
    | SegmentationTarget
    | SurvivalTarget
    | ChangeTarget
    | SlidesTarget
    | RetrievalTarget
    | ZeroShotTarget
    | UglyDucklingTarget
    | OutOfDistributionTarget
)
SECTIONS: dict[Family, type[Target]] = {  # classification and ordinal need nothing but their classes
    "regression": RegressionTarget,
    "segmentation": SegmentationTarget,
    "survival": SurvivalTarget,
    "change": ChangeTarget,
    "slides": SlidesTarget,
    "retrieval": RetrievalTarget,
    "zero_shot": ZeroShotTarget,
    "ugly_duckling": UglyDucklingTarget,
    "out_of_distribution": OutOfDistributionTarget,
}
WITHOUT_CLASSES: frozenset[Family] = frozenset({"regression", "segmentation", "survival", "retrieval"})
BINARY_FAMILIES: frozenset[Family] = frozenset({"ugly_duckling"})

_DISTANCES: Mapping[str, Direction] = {
    "mean_absolute_error": "lower",
    "intraclass_correlation": "higher",
    "spearman": "higher",
}
_OWN_METRICS: Mapping[Family, Mapping[str, Direction]] = {
    "regression": {**_DISTANCES, "root_mean_squared_error": "lower"},
    "ordinal": {**_DISTANCES, "quadratic_kappa": "higher"},
    "segmentation": {"dice": "higher", "jaccard": "higher"},
    "survival": {
        "harrell_c": "higher",
        "uno_c": "higher",
        "time_dependent_auroc": "higher",
        "integrated_brier": "lower",
    },
    "retrieval": {
        "recall_at_1": "higher",
        "recall_at_5": "higher",
        "recall_at_10": "higher",
        "median_rank": "lower",
    },
    "ugly_duckling": {"recall_at_1": "higher", "recall_at_3": "higher"},
    "out_of_distribution": {"unknown_auroc": "higher", "unknown_auprc": "higher", "fpr_at_95_tpr": "lower"},
}


def list_metrics(family: Family) -> dict[str, Direction]:
    """The metrics that a card of this family may name, and which way is better.

    Whatever has classes is measured by the metrics of classification too.
    """
    common: dict[str, Direction] = {} if family in WITHOUT_CLASSES else {k: v.direction for k, v in METRICS.items()}
    return {**common, **_OWN_METRICS.get(family, {})}


def read_target(family: Family, values: Any) -> Target | None:
    """Read the section `target` of a card of this family; the first fault is a ValueError of one line."""
    section = SECTIONS.get(family)
    if section is None:
        if values is not None:
            raise ValueError(f"family {family} has no target; its classes say it all, leave target out")
        return None
    if isinstance(values, section):
        return values
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"target of family {family} must map {', '.join(section.model_fields)} to values")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # An unknown key explains the missing one beside it, so it is named first.
        fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
        key = ".".join(map(str, fault["loc"]))
        known = list(section.model_fields)
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"target of family {family} has no key {key}; {hint}") from None
        if fault["type"] == "missing":
            raise ValueError(f"target of family {family} lacks {key}; it has {', '.join(known)}") from None
        text = fault["msg"].removeprefix("Value error, ")
        raise ValueError(f"target.{key}: {text}" if key else f"target: {text}") from None


def describe_target(target: Target | None, label: str | None) -> str:
    """What an image must have to belong to the task, in words: "the label diagnosis", "a mask"."""
    if label is not None:
        return f"the label {label}"
    if isinstance(target, RegressionTarget):
        return f"a number in {target.column}"
    if isinstance(target, SurvivalTarget):
        return f"{target.event} and {target.days}"
    if isinstance(target, RetrievalTarget):
        return "a caption" if target.match == "caption" else f"a {target.match} id"
    return "a mask"


def find_rows(target: Target | None, table: pa.Table) -> NDArray[np.bool_]:
    """Which rows of a shard set have what a family without classes asks for: bool [N]."""
    if isinstance(target, RegressionTarget):
        return np.isfinite(read_numbers(table, target.column))
    if isinstance(target, SurvivalTarget):
        return np.isfinite(read_numbers(table, target.event)) & np.isfinite(read_numbers(table, target.days))
    if not isinstance(target, RetrievalTarget):
        return _is_known(table, "mask_length")
    if target.match == "caption":
        return _is_known(table, "caption_length")
    known = _is_known(table, f"{target.match}_id")
    if target.query == "first_visit":
        return known & _is_known(table, "visit_day")
    return known & np.isin(table.column("modality").to_pylist(), [target.query, target.gallery])


def _is_known(table: pa.Table, column: str) -> NDArray[np.bool_]:
    return np.array([value is not None for value in table.column(column).to_pylist()], dtype=bool)


def read_numbers(table: pa.Table, column: str) -> NDArray[np.float64]:
    """A column of the samples as numbers [N]; what is unknown or no number is NaN."""
    place, _, name = column.partition(".")
    values: list[Any] = table.column(place).to_pylist()
    if place == "labels":
        values = [dict(entries or ()).get(name) for entries in values]
    elif place == "tabular":
        values = [json.loads(text).get(name) if text else None for text in values]
    return np.array([_to_number(value) for value in values], dtype=np.float64)


def _to_number(value: Any) -> float:
    words = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
    if isinstance(value, str):
        value = words.get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
