"""What the board may trust: Results whose predictions are theirs, and whose metric follows from those predictions.

    Result + predictions --SHA-256--> TestSet --same images, labels, groups in all--> Run with replicates [R]

Every fault is a UserError that names the file: predictions that are missing or were changed, a metric that does not
follow from them, a Result that is there twice, one name on two encoders, a task measured on two test sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from panfm.board.packs.aggregate import Aggregate
from panfm.errors import UserError
from panfm.evaluation.results import SUBGROUP_PREFIX, Result, make_outcome, read_predictions
from panfm.files import compute_file_sha256
from panfm.measures.by_family import compute_outcome_replicates, compute_point
from panfm.measures.outcomes import Outcome

Floats = NDArray[np.float64]
SAME_VALUE = 1e-6  # a Result's metric and the one recomputed from its predictions


@dataclass(frozen=True)
class Run:
    """One Result on the test set with its primary metric recomputed."""

    result: Result
    value: float | None
    reason: str | None
    replicates: Floats  # [R]


@dataclass(frozen=True)
class TestSet:
    """The units that every encoder must have scored, in order of key, with the scores of this Result.

    subgroups: attribute -> the level of each unit, None where it is unknown.
    """

    result: Result
    path: Path
    keys: NDArray[np.str_]
    outcome: Outcome
    subgroups: Mapping[str, list[str | None]]

    @property
    def groups(self) -> NDArray[np.str_]:
        """Names [N] of what is resampled together."""
        return self.outcome.groups

    @property
    def labels(self) -> NDArray[np.int64]:
        """Classes [N]."""
        return self.outcome.labels

    @property
    def scores(self) -> Floats:
        """Scores [N, K]."""
        return self.outcome.scores


def check_unique(found: Sequence[tuple[Path, Result | Aggregate]]) -> None:
    """Refuse a Result (or aggregate) that is there twice and a name that stands for two encoders."""
    seen: dict[tuple[str, str, str], Path] = {}
    hashes: dict[str, tuple[str, Path]] = {}
    for path, result in found:
        identity = (result.task, result.encoder.name, result.stem)
        if identity in seen:
            raise UserError(
                f"{path}: the same result as {seen[identity]} (task {result.task}, encoder {result.encoder.name}); "
                "a board takes each once, leave one of them out"
            )
        seen[identity] = path
        known, where = hashes.setdefault(result.encoder.name, (result.encoder.hash, path))
        if known != result.encoder.hash:
            raise UserError(
                f"{path}: encoder {result.encoder.name} has hash {result.encoder.hash[:12]}, but {known[:12]} in "
                f"{where}; one name stands for one encoder, rename one or evaluate it again"
            )


def read_test_set(path: Path, result: Result) -> TestSet:
    """Read the predictions of `result` (lying at `path`), refusing any that are not the ones it was made from."""
    file = path.parent / result.predictions
    if not file.is_file():
        raise UserError(f"{file}: the predictions of {path.name} are missing; run `panfm evaluate run` again")
    if compute_file_sha256(file) != result.predictions_sha256:
        raise UserError(
            f"{file}: these are not the predictions that {path.name} was made from (SHA-256 differs from its "
            "predictions_sha256); run `panfm evaluate run` again"
        )
    table = read_predictions(file)
    keys, outcome = make_outcome(table, result.settings.get("grid", ()))
    first = table.filter(pc.equal(table["repeat"], 0)).sort_by([("key", "ascending")])
    subgroups = {
        name.removeprefix(SUBGROUP_PREFIX): first.column(name).to_pylist()
        for name in first.schema.names
        if name.startswith(SUBGROUP_PREFIX)
    }
    return TestSet(result, path, keys, outcome, subgroups)


def check_same_test_set(first: TestSet, other: TestSet) -> None:
    """Refuse predictions of other images, labels or groups, or of another version of the task."""
    for field in ("task_version", "family", "split_hash", "data_hash", "classes", "primary_metric", "synthetic"):
        ours, theirs = getattr(other.result, field), getattr(first.result, field)
        if ours != theirs:
            raise UserError(
                f"{other.path}: {field} of task {other.result.task} is {ours}, but {theirs} in {first.path}; a board "
                "compares encoders on one test set, evaluate the older one again or leave it out"
            )
    pairs = ((first.keys, other.keys), (first.labels, other.labels), (first.groups, other.groups))
    same_targets = np.array_equal(first.outcome.targets, other.outcome.targets)
    if not (same_targets and all(np.array_equal(ours, theirs) for ours, theirs in pairs)):
        raise UserError(
            f"{other.path}: its predictions of task {other.result.task} hold other images, labels or groups than those "
            f"of {first.path}; encoders are compared on the same images only"
        )


def recompute(test_set: TestSet, weights: NDArray[np.uint16]) -> Run:
    """Recompute the primary metric and its replicates under shared bootstrap weights [R, N]."""
    result = test_set.result
    metric = result.primary_metric
    point = compute_point(result.family, metric, test_set.outcome)
    stored = result.metrics[metric].value if metric in result.metrics else None
    differs = (stored is None) != (point.value is None)
    if differs or (stored is not None and point.value is not None and abs(stored - point.value) > SAME_VALUE):
        raise UserError(
            f"{test_set.path}: {metric} is {stored}, but {point.value} follows from its predictions; "
            "the file was changed or is of another version, run `panfm evaluate run` again"
        )
    replicates = compute_outcome_replicates(result.family, [metric], test_set.outcome, weights)[metric]
    return Run(result, point.value, point.reason, replicates)
