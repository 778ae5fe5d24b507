"""What was measured of an encoder, as parts of its model card: its rows on the board in; tables and metadata out.

Every number is the board's, in the board's own words and digits. Cells without one say why.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from panfm.board.reports.document import NOT_MEASURED, Block, Code, Heading, Paragraph, Points, Table
from panfm.board.reports.model_card_facts import CardFacts, Standing
from panfm.board.summary import Cell, Task
from panfm.board.task_pages import EncoderDetails, TaskPage
from panfm.board.words import (
    CONTAMINATION,
    describe_audit,
    describe_cell,
    describe_fraction,
    describe_gap,
    describe_method,
    describe_protocol,
    describe_rank,
    describe_score,
    describe_units,
    format_number,
    format_signed,
)
from panfm.measures.intervals import Estimate
from panfm.measures.subgroups import MIN_SHOWN_GROUPS, Difference, SubgroupLevel

# Families that the Hugging Face hub has a name for; it knows no other task of these.
HUB_TASKS = {
    "classification": "image-classification",
    "ordinal": "image-classification",
    "segmentation": "image-segmentation",
    "zero_shot": "zero-shot-image-classification",
}
DIGITS = 6


def describe_results(found: CardFacts) -> tuple[Block, ...]:
    """Results with their intervals, a table a protocol and share of labels; without Results, how to make them."""
    if found.summary is None:
        return (
            Paragraph(f"{NOT_MEASURED}: no Results were named for this card."),
            Paragraph("To measure the encoder beside random weights, and to write this card again:"),
            Code(
                "panfm evaluate run --encoder panfm:DIR --encoder panfm:DIR@random:0 --shards SHARDS --out results\n"
                "panfm report panfm:DIR --results results",
                "bash",
            ),
        )
    blocks: list[Block] = [
        Paragraph(
            "Brackets: 95 % interval; it holds the choice of test patients and, from 3 draws on, that of labelled "
            "ones. Random weights: an untrained encoder, where one was measured beside. p-values are adjusted for all "
            "comparisons of a task (Holm). † marks an interval that may not cover what it says; the reason stands "
            "below the table."
        )
    ]
    for group in _group(found):
        blocks += _describe_group(group)
    methods = sorted({
        describe_method(cell.method)
        for one in found.standings for cell in one.row.cells if cell.method is not None
    })  # fmt: skip
    return (*blocks, Heading("How the intervals were made"), Points(tuple(methods)))


def _group(found: CardFacts) -> list[list[Standing]]:
    """The standings by protocol and variant, real and synthetic images apart; the most labels first."""
    groups: dict[tuple[bool, str, str], list[Standing]] = {}
    for one in found.standings:
        groups.setdefault((one.section.synthetic, one.section.protocol, one.section.variant), []).append(one)
    return [sorted(group, key=lambda one: -one.section.label_fraction) for group in groups.values()]


def _describe_group(group: Sequence[Standing]) -> list[Block]:
    """One protocol: where it stands with the most labels, and every task; with fewer labels in a table to open."""
    first, *others = group
    section, row = first.section, first.row
    kind = "synthetic (drawn) images" if section.synthetic else "real images"
    place = (
        f"Rank {describe_rank(section, row)} of {sum(other.standing is not None for other in section.rows)} encoders, "
        f"mean score {describe_score(row)} (0 = chance, 1 = perfect)."
        if row.standing
        else f"No rank: {row.reason}."
    )
    beside = any(one.baseline is not None for one in group)
    more = ("Random weights", "Difference") if beside else ()
    heads = ("Task", "Metric", "Test set", "Labels", "This encoder", *more, "Runs")
    blocks: list[Block] = [Heading(f"{describe_protocol(section)}, {kind}"), Paragraph(place)]
    if not beside:
        blocks.append(Paragraph(f"{NOT_MEASURED}: random weights beside it."))
    blocks.append(Table(heads, tuple(_list_rows(first, beside))))
    if others:
        rows = tuple(line for one in others for line in _list_rows(one, beside))
        blocks.append(Table(heads, rows, caption="With fewer labels", folded=True))
    notes = dict.fromkeys(
        f"{task.title}: {note}."
        for one in group
        for task, cell in zip(one.section.tasks, one.row.cells, strict=True)
        for note in (cell.reason if cell.num_runs else None, cell.label_note)
        if note
    )
    return blocks + ([Points(tuple(notes))] if notes else [])


def _list_rows(standing: Standing, beside: bool) -> Iterable[tuple[str, ...]]:
    section, row, baseline = standing.section, standing.row, standing.baseline
    for place, (task, cell) in enumerate(zip(section.tasks, row.cells, strict=True)):
        if cell.num_runs == 0:
            continue
        theirs = None if baseline is None else baseline.cells[place]
        yield (
            f"{task.title}{'' if task.claim else ' (checks the pipeline only)'}",
            f"{task.metric_title} ({'higher' if task.higher_is_better else 'lower'} is better)",
            describe_units(task),
            describe_fraction(section.label_fraction),
            describe_cell(cell),
            *(_describe_beside(row is baseline, theirs, cell) if beside else ()),
            f"{cell.num_runs}",
        )


def _describe_beside(is_itself: bool, untrained: Cell | None, cell: Cell) -> tuple[str, str]:
    """What random weights reach on the same patients, and the difference."""
    if is_itself:
        return "this encoder", "–"
    if untrained is None or untrained.num_runs == 0:
        return NOT_MEASURED, NOT_MEASURED
    gap = cell.difference
    if gap is None or gap.difference is None:
        return describe_cell(untrained), "undefined"
    interval = "" if gap.low is None else f" [{format_signed(gap.low)}, {format_signed(gap.high)}]"
    return describe_cell(untrained), f"{format_signed(gap.difference)}{interval}; {describe_gap(gap)}"


def build_model_index(found: CardFacts) -> list[dict[str, Any]]:
    """The `model-index` of the Hugging Face metadata: of each protocol what was measured with the most labels.

    The standard has no field for an interval, a protocol or a share of labels, and wants numbers: the interval stands
    in the metric's name, the protocol in the task's; what is undefined, and smaller shares, stand in the card alone.
    """
    results = []
    for one, *_ in _group(found):
        for task, cell in zip(one.section.tasks, one.row.cells, strict=True):
            if cell.value is None:
                continue
            interval = "no 95 % interval"
            if cell.low is not None and cell.high is not None:
                interval = f"95 % interval {cell.low:.3f} to {cell.high:.3f}"
            results.append(
                {
                    "task": {"type": HUB_TASKS.get(task.family, "other"), "name": describe_protocol(one.section)},
                    "dataset": {
                        "type": task.name,
                        "name": f"{task.title}{' (synthetic images)' if task.synthetic else ''}",
                        "split": "test",
                    },
                    "metrics": [
                        {
                            "type": task.metric,
                            "value": round(cell.value, DIGITS),
                            "name": f"{task.metric_title}, {interval}",
                        }
                    ],
                }
            )
    return [{"name": found.name, "results": results}] if results else []


def describe_contamination(found: CardFacts) -> tuple[Block, ...]:
    """Whether test images may have been seen in pretraining, by task, as recorded and as an audit found."""
    if found.summary is None:
        kept = ", ".join(found.facts.excluded_tasks) if found.facts else ""
        if not kept:
            return (Paragraph("not recorded: which test patients were kept out of pretraining."),)
        return (
            Paragraph(f"Test groups of these tasks were kept out of pretraining: {kept}."),
            Paragraph(f"{NOT_MEASURED}: no Results were held against an audit."),
        )
    words: dict[str, tuple[str, str]] = {}
    for one in found.standings:
        for task, cell in zip(one.section.tasks, one.row.cells, strict=True):
            if cell.num_runs:
                audited = describe_audit(cell)
                words.setdefault(
                    task.title, (CONTAMINATION[cell.contamination], audited[1] if audited else "not measured: no audit")
                )
    rows = tuple((title, *both) for title, both in words.items())
    return (Table(("Task", "As recorded", "As an audit found"), rows),)


def describe_subgroups(found: CardFacts) -> tuple[Block, ...]:
    """Tables by phototype, age, sex, ... from the pages of the tasks, at one threshold for everybody."""
    blocks: list[Block] = []
    for page, details in found.details:
        tables = [*_list_tables(details), *_list_shares(details)]
        if tables:
            blocks += [Heading(f"{page.task.title}: {_describe_page(page, details)}"), *tables]
    if not blocks:
        missing = "no Results were named" if found.summary is None else "no Result here carries subgroups"
        return (Paragraph(f"{NOT_MEASURED}: {missing}."),)
    intro = (
        f"One threshold for everybody. Figures of fewer than {MIN_SHOWN_GROUPS} patients, lesions or slides are not "
        "shown, nor their counts. A difference between levels is not a cause: they differ in which diagnoses they hold."
    )
    return Paragraph(intro), *blocks


def _describe_page(page: TaskPage, details: EncoderDetails) -> str:
    if not details.subgroups:
        return "share of images whose most probable class is right"
    threshold = (
        "0.5" if details.common is None else f"that gave {details.common.wanted:.0%} {details.common.side} in training"
    )
    return f"{page.positive} or not, threshold {threshold}"


def _list_tables(details: EncoderDetails) -> Iterable[Table]:
    for name, table in details.subgroups.items():
        rows = [
            (
                f"{level.level.replace('_', ' ')}{' (compared with)' if level.level == table.reference else ''}",
                _count(level.num_positive, level.num_positive_groups),
                _count(level.num_negative, level.num_negative_groups),
                _estimate(level.sensitivity),
                _difference(level, "sensitivity"),
                _estimate(level.specificity),
                _difference(level, "specificity"),
            )
            for level in table.levels
        ]
        heads = ("Level", "Positive", "Negative", "Sensitivity", "Difference", "Specificity", "Difference")
        yield Table(heads, tuple(rows), caption=_title(name))


def _list_shares(details: EncoderDetails) -> Iterable[Table]:
    for name, levels in details.shares.items():
        rows = [
            (one.level.replace("_", " "), _count(one.num_units, one.num_groups), _estimate(one.right)) for one in levels
        ]
        yield Table(("Level", "Images (groups)", "Right"), tuple(rows), caption=_title(name))


def _title(name: str) -> str:
    return f"By {name.replace('_', ' ')}"


def _count(number: int, num_groups: int) -> str:
    return f"fewer than {MIN_SHOWN_GROUPS} groups" if num_groups < MIN_SHOWN_GROUPS else f"{number} ({num_groups})"


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return "not shown" if (estimate.reason or "").startswith("not shown") else f"undefined: {estimate.reason}"
    if estimate.low is None or estimate.high is None:
        return format_number(estimate.value)
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _difference(level: SubgroupLevel, name: str) -> str:
    found: Difference | None = getattr(level, f"{name}_difference")
    if found is None or found.value is None:
        return "–"
    return f"{format_signed(found.value)}" + (
        "" if found.p_adjusted is None else f"; p = {found.p_adjusted:.2f}, adjusted"
    )


def list_tasks(found: CardFacts) -> Sequence[tuple[Task, Cell]]:
    """Every task that was measured, with the first of its cells on the board."""
    first: dict[str, tuple[Task, Cell]] = {}
    for one in found.standings:
        for task, cell in zip(one.section.tasks, one.row.cells, strict=True):
            if cell.num_runs:
                first.setdefault(task.slug, (task, cell))
    return list(first.values())
