"""Before a long build: does the archive lie there as the card says? The table is read as the build reads it.

    SourceCard + ROOT -> read_records -> files looked for by name, counts compared, a few images opened -> Findings

No image is opened but a seeded sample, and no whole slide is read: of slides only the header, for its resolution.
Findings name files and count values of the archive: they stay where the archive is.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from panfm.progress import progress_bar, track
from panfm.shards.cards import SourceCard
from panfm.shards.members import Stored, read_photograph
from panfm.shards.packing import BuildOptions
from panfm.shards.raw_files import IMAGE_SUFFIXES, FileFinder, is_image, list_members
from panfm.shards.slide_plans import get_settings
from panfm.shards.sources import RecordTable, compare_with_expected, compute_code_report, read_records
from panfm.shards.wsi import plan_tiles
from panfm.shards.wsi_reader import SlideError

NUM_NAMED = 5  # files of one kind that are named; the others are counted
NUM_VALUES = 12  # values of one field that are shown
BYTES_BESIDE = 1500  # of a sample in the tar besides image and mask: its JSON and the headers
PLANNED_SLIDES = 3  # slides of the sample whose tissue is looked for: seconds each
COUNTED = ("sex", "anatomic_site", "institution", "device", "confirmed_by", "official_split", "phototype_source")
KNOWN = ("age", "phototype_low", "follow_up_days", "event", "mpp")


@dataclass(frozen=True)
class MissingFiles:
    """Files that rows name and that are not there, of one folder and ending."""

    kind: str  # image or mask
    pattern: str  # folder/*.jpg, relative to the root
    num: int
    named: tuple[str, ...]


@dataclass(frozen=True)
class Sampled:
    """What opening a few images told."""

    num: int
    rejected: dict[str, int]  # reason -> number
    named: tuple[str, ...]  # some that were rejected, with the reason
    seconds: float | None  # an image and core; None: nothing was opened
    num_bytes: float | None  # an image as it would be stored


@dataclass(frozen=True)
class Findings:
    """What a check found; `is_as_expected` is the answer, the rest is for a person to read."""

    source: str
    title: str
    licence: str
    root: Path
    num_images: int
    num_patients: int
    num_without_patient: int
    num_lesions: int
    num_without_lesion: int
    largest_group: int  # images of one patient, else lesion
    num_masks: int
    num_captions: int
    differences: tuple[str, ...]  # from the counts that the card expects
    expects_counts: bool
    missing: tuple[MissingFiles, ...]
    num_unnamed: int  # image files below the root that no row names
    unnamed: tuple[str, ...]
    labels: dict[str, dict[str, int]]
    unlabelled: dict[str, int]  # label -> images without it
    uncoded: dict[str, dict[str, int]]  # label#system -> values without a code
    values: dict[str, dict[str, int]]
    num_known: dict[str, int]  # of fields whose values are too many to list
    slide_faults: tuple[str, ...]
    num_slide_faults: int
    sampled: Sampled
    max_rejected_share: float
    permitted_uses: tuple[str, ...]
    consent_scope: str | None
    needs_key: bool
    open_questions: tuple[str, ...]  # fields of the card that still say TODO

    @property
    def is_as_expected(self) -> bool:
        """No file is missing, no count differs, no TODO is left, and a build would not stop."""
        share = sum(self.sampled.rejected.values()) / max(self.sampled.num, 1)
        open_ends = self.missing or self.differences or self.num_slide_faults or self.open_questions
        return not (open_ends or share > self.max_rejected_share)

    def to_plain(self) -> dict[str, Any]:
        """Everything as plain values, for a JSON file."""
        return asdict(self) | {"root": str(self.root), "is_as_expected": self.is_as_expected}

    def __str__(self) -> str:
        """A page for the terminal."""
        lines = [f"{self.source}: {self.title}", f"{self.root}: {self.num_images:,} images", ""]
        lines += _describe_missing(self)
        lines += _describe_counts(self)
        lines += ["", "labels"]
        for label, counts in self.labels.items():
            lines.append(f"  {label}: {_join(counts)}; without a value {self.unlabelled[label]:,}")
        for name, counts in self.uncoded.items():
            lines.append(f"  {name}: no code for {_join(counts)}" if counts else f"  {name}: every value has a code")
        lines += [] if self.labels else ["  none: the card names no label"]
        lines += ["", "fields", *(f"  {name}: {_join(counts)}" for name, counts in self.values.items())]
        lines += [f"  {name}: known of {num:,}" for name, num in self.num_known.items()]
        lines += ["", *_describe_sample(self), *_describe_terms(self), ""]
        lines.append("as the card says" if self.is_as_expected else "NOT as the card says: see what is marked with !")
        return "\n".join(lines)


def check_archive(card: SourceCard, root: Path, *, num_sampled: int = 64, seed: int = 0) -> Findings:
    """Compare the archive at `root` with its card, in minutes where a build takes hours.

    num_sampled: images opened, a seeded choice. Raises UserError for what stops a build at once: a missing table or
    column, a value outside a closed map, two rows with one key (see `sources.read_records`).
    """
    root = Path(root)
    records = read_records(card, root)
    table = records.table
    options = BuildOptions()
    labels, unlabelled = _count_labels(card, records)
    values, num_known = _count_fields(records)
    named, num_unnamed = _find_unnamed(root, table)
    slide_faults = _check_slides(card, records)
    owners = pc.coalesce(table["patient_id"], table["lesion_id"], table["raw_id"])
    return Findings(
        source=card.name,
        title=card.title,
        licence=card.licence,
        root=root,
        num_images=len(records),
        num_patients=len(table["patient_id"].drop_null().unique()),
        num_without_patient=table["patient_id"].null_count,
        num_lesions=len(table["lesion_id"].drop_null().unique()),
        num_without_lesion=table["lesion_id"].null_count,
        largest_group=pc.max(pc.struct_field(pc.value_counts(owners), "counts")).as_py() or 0,
        num_masks=len(records) - table["mask_path"].null_count,
        num_captions=len(records) - table["caption"].null_count,
        differences=compare_with_expected(card, records),
        expects_counts=card.expected != type(card.expected)(),
        missing=_find_missing(root, table),
        num_unnamed=num_unnamed,
        unnamed=named,
        labels=labels,
        unlabelled=unlabelled,
        uncoded={
            name: {value: num for value, (num, code) in mapped.items() if code is None}
            for name, mapped in compute_code_report(card, records).items()
        },
        values=values,
        num_known=num_known,
        slide_faults=slide_faults[:NUM_NAMED],
        num_slide_faults=len(slide_faults),
        sampled=_open_sample(card, records, options, num_sampled, seed),
        max_rejected_share=options.max_rejected_share,
        permitted_uses=tuple(card.permitted_uses),
        consent_scope=card.consent_scope,
        needs_key=card.identifiers == "private",
        open_questions=card.open_questions,
    )


# ------------------------------------------------------------------------------------------------ files


def _find_missing(root: Path, table: pa.Table) -> tuple[MissingFiles, ...]:
    """Look for every named file; each folder is listed once."""
    finder = FileFinder(root)
    counts: Counter[tuple[str, str]] = Counter()
    named: dict[tuple[str, str], list[str]] = {}
    columns = table.select(["path", "member", "mask_path", "mask_member"])
    with progress_bar("looking for files", table.num_rows, unit="rows") as advance:
        for batch in columns.to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                for kind, path, member in (
                    ("image", row["path"], row["member"]),
                    ("mask", row["mask_path"], row["mask_member"]),
                ):
                    if path is None or finder.has(path, member):
                        continue
                    text = path if member is None else f"{path}::{member}"
                    file = PurePosixPath(text)
                    place = (kind, (file.parent / f"*{file.suffix}").as_posix())
                    counts[place] += 1
                    if counts[place] <= NUM_NAMED:
                        named.setdefault(place, []).append(text)
            advance(batch.num_rows)
    return tuple(
        MissingFiles(kind, pattern, num, tuple(named[kind, pattern]))
        for (kind, pattern), num in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def _find_unnamed(root: Path, table: pa.Table) -> tuple[tuple[str, ...], int]:
    """Image files below the root, and members of the archive files in use, that no row names: some, and how many."""
    containers = table.filter(pc.is_valid(table["member"]))["path"].unique().to_pylist()
    found = [path for path in _walk_images(root) if path not in containers]
    found += [
        f"{path}::{member}"
        for path in containers
        if (root / path).is_file()
        for member in sorted(list_members(root / path))
        if Path(path).suffix != ".zip" or PurePosixPath(member).suffix.lower() in IMAGE_SUFFIXES
    ]
    places = []
    for path, member in (("path", "member"), ("mask_path", "mask_member")):
        joined = pc.binary_join_element_wise(table[path], table[member], "::", null_handling="emit_null")
        places.append(pc.coalesce(joined, table[path]).drop_null().unique())
    named = pa.chunked_array(places, pa.string()).unique()
    files = pa.array(found, pa.string())
    folders = pa.array([path.rpartition("/")[0] for path in found], pa.string())  # a slide may be a folder of files
    known = pc.or_(pc.is_in(files, value_set=named), pc.is_in(folders, value_set=named))
    unnamed = files.filter(pc.invert(known))
    return tuple(unnamed[:NUM_NAMED].to_pylist()), len(unnamed)


def _walk_images(root: Path) -> Iterable[str]:
    """Relative paths of the image files below the root, sorted within each folder; hidden ones are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(folder).relative_to(root).as_posix()
        for name in sorted(names):
            if not name.startswith(".") and is_image(Path(folder, name)):
                yield name if relative == "." else f"{relative}/{name}"


def _check_slides(card: SourceCard, records: RecordTable) -> tuple[str, ...]:
    """Slides that cannot be opened or whose resolution is not to be had: one line each."""
    if card.slides is None:
        return ()
    from panfm.shards.wsi import read_mpp  # opens no level
    from panfm.shards.wsi_reader import find_slide_file, open_slide

    faults = []
    for record in track(records, "resolution of slides", len(records), unit="slides"):
        try:
            read_mpp(open_slide(find_slide_file(record.path)), get_settings(card, record))
        except SlideError as error:
            if record.path.exists():  # else it is among the missing files
                faults.append(str(error))
    return tuple(faults)


# ------------------------------------------------------------------------------------------------ values


def _count_labels(card: SourceCard, records: RecordTable) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    found = records.count_labels()
    counts = {name: dict(found.get(name, Counter()).most_common()) for name in card.labels}
    return counts, {name: len(records) - sum(values.values()) for name, values in counts.items()}


def _count_fields(records: RecordTable) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Counts by value of the fields with few values, and how often the others are known."""
    table = records.table
    counts: dict[str, Counter[str]] = {"modality": Counter()}
    for pair in pc.value_counts(table["modality"].cast(pa.string())).to_pylist():
        counts["modality"][pair["values"]] += pair["counts"]
    known: Counter[str] = Counter()
    for pair in pc.value_counts(table["metadata"].cast(pa.string())).to_pylist():
        for name, value in json.loads(pair["values"]).items():
            if name in COUNTED:
                counts.setdefault(name, Counter())[str(value)] += pair["counts"]
            elif name in KNOWN:
                known[name] += pair["counts"]
    for name, column in (("visit_day", "visit_day"), ("mask", "mask_path"), ("caption", "caption")):
        if num := len(records) - table[column].null_count:
            known[name] = num
    for counter in counts.values():
        if (num := len(records) - counter.total()) > 0:
            counter["unknown"] += num
    return {name: dict(counter.most_common()) for name, counter in counts.items()}, dict(known)


# ------------------------------------------------------------------------------------------------ a sample


def _open_sample(card: SourceCard, records: RecordTable, options: BuildOptions, num: int, seed: int) -> Sampled:
    """Open a seeded choice of images as the build will, and time it; of slides, find the tissue of a few."""
    num = min(num if card.slides is None else min(num, PLANNED_SLIDES), len(records))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(records))[:num])
    rejected: Counter[str] = Counter()
    named: list[str] = []
    num_bytes = []
    started = time.perf_counter()
    for record in track(records.take(chosen), f"sample of {card.name}", num, unit="files"):
        reason: str | None = None
        if card.slides is not None:
            try:
                plan_tiles(record.path, card.slides)
            except SlideError as error:
                reason = error.reason
        else:
            answer = read_photograph(record, min_side=options.min_side, short_side=options.short_side)
            if isinstance(answer, Stored):
                num_bytes.append(len(answer.image) + len(answer.mask or b"") + BYTES_BESIDE)
            else:
                reason = answer
        if reason is not None:
            rejected[reason] += 1
            named.append(f"{record.path.relative_to(records.root).as_posix()}: {reason}")
    seconds = (time.perf_counter() - started) / num if num and card.slides is None else None
    return Sampled(
        num=num,
        rejected=dict(sorted(rejected.items())),
        named=tuple(named[:NUM_NAMED]),
        seconds=seconds,
        num_bytes=float(np.mean(num_bytes)) if num_bytes else None,
    )


# ------------------------------------------------------------------------------------------------ the page


def _describe_missing(found: Findings) -> list[str]:
    lines = ["files"]
    for missing in found.missing:
        more = f" and {missing.num - len(missing.named):,} more" if missing.num > len(missing.named) else ""
        lines.append(f"! {missing.num:,} {missing.kind}s missing, {missing.pattern}: {', '.join(missing.named)}{more}")
    if not found.missing:
        lines.append("  every file that a row names is there")
    if found.num_unnamed:
        more = f" and {found.num_unnamed - len(found.unnamed):,} more" if found.num_unnamed > len(found.unnamed) else ""
        lines.append(f"  {found.num_unnamed:,} image files that no row names: {', '.join(found.unnamed)}{more}")
    lines += [f"! {fault}" for fault in found.slide_faults]
    if found.num_slide_faults > len(found.slide_faults):
        lines.append(f"! {found.num_slide_faults - len(found.slide_faults):,} more slides of that kind")
    return lines


def _describe_counts(found: Findings) -> list[str]:
    lines = ["", "counts", *(f"! {difference}" for difference in found.differences)]
    if not found.differences:
        lines.append("  as the card expects" if found.expects_counts else "  the card expects none to compare with")
    lines.append(
        f"  {found.num_patients:,} patients ({found.num_without_patient:,} images without), {found.num_lesions:,} "
        f"lesions ({found.num_without_lesion:,} images without); the largest group has {found.largest_group:,} images"
    )
    if found.num_without_patient == found.num_images:
        lines.append("  no image names its patient: splits can only keep lesions or single images apart")
    return lines


def _describe_sample(found: Findings) -> list[str]:
    sampled = found.sampled
    if not sampled.num:
        return []
    num_rejected = sum(sampled.rejected.values())
    mark = "!" if num_rejected > found.max_rejected_share * sampled.num else " "
    lines = ["sample", f"{mark} {num_rejected} of {sampled.num} files opened would be rejected"]
    lines[-1] += f": {'; '.join(sampled.named)}" if sampled.named else ""
    if sampled.seconds is not None and sampled.num_bytes is not None:
        lines.append(
            f"  a build takes about {_show_time(sampled.seconds * found.num_images)} on one core like this one and "
            f"{_show_size(sampled.num_bytes * found.num_images)}"
        )
    return lines


def _describe_terms(found: Findings) -> list[str]:
    lines = ["", "terms", f"  licence {found.licence}; permitted uses: {', '.join(found.permitted_uses)}"]
    if found.open_questions:
        lines.append(f"! the card still says TODO: {', '.join(found.open_questions)}")
    if found.consent_scope:
        lines.append(f"  consent: {found.consent_scope}")
    if found.needs_key:
        lines.append("  private identifiers: the build needs --key-file FILE (with --create-key the first time)")
    return lines


def _join(counts: Mapping[str, int]) -> str:
    shown = [f"{value} {num:,}" for value, num in list(counts.items())[:NUM_VALUES]]
    return ", ".join(shown) + (f" and {len(counts) - NUM_VALUES} other values" if len(counts) > NUM_VALUES else "")


def _show_time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _show_size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
