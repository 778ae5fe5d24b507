"""Taking samples out of a finished shard set: a patient who withdrew consent, or images that a person rejected.

    DIR + keys  ->  DIR/.forget/new/* (the changed files)  ->  commit.json  ->  deletions, renames, index.json last

Until commit.json stands, nothing has happened; from then on the removal can only be completed: `open_shard_set`
refuses the set and says how, and the next removal completes it first. Other samples keep their bytes.
`forgotten.json` records that something was removed, when and why, and never of whom.

What this cannot reach: the raw archive (a build from it would bring the patient back), backups, copies of the set, and
weights that were trained on it. The data hash changes, as it must: it says which images a set holds.
"""

import csv
import fcntl
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from panfm.errors import UserError
from panfm.files import compute_file_sha256, read_json, sync_folder, write_bytes, write_json
from panfm.shards.index import (
    INDEX_FILE,
    PENDING_REMOVAL,
    QUARANTINE_FILE,
    SAMPLES_FILE,
    ShardSet,
    compute_data_hash,
    open_shard_set,
)
from panfm.shards.privacy import PUBLIC_KEY, load_key, pseudonymise
from panfm.shards.rewrite import move_rows, rewrite_tar, write_rows
from panfm.shards.verify import Member, count_samples

FORGOTTEN_FILE = "forgotten.json"
OVERLAYS = "overlays"
REVIEW = "review"
DESCRIPTIONS = ("datasheet.md", "croissant.json")  # made from the set; with fewer samples they would be wrong
HASHED_PATIENT = re.compile(r"p[0-9a-f]{16}")


@dataclass(frozen=True)
class Removal:
    """What a removal did to one shard set."""

    path: Path
    source: str
    num_removed: int
    num_left: int
    num_rewritten: int  # shards that now hold fewer samples
    num_emptied: int  # shards that are gone
    deleted: tuple[str, ...]  # other files of the set that are gone, relative to it
    foreign: tuple[str, ...]  # files in the folder that are no part of a set: a person must look at them
    old_data_hash: str
    new_data_hash: str

    def __str__(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.path}: {self.num_removed:,} samples of {self.source} removed, {self.num_left:,} left; "
            f"{self.num_rewritten} shards rewritten, {self.num_emptied} gone"
        ]
        if self.deleted:
            shown = ", ".join(self.deleted[:5]) + (
                f" and {len(self.deleted) - 5} more" if len(self.deleted) > 5 else ""
            )
            lines.append(f"{self.path}: also deleted (what describes the whole set can be made anew): {shown}")
        if self.foreign:
            lines.append(
                f"{self.path}: no part of a shard set, look yourself whether they show the patient: "
                f"{', '.join(self.foreign)}"
            )
        return "\n".join(lines)


def find_patient(shard_set: ShardSet, patient: str, key_file: Path | None = None) -> npt.NDArray[np.int64]:
    """The rows of a patient: int64 [n], empty where the set does not hold that patient.

    patient: the id as the archive has it, hashed here (for a card with private identifiers with its key file), or the
    hashed id ("p" and 16 hexadecimal characters).

    Raises UserError where the raw id of a private source comes without its key, or with another one.
    """
    card, table = shard_set.card, shard_set.table
    wanted = [patient] if HASHED_PATIENT.fullmatch(patient) else []
    if not (wanted and _find_rows(table, wanted).size):
        if card.identifiers == "public":
            key = PUBLIC_KEY
        elif key_file is None:
            raise UserError(
                f"{shard_set.path}: the ids of {card.name} are hashed with a secret key; give its file with "
                "--key-file, or the patient's hashed id (p and 16 hexadecimal characters)"
            )
        else:
            key = load_key(key_file, shard_folder=shard_set.folder)
        known = shard_set.index["identifiers"]["key_fingerprint"]
        if key.fingerprint != known:
            raise UserError(
                f"{key_file}: is not the key of {shard_set.path} (fingerprint {key.fingerprint}, the set's is "
                f"{known}); give the key file that the set was built with"
            )
        wanted.append(pseudonymise(key, card.namespace, "patient", patient))
    return _find_rows(table, wanted)


def _find_rows(table: pa.Table, ids: list[str]) -> npt.NDArray[np.int64]:
    values = pa.array(ids, pa.string())
    found = pc.or_(pc.is_in(table["patient_id"], value_set=values), pc.is_in(table["group_id"], value_set=values))
    return np.flatnonzero(found.to_numpy()).astype(np.int64)


def read_former_hashes(folder: str | Path) -> tuple[str, ...]:
    """The data hashes that a set had before each removal, oldest first: each such set held all samples of this one."""
    path = Path(folder) / FORGOTTEN_FILE
    return tuple(entry["data_hash_before"] for entry in read_json(path)["removals"]) if path.is_file() else ()


def remove_samples(
    folder: str | Path, keys: Collection[str], reason: str, *, quarantine_as: str | None = None
) -> Removal:
    """Remove the samples with these keys from a finished shard set: images, metadata, masks, captions, overlays.

    reason: for forgotten.json ("consent withdrawn", "rejected in review"); it must name nobody. quarantine_as: list the
    removed keys in quarantine.csv under this reason, where it may be known which images they were; None: no trace of
    them. A removal that was cut off is completed first. Nothing may read the set meanwhile: its places change.

    Raises UserError for a key that is not in the set, for the removal of all samples, and for a shard that is damaged;
    nothing has changed then.
    """
    folder = Path(folder)
    with _locked(folder):
        _finish(folder)
        shard_set = open_shard_set(folder)
        wanted = frozenset(keys)
        gone = pc.is_in(shard_set.table["key"], value_set=pa.array(sorted(wanted), pa.string()))
        kept = pc.invert(gone).to_numpy()
        num_removed = int(np.count_nonzero(~kept))
        if num_removed != len(wanted):
            raise UserError(
                f"{folder}: {len(wanted) - num_removed} of {len(wanted)} keys are not in this shard set; "
                "nothing was removed"
            )
        if num_removed == shard_set.num_samples:
            raise UserError(
                f"{folder}: all {num_removed} samples of the set would go; delete the folder instead, "
                "nothing was removed"
            )
        removal = (
            _stage(shard_set, wanted, kept, reason, quarantine_as)
            if num_removed
            else Removal(folder, shard_set.source, 0, shard_set.num_samples, 0, 0, (), (), *_twice(shard_set))
        )
        _finish(folder)
    return removal


def finish_removal(folder: str | Path) -> bool:
    """Complete a removal that was cut off after its commit; whether there was one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a shard set")
    with _locked(folder):
        return _finish(folder)


def _twice(shard_set: ShardSet) -> tuple[str, str]:
    data_hash = shard_set.compute_data_hash()
    return data_hash, data_hash


# ------------------------------------------------------------------------------------------------ before the commit


def _stage(
    shard_set: ShardSet,
    keys: frozenset[str],
    kept: npt.NDArray[np.bool_],
    reason: str,
    quarantine_as: str | None,
) -> Removal:
    """Write every changed file beside the set, then commit.json. A failure leaves the set as it was."""
    folder, table = shard_set.folder, shard_set.table
    staged = folder / Path(PENDING_REMOVAL).parent / "new"
    shutil.rmtree(staged.parent, ignore_errors=True)  # of a removal that was cut off before its commit
    staged.mkdir(parents=True)
    try:
        touched = set(table["shard"].filter(pa.array(~kept)).unique().to_pylist())
        remaining = table.filter(pa.array(kept))
        emptied = touched - set(remaining["shard"].unique().to_pylist())
        shards = []
        places: dict[str, dict[str, Member]] = {}  # shard -> member -> where it lies now
        for entry in shard_set.index["shards"]:
            name = entry["name"]
            if name in touched - emptied:
                places[name] = rewrite_tar(folder / name, staged / name, keys)
                facts = {"num_bytes": (staged / name).stat().st_size, "sha256": compute_file_sha256(staged / name)}
                num_samples = pc.sum(pc.equal(remaining["shard"], name)).as_py()
                shards.append({**entry, **facts, "num_samples": num_samples})
            elif name not in emptied:
                shards.append(entry)
        remaining = move_rows(remaining, places, folder)
        write_rows(staged / SAMPLES_FILE, remaining)
        num_rejected = _stage_quarantine(shard_set, staged, keys, remaining, quarantine_as)
        old_data_hash = shard_set.compute_data_hash()
        new_data_hash = compute_data_hash(remaining["key"].to_pylist(), remaining["sha256"].to_pylist())
        samples_sha256 = compute_file_sha256(staged / SAMPLES_FILE)
        removals = read_json(folder / FORGOTTEN_FILE)["removals"] if (folder / FORGOTTEN_FILE).is_file() else []
        entry = {
            "date": date.today().isoformat(),
            "reason": reason,
            "num_samples": int(np.count_nonzero(~kept)),
            "data_hash_before": old_data_hash,
            "data_hash_after": new_data_hash,
            "samples_sha256_before": shard_set.index["samples_sha256"],
            "samples_sha256_after": samples_sha256,
        }
        write_json(staged / FORGOTTEN_FILE, {"version": 1, "removals": [*removals, entry]})
        index = shard_set.index | count_samples(remaining)
        index |= {"num_rejected": num_rejected, "samples_sha256": samples_sha256, "shards": shards}
        deleted, foreign = _list_deletions(folder, shards, remaining, staged)
        write_json(staged / INDEX_FILE, index)
        # The index comes last, as in a build; what is deleted goes first, for it can show the patient.
        names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        names = [name for name in names if name != INDEX_FILE] + [INDEX_FILE]
        for inner in [staged, *(path for path in staged.rglob("*") if path.is_dir()), staged.parent, folder]:
            sync_folder(inner)
        write_json(folder / PENDING_REMOVAL, {"delete": sorted({*emptied, *deleted}), "replace": names})
    except BaseException:
        if not (folder / PENDING_REMOVAL).is_file():
            shutil.rmtree(staged.parent, ignore_errors=True)
        raise
    return Removal(
        path=folder,
        source=shard_set.source,
        num_removed=int(np.count_nonzero(~kept)),
        num_left=remaining.num_rows,
        num_rewritten=len(touched - emptied),
        num_emptied=len(emptied),
        deleted=tuple(sorted(set(deleted) - emptied)),
        foreign=foreign,
        old_data_hash=old_data_hash,
        new_data_hash=new_data_hash,
    )


def _stage_quarantine(
    shard_set: ShardSet, staged: Path, keys: frozenset[str], remaining: pa.Table, quarantine_as: str | None
) -> dict[str, int]:
    """Take the removed samples, and slides that are gone with them, out of every table by key; the counts by reason."""
    slides = frozenset(shard_set.table["slide_id"].unique().to_pylist()) - frozenset(
        remaining["slide_id"].unique().to_pylist()
    )
    gone = keys | {slide for slide in slides if slide is not None}
    added = [{"key": key, "reason": quarantine_as, "num": "1"} for key in sorted(keys)] if quarantine_as else []
    counts = Counter(shard_set.index["num_rejected"])
    folder = shard_set.folder
    for path in [folder / QUARANTINE_FILE, *sorted((folder / REVIEW).glob("*.csv"))]:
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            header, rows = list(reader.fieldnames or ()), list(reader)
        if "key" not in header:
            continue
        dropped = [row for row in rows if row["key"] in gone]
        rows = [row for row in rows if row["key"] not in gone]
        if path.name == QUARANTINE_FILE:
            rows += added
            for row in dropped:
                counts[row["reason"]] -= int(row["num"])
            for row in added:
                counts[row["reason"]] += 1
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(staged / path.relative_to(folder), buffer.getvalue().encode())
    return {reason: count for reason, count in sorted(counts.items()) if count}


def _list_deletions(
    folder: Path, shards: list[dict[str, Any]], remaining: pa.Table, staged: Path
) -> tuple[list[str], tuple[str, ...]]:
    """Which files of the set must go besides empty shards, and which files are none of a set's.

    An overlay stays where samples of its slide stay. One of a slide without samples goes: whose it is cannot be told.
    """
    slides = set(remaining["slide_id"].unique().to_pylist())
    ours = {shard["name"] for shard in shards} | {SAMPLES_FILE, INDEX_FILE, QUARANTINE_FILE, FORGOTTEN_FILE}
    deleted: list[str] = []
    foreign: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.is_relative_to(staged.parent):
            continue
        name = path.relative_to(folder).as_posix()
        top = name.split("/", maxsplit=1)[0]
        if name in ours or (staged / name).is_file():
            continue
        if top == OVERLAYS:
            if path.stem not in slides:
                deleted.append(name)
        elif top in (REVIEW, ".build", *DESCRIPTIONS) or ".tmp-" in name or re.fullmatch(r"shard-\d+\.tar", name):
            deleted.append(name)
        else:
            foreign.append(name)
    return deleted, tuple(foreign)


# ------------------------------------------------------------------------------------------------ behind the commit


def _finish(folder: Path) -> bool:
    """Do what commit.json says, from wherever it was cut off; each step may be done twice."""
    marker = folder / PENDING_REMOVAL
    if not marker.is_file():
        return False
    plan = read_json(marker)
    for name in [*plan["delete"], *plan["replace"]]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{marker}: names {name}, which is outside the shard set; it was not written by panfm")
    for name in plan["delete"]:
        (folder / name).unlink(missing_ok=True)
    for top in {name.split("/", maxsplit=1)[0] for name in plan["delete"] if "/" in name}:
        _remove_empty_folders(folder / top)
    for name in plan["replace"]:
        new = marker.parent / "new" / name
        if new.is_file():  # else an earlier attempt renamed it
            if name == INDEX_FILE:
                sync_folder(folder)  # all the rest before it, even through a power cut
            new.replace(folder / name)
    sync_folder(folder)
    shutil.rmtree(marker.parent / "new", ignore_errors=True)  # an earlier attempt may have come this far
    marker.unlink()
    marker.parent.rmdir()
    sync_folder(folder)
    return True


def _remove_empty_folders(top: Path) -> None:
    for path in sorted([top, *top.rglob("*")], reverse=True):  # inner ones first
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second removal; the lock falls with the process that held it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a shard set")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process removes samples from it; wait until that is done") from None
        yield
    finally:
        os.close(descriptor)
