"""What a hospital may say about its test patients without sending a line of them: a board's cells in, Aggregates out.

    results --standings--> Cell of the board --few groups hidden, counts rounded, texts reduced--> Aggregate (JSON)
    Aggregate --the board of others, `reported`--> a Cell with `origin` self_reported, in no rank

An Aggregate is one encoder on one task in one section: value and interval as the submitter's own board shows them, to
three digits. It holds no key, no group, no subgroup and no count that is not rounded down. Nothing leaves about fewer
than MIN_SHOWN_GROUPS groups: neither of the test set nor of the groups that decide a metric (those of the rarer class,
those with the event). Nobody else can recompute it, so it is shown and never ranked.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from panfm.board.summary import Cell, LeaderboardSummary, Section, Task
from panfm.errors import UserError
from panfm.evaluation.families import Family
from panfm.evaluation.results import (
    AGGREGATE_SUFFIX,
    Direction,
    EncoderCard,
    MetricValue,
    Result,
    find_files,
    make_folder_name,
)
from panfm.files import read_json
from panfm.measures.by_family import describe_metric
from panfm.measures.subgroups import MIN_SHOWN_GROUPS

AGGREGATE_VERSION: Literal[1] = 1
DIGITS = 3  # of values and intervals
ROUNDED_TO = 10  # counts are given as "at least": the next lower multiple
UNCERTAIN = "interval outside its declared regime, or without the choice of labels: may be too narrow"
UNDEFINED = "undefined on these test units"


class Aggregate(BaseModel):
    """One encoder on one task in one section, in figures that point at nobody.

    Counts are rounded down; None = fewer than MIN_SHOWN_GROUPS, or not told. metrics: means over the runs; where there
    were several, only the primary one has an interval.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    aggregate_version: Literal[1] = AGGREGATE_VERSION
    task: str
    task_version: int
    title: str
    family: str
    unit: str
    protocol: str
    variant: str
    label_fraction: float
    encoder: EncoderCard
    split_hash: str  # which images, for whoever has them; tells others nothing
    group_kind: str
    classes: tuple[str, ...]
    synthetic: bool
    num_test: int
    num_test_groups: int = Field(ge=MIN_SHOWN_GROUPS)
    num_rarer_groups: int = Field(ge=MIN_SHOWN_GROUPS)
    which_groups: str
    num_train_groups: int | None = None
    num_runs: int = Field(ge=1)
    metrics: dict[str, MetricValue]
    primary_metric: str
    panfm_version: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Aggregate":
        if self.family not in get_args(Family):
            raise ValueError(f"family {self.family!r} is not known; known: {', '.join(get_args(Family))}")
        if self.primary_metric not in self.metrics:
            raise ValueError(f"primary_metric {self.primary_metric!r} is not among metrics {sorted(self.metrics)}")
        for name, one in self.metrics.items():
            if (one.low is None) != (one.high is None) or (one.value is None and one.low is not None):
                raise ValueError(f"metric {name!r} has half an interval, or one without a value")
            if one.value is not None and one.low is not None and one.high is not None:
                inside = one.low <= one.value <= one.high
                if not inside:
                    raise ValueError(f"metric {name!r}: {one.value} lies outside its interval {one.low} to {one.high}")
            if one.direction != _get_direction(self.family, name):
                raise ValueError(f"metric {name!r}: unknown, or better when {one.direction}")
        counts = (self.num_test, self.num_test_groups, self.num_rarer_groups, self.num_train_groups or 0)
        if any(count % ROUNDED_TO for count in counts):
            raise ValueError(f"counts {counts} are not rounded to {ROUNDED_TO}")
        return self

    @property
    def stem(self) -> str:
        """File name without its ending: unique inside aggregates/<task>/<encoder>/."""
        unit = "" if self.unit == "image" else f"-{make_folder_name(self.unit)}"
        return f"{self.protocol}-{self.variant}-f{self.label_fraction:g}{unit}"

    @property
    def file_name(self) -> str:
        """Where it lies below the folder of aggregates."""
        folders = f"{make_folder_name(self.task)}/{make_folder_name(self.encoder.name)}"
        return f"{folders}/{self.stem}{AGGREGATE_SUFFIX}"


@dataclass(frozen=True)
class Left:
    """What stays at home, and why, in words."""

    task: str
    encoder: str
    reason: str


def compute_aggregates(
    summary: LeaderboardSummary, results: Sequence[Result], encoders: Iterable[str], panfm_version: str
) -> tuple[list[Aggregate], list[Left]]:
    """Reduce a board's cells to what may leave; what may not is listed with the reason, without a count.

    results: those that the board was made of. encoders: names whose rows are wanted.
    """
    wanted = set(encoders)
    by_cell: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        key = (result.synthetic, result.protocol, result.variant, result.label_fraction, result.task, result.unit)
        if result.evaluated_on == "test":
            by_cell[(*key, result.encoder.name)].append(result)
    found: list[Aggregate] = []
    left: list[Left] = []
    for section in summary.sections:
        for row in section.rows:
            for task, cell in zip(section.tasks, row.cells, strict=True):
                place = (section.synthetic, section.protocol, section.variant, section.label_fraction)
                runs = by_cell.get((*place, task.name, task.unit, row.encoder.name), [])
                if row.encoder.name not in wanted or not runs:
                    continue
                reason = _explain_hidden(task)
                if reason is not None:
                    left.append(Left(task.name, row.encoder.name, reason))
                else:
                    found.append(_reduce(section, task, row.encoder, cell, runs, panfm_version))
    return found, left


def _explain_hidden(task: Task) -> str | None:
    if task.num_test_groups < MIN_SHOWN_GROUPS:
        return f"fewer than {MIN_SHOWN_GROUPS} test groups"
    if task.num_rarer_groups < MIN_SHOWN_GROUPS:
        return f"fewer than {MIN_SHOWN_GROUPS} test groups {task.which_groups}: merge rare classes in the task card"
    return None


def _reduce(
    section: Section, task: Task, encoder: EncoderCard, cell: Cell, runs: Sequence[Result], panfm_version: str
) -> Aggregate:
    return Aggregate(
        task=task.name,
        task_version=task.version,
        title=task.title,
        family=task.family,
        unit=task.unit,
        protocol=section.protocol,
        variant=section.variant,
        label_fraction=section.label_fraction,
        encoder=encoder,
        split_hash=runs[0].split_hash,
        group_kind=task.group_kind,
        classes=task.classes,
        synthetic=task.synthetic,
        num_test=_round_down(task.num_test),
        num_test_groups=_round_down(task.num_test_groups),
        num_rarer_groups=_round_down(task.num_rarer_groups),
        which_groups=task.which_groups,
        num_train_groups=_round_shown(cell.num_train_groups),
        num_runs=cell.num_runs,
        metrics={
            name: _reduce_metric(name, task, cell, [result.metrics[name] for result in runs])
            for name in sorted(runs[0].metrics)
            if all(name in result.metrics for result in runs)
        },
        primary_metric=task.metric,
        panfm_version=panfm_version,
    )


def _reduce_metric(name: str, task: Task, cell: Cell, values: Sequence[MetricValue]) -> MetricValue:
    """The board's own interval of the primary metric; of the others the mean, with an interval if there is one run."""
    direction = values[0].direction
    known = [one.value for one in values if one.value is not None]
    if len(known) < len(values):
        return MetricValue(value=None, direction=direction, reason=UNDEFINED)
    one = values[0]
    low, high, method, reason = (
        (cell.low, cell.high, cell.method, cell.reason)
        if name == task.metric
        else (one.low, one.high, one.method, one.reason)
        if len(values) == 1
        else (None, None, None, None)
    )
    value = round(float(np.mean(known)), DIGITS)
    if low is None or high is None:
        return MetricValue(value=value, direction=direction)
    return MetricValue(
        value=value,
        direction=direction,
        low=min(round(low, DIGITS), value),
        high=max(round(high, DIGITS), value),
        method=method,
        reason=None if reason is None else UNCERTAIN,  # the reason itself counts groups
    )


def read_aggregate(path: Path) -> Aggregate:
    """Read one aggregate; a damaged or foreign one is a UserError that names it."""
    try:
        return Aggregate.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{path}: not an aggregate v{AGGREGATE_VERSION}: {key}: {fault['msg']}; it was changed or is of another "
            "version, submit it again"
        ) from None


def read_aggregates(roots: Iterable[Path]) -> list[tuple[Path, Aggregate]]:
    """Read every aggregate below the given folders, sorted by path."""
    return [(path, read_aggregate(path)) for path in find_files(roots, f"*{AGGREGATE_SUFFIX}")]


def _get_direction(family: str, name: str) -> Direction | None:
    try:
        return describe_metric(family, name).direction
    except KeyError:
        return None


def _round_down(count: int) -> int:
    return count // ROUNDED_TO * ROUNDED_TO


def _round_shown(count: int | None) -> int | None:
    return None if count is None or count < MIN_SHOWN_GROUPS else _round_down(count)
