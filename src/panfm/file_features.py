"""Frozen features of image files: encoder x contents of files -> features, computed once for every content.

    folders, files --list_images--> paths --compute_file_features--> FileFeatures: values [M, D], what cannot be read
                       CACHE/<encoder hash>-files/part-*.bin: (SHA-256 of a file, its feature) many times

What was computed is known by the encoder's hash and the file's, so that a killed run goes on, and a folder that has
grown costs its new images alone. Under torchrun the ranks share the work over one cache folder: every rank takes every
world_size-th batch, and rank 0 puts all together. Batches are the same whatever was done before and whoever computes
them, so that a run cut off, or shared, ends with the bytes of an unbroken one.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from panfm.distributed import gather_objects, get_rank, get_world_size, is_main
from panfm.encoder.embedding import iterate_readable
from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.features import DIGEST_BYTES, PART_ROWS, compute_digest, locked
from panfm.files import compute_file_sha256, compute_sha256, write_bytes
from panfm.progress import progress_bar

# As in panfm_predict.files, which this layer must do without.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".avif")
SHA_BYTES = 32
FILES_FORMAT = 2  # 2: colour profiles are applied. Raise it where the same file would get another feature


@dataclass(frozen=True)
class FileFeatures:
    """Features of the files that can be read, in the order of the paths given."""

    numbers: tuple[int, ...]  # [M], which of the paths given
    values: NDArray[np.float32]  # [M, D]
    faults: dict[int, str]  # which could not be read -> the reason


@dataclass(frozen=True)
class ImageList:
    """The images of some files and folders. num_others: files in these folders that are none by their names."""

    paths: tuple[Path, ...]
    num_others: int


def list_images(locations: Sequence[Path]) -> ImageList:
    """List files as they are given, and folders with all below them, in the order of the names; each path once.

    In a folder an image is what ends in one of SUFFIXES; names that begin with a dot, which systems write for
    themselves, are none. Raises UserError for what does not exist and for folders without an image.
    """
    found: dict[Path, None] = {}
    num_others = 0
    for location in locations:
        if location.is_file():
            found[location] = None
            continue
        if not location.is_dir():
            raise UserError(f"{location}: no such file or folder; name images, folders of images, or shard sets")
        files = list(_walk(location))
        images = [path for path in files if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
        if not images:
            raise UserError(
                f"{location}: no image in it, and no index.json of a shard set; images are files that end in "
                f"{', '.join(SUFFIXES)}"
            )
        found.update(dict.fromkeys(images))
        num_others += len(files) - len(images)
    return ImageList(tuple(found), num_others)


def compute_file_features(
    encoder: Encoder, paths: Sequence[Path], *, cache_dir: str | Path, batch_size: int = 64, workers: int = 1
) -> FileFeatures | None:
    """Compute, or take from the cache, the features of image files; under a process group every rank calls it.

    Returns None on all ranks but 0. A file that cannot be read or decoded is left out and named in `faults`. Values do
    not depend on where a run was cut off nor on the number of ranks; between batch sizes they differ by rounding.

    workers: threads that read and decode ahead of the forward pass; 0 decodes in between.

    Raises UserError where a feature is not finite, and where the ranks do not share the cache folder.
    """
    assert batch_size >= 1, batch_size
    hashes, faults = _hash_files(paths, workers)
    firsts: dict[str, int] = {}  # content -> the first of its files
    for number, sha256 in hashes.items():
        firsts.setdefault(sha256, number)
    contents = list(firsts)
    store = _Store(Path(cache_dir) / f"{encoder.hash[:24]}-files", encoder)
    with locked(store.folder, shared=True):
        batches = [contents[start : start + batch_size] for start in range(0, len(contents), batch_size)]
        own = batches[get_rank() :: get_world_size()]
        broken: dict[str, str] = {}
        for found in gather_objects(_fill(store, encoder, own, {c: paths[firsts[c]] for b in own for c in b}, workers)):
            broken |= found  # and every rank is done when all have answered
        if not is_main():
            return None
        features = store.read(set(contents) - set(broken))
    if missing := set(contents) - set(broken) - set(features):
        raise UserError(
            f"{store.folder}: the features of {len(missing)} files that another rank computed are not here; --cache "
            "must be a folder that all machines share"
        )
    faults |= {number: broken[sha256] for number, sha256 in hashes.items() if sha256 in broken}
    numbers = tuple(number for number in range(len(paths)) if number not in faults)
    values = np.empty((len(numbers), encoder.embed_dim), np.float32)
    for row, number in enumerate(numbers):
        values[row] = features[hashes[number]]
    return FileFeatures(numbers, values, dict(sorted(faults.items())))


@dataclass(frozen=True)
class _Store:
    """What is known of files' features for one encoder: parts that are written once, each under its own hash."""

    folder: Path
    encoder: Encoder

    @property
    def seal(self) -> str:
        """What the hash of a part holds besides its bytes."""
        return f"{self.encoder.hash} {FILES_FORMAT}"

    def read(self, wanted: Collection[str]) -> dict[str, NDArray[np.float32]]:
        """Features [D] of the contents that are known. Of a part only the hashes are read, unless one is wanted."""
        found: dict[str, NDArray[np.float32]] = {}
        rest = {bytes.fromhex(sha256) for sha256 in wanted}
        row_bytes = SHA_BYTES + 4 * self.encoder.embed_dim
        for path in sorted(self.folder.glob("part-*.bin")):
            if not rest:
                break
            num_rows, left_over = divmod(path.stat().st_size - DIGEST_BYTES, row_bytes)
            if num_rows < 1 or left_over:
                continue  # cut short: computed again
            with path.open("rb") as file:
                digest, names = file.read(DIGEST_BYTES), file.read(SHA_BYTES * num_rows)
                sha256s = [names[start : start + SHA_BYTES] for start in range(0, len(names), SHA_BYTES)]
                if rest.isdisjoint(sha256s):
                    continue
                data = file.read()
            if digest != compute_digest(self.seal, names + data):
                continue  # damaged, or of another format: likewise
            values = np.frombuffer(data, "<f4").reshape(num_rows, self.encoder.embed_dim)
            found |= {sha.hex(): values[row] for row, sha in enumerate(sha256s) if sha in rest}
            rest.difference_update(sha256s)
        return found

    def write(self, sha256s: Sequence[str], values: NDArray[np.float32]) -> None:
        """Keep features [n, D] of n contents, atomically."""
        body = b"".join(map(bytes.fromhex, sha256s)) + np.ascontiguousarray(values, dtype="<f4").tobytes()
        digest = compute_digest(self.seal, body)
        write_bytes(self.folder / f"part-{digest.hex()[:24]}.bin", digest + body)


def _fill(
    store: _Store, encoder: Encoder, batches: Sequence[Sequence[str]], paths: dict[str, Path], workers: int
) -> dict[str, str]:
    """Compute what the store does not know of these batches; return the contents that do not decode -> the reason."""
    contents = list(paths)
    known = set(store.read(contents))
    places = {sha256: place for place, sha256 in enumerate(contents)}
    todo = [[places[sha256] for sha256 in batch if sha256 not in known] for batch in batches]
    readers = [partial(_read_unchanged, path, sha256) for sha256, path in paths.items()]
    broken: dict[str, str] = {}
    waiting: list[tuple[list[str], NDArray[np.float32]]] = []

    def keep() -> None:
        if waiting:
            store.write(
                [sha256 for sha256s, _ in waiting for sha256 in sha256s], np.concatenate([v for _, v in waiting])
            )
            waiting.clear()

    share = f", a share of {get_world_size()}" if get_world_size() > 1 else ""
    with progress_bar(f"features by {encoder.name}{share}", len(contents), done=len(known)) as advance:
        names = [str(path) for path in paths.values()]
        for batch in iterate_readable(encoder, readers, names, [numbers for numbers in todo if numbers], workers):
            if batch.numbers:
                waiting.append(([contents[number] for number in batch.numbers], batch.features))
            broken |= {contents[number]: reason for number, reason in batch.faults.items()}
            if sum(len(sha256s) for sha256s, _ in waiting) >= PART_ROWS:
                keep()
            advance(len(batch.numbers) + len(batch.faults))
        keep()
    return broken


def _hash_files(paths: Sequence[Path], workers: int) -> tuple[dict[int, str], dict[int, str]]:
    """Hash the files, shared among the ranks: number -> SHA-256, and number -> why it cannot be read."""
    own = range(get_rank(), len(paths), get_world_size())
    hashes: dict[int, str] = {}
    faults: dict[int, str] = {}

    def hash_file(number: int) -> tuple[int, str | None, str]:
        try:
            return number, compute_file_sha256(paths[number]), ""
        except OSError as error:
            return number, None, f"cannot be read ({error.strerror or error})"

    share = f", a share of {get_world_size()}" if get_world_size() > 1 else ""
    with progress_bar(f"hashes of files{share}", len(own)) as advance, ThreadPoolExecutor(max(1, workers)) as pool:
        for number, sha256, fault in pool.map(hash_file, own):
            if sha256 is None:
                faults[number] = fault
            else:
                hashes[number] = sha256
            advance()
    all_hashes: dict[int, str] = {}
    all_faults: dict[int, str] = {}
    for their_hashes, their_faults in gather_objects((hashes, faults)):
        all_hashes |= their_hashes
        all_faults |= their_faults
    return dict(sorted(all_hashes.items())), all_faults


def _read_unchanged(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    if compute_sha256(data) != sha256:
        raise OSError("it changed while it was embedded")
    return data


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in the order of the names; hidden folders are not entered."""

    def fail(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check who may read it")

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(files))


def group_faults(faults: dict[int, str], names: Sequence[str], shown: int = 5) -> str:
    """Say in one line what could not be read: every reason, its number, and the first few by name."""
    by_reason: dict[str, list[str]] = {}
    for number, reason in faults.items():
        by_reason.setdefault(reason, []).append(names[number])
    return "; ".join(f"{len(found)} {reason}: {_list_some(found, shown)}" for reason, found in by_reason.items())


def _list_some(names: Iterable[str], shown: int) -> str:
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more
