"""Images without labels, as `panfm monitor` and `panfm select` are given them: files, folders, tables with patients.

    places (a.jpg, photos/, new.csv: image[, patient])  --find_images-->  ImageList: paths, groups [N]
    ImageList  --embed_images-->  features [M, D] of those that could be read, which they are, and why the others not

A copy of an image under another name counts once: it would count twice as evidence. Names stay on the user's screen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.files import compute_file_sha256
from panfm.progress import progress_bar
from panfm.shards.dialects import detect_dialect
from panfm.shards.hash_search import read_hashes
from panfm.shards.quality import compute_phash
from panfm.shards.spreadsheets import TABLE_SUFFIXES, read_spreadsheet
from panfm_predict import ImageError
from panfm_predict.files import SUFFIXES, list_images
from panfm_predict.transform import decode_rgb

TABLES = (*TABLE_SUFFIXES, ".xls", ".ods")  # the last two: refused with the way out, not taken for images
BATCH = 16  # images at once, as in panfm_predict


@dataclass(frozen=True)
class ImageList:
    """Images, each once. groups: [N] the patient, else the image's own number. num_repeated: copies left out."""

    paths: tuple[Path, ...]
    groups: tuple[str, ...]
    grouping: Literal["patient", "image"]
    num_repeated: int


@dataclass(frozen=True)
class Embedded:
    """features: float32 [M, D]. rows: [M], places in the ImageList. failed: a line for each image that was not read."""

    features: NDArray[np.float32]
    rows: NDArray[np.int64]
    failed: tuple[str, ...]


def find_images(places: Sequence[str | Path]) -> ImageList:
    """Find the images that files, folders (with those inside them) and tables name; every image once.

    A table has the columns `image` (a path that starts at the table) and, where known, `patient`; all must have it, or
    none. Raises UserError.
    """
    found: list[tuple[Path, str]] = []
    for place in (Path(place) for place in places):
        if place.is_dir():
            try:
                own = list_images(place)
            except OSError as error:
                raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check who may read it") from None
            if not own:
                raise UserError(f"{place}: holds no image file; name a folder of images ({', '.join(SUFFIXES)})")
            found += [(path, "") for path in own]
        elif not place.is_file():
            raise UserError(f"{place}: no such file or folder; name images, folders of images, or a table")
        else:
            found += _read_table(place) if place.suffix.lower() in TABLES else [(place, "")]
    if not found:
        raise UserError("no image was named; name images, folders of images, or a table with the column image")
    grouping: Literal["patient", "image"] = "patient" if any(patient for _, patient in found) else "image"
    first: dict[str, tuple[Path, str]] = {}
    for path, patient in found:
        if grouping == "patient" and not patient:
            raise UserError(f"{path}: has no patient, others do; name the patient of every image, or of none")
        seen = first.setdefault(hash_file(path), (path, patient))
        if seen[1] != patient:
            raise UserError(f"{seen[0]} and {path}: the same image under two patients; correct one, or remove both")
    kept = list(first.values())
    groups = tuple(patient if grouping == "patient" else str(number) for number, (_, patient) in enumerate(kept))
    return ImageList(tuple(path for path, _ in kept), groups, grouping, len(found) - len(kept))


def embed_images(embed: Callable[[Sequence[bytes]], NDArray[np.float32]], images: ImageList) -> Embedded:
    """Compute the features of all images that can be read; the others are named in `failed`. embed: bytes -> [B, D].

    Raises UserError where none can be read.
    """
    parts, rows, failed = [], [], []
    with progress_bar("embed", len(images.paths), unit="images") as advance:
        for start in range(0, len(images.paths), BATCH):
            batch = range(start, min(start + BATCH, len(images.paths)))
            stored = {row: images.paths[row].read_bytes() for row in batch}
            try:
                parts.append(embed(list(stored.values())))
                rows += list(batch)
            except ImageError:
                for row, data in stored.items():  # one of them; the others are not lost
                    try:
                        parts.append(embed([data]))
                        rows.append(row)
                    except ImageError as error:
                        failed.append(f"{images.paths[row]}: {str(error).rpartition(': ')[2]}")
            for _ in batch:
                advance()
    if not rows:
        raise UserError(f"none of {len(images.paths)} images can be read; the first: {failed[0]}")
    return Embedded(np.concatenate(parts), np.array(rows, dtype=np.int64), tuple(failed))


def hash_file(path: Path) -> str:
    """Compute the SHA-256 by which a copy of an image is told. Raises UserError for a file that cannot be read."""
    try:
        return compute_file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check who may read it") from None


def hash_images(images: ImageList, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Compute the perceptual hash of images that can be read: uint8 [M, 32]; zeros: nothing to recognise."""
    texts = [compute_phash(decode_rgb(images.paths[row].read_bytes())) for row in rows.tolist()]
    return read_hashes(pa.array(texts, type=pa.string()), "images")[0]


def _read_table(table: Path) -> list[tuple[Path, str]]:
    header, lines = read_spreadsheet(table, detect_dialect(table))
    columns = {name.lower(): name for name in header}
    if "image" not in columns:
        raise UserError(f"{table}: has no column 'image'; it has {', '.join(header)}: name the files in `image`")
    rows = []
    for line, cells in lines:
        path = table.parent / cells[columns["image"]]
        patient = cells[columns["patient"]] if "patient" in columns else ""
        if not path.is_file():
            raise UserError(f"{table}, line {line} ({path}): no such file; correct the path, or remove the line")
        if "patient" in columns and not patient:
            raise UserError(f"{table}, line {line}: patient is empty; fill it in, or take the column out of the table")
        rows.append((path, patient))
    return rows
