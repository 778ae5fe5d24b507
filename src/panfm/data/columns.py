"""Columns: arrays as long as the data set, in one file that all workers and ranks of a machine read.

    arrays  ->  $TMPDIR/panfm-<user>/<digest of what they hold>.columns  ->  mapped read-only in every process

Pages of the file are the system's cache: held once however many processes read them, and given back when memory is
short. A rank that finds the file of another maps it instead of writing its own. Its name goes when a loader begins to
iterate, by when the other ranks have opened it; the bytes go with the last process that has it open, however that ends.
"""

import fcntl
import hashlib
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.errors import UserError

ALIGNMENT = 64  # bytes
STALE_SECONDS = 24 * 3600  # a file that a kill left between two lines is swept away by a later run
Layout = tuple[tuple[str, str | list[Any], int, int], ...]  # name, dtype, number of elements, first byte


class MappedColumns(Mapping[str, NDArray[Any]]):
    """Read-only arrays in a file that is open; sent to a worker, it is the open file that travels."""

    def __init__(self, descriptor: int, layout: Layout, path: Path | None = None) -> None:
        self._descriptor = descriptor
        self._layout = layout
        self._path = path
        self._bytes = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._arrays = {
            name: np.frombuffer(self._bytes, np.dtype(kind), count, first) for name, kind, count, first in layout
        }

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (DupFd(self._descriptor), self._layout)

    def __del__(self) -> None:
        self.unlink()
        with suppress(OSError):
            os.close(self._descriptor)

    def unlink(self) -> None:
        """Take the file's name away: who has it open keeps it, who has not writes another."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


def map_columns(arrays: Mapping[str, NDArray[Any]]) -> MappedColumns:
    """Write `arrays` (one dimension each) to a file and map it; where the same lie there already, map those.

    Raises UserError where the temporary folder has no room or belongs to somebody else.
    """
    layout, size = _lay_out(arrays)
    folder = _find_folder()
    path = folder / f"{_compute_digest(arrays, layout)}.columns"
    with _lock(folder):  # ranks come here at the same moment: one writes, the others wait and find the file
        _sweep(folder)
        if not (path.is_file() and path.stat().st_size == size):
            _write(path, arrays, layout, size)
        return MappedColumns(os.open(path, os.O_RDONLY | os.O_CLOEXEC), layout, path)


def _receive(descriptor: Any, layout: Layout) -> MappedColumns:
    return MappedColumns(descriptor.detach(), layout)


def _lay_out(arrays: Mapping[str, NDArray[Any]]) -> tuple[Layout, int]:
    layout, end = [], 0
    for name, array in arrays.items():
        assert array.ndim == 1 and array.flags.c_contiguous, name
        kind = array.dtype.descr if array.dtype.names else array.dtype.str
        layout.append((name, kind, array.size, end))
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(layout), max(end, ALIGNMENT)  # an empty file cannot be mapped


def _compute_digest(arrays: Mapping[str, NDArray[Any]], layout: Layout) -> str:
    digest = hashlib.blake2b(repr(layout).encode(), digest_size=16)
    for array in arrays.values():
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], layout: Layout, size: int) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for (_, _, _, first), array in zip(layout, arrays.values(), strict=True):
                file.seek(first)
                file.write(array.view(np.uint8).data)
            file.truncate(size)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{path.parent}: the loader's index takes {size / 2**20:,.0f} MiB there and could not be written "
                f"({error.strerror}); set TMPDIR to a folder with more room"
            ) from None
        raise


def _find_folder() -> Path:
    """A folder of the user's own: who can write into it decides what is drawn."""
    folder = Path(tempfile.gettempdir()) / f"panfm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder}: others can write there or own it; remove it, or set TMPDIR to a folder of your own")
    return folder


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    for path in folder.glob("*.columns*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - STALE_SECONDS:
                path.unlink()
