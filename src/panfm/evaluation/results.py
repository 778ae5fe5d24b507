"""Result v2 and predictions v2: what a protocol leaves behind, and all that the leaderboard reads.

    results/<task>/<encoder>/<protocol>-<variant>-f<label_fraction>-d<draw>-s<seed>.json      one Result
    results/<task>/<encoder>/<the same>.parquet                                               its predictions

Results on development folds end in `-development`: they choose recipes and stand beside those on test folds.

The predictions are written first, the Result last and atomically: a Result that exists is whole, and a second run skips
it. An undefined metric is null with a reason, never 0.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from panfm.errors import UserError
from panfm.files import compute_file_sha256, open_atomic, read_json, write_json
from panfm.measures.outcomes import Outcome

RESULT_VERSION: Literal[2] = 2
Direction = Literal["higher", "lower"]


class MetricValue(BaseModel):
    """One metric with its 95 % interval, which holds patients together; null with a reason where it is undefined."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    value: float | None
    direction: Direction
    low: float | None = None  # 95 % interval
    high: float | None = None
    method: str | None = None  # how the interval was made: bootstrap, delong_logit, wilson, ...
    reason: str | None = None  # why value or interval is null; beside an interval, why it may not cover what it says


class TrainedOn(BaseModel):
    """One source of an encoder's pretraining, as its facts record it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    data_hash: str
    num_kept: int
    num_excluded: int = 0  # of the test groups of its excluded tasks
    num_audited: int = 0  # listed by its audit


class EncoderCard(BaseModel):
    """What the board says about an encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # as shown; unique on a board
    address: str
    hash: str  # weights + config + transform + pooling + dtype + code version
    num_parameters: int
    flops_per_image: float | None = None  # forward, multiply and add counted apart
    embed_dim: int
    image_size: int
    pooling: str
    training_data: str | None = None  # what is known of it; null = unknown to us
    licence: str | None = None  # of the weights; null = not declared
    access: Literal["open", "request", "private"] | None = None  # who gets the weights; null = not declared
    contamination: Literal["excluded", "none", "unknown"] = "unknown"
    sources: tuple[TrainedOn, ...] | None = None  # null = unknown to us
    excluded_tasks: tuple[str, ...] = ()  # tasks whose test groups were kept out of its pretraining
    audit: str | None = None  # SHA-256 of the audit.json whose images were kept out, too
    energy_kwh: float | None = None


class Result(BaseModel):
    """One (encoder, task with version, protocol, variant, label_fraction, draw, seed).

    N of a test set counts units: what is given one score each (an image; a pair of visits, a slide, a patient, ...).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    result_version: Literal[2] = RESULT_VERSION
    task: str
    task_version: int
    family: str = "classification"
    unit: str = "image"  # what is scored: image, pair, slide, patient, lesion, query
    protocol: str  # linear_probe, knn, finetune, ...
    variant: str = "default"
    label_fraction: float  # share of training PATIENTS (groups) with labels; 0 = nothing is trained
    draw: int  # which random choice of labels
    seed: int  # of the optimisation
    evaluated_on: Literal["test", "development"]
    encoder: EncoderCard
    data_hash: str
    split_hash: str
    group_kind: str  # patient, lesion, slide, sample (= groups unknown)
    classes: tuple[str, ...]
    num_train: int
    num_train_groups: int
    num_pool_groups: int | None = None  # groups that could have had labels: what a small fraction was rounded from
    num_test: int
    num_test_groups: int
    metrics: dict[str, MetricValue]
    primary_metric: str
    settings: dict[str, Any] = Field(default_factory=dict)  # what was chosen: C, k, learning rate, ...
    versions: dict[str, str] = Field(default_factory=dict)
    wall_seconds: float
    synthetic: bool = False  # synthetic images: shown apart from real ones
    predictions: str  # file name beside the Result
    predictions_sha256: str

    @property
    def stem(self) -> str:
        """File name without extension: unique inside results/<task>/<encoder>/."""
        fraction = f"{self.label_fraction:g}"
        ending = "-development" if self.evaluated_on == "development" else ""
        return f"{self.protocol}-{self.variant}-f{fraction}-d{self.draw}-s{self.seed}{ending}"


PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("fold", pa.string(), nullable=False),
        pa.field("repeat", pa.int16(), nullable=False),
        pa.field("draw", pa.int16(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),  # place in classes; 0 in families without
        pa.field("scores", pa.list_(pa.float32()), nullable=False),  # one probability a class, or the family's own
        pa.field("targets", pa.list_(pa.float64()), nullable=False),  # what a family without classes asks for; else []
    ],
    metadata={"panfm_predictions": "2"},
)
AGGREGATE_SUFFIX = ".aggregate.json"  # figures without predictions (`board.aggregate`): beside Results, none itself
VERIFICATION = "verification.json"  # of an accepted pack (`board.accepted`): what was checked of the Results below
SUBGROUP_PREFIX = "subgroup:"  # of further columns, text or null: what the board may tell apart, never who it is


def make_folder_name(name: str) -> str:
    """Make an encoder's or task's name safe as a folder name; different names stay different by their characters."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", name).strip("._") or "_"


def get_result_path(root: str | Path, result: Result) -> Path:
    """Return where `result` lies under a results folder."""
    return Path(root) / make_folder_name(result.task) / make_folder_name(result.encoder.name) / f"{result.stem}.json"


def write_predictions(path: str | Path, predictions: pa.Table) -> str:
    """Write predictions (PREDICTIONS_SCHEMA, then subgroups) atomically and return the file's SHA-256."""
    schema = PREDICTIONS_SCHEMA
    for name in predictions.schema.names[len(schema.names) :]:
        assert name.startswith(SUBGROUP_PREFIX), f"{name} is no column of predictions"
        schema = schema.append(pa.field(name, pa.string()))
    with open_atomic(path) as file:
        pq.write_table(predictions.cast(schema.with_metadata(PREDICTIONS_SCHEMA.metadata)), file)
    return compute_file_sha256(path)


def read_predictions(path: str | Path) -> pa.Table:
    """Read a predictions file; one that is missing or of another layout is a UserError."""
    try:
        table = pq.read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: predictions cannot be read ({error}); run `panfm evaluate run` again") from None
    names = [name for name in table.schema.names if not name.startswith(SUBGROUP_PREFIX)]
    if names != PREDICTIONS_SCHEMA.names:
        raise UserError(
            f"{path}: columns are {names}; predictions v2 has {PREDICTIONS_SCHEMA.names}; "
            "run `panfm evaluate run` again"
        )
    return table


def get_scores(predictions: pa.Table) -> NDArray[np.float64]:
    """Return the scores column as an array [N, K]."""
    return _get_lists(predictions, "scores")


def get_targets(predictions: pa.Table) -> NDArray[np.float64]:
    """Return the targets column as an array [N, T]; T is 0 in families with classes."""
    return _get_lists(predictions, "targets")


def _get_lists(predictions: pa.Table, name: str) -> NDArray[np.float64]:
    flat = np.asarray(predictions.column(name).combine_chunks().flatten(), dtype=np.float64)
    return flat.reshape(len(predictions), len(flat) // max(1, len(predictions)))


def make_outcome(predictions: pa.Table, grid: Sequence[float] = ()) -> tuple[NDArray[np.str_], Outcome]:
    """The scored units in order of key [N], and what their metrics are computed from; scores are means over repeats."""
    table = predictions.sort_by([("key", "ascending"), ("repeat", "ascending")])
    keys, first, number = np.unique(
        np.asarray(table.column("key").to_pylist(), dtype=np.str_), return_index=True, return_inverse=True
    )
    scores = get_scores(table)
    sums = np.zeros((len(keys), scores.shape[1]))
    np.add.at(sums, number, scores)
    outcome = Outcome(
        labels=np.asarray(table.column("label"), dtype=np.int64)[first],
        scores=sums / np.bincount(number, minlength=len(keys))[:, None],
        groups=np.asarray(table.column("group").to_pylist(), dtype=np.str_)[first],
        targets=get_targets(table)[first],
        grid=np.asarray(grid, dtype=np.float64),
    )
    return keys, outcome


def write_result(root: str | Path, result: Result) -> Path:
    """Write a Result atomically under `root` (its predictions must lie there already) and return its path."""
    path = get_result_path(root, result)
    assert (path.parent / result.predictions).is_file(), "predictions are written before their Result"
    write_json(path, result.model_dump(mode="json"))
    return path


def read_result(path: str | Path) -> Result:
    """Read one Result file; a damaged or foreign one is a UserError that names it."""
    try:
        return Result.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(
            f"{path}: not a Result v{RESULT_VERSION}: {key}: {fault['msg']}; run `panfm evaluate run` again"
        ) from None


def find_files(folders: Iterable[Path], pattern: str) -> list[Path]:
    """Find the files below these folders that match, sorted; a folder named .SOMETHING is half written and not read."""
    return sorted(
        path
        for folder in folders
        for path in folder.rglob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_results(roots: Iterable[str | Path]) -> list[tuple[Path, Result]]:
    """Read every Result below the given folders, sorted by path; no Result and no aggregate at all is a UserError."""
    folders = [Path(root) for root in roots]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such results folder; `panfm evaluate run --out {folder}` makes one")
    paths = find_files(folders, "*.json")
    if not paths:
        raise UserError(f"{', '.join(map(str, folders))}: no result files; run `panfm evaluate run` first")
    return [
        (path, read_result(path))
        for path in paths
        if path.name != VERIFICATION and not path.name.endswith(AGGREGATE_SUFFIX)
    ]
