"""Contamination: which test images pretraining may have seen, as themselves, as copies, or as the same patient.

    pretraining sets x test images of every task --find--> Findings --> OUT/{audit.parquet, audit.csv, index.html,
                                                                            duplicates.csv, audit.json last}

Four methods. sha256: the same bytes, stored or original. phash: near duplicates by hash, verified on pixels
(`shards.duplicates`). embedding (with an encoder): images whose features are nearer than those of known different
groups, verified on pixels too; it finds larger crops. same_group: another image of a patient, lesion or slide that is
tested, by the hashed ids of one namespace; no copy, but a leak. `contamination_list` reads what is written here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from panfm import __version__
from panfm.errors import UserError
from panfm.evaluation.contamination_find import find_same_groups, keep_first_method
from panfm.evaluation.contamination_list import AUDIT_FILE, AUDIT_SCHEMA, AUDIT_VERSION, MANIFEST_FILE, METHODS
from panfm.evaluation.contamination_report import InsideReport, ShownPair, render_csv, render_inside_csv, render_page
from panfm.evaluation.splits import Split, compute_excluded, load_split
from panfm.evaluation.task_rows import can_run
from panfm.evaluation.tasks import TaskCard, list_tasks, load_task
from panfm.files import compute_file_sha256, open_atomic, write_json, write_text
from panfm.shards.duplicates import (
    ImageList,
    Pairs,
    find_copies,
    find_exact,
    group_pairs,
    list_images,
)
from panfm.shards.hash_search import MAX_DISTANCE
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.pixel_match import MIN_SCORE
from panfm.shards.quality import PHASH_VERSION

INDEX_FILE, CSV_FILE, DUPLICATES_FILE = "index.html", "audit.csv", "duplicates.csv"


@dataclass(frozen=True)
class AuditSettings:
    """What is looked for. The defaults are measured in docs/audit.md."""

    distance: int = MAX_DISTANCE  # bits of 256: hashes farther apart are not looked at
    min_score: float = MIN_SCORE  # correlation of the patterns from which a pair is a copy
    encoder: str | None = None  # address; None leaves the method embedding out
    cosine: float | None = None  # None: from the pairs of known different groups among the test images
    inside: bool = True  # duplicates inside the pretraining sets, too
    num_shown: int = 100  # pairs of each method on the page
    device: str = "cpu"
    cache_dir: Path = Path("cache/features")


@dataclass(frozen=True)
class TestImages:
    """The test images of a task: which of the evaluation images they are, as numbers in their list."""

    task: str
    version: int
    source: str
    split_hash: str
    data_hash: str  # of the task's images, as results name it
    images: NDArray[np.int64]


@dataclass(frozen=True)
class AuditSummary:
    """What an audit found. counts: task -> method -> number of pairs, test_images, pretrain_images."""

    out: Path
    counts: dict[str, dict[str, dict[str, int]]]
    inside: InsideReport | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for the terminal."""
        lines = list(self.notes)
        for task, methods in self.counts.items():
            found = ", ".join(
                f"{method} {count['test_images']:,} test images ({count['pretrain_images']:,} in pretraining)"
                for method, count in methods.items()
                if count["pairs"]
            )
            lines.append(f"{task}: {found or 'nothing found'}")
        if self.inside is not None:
            lines.append(
                f"inside the pretraining sets: {self.inside.num_images:,} images in {self.inside.num_groups:,} groups "
                f"of duplicates"
            )
        return "\n".join([*lines, f"{self.out / INDEX_FILE}: open it in a browser; it shows images of patients"])


def run_audit(
    pretrain: Sequence[str | Path],
    evaluation: Sequence[str | Path],
    *,
    out: Path,
    tasks: Literal["all"] | Sequence[str] = "all",
    task_dir: str | Path | None = None,
    settings: AuditSettings | None = None,
) -> AuditSummary:
    """Compare pretraining sets with the test images of the tasks on the evaluation sets, and with themselves.

    tasks: "all" known ones whose source is among the evaluation sets, or names. Without evaluation sets only the
    pretraining sets are compared. Equal inputs and settings give equal bytes; the manifest audit.json is written last.

    Raises UserError: two folders of one source, no task on the evaluation sets, hashes of an older version, an image
    that does not decode, too few known different pairs for a cosine threshold.
    """
    settings = settings or AuditSettings()
    sets, tested = _open_sets(pretrain, "--pretrain"), _open_sets(evaluation, "--evaluation")
    if not sets:
        raise UserError("--pretrain is empty; an audit needs at least one shard set that is trained on")
    if not settings.inside and not tested:
        raise UserError("nothing to compare: give --evaluation DIR, or leave --no-inside out")
    images, test_images, test_tasks = _find_test_images(tested, tasks, task_dir)
    known = list_images(sets)
    encoder = None
    if settings.encoder is not None:
        from panfm.encoder.load import load_encoder  # torch takes seconds; without an encoder nothing needs it

        encoder = load_encoder(settings.encoder, device=settings.device)

    notes: list[str] = []
    findings: dict[str, Pairs] = {}
    cosine: float | None = None
    if tested:
        findings["sha256"] = find_exact(known, images)
        findings["phash"], num_candidates = find_copies(
            known, images, max_distance=settings.distance, min_score=settings.min_score
        )
        notes.append(f"{num_candidates:,} pairs with near hashes, {len(findings['phash']):,} alike in their pixels")
        if encoder is not None:
            from panfm.evaluation.contamination_embedding import find_by_embedding

            findings["embedding"], cosine = find_by_embedding(
                known,
                images,
                encoder,
                cosine=settings.cosine,
                min_score=settings.min_score,
                cache_dir=settings.cache_dir,
            )
        findings["same_group"] = find_same_groups(known, images)
        findings = keep_first_method(findings)

    table = _make_table(findings, known, images, test_images, _find_test_groups(sets, test_tasks, task_dir))
    inside, inside_pairs = _compare_inside(known, settings) if settings.inside else (None, None)
    counts = _count(table, [entry.task for entry in test_images])
    shown = _choose_shown(findings, known, images, settings.num_shown)
    if inside_pairs is not None:
        shown |= _choose_shown({"inside pretraining": inside_pairs}, known, known, settings.num_shown)
    manifest = {
        "audit_version": AUDIT_VERSION,
        "panfm_version": __version__,
        "phash_version": PHASH_VERSION,
        "settings": {
            "distance": settings.distance,
            "min_score": settings.min_score,
            "encoder": settings.encoder,
            "encoder_hash": encoder.hash if encoder else None,
            "cosine": cosine,
            "inside": settings.inside,
        },
        "pretrain": [_describe_set(shard_set) for shard_set in sets],
        "evaluation": [_describe_set(shard_set) for shard_set in tested],
        "tasks": [
            {
                "task": entry.task,
                "version": entry.version,
                "source": entry.source,
                "split_hash": entry.split_hash,
                "data_hash": entry.data_hash,
                "num_test": len(entry.images),
            }
            for entry in test_images
        ],
        "counts": counts,
        "inside": None if inside is None else inside.to_plain(),
        "notes": notes,
    }
    (out / MANIFEST_FILE).unlink(missing_ok=True)  # an older audit must not vouch for the files of this one
    with open_atomic(out / AUDIT_FILE) as file:
        pq.write_table(table, file, compression="zstd")
    write_text(out / CSV_FILE, render_csv(table))
    if inside is not None:
        write_text(out / DUPLICATES_FILE, render_inside_csv(inside, known))
    write_text(out / INDEX_FILE, render_page(manifest, shown))
    write_json(out / MANIFEST_FILE, {**manifest, "audit_sha256": compute_file_sha256(out / AUDIT_FILE)})
    return AuditSummary(out, counts, inside, tuple(notes))


def _open_sets(paths: Sequence[str | Path], option: str) -> list[ShardSet]:
    sets = [open_shard_set(path) for path in paths]
    for source, count in Counter(shard_set.source for shard_set in sets).items():
        if count > 1:
            raise UserError(f"{option}: {count} folders hold source {source}; each source may be named once")
    return sets


def _find_test_images(
    sets: Sequence[ShardSet], tasks: Literal["all"] | Sequence[str], task_dir: str | Path | None
) -> tuple[ImageList, list[TestImages], tuple[str, ...]]:
    """The images of the sets that any task tests on, which task tests on which, and the names of all tasks wanted."""
    names = tuple(list_tasks(task_dir) if tasks == "all" else tasks)
    by_source = {shard_set.source: (number, shard_set) for number, shard_set in enumerate(sets)}
    found: list[tuple[TaskCard, int, Split, NDArray[np.int64]]] = []
    for name in names:
        card = load_task(name, task_dir)
        if card.source not in by_source:
            if tasks != "all" and sets:
                raise UserError(
                    f"task {card.name}: is on source {card.source}, and no --evaluation set holds it "
                    f"(given: {', '.join(by_source)}); add its shards, or leave the task out"
                )
            continue
        number, shard_set = by_source[card.source]
        if tasks == "all" and not can_run(card, shard_set):
            continue  # of these shards nothing can be measured by it: they lack its label, or its masks
        split = load_split(card, shard_set, task_dir)
        found.append((card, number, split, np.sort(split.rows[split.find("test")])))
    if sets and not found:
        raise UserError(
            f"--evaluation: no known task is on the sources {', '.join(by_source)}; `panfm evaluate list` shows the "
            f"tasks, --task-dir adds your own"
        )
    nothing = np.empty(0, dtype=np.int64)
    rows = [
        np.unique(np.concatenate([nothing, *(own for _, place, _, own in found if place == number)]))
        for number in range(len(sets))
    ]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in rows])]).astype(np.int64)
    test_images = [
        TestImages(
            task=card.name,
            version=card.version,
            source=card.source,
            split_hash=split.hash,
            data_hash=split.compute_data_hash(sets[number]),
            images=starts[number] + np.searchsorted(rows[number], own),
        )
        for card, number, split, own in found
    ]
    return list_images(sets, rows), test_images, names


def _find_test_groups(
    sets: Sequence[ShardSet], tasks: Sequence[str], task_dir: str | Path | None
) -> dict[str, dict[str, list[str]]]:
    """source -> group -> the tasks that test on it: what `data.exclude.tasks` keeps out of pretraining by itself."""
    found: dict[str, dict[str, list[str]]] = {shard_set.source: {} for shard_set in sets}
    for task in tasks:
        try:
            excluded = compute_excluded((task,), sets, task_dir)
        except UserError:  # a run on these sets cannot keep out this task's groups either: nothing is void by it
            continue
        for source, groups in excluded.groups.items():
            for group in groups:
                found[source].setdefault(group, []).append(task)
    return found


def _make_table(
    findings: dict[str, Pairs],
    known: ImageList,
    images: ImageList,
    test_images: Sequence[TestImages],
    test_groups: dict[str, dict[str, list[str]]],
) -> pa.Table:
    """One row a pair, method and task (AUDIT_SCHEMA)."""
    parts = [AUDIT_SCHEMA.empty_table()]
    columns = (
        {name: _get_names(side) for name, side in (("pretrain", known), ("evaluation", images))} if findings else {}
    )
    for method, pairs in findings.items():
        groups = known.get_column("group_id").take(pa.array(pairs.match)).to_pylist()
        sources = columns["pretrain"][0].take(pa.array(pairs.match)).to_pylist()
        tested_by = pa.array(
            [test_groups[source].get(group, []) for source, group in zip(sources, groups, strict=True)],
            pa.list_(pa.string()),
        )
        for entry in test_images:
            chosen = pa.array(np.flatnonzero(np.isin(pairs.query, entry.images)))
            query, match = pa.array(pairs.query).take(chosen), pa.array(pairs.match).take(chosen)
            count = len(chosen)
            parts.append(
                pa.table(
                    {
                        "pretrain_source": columns["pretrain"][0].take(match),
                        "pretrain_key": columns["pretrain"][1].take(match),
                        "evaluation_source": columns["evaluation"][0].take(query),
                        "evaluation_key": columns["evaluation"][1].take(query),
                        "method": pa.array([method] * count, pa.string()),
                        "score": pa.array(pairs.score).take(chosen),
                        "task": pa.array([entry.task] * count, pa.string()),
                        "distance": pa.array(pairs.distance, mask=pairs.distance < 0).take(chosen),
                        "pretrain_test_tasks": tested_by.take(chosen),
                    },
                    schema=AUDIT_SCHEMA,
                )
            )
    table = pa.concat_tables(parts)
    names = ["task", "method", "evaluation_source", "evaluation_key", "pretrain_source", "pretrain_key"]
    return table.sort_by([(name, "ascending") for name in names]).combine_chunks()


def _get_names(side: ImageList) -> tuple[pa.Array, pa.Array]:
    return pa.array(side.get_sources().tolist(), pa.string()), side.get_column("key")


def _count(table: pa.Table, tasks: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    rows = table.select(["task", "method", "pretrain_source", "pretrain_key", "evaluation_key"]).to_pylist()
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for task in tasks:
        counts[task] = {}
        own = [row for row in rows if row["task"] == task]
        for method in (*METHODS, "any"):
            chosen = [row for row in own if method in ("any", row["method"])]
            counts[task][method] = {
                "pairs": len(chosen),
                "test_images": len({row["evaluation_key"] for row in chosen}),
                "pretrain_images": len({(row["pretrain_source"], row["pretrain_key"]) for row in chosen}),
            }
    return counts


def _compare_inside(known: ImageList, settings: AuditSettings) -> tuple[InsideReport, Pairs]:
    """Duplicates inside and across the pretraining sets: groups of images that are one."""
    exact = find_exact(known)
    copies, _ = find_copies(known, max_distance=settings.distance, min_score=settings.min_score)
    found = keep_first_method({"sha256": exact, "phash": copies})
    query = np.concatenate([found["sha256"].query, found["phash"].query])
    match = np.concatenate([found["sha256"].match, found["phash"].match])
    groups = group_pairs(query, match, len(known))
    sources = known.get_sources()
    between: Counter[tuple[str, str, str]] = Counter()
    for method, pairs in found.items():
        for first, second in zip(sources[pairs.query].tolist(), sources[pairs.match].tolist(), strict=True):
            low, high = sorted((first, second))
            between[low, high, method] += 1
    without_hash = known.get_column("phash").null_count
    return (
        InsideReport(
            groups=groups,
            num_groups=int(groups.max(initial=-1)) + 1,
            num_images=int(np.count_nonzero(groups >= 0)),
            num_without_hash=without_hash,
            num_pairs=tuple((*key, count) for key, count in sorted(between.items())),
        ),
        found["phash"],
    )


def _choose_shown(
    findings: dict[str, Pairs], known: ImageList, images: ImageList, count: int
) -> dict[str, list[ShownPair]]:
    """The pairs of each method with the highest scores; an image beside itself shows nothing."""
    shown: dict[str, list[ShownPair]] = {}
    for method, pairs in findings.items():
        own, other = (_get_names(side) for side in (images, known))
        order = np.lexsort((pairs.match, pairs.query, -pairs.score))
        chosen: list[ShownPair] = []
        for place in order.tolist():
            if len(chosen) == count:
                break
            query, match = int(pairs.query[place]), int(pairs.match[place])
            names = [
                (side[0][number].as_py(), side[1][number].as_py()) for side, number in ((own, query), (other, match))
            ]
            if names[0] == names[1]:
                continue
            chosen.append(
                ShownPair(
                    first=names[0],
                    second=names[1],
                    score=float(pairs.score[place]),
                    distance=int(pairs.distance[place]),
                    orientation=int(pairs.orientation[place]),
                    first_image=images.sets[images.member[query]].read_image(int(images.row[query])),
                    second_image=known.sets[known.member[match]].read_image(int(known.row[match])),
                )
            )
        if chosen:
            shown[method] = chosen
    return shown


def _describe_set(shard_set: ShardSet) -> dict[str, Any]:
    return {
        "source": shard_set.source,
        "data_hash": shard_set.compute_data_hash(),
        "num_images": shard_set.num_samples,
        "num_without_hash": shard_set.table["phash"].null_count,
    }
