"""Shards at a URL: fetched once a machine, in pieces, whatever dies or changes on the way; and within the limit."""

import fcntl
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from panfm.errors import UserError
from panfm.files import compute_sha256, read_json, write_json
from panfm.shards import piece_cache
from panfm.shards.cache_disk import CacheConfig, count_bytes, locked, read_cache_config, write_piece
from panfm.shards.forget import remove_samples
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.inspect import summarise
from panfm.shards.piece_cache import PIECE_TYPE
from panfm.shards.tars import BLOCK
from panfm.shards.verify import verify_shard_set
from tests.data.conftest import build_source
from tests.shards.range_server import RangeServer, serve

NUM_IMAGES, NUM_PIECES = 40, 12


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"patient": f"p{n // 2}", "lesion": "", "day": "", "modality": "clinical"} for n in range(NUM_IMAGES)]
    return build_source(tmp_path_factory.mktemp("built"), "alpha", rows, shard=15)


@pytest.fixture
def shards(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "served" / "alpha")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PANFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(piece_cache, "PIECE_ROWS", 4)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def server(shards: Path, cache: Path) -> Iterator[RangeServer]:
    with serve(shards.parent) as running:
        yield running


def check_every_row(shard_set: ShardSet) -> bool:
    rows = range(shard_set.num_samples)
    return [compute_sha256(shard_set.read_image(row)) for row in rows] == shard_set.table["sha256"].to_pylist()


def list_pieces(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("pieces/*"))


def measure(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("pieces/*"))


def test_a_set_at_a_url_is_the_same_set(server: RangeServer, shards: Path, cache: Path) -> None:
    here, there = open_shard_set(shards), open_shard_set(f"{server.url}/alpha/")
    assert server.num_requests == 2 + 3  # index and rows, and the last byte of each shard
    assert there.table.equals(here.table) and there.compute_data_hash() == here.compute_data_hash()
    assert str(there.path) == f"{server.url}/alpha" and server.url in repr(there)
    assert check_every_row(there) and summarise(there).num_samples == NUM_IMAGES
    pieces = np.load(next(cache.rglob("pieces.npy")))
    assert pieces.dtype == PIECE_TYPE and len(pieces) == NUM_PIECES == len(server.pieces)
    assert set(server.pieces.values()) == {1}
    sizes = [entry["num_bytes"] for entry in here.index["shards"]]
    for number, size in enumerate(sizes):  # they cover every byte of every shard once
        own = pieces[pieces["shard"] == number]
        assert own["start"].tolist() == [0, *own["end"][:-1].tolist()] and own["end"][-1] == size
    assert sum(last - first + 1 for _, first, last in server.pieces) == sum(sizes) == measure(cache)
    server.forget()
    again = open_shard_set(f"{server.url}/alpha")
    assert check_every_row(again) and server.num_requests == 1  # index.json, which may have changed
    assert oct(cache.stat().st_mode)[-3:] == "700"  # others have no business with patients' images
    with pytest.raises(UserError, match=r"alpha: this changes a shard set.*download the set"):
        _ = there.folder


def test_the_reader_travels_small_and_works_after_a_fork(server: RangeServer) -> None:
    shard_set = open_shard_set(f"{server.url}/alpha")
    assert shard_set.read_image(0)  # the event loop of this process runs now
    assert len(pickle.dumps(shard_set.reader)) < 1000
    assert check_every_row(pickle.loads(pickle.dumps(shard_set)))
    shutil.rmtree(shard_set.samples_path.parent / "pieces")

    def work() -> None:
        os._exit(0 if check_every_row(shard_set) else 1)

    server.forget()
    children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check_every_row, [shard_set] * 4))
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(server.pieces) >= NUM_PIECES - 1 and set(server.pieces.values()) == {1}  # by seven readers, at once


READ_ONE = """
import sys
from panfm.shards.index import open_shard_set
shard_set = open_shard_set(sys.argv[1])
print("open", flush=True)
shard_set.read_image(int(sys.argv[2]))
"""


def test_a_killed_download_leaves_nothing_and_blocks_nobody(server: RangeServer, cache: Path) -> None:
    import threading

    shard_set = open_shard_set(f"{server.url}/alpha")  # lays out the pieces, as the child would
    server.stalled = threading.Event()
    child = subprocess.Popen([sys.executable, "-c", READ_ONE, f"{server.url}/alpha", "9"], stdout=subprocess.PIPE)
    assert server.stalled.wait(60)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    server.stalled = None
    assert [name for name in list_pieces(cache) if ".tmp-" not in name] == []
    assert shard_set.read_image(9) and check_every_row(shard_set)


def test_torn_files_are_fetched_again_and_swept(server: RangeServer, cache: Path) -> None:
    shard_set = open_shard_set(f"{server.url}/alpha")
    assert check_every_row(shard_set)
    folder = next(cache.rglob("pieces"))
    (folder / "00000003").write_bytes(b"half")  # a power cut
    (folder / "00000004.tmp-abc").write_bytes(bytes(1000))  # a killed download
    os.utime(folder / "00000004.tmp-abc", (time.time() - 7200,) * 2)
    assert check_every_row(open_shard_set(f"{server.url}/alpha"))
    (cache / "usage").write_text("nonsense")  # as after a power cut, too: sizes are counted anew
    (folder / "00000005").unlink()
    assert check_every_row(open_shard_set(f"{server.url}/alpha"))
    assert not list(folder.glob("*.tmp-*")) and int((cache / "usage").read_text()) >= measure(cache)


def test_the_limit_holds_while_more_is_read(server: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_shard_set(f"{server.url}/alpha")
    num_bytes = sum(entry["num_bytes"] for entry in whole.index["shards"])
    limit = 0.6 * num_bytes + whole.samples_path.stat().st_size + 20_000
    monkeypatch.setenv("PANFM_CACHE_GB", str(limit / 1e9))
    shard_set = open_shard_set(f"{server.url}/alpha")
    server.forget()
    order = np.random.default_rng(0)
    for _ in range(4):
        rows = (4 * order.permutation(NUM_IMAGES // 4)[:, None] + order.permutation(4)).reshape(-1)
        for row in rows.tolist():
            assert compute_sha256(shard_set.read_image(row)) == shard_set.table["sha256"][row].as_py()
            assert measure(cache) <= limit
        shard_set = pickle.loads(pickle.dumps(shard_set))  # no file stays open from pass to pass
    assert NUM_PIECES < sum(server.pieces.values()) < 4 * NUM_PIECES


def test_with_room_for_half_nearly_half_of_a_pass_is_there(tmp_path: Path) -> None:
    """Passes in ever new orders; keeping what was used last would find 15 % of them (85 % fetched)."""
    config, size = CacheConfig(tmp_path, 100 * 1000), 1000  # 100 of 200 pieces
    pieces = tmp_path / "set" / "pieces"
    pieces.mkdir(parents=True)
    (tmp_path / "set" / "origin").touch()
    order, num_fetched, now = np.random.default_rng(0), 0, 1_000_000_000
    with locked(tmp_path / "set" / "in_use"), locked(tmp_path / "usage") as usage:
        for number_of_pass in range(6):
            for number in order.permutation(200).tolist():
                path, now = pieces / f"{number:08d}", now + 1
                if not path.is_file():
                    num_fetched += number_of_pass >= 3
                    write_piece(path, bytes(size))
                    os.utime(path, (now, now))
                    count_bytes(config, usage, size)
                    assert path.is_file()  # what was just fetched is not what goes
                os.utime(path, (now, now))
            assert sum(path.stat().st_size for path in pieces.iterdir()) <= config.max_bytes
    assert 0.5 < num_fetched / (3 * 200) < 0.77


def test_sets_that_nobody_reads_go_first(
    server: RangeServer, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_shard_set(f"{server.url}/alpha")
    assert check_every_row(first)
    (old,) = [path.parent for path in cache.glob("*/origin")]
    other = shutil.copytree(shards, shards.parent / "beta")
    keys = first.table["key"].to_pylist()
    remove_samples(other, keys[:2], "test")  # another set, of nearly the same images
    monkeypatch.setenv("PANFM_CACHE_GB", str(1.2 * measure(cache) / 1e9))
    second = open_shard_set(f"{server.url}/beta")
    assert check_every_row(second)
    assert old.is_dir() and check_every_row(first)  # it is open: it shrank, and is fetched again as it is read
    del first
    assert check_every_row(second) and check_every_row(pickle.loads(pickle.dumps(second)))
    shutil.rmtree(next(path for path in cache.rglob("pieces") if path.parent != old))
    assert check_every_row(pickle.loads(pickle.dumps(second)))
    assert not old.exists()


def test_other_content_at_the_same_url_is_another_set_and_the_old_one_goes(
    server: RangeServer, shards: Path, cache: Path
) -> None:
    before = open_shard_set(f"{server.url}/alpha")
    assert before.read_image(0) and before.read_image(39)
    gone = before.table["key"].to_pylist()[:2]
    remove_samples(shards, gone, "consent withdrawn")
    after = open_shard_set(f"{server.url}/alpha")
    assert after.num_samples == NUM_IMAGES - 2 and check_every_row(after)
    assert len(list(cache.glob("*/origin"))) == 2  # a process still has the first one open
    with pytest.raises(UserError, match=r"shard-000000.tar: .*; the set was changed or damaged where it lies"):
        before.read_image(5)  # not yet fetched, and no longer there
    del before
    open_shard_set(f"{server.url}/alpha")
    (left,) = cache.glob("*/origin")
    assert not any(gone[0] in path.read_bytes().decode("latin-1") for path in left.parent.rglob("*") if path.is_file())


def test_what_is_missing_at_the_url_is_said_when_it_is_opened(server: RangeServer, shards: Path, cache: Path) -> None:
    url = f"{server.url}/alpha"
    tar = shards / "shard-000002.tar"
    whole = tar.read_bytes()
    for content in (whole[:-512], whole + b"x", b""):
        tar.write_bytes(content)
        with pytest.raises(UserError, match=r"alpha/shard-000002.tar: is not \d+ bytes long; upload the set again"):
            open_shard_set(url)
    tar.unlink()
    with pytest.raises(UserError, match=r"alpha/shard-000002.tar: no such file"):
        open_shard_set(url)
    tar.write_bytes(whole)
    shutil.rmtree(cache)
    rows = (shards / "samples.parquet").read_bytes()
    (shards / "samples.parquet").write_bytes(rows[:-1] + b"?")
    with pytest.raises(UserError, match=r"alpha/samples.parquet: is not the file that index.json names"):
        open_shard_set(url)
    (shards / "samples.parquet").write_bytes(rows)
    write_json(shards / "index.json", read_json(shards / "index.json") | {"schema_version": 9})
    with pytest.raises(UserError, match=r"alpha/index.json: schema version 9"):
        open_shard_set(url)
    (shards / "index.json").write_text("<html>")
    with pytest.raises(UserError, match=r"alpha/index.json: not valid JSON"):
        open_shard_set(url)
    (shards / "index.json").unlink()
    with pytest.raises(UserError, match=r"alpha/index.json: no such file; see that the URL is that of a shard set"):
        open_shard_set(url)
    assert not list(cache.rglob("*.tmp-*"))


def test_a_transfer_that_is_damaged_once_is_repeated(server: RangeServer) -> None:
    server.cut_every = 7
    assert check_every_row(open_shard_set(f"{server.url}/alpha")) and server.num_failed >= 2


def test_fetching_ahead_is_reading_before_it_is_asked(server: RangeServer, shards: Path, cache: Path) -> None:
    shard_set = open_shard_set(f"{server.url}/alpha")
    places = shard_set.places
    server.delay = 0.05
    for row in range(NUM_IMAGES):
        shard = places.shard_names[places.shard[row]]
        shard_set.reader.prefetch(shard, int(places.offset[row]), int(places.length[row]))
    deadline = time.monotonic() + 20
    while len([name for name in list_pieces(cache) if ".tmp-" not in name]) < NUM_PIECES:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.forget()
    assert check_every_row(shard_set) and server.num_requests == 0
    here = open_shard_set(shards)  # of a folder the system is told
    here.reader.prefetch(places.shard_names[0], int(places.offset[0]), int(places.length[0]))
    assert list(here.reader.files) == [places.shard_names[0]]
    for reader in (here.reader, shard_set.reader):
        reader.prefetch("shard-000099.tar", 512, 5)  # who reads it is told, not who only might


def test_a_place_that_is_no_member_is_refused(server: RangeServer) -> None:
    shard_set = open_shard_set(f"{server.url}/alpha")
    name = shard_set.places.shard_names[0]
    for shard, offset, length in (
        ("shard-000009.tar", BLOCK, 5),
        ("../index.json", BLOCK, 5),
        (name, -BLOCK, 5),
        (name, 0, 5),
        (name, int(shard_set.places.offset[0]), 1 << 40),
        (name, 1 << 40, 5),
    ):
        with pytest.raises(UserError, match="are no member that its index names"):
            shard_set.reader.read(shard, offset, length)
    with pytest.raises(UserError, match="no header of a tar member"):
        shard_set.reader.read(name, int(shard_set.places.offset[0]) + BLOCK, 5)


def test_a_set_in_memory_is_read_like_any_other(shards: Path, cache: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe(f"/sets/alpha/{path.name}", path.read_bytes())
    shard_set = open_shard_set("memory://sets/alpha")
    assert check_every_row(shard_set)
    assert str(verify_shard_set("memory://sets/alpha")).endswith("40 samples in 3 shards: all as the index says")


def test_verification_at_a_url_finds_what_it_finds_in_a_folder(server: RangeServer, shards: Path) -> None:
    url = f"{server.url}/alpha"
    assert verify_shard_set(url, deep=True).faults == ()
    first, second, third = sorted(shards.glob("*.tar"))
    first.unlink()
    data = bytearray(second.read_bytes())
    data[1024] ^= 1
    second.write_bytes(data)
    third.write_bytes(third.read_bytes() + bytes(512))
    faults = "\n".join(verify_shard_set(url).faults)
    assert f"{url}/{first.name}: no such file" in faults
    assert f"{url}/{second.name}: is not the file that index.json names (its SHA-256 differs)" in faults
    assert f"{url}/{third.name}: has" in faults


def test_the_cache_is_a_matter_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PANFM_CACHE", "PANFM_CACHE_GB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_cache_config()
    assert (config.folder, config.max_bytes) == (tmp_path / ".cache/panfm/shards", 50_000_000_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setenv("PANFM_CACHE_GB", "1.5")
    assert read_cache_config().folder == tmp_path / "x/panfm/shards" and read_cache_config().max_bytes == 1.5e9
    monkeypatch.setenv("PANFM_CACHE", "~/elsewhere")
    assert read_cache_config().folder == tmp_path / "elsewhere/shards"
    for wrong in ("many", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("PANFM_CACHE_GB", wrong)
        with pytest.raises(UserError, match=rf"PANFM_CACHE_GB \({wrong}\) must be a number of gigabytes above 0"):
            read_cache_config()


def test_a_cache_that_cannot_be_written_is_named(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANFM_CACHE", "/proc/nowhere")
    with pytest.raises(
        UserError, match=r"/proc/nowhere/shards: the cache of shards cannot be written.*set PANFM_CACHE"
    ):
        open_shard_set(f"{server.url}/alpha")


def test_a_waiting_reader_takes_what_the_other_fetched(server: RangeServer, cache: Path) -> None:
    """A lock that somebody holds is waited for; it is not asked for how long."""
    shard_set = open_shard_set(f"{server.url}/alpha")
    (cache / "locks").mkdir(exist_ok=True)
    held = [os.open(cache / "locks" / f"{n:02x}", os.O_RDWR | os.O_CREAT) for n in range(piece_cache.NUM_LOCKS)]
    for descriptor in held:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shard_set.read_image, 0)
        time.sleep(0.1)
        assert not waiting.done()
        for descriptor in held:
            os.close(descriptor)
        assert waiting.result(30)
