"""The methods of a paper in sentences, every number from Results and the board: PaperFacts in, paragraphs out."""

import json
from collections import defaultdict
from collections.abc import Iterable

from panfm.board.reports.document import NOT_RECORDED, Block, Heading, Paragraph, Points, Table
from panfm.board.reports.paper_facts import PaperFacts
from panfm.board.words import METHODS, PROTOCOLS, describe_method, describe_units
from panfm.evaluation.results import Result
from panfm.evaluation.tasks import CommittedSplit, NestedSplit, OfficialSplit, RuleSplit, TaskCard
from panfm.measures.draws import MIN_DRAWS
from panfm.measures.intervals import MIN_AREA_GROUPS, MIN_PROPORTION_GROUPS
from panfm.measures.statistics import FEW_GROUPS, NUM_REPLICATES


def describe_methods(found: PaperFacts) -> tuple[Block, ...]:
    """Data, splits, encoders, protocols, metrics, intervals and multiplicity."""
    return (
        Heading("Data and splits"),
        Paragraph(_describe_data(found)),
        Table(("Task", "Source", "Test set", "Unit that no split cuts", "Split", "Split hash"),
              tuple(_list_splits(found)), name="splits"),
        Heading("Protocols"),
        Paragraph(
            "Encoders were frozen unless the protocol is fine-tuning; each was fed by its own evaluation transform. "
            "Settings were chosen within the training part alone. A label fraction is a share of training patients "
            "(groups), not of images."
        ),
        Table(("Protocol", "Label fractions", "Draws of labels", "Seeds", "Results", "Settings"),
              tuple(_list_protocols(found.results)), name="protocols"),
        Heading("Metrics"),
        Points(tuple(dict.fromkeys(
            f"{one.task.metric_title} ({'higher' if one.task.higher_is_better else 'lower'} is better): "
            f"{one.task.metric_description}" for one in found.tasks
        ))),
        Heading("Intervals and comparisons"),
        *map(Paragraph, _describe_statistics(found)),
    )  # fmt: skip


def _describe_data(found: PaperFacts) -> str:
    sources = sorted({one.card.source for one in found.tasks if one.card})
    named = f"from the sources {', '.join(sources)} " if sources else ""
    return (
        f"{len(found.tasks)} tasks {named}were measured. Shards carry hashed identifiers and images without embedded "
        "metadata. Groups (patients, else lesions, else slides) lie in one fold each, and all intervals resample or "
        "sum whole groups."
    )


def _list_splits(found: PaperFacts) -> Iterable[tuple[str, ...]]:
    for one in found.tasks:
        hashes = sorted({result.split_hash[:12] for result in one.results})
        yield (
            one.task.title,
            one.card.source if one.card else NOT_RECORDED,
            describe_units(one.task),
            one.task.group_kind if one.task.group_kind != "sample" else "image (patients unknown)",
            _describe_split(one.card),
            ", ".join(hashes),
        )


def _describe_split(card: TaskCard | None) -> str:
    if card is None:
        return NOT_RECORDED
    split = card.split
    if isinstance(split, CommittedSplit):
        return "fixed list of images, published with panfm"
    if isinstance(split, OfficialSplit):
        return "the source's own"
    if isinstance(split, RuleSplit):
        return f"by a hash of the group: {split.test_share:.0%} test, {split.val_share:.0%} validation"
    assert isinstance(split, NestedSplit), split
    return f"cross-validation by group: {split.folds} folds, {split.repeats} repeats"


def _list_protocols(results: Iterable[Result]) -> Iterable[tuple[str, ...]]:
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.protocol, result.variant].append(result)
    for (protocol, variant), those in sorted(groups.items()):
        known = [one.settings["recipe"] for one in those if "recipe" in one.settings]
        recipes = sorted({json.dumps(recipe, sort_keys=True) for recipe in known})
        draws: dict[float, set[int]] = defaultdict(set)
        for one in those:
            draws[one.label_fraction].add(one.draw)
        yield (
            PROTOCOLS.get(protocol, protocol) + ("" if variant == "default" else f" ({variant.replace('_', ' ')})"),
            ", ".join(f"{fraction * 100:g} %" for fraction in sorted(draws)),
            ", ".join(f"{len(draws[fraction])}" for fraction in sorted(draws)),
            f"{len({one.seed for one in those})}",
            f"{len(those):,}",
            _describe_recipes(recipes),
        )


def _describe_recipes(recipes: list[str]) -> str:
    if not recipes:
        return NOT_RECORDED
    if len(recipes) > 1:
        return f"{len(recipes)} settings, in the Results"
    values = {name: value for name, value in json.loads(recipes[0]).items() if name != "variant"}
    return ", ".join(f"{name.replace('_', ' ')} {_say(value)}" for name, value in values.items()) or "none to choose"


def _say(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "default" if value is None else str(value)


def _describe_statistics(found: PaperFacts) -> Iterable[str]:
    cells = [cell for section in found.board.summary.sections for row in section.rows for cell in row.cells]
    methods = sorted({cell.method for cell in cells if cell.method is not None})
    numbers = sorted({str(one.settings["num_replicates"]) for one in found.results if "num_replicates" in one.settings})
    made = "; ".join(describe_method(method) for method in methods)
    yield (
        f"Values are means over draws and seeds. 95 % intervals: {made or NOT_RECORDED}. Bootstrap resamples "
        f"({NUM_REPLICATES:,} of whole groups on the board; {', '.join(numbers) or 'a number that is not recorded'} in "
        "the Results) are shared by all encoders of a task, so that differences are paired by patient."
    )
    outside = sum(cell.method is not None and cell.reason is not None for cell in cells)
    yield (
        f"An interval counts as trustworthy from {FEW_GROUPS} groups in the rarer class on by percentiles, from "
        f"{MIN_AREA_GROUPS} by DeLong's variance, from {MIN_PROPORTION_GROUPS} for a proportion; {outside} of "
        f"{sum(cell.method is not None for cell in cells)} intervals here lie outside of the regime in which they "
        f"were shown to cover and carry †. From {MIN_DRAWS} draws on an interval also holds the choice of labelled "
        "patients."
    )
    references = sorted({section.reference for section in found.board.summary.sections if section.reference})
    compared = sum(cell.difference is not None and cell.difference.p_value is not None for cell in cells)
    tests = sorted({
        cell.difference.method.partition("+")[0]
        for cell in cells if cell.difference is not None and cell.difference.method is not None
    })  # fmt: skip
    if references:
        yield (
            f"Every encoder was compared with {', '.join(references)} on the same patients "
            f"({'; '.join(METHODS.get(test, test) for test in tests) or 'no test could be made'}). {compared} "
            "two-sided p-values; within each task, protocol and share of labels they were adjusted for the number of "
            "encoders by Holm's method. Across tasks, protocols and shares nothing was adjusted."
        )
    yield (
        "Ranks: an encoder's rank is one more than the number of encoders whose mean score (0 chance, 1 perfect) is "
        "higher with 97.5 % of the shared resamples; encoders that lack a task have none. Subgroup differences on the "
        "pages of the tasks were tested by permuting whole groups and adjusted by Holm's method within each table."
    )
