"""The end of the first room and the door to the next: a finished shard set, opened, checked and read by row.

    DIR/{*.tar, samples.parquet, index.json}  ->  open_shard_set  ->  ShardSet.table, read_image(row), ...

`index.json` is written last: its existence means that the build completed. Bytes are read at the offsets of the
table with `os.pread`, so that any number of forked or threaded readers share the files without seeking.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from panfm.config import validate
from panfm.errors import UserError
from panfm.files import compute_file_sha256, read_json
from panfm.shards.cards import SourceCard
from panfm.shards.schema import SAMPLES_SCHEMA, SCHEMA_VERSION

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.parquet"
QUARANTINE_FILE = "quarantine.csv"  # what was left out and why, by hashed key
PENDING_REMOVAL = ".forget/commit.json"  # there: samples are being removed, and old and new files lie side by side
MAX_OPEN_FILES = 128  # a process; well below the 1024 that most systems allow


class ShardReader:
    """Reads byte ranges of shard files; keeps the files in use open. Can be pickled, forked and shared by threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path]]:
        return ShardReader, (self.folder,)

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset` of a shard; a file that ends before that is a UserError."""
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _Descriptor(self.folder / shard)
                if len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)  # closed when its last reader lets go of it
            self._files.move_to_end(shard)
        data = os.pread(file.number, length, offset)
        if len(data) != length:
            raise UserError(
                f"{self.folder / shard}: ends before byte {offset + length}; the file is damaged, build again"
            )
        return data


class _Descriptor:
    """A file descriptor that closes with its last reference: a reader in another thread never loses it midway."""

    def __init__(self, path: Path) -> None:
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.number = -1
            raise UserError(f"{path}: no such file; the shard set is not whole, copy or build it again") from None

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@dataclass(frozen=True)
class Exclusion:
    """What pretraining must not see: group_ids by source, and the tasks whose test groups these are; and what an audit
    lists besides: keys by source, and the hash that names the audit."""

    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    keys: Mapping[str, frozenset[str]] = field(default_factory=dict)
    audit: str | None = None


@dataclass(frozen=True)
class ShardSet:
    """One source as shards. Rows are numbered as in `table` (SAMPLES_SCHEMA), 0 .. num_samples - 1."""

    path: Path
    card: SourceCard
    index: dict[str, Any] = field(repr=False)  # index.json as read
    table: pa.Table = field(repr=False)
    reader: ShardReader = field(repr=False)
    places: "Places" = field(repr=False)

    @property
    def source(self) -> str:
        """Name of the source; splits join on it and the sample's key."""
        return self.card.name

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return int(self.table.num_rows)

    def read_image(self, row: int) -> bytes:
        """The stored image file of a row: JPEG, PNG or WebP."""
        places = self.places
        shard = places.shard_names[places.shard[row]]
        return self.reader.read(shard, int(places.offset[row]), int(places.length[row]))

    def read_mask(self, row: int) -> bytes | None:
        """The lesion mask of a row as a PNG file of the image's size, or None."""
        return self._read_optional(row, self.places.mask_offset, self.places.mask_length)

    def read_caption(self, row: int) -> str | None:
        """The caption of a row, or None."""
        data = self._read_optional(row, self.places.caption_offset, self.places.caption_length)
        return None if data is None else data.decode()

    def _read_optional(self, row: int, offsets: np.ndarray, lengths: np.ndarray) -> bytes | None:
        if offsets[row] < 0:
            return None
        shard = self.places.shard_names[self.places.shard[row]]
        return self.reader.read(shard, int(offsets[row]), int(lengths[row]))

    def compute_data_hash(self) -> str:
        """The data hash of the whole set: which images, in which order (see `compute_data_hash`)."""
        return compute_data_hash(self.table["key"].to_pylist(), self.table["sha256"].to_pylist())


@dataclass(frozen=True)
class Places:
    """Where each row's bytes lie, as plain arrays [num_samples]: reading a row must not go through Arrow scalars."""

    shard_names: tuple[str, ...]
    shard: np.ndarray  # number in shard_names
    offset: np.ndarray
    length: np.ndarray
    mask_offset: np.ndarray  # -1: none
    mask_length: np.ndarray
    caption_offset: np.ndarray  # -1: none
    caption_length: np.ndarray


def open_shard_set(path: str | Path) -> ShardSet:
    """Open a finished shard set and check that it is whole.

    Raises UserError: what `read_index` refuses, a samples.parquet that is not the one that the index names, a shard
    that is missing or of another size.
    """
    path = Path(path)
    index = read_index(path)
    samples = path / SAMPLES_FILE
    if not samples.is_file() or compute_file_sha256(samples) != index["samples_sha256"]:
        raise UserError(
            f"{samples}: is missing or not the file that {INDEX_FILE} names; copy or build the shards again"
        )
    for shard in index["shards"]:
        file = path / shard["name"]
        if not file.is_file() or file.stat().st_size != shard["num_bytes"]:
            raise UserError(
                f"{file}: is missing or not {shard['num_bytes']} bytes long; copy or build the shards again"
            )
    card = validate(SourceCard, index["card"], where=str(path / INDEX_FILE))
    table = pq.read_table(samples, schema=SAMPLES_SCHEMA)
    return ShardSet(path, card, index, table, ShardReader(path), _read_places(table))


def read_index(path: str | Path) -> dict[str, Any]:
    """Read the index.json of a finished shard set; nothing else of it is looked at.

    Raises UserError: no such folder, no index.json (the build did not complete), another schema version, a removal of
    samples that was cut off (`shards.forget`).
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; build it with `panfm shards build CARD --root RAW --out {path}`")
    if not (path / INDEX_FILE).is_file():
        raise UserError(
            f"{path}: has no {INDEX_FILE}, so its build did not complete (or it is no shard set); run the same "
            "`panfm shards build` again, it goes on where it stopped"
        )
    if (path / PENDING_REMOVAL).is_file():
        raise UserError(
            f"{path}: samples were being removed from it when that was cut off; complete it with "
            f"`panfm shards forget {path} --finish`"
        )
    index = read_json(path / INDEX_FILE)
    version = index.get("schema_version") if isinstance(index, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path / INDEX_FILE}: schema version {version!r}; this panfm reads version {SCHEMA_VERSION}, so build the "
            "shards again"
        )
    return index  # type: ignore[no-any-return]


def _read_places(table: pa.Table) -> Places:
    shards = table["shard"].combine_chunks().dictionary_encode()

    def column(name: str) -> np.ndarray:
        return table[name].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]

    return Places(
        shard_names=tuple(shards.dictionary.to_pylist()),
        shard=shards.indices.to_numpy(zero_copy_only=False),
        offset=column("offset"),
        length=column("length"),
        mask_offset=column("mask_offset"),
        mask_length=column("mask_length"),
        caption_offset=column("caption_offset"),
        caption_length=column("caption_length"),
    )


def compute_data_hash(keys: Iterable[str], sha256s: Iterable[str]) -> str:
    """Hash which images, in which order: SHA-256 over the lines "key sha256"; features and results are keyed by it."""
    digest = hashlib.sha256()
    for key, sha256 in zip(keys, sha256s, strict=True):
        digest.update(f"{key} {sha256}\n".encode())
    return digest.hexdigest()
