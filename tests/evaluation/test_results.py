import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from panfm.errors import UserError
from panfm.evaluation.results import (
    PREDICTIONS_SCHEMA,
    EncoderCard,
    MetricValue,
    Result,
    get_result_path,
    get_scores,
    make_folder_name,
    read_predictions,
    read_result,
    read_results,
    write_predictions,
    write_result,
)


def make_predictions() -> pa.Table:
    columns = {
        "key": ["a", "b"],
        "group": ["g", "h"],
        "fold": ["test", "test"],
        "repeat": [0, 0],
        "draw": [0, 0],
        "label": [0, 1],
        "scores": [[0.75, 0.25], [0.5, 0.5]],
        "targets": [[], []],
    }
    return pa.Table.from_pydict(columns, schema=PREDICTIONS_SCHEMA)


def make_result(sha256: str, name: str = "one.parquet") -> Result:
    card = EncoderCard(
        name="vit", address="panfm:x", hash="h", num_parameters=1, embed_dim=2, image_size=32, pooling="mean"
    )
    return Result(
        task="t/1", task_version=1, protocol="knn", label_fraction=0.1, draw=0, seed=0, evaluated_on="test",
        encoder=card, data_hash="d", split_hash="s", group_kind="patient", classes=("no", "yes"), num_train=3,
        num_train_groups=3, num_test=2, num_test_groups=2, metrics={"auroc": MetricValue(value=None, direction="higher",
        reason="no positives among 2 test images")}, primary_metric="auroc", wall_seconds=0.1, predictions=name,
        predictions_sha256=sha256,
    )  # fmt: skip


def test_a_result_and_its_predictions_round_trip(tmp_path: Path) -> None:
    probe = make_result("")
    folder = get_result_path(tmp_path, probe).parent
    sha256 = write_predictions(folder / probe.predictions, make_predictions())
    result = make_result(sha256)
    path = write_result(tmp_path, result)
    assert path == tmp_path / "t_1" / "vit" / "knn-default-f0.1-d0-s0.json"
    assert read_result(path) == result
    assert read_results([tmp_path]) == [(path, result)]
    assert json.loads(path.read_text())["metrics"]["auroc"]["value"] is None
    scores = get_scores(read_predictions(folder / probe.predictions))
    np.testing.assert_array_equal(scores, [[0.75, 0.25], [0.5, 0.5]])


def test_what_is_damaged_or_foreign_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such results folder"):
        read_results([tmp_path / "gone"])
    with pytest.raises(UserError, match="no result files"):
        read_results([tmp_path])
    (tmp_path / "x.json").write_text('{"result_version": 1}')
    with pytest.raises(UserError, match=r"x\.json: not a Result v2"):
        read_result(tmp_path / "x.json")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"x\.parquet: predictions cannot be read"):
        read_predictions(tmp_path / "x.parquet")


def test_nan_is_no_metric() -> None:
    with pytest.raises(ValueError, match="finite"):
        MetricValue(value=float("nan"), direction="higher")


def test_folder_names_are_safe() -> None:
    assert make_folder_name("timm:vit@../../etc") == "timm_vit_.._.._etc"
    assert make_folder_name("<script>") == "script"
