"""From Records to a finished shard set: plan, then one task a shard, then the index last.

    card + ROOT -> Records -> (slides: tiles) -> seeded shuffle -> ShardTasks           the plan, a pure function
    ShardTask   -> shard-000007.tar, then .build/shard-000007.parquet                   one task of the executor each
    all done    -> samples.parquet -> quarantine.csv -> index.json -> .build removed    in this order

A shard's rows in `.build` are written after its tar and carry the plan's hash: a build that was killed redoes only the
shards without them, and ends with the same bytes. No file name, raw id or date of the archive enters the output.
"""

import csv
import hmac
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import panfm
from panfm.errors import UserError
from panfm.executor import run_tasks
from panfm.files import compute_file_sha256, open_atomic, read_json, write_bytes, write_json
from panfm.shards.cards import SourceCard
from panfm.shards.index import INDEX_FILE, SAMPLES_FILE, open_shard_set
from panfm.shards.packing import (
    BUILD_FOLDER,
    BuildOptions,
    FinishedShard,
    Reason,
    ShardTask,
    Slide,
    Unit,
    read_finished,
    write_shard,
)
from panfm.shards.privacy import PUBLIC_KEY, PseudonymKey, create_key, load_key, pseudonymise
from panfm.shards.schema import SAMPLES_SCHEMA, SCHEMA_VERSION
from panfm.shards.sources import Record, compare_with_expected, read_records
from panfm.shards.wsi import SlideError, TilePlace, plan_tiles

PLAN_VERSION = 1  # raise it when the same inputs would give other bytes
QUARANTINE_FILE = "quarantine.csv"


@dataclass(frozen=True)
class Rejection:
    """A file, or `num` regions of a slide, left out. `path` and `detail` are for who builds; they are never written."""

    key: str
    path: Path
    reason: Reason
    num: int = 1
    detail: str = ""


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    path: Path
    source: str
    num_samples: int
    num_shards: int
    num_shards_reused: int  # finished by an earlier, interrupted run
    already_complete: bool
    rejected: tuple[Rejection, ...]  # empty where already_complete; the counts stand in index.json
    num_rejected: dict[str, int]  # reason -> number
    differences: tuple[str, ...]  # between the card's expected counts and the table's

    def __str__(self) -> str:
        """A few lines for the terminal; no file names, which may name patients."""
        lines = [f"{self.path}: {self.num_samples:,} samples of {self.source} in {self.num_shards} shards"]
        if self.already_complete:
            lines[0] += ", complete already"
        elif self.num_shards_reused:
            lines[0] += f", {self.num_shards_reused} of them finished by an earlier run"
        if self.num_rejected:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.num_rejected.items()))
            lines.append(f"rejected: {reasons} (listed by key in {self.path / 'quarantine.csv'})")
        lines += [f"differs from the card: {difference}" for difference in self.differences]
        return "\n".join(lines)


def build_shards(card: SourceCard, root: Path, out: Path, *, options: BuildOptions) -> BuildReport:
    """Build the shard set of a source from the archive at `root` into the folder `out`.

    A second call on a complete set with the same card, archive and options returns at once; after an interruption it
    goes on where the first stopped. Raises UserError for everything that a user can get wrong; without `index.json`
    in it the folder is never taken for a shard set.
    """
    root, out = Path(root), Path(out)
    if "research" not in card.permitted_uses:
        raise UserError(
            f"card {card.name}: permitted_uses ({', '.join(card.permitted_uses)}) does not include research, which "
            "pretraining and evaluation are; leave the source out, or correct the card if its licence allows it"
        )
    key = _get_key(card, out, options)
    records = read_records(card, root)
    differences = compare_with_expected(card, records)
    plan_hash = _compute_plan_hash(card, records, root, options, key)
    if (out / INDEX_FILE).exists():
        return _report_complete(card, out, plan_hash, differences)
    _prepare_folder(out)

    # ---- plan: what goes into which shard
    slides, rejected = _plan_slides(card, records, options, key)
    units = _plan_units(card, records, slides, key)
    order = np.random.default_rng(options.seed).permutation(len(units))
    num_shards = -(-len(units) // options.samples_per_shard)
    tasks = [
        ShardTask(
            number=number,
            out=out,
            card=card,
            options=options,
            key=key,
            plan_hash=plan_hash,
            units=tuple(units[place] for place in order[number::num_shards]),
        )
        for number in range(num_shards)
    ]

    # ---- write: one task a shard, those that an earlier run finished left alone
    todo = [task for task in tasks if read_finished(task) is None]
    run_tasks(
        write_shard,
        todo,
        description=f"shards of {card.name}",
        processes=options.processes,
        unit="images",
        size=lambda task: len(task.units),
    )

    # ---- close: rows, quarantine, and the index last
    finished = []
    for task in tasks:
        shard = read_finished(task)
        assert shard is not None, f"{task.tar_path} was not written"
        finished.append(shard)
        paths = {unit.key: unit.record.path for unit in task.units}
        rejected += [Rejection(bad, paths[bad], reason) for bad, reason in shard.rejected]
    num_regions = sum(len(places) + slide.num_unmasked for slide, places in slides)
    _check_rejected(card, rejected, options, num_files=len(records), num_regions=num_regions)
    finished = [shard for shard in finished if shard.rows.num_rows]
    for path in set(out.glob("shard-*.tar")) - {out / shard.name for shard in finished}:
        path.unlink()  # empty, or left by an interrupted build of another plan
    _write_samples(out / SAMPLES_FILE, finished)
    _write_quarantine(out / QUARANTINE_FILE, rejected)
    num_rejected = _count_rejected(rejected)
    num_samples = sum(shard.rows.num_rows for shard in finished)
    write_json(
        out / INDEX_FILE,
        {
            "schema_version": SCHEMA_VERSION,
            "code_version": panfm.__version__,
            "source": card.name,
            "card": card.model_dump(mode="json"),
            "options": _get_plan_options(options),
            "identifiers": {"kind": key.kind, "key_fingerprint": key.fingerprint},
            "plan_hash": plan_hash,
            "num_samples": num_samples,
            "num_rejected": num_rejected,
            "num_modalities": _count(finished, "modality"),
            "num_labels": _count_labels(finished),
            "samples_sha256": compute_file_sha256(out / SAMPLES_FILE),
            "shards": [
                {
                    "name": shard.name,
                    "num_bytes": shard.num_bytes,
                    "num_samples": shard.rows.num_rows,
                    "sha256": shard.sha256,
                }
                for shard in finished
            ],
        },
    )
    _remove_build_folder(out)
    return BuildReport(
        path=out,
        source=card.name,
        num_samples=num_samples,
        num_shards=len(finished),
        num_shards_reused=len(tasks) - len(todo),
        already_complete=False,
        rejected=tuple(rejected),
        num_rejected=num_rejected,
        differences=differences,
    )


# ------------------------------------------------------------------------------------------------ the plan


def _get_key(card: SourceCard, out: Path, options: BuildOptions) -> PseudonymKey:
    if card.identifiers == "public":
        if options.key_file is not None:
            raise UserError(
                f"key_file ({options.key_file}): card {card.name} has identifiers: public, whose ids are hashed with "
                "the published key; leave key_file out, or set identifiers: private in the card"
            )
        return PUBLIC_KEY
    if options.key_file is None:
        raise UserError(
            f"card {card.name}: identifiers: private needs a secret key; give key_file=FILE outside {out} (with "
            "create_key=true the first time) and keep that file: without it no id can be found again"
        )
    read = create_key if options.create_key else load_key
    return read(options.key_file, shard_folder=out)


def _get_plan_options(options: BuildOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("seed", "samples_per_shard", "short_side", "min_side")}


def _compute_plan_hash(
    card: SourceCard, records: Sequence[Record], root: Path, options: BuildOptions, key: PseudonymKey
) -> str:
    """Hash everything that decides the bytes. Files count by path and size: reading them is the build itself.

    Keyed, because the hash of a small table could be guessed at.
    """
    header = [PLAN_VERSION, SCHEMA_VERSION, card.model_dump(mode="json"), _get_plan_options(options), key.fingerprint]
    digest = hmac.new(key.secret, json.dumps(header, sort_keys=True).encode(), "sha256")
    for record in records:
        files = [(str(path.relative_to(root)), _get_size(path)) for path in (record.path, record.mask_path) if path]
        facts = {name: value for name, value in vars(record).items() if name not in ("path", "mask_path", "line")}
        digest.update(json.dumps([files, facts], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _get_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _prepare_folder(out: Path) -> None:
    """Make the folder; refuse one with foreign files; remove what an interrupted run left half-written."""
    ours = (BUILD_FOLDER, "shard-", SAMPLES_FILE, QUARANTINE_FILE, INDEX_FILE)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    for path in out.iterdir() if out.is_dir() else ():
        if not path.name.startswith(ours):
            raise UserError(
                f"{out}: holds {path.name}, which is no part of a shard set; give --out an empty or new folder"
            )
    (out / BUILD_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in [*out.glob("*.tmp-*"), *(out / BUILD_FOLDER).glob("*.tmp-*")]:
        path.unlink()


def _report_complete(card: SourceCard, out: Path, plan_hash: str, differences: tuple[str, ...]) -> BuildReport:
    index = read_json(out / INDEX_FILE)
    if not isinstance(index, dict) or index.get("plan_hash") != plan_hash:
        raise UserError(
            f"{out}: already holds a complete shard set of another card, archive, key or options; give another --out, "
            "or delete that folder to build it anew"
        )
    shard_set = open_shard_set(out)
    _remove_build_folder(out)
    return BuildReport(
        path=out,
        source=card.name,
        num_samples=shard_set.num_samples,
        num_shards=len(index["shards"]),
        num_shards_reused=len(index["shards"]),
        already_complete=True,
        rejected=(),
        num_rejected=index["num_rejected"],
        differences=differences,
    )


def _plan_slides(
    card: SourceCard, records: Sequence[Record], options: BuildOptions, key: PseudonymKey
) -> tuple[list[tuple[Slide, tuple[TilePlace, ...]]], list[Rejection]]:
    """Find the tissue tiles of every slide; a slide that cannot be read is a rejection."""
    if card.slides is None:
        return [], []
    answers = run_tasks(
        _plan_slide,
        [(record, card) for record in records],
        description=f"tissue of {card.name}",
        processes=options.processes,
        unit="slides",
    )
    slides: list[tuple[Slide, tuple[TilePlace, ...]]] = []
    rejected: list[Rejection] = []
    for record, answer in zip(records, answers, strict=True):
        hashed = pseudonymise(key, card.namespace, "slide", record.slide_id or record.raw_id)
        if isinstance(answer, Slide):
            places = answer.plan.places
            if answer.num_unmasked:
                rejected.append(Rejection(hashed, record.path, "unreadable_region", answer.num_unmasked))
            if not places:
                rejected.append(Rejection(hashed, record.path, "no_tissue"))
            slides.append((replace(answer, plan=replace(answer.plan, places=())), places))
        else:
            rejected.append(Rejection(hashed, record.path, answer[0], detail=answer[1]))
    return slides, rejected


def _plan_slide(task: tuple[Record, SourceCard]) -> Slide | tuple[Reason, str]:
    record, card = task
    assert card.slides is not None
    if not record.path.is_file():
        return "missing_file", f"{record.path}: no such file"
    try:
        plan = plan_tiles(record.path, card.slides)
    except SlideError as error:
        return error.reason, str(error)
    return Slide(record, plan, plan.num_unmasked, compute_file_sha256(record.path))


def _plan_units(
    card: SourceCard,
    records: Sequence[Record],
    slides: Sequence[tuple[Slide, tuple[TilePlace, ...]]],
    key: PseudonymKey,
) -> list[Unit]:
    def hashed(raw_id: str) -> str:
        return pseudonymise(key, card.namespace, "sample", raw_id)

    if card.slides is None:
        return [Unit(hashed(record.raw_id), record) for record in records]
    return [
        Unit(hashed(f"{slide.record.raw_id}@{place.x0},{place.y0}"), slide.record, slide, place)
        for slide, places in slides
        for place in places
    ]


# ------------------------------------------------------------------------------------------------ the end


def _check_rejected(
    card: SourceCard, rejected: Sequence[Rejection], options: BuildOptions, *, num_files: int, num_regions: int
) -> None:
    """Fail the build if too much was left out, or everything: one bad file is to be expected, many are a mistake."""
    files = [one for one in rejected if one.reason != "unreadable_region"]
    num_lost = sum(one.num for one in rejected if one.reason == "unreadable_region")
    shares = [(len(files) / num_files, f"{len(files)} of {num_files} files")]
    if num_regions:
        shares.append((num_lost / num_regions, f"{num_lost} of {num_regions} slide regions"))
    share, counted = max(shares)
    if share <= options.max_rejected_share and share < 1:
        return
    reasons = ", ".join(f"{reason} {num}" for reason, num in _count_rejected(rejected).items())
    first = rejected[0].detail or f"{rejected[0].path}: {rejected[0].reason}"
    raise UserError(
        f"card {card.name}: {counted} were rejected ({reasons}), more than max_rejected_share "
        f"({options.max_rejected_share:g}); the first: {first}; "
        "repair or remove them, or, if this is what the archive is like, raise max_rejected_share"
    )


def _count_rejected(rejected: Sequence[Rejection]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for rejection in rejected:
        counts[rejection.reason] += rejection.num
    return dict(sorted(counts.items()))


def _write_samples(path: Path, finished: Sequence[FinishedShard]) -> None:
    with open_atomic(path) as file, pq.ParquetWriter(file, SAMPLES_SCHEMA, compression="zstd") as writer:
        for shard in finished:
            writer.write_table(shard.rows)


def _write_quarantine(path: Path, rejected: Sequence[Rejection]) -> None:
    """Write what was left out and why, by hashed key: the names of the files stay with the person who builds."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("key", "reason", "num"))
    writer.writerows((rejection.key, rejection.reason, rejection.num) for rejection in rejected)
    write_bytes(path, buffer.getvalue().encode())


def _count(finished: Sequence[FinishedShard], column: str) -> dict[str, int]:
    return dict(sorted(Counter(value for shard in finished for value in shard.rows[column].to_pylist()).items()))


def _count_labels(finished: Sequence[FinishedShard]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for shard in finished:
        for labels in shard.rows["labels"].to_pylist():
            for name, value in labels:
                counts.setdefault(name, Counter())[value] += 1
    return {name: dict(sorted(values.items())) for name, values in sorted(counts.items())}


def _remove_build_folder(out: Path) -> None:
    folder = out / BUILD_FOLDER
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
