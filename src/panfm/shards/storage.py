"""Where a shard set lies: a folder here, or a URL of an object store or web server. One parser, one way to fetch.

    "shards/ham10000"         -> Path                opened where it lies
    "s3://bucket/ham10000"    -> ShardUrl            fetch(url, start, end) -> bytes, tried again while it may help

A closed list of schemes, read through fsspec; no command, no chained URL, no local file by way of a URL. Keys belong
into the store's own configuration (environment, role, file): a URL that holds some is refused, and what a library says
in its errors is not repeated here, since it may quote signed addresses.
"""

import errno
import logging
import os
import random
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

from panfm.errors import UserError

SCHEMES = ("s3", "gs", "gcs", "http", "https", "memory")  # memory: fsspec's, inside one process
SHOWN = "a folder, or a URL of s3://, gs://, http:// or https://"
CHUNK_BYTES = 16 << 20  # a large file is fetched and retried in such parts
SECONDS_A_TRY = 120.0  # for at most a chunk: 1 Mbit/s is enough
# Pauses between tries. A run must outlive a store that restarts; who has mistyped an address should not wait for it.
PATIENT: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
BRIEF: tuple[float, ...] = (0.5, 1.5)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._\-]+)(:[0-9]+)?")
_PART = re.compile(r"(?!.*::)[^\s\\\x00-\x1f\x7f]+")
_BUSY = (408, 425, 429)  # besides 5xx: HTTP statuses that may go away
_NO_ACCESS = re.compile("Credential|Token|Profile|Region|Refresh")  # in names of exceptions of the cloud libraries
_OWN_TRIES = ("s3", "gs", "gcs")  # schemes whose libraries try several times themselves
_FOREIGN = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3")  # whose exceptions we know


@dataclass(frozen=True)
class ShardUrl:
    """The URL of a shard set or of a file in it, without credentials; prints as itself."""

    url: str  # no slash at the end

    def __str__(self) -> str:
        """The URL."""
        return self.url

    def __truediv__(self, name: str) -> "ShardUrl":
        """A file inside."""
        return ShardUrl(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """Its last part."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def scheme(self) -> str:
        """What stands before the colon."""
        return self.url.split(":", 1)[0]


Location = Path | ShardUrl


@overload
def parse_location(text: Path) -> Path: ...
@overload
def parse_location(text: str | Path | ShardUrl) -> Location: ...
def parse_location(text: str | Path | ShardUrl) -> Location:
    """A user's path or URL as what it is; the only place that decides this.

    Raises UserError: a scheme that is not in SCHEMES (`pipe:`, `file:`, chained URLs, ...), credentials or a query in a
    URL, a URL that lost a slash by being taken for a path.
    """
    if isinstance(text, ShardUrl):
        return text
    given = str(text)
    match = _SCHEME.match(given)
    if match is None:
        return Path(text)
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        way_out = f"a folder whose name holds a colon is ./{scheme}:..." if scheme != "file" else "name the folder"
        raise UserError(f"{scheme}:...: not a place that shards are read from; give {SHOWN} ({way_out})")
    if not given[match.end() :].startswith("//"):
        raise UserError(f"{_hide_secrets(given)}: a URL has two slashes behind {scheme}:, as in {scheme}://...")
    if re.search("[?#@]", given):
        raise UserError(
            f"{_hide_secrets(given)}: the URL of shards holds no user, password, query or signature; put keys where "
            "the store's own tools look for them (docs/storage.md)"
        )
    host, *parts = given[match.end() + 2 :].rstrip("/").split("/")
    if not _HOST.fullmatch(host) or not all(_PART.fullmatch(part) and part != ".." for part in parts):
        raise UserError(
            f"{given!r}: not the URL of a folder: a host or bucket, then names without blanks, `..` and `::`"
        )
    return ShardUrl(f"{scheme}://{'/'.join([host, *parts])}")


def parse_folder(text: str | Path | ShardUrl, action: str) -> Path:
    """A folder that `action` (a command) writes into. Raises UserError for a URL, and what parse_location does."""
    location = parse_location(text)
    if isinstance(location, ShardUrl):
        raise UserError(
            f"{location}: {action} changes a shard set, which is done in a folder and not at a URL; download the set, "
            "change it there and upload it again, index.json last"
        )
    return location


def open_regular(path: Path) -> int:
    """Open a file of a shard set for reading: its descriptor. Links, pipes and devices are refused, not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the shard set is not whole, copy or build it again") from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise
        raise UserError(_describe_irregular(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(_describe_irregular(path))
    return descriptor


def get_size(path: Path) -> int | None:
    """Size in bytes of a file of a shard set, None where there is none. Links, pipes and devices are refused."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(_describe_irregular(path))
    return status.st_size


def _describe_irregular(path: Path) -> str:
    return (
        f"{path}: is no regular file (a link, folder, pipe or device), so it may lead out of the shard set; put the "
        "file itself there"
    )


# ------------------------------------------------------------------------------------------------ fetching


def fetch(url: ShardUrl, start: int, end: int, *, exact: bool = True, pauses: Sequence[float] = PATIENT) -> bytes:
    """The bytes from `start` up to `end` of the file at a URL; where it ends before, fewer, or an error if `exact`.

    What may go away (timeouts, broken connections, HTTP 5xx, short answers) is tried again after each of `pauses`, in
    seconds. Raises UserError, naming the URL, where it does not, and at once where there is no such file or no access.
    """
    began = time.monotonic()
    if url.scheme in _OWN_TRIES:
        pauses = pauses[3:]
    for pause in (*pauses, None):
        try:
            data = _read_range(url, start, end)
            if len(data) > end - start:
                raise UserError(
                    f"{url}: its server sends more than the bytes that were asked for; shards are read in pieces, so "
                    "it must answer Range requests (python -m http.server does not, nginx and object stores do)"
                )
            if len(data) == end - start or not exact:
                return data
            reason = f"{len(data)} of {end - start} bytes came from byte {start} on"
        except Exception as error:
            status = _find_status(error)
            if status == 416 and not exact:  # it ends before `start`
                return b""
            if not _is_foreign(error):
                raise
            if _is_final(error, status):
                raise UserError(_describe_refusal(url, error, status)) from None
            reason = f"HTTP {status}" if status else type(error).__name__
        if pause is not None:
            time.sleep(pause * random.uniform(0.7, 1.3))  # the workers of a node must not all come back at once
    raise UserError(
        f"{url}: not to be had in {time.monotonic() - began:.0f} s of trying ({reason}); see whether the store is up "
        "and the file whole, then run the same command again"
    )


def copy(url: ShardUrl, file: BinaryIO, num_bytes: int) -> None:
    """Write the `num_bytes` bytes of the file at a URL to `file`, chunk by chunk. Raises what `fetch` does."""
    for start in range(0, num_bytes, CHUNK_BYTES):
        file.write(fetch(url, start, min(start + CHUNK_BYTES, num_bytes)))


def _read_range(url: ShardUrl, start: int, end: int) -> bytes:
    filesystem = _get_filesystem(url)
    options: dict[str, Any] = {"timeout": SECONDS_A_TRY} if filesystem.async_impl else {}
    if url.scheme in (
        "http",
        "https",
    ):  # a server that packs its answers would pack other bytes than those of the range
        options["headers"] = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    return bytes(filesystem.cat_file(url.url, start=start, end=end, **options))


def _get_filesystem(url: ShardUrl) -> Any:
    """fsspec's object for the scheme; it keeps one a process, and none of another process after a fork."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback a try; what counts is said here
    try:
        return fsspec.filesystem(url.scheme)
    except ImportError:
        raise UserError(
            f'{url}: {url.scheme}:// needs a package that is not installed; run pip install "panfm[cloud]"'
        ) from None


def _find_status(error: Exception) -> int | None:
    """The HTTP status behind an exception of any of the libraries."""
    answer = getattr(error, "response", None)  # botocore's dict, requests' object
    if isinstance(answer, dict):
        value = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif hasattr(error, "status"):
        value = error.status
    else:
        value = getattr(error, "code", getattr(answer, "status_code", None))
    if type(error).__module__ == "builtins" and isinstance(error.__cause__, Exception):
        return _find_status(error.__cause__)  # s3fs translates to OSError
    return int(str(value)) if str(value).isdecimal() else None


def _is_foreign(error: Exception) -> bool:
    """Whether the network or a library failed, not we."""
    root = type(error).__module__.split(".")[0]
    return isinstance(error, OSError | EOFError | TimeoutError) or root in _FOREIGN


def _is_final(error: Exception, status: int | None) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return True
    if status is not None:
        return status < 500 and status not in _BUSY
    return _NO_ACCESS.search(type(error).__name__) is not None


def _describe_refusal(url: ShardUrl, error: Exception, status: int | None) -> str:
    if isinstance(error, FileNotFoundError | IsADirectoryError) or status == 404:
        return f"{url}: no such file; see that the URL is that of a shard set and that all of it was uploaded"
    reason = f"HTTP {status}" if status else type(error).__name__
    return (
        f"{url}: refused ({reason}); give the store's credentials in its own way, by environment, role or file "
        "(docs/storage.md), never in the URL"
    )


def _hide_secrets(text: str) -> str:
    """A URL without user, password, query and fragment."""
    return re.sub(r"//.*@", "//", re.split(r"[?#]", text, maxsplit=1)[0])
