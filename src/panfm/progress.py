"""Progress on long work: a bar on a terminal, sparse plain lines everywhere else (logs, CI, torchrun's children).

progress_bar  ->  a bar and a note      run_view  ->  a bar, and below it the numbers of a training run
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Protocol, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 15.0
PIPED_WIDTH = 160  # columns of a table that goes into a file or a log

console = Console(stderr=True)
_is_muted: ContextVar[bool] = ContextVar("is_muted", default=False)


@contextmanager
def muted() -> Iterator[None]:
    """Show no bars inside: for work in one of several processes, whose bars would cross each other."""
    token = _is_muted.set(True)
    try:
        yield
    finally:
        _is_muted.reset(token)


class Advance(Protocol):
    """What `progress_bar` yields: call it with the number of items done since the last call, and an optional note."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Advance the bar by `count` items and show `note` behind it."""


def _advance_nothing(count: int = 1, note: str = "") -> None:
    """The bar of muted work."""


@contextmanager
def progress_bar(description: str, total: int | None, *, unit: str = "images", done: int = 0) -> Iterator[Advance]:
    """Show the progress of `total` items of `unit` (None: unknown), `done` of which were done before (resumed work)."""
    if _is_muted.get():
        yield _advance_nothing
        return
    started = time.monotonic()
    count_done = done

    def rate() -> float:
        return (count_done - done) / max(time.monotonic() - started, 1e-9)

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
                bar.update(task, advance=count, rate=f"{rate():.1f} {unit}/s", note=note)

            yield advance
        return

    last_line = started

    def advance_lines(count: int = 1, note: str = "") -> None:
        nonlocal count_done, last_line
        count_done += count
        if time.monotonic() - last_line >= LINE_EVERY_SECONDS:
            last_line = time.monotonic()
            speed = rate()
            left = f", {_format_left((total - count_done) / speed)} left" if total and speed > 0 else ""
            sys.stderr.write(f"{description}: {count_done}/{total or '?'} {unit}, {speed:.1f} {unit}/s{left} {note}\n")

    yield advance_lines
    seconds = time.monotonic() - started
    if seconds > 2:
        sys.stderr.write(f"{description}: {count_done}/{total or count_done} {unit} in {seconds:.0f} s\n")


ShowRun = Callable[[int, Mapping[str, str]], None]


@contextmanager
def run_view(description: str, total: int, *, done: int = 0) -> Iterator[ShowRun]:
    """The live view of a training run of `total` images, `done` of which were trained on before.

    Yields a function: call it with the images since the last call and the numbers to show, name -> text. A terminal
    shows them all below the bar, twice a second; elsewhere they stand in the sparse lines of `progress_bar`.
    """
    if not console.is_terminal:
        with progress_bar(description, total, done=done) as advance:
            yield lambda count, numbers: advance(count, ", ".join(f"{name} {text}" for name, text in numbers.items()))
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task(description, total=total, completed=done)
    shown: Mapping[str, str] = {}

    def render() -> Group:
        table = Table.grid(padding=(0, 3))
        table.add_row(*(f"[dim]{name}[/dim]" for name in shown))
        table.add_row(*shown.values())
        return Group(bar, table)

    with Live(get_renderable=render, console=console, refresh_per_second=2):

        def show(count: int, numbers: Mapping[str, str]) -> None:
            nonlocal shown
            shown = numbers
            bar.advance(task, count)

        yield show


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


def _format_left(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))
