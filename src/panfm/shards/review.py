"""A person looks at what may identify somebody, and what was decided is recorded and carried out.

    ShardSet -> write_flags -> review/flags.csv -> write_sheet -> review/index.html -> (a person) -> decisions.csv
    decisions.csv -> record_decisions -> review/decisions.csv; images to remove leave the shards (shards.forget)

flags.csv has a row for each flag, and one of kind "none" for each image without: so it says which images were screened.
Decisions are never overwritten: a later one about the same image gets a higher version and counts. Removed images
stand in quarantine.csv (flagged ones as rejected_in_review, others as missed_by_screening) and in forgotten.json.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import date as calendar_date
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from panfm.errors import UserError
from panfm.files import write_text
from panfm.pages import build_environment, encode_thumbnail
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.screening import FLAG_KINDS, SCREENING_VERSION, Flag, screen_images

TEMPLATES = Path(__file__).parent / "templates"
REVIEW_FOLDER = "review"
FLAGS_FILE, DECISIONS_FILE, SHEET_FILE = "flags.csv", "decisions.csv", "index.html"
FLAG_COLUMNS = ("version", "key", "kind", "left", "top", "width", "height", "score")
DECISION_COLUMNS = ("version", "key", "decision", "flags", "by", "date")
REJECTED, MISSED = "rejected_in_review", "missed_by_screening"  # reasons in quarantine.csv
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 560, 82  # pixels: a person must be able to read what is written

Verdict = Literal["keep", "remove"]
INITIALS = re.compile(r"[\w.-]{1,12}")


@dataclass(frozen=True)
class Decision:
    """What a person decided about one image."""

    version: int
    key: str
    decision: Verdict
    flags: str  # kinds that were flagged then, joined by +; "none"
    by: str
    date: str  # YYYY-MM-DD


@dataclass(frozen=True)
class ReviewState:
    """How far screening and review of a shard set are."""

    num_samples: int
    num_screened: int
    num_flagged: int
    kinds: dict[str, int]  # kind -> images flagged so
    num_kept: int  # flagged images that a person decided to keep
    num_undecided: int  # flagged images without a decision
    num_to_remove: int  # decided, and not yet removed: a removal was cut off
    num_removed: int  # flagged and removed
    num_unflagged_seen: int  # images without a flag that a person looked at and kept or removed
    num_missed: int  # of these: had to be removed
    is_known: bool  # whether the record was read: not that of a set at a URL

    def __str__(self) -> str:
        """One line: screened no, or yes with what is open."""
        if self.num_screened == 0:
            line = "screened: no" if self.is_known else "screened: not known of a set at a URL"
        else:
            share = "" if self.num_screened == self.num_samples else f" {self.num_screened:,} of {self.num_samples:,},"
            found = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.items() if count)
            line = f"screened: yes,{share} {self.num_flagged:,} flagged" + (f" ({found})" if found else "")
            line += f", {self.num_undecided:,} undecided, {self.num_kept:,} kept, {self.num_removed:,} removed"
        if self.num_to_remove:
            line += f", {self.num_to_remove:,} to remove"
        if self.num_unflagged_seen:
            line += f"; of {self.num_unflagged_seen:,} looked at without a flag {self.num_missed:,} had to be removed"
        return line


@dataclass(frozen=True)
class Recorded:
    """What `record_decisions` did."""

    num_kept: int
    num_removed: int
    num_foreign: int  # decisions about images that are not in this set (removed before, or of another set)

    def __str__(self) -> str:
        """One line for the terminal."""
        foreign = f"; {self.num_foreign:,} about images that are not (or no longer) in it" if self.num_foreign else ""
        return f"{self.num_kept:,} kept, {self.num_removed:,} removed from the shards{foreign}"


# ------------------------------------------------------------------------------------------------ flags


def write_flags(shard_set: ShardSet, *, processes: int = 1) -> list[Flag]:
    """Screen all images, write review/flags.csv and return the flags."""
    flags = screen_images(shard_set, processes=processes)
    flagged = {flag.key for flag in flags}
    rows: list[tuple[Any, ...]] = [
        (SCREENING_VERSION, *(getattr(flag, name) for name in FLAG_COLUMNS[1:])) for flag in flags
    ]
    keys = shard_set.table["key"].to_pylist()
    rows += [(SCREENING_VERSION, key, "none", "", "", "", "", "") for key in keys if key not in flagged]
    _write_csv(shard_set.folder / REVIEW_FOLDER / FLAGS_FILE, FLAG_COLUMNS, rows)
    return flags


def read_flags(shard_set: ShardSet) -> tuple[frozenset[str], list[Flag]]:
    """The keys that this version of the screening looked at, and its flags; both empty before any screening."""
    path = shard_set.folder / REVIEW_FOLDER / FLAGS_FILE
    if not path.is_file():
        return frozenset(), []
    rows = [row for row in _read_csv(path, FLAG_COLUMNS) if row["version"] == str(SCREENING_VERSION)]
    try:
        flags = [
            Flag(
                key=row["key"],
                kind=row["kind"],
                left=int(row["left"]),
                top=int(row["top"]),
                width=int(row["width"]),
                height=int(row["height"]),
                score=float(row["score"]),
            )
            for row in rows
            if row["kind"] in FLAG_KINDS
        ]
    except ValueError as error:
        raise UserError(f"{path}: {error}; it is damaged, delete it and screen again") from None
    present = frozenset(shard_set.table["key"].to_pylist())
    screened = frozenset(row["key"] for row in rows)
    return screened & present, [flag for flag in flags if flag.key in present]


# ------------------------------------------------------------------------------------------------ the sheet


@dataclass(frozen=True)
class Sheet:
    """A written sheet, and how many images wait for the next one."""

    path: Path
    num_shown: int
    num_waiting: int


def write_sheet(
    shard_set: ShardSet, *, sample: int = 0, everything: bool = False, limit: int = 300, seed: int = 0
) -> Sheet:
    """Write review/index.html: flagged images without a decision, the surest first, then others of a seeded choice.

    `sample` images without a flag come along, so that one learns what the screening misses; with `everything` all do.
    At most `limit` images: a page of more is slow, and the next sheet shows the next ones. The page holds its images
    and fetches nothing; it shows pixels of patients and belongs where the shards belong.
    """
    screened, flags = read_flags(shard_set)
    decided = read_decisions(shard_set.folder)
    by_key: dict[str, list[Flag]] = {}
    for flag in flags:
        by_key.setdefault(flag.key, []).append(flag)
    keys = shard_set.table["key"].to_pylist()
    rows = {key: row for row, key in enumerate(keys)}
    chosen = sorted(
        (key for key in by_key if key not in decided),
        key=lambda key: (-len({flag.kind for flag in by_key[key]}), -max(f.score for f in by_key[key]), rows[key]),
    )
    others = [key for key in keys if key not in by_key and key not in decided]
    order = np.random.default_rng(seed).permutation(len(others))[: None if everything else sample]
    chosen += [others[place] for place in order.tolist()]
    images = [_draw_entry(shard_set, rows[key], by_key.get(key, [])) for key in chosen[:limit]]
    page = (
        build_environment(TEMPLATES)
        .get_template("review.html.j2")
        .render(
            source=shard_set.source,
            title=shard_set.card.title,
            synthetic=shard_set.card.synthetic,
            folder=shard_set.path.name,
            data_hash=shard_set.compute_data_hash()[:16],
            images=images,
            num_waiting=len(chosen) - len(images),
            state=read_review_state(shard_set),
            screened=bool(screened),
        )
    )
    path = shard_set.folder / REVIEW_FOLDER / SHEET_FILE
    write_text(path, page.rstrip() + "\n")
    return Sheet(path, len(images), len(chosen) - len(images))


def _draw_entry(shard_set: ShardSet, row: int, flags: list[Flag]) -> dict[str, Any]:
    with Image.open(io.BytesIO(shard_set.read_image(row))) as image:
        width, height = image.size
        thumbnail = encode_thumbnail(image, THUMBNAIL_SIDE, THUMBNAIL_QUALITY)
    boxes = [
        {
            "kind": flag.kind,
            "left": round(100 * flag.left / width, 2),
            "top": round(100 * flag.top / height, 2),
            "width": round(100 * flag.width / width, 2),
            "height": round(100 * flag.height / height, 2),
        }
        for flag in flags
    ]
    return {
        "key": shard_set.table["key"][row].as_py(),
        "modality": shard_set.table["modality"][row].as_py().replace("_", " "),
        "kinds": [kind for kind in FLAG_KINDS if any(flag.kind == kind for flag in flags)],
        "boxes": boxes,
        "ratio": round(width / height, 4),
        "thumbnail": thumbnail,
    }


# ------------------------------------------------------------------------------------------------ decisions


def read_decisions(folder: Path) -> dict[str, Decision]:
    """The decision that counts for each image: the last version."""
    path = folder / REVIEW_FOLDER / DECISIONS_FILE
    decisions: dict[str, Decision] = {}
    for row in _read_csv(path, DECISION_COLUMNS) if path.is_file() else ():
        number, verdict = row["version"], row["decision"]
        if not number.isdecimal() or verdict not in ("keep", "remove"):
            raise UserError(f"{path}: version {number!r}, decision {verdict!r}; it is damaged or was edited by hand")
        one = Decision(int(number), row["key"], cast(Verdict, verdict), row["flags"], row["by"], row["date"])
        if one.key not in decisions or one.version >= decisions[one.key].version:
            decisions[one.key] = one
    return decisions


def record_decisions(folder: str | Path, decisions: str | Path, *, by: str, date: str | None = None) -> Recorded:
    """Add a person's decisions (a CSV file with key, decision) to the record and remove the images that must go.

    `date` (YYYY-MM-DD) is today's by default. An image once removed does not come back by deciding otherwise. Keys stay
    the same in a new build with the same key file, so that the same file serves there too.

    Raises UserError: no initials, another decision than keep or remove, two decisions about one image, a file of which
    no image is in this set, a set of which nothing would be left.
    """
    from panfm.shards.forget import remove_samples

    shard_set, given = open_shard_set(folder), _read_given(Path(decisions))
    if not INITIALS.fullmatch(by):
        raise UserError(f"--by {by!r}: give the initials of who decided, at most 12 letters without spaces")
    present = frozenset(shard_set.table["key"].to_pylist())
    ours = {key: verdict for key, verdict in given.items() if key in present}
    if given and not ours:
        raise UserError(f"{decisions}: none of its {len(given)} keys is in {folder}; give the decisions of this set")
    kinds: dict[str, set[str]] = {}
    for flag in read_flags(shard_set)[1]:
        kinds.setdefault(flag.key, set()).add(flag.kind)

    folder = shard_set.folder
    path = folder / REVIEW_FOLDER / DECISIONS_FILE
    before = _read_csv(path, DECISION_COLUMNS) if path.is_file() else []
    version = 1 + max((one.version for one in read_decisions(folder).values()), default=0)
    day = date or calendar_date.today().isoformat()
    added = [
        (version, key, verdict, "+".join(sorted(kinds.get(key, ()))) or "none", by, day)
        for key, verdict in sorted(ours.items())
    ]
    # First the record, then the removal: if that is cut off, the record says what is still to be removed.
    _write_csv(path, DECISION_COLUMNS, [*(tuple(row.values()) for row in before), *added])
    doomed = {key: one for key, one in read_decisions(folder).items() if one.decision == "remove"}
    for reason, flagged in ((REJECTED, True), (MISSED, False)):
        keys = [key for key, one in doomed.items() if key in present and (one.flags != "none") is flagged]
        if keys:
            remove_samples(folder, keys, f"{reason.replace('_', ' ')}, decided by {by}", quarantine_as=reason)
    num_removed = len(doomed.keys() & present)
    num_kept = sum(verdict == "keep" for verdict in ours.values())
    if num_removed == 0:  # a removal takes the sheet away; without one it still shows what is decided now
        (folder / REVIEW_FOLDER / SHEET_FILE).unlink(missing_ok=True)
    return Recorded(num_kept, num_removed, len(given) - len(ours))


def _read_given(path: Path) -> dict[str, str]:
    given: dict[str, str] = {}
    for line, row in enumerate(_read_csv(path, ("key", "decision")), start=2):
        key, verdict = row["key"].strip(), row["decision"].strip().lower()
        if not verdict:
            continue  # a person may leave some for later
        if verdict not in ("keep", "remove"):
            raise UserError(
                f"{path}, line {line}: decision {verdict!r} must be keep or remove (empty: not yet decided)"
            )
        if given.setdefault(key, verdict) != verdict:
            raise UserError(f"{path}, line {line}: keeps and removes the same image {key}; keep one of the two lines")
    if not given:
        raise UserError(f"{path}: holds no decision; mark images on the review sheet and export again")
    return given


def read_review_state(shard_set: ShardSet) -> ReviewState:
    """How far screening and review are; removed images are counted from the index."""
    is_known = isinstance(shard_set.path, Path)  # the record lies in the folder; of a URL only the shards are read
    screened, flags = read_flags(shard_set) if is_known else (frozenset[str](), [])
    decisions = read_decisions(shard_set.folder) if is_known else {}
    flagged = {flag.key for flag in flags}
    present = set(shard_set.table["key"].to_pylist())
    counts = Counter(kind for _, kind in {(flag.key, flag.kind) for flag in flags})
    rejected = shard_set.index["num_rejected"]
    return ReviewState(
        num_samples=shard_set.num_samples,
        num_screened=len(screened),
        num_flagged=len(flagged),
        kinds={kind: counts[kind] for kind in FLAG_KINDS},
        num_kept=sum(key in decisions and decisions[key].decision == "keep" for key in flagged),
        num_undecided=len(flagged - decisions.keys()),
        num_to_remove=sum(one.decision == "remove" and key in present for key, one in decisions.items()),
        num_removed=rejected.get(REJECTED, 0),
        num_unflagged_seen=len((decisions.keys() - flagged) & present) + rejected.get(MISSED, 0),
        num_missed=rejected.get(MISSED, 0),
        is_known=is_known,
    )


# ------------------------------------------------------------------------------------------------ CSV


def _read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: has no column {missing[0]}; it must have {', '.join(columns)}")
            return [{name: row[name] or "" for name in columns} for row in reader]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the review sheet exports it") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def _write_csv(path: Path, columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


assert FLAG_COLUMNS[1:] == tuple(field.name for field in fields(Flag)), "flags.csv has the fields of Flag"
