"""From Records to a finished shard set: plan, then one task a shard, then the index last.

    card + ROOT -> Records -> plan_build -> BuildPlan                                   a pure function, arrays only
    make_task(n) -> shard-000007.tar, then .build/shard-000007.parquet                  one task of the executor each
    all done    -> samples.parquet -> quarantine.csv -> index.json -> .build removed    in this order, shard by shard

A shard's rows in `.build` are written after its tar and carry the hash of its task: a build that was killed redoes only
the shards without them, and ends with the same bytes. No file name, raw id or date of the archive enters the output.
"""

import codecs
import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

import panfm
from panfm.errors import UserError
from panfm.executor import run_tasks
from panfm.files import compute_file_sha256, open_atomic, read_json, write_json
from panfm.shards.cards import SourceCard
from panfm.shards.index import INDEX_FILE, QUARANTINE_FILE, SAMPLES_FILE, open_shard_set
from panfm.shards.packing import BUILD_FOLDER, BuildOptions, FinishedShard, write_shard
from panfm.shards.planning import (
    BuildPlan,
    Rejection,
    compute_plan_hash,
    get_plan_options,
    make_slide_tasks,
    plan_build,
)
from panfm.shards.privacy import PUBLIC_KEY, PseudonymKey, create_key, load_key
from panfm.shards.schema import SAMPLES_SCHEMA, SCHEMA_VERSION
from panfm.shards.slide_plans import OVERLAY_FOLDER, add_unreadable
from panfm.shards.sources import compare_with_expected, read_records

__all__ = ["BuildOptions", "BuildReport", "Rejection", "build_shards"]

# What else a finished set may hold, written by other commands; a build leaves it alone.
COMPANIONS = ("datasheet.md", "croissant.json", "review", "forgotten.json")
MAX_REPORTED = 1000  # rejections that a report names; quarantine.csv has all


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    path: Path
    source: str
    num_samples: int
    num_shards: int
    num_shards_reused: int  # finished by an earlier, interrupted run
    already_complete: bool
    rejected: tuple[Rejection, ...]  # the first 1,000; empty where already_complete
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
    if options.use not in card.permitted_uses:
        raise UserError(
            f"card {card.name}: permitted_uses ({', '.join(card.permitted_uses)}) does not include {options.use}, "
            "which these shards are for; leave the source out, or correct the card if its licence allows it"
        )
    if card.identifiers == "private" and (left := set(card.open_questions) & {"legal_basis", "consent_scope"}):
        raise UserError(
            f"card {card.name}: TODO is left in {' and '.join(sorted(left))}; a private archive is not built before a "
            "person has said on what basis, so write it into the card"
        )
    if options.executor == "dask":  # its workers have folders of their own
        root, out = root.absolute(), out.absolute()
        options = replace(options, key_file=options.key_file and options.key_file.absolute())
    key = _get_key(card, out, options)
    records = read_records(card, root)
    differences = compare_with_expected(card, records)
    plan_hash = compute_plan_hash(card, records, root, options, key)
    if (out / INDEX_FILE).exists():
        return _report_complete(card, out, plan_hash, differences)
    _prepare_folder(out)

    # ---- plan and write: one task a shard, those that an earlier run finished left alone
    num_reused = None
    while True:
        plan = plan_build(card, records, out, options, key, plan_hash)
        reused = _write_missing(plan)
        num_reused = reused if num_reused is None else num_reused
        if not _find_bad_slides(plan, key):
            break  # else a slide is out that planning had in: the others are arranged anew

    # ---- close: counts first, then rows, quarantine, and the index last
    counts = _count_all(plan)
    _check_rejected(plan, counts)
    kept = [number for number, num_rows in enumerate(counts.num_rows) if num_rows]
    for path in (set(out.glob("shard-*.tar")) | set(out.glob(f"{OVERLAY_FOLDER}/*.png"))) - _list_results(
        plan, key, kept
    ):
        path.unlink()  # empty, or left by an interrupted build of another plan
    _write_samples(plan, kept, counts)
    _write_quarantine(plan)
    _remove_torn_files(out)
    write_json(out / INDEX_FILE, _make_index(plan, key, kept, counts))
    _remove_build_folder(out)
    return BuildReport(
        path=out,
        source=card.name,
        num_samples=sum(counts.num_rows),
        num_shards=len(kept),
        num_shards_reused=num_reused,
        already_complete=False,
        rejected=counts.first_rejected,
        num_rejected=dict(sorted(counts.rejected.items())),
        differences=differences,
    )


def _get_key(card: SourceCard, out: Path, options: BuildOptions) -> PseudonymKey:
    if card.identifiers == "public":
        if options.key_file is not None:
            raise UserError(
                f"--key-file {options.key_file}: card {card.name} has identifiers: public, whose ids are hashed with "
                "the published key; leave it out, or set identifiers: private in the card"
            )
        return PUBLIC_KEY
    if options.key_file is None:
        raise UserError(
            f"card {card.name}: identifiers: private needs a secret key; give --key-file FILE outside {out} (with "
            "--create-key the first time) and keep that file: without it no id can be found again"
        )
    read = create_key if options.create_key else load_key
    return read(options.key_file, shard_folder=out)


def _prepare_folder(out: Path) -> None:
    """Make the folder; refuse one with foreign files; remove what an interrupted run left half-written."""
    ours = (BUILD_FOLDER, "shard-", SAMPLES_FILE, QUARANTINE_FILE, INDEX_FILE, OVERLAY_FOLDER, *COMPANIONS)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    for path in out.iterdir() if out.is_dir() else ():
        if not path.name.startswith(ours):
            raise UserError(
                f"{out}: holds {path.name}, which is no part of a shard set; give --out an empty or new folder"
            )
    (out / BUILD_FOLDER).mkdir(parents=True, exist_ok=True)
    _remove_torn_files(out)


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


def _write_missing(plan: BuildPlan) -> int:
    """Write the shards that are not finished yet; the number of those that were."""
    todo = [number for number in range(plan.num_shards) if plan.read_finished(number) is None]
    run_tasks(
        write_shard,
        (plan.make_task(number) for number in todo),
        description=f"shards of {plan.card.name}",
        processes=plan.options.processes,
        unit="images",
        size=lambda task: len(task.units),
        total=plan.num_units,
        done=plan.num_units - sum(map(plan.count_units, todo)),
        executor=plan.options.executor,
        scheduler=plan.options.scheduler,
    )
    return plan.num_shards - len(todo)


def _get_finished(plan: BuildPlan, number: int) -> FinishedShard:
    shard = plan.read_finished(number)
    assert shard is not None, f"shard {number} was not written"
    return shard


def _list_results(plan: BuildPlan, key: PseudonymKey, kept: list[int]) -> set[Path]:
    """The tars and overlays that belong to the finished set."""
    overlays: set[Path] = set()
    if plan.slides is not None:
        tasks = make_slide_tasks(plan.card, plan.records, plan.out, key, plan.hash)
        overlays = {task.overlay_path for task in tasks}
    return {_get_finished(plan, number).tar_path for number in kept} | overlays


def _find_bad_slides(plan: BuildPlan, key: PseudonymKey) -> bool:
    """Enter damage that only reading all tiles showed into the slides' plans; whether one must go as a whole."""
    if plan.slides is None:
        return False
    lost: dict[int, list[tuple[int, int]]] = {}
    for number in range(plan.num_shards):
        for place, _, reason in _get_finished(plan, number).rejected:
            if reason == "unreadable_region":
                unit = plan.order[plan.starts[number] + place]
                tile = (int(plan.slides.x0[unit]), int(plan.slides.y0[unit]))
                lost.setdefault(int(plan.record[unit]), []).append(tile)
    if not lost:
        return False
    tasks = make_slide_tasks(plan.card, plan.records, plan.out, key, plan.hash)
    errors = [add_unreadable(task, lost[number]) for number, task in enumerate(tasks) if number in lost]
    return any(error is not None for error in errors)


# ------------------------------------------------------------------------------------------------ the end


@dataclass
class _Counts:
    """What the finished shards add up to."""

    num_rows: list[int] = field(default_factory=list)  # of each shard as planned
    rejected: Counter[str] = field(default_factory=Counter)  # by reason; files and regions
    num_files_rejected: int = 0
    first_rejected: tuple[Rejection, ...] = ()
    text_scan: Counter[str] = field(default_factory=Counter)
    modalities: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)


def _count_all(plan: BuildPlan) -> _Counts:
    """Count what the shards say of themselves; their rows are not read."""
    counts = _Counts(text_scan=Counter(plan.text_scan))
    for rejection in _iterate_rejections(plan):
        counts.rejected[rejection.reason] += rejection.num
        counts.num_files_rejected += rejection.reason != "unreadable_region"
    for number in range(plan.num_shards):
        shard = _get_finished(plan, number)
        counts.num_rows.append(shard.num_rows)
        counts.text_scan.update(shard.text_scan)
    counts.first_rejected = tuple(islice(_iterate_rejections(plan), MAX_REPORTED))
    return counts


def _iterate_rejections(plan: BuildPlan) -> Iterator[Rejection]:
    """What was left out, slides first, then shard by shard."""
    yield from plan.rejected
    for number in range(plan.num_shards):
        for place, key, reason in _get_finished(plan, number).rejected:
            yield Rejection(key, plan.find_record(number, place).path, reason)


def _check_rejected(plan: BuildPlan, counts: _Counts) -> None:
    """Fail the build if too much was left out, or everything: one bad file is to be expected, many are a mistake."""
    num_files, num_lost = len(plan.records), counts.rejected["unreadable_region"]
    shares = [(counts.num_files_rejected / num_files, f"{counts.num_files_rejected} of {num_files} files")]
    if plan.slides is not None and (num_regions := plan.num_units + plan.num_unmasked):
        shares.append((num_lost / num_regions, f"{num_lost} of {num_regions} slide regions"))
    share, counted = max(shares)
    if share <= plan.options.max_rejected_share and share < 1:
        return
    reasons = ", ".join(f"{reason} {num}" for reason, num in sorted(counts.rejected.items()))
    first = counts.first_rejected[0]
    raise UserError(
        f"card {plan.card.name}: {counted} were rejected ({reasons}), more than max_rejected_share "
        f"({plan.options.max_rejected_share:g}); the first: {first.detail or f'{first.path}: {first.reason}'}; "
        "repair or remove them, or, if this is what the archive is like, raise max_rejected_share"
    )


def _write_samples(plan: BuildPlan, kept: list[int], counts: _Counts) -> None:
    """Write the rows of all shards, one shard at a time in memory, and count by modality and label on the way."""
    path = plan.out / SAMPLES_FILE
    with open_atomic(path) as file, pq.ParquetWriter(file, SAMPLES_SCHEMA, compression="zstd") as writer:
        for number in kept:
            rows = _get_finished(plan, number).read_rows()
            writer.write_table(rows)
            for pair in pc.value_counts(rows["modality"]).to_pylist():
                counts.modalities[pair["values"]] += pair["counts"]
            for name, value in chain.from_iterable(rows["labels"].to_pylist()):
                counts.labels.setdefault(name, Counter())[value] += 1


def _write_quarantine(plan: BuildPlan) -> None:
    """Write what was left out and why, by hashed key: the names of the files stay with the person who builds."""
    with open_atomic(plan.out / QUARANTINE_FILE) as file:
        writer = csv.writer(codecs.getwriter("utf-8")(file), lineterminator="\n")
        writer.writerow(("key", "reason", "num"))
        writer.writerows((one.key, one.reason, one.num) for one in _iterate_rejections(plan))


def _make_index(plan: BuildPlan, key: PseudonymKey, kept: list[int], counts: _Counts) -> dict[str, Any]:
    shards = [_get_finished(plan, number) for number in kept]
    return {
        "schema_version": SCHEMA_VERSION,
        "code_version": panfm.__version__,
        "source": plan.card.name,
        "card": plan.scanner.clean_card(plan.card),
        "options": get_plan_options(plan.options),
        "order": plan.options.order,
        "use": plan.options.use,
        "label_version": plan.records.label_version,
        "identifiers": {"kind": key.kind, "key_fingerprint": key.fingerprint},
        "plan_hash": plan.hash,
        "num_samples": sum(counts.num_rows),
        "num_rejected": dict(sorted(counts.rejected.items())),
        "num_modalities": dict(sorted(counts.modalities.items())),
        "num_labels": {name: dict(sorted(values.items())) for name, values in sorted(counts.labels.items())},
        "text_scan": dict(sorted(counts.text_scan.items())),
        "samples_sha256": compute_file_sha256(plan.out / SAMPLES_FILE),
        "shards": [
            {
                "name": shard.tar_path.name,
                "num_bytes": shard.num_bytes,
                "num_samples": shard.num_rows,
                "sha256": shard.sha256,
            }
            for shard in shards
        ],
    }


def _remove_torn_files(out: Path) -> None:
    """Take away what a killed build, or a worker that its cluster lost, was writing: it holds images."""
    for folder in (out, out / BUILD_FOLDER, out / OVERLAY_FOLDER):
        for path in folder.glob("*.tmp-*"):
            path.unlink()


def _remove_build_folder(out: Path) -> None:
    folder = out / BUILD_FOLDER
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
