"""One shard: the units that the plan gave it -> a tar, then its rows. One task of the executor.

    ShardTask -> read each file or tile -> clean, check, hash -> shard-000007.tar -> .build/shard-000007.parquet

The tar is plain WebDataset (`<key>.json`, `<key>.jpg|png`, `<key>.mask.png`, `<key>.txt`), its bytes a function of the
input alone. The rows say where each member lies; they are written after the tar and carry the hash of the task, so
their existence means that the shard is finished. What must stay out is counted by reason.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from panfm.config import config_class
from panfm.errors import UserError
from panfm.executor import ExecutorName
from panfm.files import compute_sha256, open_atomic, write_bytes
from panfm.shards.cards import SourceCard, Use
from panfm.shards.members import Reason, Stored, read_photograph, read_slide_tiles
from panfm.shards.pixels import RESIZER
from panfm.shards.privacy import PUBLIC_KEY, PseudonymKey, load_key, pseudonymise
from panfm.shards.schema import SAMPLES_SCHEMA, Sample
from panfm.shards.slide_plans import get_settings, load_slide_without_places
from panfm.shards.sources import Record
from panfm.shards.text_scan import TextScanner
from panfm.shards.wsi import TilePlace

BUILD_FOLDER = ".build"
FACTS = b"panfm_shard"  # where the rows of a finished shard keep what is true of it as a whole


@config_class
class BuildOptions:
    """How a source becomes shards. The first six decide the bytes, and so are part of the plan."""

    seed: int = 0
    """Of the shuffle that spreads patients and labels over the shards."""
    order: Literal["shuffled", "contiguous"] = "shuffled"
    """shuffled for pretraining; contiguous for slide-level evaluation: slide by slide, their tiles row by row."""
    samples_per_shard: Annotated[int, Field(ge=1)] = 1024
    """Samples a tar: 50-100 MB of photographs at 512 px, large enough for disks and small enough to redo."""
    short_side: Annotated[int, Field(ge=32)] | None = 512
    """Photographs (not histopathology tiles) are shrunk to this short side in pixels; null keeps all as they are."""
    min_side: Annotated[int, Field(ge=1)] = 32
    """Images with a side below this many pixels are rejected: they hold nothing to learn from."""
    use: Use = "research"
    """What the shards are for; a card that does not permit it is refused."""
    max_rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The build fails if a larger share of the files is rejected: then something else is wrong."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Local processes; the bytes do not depend on it."""
    executor: ExecutorName = "local"
    """Where the work is done: local processes, or dask: a cluster that sees archive, shards and key file."""
    scheduler: str | None = None
    """With dask: address of the cluster's scheduler (tcp://host:8786), or the path of its scheduler file."""
    key_file: Path | None = None
    """Secret key of the ids, for cards with identifiers: private; outside the shard set, kept for as long as it."""
    create_key: bool = False
    """Make the key file if it does not exist yet."""


PLAN_OPTIONS = ("seed", "order", "samples_per_shard", "short_side", "min_side", "use")


@dataclass(frozen=True)
class Tiles:
    """The places of a shard's units on their slides, as columns; `plans` has the stored plan of each record."""

    plans: tuple[Path, ...]  # [num_records]
    x0: npt.NDArray[np.int32]  # [n]
    y0: npt.NDArray[np.int32]
    tissue: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ShardTask:
    """One shard to write; picklable, and without the secret key: its process reads the key file itself."""

    number: int
    hash: str  # of everything that decides its bytes
    out: Path
    card: SourceCard
    options: BuildOptions
    plan_hash: str
    key_fingerprint: str
    scanner: TextScanner
    records: Sequence[Record]  # those that the units below need
    units: npt.NDArray[np.int32]  # [n] place in `records` of each sample; of photographs 0, 1, 2, ...
    tiles: Tiles | None = None
    resizer: str = RESIZER

    def __repr__(self) -> str:
        return f"ShardTask(shard-{self.number:06d})"  # clusters log their tasks; records name patients

    def load_key(self) -> PseudonymKey:
        """The key of the ids, as this process can read it."""
        if self.options.key_file is None:
            return PUBLIC_KEY
        key = load_key(self.options.key_file, shard_folder=self.out)
        if key.fingerprint != self.key_fingerprint:
            raise UserError(f"{self.options.key_file}: another key than the one that this build began with")
        return key


def get_tar_path(out: Path, number: int) -> Path:
    """Where a shard goes."""
    return out / f"shard-{number:06d}.tar"


def get_rows_path(out: Path, number: int) -> Path:
    """Where the rows of a finished shard wait for the end of the build."""
    return out / BUILD_FOLDER / f"shard-{number:06d}.parquet"


@dataclass(frozen=True)
class FinishedShard:
    """What `.build` says of a finished shard; its rows stay on disk."""

    tar_path: Path
    rows_path: Path
    num_rows: int
    num_bytes: int
    sha256: str
    rejected: tuple[tuple[int, str, Reason], ...]  # place in the shard as planned, key, reason
    text_scan: dict[str, int]  # what was found in texts -> how often

    def read_rows(self) -> pa.Table:
        """The rows of its samples, as samples.parquet will hold them."""
        return pq.read_table(self.rows_path).replace_schema_metadata(SAMPLES_SCHEMA.metadata)


@dataclass(frozen=True)
class _Unit:
    """One sample to be: its place in the shard, its key, and its record with cleaned texts."""

    number: int
    key: str
    record: Record
    found: Counter[str]  # in its texts


def write_shard(task: ShardTask) -> None:
    """Write the tar of a shard, then its rows; neither exists under its name before it is whole."""
    if task.resizer != RESIZER:
        raise UserError(
            f"the build was planned with the resizer {task.resizer}, this process has {RESIZER}; install the same "
            "packages on every machine (cykooz-resizer among them)"
        )
    key, tar_path = task.load_key(), get_tar_path(task.out, task.number)
    rows: list[dict[str, Any]] = []
    rejected: list[tuple[int, str, Reason]] = []
    found: Counter[str] = Counter()
    digest = hashlib.sha256()
    with open_atomic(tar_path) as file:
        offset = 0

        def write(data: bytes) -> None:
            nonlocal offset
            file.write(data)
            digest.update(data)
            offset += len(data)

        def add(name: str, data: bytes) -> tuple[int, int]:
            # tarfile's own header, written by hand for the offsets; webdataset.TarWriter would import torch.
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(data), 0o644  # mtime, owner and group stay 0: equal input, equal bytes
            write(header.tobuf(tarfile.USTAR_FORMAT))
            place = offset
            write(data)
            write(bytes(-len(data) % tarfile.BLOCKSIZE))
            return place, len(data)

        for unit, stored in _read_units(task, key):
            if isinstance(stored, str):
                rejected.append((unit.number, unit.key, stored))
                continue
            stored.facts["device"], counts = task.scanner.clean_device(stored.facts.get("device"), unit.record)
            found += unit.found + counts
            sample = _make_sample(task, key, unit, stored)
            row = sample.model_dump(exclude={"schema_version"})
            row |= {"labels": list(sample.labels.items()), "tabular": json.dumps(sample.tabular, sort_keys=True)}
            row |= {"shard": tar_path.name, "extension": stored.extension}
            add(f"{unit.key}.json", sample.model_dump_json().encode())
            row["offset"], row["length"] = add(f"{unit.key}.{stored.extension}", stored.image)
            if stored.mask is not None:
                row["mask_offset"], row["mask_length"] = add(f"{unit.key}.mask.png", stored.mask)
            if unit.record.caption is not None:
                row["caption_offset"], row["caption_length"] = add(f"{unit.key}.txt", unit.record.caption.encode())
            rows.append(row)
        write(bytes(tarfile.RECORDSIZE - offset % tarfile.RECORDSIZE))  # at least the two empty end blocks
    facts = {
        "task_hash": task.hash,
        "num_bytes": offset,
        "sha256": digest.hexdigest(),
        "rejected": rejected,
        "text_scan": dict(sorted(found.items())),
    }
    table = pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA).replace_schema_metadata(
        {**SAMPLES_SCHEMA.metadata, FACTS: json.dumps(facts).encode()}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(get_rows_path(task.out, task.number), buffer.getvalue())


def read_finished(out: Path, number: int, task_hash: str) -> FinishedShard | None:
    """The finished shard of a task; None if it is not there, is torn, or was another task's."""
    tar_path, rows_path = get_tar_path(out, number), get_rows_path(out, number)
    try:
        with pq.ParquetFile(rows_path) as file:
            num_rows, metadata = file.metadata.num_rows, file.schema_arrow.metadata
        facts = json.loads(metadata[FACTS])
    except (OSError, KeyError, ValueError, pa.ArrowInvalid):
        return None
    if facts.get("task_hash") != task_hash:
        return None
    if not tar_path.is_file() or tar_path.stat().st_size != facts["num_bytes"]:
        return None
    rejected = tuple((place, key, reason) for place, key, reason in facts["rejected"])
    return FinishedShard(
        tar_path, rows_path, num_rows, facts["num_bytes"], facts["sha256"], rejected, facts["text_scan"]
    )


def _read_units(task: ShardTask, key: PseudonymKey) -> Iterator[tuple[_Unit, Stored | Reason]]:
    """The samples of a shard in planned order, or the reason why one is none; their texts cleaned."""
    if task.tiles is None:
        for number, raw in enumerate(task.records):
            record, found = task.scanner.clean(raw)
            stored = read_photograph(record, min_side=task.options.min_side, short_side=task.options.short_side)
            yield _Unit(number, _hash(task, key, record.raw_id), record, found), stored
        return
    records = [task.scanner.clean(record)[0] for record in task.records]  # the plan has counted what was found
    tiles: dict[int, Stored | Reason] = {}
    for place, record in enumerate(records):  # slide by slide: a shard's tiles fit into memory
        tiles |= _read_slide(task, place, record)
    for number, place in enumerate(task.units):
        record = records[place]
        name = f"{record.raw_id}@{task.tiles.x0[number]},{task.tiles.y0[number]}"
        yield _Unit(number, _hash(task, key, name), record, Counter()), tiles.pop(number)


def _read_slide(task: ShardTask, place: int, record: Record) -> Iterator[tuple[int, Stored | Reason]]:
    tiles, settings = task.tiles, get_settings(task.card, record)
    assert tiles is not None
    slide = load_slide_without_places(tiles.plans[place], task.plan_hash, record.path, settings)
    places = [
        (int(number), TilePlace(int(tiles.x0[number]), int(tiles.y0[number]), float(tiles.tissue[number])))
        for number in np.flatnonzero(task.units == place)
    ]
    return read_slide_tiles(slide.plan, places, slide.sha256)


def _hash(task: ShardTask, key: PseudonymKey, raw_id: str) -> str:
    return pseudonymise(key, task.card.namespace, "sample", raw_id)


def _make_sample(task: ShardTask, key: PseudonymKey, unit: _Unit, stored: Stored) -> Sample:
    card, record, namespace = task.card, unit.record, task.card.namespace
    ids: dict[str, str | None] = dict.fromkeys(("patient_id", "lesion_id", "slide_id"))
    if record.patient_id is not None:
        ids["patient_id"] = pseudonymise(key, namespace, "patient", record.patient_id)
    if record.lesion_id is not None:
        lesion = record.lesion_id
        if card.lesion_id_scope == "patient" and record.patient_id is not None:
            lesion = f"{record.patient_id}\0{lesion}"
        ids["lesion_id"] = pseudonymise(key, namespace, "lesion", lesion)
    slide_id = record.slide_id or (record.raw_id if task.tiles is not None else None)
    if slide_id is not None:
        ids["slide_id"] = pseudonymise(key, namespace, "slide", slide_id)
    group_kind: Literal["patient", "lesion", "slide", "sample"] = "sample"
    group_id = unit.key
    for kind in ("patient", "lesion", "slide"):
        if (known := ids[f"{kind}_id"]) is not None:
            group_kind, group_id = kind, known
            break
    facts: dict[str, Any] = {
        "key": unit.key,
        "source": card.name,
        "modality": record.modality,
        **ids,
        "group_id": group_id,
        "group_kind": group_kind,
        "visit_day": record.visit_day,
        "labels": record.labels,
        "tabular": record.tabular,
        "licence": card.licence,
        "permitted_uses": card.permitted_uses,
        "consent_scope": card.consent_scope,
        "synthetic": card.synthetic,
        "sha256": compute_sha256(stored.image),
    }
    delivered = {"mpp": stored.facts["mpp"]} if "mpp" in stored.facts else {}  # of a tile, whatever the table says
    return Sample(**(facts | stored.facts | record.metadata | delivered))
