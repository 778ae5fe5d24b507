"""The plan of a build: which record or tile goes into which shard, a pure function of archive, card, options and key.

    Records -> compute_plan_hash -> (slides: prepare_slide, one task each) -> units, as columns -> arrange
            -> BuildPlan: make_task(number) when its turn comes

What grows with the archive are arrays of numbers: 12 bytes an image, 28 a tile, besides the Records' own table.
"""

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from panfm.executor import run_tasks
from panfm.shards.cards import SourceCard
from panfm.shards.members import Reason
from panfm.shards.packing import (
    BUILD_FOLDER,
    PLAN_OPTIONS,
    BuildOptions,
    FinishedShard,
    ShardTask,
    Tiles,
    read_finished,
)
from panfm.shards.pixels import RESIZER
from panfm.shards.privacy import PseudonymKey, pseudonymise
from panfm.shards.schema import SCHEMA_VERSION
from panfm.shards.slide_plans import OVERLAY_FOLDER, SlideTask, get_settings, prepare_slide, read_places
from panfm.shards.sources import Record, RecordTable
from panfm.shards.text_scan import TextScanner
from panfm.shards.wsi_reader import count_slide_bytes

PLAN_VERSION = 2  # raise it when the same inputs would give other bytes
SLIDES_PER_POOL = 32  # shuffled together: a shard that held tiles of a thousand slides would have to open them all


@dataclass(frozen=True)
class Rejection:
    """A file, or `num` regions of a slide, left out. `path` and `detail` are for who builds; they are never written."""

    key: str
    path: Path
    reason: Reason
    num: int = 1
    detail: str = ""


@dataclass(frozen=True)
class SlideUnits:
    """The tiles of all slides as columns, slide by slide and row-major in each."""

    plans: tuple[Path, ...]  # [num_records] stored plan of each
    x0: npt.NDArray[np.int32]  # [num_units]
    y0: npt.NDArray[np.int32]
    tissue: npt.NDArray[np.float64]


@dataclass(frozen=True)
class BuildPlan:
    """What goes where: unit n is record `record[n]` or a tile of it; shard s holds `order[starts[s]:starts[s + 1]]`."""

    card: SourceCard
    options: BuildOptions
    out: Path
    hash: str
    key_fingerprint: str
    scanner: TextScanner
    records: RecordTable
    record: npt.NDArray[np.int32]  # [num_units]
    slides: SlideUnits | None
    order: npt.NDArray[np.int64]  # [num_units]
    starts: npt.NDArray[np.int64]  # [num_shards + 1]
    rejected: tuple[Rejection, ...]  # slides that give no tiles, and regions that were lost in planning
    num_unmasked: int  # regions of slides that planning could not judge
    text_scan: Mapping[str, int]  # what was found in the texts of slides; of photographs the shards tell
    hashes: list[str] = field(repr=False)  # [num_shards] what the task of each shard is known by

    @property
    def num_shards(self) -> int:
        """Number of shards as planned; some may turn out empty."""
        return len(self.starts) - 1

    @property
    def num_units(self) -> int:
        """Number of samples to be."""
        return len(self.order)

    def count_units(self, number: int) -> int:
        """Number of samples that a shard is to hold."""
        return int(self.starts[number + 1] - self.starts[number])

    def find_record(self, number: int, place: int) -> Record:
        """The record of what stands at `place` of a shard."""
        return self.records[int(self.record[self.order[self.starts[number] + place]])]

    def read_finished(self, number: int) -> FinishedShard | None:
        """The shard if an earlier run, or this one, has finished it."""
        return read_finished(self.out, number, self.hashes[number])

    def make_task(self, number: int) -> ShardTask:
        """The task that writes a shard."""
        chosen = self.order[self.starts[number] : self.starts[number + 1]]
        # Tiles share their slide's record; photographs come with one each, in order.
        needed, units = self.record[chosen], np.arange(len(chosen))
        if self.slides is not None:
            needed, units = np.unique(needed, return_inverse=True)
        records = self.records.take(needed)
        tiles = None
        if self.slides is not None:
            tiles = Tiles(
                plans=tuple(self.slides.plans[place] for place in needed),
                x0=self.slides.x0[chosen],
                y0=self.slides.y0[chosen],
                tissue=self.slides.tissue[chosen],
            )
        return ShardTask(
            number=number,
            hash=self.hashes[number],
            out=self.out,
            card=self.card,
            options=self.options,
            plan_hash=self.hash,
            key_fingerprint=self.key_fingerprint,
            scanner=self.scanner.narrow(records),
            records=records,
            units=units.astype(np.int32),
            tiles=tiles,
        )


def get_plan_options(options: BuildOptions) -> dict[str, Any]:
    """The options that decide the bytes."""
    return {name: getattr(options, name) for name in PLAN_OPTIONS}


def compute_plan_hash(
    card: SourceCard, records: Sequence[Record], root: Path, options: BuildOptions, key: PseudonymKey
) -> str:
    """Hash everything that decides the bytes. Files count by path and size: reading them is the build itself.

    Keyed, because the hash of a small table could be guessed at.
    """
    header = [
        PLAN_VERSION,
        SCHEMA_VERSION,
        RESIZER,
        card.model_dump(mode="json"),
        get_plan_options(options),
        key.fingerprint,
    ]
    digest = hmac.new(key.secret, json.dumps(header, sort_keys=True).encode(), "sha256")
    count_bytes = lru_cache(maxsize=4096)(_count_bytes)  # all members of a .zip are in one file
    for record in records:
        paths = [path for path in (record.path, record.mask_path) if path]
        files = [(str(path.relative_to(root)), count_bytes(path, card.slides is not None)) for path in paths]
        facts = {name: value for name, value in vars(record).items() if name not in ("path", "mask_path", "line")}
        digest.update(json.dumps([files, facts], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _count_bytes(path: Path, is_slide: bool) -> int | None:
    try:
        return count_slide_bytes(path) if is_slide else path.stat().st_size
    except OSError:
        return None


def plan_build(
    card: SourceCard, records: RecordTable, out: Path, options: BuildOptions, key: PseudonymKey, plan_hash: str
) -> BuildPlan:
    """Look at texts and slides, list the units, and arrange them in shards.

    Raises UserError for a text of a private source that names somebody (see text_scan).
    """
    scanner = TextScanner.from_records(card, records)
    slides: SlideUnits | None = None
    rejected: tuple[Rejection, ...] = ()
    num_unmasked = 0
    text_scan: Counter[str] = Counter()
    if card.slides is None:
        record = np.arange(len(records), dtype=np.int32)
        groups = record if options.order == "shuffled" else _find_groups(records)
    else:
        record, slides, rejected, num_unmasked = _plan_slides(card, records, out, options, key, plan_hash)
        groups = record
        for place in np.unique(record):
            text_scan.update(scanner.clean(records[int(place)])[1])
    order, starts = arrange(groups, options, pooled=card.slides is not None)
    hashes: list[str] = []
    for first, last in pairwise(starts):
        chosen = order[first:last]
        digest = hashlib.sha256(f"{plan_hash} {len(hashes)}".encode() + record[chosen].tobytes())
        if slides is not None:
            digest.update(slides.x0[chosen].tobytes() + slides.y0[chosen].tobytes())
        hashes.append(digest.hexdigest())
    return BuildPlan(
        card=card,
        options=options,
        out=out,
        hash=plan_hash,
        key_fingerprint=key.fingerprint,
        scanner=scanner,
        records=records,
        record=record,
        slides=slides,
        order=order,
        starts=starts,
        rejected=rejected,
        num_unmasked=num_unmasked,
        text_scan=text_scan,
        hashes=hashes,
    )


# ------------------------------------------------------------------------------------------------ order


def arrange(
    groups: npt.NDArray[np.int32], options: BuildOptions, *, pooled: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Put units into shards: their order [num_units], and where each shard starts in it [num_shards + 1].

    groups: int [num_units], the slide of each unit (ascending where `pooled`). shuffled: a seeded permutation, where
    `pooled` within pools of 32 slides, or as many as it takes to fill a shard. contiguous: group by group, each in as
    few shards as it takes.
    """
    limit = options.samples_per_shard
    if options.order == "contiguous":
        order = np.argsort(groups, kind="stable")
        return order, _cut_between_groups(np.unique(groups, return_counts=True)[1], limit)
    rng = np.random.default_rng(options.seed)
    pools = _draw_pools(groups, limit, rng) if pooled else [np.arange(len(groups))]
    parts: list[npt.NDArray[np.int64]] = []
    for pool in pools:
        drawn = pool[rng.permutation(len(pool))]
        num_shards = -(-len(drawn) // limit)
        parts += [drawn[number::num_shards] for number in range(num_shards)]  # of sizes that differ by one
    order = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return order, np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)


def _draw_pools(groups: npt.NDArray[np.int32], limit: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Units of slides that are shuffled together, drawn without replacement."""
    _, first, counts = np.unique(groups, return_index=True, return_counts=True)
    pool: list[int] = []
    left = int(counts.sum())
    for slide in rng.permutation(len(first)):
        pool.append(int(slide))
        size = int(counts[pool].sum())
        # A rest that fills no shard of its own joins the last pool.
        if len(pool) >= SLIDES_PER_POOL and size >= limit and left - size >= limit:
            yield np.concatenate([np.arange(first[one], first[one] + counts[one]) for one in sorted(pool)])
            left -= size
            pool = []
    if pool:
        yield np.concatenate([np.arange(first[one], first[one] + counts[one]) for one in sorted(pool)])


def _cut_between_groups(counts: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    """Where shards start: a group begins in the open shard only if that costs it no further shard."""
    starts, place, room = [0], 0, limit
    for count in map(int, counts):
        needed = -(-count // limit)
        in_open = 1 + max(0, -(-(count - room) // limit))
        if room < limit and (room == 0 or in_open > needed):
            starts.append(place)
            room = limit
        end = place + count
        while end - place > room:
            place += room
            starts.append(place)
            room = limit
        room -= end - place
        place = end
    return np.array([*starts, place] if place else [0], dtype=np.int64)


def _find_groups(records: RecordTable) -> npt.NDArray[np.int32]:
    """The slide of each record, numbered as they first appear; a record without one is its own group."""
    numbers: dict[str, int] = {}
    groups = np.empty(len(records), dtype=np.int32)
    for place, slide_id in enumerate(records.table["slide_id"].to_pylist()):
        groups[place] = place if slide_id is None else numbers.setdefault(slide_id, place)
    return groups


# ------------------------------------------------------------------------------------------------ slides


def make_slide_tasks(
    card: SourceCard, records: Sequence[Record], out: Path, key: PseudonymKey, plan_hash: str
) -> Iterator[SlideTask]:
    """One task a slide, in the order of the records."""
    seen: Counter[str] = Counter()
    for number, record in enumerate(records):
        name = _hash_slide(card, key, record)
        seen[name] += 1  # a slide that was scanned in several files
        suffix = f"-{seen[name]}" if seen[name] > 1 else ""
        yield SlideTask(
            record=record,
            settings=get_settings(card, record),
            plan_hash=plan_hash,
            plan_path=out / BUILD_FOLDER / f"slide-{number:06d}.json",
            overlay_path=out / OVERLAY_FOLDER / f"{name}{suffix}.png",
        )


def _plan_slides(
    card: SourceCard, records: RecordTable, out: Path, options: BuildOptions, key: PseudonymKey, plan_hash: str
) -> tuple[npt.NDArray[np.int32], SlideUnits, tuple[Rejection, ...], int]:
    """Find the tissue tiles of every slide; a slide that gives none is a rejection."""
    answers = run_tasks(
        prepare_slide,
        make_slide_tasks(card, records, out, key, plan_hash),
        description=f"tissue of {card.name}",
        processes=options.processes,
        unit="slides",
        total=len(records),
        executor=options.executor,
        scheduler=options.scheduler,
    )
    rejected: list[Rejection] = []
    columns: list[tuple[npt.NDArray[np.int32], ...]] = []
    tissue: list[npt.NDArray[np.float64]] = []
    series: set[str] = set()
    paths: list[Path] = []
    tasks = make_slide_tasks(card, records, out, key, plan_hash)
    for number, (answer, task) in enumerate(zip(answers, tasks, strict=True)):
        paths.append(task.plan_path)
        reason, detail = answer.reason, answer.detail
        if reason is None and answer.series in series:  # the table names several files of one DICOM slide
            reason, detail = "repeated_slide", f"{task.record.path}: belongs to a DICOM slide of an earlier row"
        hashed = _hash_slide(card, key, task.record)
        if reason is not None:
            rejected.append(Rejection(hashed, task.record.path, reason, detail=detail))
            continue
        if answer.series is not None:
            series.add(answer.series)
        if answer.num_unmasked:
            rejected.append(Rejection(hashed, task.record.path, "unreadable_region", answer.num_unmasked))
        x0, y0, fractions = read_places(task.plan_path, plan_hash)
        columns.append((np.full(len(x0), number, np.int32), np.array(x0, np.int32), np.array(y0, np.int32)))
        tissue.append(np.array(fractions, np.float64))
    if not columns:
        columns, tissue = [(np.empty(0, np.int32),) * 3], [np.empty(0)]
    record, x_all, y_all = (np.concatenate(part) for part in zip(*columns, strict=True))
    units = SlideUnits(tuple(paths), x_all, y_all, np.concatenate(tissue))
    num_unmasked = sum(answer.num_unmasked for answer in answers if answer.reason is None)
    return record, units, tuple(rejected), num_unmasked


def _hash_slide(card: SourceCard, key: PseudonymKey, record: Record) -> str:
    return pseudonymise(key, card.namespace, "slide", record.slide_id or record.raw_id)
