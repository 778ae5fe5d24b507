"""One shard: the units that the plan gave it -> a tar, then its rows. One task of the executor.

    ShardTask -> read each file or tile -> clean, check, hash -> shard-000007.tar -> .build/shard-000007.parquet

The tar is plain WebDataset (`<key>.json`, `<key>.jpg|png`, `<key>.mask.png`, `<key>.txt`), its bytes a function of the
input alone. The rows say where each member lies; they are written after the tar and carry the hash of the plan, so
their existence means that the shard is finished. What must stay out is counted by reason.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from panfm.config import config_class
from panfm.files import compute_file_sha256, compute_sha256, open_atomic, write_bytes
from panfm.shards.cards import SourceCard
from panfm.shards.privacy import PseudonymKey, clean_image, encode_image, pseudonymise
from panfm.shards.quality import RejectedImageError, RejectReason, check_not_blank, compute_phash, decode_image
from panfm.shards.schema import SAMPLES_SCHEMA, Sample
from panfm.shards.sources import Record
from panfm.shards.wsi import SlidePlan, SlideReason, TilePlace, read_tiles

BUILD_FOLDER = ".build"
MASK_ASPECT_TOLERANCE = 0.03  # a mask of other proportions than its image was drawn on another image
Reason = (
    RejectReason
    | SlideReason
    | Literal[
        "missing_file",
        "unreadable_file",
        "missing_mask",
        "undecodable_mask",
        "mismatched_mask",
        "unreadable_region",
        "no_tissue",
    ]
)


@config_class
class BuildOptions:
    """How a source becomes shards. All but the last four decide the bytes, and so are part of the plan."""

    seed: int = 0
    """Of the shuffle that spreads patients and labels over the shards."""
    samples_per_shard: Annotated[int, Field(ge=1)] = 1024
    """Samples a tar: 50-100 MB of photographs at 512 px, large enough for disks and small enough to redo."""
    short_side: Annotated[int, Field(ge=32)] | None = 512
    """Photographs (not histopathology tiles) are shrunk to this short side in pixels; null keeps all as they are."""
    min_side: Annotated[int, Field(ge=1)] = 32
    """Images with a side below this many pixels are rejected: they hold nothing to learn from."""
    max_rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The build fails if a larger share of the files is rejected: then something else is wrong."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Local processes; the bytes do not depend on it."""
    key_file: Path | None = None
    """Secret key of the ids, for cards with identifiers: private; outside the shard set, kept for as long as it."""
    create_key: bool = False
    """Make the key file if it does not exist yet."""


@dataclass(frozen=True)
class Slide:
    """A slide that can be read, and what all its tiles share."""

    record: Record
    plan: SlidePlan  # its places are in the units
    num_unmasked: int
    sha256: str


@dataclass(frozen=True)
class Unit:
    """What becomes one sample: an image file, or a place on a slide."""

    key: str
    record: Record
    slide: Slide | None = None
    place: TilePlace | None = None


@dataclass(frozen=True)
class ShardTask:
    """One shard to write; picklable."""

    number: int
    out: Path
    card: SourceCard
    options: BuildOptions
    key: PseudonymKey
    plan_hash: str
    units: tuple[Unit, ...]

    @property
    def tar_path(self) -> Path:
        """Where the shard goes."""
        return self.out / f"shard-{self.number:06d}.tar"

    @property
    def rows_path(self) -> Path:
        """Where its finished rows wait for the end of the build."""
        return self.out / BUILD_FOLDER / f"shard-{self.number:06d}.parquet"


@dataclass(frozen=True)
class FinishedShard:
    """What `.build` says of a finished shard."""

    name: str
    num_bytes: int
    sha256: str
    rejected: tuple[tuple[str, Reason], ...]  # key, reason
    rows: pa.Table


@dataclass(frozen=True)
class Stored:
    """The members of one sample and the facts that only its pixels told."""

    image: bytes
    extension: Literal["jpg", "png"]
    mask: bytes | None
    facts: dict[str, Any]  # fields of Sample


def write_shard(task: ShardTask) -> None:
    """Write the tar of a shard, then its rows; neither exists under its name before it is whole."""
    rows: list[dict[str, Any]] = []
    rejected: list[tuple[str, Reason]] = []
    with open_atomic(task.tar_path) as file:
        offset = 0

        def add(name: str, data: bytes) -> tuple[int, int]:
            # tarfile's own header, written by hand for the offsets; webdataset.TarWriter would import torch.
            nonlocal offset
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(data), 0o644  # mtime, owner and group stay 0: equal input, equal bytes
            block = header.tobuf(tarfile.USTAR_FORMAT)
            file.write(block + data + bytes(-len(data) % tarfile.BLOCKSIZE))
            place = offset + len(block)
            offset = place + len(data) + -len(data) % tarfile.BLOCKSIZE
            return place, len(data)

        for unit, stored in _read_units(task):
            if isinstance(stored, str):
                rejected.append((unit.key, stored))
                continue
            sample = _make_sample(task, unit, stored)
            row = sample.model_dump(exclude={"schema_version"})
            row |= {"labels": list(sample.labels.items()), "tabular": json.dumps(sample.tabular, sort_keys=True)}
            row |= {"shard": task.tar_path.name, "extension": stored.extension}
            add(f"{unit.key}.json", sample.model_dump_json().encode())
            row["offset"], row["length"] = add(f"{unit.key}.{stored.extension}", stored.image)
            if stored.mask is not None:
                row["mask_offset"], row["mask_length"] = add(f"{unit.key}.mask.png", stored.mask)
            if unit.record.caption is not None:
                row["caption_offset"], row["caption_length"] = add(f"{unit.key}.txt", unit.record.caption.encode())
            rows.append(row)
        file.write(bytes(tarfile.RECORDSIZE - offset % tarfile.RECORDSIZE))  # at least the two empty end blocks
    facts = {
        "plan_hash": task.plan_hash,
        "num_bytes": task.tar_path.stat().st_size,
        "sha256": compute_file_sha256(task.tar_path),
        "rejected": rejected,
    }
    table = pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA).replace_schema_metadata(
        {**SAMPLES_SCHEMA.metadata, b"panfm_shard": json.dumps(facts).encode()}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(task.rows_path, buffer.getvalue())


def read_finished(task: ShardTask) -> FinishedShard | None:
    """The finished shard of a task; None if it is not there, is torn, or belongs to another plan."""
    try:
        rows = pq.read_table(task.rows_path)
        facts = json.loads(rows.schema.metadata[b"panfm_shard"])
    except (OSError, KeyError, ValueError, pa.ArrowInvalid):
        return None
    if facts["plan_hash"] != task.plan_hash:
        return None
    if not task.tar_path.is_file() or task.tar_path.stat().st_size != facts["num_bytes"]:
        return None
    rejected = tuple((key, reason) for key, reason in facts["rejected"])
    rows = rows.replace_schema_metadata(SAMPLES_SCHEMA.metadata)
    return FinishedShard(task.tar_path.name, facts["num_bytes"], facts["sha256"], rejected, rows)


def _make_sample(task: ShardTask, unit: Unit, stored: Stored) -> Sample:
    card, record, namespace = task.card, unit.record, task.card.namespace
    ids: dict[str, str | None] = dict.fromkeys(("patient_id", "lesion_id", "slide_id"))
    if record.patient_id is not None:
        ids["patient_id"] = pseudonymise(task.key, namespace, "patient", record.patient_id)
    if record.lesion_id is not None:
        lesion = record.lesion_id
        if card.lesion_id_scope == "patient" and record.patient_id is not None:
            lesion = f"{record.patient_id}\0{lesion}"
        ids["lesion_id"] = pseudonymise(task.key, namespace, "lesion", lesion)
    slide_id = record.slide_id or (record.raw_id if unit.slide else None)
    if slide_id is not None:
        ids["slide_id"] = pseudonymise(task.key, namespace, "slide", slide_id)
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
    return Sample(**(facts | stored.facts | record.metadata))


def _read_units(task: ShardTask) -> Iterator[tuple[Unit, Stored | Reason]]:
    """The samples of a shard in planned order, or the reason why one is none."""
    if task.card.slides is None:
        for unit in task.units:
            yield unit, _read_photograph(unit.record, task.options)
        return
    tiles: dict[str, Stored | Reason] = {}
    by_slide: dict[Path, list[Unit]] = {}
    for unit in task.units:
        by_slide.setdefault(unit.record.path, []).append(unit)
    for units in by_slide.values():  # slide by slide and row by row is how slides are read fast
        tiles |= _read_slide_units(units)
    for unit in task.units:
        yield unit, tiles[unit.key]


def _read_photograph(record: Record, options: BuildOptions) -> Stored | Reason:
    try:
        data = record.path.read_bytes()
    except FileNotFoundError:
        return "missing_file"
    except OSError:
        return "unreadable_file"
    try:
        # Tiles are cut at a physical size already; only photographs are shrunk.
        short_side = None if record.modality == "histopathology" else options.short_side
        clean = clean_image(data, min_side=options.min_side, short_side=short_side)
        check_not_blank(clean.image)
    except RejectedImageError as error:
        return error.reason
    mask: bytes | None = None
    if record.mask_path is not None:
        answer = _read_mask(record.mask_path, clean.image.size)
        if not isinstance(answer, bytes):
            return answer
        mask = answer
    facts = {
        "width": clean.width,
        "height": clean.height,
        "original_width": clean.original_width,
        "original_height": clean.original_height,
        "device": clean.device,
        "source_sha256": compute_sha256(data),
        "phash": compute_phash(clean.image),
    }
    return Stored(clean.data, clean.extension, mask, facts)


def _read_mask(path: Path, size: tuple[int, int]) -> bytes | Reason:
    """A mask as a grey PNG of the stored image's `size`, by nearest neighbour, for its values are classes."""
    try:
        mask, width, height = decode_image(path.read_bytes())
    except FileNotFoundError:
        return "missing_mask"
    except (RejectedImageError, OSError):
        return "undecodable_mask"
    if abs(width / height / (size[0] / size[1]) - 1) > MASK_ASPECT_TOLERANCE:
        return "mismatched_mask"
    if mask.mode == "P":
        mask = Image.frombytes("L", mask.size, mask.tobytes())  # palette numbers are the classes, not their colours
    elif mask.mode != "L":
        mask = mask.convert("L")
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.NEAREST)
    return encode_image(mask, "png")


def _read_slide_units(units: Sequence[Unit]) -> Iterator[tuple[str, Stored | Reason]]:
    slide = units[0].slide
    assert slide is not None
    placed = sorted((unit.place.y0, unit.place.x0, unit.key, unit.place) for unit in units if unit.place)
    for tile, (_, _, key, _) in zip(read_tiles(slide.plan, [place for *_, place in placed]), placed, strict=True):
        if tile.image is None:
            yield key, "unreadable_region"
            continue
        image = Image.fromarray(tile.image)
        facts = {
            "width": image.width,
            "height": image.height,
            "original_width": image.width,
            "original_height": image.height,
            "mpp": tile.mpp,
            "x0": tile.x0,
            "y0": tile.y0,
            "level": tile.level,
            "tissue_fraction": tile.tissue_fraction,
            "source_sha256": slide.sha256,
            "phash": compute_phash(image),
        }
        yield key, Stored(encode_image(image, "jpg"), "jpg", None, facts)
