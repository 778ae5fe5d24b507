"""`panfm shards forget` across the rooms: who had used a patient is listed, caches are cleared, then the shards.

    shard sets + patient -> rows -> Traces (checkpoints, exports, results, predictions) -> report -> caches -> shards

In this order, because only the shards know which images were the patient's: whatever cuts this off before their turn,
the same command can be given again. Nothing here claims that weights forget.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from rich.table import Table

from panfm.encoder.export import find_ancestors
from panfm.encoder.facts import EncoderFacts, read_facts
from panfm.errors import UserError
from panfm.evaluation.results import read_result
from panfm.evaluation.splits import compute_excluded, load_split
from panfm.evaluation.tasks import load_task
from panfm.features import remove_cached
from panfm.files import write_text
from panfm.progress import print_output
from panfm.shards.forget import find_patient, finish_removal, read_former_hashes, remove_samples
from panfm.shards.index import ShardSet, compute_data_hash, open_shard_set

Used = Literal["trained on", "kept out", "cannot be told", "holds"]
WEIGHTS_REMAIN = (
    "Weights that were trained on the patient still are: removing images does not make a model forget. A person has to "
    "decide: train again without the patient, stop using them, or keep them on a legal ground that is written down."
)
PREDICTIONS_REMAIN = (
    "Results and predictions are left as they are: delete those that hold the patient's keys, or run the evaluation "
    "again, which makes results of other images anew under the same names."
)
NOT_REACHED = (
    "Not reached from here: the raw archive (a build from it brings the images back), backups, copies of the shards, "
    "those in object stores among them. Remove them there too; what machines keep of a URL (docs/storage.md) goes when "
    "they open it again."
)


@dataclass(frozen=True)
class Target:
    """A shard set, and the rows in it that must go."""

    shard_set: ShardSet
    rows: npt.NDArray[np.int64]
    keys: tuple[str, ...]
    data_hash: str
    former_hashes: tuple[str, ...]  # of the set before earlier removals: it held these rows then too


@dataclass(frozen=True)
class Trace:
    """Something that had used the patient, or may have. No id, no key."""

    kind: Literal["checkpoint", "export", "result", "predictions"]
    path: Path
    step: int | None
    used: Used
    num_images: int | None  # of the patient's, as far as it can be told
    detail: str


def forget_samples(
    folders: Sequence[Path],
    *,
    patient: str | None,
    keys: Sequence[str],
    key_file: Path | None,
    features: Sequence[Path],
    results: Sequence[Path],
    runs: Sequence[Path],
    exports: Sequence[Path],
    task_dir: Path | None,
    report: Path | None,
    finish: bool,
) -> None:
    """Do what `panfm shards forget` promises, and print it.

    Raises UserError, with nothing changed, for an unknown patient or key, a missing key file, a folder that is not
    there, and a set of which nothing would be left.
    """
    if sum((patient is not None, bool(keys), finish)) != 1:
        raise UserError("give one of --patient ID, --key KEY (repeat it for several) and --finish")
    for folder in folders:
        if finish_removal(folder):
            typer.echo(f"{folder}: completed a removal that had been cut off")
    if finish:
        return
    targets = _find_targets(folders, patient, keys, key_file)
    _check_folders([*features, *results, *runs, *exports])
    traces = [*_trace_encoders(targets, runs, exports, task_dir), *_trace_results(targets, results, task_dir)]
    if report is not None:
        _write_report(report, traces)
        typer.echo(f"{report}: {len(traces)} checkpoints, exports, results and predictions")
    if traces:
        print_output(_make_table(traces))

    num_busy = 0
    for cache_dir in features:
        for source in sorted({target.shard_set.source for target in targets}):
            removed, busy = remove_cached(cache_dir, source)
            typer.echo(f"{cache_dir}: {len(removed)} cached sets of features of {source} removed")
            for folder in busy:
                typer.echo(f"{folder}: is being computed by another process; stop it and remove this folder")
            num_busy += len(busy)
    reason = "consent withdrawn" if patient is not None else "removed by key"
    for target in targets:
        typer.echo(str(remove_samples(target.shard_set.folder, target.keys, reason)))
    if any(trace.kind in ("checkpoint", "export") and trace.used != "kept out" for trace in traces):
        typer.echo(WEIGHTS_REMAIN)
    if any(trace.kind in ("result", "predictions") for trace in traces):
        typer.echo(PREDICTIONS_REMAIN)
    typer.echo(NOT_REACHED)
    if num_busy:
        raise typer.Exit(1)


def _find_targets(
    folders: Sequence[Path], patient: str | None, keys: Sequence[str], key_file: Path | None
) -> list[Target]:
    """The rows to remove of every set that holds any; nowhere any, or everything, is an error."""
    targets: list[Target] = []
    known: set[str] = set()
    for folder in folders:
        shard_set = open_shard_set(folder)
        if patient is not None:
            rows = find_patient(shard_set, patient, key_file)
        else:
            found = pc.is_in(shard_set.table["key"], value_set=pa.array(list(keys), pa.string()))
            rows = np.flatnonzero(found.to_numpy()).astype(np.int64)
        if rows.size == shard_set.num_samples:
            raise UserError(
                f"{folder}: all {rows.size} samples of the set would go; delete the folder instead, nothing was removed"
            )
        if not rows.size:
            continue
        own = tuple(shard_set.table["key"].take(pa.array(rows)).to_pylist())
        known.update(own)
        targets.append(Target(shard_set, rows, own, shard_set.compute_data_hash(), read_former_hashes(folder)))
    where = ", ".join(map(str, folders))
    if missing := set(keys) - known:
        raise UserError(f"{where}: {len(missing)} of {len(set(keys))} keys are not there; nothing was removed")
    if not targets:
        raise UserError(
            f"{where}: no samples of this patient, nothing was removed; give the id as the table of the archive has it "
            "(where patient_aliases joins several ids, the one that they were joined to), and the set's own key file"
        )
    return targets


def _check_folders(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; nothing was removed")


# ------------------------------------------------------------------------------------------------ weights


def _trace_encoders(
    targets: Sequence[Target], runs: Sequence[Path], exports: Sequence[Path], task_dir: Path | None
) -> Iterator[Trace]:
    """Every checkpoint and export below the folders that was, or may have been, trained on the targets' sources."""

    @cache
    def find_excluded(tasks: tuple[str, ...]) -> dict[str, frozenset[str]] | None:
        """The test groups of the tasks by source; None where they can no longer be told."""
        try:
            return dict(compute_excluded(tasks, [target.shard_set for target in targets], task_dir).groups)
        except UserError:
            return None

    def judge(facts: EncoderFacts, seen: frozenset[str]) -> tuple[Used, int | None, str] | None:
        """Whether it was trained on the patient; None where it has nothing to do with the targets' sources."""
        answers: list[tuple[Used, int | None, str]] = []
        for target in targets:
            for source in facts.sources:
                if source.source != target.shard_set.source:
                    continue
                if source.data_hash not in (target.data_hash, *target.former_hashes):
                    answers.append(("cannot be told", None, f"trained on another build of {source.source}"))
                    continue
                excluded = find_excluded(facts.excluded_tasks)
                answers.append(_judge_rows(facts, target, source.num_excluded, excluded))
        for address in find_ancestors(facts):
            if address.scheme != "panfm" or address.target in seen:
                continue
            path = Path(address.target).expanduser() / "panfm.json"
            if not path.is_file():
                answers.append(("cannot be told", None, f"learned from {address.text}, which is not there"))
            elif answer := judge(read_facts(path), seen | {address.target}):
                answers.append((answer[0], answer[1], f"learned from {address.text}: {answer[2]}"))
        if not facts.sources:
            answers.append(("cannot be told", None, "its training data are not recorded"))
        order: list[Used] = ["trained on", "cannot be told", "kept out"]
        return min(answers, key=lambda answer: order.index(answer[0]), default=None)

    kinds: list[tuple[Literal["checkpoint", "export"], str, Sequence[Path]]] = [
        ("checkpoint", "encoder.json", runs),
        ("export", "panfm.json", exports),
    ]
    for kind, name, roots in kinds:
        for path in sorted({path for root in roots for path in root.rglob(name)}):
            try:
                facts = read_facts(path)
                answer = judge(facts, frozenset())
            except UserError as error:
                yield Trace(kind, path.parent, None, "cannot be told", None, str(error))
                continue
            if answer is not None:
                yield Trace(kind, path.parent, facts.step, *answer)


def _judge_rows(
    facts: EncoderFacts, target: Target, num_excluded: int, excluded: dict[str, frozenset[str]] | None
) -> tuple[Used, int | None, str]:
    """Were the target's rows among those that this training drew from: its modalities, less the test groups?

    The test groups are computed anew. They are believed only where they leave out as many images of the very same set
    as the run recorded; a task card may have changed since.
    """
    source, table = target.shard_set.source, target.shard_set.table
    if excluded is None:
        return "cannot be told", None, f"{source}: the test groups that it kept out cannot be computed any more"
    groups = pa.array(sorted(excluded.get(source, frozenset())), pa.string())
    dropped = pc.is_in(table["group_id"], value_set=groups).to_numpy()
    if facts.sources and target.data_hash in {one.data_hash for one in facts.sources}:
        if np.count_nonzero(dropped) != num_excluded:
            return "cannot be told", None, f"{source}: it kept out other test groups than the tasks have today"
    elif dropped[target.rows].any():
        return "cannot be told", None, f"{source}: before an earlier removal; its test groups cannot be compared"
    modalities = (facts.config.get("data") or {}).get("modalities")
    drawn = ~dropped[target.rows]
    if modalities is not None:
        own = table["modality"].take(pa.array(target.rows))
        drawn &= pc.is_in(own, value_set=pa.array(list(modalities), pa.string())).to_numpy()
    if not drawn.any():
        tasks = ", ".join(facts.excluded_tasks) if dropped[target.rows].any() else ""
        return "kept out", 0, f"{source}: {f'a test group of {tasks}' if tasks else 'of a modality that it left out'}"
    return "trained on", int(np.count_nonzero(drawn)), f"{source}: among the images that it drew from"


# ------------------------------------------------------------------------------------------------ results


def _trace_results(targets: Sequence[Target], roots: Sequence[Path], task_dir: Path | None) -> Iterator[Trace]:
    """Tables by key that hold the patient's images, and results whose labels could come from them."""
    keys = pa.array(sorted({key for target in targets for key in target.keys}), pa.string())
    for path in sorted({path for root in roots for path in root.rglob("*.parquet")}):
        try:
            if "key" not in pq.read_schema(path).names:
                continue
            found = pq.read_table(path, columns=["key"])["key"]
            held = found.filter(pc.is_in(found.cast(pa.string()), value_set=keys))
        except (OSError, pa.ArrowException) as error:
            text = " ".join(str(error).split())
            yield Trace("predictions", path, None, "cannot be told", None, f"cannot be read: {text}")
            continue
        if num_held := len(held.unique()):
            yield Trace("predictions", path, None, "holds", num_held, "rows of the patient's images, by key")

    @cache
    def find_training(task: str) -> tuple[dict[str, int], set[str]]:
        """By data hash of the task's images: how many of the patient's are in training; and the task's sources."""
        try:
            card = load_task(task, task_dir)
        except UserError:
            return {}, set()
        numbers: dict[str, int] = {}
        for target in targets:
            if target.shard_set.source == card.source:
                try:
                    split = load_split(card, target.shard_set, task_dir)
                except UserError:
                    continue
                sha256s = target.shard_set.table["sha256"].take(pa.array(split.rows)).to_pylist()
                training = split.rows[split.find("train", "val")]
                data_hash = compute_data_hash(split.keys.tolist(), sha256s)
                numbers[data_hash] = int(np.isin(training, target.rows).sum())
        return numbers, {card.source}

    sources = {target.shard_set.source for target in targets}
    for path in sorted({path for root in roots for path in root.rglob("*.json")}):
        try:
            result = read_result(path)
        except UserError:
            continue  # a JSON file of another kind
        numbers, on = find_training(result.task)
        if not on & sources:
            continue
        if result.data_hash not in numbers:
            yield Trace("result", path, None, "cannot be told", None, f"{result.task}: of an earlier or another set")
        elif num := numbers[result.data_hash]:
            detail = (
                f"{result.task}: among the labelled images that its {result.protocol} was trained on or chosen from"
            )
            yield Trace("result", path, None, "trained on", num, detail)


# ------------------------------------------------------------------------------------------------ what a person reads


def _make_table(traces: Sequence[Trace]) -> Table:
    table = Table(title="What had used the patient's images", title_justify="left")
    for name in ("kind", "path", "step", "used", "images", "detail"):
        table.add_column(name, overflow="fold")
    for trace in traces:
        table.add_row(*("-" if value is None else str(value) for value in astuple(trace)))
    return table


def _write_report(path: Path, traces: Sequence[Trace]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in fields(Trace)])
    writer.writerows(["" if value is None else value for value in astuple(trace)] for trace in traces)
    write_text(path, buffer.getvalue())
