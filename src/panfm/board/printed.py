"""What others printed about the board's tasks: publications in, greyed rows and lines out.

    evaluation/published/*.yaml --by task, protocol, label_fraction, primary metric--> PublishedRow of a section
                                `--whatever is about a task of the board-------------> PublishedLine

Nothing here is ranked: another split, another draw of labels, often another kind of interval.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from panfm.board.summary import PublishedCell, PublishedLine, PublishedRow, Section, Task
from panfm.evaluation.published import PublishedNumber, collect_published, list_published, load_published
from panfm.evaluation.tasks import load_task

Printed = Mapping[str | None, tuple[PublishedNumber, ...]]  # by task; None: of no task here


def read_printed() -> Printed:
    """Read the numbers of all shipped publications."""
    return collect_published(load_published(name) for name in list_published())


def list_printed(printed: Printed, tasks: Iterable[Task]) -> tuple[PublishedLine, ...]:
    """Every printed number about one of the tasks, by task and publication, and those of reader studies on others."""
    return tuple(
        PublishedLine(
            task=name,
            about=about,
            model=number.entry.model,
            readers=number.entry.readers,
            metric=number.entry.metric,
            value=number.entry.value,
            low=number.entry.low,
            high=number.entry.high,
            gain=None if number.entry.gain is None else f"{number.entry.gain} over {number.entry.over}",
            protocol=number.table.protocol,
            label_fraction=number.table.label_fraction,
            split=number.table.split,
            where=number.table.where,
            note=number.table.note,
            citation=number.publication.citation,
            doi=number.publication.doi,
        )
        for name, about, number in _choose(printed, {task.name for task in tasks})
    )


def _choose(printed: Printed, names: Collection[str]) -> Iterator[tuple[str | None, str | None, PublishedNumber]]:
    """Numbers with their task, or with what was asked where the board has no such task: people are always shown."""
    for name in sorted(printed, key=lambda name: (name is None, name or "")):
        for number in printed[name]:
            if name in names:
                yield name, None, number
            elif any(entry.readers for entry in number.table.numbers):
                yield None, number.table.about if name is None else load_task(name).title, number


def build_printed_rows(printed: Printed, section: Section) -> tuple[PublishedRow, ...]:
    """The models and readers of publications that were measured as the section is: same task, protocol and metric.

    A compat protocol repeats a publication's linear probe: the numbers of linear probes stand beside it.
    """
    protocol = "linear_probe" if section.is_compat else section.protocol
    found: dict[tuple[str, str, bool, str], dict[int, PublishedNumber]] = defaultdict(dict)
    for place, task in enumerate(section.tasks):
        for number in printed.get(task.name, ()):
            table, entry = number.table, number.entry
            same = (table.protocol, table.label_fraction) == (protocol, section.label_fraction)
            # People had no labels and no protocol: they stand beside every one.
            if entry.metric == task.metric and entry.value is not None and (same or entry.readers):
                identity = (number.publication.citation, entry.model, entry.readers, number.publication.doi)
                found[identity].setdefault(place, number)
    return tuple(
        PublishedRow(model, readers, citation, doi, _lay_out(numbers, section.tasks))
        for (citation, model, readers, doi), numbers in sorted(found.items(), key=lambda item: item[0])
    )


def _lay_out(numbers: dict[int, PublishedNumber], tasks: Sequence[Task]) -> tuple[PublishedCell | None, ...]:
    return tuple(
        PublishedCell(
            number.entry.value,
            number.entry.low,
            number.entry.high,
            number.table.split,
            number.table.where,
            number.table.note,
        )
        if (number := numbers.get(place)) is not None and number.entry.value is not None
        else None
        for place in range(len(tasks))
    )
