"""failures: what does not decode is replaced, the same everywhere; listed once, whatever happened to the run; too many
stop it."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from panfm.data.failures import (
    FailedSample,
    FailureLog,
    check_failed_share,
    read_failures,
    summarise_failures,
    trim_failures,
)
from panfm.data.loader import LoaderState
from panfm.data.mixture import MixtureConfig
from panfm.errors import UserError
from panfm.shards.index import open_shard_set
from tests.data.loading import START, assert_same, draw_steps, make_loader


def damage(shard_set: Path, out: Path, rows: list[int]) -> Path:
    """Copy a shard set and overwrite some images: same lengths, other bytes."""
    shutil.copytree(shard_set, out)
    table = pq.read_table(out / "samples.parquet")
    for row in rows:
        offset, length = table["offset"][row].as_py(), table["length"][row].as_py()
        with (out / table["shard"][row].as_py()).open("r+b") as file:
            file.seek(offset)
            file.write(b"\0" * length)
    return out


def test_a_sample_that_fails_is_replaced_counted_and_the_same_everywhere(alpha: Path, tmp_path: Path) -> None:
    damaged = damage(alpha, tmp_path / "damaged", rows=[7, 40])
    loader, log = make_loader(damaged), FailureLog()
    batches = draw_steps(loader, 10, failed=log)  # two epochs
    failures = log.read()
    table = open_shard_set(damaged).table
    # A replacement that is the other damaged sample fails as well, hence "at least".
    assert {failed.key for failed in failures} == {table["key"][row].as_py() for row in (7, 40)}
    assert len({failed.position for failed in failures}) == 4 <= log.num_failed == len(failures)
    assert {(failed.source, failed.reason) for failed in failures} == {("alpha", "undecodable")}
    assert {failed.shard for failed in failures} == {table["shard"][row].as_py() for row in (7, 40)}
    again, ranks = make_loader(damaged, workers=1), FailureLog()
    assert_same(draw_steps(again, 10, world_size=2, failed=ranks), batches)
    assert sorted(ranks.read(), key=lambda failed: failed.position) == failures
    good = draw_steps(make_loader(alpha), 10)
    bad_positions = {failed.position for failed in failures}
    visits = dict(zip(range(120), torch.cat([batch.visits for batch in batches]).tolist(), strict=True))
    assert len({visits[position] for position in bad_positions}) > 1  # not one favourite stand-in
    for one, other in zip(batches, good, strict=True):
        for number, position in enumerate(one.positions.tolist()):
            assert torch.equal(one.views[0][number], other.views[0][number]) == (position not in bad_positions)
    # what a position's batch holds is what `draw` says that it holds
    first = min(bad_positions)
    drawn = loader.draw(range(first, first + 1))
    assert [failed.position for failed in drawn.failures] == [first]
    assert drawn.samples[0].row not in (7, 40)


def test_a_rollback_replaces_by_its_salt(alpha: Path, tmp_path: Path) -> None:
    damaged = damage(alpha, tmp_path / "damaged", rows=list(range(0, 60, 4)))
    states = LoaderState(0), LoaderState(0, ((0, 0), (2, 1)))
    loader = make_loader(damaged)
    drawn = [loader.draw(range(60), state) for state in states]
    failures = [[failed.position for failed in one.failures] for one in drawn]
    assert [p for p in failures[0] if p < 24] == [p for p in failures[1] if p < 24] != []
    assert drawn[0].samples[:24] == drawn[1].samples[:24] and drawn[0].samples[24:] != drawn[1].samples[24:]
    assert not {sample.row for sample in drawn[1].samples} & set(range(0, 60, 4))
    assert len(set(failures[1])) == 15  # each damaged one met once in the epoch, on either way


def test_failures_are_listed_once_whatever_happened_to_the_run(alpha: Path, beta: Path, tmp_path: Path) -> None:
    damaged = damage(alpha, tmp_path / "damaged", rows=list(range(0, 60, 6)))
    mixture = MixtureConfig(weighting="uniform")

    def run(folder: Path, first: int, num_steps: int, world_size: int) -> None:
        folder.mkdir(exist_ok=True)
        trim_failures(folder, first * 12)
        with make_loader(damaged, beta, mixture=mixture) as loader:
            ranks = [
                loader.iterate(LoaderState(first), rank=rank, world_size=world_size, failed=FailureLog(folder, rank))
                for rank in range(world_size)
            ]
            for _ in range(num_steps):
                for batches in ranks:
                    next(batches)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, 0, 30, 1)
    expected = read_failures(whole)
    assert len(expected) > 20 and [failed.position for failed in expected] == sorted(f.position for f in expected)
    lines = (whole / "failed_samples-0.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"position", "source", "key", "shard", "reason"}
    for first, num_steps, world_size in ((0, 12, 3), (8, 10, 1), (15, 9, 2), (24, 6, 3)):  # each resumes further back
        run(cut, first, num_steps, world_size)
        with (cut / "failed_samples-0.jsonl").open("a") as file:
            file.write('{"position": 3')  # what a kill leaves of a line
    assert trim_failures(cut, 10**9) == len(expected)
    assert read_failures(cut) == expected
    assert trim_failures(cut, 0) == 0 and list(cut.iterdir()) == []


def test_the_share_is_that_of_the_whole_run(alpha: Path, tmp_path: Path) -> None:
    log = FailureLog(tmp_path, rank=1)
    failures = [FailedSample(p, "alpha", f"k{p}", f"shard-{p % 3 // 2}.tar", "truncated") for p in range(9)]
    FailureLog(tmp_path, rank=0).add([FailedSample(0, "beta", "k", "shard-7.tar", "undecodable")])
    log.add(failures)
    log.sync()
    paths = {"alpha": "/data/alpha", "beta": "/data/beta"}
    check_failed_share(10, 1000, 0.01, log, paths)
    message = (
        r"^/data/alpha/shard-0\.tar: 6 of the 10 failed samples \(9 truncated, 1 undecodable\) lie in this shard; of "
        r"999 drawn, more failed than data\.max_failed_share \(0\.01\) allows; build .*"
    )
    with pytest.raises(UserError, match=message):
        check_failed_share(10, 999, 0.01, log, paths)
    check_failed_share(2, 2, 0.01, log, paths)  # one bad image at the start stops nothing
    with pytest.raises(UserError, match="3 drawn"):
        check_failed_share(3, 3, 0.01, log, paths)
    assert summarise_failures(log.read()) == "alpha: 9 truncated; beta: 1 undecodable"
    loader = make_loader(alpha, max_failed_share=0.5)
    loader.check_failures(FailureLog(), 128, 100)
    (tmp_path / "failed_samples-2.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match=r"failed_samples-2\.jsonl: holds a line that panfm did not write"):
        read_failures(tmp_path)


def test_a_source_that_is_damaged_throughout_stops_with_its_worst_shard(alpha: Path, tmp_path: Path) -> None:
    every = damage(alpha, tmp_path / "every", rows=list(range(60)))
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=r"every/shard-\d+\.tar: \d+ of the \d+ failed samples .*16 that were drawn"
        ):
            draw_steps(make_loader(every, max_failed_share=1.0, workers=workers), 1, START)
