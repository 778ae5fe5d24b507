"""Is a shard set still what its index says? Every byte of every tar is read; nothing is changed.

    DIR or URL/{index.json, samples.parquet, *.tar} -> one task a shard: sizes, hashes, members, JSON, masks -> faults

A tar tells its rows a second time: from its members alone come the keys, the metadata, the places and the hashes, and
they must equal the rows of samples.parquet. What a tar may hold is a closed list of names, so that links, absolute
paths, executable formats and bytes hidden behind the end are faults by themselves. Shards at a URL are fetched one a
process into a file without a name; what else lies at the URL cannot be listed and is not looked at.
"""

import csv
import hashlib
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from panfm.errors import UserError
from panfm.executor import run_tasks
from panfm.files import compute_file_sha256, compute_sha256
from panfm.shards.index import INDEX_FILE, QUARANTINE_FILE, SAMPLES_FILE, read_index
from panfm.shards.piece_cache import open_cached_set
from panfm.shards.quality import RejectedImageError, compute_phash, decode_image
from panfm.shards.schema import SAMPLES_SCHEMA, Sample
from panfm.shards.slide_plans import OVERLAY_FOLDER
from panfm.shards.storage import Location, ShardUrl, copy, fetch, get_size, open_regular, parse_location
from panfm.shards.tars import MEMBER_NAME
from panfm.shards.writer import COMPANIONS

FAULTS_SHOWN = 20  # a shard; a shifted one would name each of its thousand samples
# Share of the bits of a perceptual hash: the stored JPEG is decoded here, the hash was taken before it was compressed.
# Faint frequencies change sign by that (under a tenth of the bits); other pictures differ in half of them.
PHASH_TOLERANCE = 0.25


@dataclass(frozen=True)
class Member:
    """One file in a tar: where its header starts, where its bytes lie, and where the next header would start."""

    name: str
    start: int
    offset: int
    length: int
    end: int


@dataclass(frozen=True)
class Verification:
    """What a verification found; no fault = the shard set is what its index says, byte for byte."""

    path: Location
    source: str
    num_samples: int
    num_shards: int
    num_bytes: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        """One line a fault, and one that sums up."""
        if self.faults:
            return "\n".join([*self.faults, f"{self.path}: {len(self.faults)} faults; copy or build the shards again"])
        return f"{self.path}: {self.num_samples:,} samples in {self.num_shards:,} shards: all as the index says"


@dataclass(frozen=True)
class ShardCheck:
    """One shard to verify; picklable. It reads its own rows, so that the tasks of a large set are small."""

    folder: Location
    samples: Path
    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    deep: bool


def verify_shard_set(path: str | Location, *, deep: bool = False, processes: int = 1) -> Verification:
    """Compare every tar of a finished shard set with samples.parquet and index.json.

    deep: decode every image too, and compare its size and perceptual hash with its row. Each fault is one line. Memory
    is that of one shard a process. Raises UserError where there is no finished shard set to compare with.
    """
    location = parse_location(path)
    index = read_index(location)
    if isinstance(location, ShardUrl):
        cached = open_cached_set(location, index)  # held open: nobody takes samples.parquet away
        samples = cached.samples_path
    else:
        samples = location / SAMPLES_FILE
    faults: list[str] = []
    if not samples.is_file():
        faults.append(f"{samples}: is missing")
    elif compute_file_sha256(samples) != index["samples_sha256"]:
        faults.append(f"{samples}: is not the file that index.json names (its SHA-256 differs)")
    if not faults:
        faults += _check_counts(location, samples, index)
        tasks = [
            ShardCheck(
                location, samples, shard["name"], shard["num_bytes"], shard["num_samples"], shard["sha256"], deep
            )
            for shard in index["shards"]
        ]
        answers = run_tasks(
            verify_shard,
            tasks,
            description=f"verifying {location.name}",
            processes=processes,
            unit="images",
            size=lambda task: task.num_samples,
        )
        faults += [fault for answer in answers for fault in answer]
    if isinstance(location, Path):
        faults += _check_folder(location, {shard["name"] for shard in index["shards"]}, index)
    return Verification(
        path=location,
        source=index["source"],
        num_samples=index["num_samples"],
        num_shards=len(index["shards"]),
        num_bytes=sum(shard["num_bytes"] for shard in index["shards"]),
        faults=tuple(faults),
    )


def _check_folder(path: Path, named: set[str], index: dict[str, Any]) -> list[str]:
    """What else lies in the folder, and a quarantine.csv that counts otherwise than the index."""
    known = named | {INDEX_FILE, SAMPLES_FILE, QUARANTINE_FILE, OVERLAY_FOLDER, *COMPANIONS}
    faults = [
        f"{file}: lies in the folder, but is no part of the set; it may name patients, so look at it and move it away"
        for file in sorted(path.iterdir())
        if file.name not in known and file.suffix != ".tar"
    ]
    faults += [
        f"{tar}: lies in the folder, but index.json does not name it"
        for tar in sorted(path.glob("*.tar"))
        if tar.name not in named
    ]
    quarantine = path / QUARANTINE_FILE
    if quarantine.is_file():
        counts: Counter[str] = Counter()
        with quarantine.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                counts[row["reason"]] += int(row["num"])
        if dict(counts) != index["num_rejected"]:
            faults.append(f"{quarantine}: counts {dict(counts)}, index.json says {index['num_rejected']}")
    return faults


def verify_shard(task: ShardCheck) -> tuple[str, ...]:
    """The faults of one shard, at most FAULTS_SHOWN of them and a line that counts the others."""
    tar = task.folder / task.name
    faults: list[str] = []
    try:
        with _open_shard(task) as file:
            if (num_bytes := file.seek(0, os.SEEK_END)) != task.num_bytes:
                faults.append(f"{tar}: has {num_bytes} bytes, index.json says {task.num_bytes}")
            elif hashlib.file_digest(_rewind(file), "sha256").hexdigest() != task.sha256:  # type: ignore[arg-type]
                faults.append(f"{tar}: is not the file that index.json names (its SHA-256 differs)")
            rows = pq.read_table(task.samples, schema=SAMPLES_SCHEMA, filters=[("shard", "==", task.name)])
            if rows.num_rows != task.num_samples:
                faults.append(f"{tar}: {rows.num_rows} rows in {SAMPLES_FILE}, index.json says {task.num_samples}")
            members, found = read_members(file)
            faults += [f"{tar}: {fault}" for fault in found]
            faults += [f"{tar}, {fault}" for fault in _compare(file, members, rows, task)]
    except UserError as error:  # missing, no regular file, or not to be had
        return (str(error),)
    if len(faults) > FAULTS_SHOWN:
        faults[FAULTS_SHOWN:] = [f"{tar}: {len(faults) - FAULTS_SHOWN} more faults"]
    return tuple(faults)


@contextmanager
def _open_shard(task: ShardCheck) -> Iterator[BinaryIO]:
    if isinstance(task.folder, Path):
        path = task.folder / task.name
        if get_size(path) is None:
            raise UserError(f"{path}: is missing")
        with os.fdopen(open_regular(path), "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:  # without a name: it goes with this process, however that ends
        url = task.folder / task.name
        copy(url, file, task.num_bytes)
        file.write(fetch(url, task.num_bytes, task.num_bytes + 1, exact=False))  # of a longer one, too long by one
        yield file


def _rewind(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file


def read_members(file: BinaryIO) -> tuple[list[Member], list[str]]:
    """The members of a tar in their order, and what about its structure is not as panfm writes it."""
    members: list[Member] = []
    faults: list[str] = []
    end = 0
    try:
        with tarfile.open(fileobj=_rewind(file), mode="r:") as archive:
            for info in archive:
                padded = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if info.isreg() else 0
                if info.type != tarfile.REGTYPE or info.offset_data - info.offset != tarfile.BLOCKSIZE:
                    # Links, folders, devices; and extended headers, which could rename a member after all checks.
                    faults.append(f"member {info.name[:80]!r} is no plain file (type {info.type!r})")
                elif not MEMBER_NAME.fullmatch(info.name):
                    faults.append(
                        f"member {info.name[:80]!r} is none that a sample has; nothing else may be in a shard"
                    )
                else:
                    members.append(
                        Member(info.name, info.offset, info.offset_data, info.size, info.offset_data + padded)
                    )
                end = info.offset_data + padded
    except (tarfile.TarError, OSError) as error:
        faults.append(f"cannot be read to its end ({error})")
        return members, faults
    file.seek(end)
    while block := file.read(1 << 20):
        if block.count(0) != len(block):  # tarfile stops at the first header that it cannot read
            faults.append(f"holds bytes behind its last readable member (byte {end}); damaged, or something is hidden")
            break
    return members, faults


def count_samples(table: pa.Table) -> dict[str, Any]:
    """The counts of index.json from the rows themselves: num_samples, num_modalities, num_labels."""
    modalities: Counter[str] = Counter()
    labels: dict[str, Counter[str]] = {}
    for batch in table.select(["modality", "labels"]).to_batches(max_chunksize=16_384):
        modalities.update(batch["modality"].to_pylist())
        for pairs in batch["labels"].to_pylist():
            for name, value in pairs or ():
                labels.setdefault(name, Counter())[value] += 1
    return {
        "num_samples": table.num_rows,
        "num_modalities": dict(sorted(modalities.items())),
        "num_labels": {name: dict(sorted(values.items())) for name, values in sorted(labels.items())},
    }


def _check_counts(path: Location, samples: Path, index: dict[str, Any]) -> list[str]:
    """Compare what index.json counts with the rows."""
    table = pq.read_table(samples, columns=["key", "source", "modality", "labels", "shard"])
    faults = []
    for name, found in count_samples(table).items():
        if index[name] != found:
            faults.append(f"{path / 'index.json'}: {name} is {index[name]}, the rows say {found}")
    if (num_doubled := table.num_rows - len(table["key"].unique())) > 0:
        faults.append(f"{path / SAMPLES_FILE}: {num_doubled} keys stand twice; a key names one sample")
    if foreign := set(table["source"].unique().to_pylist()) - {index["source"]}:
        faults.append(f"{path / SAMPLES_FILE}: holds samples of source {min(foreign)}; this is {index['source']}")
    if foreign := set(table["shard"].unique().to_pylist()) - {shard["name"] for shard in index["shards"]}:
        faults.append(f"{path / SAMPLES_FILE}: names the shard {min(foreign)}, which index.json does not")
    return faults


def _compare(file: BinaryIO, members: Sequence[Member], rows: pa.Table, task: ShardCheck) -> list[str]:
    """Tell the rows of a shard from its members alone and compare them with those of samples.parquet."""
    faults: list[str] = []
    by_key: dict[str, dict[str, Member]] = {}
    for member in members:
        key, _, kind = member.name.partition(".")
        if kind in by_key.setdefault(key, {}):
            faults.append(f"{member.name}: stands twice")
        by_key[key][kind] = member
    expected = {row["key"]: row for row in rows.to_pylist()}
    faults += [f"{key}: has no row in {SAMPLES_FILE}" for key in by_key if key not in expected]
    told = []
    for key in expected:
        if key not in by_key:
            faults.append(f"{key}: is in {SAMPLES_FILE} and not in the tar")
            continue
        row, more = _tell_row(file, key, by_key[key], task)
        faults += more
        told += [] if row is None else [row]
    for row in pa.Table.from_pylist(told, schema=SAMPLES_SCHEMA).to_pylist():  # floats as narrow as the file has them
        if wrong := [name for name, value in expected[row["key"]].items() if value != row[name]]:
            faults.append(f"{row['key']}: {', '.join(wrong)} in {SAMPLES_FILE}: not as in the tar")
    return faults


def _tell_row(
    file: BinaryIO, key: str, kinds: dict[str, Member], task: ShardCheck
) -> tuple[dict[str, Any] | None, list[str]]:
    """The row of a sample from its members (None where they do not make one), and what is wrong with them."""

    def read(member: Member) -> bytes:
        file.seek(member.offset)
        return file.read(member.length)

    images = [kind for kind in kinds if kind in ("jpg", "png", "webp")]
    if "json" not in kinds or len(images) != 1:
        return None, [f"{key}: has the members {', '.join(sorted(kinds))}; a sample has one .json and one image"]
    try:
        sample = Sample.model_validate_json(read(kinds["json"]))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        return None, [f"{key}.json: {'.'.join(map(str, fault['loc'])) or 'JSON'}: {fault['msg']}"]
    faults = []
    if sample.key != key:
        faults.append(f"{key}.json: names the key {sample.key}")
    image = kinds[images[0]]
    data = read(image)
    if compute_sha256(data) != sample.sha256:
        faults.append(f"{image.name}: is not the image that its JSON names (its SHA-256 differs)")
    if task.deep:
        faults += _check_image(image.name, data, sample)
    if "mask.png" in kinds:
        faults += _check_mask(f"{key}.mask.png", read(kinds["mask.png"]), sample)
    row = sample.model_dump(exclude={"schema_version"})
    row |= {"key": key, "labels": list(sample.labels.items()), "tabular": json.dumps(sample.tabular, sort_keys=True)}
    row |= {"shard": task.name, "extension": images[0]}
    for name, kind in (("", images[0]), ("mask_", "mask.png"), ("caption_", "txt")):
        if kind in kinds:
            row |= {f"{name}offset": kinds[kind].offset, f"{name}length": kinds[kind].length}
    return row, faults


def _check_image(name: str, data: bytes, sample: Sample) -> list[str]:
    try:
        image, width, height = decode_image(data)
    except RejectedImageError as error:
        return [f"{name}: does not decode ({error.reason}: {error})"]
    if (width, height) != (sample.width, sample.height):
        return [f"{name}: is {width} x {height} pixels, its JSON says {sample.width} x {sample.height}"]
    found = compute_phash(image)
    if sample.phash is not None and found is not None:  # None: too little contrast to recognise anything by
        num_bits = 4 * len(sample.phash)
        distance = (int(found, 16) ^ int(sample.phash, 16)).bit_count()
        if len(found) != len(sample.phash) or distance > PHASH_TOLERANCE * num_bits:
            return [f"{name}: its perceptual hash differs in {distance} of {num_bits} bits: another picture"]
    return []


def _check_mask(name: str, data: bytes, sample: Sample) -> list[str]:
    try:
        mask, width, height = decode_image(data)
    except RejectedImageError as error:
        return [f"{name}: does not decode ({error.reason}: {error})"]
    if (width, height) != (sample.width, sample.height) or mask.mode != "L":
        return [f"{name}: is {width} x {height} ({mask.mode}); it must be grey, {sample.width} x {sample.height}"]
    return []
