"""Results that no encoder made on committed test folds of public tasks: true keys, groups and classes, drawn scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    write_predictions,
    write_result,
)
from panfm.evaluation.splits import compute_split_hash, find_split_file, read_split_table
from panfm.evaluation.tasks import TaskCard, load_task
from panfm.measures.by_family import describe_metric, estimate_outcome
from panfm.measures.statistics import compute_bootstrap_seed

TASK = "lc25000_colon"  # 44 test images, of a source with public identifiers
LARGE = "pad_ufes20_malignancy"  # 280 test images of 176 patients
NUM_REPLICATES = 100  # intervals are drawn again by the board; here they only have to follow from the predictions


def read_test_rows(task: str) -> dict[str, list[str]]:
    """key, group and label of a committed test fold, in order of key."""
    table = read_split_table(find_split_file(task)).sort_by("key")
    return table.filter(pa.compute.equal(table["fold"], "test")).to_pydict()


def write_committed(
    root: Path,
    encoder: str,
    strength: float,
    *,
    task: str = TASK,
    draw: int = 0,
    fraction: float = 1.0,
    change: Mapping[str, Any] | None = None,
    changed_result: Mapping[str, Any] | None = None,
    noise: int = 0,
    encoder_hash: str | None = None,
    address: str | None = None,
    take: slice = slice(None),
    levels: bool = False,
    metrics: Mapping[str, MetricValue] | None = None,
) -> Path:
    """Write one Result on a committed test fold; every metric and interval follows from its predictions.

    change: columns of the predictions (lists over the test images) in place of the true ones. changed_result: fields of
    the Result. noise: another number gives nearly the same scores. take: which of the test images. metrics: in place of
    those that follow.
    """
    card = load_task(task)
    split = read_split_table(find_split_file(task)).sort_by("key").to_pydict()
    names = ("key", "group", "fold", "label")
    split_hash = compute_split_hash(card.source, *(split[name] for name in names))
    rows = {name: values[take] for name, values in read_test_rows(task).items()}
    labels = np.array([card.class_names.index(name) for name in rows["label"]])
    K = len(card.class_names)
    hard = np.random.default_rng(sum(map(ord, task))).normal(size=(len(labels), K))
    own = np.random.default_rng([sum(map(ord, encoder)), draw]).normal(size=hard.shape)
    logits = strength * np.eye(K)[labels] + hard + 0.4 * own
    logits += noise * 1e-4 * np.random.default_rng(noise).normal(size=hard.shape)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    columns: dict[str, Any] = {
        "key": rows["key"],
        "group": rows["group"],
        "fold": ["test"] * len(labels),
        "repeat": [0] * len(labels),
        "draw": [draw] * len(labels),
        "label": labels.tolist(),
        "scores": scores.astype(np.float32).tolist(),
        "targets": [[] for _ in labels],
        **(change or {}),
    }
    predictions = pa.table(columns).cast(PREDICTIONS_SCHEMA)
    if levels:
        sexes = ["female" if number % 2 else "male" for number in range(len(labels))]
        predictions = predictions.append_column(f"{SUBGROUP_PREFIX}sex", pa.array(sexes, pa.string()))
    result = Result(
        task=task,
        task_version=card.version,
        family=card.family,
        protocol="linear_probe",
        label_fraction=fraction,
        draw=draw,
        seed=0,
        evaluated_on="test",
        encoder=EncoderCard(
            name=encoder,
            address=address or f"panfm:/home/somebody/exports/{encoder}",
            hash=encoder_hash or f"hash-of-{encoder}",
            num_parameters=5_500_000,
            embed_dim=192,
            image_size=224,
            pooling="mean",
        ),
        data_hash=f"data-{task}",
        split_hash=split_hash,
        group_kind="patient",
        classes=card.classes,
        num_train=300,
        num_train_groups=200,
        num_test=len(set(columns["key"])),
        num_test_groups=len(set(columns["group"])),
        metrics=dict(metrics or _measure(card, predictions, split_hash)),
        primary_metric=card.primary_metric,
        settings={"num_replicates": NUM_REPLICATES},
        versions={"panfm": "0.1.0"},
        wall_seconds=1.0,
        predictions="",
        predictions_sha256="",
    )
    path = get_result_path(root, result)
    sha256 = write_predictions(path.with_suffix(".parquet"), predictions)
    result = result.model_copy(update={"predictions": f"{result.stem}.parquet", "predictions_sha256": sha256})
    return write_result(root, result.model_copy(update=dict(changed_result or {})))


def _measure(card: TaskCard, predictions: pa.Table, split_hash: str) -> dict[str, MetricValue]:
    estimates = estimate_outcome(
        card.family,
        card.metrics,
        make_outcome(predictions)[1],
        seed=compute_bootstrap_seed(card.name, split_hash),
        num_replicates=NUM_REPLICATES,
    )
    return {
        name: MetricValue(
            value=one.value,
            direction=describe_metric(card.family, name).direction,
            low=one.low,
            high=one.high,
            method=one.method,
            reason=one.reason,
        )
        for name, one in estimates.items()
    }
