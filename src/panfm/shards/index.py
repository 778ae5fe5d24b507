"""The end of the first room and the door to the next: a finished shard set, opened, checked and read by row.

    DIR or URL/{*.tar, samples.parquet, index.json}  ->  open_shard_set  ->  ShardSet.table, read_image(row), ...

`index.json` is written last: its existence means that the build completed. Bytes are read at the offsets of the
table with `os.pread`, so that any number of forked or threaded readers share the files without seeking; of a set at a
URL they are those of the pieces that `piece_cache` keeps. Nothing is ever unpacked. What a row names is refused unless
it lies in a regular file of the set, apart from what others name (when opened), and behind the header of a plain file
with a sample's name and this length (when read). Members that no row names are never read here: `panfm shards verify`
refuses them.
"""

import hashlib
import itertools
import json
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
from panfm.shards.piece_cache import CachedSet, open_cached_set
from panfm.shards.places import PLACE_COLUMNS, Places, list_members, read_places
from panfm.shards.schema import SAMPLES_SCHEMA, SCHEMA_VERSION
from panfm.shards.storage import BRIEF, Location, ShardUrl, fetch, get_size, open_regular, parse_folder, parse_location
from panfm.shards.tars import BLOCK, MemberError, parse_header

__all__ = ["PLACE_COLUMNS", "Places", "ShardReader", "ShardSet", "open_shard_set", "read_index"]

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.parquet"
QUARANTINE_FILE = "quarantine.csv"  # what was left out and why, by hashed key
PENDING_REMOVAL = ".forget/commit.json"  # there: samples are being removed, and old and new files lie side by side
MAX_OPEN_FILES = 256  # a process, of all sets together; well below the 1024 that most systems allow
MAX_INDEX_BYTES = 256 << 20  # of an index.json at a URL: over a million shards
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ShardReader:
    """Reads members of shards by place; keeps the files in use open. Can be pickled, forked and shared by threads."""

    def __init__(self, source: Path | CachedSet) -> None:
        self.source = source
        self.number = next(_READERS)
        self.files: dict[str | int, _Descriptor] = {}  # open shards or pieces; _OPEN_FILES limits them

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path | CachedSet]]:
        return ShardReader, (self.source,)

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """The member of `length` bytes at `offset` of a shard.

        Raises UserError: a file that ends before that or is none, bytes that are no member of this length.
        """
        file, start = self._open(shard, offset, length)
        data = _read_bytes(file.number, BLOCK + length, offset - BLOCK - start)
        if len(data) != BLOCK + length:
            raise UserError(
                f"{self._name(shard)}: ends before byte {offset + length}; the file is damaged, build again"
            )
        try:
            name, size = parse_header(data[:BLOCK])
            if size != length or name.endswith(".json"):
                raise MemberError(f"member {name!r} of {size} bytes is not the one of {length} that its index names")
        except MemberError as error:
            raise UserError(
                f"{self._name(shard)}, byte {offset}: {error}; see `panfm shards verify`, copy or build the set again"
            ) from None
        return data[BLOCK:]

    def prefetch(self, shard: str, offset: int, length: int) -> None:
        """Say that `read` will be asked for this soon, so that disk or network can begin; returns at once.

        On a disk it also keeps the system from reading ahead where nothing will be wanted: of one window of shuffled
        blocks out of 1.8 GB, 1.05 bytes were read for each used, and 3.04 without.
        """
        with suppress(UserError):  # whoever reads it meets the same fault
            if isinstance(self.source, CachedSet):
                piece, _ = self.source.find_piece(shard, offset, length)
                if piece not in self.files:
                    self.source.prefetch(piece)
            elif hasattr(os, "posix_fadvise"):
                file, _ = self._open(shard, offset, length)
                os.posix_fadvise(file.number, offset - BLOCK, BLOCK + length, os.POSIX_FADV_WILLNEED)

    def _open(self, shard: str, offset: int, length: int) -> "tuple[_Descriptor, int]":
        """The open file that holds a member, and the byte of the shard at which that file starts."""
        source = self.source
        if isinstance(source, CachedSet):
            piece, start = source.find_piece(shard, offset, length)
            return _OPEN_FILES.get(self, piece, lambda: source.open_piece(piece)), start
        return _OPEN_FILES.get(self, shard, lambda: open_regular(source / shard)), 0

    def _name(self, shard: str) -> str:
        return str((self.source.url if isinstance(self.source, CachedSet) else self.source) / shard)


def _read_bytes(descriptor: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`, fewer only at the end of the file: a single read may bring less, on NFS above all."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), offset + len(data))):
        data += more
    return data


class _Descriptor:
    """A file descriptor that closes with its last reference: a reader in another thread never loses it midway."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _OpenFiles:
    """Which files this process has open, the one used last at the end. The readers hold them, and close with them."""

    def __init__(self) -> None:
        self._holders: OrderedDict[tuple[int, str | int], weakref.ref[ShardReader]] = OrderedDict()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._renew_lock)  # another thread of the parent may have held it

    def get(self, reader: ShardReader, name: str | int, open_file: Callable[[], int]) -> _Descriptor:
        key = (reader.number, name)
        with self._lock:
            file = reader.files.get(name)
            if file is not None:
                self._holders.move_to_end(key)
                return file
        opened = _Descriptor(open_file())  # outside of the lock: it may be a download
        with self._lock:
            file = reader.files.setdefault(name, opened)
            self._holders[key] = weakref.ref(reader)
            self._holders.move_to_end(key)
            while len(self._holders) > MAX_OPEN_FILES:
                (_, oldest), holder = self._holders.popitem(last=False)
                if (owner := holder()) is not None:
                    owner.files.pop(oldest, None)
        return file

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


_OPEN_FILES = _OpenFiles()
_READERS = itertools.count()


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

    path: Location
    card: SourceCard
    index: dict[str, Any] = field(repr=False)  # index.json as read
    table: pa.Table = field(repr=False)
    reader: ShardReader = field(repr=False)
    places: Places = field(repr=False)

    @property
    def source(self) -> str:
        """Name of the source; splits join on it and the sample's key."""
        return self.card.name

    @property
    def folder(self) -> Path:
        """The folder that the set lies in, for what is written into it. Raises UserError for a set at a URL."""
        return parse_folder(self.path, "this")

    @property
    def samples_path(self) -> Path:
        """samples.parquet: in the folder, or as the cache holds it."""
        source = self.reader.source
        return source.samples_path if isinstance(source, CachedSet) else source / SAMPLES_FILE

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


def open_shard_set(path: str | Location, columns: Iterable[str] | None = None) -> ShardSet:
    """Open a finished shard set, in a folder or at a URL, and check that it is whole.

    columns: what of the table is wanted, besides where the bytes lie (PLACE_COLUMNS); None reads all of it, which is
    about 1 KB a row.

    Raises UserError: what `parse_location` and `read_index` refuse, a samples.parquet that is not the one that the
    index names, a shard that is missing, of another size or no regular file, a row that names what cannot be a member.
    """
    location = parse_location(path)
    index = read_index(location)
    source: Path | CachedSet
    if isinstance(location, ShardUrl):
        source = open_cached_set(location, index)
        samples = source.samples_path
    else:
        source, samples = location, location / SAMPLES_FILE
        if get_size(samples) is None or compute_file_sha256(samples) != index["samples_sha256"]:
            raise UserError(
                f"{samples}: is missing or not the file that {INDEX_FILE} names; copy or build the shards again"
            )
        for shard in index["shards"]:
            if get_size(location / shard["name"]) != shard["num_bytes"]:
                raise UserError(
                    f"{location / shard['name']}: is missing or not {shard['num_bytes']} bytes long; copy or build the "
                    "shards again"
                )
    card = validate(SourceCard, index["card"], where=str(location / INDEX_FILE))
    table = _read_table(samples, index, location / SAMPLES_FILE, columns)
    places = read_places(table)
    members = list_members(places, index["shards"], location / SAMPLES_FILE)
    if isinstance(source, CachedSet):
        source.prepare(members, index["shards"])
    return ShardSet(location, card, index, table, ShardReader(source), places)


def read_index(path: str | Location) -> dict[str, Any]:
    """Read the index.json of a finished shard set; nothing else of it is looked at.

    Raises UserError: no such folder, no index.json (the build did not complete), another schema version, a shard with a
    name that could lead out of the folder, a removal of samples that was cut off (`shards.forget`).
    """
    location = parse_location(path)
    file: Location
    if isinstance(location, ShardUrl):
        file = location / INDEX_FILE
        data = fetch(file, 0, MAX_INDEX_BYTES, exact=False, pauses=BRIEF)
        try:
            index = json.loads(data)
        except ValueError:
            raise UserError(f"{file}: not valid JSON; it was not written by panfm or is damaged") from None
    else:
        _check_folder(location)
        file = location / INDEX_FILE
        index = read_json(file)
    version = index.get("schema_version") if isinstance(index, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema version {version!r}; this panfm reads version {SCHEMA_VERSION}, so build the shards again"
        )
    _check_shards(index, file)
    return index  # type: ignore[no-any-return]


def _check_folder(folder: Path) -> None:
    """Refuse a folder without a finished set."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; build it with `panfm shards build CARD --root RAW --out {folder}`")
    if not (folder / INDEX_FILE).is_file():
        raise UserError(
            f"{folder}: has no {INDEX_FILE}, so its build did not complete (or it is no shard set); run the same "
            "`panfm shards build` again, it goes on where it stopped"
        )
    if (folder / PENDING_REMOVAL).is_file():
        raise UserError(
            f"{folder}: samples were being removed from it when that was cut off; complete it with "
            f"`panfm shards forget {folder} --finish`"
        )


def _check_shards(index: dict[str, Any], file: Location) -> None:
    """Refuse an index whose list of shards is none, or names a file that is not in the folder."""
    shards = index.get("shards")
    names = []
    for shard in shards if isinstance(shards, list) else [None]:
        facts = shard if isinstance(shard, dict) else {}
        name = facts.get("name")
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise UserError(
                f"{file}: names the shard {str(name)[:80]!r}; a shard is a file NAME.tar in the same folder, so panfm "
                "did not write this"
            )
        counts = [facts.get("num_bytes"), facts.get("num_samples")]
        if not all(type(count) is int and count >= 0 for count in counts) or not _is_sha256(facts.get("sha256")):
            raise UserError(f"{file}: sizes or hash of {name} are none; it is damaged, copy or build the shards again")
        names.append(name)
    if len(set(names)) != len(names) or not _is_sha256(index.get("samples_sha256")):
        raise UserError(f"{file}: names a shard twice, or no {SAMPLES_FILE}; copy or build the shards again")


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _read_table(samples: Path, index: dict[str, Any], where: Location, columns: Iterable[str] | None) -> pa.Table:
    """The rows of samples.parquet. A few bytes of one can claim any number of rows: what cannot be is not read."""
    wanted = None if columns is None else list(dict.fromkeys([*columns, *PLACE_COLUMNS]))
    try:
        num_rows = pq.read_metadata(samples).num_rows
        if num_rows != index.get("num_samples") or num_rows > samples.stat().st_size:  # a row's hash has 32 bytes
            raise UserError(
                f"{where}: claims {num_rows} rows, {INDEX_FILE} {index.get('num_samples')}; copy or build the shards "
                "again"
            )
        table = pq.read_table(samples, columns=wanted, schema=SAMPLES_SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{where}: no table of samples ({str(error)[:200]}); copy or build the shards again") from None
    for name in table.column_names:
        if table[name].null_count and not SAMPLES_SCHEMA.field(name).nullable:
            raise UserError(f"{where}: a sample without {name}; copy or build the shards again")
    return table


def compute_data_hash(keys: Iterable[str], sha256s: Iterable[str]) -> str:
    """Hash which images, in which order: SHA-256 over the lines "key sha256"; features and results are keyed by it."""
    digest = hashlib.sha256()
    for key, sha256 in zip(keys, sha256s, strict=True):
        digest.update(f"{key} {sha256}\n".encode())
    return digest.hexdigest()
