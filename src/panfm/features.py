"""Frozen features of an encoder on a shard set, computed once: encoder x rows -> Features [N, D] on disk.

    CACHE/<encoder hash>-<data hash>/ {part-*.bin while it runs; then features.npy, manifest.json last}

The key is content: encoder hash (weights, config, transform, pooling, dtype, code version) x data hash (ordered key and
sha256 of the rows). What lies in the folder is believed by the hashes of its bytes, never by its name: a damaged cache
is computed again. A killed run goes on from its last whole part and ends with the values of an unbroken one.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from panfm.encoder.embedding import iterate_features
from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.files import compute_file_sha256, compute_sha256, open_atomic, read_json, write_bytes, write_json
from panfm.progress import console, progress_bar
from panfm.shards.index import ShardSet, compute_data_hash

FEATURES_FORMAT = 1
PART_ROWS = 512  # rows that a kill can cost; a part of ViT-S features is 0.8 MB
DIGEST_BYTES = 32
_FOLDER_NAME = re.compile(r"[0-9a-f]{24}-([0-9a-f]{24}|files)")  # _Identity.get_folder's, file_features' store


@dataclass(frozen=True)
class Features:
    """Features of some rows of a shard set; `values` may be a read-only memory map."""

    keys: tuple[str, ...]
    values: NDArray[np.float32]  # [N, D]
    rows: NDArray[np.int64]  # [N], rows of the shard set's table
    encoder_hash: str
    data_hash: str


def compute_features(
    encoder: Encoder,
    shard_set: ShardSet,
    rows: Sequence[int] | NDArray[np.integer] | None = None,
    *,
    cache_dir: str | Path,
    batch_size: int = 64,
    workers: int = 1,
) -> Features:
    """Compute, or read from the cache, the features of `rows` (None: every row) in the order given.

    A subset is read from the cache of the whole set where that exists; otherwise the subset alone is computed, and
    cached under its own data hash. Two processes that want the same features compute them once: the second waits.
    Values do not depend on where a run was interrupted; between batch sizes they differ by rounding (about 1e-6).

    workers: threads that decode ahead of the forward pass; 0 decodes in between.

    Raises UserError for an image that is not what the index says or does not decode, naming shard and key.
    """
    work = _plan(encoder, shard_set, rows, batch_size)
    wanted, cache = work.identity, Path(cache_dir)
    if not work.keys:
        return _make_features(work, np.empty((0, encoder.embed_dim), np.float32))

    values = _open_cache(cache, wanted)
    if values is None and rows is not None:
        whole = _open_cache(
            cache, _Identity(encoder.hash, shard_set.compute_data_hash(), shard_set.num_samples, encoder.embed_dim)
        )
        values = None if whole is None else whole[work.rows]
    if values is None:
        with locked(wanted.get_folder(cache)):
            values = _open_cache(cache, wanted)  # another process may have written it while this one waited
            if values is None:
                _fill_cache(cache, work, encoder, workers)
                values = _open_cache(cache, wanted)
        assert values is not None, f"the cache that was just written in {cache} does not read back"
    return _make_features(work, values)


def compute_share(
    encoder: Encoder,
    shard_set: ShardSet,
    rank: int,
    world_size: int,
    *,
    cache_dir: str | Path,
    batch_size: int = 64,
    workers: int = 1,
) -> None:
    """Compute this rank's share of the parts that `compute_features` of every row then finds and joins.

    For ranks that work on one cache folder: all call this, and when the last is done one calls `compute_features`. What
    they end with has the bytes of a single process.

    Raises UserError as `compute_features` does.
    """
    work, cache = _plan(encoder, shard_set, None, batch_size), Path(cache_dir)
    if not work.keys or _open_cache(cache, work.identity) is not None:
        return
    with locked(work.identity.get_folder(cache), shared=True):
        if _open_cache(cache, work.identity) is None:
            _compute_parts(cache, work, encoder, workers, rank, world_size)


def write_features(
    path: str | Path,
    keys: Sequence[str],
    values: NDArray[np.float32],
    facts: Mapping[str, str] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write features as parquet, atomically: columns key (string), `columns` (strings), feature (float32 [D] a row).

    facts: strings for the file's metadata, such as the encoder's address and hash.
    """
    texts = {"key": keys, **(columns or {})}
    assert all(len(column) == len(values) for column in texts.values()), (list(texts), len(values))
    fields = [pa.field(name, pa.string(), False) for name in texts]
    schema = pa.schema([*fields, pa.field("feature", pa.list_(pa.float32()), False)])
    dim = values.shape[1]
    with open_atomic(path) as file, pq.ParquetWriter(file, schema.with_metadata(dict(facts or {}))) as writer:
        for start in range(0, len(keys), PART_ROWS):  # in pieces: a list column holds at most 2^31 numbers
            block = np.ascontiguousarray(values[start : start + PART_ROWS], dtype=np.float32)
            offsets = pa.array(np.arange(0, block.size + 1, dim, dtype=np.int32))
            lists = pa.ListArray.from_arrays(offsets, pa.array(block.reshape(-1)))
            pieces = [pa.array(column[start : start + PART_ROWS], pa.string()) for column in texts.values()]
            writer.write_table(pa.table([*pieces, lists], schema=writer.schema))


def remove_cached(cache_dir: str | Path, source: str) -> tuple[list[Path], list[Path]]:
    """Remove all cached features of a source; (folders removed, folders that another process is computing just now).

    For a patient who must be forgotten: an entry does not say which images it holds, so all of the source go, and those
    too that do not say their source (unfinished or damaged). A cache costs nothing but the time to fill it again.

    Raises UserError where there is no such folder.
    """
    cache = Path(cache_dir)
    if not cache.is_dir():
        raise UserError(f"{cache}: no such folder of cached features; `cache_dir` of an evaluation names it")
    removed, busy = [], []
    for folder in sorted(path for path in cache.iterdir() if _FOLDER_NAME.fullmatch(path.name) and path.is_dir()):
        try:
            manifest = read_json(folder / "manifest.json")
        except UserError:
            manifest = None
        if isinstance(manifest, dict) and manifest.get("source", source) != source:
            continue
        with (folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy.append(folder)
                continue
            shutil.rmtree(folder)
            removed.append(folder)
    return removed, busy


@dataclass(frozen=True)
class _Identity:
    """What a cache must be of, in full; folder names hold a part of it."""

    encoder_hash: str
    data_hash: str
    num_rows: int
    embed_dim: int

    def get_folder(self, cache: Path) -> Path:
        return cache / f"{self.encoder_hash[:24]}-{self.data_hash[:24]}"

    def to_plain(self) -> dict[str, Any]:
        return {"format": FEATURES_FORMAT, **self.__dict__}


@dataclass(frozen=True)
class _Work:
    """What is to be computed: rows in the order wanted, and the parts that their features are kept in meanwhile."""

    identity: _Identity
    shard_set: ShardSet
    rows: NDArray[np.int64]  # [N], of the shard set's table
    keys: tuple[str, ...]
    sha256s: tuple[str, ...]
    batch_size: int

    @property
    def part_rows(self) -> int:
        """Rows of a part: whole batches, so that every batch has the same images whether or not a run was cut off."""
        return self.batch_size * max(1, PART_ROWS // self.batch_size)

    @property
    def starts(self) -> range:
        """First rows of the parts."""
        return range(0, len(self.keys), self.part_rows)

    def get_size(self, start: int) -> int:
        """Number of rows of the part that begins there; the last may be short."""
        return min(self.part_rows, len(self.keys) - start)

    def read_part(self, cache: Path, start: int) -> bytes | None:
        """The float32 bytes of a part if it is whole and was computed for this identity and batch size, else None."""
        try:
            content = self._get_path(cache, start).read_bytes()
        except FileNotFoundError:
            return None
        digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        whole = len(data) == self.get_size(start) * self.identity.embed_dim * 4
        return data if whole and digest == compute_digest(self._seal(start), data) else None

    def write_part(self, cache: Path, start: int, values: NDArray[np.float32]) -> None:
        """Keep the features of a part, atomically."""
        data = np.ascontiguousarray(values, dtype="<f4").tobytes()
        write_bytes(self._get_path(cache, start), compute_digest(self._seal(start), data) + data)

    def _get_path(self, cache: Path, start: int) -> Path:
        return self.identity.get_folder(cache) / f"part-{start:09d}.bin"

    def _seal(self, start: int) -> str:
        return f"{self.identity} {self.batch_size} {start}"


def _plan(
    encoder: Encoder, shard_set: ShardSet, rows: Sequence[int] | NDArray[np.integer] | None, batch_size: int
) -> _Work:
    assert batch_size >= 1, batch_size
    numbers = np.arange(shard_set.num_samples) if rows is None else np.asarray(rows, dtype=np.int64)
    assert numbers.ndim == 1 and (numbers.size == 0 or 0 <= numbers.min() <= numbers.max() < shard_set.num_samples)
    columns = shard_set.table.select(["key", "sha256"]).take(pa.array(numbers))
    keys, sha256s = columns["key"].to_pylist(), columns["sha256"].to_pylist()
    identity = _Identity(encoder.hash, compute_data_hash(keys, sha256s), len(keys), encoder.embed_dim)
    return _Work(identity, shard_set, numbers, tuple(keys), tuple(sha256s), batch_size)


def _make_features(work: _Work, values: NDArray[np.float32]) -> Features:
    return Features(work.keys, values, work.rows, work.identity.encoder_hash, work.identity.data_hash)


def _open_cache(cache: Path, identity: _Identity) -> NDArray[np.float32] | None:
    """Map a finished cache into memory if it is whole and of this identity, else None."""
    folder = identity.get_folder(cache)
    if not (folder / "manifest.json").is_file():
        return None
    try:
        manifest = read_json(folder / "manifest.json")
        if not identity.to_plain().items() <= manifest.items():
            fault = "it is of another encoder, of other images or of another format"
        elif compute_file_sha256(folder / "features.npy") != manifest["features_sha256"]:
            fault = "features.npy is damaged"
        else:
            return np.load(folder / "features.npy", mmap_mode="r")  # type: ignore[no-any-return]
    except (UserError, OSError, KeyError, AttributeError) as error:
        fault = str(error)
    console.print(f"{folder}: not used, {fault}; the features are computed again", highlight=False, soft_wrap=True)
    return None


def _fill_cache(cache: Path, work: _Work, encoder: Encoder, workers: int) -> None:
    """Compute the parts that are missing, join them, and write the manifest last."""
    identity = work.identity
    folder = identity.get_folder(cache)
    (folder / "manifest.json").unlink(missing_ok=True)
    _compute_parts(cache, work, encoder, workers, rank=0, world_size=1)
    with open_atomic(folder / "features.npy") as file:
        shape = (identity.num_rows, identity.embed_dim)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in work.starts:
            data = work.read_part(cache, start)
            assert data is not None, f"part {start} of {folder} was written and does not read back"
            file.write(data)
    facts = {
        "features_sha256": compute_file_sha256(folder / "features.npy"),
        "encoder": encoder.name,
        "source": work.shard_set.source,
    }
    write_json(folder / "manifest.json", {**identity.to_plain(), **facts})
    for path in folder.glob("part-*"):  # those of another batch size and torn temporary files, too
        path.unlink()


def _compute_parts(cache: Path, work: _Work, encoder: Encoder, workers: int, rank: int, world_size: int) -> None:
    """Compute those of this rank's parts (every world_size-th) that are not whole on disk."""
    own = work.starts[rank::world_size]
    todo = [start for start in own if work.read_part(cache, start) is None]
    missing = [row for start in todo for row in range(start, start + work.get_size(start))]
    num_own = sum(map(work.get_size, own))
    share = f", a share of {world_size}" if world_size > 1 else ""
    with progress_bar(
        f"features of {work.shard_set.source} by {encoder.name}{share}", num_own, done=num_own - len(missing)
    ) as advance:
        shards = work.shard_set.table["shard"].take(pa.array(work.rows[missing])).to_pylist()
        names = [f"{work.shard_set.path}/{shard}: {work.keys[i]}" for i, shard in zip(missing, shards, strict=True)]
        readers = [
            partial(_read_verified, work.shard_set, int(work.rows[i]), work.sha256s[i], name)
            for i, name in zip(missing, names, strict=True)
        ]
        batches = iterate_features(encoder, readers, names, work.batch_size, workers)
        for start in todo:
            blocks: list[NDArray[np.float32]] = []
            while sum(map(len, blocks)) < work.get_size(start):
                blocks.append(next(batches))
                advance(len(blocks[-1]))
            work.write_part(cache, start, np.concatenate(blocks))


def compute_digest(seal: str, data: bytes) -> bytes:
    """The hash that stands before the bytes of a part: of what they belong to, and of themselves."""
    return hashlib.sha256(seal.encode() + data).digest()


def _read_verified(shard_set: ShardSet, row: int, sha256: str, name: str) -> bytes:
    data = shard_set.read_image(row)
    if compute_sha256(data) != sha256:
        raise UserError(f"{name}: its bytes are not those of the index: the shard is damaged; copy or build it again")
    return data


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the folder's lock, alone or with others that want it shared; it falls with the process that held it."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(
                f"{folder}: another process computes these features; waiting", highlight=False, soft_wrap=True
            )
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)
