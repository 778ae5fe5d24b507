"""What every protocol shares: one trial (which images train, which are scored) and the Result that it leaves behind.

    Split + fold choice + fraction + draw + seed -> Trial      Trial + Scored -> predictions (.parquet) + Result (.json)

A protocol is a pure step from a trial's training part to scores for its test part; it never sees a test label.
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
from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.evaluation.label_subsets import compute_label_subset
from panfm.evaluation.results import (
    PREDICTIONS_SCHEMA,
    SUBGROUP_PREFIX,
    EncoderCard,
    MetricValue,
    Result,
    get_result_path,
    make_folder_name,
    make_outcome,
    read_result,
    write_predictions,
    write_result,
)
from panfm.evaluation.splits import Split, find_outer_folds
from panfm.evaluation.subgroup_columns import collect_subgroups
from panfm.evaluation.tasks import NestedSplit, TaskCard
from panfm.files import compute_file_sha256, compute_json_hash, write_bytes
from panfm.measures.by_family import describe_metric, estimate_outcome
from panfm.measures.statistics import compute_bootstrap_seed
from panfm.shards.index import ShardSet

Protocol = Literal[
    "linear_probe",
    "knn",
    "prototype",
    "finetune",
    "metadata_fusion",
    "case_fusion",
    "leave_institution_out",
    "panderm_compat",
    "dinov2_compat",
    "regression",
    "ordinal",
    "out_of_distribution",
    "segmentation",
    "slides",
    "change",
    "survival",
    "retrieval",
    "zero_shot",
    "ugly_duckling",
]
EvaluatedOn = Literal["test", "development"]
# Recipes are chosen on `development`, which never touches the test fold; the test fold is then looked at once.
TRAIN_FOLDS: dict[EvaluatedOn, tuple[str, ...]] = {"test": ("train", "val"), "development": ("train",)}
TEST_FOLD: dict[EvaluatedOn, str] = {"test": "test", "development": "val"}


@dataclass(frozen=True)
class Trial:
    """One measurement to make. `train` and `test` are places in the split's arrays (int64 [N], int64 [M]).

    recipe: the protocol's settings as plain values, `variant` among them; a Result made with another recipe is stale.
    unit: what is scored, in a word. num_pool_groups: groups of which the labelled ones were chosen. Under a nested
    split (`nested`), `test` is everything and `train` the training part of the first outer fold; N is 0 where a
    protocol trains nothing.
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
    unit: str = "image"
    num_pool_groups: int = 0

    @property
    def num_classes(self) -> int:
        """Number of classes K, whether or not all of them occur."""
        return len(self.card.classes)


@dataclass(frozen=True)
class Scored:
    """What a protocol returns for the M units of the test part.

    scores: float64 [M, K], a probability a class, or what the measures of the family ask for. chosen: what it chose, as
    plain values. targets: float64 [M, T] where only scoring can tell them (the pixels of a mask); None = those of the
    split. grid: the points that the scores refer to (days of a survival curve). repeats: float64 [R, M, K], of which
    the scores are the mean, and outer_folds [R, M], where every unit was scored R times (`nested`).
    """

    scores: NDArray[np.float64]
    chosen: dict[str, Any] = field(default_factory=dict)
    targets: NDArray[np.float64] | None = None
    grid: tuple[float, ...] = ()
    repeats: NDArray[np.float64] | None = None
    outer_folds: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Material:
    """What a protocol may look at besides its trial: an encoder, a shard set, and the features of the one on the other.

    features: float32 [rows of the shard set, D], in the order of its table.
    """

    features: NDArray[np.float32]
    encoder: Encoder
    shard_set: ShardSet


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
    unit: str = "image",
) -> Trial:
    """Choose the labelled training units and the units to score. label_fraction 0: nothing is trained.

    Raises UserError where there is nothing to learn from: no unit to score, or one class only in training.
    """
    test = split.find(TEST_FOLD[evaluated_on])
    if len(test) == 0:
        raise UserError(
            f"task {card.name}: no {unit} in the fold {TEST_FOLD[evaluated_on]!r}, which evaluate_on: {evaluated_on} "
            f"scores; give its split a {TEST_FOLD[evaluated_on]} fold"
        )
    if isinstance(card.split, NestedSplit):
        pool = np.flatnonzero(find_outer_folds(split, card.split, repeat=0) != 0).astype(np.int64)
    else:
        pool = split.find(*TRAIN_FOLDS[evaluated_on])
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
        train=choose_labelled(card, split, pool, label_fraction, draw, unit),
        test=test,
        unit=unit,
        num_pool_groups=len(np.unique(split.groups[pool])),
    )


def choose_labelled(
    card: TaskCard, split: Split, pool: NDArray[np.int64], label_fraction: float, draw: int, unit: str = "image"
) -> NDArray[np.int64]:
    """Choose which of the training places `pool` have labels: places, int64 [n]; none at fraction 0.

    Raises UserError where they are of one class only: there is nothing to learn from them.
    """
    if label_fraction == 0:
        return np.zeros(0, dtype=np.int64)
    if card.family == "out_of_distribution":  # what is unknown must be so in training
        pool = pool[split.labels[pool] < len(card.classes)]
    subset = compute_label_subset(
        split.strata[pool],
        split.groups[pool],
        fraction=label_fraction,
        draw=draw,
        task=card.name,
        split_hash=split.hash,
    )
    train = pool[subset]
    present = np.unique(split.labels[train])
    if card.classes and len(present) < 2:
        raise UserError(
            f"task {card.name}: the {len(train)} labelled training {unit}s are all {card.classes[present[0]]!r}; "
            f"at least two classes are needed, use a larger label fraction than {label_fraction:g} or more {unit}s"
            if len(present)
            else f"task {card.name}: no labelled training {unit} at label fraction {label_fraction:g}; use a larger one"
        )
    return train


def find_result(root: Path, trial: Trial) -> Path | None:
    """Return the path of the Result that this trial would write again, or None if there is none or it is stale.

    Stale: made with another encoder, other images, another split, task version, class order, recipe or set of metrics
    under the same names, or its predictions are gone or were changed.
    """
    path = get_result_path(root, _build_result(trial, Scored(np.zeros((0, 0))), {}, "", 0.0))
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


def write_trial(root: Path, trial: Trial, scored: Scored, shard_set: ShardSet, wall_seconds: float) -> Path:
    """Write the predictions, then the Result with every metric and its interval; returns the Result's path."""
    predictions = _build_predictions(trial, scored, shard_set)
    # Metrics come from the scores as they are stored: whoever recomputes them from the file gets the same numbers.
    _, outcome = make_outcome(predictions, scored.grid)
    estimates = estimate_outcome(
        trial.card.family,
        trial.card.metrics,
        outcome,
        seed=compute_bootstrap_seed(trial.card.name, trial.split.hash),
        num_replicates=trial.num_replicates,
    )
    metrics = {
        name: MetricValue(
            value=estimate.value,
            direction=describe_metric(trial.card.family, name).direction,
            low=estimate.low,
            high=estimate.high,
            method=estimate.method,
            reason=estimate.reason,
        )
        for name, estimate in estimates.items()
    }
    path = get_result_path(root, _build_result(trial, scored, metrics, "", wall_seconds))
    if 0 < trial.label_fraction < 1 and scored.repeats is None:
        _write_labelled(root, trial)
    path.unlink(missing_ok=True)  # a stale Result must not stand beside predictions that are not its own
    sha256 = write_predictions(path.with_suffix(".parquet"), predictions)
    return write_result(root, _build_result(trial, scored, metrics, sha256, wall_seconds))


def _write_labelled(root: Path, trial: Trial) -> None:
    """Write which units had labels, a key a line, beside the task's Results: the same for every encoder."""
    ending = "-development" if trial.evaluated_on == "development" else ""
    unit = "" if trial.unit == "image" else f"-{make_folder_name(trial.unit)}"
    name = f"labelled-f{trial.label_fraction:g}-d{trial.draw}{unit}{ending}.txt"
    text = "".join(f"{key}\n" for key in trial.split.keys[trial.train].tolist())
    path = root / make_folder_name(trial.card.name) / name
    if not path.is_file() or path.read_text() != text:
        write_bytes(path, text.encode())


def _build_predictions(trial: Trial, scored: Scored, shard_set: ShardSet) -> pa.Table:
    """One row a unit, or one a unit and repeat."""
    split, test = trial.split, trial.test
    targets = scored.targets if scored.targets is not None else _take_targets(split, test)
    repeats = scored.scores[None] if scored.repeats is None else scored.repeats
    assert repeats.ndim == 3 and repeats.shape[1] == len(test) == len(targets), "one row of scores a unit"
    assert np.isfinite(repeats).all(), "a protocol returned scores that are not finite"
    tables = []
    for repeat, scores in enumerate(repeats):
        folds = split.folds[test].tolist()
        if scored.outer_folds is not None:
            folds = [f"outer{fold}" for fold in scored.outer_folds[repeat]]
        tables.append(
            pa.table(
                {
                    "key": split.keys[test].tolist(),
                    "group": split.groups[test].tolist(),
                    "fold": folds,
                    "repeat": np.full(len(test), repeat, np.int16),
                    "draw": np.full(len(test), trial.draw, np.int16),
                    "label": split.labels[test].astype(np.int16),
                    "scores": scores.astype(np.float32).tolist(),
                    "targets": targets.tolist(),
                },
                schema=PREDICTIONS_SCHEMA,
            )
        )
    table = pa.concat_tables(tables)
    for name, levels in collect_subgroups(trial.card, split, shard_set, test).items():
        table = table.append_column(f"{SUBGROUP_PREFIX}{name}", pa.array(levels * len(repeats), pa.string()))
    return table


def _take_targets(split: Split, places: NDArray[np.int64]) -> NDArray[np.float64]:
    return split.targets[places] if len(split.targets) else np.zeros((len(places), 0))


def _build_result(
    trial: Trial, scored: Scored, metrics: dict[str, MetricValue], predictions_sha256: str, wall_seconds: float
) -> Result:
    split = trial.split
    result = Result(
        task=trial.card.name,
        task_version=trial.card.version,
        family=trial.card.family,
        unit=trial.unit,
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
        num_pool_groups=trial.num_pool_groups,
        num_test=len(trial.test),
        num_test_groups=len(np.unique(split.groups[trial.test])),
        metrics=metrics,
        primary_metric=trial.card.primary_metric,
        settings={
            "recipe": trial.recipe,
            "chosen": scored.chosen,
            "grid": list(scored.grid),
            "num_replicates": trial.num_replicates,
            "train_counts": _count_classes(trial, trial.train),
            "test_counts": _count_classes(trial, trial.test),
            "train_keys_hash": _compute_keys_hash(trial),
            "label_note": _explain_fraction(trial),
            "split_notes": list(split.notes),
            "references": dict(trial.card.references),
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


def _explain_fraction(trial: Trial) -> str | None:
    """Say where a fraction cannot be had: it would be fewer groups than there are classes, each of which keeps one."""
    wanted = trial.label_fraction * trial.num_pool_groups
    num_groups = len(np.unique(trial.split.groups[trial.train]))
    if num_groups <= max(1.0, round(wanted)):
        return None
    share = num_groups / trial.num_pool_groups
    return (
        f"{trial.label_fraction:.3g} of {trial.num_pool_groups} training groups is less than one a class: {num_groups} "
        f"({share:.1%}) were labelled"
    )


def _count_classes(trial: Trial, places: NDArray[np.int64]) -> dict[str, int]:
    names = trial.card.class_names
    counts = np.bincount(trial.split.labels[places], minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def _compute_keys_hash(trial: Trial) -> str:
    return compute_json_hash(trial.split.keys[trial.train].tolist())
