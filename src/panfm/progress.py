"""Progress on long work: a bar on a terminal, sparse plain lines everywhere else (logs, CI, torchrun's children)."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 15.0
PIPED_WIDTH = 160  # columns of a table that goes into a file or a log

console = Console(stderr=True)


class Advance(Protocol):
    """What `progress_bar` yields: call it with the number of items done since the last call, and an optional note."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Advance the bar by `count` items and show `note` behind it."""


@contextmanager
def progress_bar(description: str, total: int | None, *, unit: str = "images", done: int = 0) -> Iterator[Advance]:
    """Show the progress of `total` items of `unit` (None: unknown), `done` of which were done before (resumed work)."""
    started = time.monotonic()
    count_done = done

    def rate() -> str:
        return f"{(count_done - done) / max(time.monotonic() - started, 1e-9):.1f} {unit}/s"

    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, completed=done, rate="", note="")

            def advance(count: int = 1, note: str = "") -> None:
                nonlocal count_done
                count_done += count
                bar.update(task, advance=count, rate=rate(), note=note)

            yield advance
        return

    last_line = started

    def advance_lines(count: int = 1, note: str = "") -> None:
        nonlocal count_done, last_line
        count_done += count
        if time.monotonic() - last_line >= LINE_EVERY_SECONDS:
            last_line = time.monotonic()
            sys.stderr.write(f"{description}: {count_done}/{total or '?'} {unit}, {rate()} {note}\n")

    yield advance_lines
    seconds = time.monotonic() - started
    if seconds > 2:
        sys.stderr.write(f"{description}: {count_done}/{total or count_done} {unit} in {seconds:.0f} s\n")


def track(items: Iterable[Item], description: str, total: int | None = None, *, unit: str = "images") -> Iterator[Item]:
    """Yield `items` while a progress bar counts them."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress_bar(description, total, unit=unit) as advance:
        for item in items:
            yield item
            advance()


def print_output(renderable: object) -> None:
    """Print a rich table or text to standard output: a command's result, where progress goes to standard error."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(renderable)
