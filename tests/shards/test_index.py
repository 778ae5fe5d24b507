"""A shard set is opened only if it is whole, and its rows can be read from everywhere."""

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from panfm.errors import UserError
from panfm.files import compute_sha256
from panfm.shards import index as index_module
from panfm.shards.index import ShardSet, compute_data_hash, open_shard_set
from panfm.shards.writer import BuildOptions, build_shards


@pytest.fixture
def shards(make_archive: Callable[..., Any], tmp_path: Path) -> Path:
    archive = make_archive()
    return build_shards(archive.card, archive.root, tmp_path / "shards", options=BuildOptions(samples_per_shard=2)).path


def check_every_row(shard_set: ShardSet) -> bool:
    sha256s = shard_set.table["sha256"].to_pylist()
    return [compute_sha256(shard_set.read_image(row)) for row in range(shard_set.num_samples)] == sha256s


def test_rows_are_read_by_number(shards: Path) -> None:
    shard_set = open_shard_set(shards)
    assert (shard_set.source, shard_set.num_samples, shard_set.card.name) == ("small", 12, "small")
    assert len(shard_set.places.shard_names) == 6 and check_every_row(shard_set)
    assert "secret" not in repr(shard_set) and len(repr(shard_set)) < 3000


def check_and_exit(shard_set: ShardSet) -> None:
    os._exit(0 if check_every_row(shard_set) else 1)


def test_readers_may_be_forked_threaded_and_pickled(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_OPEN_FILES", 2)  # files close and reopen while others read
    shard_set = open_shard_set(shards)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check_every_row, [shard_set] * 16))
    assert len(shard_set.reader.files) == 2
    children = [multiprocessing.get_context("fork").Process(target=check_and_exit, args=(shard_set,)) for _ in range(3)]
    for child in children:
        child.start()
    assert check_every_row(shard_set)  # at the same time, on the descriptors that they share
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    copy = pickle.loads(pickle.dumps(shard_set))
    assert check_every_row(copy) and copy.reader.files is not shard_set.reader.files


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="sees open files as Linux lists them")
def test_files_are_closed(shards: Path) -> None:
    def count_open_shards() -> int:
        files = [Path(f"/proc/self/fd/{name.name}") for name in Path("/proc/self/fd").iterdir()]
        return sum(file.is_symlink() and file.readlink().is_relative_to(shards) for file in files)

    shard_set = open_shard_set(shards)
    assert check_every_row(shard_set) and count_open_shards() == 6
    del shard_set
    assert count_open_shards() == 0


def test_the_data_hash_is_of_content_and_order(shards: Path) -> None:
    assert compute_data_hash(["a", "b"], ["1", "2"]) == compute_sha256(b"a 1\nb 2\n")
    assert compute_data_hash(["b", "a"], ["2", "1"]) != compute_data_hash(["a", "b"], ["1", "2"])
    shard_set = open_shard_set(shards)
    keys, sha256s = shard_set.table["key"].to_pylist(), shard_set.table["sha256"].to_pylist()
    assert shard_set.compute_data_hash() == compute_data_hash(keys, sha256s)


def test_the_index_says_what_is_there(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    assert index["num_samples"] == 12 and index["num_rejected"] == {}
    assert index["num_labels"] == {"diagnosis": {"melanoma": 4, "nevus": 4}} and index["num_modalities"] == {
        "clinical": 12
    }
    assert index["identifiers"]["kind"] == "public" and index["options"]["samples_per_shard"] == 2
    for shard in index["shards"]:
        data = (shards / shard["name"]).read_bytes()
        assert (len(data), compute_sha256(data)) == (shard["num_bytes"], shard["sha256"])
    assert index["samples_sha256"] == compute_sha256((shards / "samples.parquet").read_bytes())


def change_index(shards: Path, **changes: object) -> None:
    path = shards / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_not_whole_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; build it with `panfm shards build"):
        open_shard_set(tmp_path / "nowhere")
    tar = shards / "shard-000003.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"shard-000003.tar: is missing or not \d+ bytes long"):
        open_shard_set(shards)
    tar.unlink()
    with pytest.raises(UserError, match=r"shard-000003.tar: is missing"):
        open_shard_set(shards)
    tar.write_bytes(whole)
    samples = shards / "samples.parquet"
    content = samples.read_bytes()
    samples.write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match=r"samples.parquet: is missing or not the file that index.json names"):
        open_shard_set(shards)
    samples.write_bytes(content)
    change_index(shards, schema_version=2)
    with pytest.raises(UserError, match=r"index.json: schema version 2; this panfm reads version 1"):
        open_shard_set(shards)
    (shards / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json: not valid JSON"):
        open_shard_set(shards)
    (shards / "index.json").unlink()
    with pytest.raises(UserError, match=r"shards: has no index.json, so its build did not complete"):
        open_shard_set(shards)


def test_a_shard_that_shrinks_later_is_noticed(shards: Path) -> None:
    shard_set = open_shard_set(shards)
    name = shard_set.table["shard"][11].as_py()
    (shards / name).write_bytes(b"short")
    with pytest.raises(UserError, match=rf"{name}: ends before byte \d+; the file is damaged"):
        shard_set.read_image(11)


def test_a_read_that_brings_less_goes_on(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system may, over a network or when a signal comes."""
    pread = os.pread
    monkeypatch.setattr(index_module.os, "pread", lambda file, length, offset: pread(file, min(length, 100), offset))
    assert check_every_row(open_shard_set(shards))


def test_files_are_limited_for_all_readers_together(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_OPEN_FILES", 4)
    sets = [open_shard_set(shards) for _ in range(3)]
    assert all(map(check_every_row, sets))
    assert sum(len(shard_set.reader.files) for shard_set in sets) == 4
