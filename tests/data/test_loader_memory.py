"""loader: memory that does not grow with the data set; what is as long as that lies in one file, mapped by all."""

import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from panfm.data.columns import map_columns
from panfm.data.loader import LoaderState
from panfm.data.mixture import MixtureConfig, build_mixture
from panfm.data.selection import RECORD
from panfm.data.stream import SampleStream
from panfm.errors import UserError
from tests.data.large_index import enlarge
from tests.data.loading import make_loader, start_trainer, wait_for_notes
from tests.data.tables import make_table

NUM_ROWS = (10_000, 1_000_000)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's loaders put their files: nobody else's are in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"panfm-{os.getuid()}"


def read_memory(pid: int, field: str) -> int:
    """Bytes of a field of smaps_rollup: what all of a process's mappings hold together."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def list_mapped(pid: int, folder: Path) -> set[str]:
    """Inodes of the mapped files that lie, or lay, in a folder."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if f"{folder}/" in line}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_a_million_rows_cost_a_worker_as_much_as_ten_thousand(
    alpha: Path, tmp_path: Path, own_temporary_folder: Path
) -> None:
    """End to end: an index of a million rows, two workers, batches from all over a pass, after a rollback."""
    own: dict[int, float] = {}
    mapped: dict[int, float] = {}
    for num_rows in NUM_ROWS:
        shards = enlarge(alpha, tmp_path / f"{num_rows}", num_rows)
        before, tables = {child.pid for child in psutil.Process().children(recursive=True)}, pa.total_allocated_bytes()
        mixture = MixtureConfig(weighting="uniform", group_share=0.25)
        with make_loader(shards, mixture=mixture, workers=2, mask=None, micro_batch_size=12) as loader:
            steps = loader.iterate(LoaderState(40_000, ((0, 0), (39_000, 1))), rank=0, world_size=1)
            for _ in range(60):
                next(steps)
            assert pa.total_allocated_bytes() - tables < 100_000  # no table of the index stays in this process
            children = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in before]
            files = {pid: list_mapped(pid, own_temporary_folder) for pid in (*children, os.getpid())}
            workers = [pid for pid in children if files[pid]]
            assert len(workers) == 2 and len(set().union(*files.values())) == 1  # one for all
            own[num_rows] = np.mean([read_memory(pid, "Anonymous") for pid in workers])
            mapped[num_rows] = np.mean([read_memory(pid, "Pss") for pid in workers]) - own[num_rows]
    few, many = NUM_ROWS
    # Of its own a worker has 1/8 byte a row and pass that is open; 130 were copied into each before.
    assert (own[many] - own[few]) / (many - few) < 4
    # Its part of the mapped file is at most the 48 bytes of a record, and those of groups, shared by three processes.
    assert (mapped[many] - mapped[few]) / (many - few) < 40


def test_the_state_of_a_stream_is_flat() -> None:
    """What one worker computes for itself: an eighth of a byte a row for a pass that is open, and constant windows."""

    def count_bytes(stream: SampleStream) -> int:
        arrays: dict[int, int] = {}
        waiting: list[object] = [stream._walks, stream._units, stream._slots]
        while waiting:
            found = waiting.pop()
            if isinstance(found, np.ndarray):
                base = found if found.base is None else found.base
                arrays[id(base)] = base.nbytes
            elif isinstance(found, (list, tuple)):
                waiting += found
            elif type(found).__module__.startswith("panfm"):
                waiting += vars(found).values()
        return sum(arrays.values())

    sizes = []
    for num_rows in NUM_ROWS:
        table = make_table(("a", "clinical", num_rows))
        stream = SampleStream(build_mixture(MixtureConfig(), table), 0, [(0, 0)])
        for start in (0, num_rows // 2, 5 * num_rows):  # the start, the middle of an epoch, far away
            stream.compute_samples(range(start, start + 100))
        sizes.append(count_bytes(stream))
    assert (sizes[1] - sizes[0]) / (NUM_ROWS[1] - NUM_ROWS[0]) < 1.0
    assert sizes[1] < 3_000_000


def test_ranks_of_a_machine_share_one_file_whose_name_goes_with_the_first_batch(
    alpha: Path, own_temporary_folder: Path, tmp_path: Path
) -> None:
    first, second = make_loader(alpha), make_loader(alpha)
    other = make_loader(alpha, mixture=MixtureConfig(group_share=0.5))  # other columns
    assert len(list(own_temporary_folder.glob("*.columns"))) == 2
    assert len(list_mapped(os.getpid(), own_temporary_folder)) == 2
    steps = first.iterate(LoaderState(0), rank=0, world_size=1)
    other.close()
    assert sorted(path.name for path in own_temporary_folder.iterdir()) == ["lock"]
    batches = [next(steps), next(second.iterate(LoaderState(0), rank=0, world_size=1))]
    assert len(batches[0]) == len(batches[1]) == 6
    # a trainer that is killed while it iterates leaves nothing behind
    notes = tmp_path / "notes"
    trainer = start_trainer((alpha,), notes, workers=1, num_steps=10**6)
    wait_for_notes(notes, 1, trainer)
    trainer.kill()
    trainer.join()
    assert sorted(path.name for path in own_temporary_folder.iterdir()) == ["lock"]


def test_columns_come_back_as_they_were_and_strays_are_swept_away(own_temporary_folder: Path) -> None:
    arrays = {"a": np.arange(5, dtype=np.int8), "none": np.zeros(0, RECORD), "b": np.arange(7), "r": np.ones(3, RECORD)}
    columns = map_columns(arrays)
    assert list(columns) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(columns[name], array)
        assert columns[name].dtype == array.dtype and not columns[name].flags.writeable
    stray = own_temporary_folder / "dead.columns.tmp-1"
    stray.write_bytes(b"what a kill left")
    map_columns(arrays)
    assert stray.exists()  # perhaps it is being written
    os.utime(stray, (0, 0))
    map_columns(arrays)
    assert not stray.exists()
    assert map_columns({}).keys() == set()


def test_a_folder_that_is_full_or_not_ones_own_is_said(own_temporary_folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"panfm-\d+: the loader's index takes 8 MiB .* set TMPDIR to a folder with"
        ):
            map_columns({"a": np.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in own_temporary_folder.iterdir()) == ["lock"]
    own_temporary_folder.chmod(0o777)
    with pytest.raises(UserError, match="others can write there"):
        map_columns({"a": np.zeros(1)})
