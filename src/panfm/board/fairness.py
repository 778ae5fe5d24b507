"""Fairness and sites at a glance: what the task pages tell level by level, in one line a task, encoder and attribute.

    TaskPages --worst shown level beside the reference level--> FairnessRow
    sections leave_institution_out, task audits ---------------> SiteRow

The worst of several levels looks worse than it is, the more levels the more: its interval is that of the level alone,
and whether it differs is said by the permutation test of the task's page, adjusted over its table. A level of few
groups is not shown there, so it cannot be the worst here; how many there are is said.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from panfm.board.summary import LeaderboardSummary, Row, Section
from panfm.board.task_pages import EncoderDetails, LevelShare, TaskPage
from panfm.errors import UserError
from panfm.files import read_json
from panfm.measures.draws import Floats
from panfm.measures.intervals import Estimate
from panfm.measures.statistics import compute_interval
from panfm.measures.subgroups import Difference, SubgroupTable

LEFT_OUT, YARDSTICK = "none", "same_size"  # variants of leave_institution_out
READ_AUDIT_VERSION = 1


@dataclass(frozen=True)
class FairnessRow:
    """The worst level of one attribute by one measure, beside the reference level.

    gap: worst minus reference, None where the reference itself is the worst or has no value; p_adjusted: of no
    difference, adjusted over the attribute's table. num_hidden: levels of too few groups to be shown.
    """

    encoder: str
    task: str  # slug
    attribute: str
    measure: str  # sensitivity, specificity; in a task of several classes: right (the share of right images)
    worst_level: str
    worst: float
    low: float | None
    high: float | None
    reference_level: str
    reference: float | None
    gap: float | None
    p_adjusted: float | None
    num_levels: int
    num_hidden: int


@dataclass(frozen=True)
class SiteRow:
    """What the institution does to an encoder on a task.

    kind: left_out, the metric when the tested institution took no part in training, and in `beside` the same with as
    many labels and the institution in it, `gap` their paired difference; told, the AUROC with which features tell the
    institution among images of one diagnosis (chance 0.5).
    """

    encoder: str
    task: str
    kind: str
    what: str  # the metric's title, or the diagnosis
    value: float | None
    low: float | None
    high: float | None
    beside: float | None = None
    gap: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    reason: str | None = None


def list_fairness(pages: Iterable[TaskPage]) -> tuple[FairnessRow, ...]:
    """List the worst level of every attribute, measure, encoder and task that has a subgroup table."""
    rows: list[FairnessRow] = []
    for page in pages:
        for details in page.encoders:
            rows += _list_encoder(page.task.slug, details)
    return tuple(rows)


def _list_encoder(task: str, details: EncoderDetails) -> list[FairnessRow]:
    found: list[FairnessRow | None] = []
    for attribute, table in details.subgroups.items():
        found += [
            _find_worst(details.encoder, task, attribute, "sensitivity", *_get_sensitivities(table)),
            _find_worst(details.encoder, task, attribute, "specificity", *_get_specificities(table)),
        ]
    for attribute, shares in details.shares.items():
        found.append(_find_worst(details.encoder, task, attribute, "right", *_get_shares(shares)))
    return [row for row in found if row is not None]


Levels = Sequence[tuple[str, Estimate, Difference | None]]


def _get_sensitivities(table: SubgroupTable) -> tuple[str, Levels]:
    return table.reference, [(one.level, one.sensitivity, one.sensitivity_difference) for one in table.levels]


def _get_specificities(table: SubgroupTable) -> tuple[str, Levels]:
    return table.reference, [(one.level, one.specificity, one.specificity_difference) for one in table.levels]


def _get_shares(shares: Sequence[LevelShare]) -> tuple[str, Levels]:
    """The level of most groups stands first, as on the task's page, and is the reference."""
    return shares[0].level, [(one.level, one.right, None) for one in shares]


def _find_worst(
    encoder: str, task: str, attribute: str, measure: str, reference: str, levels: Levels
) -> FairnessRow | None:
    """The lowest shown value; None where fewer than two levels are shown: one has nothing to differ from."""
    shown = [(level, estimate, gap) for level, estimate, gap in levels if estimate.value is not None]
    if len(shown) < 2:
        return None
    level, worst, gap = min(shown, key=lambda one: (one[1].value, one[0]))
    assert worst.value is not None, "only levels with a value are compared"
    beside = next((estimate.value for name, estimate, _ in shown if name == reference), None)
    return FairnessRow(
        encoder=encoder,
        task=task,
        attribute=attribute,
        measure=measure,
        worst_level=level,
        worst=worst.value,
        low=worst.low,
        high=worst.high,
        reference_level=reference,
        reference=beside,
        gap=None if beside is None or level == reference else worst.value - beside,
        p_adjusted=None if gap is None else gap.p_adjusted,
        num_levels=len(levels),
        num_hidden=len(levels) - len(shown),
    )


def list_left_out(summary: LeaderboardSummary, replicates: Mapping[str, Floats]) -> tuple[SiteRow, ...]:
    """List what it costs when the tested institution took no part in training: sections of leave_institution_out."""
    sections = [section for section in summary.sections if section.protocol == "leave_institution_out"]
    yardsticks = {(one.synthetic, one.label_fraction): one for one in sections if one.variant == YARDSTICK}
    rows: list[SiteRow] = []
    for section in sections:
        if section.variant == LEFT_OUT:
            other = yardsticks.get((section.synthetic, section.label_fraction))
            for row in section.rows:
                rows += _compare_left_out(section, row, other, replicates)
    return tuple(rows)


def _compare_left_out(
    section: Section, row: Row, other: Section | None, replicates: Mapping[str, Floats]
) -> list[SiteRow]:
    found = []
    for place, (task, cell) in enumerate(zip(section.tasks, row.cells, strict=True)):
        name, title = row.encoder.name, task.metric_title
        one = SiteRow(name, task.slug, "left_out", title, cell.value, cell.low, cell.high, reason=cell.reason)
        same = None if other is None else _find(other, row.encoder.name, task.slug)
        if other is not None and same is not None and cell.value is not None:
            theirs = other.rows[same[0]].cells[same[1]].value
            ours = replicates[section.slug][section.rows.index(row), place]
            difference = (ours - replicates[other.slug][same]) * (task.perfect - task.chance)
            interval = compute_interval(difference, task.num_test_groups)
            gap = None if theirs is None else cell.value - theirs
            one = replace(one, beside=theirs, gap=gap, gap_low=interval.low, gap_high=interval.high)
        found.append(one)
    return found


def _find(section: Section, encoder: str, slug: str) -> tuple[int, int] | None:
    """The place of a cell in a section, None where it has none."""
    rows = [place for place, row in enumerate(section.rows) if row.encoder.name == encoder]
    tasks = [place for place, task in enumerate(section.tasks) if task.slug == slug]
    return (rows[0], tasks[0]) if rows and tasks else None


def read_told(folders: Sequence[Path], summary: LeaderboardSummary) -> tuple[SiteRow, ...]:
    """Read how well features tell the institution from the folders that `panfm evaluate audit` wrote.

    Encoders are known by their hash: what is not on the board is left out. Raises UserError for a folder without an
    audit.json of this layout.
    """
    names = {row.encoder.hash: row.encoder.name for section in summary.sections for row in section.rows}
    rows = []
    for folder in folders:
        audit = _read_audit(Path(folder) / "audit.json")
        if audit["encoder_hash"] not in names:
            continue
        for signal in audit["site"]["signals"]:
            auroc = {name: signal["auroc"][name] for name in ("value", "low", "high", "reason")}
            rows.append(SiteRow(names[audit["encoder_hash"]], audit["task"], "told", signal["diagnosis"], **auroc))
    return tuple(sorted(rows, key=lambda row: (row.task, row.what, row.encoder)))


def _read_audit(path: Path) -> dict[str, Any]:
    values = read_json(path)
    version = values.get("audit_version") if isinstance(values, dict) else None
    if version != READ_AUDIT_VERSION:
        raise UserError(
            f"{path}: audit_version is {version!r}; the board reads version {READ_AUDIT_VERSION} of a task audit: run "
            "`panfm evaluate audit` again"
        )
    return dict(values)
