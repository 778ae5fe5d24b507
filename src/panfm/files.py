"""Files under every room: atomic writes, content hashes, and the one resolver for shipped resources.

Atomic means: a reader sees the old file or the whole new one, never a part. A file is written beside its final name,
flushed to disk, and renamed; what a kill leaves behind is a `*.tmp-*` file that nothing reads.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from panfm.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGED_RESOURCES = Path(__file__).resolve().parent / "resources"


def _read_umask() -> int:
    """The umask can only be read by setting it, which is no thing to do while other threads make files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()


@contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success it is fsynced and renamed to `path`.

    On an exception the temporary file is removed and `path` keeps its old content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # noqa: PTH101  mkstemp's 0600 would hide results from colleagues
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with open_atomic(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON with sorted keys; NaN is refused (undefined is null)."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or torn one is a UserError that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); it was not written by panfm or is damaged") from None


def compute_sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def compute_file_sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_json_hash(value: Any) -> str:
    """Return the SHA-256 of `value` as canonical JSON (sorted keys, no spaces): equal values, equal hashes."""
    return compute_sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def find_resource(folder: str, name: str | Path, suffix: str = ".yaml") -> Path:
    """Find a shipped file by path or by name: the user's path, then the checkout, then the installed package.

    `folder` is a shipped folder ("configs/pretrain", "data_shards", "evaluation/tasks"); `name` is a path to a file
    ("my/card.yaml"), or a bare name ("ham10000") or relative path that the shipped folders hold.

    Raises UserError with the nearest shipped names if nothing matches.
    """
    given = Path(name)
    if given.is_file():
        return given
    relative = given if given.suffix == suffix else given.with_name(given.name + suffix)
    candidates = [root / folder / relative for root in (CHECKOUT, PACKAGED_RESOURCES)]
    if given.parts and not given.is_absolute():  # "configs/pretrain/debug_cpu.yaml" from an empty folder
        candidates += [root / relative for root in (CHECKOUT, PACKAGED_RESOURCES)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = list_resources(folder, suffix)
    near = get_close_matches(given.stem, known, n=3) or sorted(known)[:8]
    raise UserError(f"{name}: no such file, and no shipped {folder} entry of that name; nearest: {', '.join(near)}")


def list_resources(folder: str, suffix: str = ".yaml") -> dict[str, Path]:
    """List the shipped files of a folder by name (the checkout wins over the installed package)."""
    found: dict[str, Path] = {}
    for root in (PACKAGED_RESOURCES, CHECKOUT):
        for path in sorted((root / folder).glob(f"*{suffix}")):
            found[path.stem] = path
    return dict(sorted(found.items()))
