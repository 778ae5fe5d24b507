"""What every protocol shares: one trial (which images train, which are scored) and the Result that it leaves behind.

    Split + fold choice + fraction + draw + seed -> Trial      Trial + Scored -> predictions (.parquet) + Result (.json)

A protocol is a pure step from a trial's training part to probabilities for its test part; it never sees a test label.
"""

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm import __version__
from panfm.errors import UserError
from panfm.evaluation.results import (
    PREDICTIONS_SCHEMA,
    EncoderCard,
    MetricValue,
    Result,
    get_result_path,
    read_result,
    write_predictions,
    write_result,
)
from panfm.evaluation.splits import Split, compute_label_subset
from panfm.evaluation.tasks import TaskCard
from panfm.files import compute_file_sha256, compute_json_hash
from panfm.measures.metrics import METRICS
from panfm.measures.statistics import compute_bootstrap_seed, estimate_metrics
from panfm.shards.index import ShardSet

Protocol = Literal["linear_probe", "knn", "prototype", "finetune", "metadata_fusion", "panderm_compat", "dinov2_compat"]
EvaluatedOn = Literal["test", "development"]
# Recipes are chosen on `development`, which never touches the test fold; the test fold is then looked at once.
TRAIN_FOLDS: dict[EvaluatedOn, tuple[str, ...]] = {"test": ("train", "val"), "development": ("train",)}
TEST_FOLD: dict[EvaluatedOn, str] = {"test": "test", "development": "val"}


@dataclass(frozen=True)
class Trial:
    """One measurement to make. `train` and `test` are places in the split's arrays (int64 [N], int64 [M]).

    recipe: the protocol's settings as plain values, `variant` among them; a Result made with another recipe is stale.
    """

    card: TaskCard
    split: Split
    encoder: EncoderCard
    data_hash: str
    protocol: Protocol
    recipe: dict[str, Any]
    evaluated_on: EvaluatedOn
    label_fraction: float
    draw: int
    seed: int
    num_replicates: int
    train: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """Number of classes K, whether or not all of them occur."""
        return len(self.card.classes)


@dataclass(frozen=True)
class Scored:
    """What a protocol returns: probabilities [M, K] for the test part, and what it chose (plain values)."""

    scores: NDArray[np.float64]
    chosen: dict[str, Any] = field(default_factory=dict)


def build_trial(
    card: TaskCard,
    split: Split,
    encoder: EncoderCard,
    shard_set: ShardSet,
    *,
    protocol: Protocol,
    recipe: dict[str, Any],
    evaluated_on: EvaluatedOn,
    label_fraction: float,
    draw: int,
    seed: int,
    num_replicates: int,
) -> Trial:
    """Choose the labelled training images and the images to score.

    Raises UserError where there is nothing to learn from: no image to score, or one class only in training.
    """
    pool = split.find(*TRAIN_FOLDS[evaluated_on])
    test = split.find(TEST_FOLD[evaluated_on])
    if len(test) == 0:
        raise UserError(
            f"task {card.name}: no image in the fold {TEST_FOLD[evaluated_on]!r}, which evaluate_on: {evaluated_on} "
            f"scores; give its split a {TEST_FOLD[evaluated_on]} fold"
        )
    subset = compute_label_subset(
        split.labels[pool],
        split.groups[pool],
        fraction=label_fraction,
        draw=draw,
        task=card.name,
        split_hash=split.hash,
    )
    train = pool[subset]
    present = np.unique(split.labels[train])
    if len(present) < 2:
        raise UserError(
            f"task {card.name}: the {len(train)} labelled training images are all {card.classes[present[0]]!r}; "
            f"at least two classes are needed, use a larger label fraction than {label_fraction:g} or more images"
        )
    return Trial(
        card=card,
        split=split,
        encoder=encoder,
        data_hash=split.compute_data_hash(shard_set),
        protocol=protocol,
        recipe=recipe,
        evaluated_on=evaluated_on,
        label_fraction=label_fraction,
        draw=draw,
        seed=seed,
        num_replicates=num_replicates,
        train=train,
        test=test,
    )


def find_result(root: Path, trial: Trial) -> Path | None:
    """Return the path of the Result that this trial would write again, or None if there is none or it is stale.

    Stale: made with another encoder, other images, another split, task version, class order, recipe or set of metrics
    under the same names, or its predictions are gone or were changed.
    """
    path = get_result_path(root, _build_result(trial, Scored(np.zeros((0, trial.num_classes))), {}, "", 0.0))
    if not path.is_file():
        return None
    try:
        result = read_result(path)
    except UserError:  # of another version or damaged: it is made again
        return None
    predictions = path.parent / result.predictions
    fresh = (
        result.encoder.hash == trial.encoder.hash
        and result.data_hash == trial.data_hash
        and result.split_hash == trial.split.hash
        and result.task_version == trial.card.version
        and result.classes == trial.card.classes
        and result.settings.get("recipe") == trial.recipe
        and result.settings.get("num_replicates") == trial.num_replicates
        and result.settings.get("train_keys_hash") == _compute_keys_hash(trial)
        and set(result.metrics) == set(trial.card.metrics)
        and result.primary_metric == trial.card.primary_metric
        and predictions.is_file()
        and compute_file_sha256(predictions) == result.predictions_sha256
    )
    return path if fresh else None


def write_trial(root: Path, trial: Trial, scored: Scored, wall_seconds: float) -> Path:
    """Write the predictions, then the Result with every metric and its interval; returns the Result's path."""
    split, test = trial.split, trial.test
    assert scored.scores.shape == (len(test), trial.num_classes), "one probability a class, one row an image"
    assert np.isfinite(scored.scores).all(), "a protocol returned probabilities that are not finite"
    predictions = pa.table(
        {
            "key": split.keys[test].tolist(),
            "group": split.groups[test].tolist(),
            "fold": split.folds[test].tolist(),
            "repeat": np.zeros(len(test), np.int16),
            "draw": np.full(len(test), trial.draw, np.int16),
            "label": split.labels[test].astype(np.int16),
            "scores": scored.scores.astype(np.float32).tolist(),
        },
        schema=PREDICTIONS_SCHEMA,
    )
    # Metrics come from the scores as they are stored: whoever recomputes them from the file gets the same numbers.
    estimates = estimate_metrics(
        trial.card.metrics,
        split.labels[test],
        scored.scores.astype(np.float32).astype(np.float64),
        split.groups[test],
        seed=compute_bootstrap_seed(trial.card.name, split.hash),
        num_replicates=trial.num_replicates,
    )
    metrics = {
        name: MetricValue(
            value=estimate.value,
            direction=METRICS[name].direction,
            low=estimate.low,
            high=estimate.high,
            method=estimate.method,
            reason=estimate.reason,
        )
        for name, estimate in estimates.items()
    }
    path = get_result_path(root, _build_result(trial, scored, metrics, "", wall_seconds))
    path.unlink(missing_ok=True)  # a stale Result must not stand beside predictions that are not its own
    sha256 = write_predictions(path.with_suffix(".parquet"), predictions)
    return write_result(root, _build_result(trial, scored, metrics, sha256, wall_seconds))


def _build_result(
    trial: Trial, scored: Scored, metrics: dict[str, MetricValue], predictions_sha256: str, wall_seconds: float
) -> Result:
    split = trial.split
    result = Result(
        task=trial.card.name,
        task_version=trial.card.version,
        protocol=trial.protocol,
        variant=trial.recipe["variant"],
        label_fraction=trial.label_fraction,
        draw=trial.draw,
        seed=trial.seed,
        evaluated_on=trial.evaluated_on,
        encoder=trial.encoder,
        data_hash=trial.data_hash,
        split_hash=split.hash,
        group_kind=split.group_kind,
        classes=trial.card.classes,
        num_train=len(trial.train),
        num_train_groups=len(np.unique(split.groups[trial.train])),
        num_test=len(trial.test),
        num_test_groups=len(np.unique(split.groups[trial.test])),
        metrics=metrics,
        primary_metric=trial.card.primary_metric,
        settings={
            "recipe": trial.recipe,
            "chosen": scored.chosen,
            "num_replicates": trial.num_replicates,
            "train_counts": _count_classes(trial, trial.train),
            "test_counts": _count_classes(trial, trial.test),
            "train_keys_hash": _compute_keys_hash(trial),
            "split_notes": list(split.notes),
        },
        versions=get_versions(),
        wall_seconds=wall_seconds,
        synthetic=trial.card.synthetic,
        predictions="",
        predictions_sha256=predictions_sha256,
    )
    return result.model_copy(update={"predictions": f"{result.stem}.parquet"})


def get_versions() -> dict[str, str]:
    """Return the versions that can change a number."""
    packages = ("numpy", "scipy", "torch", "timm")
    return {"python": platform.python_version(), "panfm": __version__, **{name: version(name) for name in packages}}


def _count_classes(trial: Trial, places: NDArray[np.int64]) -> dict[str, int]:
    counts = np.bincount(trial.split.labels[places], minlength=trial.num_classes)
    return dict(zip(trial.card.classes, counts.tolist(), strict=True))


def _compute_keys_hash(trial: Trial) -> str:
    return compute_json_hash(trial.split.keys[trial.train].tolist())
