"""pretrain: samples that do not decode are listed once over interruptions, and stop the run when they are too many."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from panfm.config import load_config
from panfm.data.failures import read_failures
from panfm.errors import UserError
from panfm.shards.index import Exclusion
from panfm.tracking import read_metrics
from panfm.training.checkpoint import list_checkpoints
from panfm.training.pretrain import PretrainConfig, pretrain


@pytest.fixture(scope="module")
def damaged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive with two of its forty images overwritten."""
    out = tmp_path_factory.mktemp("damaged") / "drawn"
    shutil.copytree(shards, out)
    table = pq.read_table(out / "samples.parquet")
    for row in (3, 20):
        with (out / table["shard"][row].as_py()).open("r+b") as file:
            file.seek(table["offset"][row].as_py())
            file.write(b"\0" * table["length"][row].as_py())
    return out


def run(config: Path, damaged: Path, out: Path, *overrides: str) -> None:
    overrides = (f"data.shards=[{damaged}]", "data.workers=0", "encoder.drop_path_rate=0", *overrides)
    pretrain(load_config(PretrainConfig, config, overrides), out=out, excluded=Exclusion())


@pytest.mark.slow
def test_failures_are_listed_once_and_counted_over_the_whole_run(
    config: Path, damaged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(config, damaged, out, "data.max_failed_share=0.1")
    listed = read_failures(out)
    assert len({failed.position for failed in listed}) >= 6  # 128 images are three epochs and a bit
    records = read_metrics(out / "metrics.jsonl")
    assert [sum(record["drawn"].values()) for record in records] == [16 * step for step in range(1, 9)]
    assert records[-1]["drawn"] == {"drawn/dermoscopic": 128}
    assert records[-2]["failed_samples"] <= records[-1]["failed_samples"] <= len(listed)
    printed = capfd.readouterr().err
    assert "drawn from drawn/dermoscopic: 128 images, 100.00% of all (asked: 100.00%), 3.20 times its 40" in printed
    assert f"{len(listed)} samples did not decode and were replaced (drawn: {len(listed)} undecodable)" in printed

    shutil.rmtree(list_checkpoints(out)[-1])  # as if it had been killed after step 6
    run(config, damaged, out, "data.max_failed_share=0.1")
    assert read_failures(out) == listed
    assert [record["drawn"] for record in read_metrics(out / "metrics.jsonl")] == [r["drawn"] for r in records]

    # What failed before the interruption counts: the share of the last two steps alone would be too low to stop.
    shutil.rmtree(list_checkpoints(out)[-1])
    early = [failed for failed in listed if failed.position < 96]
    share = (len(early) - 0.5) / 256
    with pytest.raises(UserError, match=rf"drawn/shard-\d+\.tar: .*; of 112 drawn, more failed .*\({share}\) allows"):
        run(config, damaged, out, f"data.max_failed_share={share}")
