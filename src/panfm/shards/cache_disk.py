"""The folder of the cache of shards: who may touch it when, and what goes when it is full.

Locks are the kernel's (flock): they fall with the process that held them, however that ended. `usage` is both the lock
of the whole and the number of bytes in it.

What goes at the limit: sets that nobody has open, the longest unread first; then, of those in use, pieces by a fixed
order of their own, sparing the half that was opened last. A pass draws every row once in a new order, and for that the
usual way (least recently used goes) is a bad one: it keeps what comes last again. With room for half of a set it would
fetch 85 % of the pieces a pass, this fetches 72 %. A file that is open stays readable when its name is gone.
"""

import errno
import fcntl
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from panfm.errors import UserError

KEPT_SHARE = 0.9  # of the limit, when room is made
RECENT_SHARE = 0.5  # of the limit: pieces opened last, in which the loader's open blocks lie, stay
TORN_AGE = 3600.0  # seconds after which a file that a killed download left is taken away


@dataclass(frozen=True)
class CacheConfig:
    """The folder of the cache of shards, and how many bytes it may hold."""

    folder: Path
    max_bytes: int


def read_cache_config() -> CacheConfig:
    """PANFM_CACHE (default: panfm in the user's cache folder) and PANFM_CACHE_GB (default 50): a matter of the machine.

    Raises UserError for a limit that is no positive number.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "panfm"
    folder = Path(os.environ.get("PANFM_CACHE") or home).expanduser() / "shards"
    text = os.environ.get("PANFM_CACHE_GB") or "50"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e9:
        raise UserError(f"PANFM_CACHE_GB ({text}) must be a number of gigabytes above 0, for example 50")
    return CacheConfig(folder.absolute(), int(gigabytes * 1e9))


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock file, open; the lock falls with the process that held it, however that ended."""
    descriptor = open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, which is made where it is missing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def read_origin(folder: Path) -> str | None:
    """The URL whose set a folder of the cache holds."""
    path = folder / "origin"
    return path.read_text().strip() if path.is_file() else None


def is_unused(folder: Path) -> bool:
    """Whether no process has the set open; asked under the cache's lock, so that none can begin to."""
    descriptor = open_lock(folder / "in_use")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def count_bytes(cache: CacheConfig, usage: int, added: int) -> None:
    """Add to the number of bytes in the cache, kept in its lock file `usage`; above the limit, make room."""
    text = os.pread(usage, 32, 0)
    num_bytes = int(text) + added if text.isdigit() else _make_room(cache)
    if num_bytes > cache.max_bytes:
        num_bytes = _make_room(cache)
    os.ftruncate(usage, 0)
    os.pwrite(usage, b"%020d" % num_bytes, 0)  # not synced: a wrong number is put right when room is made


def write_piece(path: Path, data: bytes) -> None:
    """Write a file that appears under its name when it is whole.

    Not synced, unlike what `panfm.files` writes: it can be fetched again, and after a power cut its size is wrong.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _File:
    path: Path
    num_bytes: int
    used: float  # seconds since the epoch


def _make_room(cache: CacheConfig) -> int:
    """Bring what is above the limit down to KEPT_SHARE of it; the number of bytes that are left."""
    now = time.time()
    sets = {folder.parent: _list_files(folder.parent, now) for folder in cache.folder.glob("*/origin")}
    num_bytes = sum(file.num_bytes for files in sets.values() for file in files)
    if num_bytes <= cache.max_bytes:
        return num_bytes
    wanted = int(cache.max_bytes * KEPT_SHARE)
    unused = [folder for folder in sets if is_unused(folder)]
    for folder in sorted(unused, key=lambda folder: (folder / "in_use").stat().st_mtime):
        if num_bytes <= wanted:
            return num_bytes
        shutil.rmtree(folder, ignore_errors=True)
        num_bytes -= sum(file.num_bytes for file in sets.pop(folder))
    pieces = [file for files in sets.values() for file in files if file.path.parent.name == "pieces"]
    pieces.sort(key=lambda file: file.used)
    spared, room = [], cache.max_bytes * RECENT_SHARE
    while pieces and room > 0:
        spared.append(pieces.pop())
        room -= spared[-1].num_bytes
    pieces.sort(key=lambda file: zlib.crc32(f"{file.path.parent.parent.name}/{file.path.name}".encode()))
    for file in pieces + spared[::-1]:
        if num_bytes <= wanted:
            break
        file.path.unlink(missing_ok=True)
        num_bytes -= file.num_bytes
    return num_bytes


def _list_files(folder: Path, now: float) -> list[_File]:
    files = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            if ".tmp-" in path.name and now - status.st_mtime > TORN_AGE:
                path.unlink()
            elif path.is_file():
                files.append(_File(path, status.st_size, status.st_mtime))
    return files


def describe_disk(cache: CacheConfig, error: OSError) -> str:
    """What a user is told of a disk that is full or not to be written."""
    why = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written ({error.strerror})"
    return (
        f"{cache.folder}: the cache of shards {why}; set PANFM_CACHE to a folder on a local disk with room, or "
        "PANFM_CACHE_GB to fewer gigabytes"
    )
