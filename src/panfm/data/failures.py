"""Failures: samples that did not decode, listed in the run folder and counted over the whole run.

    FailedSample  ->  FailureLog  ->  RUN/failed_samples-<rank>.jsonl, a line each, in the order of the stream
    all ranks' counts, num_drawn  ->  check_failed_share  ->  UserError above data.max_failed_share

A rank appends to its own file before the step that follows is trained, so that a kill loses none. A run that resumes at
a position takes away what lies behind it and will occur again: each failure stands there once, however often the run
was interrupted and whatever its number of ranks. `read_failures` merges the files by position.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from panfm.errors import UserError
from panfm.files import write_text

MIN_DRAWN = 256  # draws that a share of failures is taken of at least: one bad image at the start stops nothing


@dataclass(frozen=True)
class FailedSample:
    """A sample that did not decode; another one took its position."""

    position: int
    source: str
    key: str
    shard: str
    reason: str


class FailureLog:
    """The failures of one rank. Without a folder they stay in memory, for who only looks at a few batches."""

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self.num_failed = 0  # that this rank has added
        self._folder = folder
        self._path = None if folder is None else folder / f"failed_samples-{rank}.jsonl"
        self._kept: list[FailedSample] = []

    def add(self, failures: Sequence[FailedSample]) -> None:
        """Append failures, in the order of the stream."""
        if not failures:
            return
        self.num_failed += len(failures)
        if self._path is None:
            self._kept += failures
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(failure)) + "\n" for failure in failures))

    def read(self) -> list[FailedSample]:
        """All failures of the run so far, those of the other ranks too where they share the folder."""
        return self._kept if self._folder is None else read_failures(self._folder)

    def sync(self) -> None:
        """Flush to disk: what a checkpoint counts as done must survive a power cut as it does."""
        if self._path is not None and self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())


def read_failures(folder: Path) -> list[FailedSample]:
    """Read what all ranks of a run listed, in the order of the stream."""
    return sorted((failure for path in _list_files(folder) for failure in _read(path)), key=lambda one: one.position)


def trim_failures(folder: Path, position: int) -> int:
    """Take away what lies at `position` and behind it: a run resumed there meets it again. Returns how many stay.

    One rank calls this, before any opens its log.
    """
    num_kept = 0
    for path in _list_files(folder):
        kept = [failure for failure in _read(path) if failure.position < position]
        if kept:
            write_text(path, "".join(json.dumps(asdict(failure)) + "\n" for failure in kept))
        else:
            path.unlink()
        num_kept += len(kept)
    return num_kept


def check_failed_share(
    num_failed: int, num_drawn: int, max_share: float, failures: FailureLog, paths: Mapping[str, str]
) -> None:
    """Raise UserError where more failed than may; num_failed and num_drawn count all ranks and the whole run.

    paths: source -> its folder, for the message.
    """
    if num_failed > max_share * max(num_drawn, MIN_DRAWN):
        raise UserError(
            f"{describe_worst(failures.read(), paths)}; of {num_drawn} drawn, more failed than data.max_failed_share "
            f"({max_share}) allows; build this source again, or raise the share"
        )


def describe_worst(failures: Sequence[FailedSample], paths: Mapping[str, str]) -> str:
    """Name the shard with the most failures, and count the reasons of all."""
    (source, shard), count = Counter((one.source, one.shard) for one in failures).most_common(1)[0]
    reasons = ", ".join(
        f"{number} {reason}" for reason, number in Counter(one.reason for one in failures).most_common()
    )
    return f"{paths[source]}/{shard}: {count} of the {len(failures)} failed samples ({reasons}) lie in this shard"


def summarise_failures(failures: Sequence[FailedSample]) -> str:
    """Count by source and reason, in one line: "ham10000: 3 truncated, 1 undecodable; bcn20000: 1 truncated"."""
    counts: dict[str, Counter[str]] = {}
    for one in failures:
        counts.setdefault(one.source, Counter())[one.reason] += 1
    return "; ".join(
        f"{source}: " + ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
        for source, reasons in sorted(counts.items())
    )


def _list_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("failed_samples-*.jsonl"))


def _read(path: Path) -> list[FailedSample]:
    """Read one file; a last line that a kill cut short is left out: the step that it belongs to was not done."""
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [FailedSample(**json.loads(line)) for line in lines[:-1]]
    except (ValueError, TypeError):
        raise UserError(f"{path}: holds a line that panfm did not write; remove the line, or the file") from None
