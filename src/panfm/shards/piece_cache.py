"""Shards at a URL, read in pieces that are kept on a local disk: each is fetched once for all processes of a machine.

    CACHE/shards/{usage, locks/, SET/{origin, in_use, samples.parquet, members.npy, pieces.npy, pieces/00000017}}

The loader draws blocks of neighbouring rows from shuffled places, and hands a block's rows to different processes. So
whole shards would all be wanted at the start, and single images would cost a request each: a piece is PIECE_ROWS rows.
SET is a hash of what index.json says of the bytes: other bytes at the same URL are another SET, and the old one goes.
A piece counts only under its final name, after every member in it was checked: the image hashes of samples.parquet, no
member that a shard may not hold. `cache_disk` keeps the folder within its limit.
"""

import fcntl
import hashlib
import os
import queue
import shutil
import threading
import zlib
from binascii import unhexlify
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.files import compute_file_sha256, compute_json_hash, open_atomic, write_text
from panfm.shards.cache_disk import (
    CacheConfig,
    count_bytes,
    describe_disk,
    is_unused,
    locked,
    open_lock,
    read_cache_config,
    read_origin,
    write_piece,
)
from panfm.shards.places import Members
from panfm.shards.storage import BRIEF, CHUNK_BYTES, ShardUrl, fetch
from panfm.shards.tars import BLOCK, MemberError, check_members, pad

FORMAT = 1  # raise it when the same set would be kept otherwise
PIECE_ROWS = 32  # rows a piece: the block of neighbours that the loader draws, hence one request for all of them
PIECE_BYTES = 8 << 20  # and no more than about this, where images are large
NUM_LOCKS = 256  # downloads at a time, of all processes; two pieces may share one
NUM_FETCHERS = 8  # threads a process that fetch ahead
MEMBER_TYPE = np.dtype([("offset", "<i8"), ("length", "<i8"), ("sha256", "u1", (32,))])
PIECE_TYPE = np.dtype([("shard", "<i4"), ("start", "<i8"), ("end", "<i8"), ("first", "<i8")])  # first: of its members
NO_HASH = bytes(32)  # of masks and captions, which the rows do not hash


class CachedSet:
    """One shard set at a URL and its pieces on disk. Small to pickle, safe to fork and to share between threads."""

    def __init__(self, url: ShardUrl, name: str, shards: tuple[str, ...], cache: CacheConfig) -> None:
        self.url = url
        self.name = name
        self.shards = shards  # names, in the order of index.json
        self.cache = cache
        self.folder = cache.folder / name
        self.samples_path = self.folder / "samples.parquet"
        self._lock = threading.Lock()
        self._in_use = -1
        self._index: _PieceIndex | None = None
        self._fetchers: _Fetchers | None = None

    def __reduce__(self) -> tuple[type["CachedSet"], tuple[ShardUrl, str, tuple[str, ...], CacheConfig]]:
        return CachedSet, (self.url, self.name, self.shards, self.cache)

    def __del__(self) -> None:
        if self._in_use >= 0:
            os.close(self._in_use)  # and with it the lock

    # -------------------------------------------------------------------------------------------- opening

    def enter(self) -> None:
        """Make the set's folder and hold it: nobody takes it away while this process has the set open."""
        if self._in_use >= 0:
            return
        try:
            self.cache.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(self.cache.folder / "usage"):
                self._remove_former()
                (self.folder / "pieces").mkdir(parents=True, exist_ok=True)
                if read_origin(self.folder) != str(self.url):
                    write_text(self.folder / "origin", f"{self.url}\n")
                self._in_use = open_lock(self.folder / "in_use")
                fcntl.flock(self._in_use, fcntl.LOCK_SH)
                os.utime(self._in_use)
        except OSError as error:
            raise UserError(describe_disk(self.cache, error)) from None

    def _remove_former(self) -> None:
        """Take away what this URL held before: it may have been changed because a patient must be forgotten."""
        for origin in self.cache.folder.glob("*/origin"):
            former = origin.parent
            if former != self.folder and read_origin(former) == str(self.url) and is_unused(former):
                shutil.rmtree(former, ignore_errors=True)

    def fetch_samples(self, sha256: str) -> None:
        """Bring samples.parquet to `samples_path`, once for all processes. Raises UserError unless its hash is this."""
        url = self.url / "samples.parquet"
        with locked(self.folder / "opening"):
            if self.samples_path.is_file() and compute_file_sha256(self.samples_path) == sha256:
                return
            try:
                with open_atomic(self.samples_path) as file:
                    digest, num_bytes = hashlib.sha256(), 0
                    while digest.hexdigest() != sha256:  # no store needs to be asked for its size
                        data = fetch(url, num_bytes, num_bytes + CHUNK_BYTES, exact=False, pauses=BRIEF)
                        if not data or num_bytes > self.cache.max_bytes:
                            raise UserError(
                                f"{url}: is not the file that index.json names; upload the set again, index.json last"
                            )
                        digest.update(data)
                        num_bytes += file.write(data)
            except OSError as error:
                raise UserError(describe_disk(self.cache, error)) from None

    def prepare(self, members: Members, shards: Sequence[dict[str, Any]]) -> None:
        """At the first opening on this machine: see that every shard is there in full, and lay out its pieces.

        Raises UserError for a shard that is missing or of another size.
        """
        with locked(self.folder / "opening"):
            if (self.folder / "pieces.npy").is_file():
                return
            self._check_sizes(shards)
            hashes = pq.read_table(self.samples_path, columns=["sha256"])["sha256"]
            if not pc.all(pc.match_substring_regex(hashes, "^[0-9a-f]{64}$")).as_py():
                raise UserError(f"{self.url}/samples.parquet: a sha256 is none; build and upload the set again")
            rows, pieces = lay_out_pieces(members, hashes, [shard["num_bytes"] for shard in shards])
            for name, array in (("members.npy", rows), ("pieces.npy", pieces)):
                with open_atomic(self.folder / name) as file:
                    np.save(file, array, allow_pickle=False)

    def _check_sizes(self, shards: Sequence[dict[str, Any]]) -> None:
        def check(shard: dict[str, Any]) -> None:
            num_bytes = shard["num_bytes"]
            # One request a shard, in a way that every store knows: the last byte, and one that must not be there.
            data = fetch(self.url / shard["name"], num_bytes - 1, num_bytes + 1, exact=False, pauses=BRIEF)
            if len(data) != 1:
                raise UserError(
                    f"{self.url / shard['name']}: is not {num_bytes} bytes long; upload the set again, index.json last"
                )

        check(shards[0])  # alone: where this fails, sixteen at a time would, too
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(check, shards[1:]))

    # -------------------------------------------------------------------------------------------- reading

    def find_piece(self, shard: str, offset: int, length: int) -> tuple[int, int]:
        """The piece that holds a member, and the byte of the shard at which it starts."""
        index = self._load_index()
        first, last = index.ranges.get(shard, (0, 0))
        number = first + int(np.searchsorted(index.starts[first:last], offset, side="right")) - 1
        if number < first or offset - BLOCK < index.starts[number] or offset + length > index.ends[number]:
            raise UserError(f"{self.url / shard}: bytes {offset} + {length} are no member that its index names")
        return number, int(index.starts[number])

    def open_piece(self, number: int) -> int:
        """A descriptor of a piece's file, which is fetched where it is missing."""
        index, path = self._load_index(), self._get_path(number)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return self._fetch(number)
        if os.fstat(descriptor).st_size != index.ends[number] - index.starts[number]:  # torn by a power cut
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return self._fetch(number)
        with suppress(PermissionError):  # a colleague's file
            os.utime(descriptor)  # when it was used last
        return descriptor

    def prefetch(self, number: int) -> None:
        """Begin to fetch a piece that is missing, without waiting for it."""
        if self._get_path(number).exists():
            return
        with self._lock:
            if self._fetchers is None or self._fetchers.process != os.getpid():
                self._fetchers = _Fetchers(self)
        self._fetchers.add(number)

    def _get_path(self, number: int) -> Path:
        return self.folder / "pieces" / f"{number:08d}"

    def _load_index(self) -> "_PieceIndex":
        if self._index is None:
            with self._lock:
                if self._index is None:
                    self.enter()
                    self._index = _PieceIndex.load(self.folder, self.shards)
        return self._index

    def _fetch(self, number: int) -> int:
        """Fetch a piece, unless another process just did, and open it."""
        path = self._get_path(number)
        stripe = zlib.crc32(f"{self.name}/{number}".encode()) % NUM_LOCKS
        try:
            with locked(self.cache.folder / "locks" / f"{stripe:02x}"):
                if not path.is_file():
                    data = self._download(number)
                    write_piece(path, data)
                    added = len(data)
                else:
                    added = 0
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if added:
                with locked(self.cache.folder / "usage") as usage:
                    count_bytes(self.cache, usage, added)
        except OSError as error:
            raise UserError(describe_disk(self.cache, error)) from None
        return descriptor

    def _download(self, number: int) -> bytes:
        index = self._load_index()
        piece = index.pieces[number]
        start, end = int(piece["start"]), int(piece["end"])
        last = int(index.pieces[number + 1]["first"]) if number + 1 < len(index.pieces) else len(index.members)
        members = index.members[int(piece["first"]) : last]
        shard = self.shards[int(piece["shard"])]
        fault = ""
        for _ in range(2):  # a transfer may be damaged once
            data = fetch(self.url / shard, start, end)
            try:
                _check_piece(data, start, members, is_end=number == index.ranges[shard][1] - 1)
                return data
            except MemberError as error:
                fault = str(error)
        raise UserError(
            f"{self.url / shard}: {fault}; the set was changed or damaged where it lies: see `panfm shards verify "
            f"{self.url}`, upload it again and start again"
        )


def _check_piece(data: bytes, start: int, members: NDArray[Any], *, is_end: bool) -> None:
    found = check_members(data, start, members["offset"].tolist(), members["length"].tolist(), is_end=is_end)
    for (name, content), wanted in zip(found, members["sha256"], strict=True):
        if wanted.tobytes() not in (NO_HASH, hashlib.sha256(content).digest()):
            raise MemberError(f"member {name!r} is not the image that the index names (its SHA-256 differs)")


@dataclass(frozen=True)
class _PieceIndex:
    """What members.npy and pieces.npy say; the long one stays on disk and is shared by all processes."""

    members: NDArray[Any]  # MEMBER_TYPE, mapped
    pieces: NDArray[Any]  # PIECE_TYPE
    starts: NDArray[np.int64]  # of the pieces, side by side for searching
    ends: NDArray[np.int64]
    ranges: dict[str, tuple[int, int]]  # shard -> its pieces

    @classmethod
    def load(cls, folder: Path, shards: tuple[str, ...]) -> "_PieceIndex":
        try:
            pieces = np.load(folder / "pieces.npy", allow_pickle=False)
            members = np.load(folder / "members.npy", mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{folder}: was removed while a process read it; start that again") from None
        bounds = np.searchsorted(pieces["shard"], np.arange(len(shards) + 1)).tolist()
        return cls(
            members,
            pieces,
            np.ascontiguousarray(pieces["start"]),
            np.ascontiguousarray(pieces["end"]),
            {name: (bounds[number], bounds[number + 1]) for number, name in enumerate(shards)},
        )


def open_cached_set(url: ShardUrl, index: dict[str, Any]) -> CachedSet:
    """The cached set of a URL whose index.json says this, held open, with its samples.parquet here.

    Raises UserError where that cannot be fetched or written, or is not the file that the index names.
    """
    names = tuple(shard["name"] for shard in index["shards"])
    cached = CachedSet(url, compute_set_name(index), names, read_cache_config())
    cached.enter()
    cached.fetch_samples(index["samples_sha256"])
    return cached


def lay_out_pieces(
    members: Members, hashes: pa.ChunkedArray, sizes: Sequence[int]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Members with their hashes, and pieces that cover every byte of every shard (of `sizes` bytes) that has members.

    hashes: hexadecimal SHA-256 of each row's image.
    A piece ends where a row with another number // PIECE_ROWS begins, or after about PIECE_BYTES; what lies before the
    first member it names (a .json file) belongs to it.
    """
    rows = np.zeros(members.offset.size, dtype=MEMBER_TYPE)
    rows["offset"], rows["length"] = members.offset, members.length
    digests = np.frombuffer(unhexlify("".join(hashes.to_pylist())), dtype=np.uint8).reshape(-1, 32)
    rows["sha256"][members.is_image] = digests[members.row[members.is_image]]
    image_cell = np.zeros(digests.shape[0], dtype=np.int64)  # of the row's image: its mask must not leave it
    image_cell[members.row[members.is_image]] = members.offset[members.is_image] // PIECE_BYTES
    keys = np.stack([members.shard, members.row // PIECE_ROWS, image_cell[members.row]])
    is_first = np.ones(members.offset.size, dtype=bool)
    is_first[1:] = (np.diff(keys, axis=1) != 0).any(axis=0)
    first = np.flatnonzero(is_first)
    last = np.append(first[1:], members.offset.size) - 1
    pieces = np.zeros(first.size, dtype=PIECE_TYPE)
    pieces["shard"], pieces["first"] = members.shard[first], first
    pieces["end"] = members.offset[last] + [pad(int(length)) for length in members.length[last]]
    ends_shard = np.ones(first.size, dtype=bool)
    ends_shard[:-1] = pieces["shard"][1:] != pieces["shard"][:-1]
    pieces["end"][ends_shard] = np.asarray(sizes, dtype=np.int64)[pieces["shard"][ends_shard]]
    pieces["start"][1:] = np.where(ends_shard[:-1], 0, pieces["end"][:-1])
    return rows, pieces


def compute_set_name(index: dict[str, Any]) -> str:
    """The name of a set's folder in the cache: a hash of all that decides which bytes its pieces hold."""
    shards = [[shard["name"], shard["num_bytes"], shard["sha256"]] for shard in index["shards"]]
    return compute_json_hash([FORMAT, PIECE_ROWS, PIECE_BYTES, index["samples_sha256"], shards])[:32]


# ------------------------------------------------------------------------------------------------ fetching ahead


class _Fetchers:
    """Threads of one process that fetch what it will want next. Daemons: nothing waits for them at the end."""

    def __init__(self, owner: CachedSet) -> None:
        self.process = os.getpid()
        self._owner = owner
        self._wanted: queue.Queue[int] = queue.Queue()
        self._pending: set[int] = set()
        self._lock = threading.Lock()
        for _ in range(NUM_FETCHERS):
            threading.Thread(target=self._run, daemon=True).start()

    def add(self, number: int) -> None:
        with self._lock:
            if number in self._pending:
                return
            self._pending.add(number)
        self._wanted.put(number)

    def _run(self) -> None:
        while True:
            number = self._wanted.get()
            with suppress(UserError):  # whoever reads it meets the same fault, and says so
                os.close(self._owner.open_piece(number))
            with self._lock:
                self._pending.discard(number)
