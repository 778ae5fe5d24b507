"""Results that no encoder made: their scores follow from a seed, so that boards of them are quick and stay the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from panfm.evaluation.results import (
    PREDICTIONS_SCHEMA,
    SUBGROUP_PREFIX,
    EncoderCard,
    MetricValue,
    Result,
    get_result_path,
    make_outcome,
    read_predictions,
    read_results,
    write_predictions,
    write_result,
)
from panfm.measures.by_family import compute_point, describe_metric
from panfm.measures.metrics import METRICS, compute_metric

GOOD, MIDDLE, RANDOM = "panfm base", "imagenet", "random weights"


def write_trial(
    root: Path,
    encoder: str,
    task: str,
    strength: float,
    *,
    classes: int = 2,
    fraction: float = 1.0,
    draw: int = 0,
    protocol: str = "linear_probe",
    variant: str = "default",
    evaluated_on: str = "test",
    metric: str = "auroc",
    synthetic: bool = False,
    num_groups: int = 60,
    group_kind: str = "patient",
    key_prefix: str = "k",
    encoder_hash: str | None = None,
    subgroups: Mapping[str, Sequence[str | None]] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Write one Result whose scores tell the classes apart by `strength`; the test set depends on the task only.

    Three images a group; subgroups: levels of all images. settings: what the protocol chose, as `Result.settings`.
    """
    of_task = np.random.default_rng(sum(map(ord, task)))
    group_label = np.arange(num_groups) % classes
    labels = np.repeat(group_label, 3)
    groups = [f"p{number:03d}" for number in range(num_groups) for _ in range(3)]
    hard = of_task.normal(size=(num_groups * 3, classes))  # what makes an image hard is the same for all encoders
    own = np.random.default_rng([sum(map(ord, encoder + task + protocol)), draw, int(fraction * 100)])
    logits = strength * np.eye(classes)[labels] + hard + 0.4 * own.normal(size=hard.shape)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predictions = pa.table(
        {
            "key": [f"{key_prefix}{number:04d}" for number in range(len(labels))],
            "group": groups,
            "fold": ["test" if evaluated_on == "test" else "val"] * len(labels),
            "repeat": [0] * len(labels),
            "draw": [draw] * len(labels),
            "label": labels.tolist(),
            "scores": scores.astype(np.float32).tolist(),
            "targets": [[] for _ in labels],
            **{f"{SUBGROUP_PREFIX}{name}": pa.array(levels, pa.string()) for name, levels in (subgroups or {}).items()},
        }
    )
    address = f"timm:vit_tiny@random:{draw}" if encoder == RANDOM else f"panfm:{encoder}"
    point = compute_metric(metric, labels, scores.astype(np.float32))
    result = Result(
        task=task,
        task_version=1,
        protocol=protocol,
        variant=variant,
        label_fraction=fraction,
        draw=draw,
        seed=0,
        evaluated_on=evaluated_on,
        encoder=EncoderCard(
            name=encoder,
            address="timm:vit_tiny@random:0" if encoder == RANDOM else address,
            hash=encoder_hash or f"hash-of-{encoder}",
            num_parameters=5_500_000,
            flops_per_image=1.1e9,
            embed_dim=192,
            image_size=128,
            pooling="mean",
            training_data=None if encoder != RANDOM else "none: random weights",
            contamination={GOOD: "excluded", RANDOM: "none"}.get(encoder, "unknown"),
        ),
        data_hash=f"data-{task}",
        split_hash=f"split-{task}",
        group_kind=group_kind,
        classes=tuple(f"class_{number}" for number in range(classes)),
        num_train=300,
        num_train_groups=int(100 * fraction),
        num_test=len(labels),
        num_test_groups=num_groups,
        metrics={metric: MetricValue(value=point.value, direction=METRICS[metric].direction, reason=point.reason)},
        primary_metric=metric,
        settings=dict(settings or {}),
        wall_seconds=1.0,
        synthetic=synthetic,
        predictions="",
        predictions_sha256="",
    )
    path = get_result_path(root, result)
    sha256 = write_predictions(path.with_suffix(".parquet"), predictions)
    return write_result(
        root, result.model_copy(update={"predictions": f"{result.stem}.parquet", "predictions_sha256": sha256})
    )


def write_numbers(root: Path, encoder: str, task: str, error: float, *, unit: str = "image", num: int = 120) -> Path:
    """Write one Result of a regression whose predictions are off by `error`: lower is better."""
    rng = np.random.default_rng(sum(map(ord, encoder + task)))
    true = np.random.default_rng(sum(map(ord, task))).normal(50, 10, num)
    scores = (true + error * rng.normal(size=num)).astype(np.float32)[:, None]
    predictions = pa.table(
        {
            "key": [f"{unit}{number:04d}" for number in range(num)],
            "group": [f"p{number // 2:03d}" for number in range(num)],
            "fold": ["test"] * num,
            "repeat": [0] * num,
            "draw": [0] * num,
            "label": [0] * num,
            "scores": scores.tolist(),
            "targets": true[:, None].tolist(),
        }
    )
    outcome = make_outcome(predictions.cast(PREDICTIONS_SCHEMA))[1]
    metrics = {
        name: MetricValue(
            value=compute_point("regression", name, outcome).value,
            direction=describe_metric("regression", name).direction,
        )
        for name in ("mean_absolute_error", "spearman")
    }
    result = Result(
        task=task,
        task_version=1,
        family="regression",
        unit=unit,
        protocol="regression" if unit == "image" else "other",
        label_fraction=1.0,
        draw=0,
        seed=0,
        evaluated_on="test",
        encoder=EncoderCard(
            name=encoder,
            address=f"panfm:{encoder}",
            hash=f"hash-of-{encoder}",
            num_parameters=1,
            embed_dim=1,
            image_size=64,
            pooling="mean",
        ),
        data_hash=f"data-{task}",
        split_hash=f"split-{task}-{unit}",
        group_kind="patient",
        classes=("measured",),
        num_train=100,
        num_train_groups=50,
        num_test=num,
        num_test_groups=num // 2,
        metrics=metrics,
        primary_metric="mean_absolute_error",
        wall_seconds=1.0,
        predictions="",
        predictions_sha256="",
    )
    path = get_result_path(root, result)
    sha256 = write_predictions(path.with_suffix(".parquet"), predictions)
    return write_result(
        root, result.model_copy(update={"predictions": f"{result.stem}.parquet", "predictions_sha256": sha256})
    )


def write_own_results(root: Path, keys: Sequence[str]) -> Path:
    """Write a Result on `own`, a task of the user's own folder, whose 60 images have these keys; return the folder."""
    path = write_trial(root, GOOD, "own", 0.5, num_groups=20)
    ((_, result),) = read_results([root])
    table = read_predictions(path.with_suffix(".parquet"))
    sha256 = write_predictions(path.with_suffix(".parquet"), table.set_column(0, "key", pa.array(keys[: len(table)])))
    write_result(root, result.model_copy(update={"predictions_sha256": sha256}))
    return root
