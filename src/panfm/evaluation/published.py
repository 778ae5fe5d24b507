"""Numbers that others published about a task: to be shown beside ours, never ranked with them.

    evaluation/published/NAME.yaml -> Publication (tables of numbers)    task -> its PublishedNumbers, flat

Each number keeps what decides whether it can be compared: protocol, share of the labels, and the split in words. A
split of others is not ours even where the images are the same. Only what was read stands here; what a paper leaves out
stays out. Needs no torch.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from panfm.config import read_yaml, validate
from panfm.errors import UserError
from panfm.files import find_resource, list_resources

PUBLISHED_FOLDER = "evaluation/published"


class NumberEntry(BaseModel):
    """One printed number: a value with its interval, or a gain over the next best model where no value is printed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    readers: bool = False  # people rather than a model: `model` says who they are
    metric: str  # our name where we have one, else the publication's own word
    value: float | None = None
    low: float | None = None  # of the interval as printed; how it was made stands in the table's note
    high: float | None = None
    gain: str | None = None  # as printed, "+4.7 %": whether points or relative is often not said
    over: str | None = None  # whom the gain is over

    @model_validator(mode="after")
    def _check(self) -> "NumberEntry":
        if (self.value is None) == (self.gain is None):
            raise ValueError(f"{self.model}, {self.metric}: give either value or gain (as printed)")
        if (self.gain is None) != (self.over is None):
            raise ValueError(f"{self.model}, {self.metric}: gain and over go together; over says whom the gain is over")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.model}, {self.metric}: an interval has both low and high")
        if self.low is not None and self.high is not None and not self.low <= (self.value or 0.0) <= self.high:
            raise ValueError(f"{self.model}, {self.metric}: the value lies outside [{self.low:g}, {self.high:g}]")
        return self


class NumberTable(BaseModel):
    """Numbers of one task under one protocol, on one split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str | None  # name of a task card; null = of no task here: people read other images, as reader studies do
    about: str | None = None  # what was asked, where there is no card that says it
    protocol: Literal["linear_probe", "finetune", "other"]
    label_fraction: float = Field(default=1.0, gt=0, le=1)
    split: str  # on which images, in words
    where: str  # table, figure, section, or file of the code
    note: str | None = None
    numbers: tuple[NumberEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "NumberTable":
        if (self.task is None) != (self.about is not None):
            raise ValueError("a table of no task here (task: null) says in `about` what was asked, and no other does")
        return self


class Publication(BaseModel):
    """What one publication says about our tasks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    title: str
    citation: str
    doi: str = Field(pattern=r"^10\.\d{4,9}/\S+$")
    note: str | None = None  # what holds for all of its numbers
    tables: tuple[NumberTable, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_unique(self) -> "Publication":
        identities = Counter(
            (
                table.task or table.about,
                table.protocol,
                table.label_fraction,
                table.split,
                entry.model,
                entry.metric,
                entry.over,
            )
            for table in self.tables
            for entry in table.numbers
        )
        identity, count = identities.most_common(1)[0]
        if count > 1:
            raise ValueError(f"task {identity[0]}: {identity[5]} of {identity[4]} stands {count} times; keep one")
        return self


@dataclass(frozen=True)
class PublishedNumber:
    """One number with everything that it needs to be read alone."""

    publication: Publication
    table: NumberTable
    entry: NumberEntry

    def __str__(self) -> str:
        """One line: model, metric, value, protocol, split, source."""
        entry, table = self.entry, self.table
        value = f"{entry.gain} over {entry.over}" if entry.value is None else f"{entry.value:g}"
        interval = f" ({entry.low:g} to {entry.high:g})" if entry.low is not None else ""
        labels = "" if table.label_fraction == 1 else f", {table.label_fraction:.0%} of the labels"
        return (
            f"{entry.model}: {entry.metric} {value}{interval}, {table.protocol}{labels}, {table.split} "
            f"[{self.publication.name}: {table.where}]"
        )


def list_published() -> dict[str, Path]:
    """List the shipped publications by name."""
    return list_resources(PUBLISHED_FOLDER)


def load_published(name_or_path: str | Path) -> Publication:
    """Read a publication by name or path; what is not valid is a UserError of one line."""
    path = find_resource(PUBLISHED_FOLDER, name_or_path)
    publication = validate(Publication, read_yaml(path), where=str(path))
    if publication.name != path.stem:
        raise UserError(f"{path}: name is {publication.name!r}; it carries the name of its file, {path.stem!r}")
    return publication


def find_published(task: str, names: tuple[str, ...] | None = None) -> tuple[PublishedNumber, ...]:
    """All numbers about a task, in the publications `names` (null: all that are shipped)."""
    publications = [load_published(name) for name in (tuple(list_published()) if names is None else names)]
    return collect_published(publications).get(task, ())


def collect_published(publications: Iterable[Publication]) -> dict[str | None, tuple[PublishedNumber, ...]]:
    """All numbers of the publications, by task; None for those of no task here."""
    found: dict[str | None, list[PublishedNumber]] = defaultdict(list)
    for publication in publications:
        for table in publication.tables:
            found[table.task] += [PublishedNumber(publication, table, entry) for entry in table.numbers]
    return {task: tuple(numbers) for task, numbers in found.items()}
