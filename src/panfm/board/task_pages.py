"""What a task's own page tells of its encoders: test sets of one section in, tables behind the one number out.

    each encoder's test set --every metric recomputed--> metrics with their intervals
        two classes --thresholds chosen in training--> operating points      --probabilities--> calibration, net benefit
        subgroups of the predictions, one common threshold --> tables with differences to a reference level
        how the diagnosis was confirmed --> all on histology, specificity by type
        curves, what was taken for what, surest mistakes, provenance --> task_curves, task_confusion, task_errors, ...

One section is detailed, the ranked protocol at the most labels; of each encoder its first draw and seed, as a threshold
and a calibration belong to one fitted classifier. The reference level is the one that the card declares, else the one
that most test groups have: that is found without a look at any score. Figures of few groups are not shown
(`subgroups.MIN_SHOWN_GROUPS`), nor their counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.board.summary import Task, choose_reference
from panfm.board.task_confusion import ConfusionRow, build_confusion
from panfm.board.task_curves import Curves, build_curves
from panfm.board.task_errors import Mistake, find_mistakes
from panfm.board.task_provenance import Provenance, describe_provenance
from panfm.board.verify import SAME_VALUE, TestSet
from panfm.errors import UserError
from panfm.evaluation.operating import read_thresholds
from panfm.evaluation.results import MetricValue, Result
from panfm.evaluation.subgroup_columns import OTHER
from panfm.measures.by_family import compute_point, describe_metric
from panfm.measures.calibration import Calibration, ReliabilityBin, build_reliability_table, estimate_calibration
from panfm.measures.comparisons import McNemar, adjust_holm, compare_mcnemar
from panfm.measures.intervals import Estimate, estimate_proportion
from panfm.measures.metrics import PROBABILITY_TOLERANCE
from panfm.measures.operating_points import (
    DecisionCurve,
    OperatingPoint,
    Threshold,
    compute_decision_curve,
    measure_operating_point,
)
from panfm.measures.subgroups import (
    MIN_SHOWN_GROUPS,
    ConfirmationTable,
    SubgroupTable,
    compare_confirmation,
    compare_subgroups,
)
from panfm.measures.survival import StepCurve, compute_event_free

# Families whose scores are probabilities of the card's classes.
PROBABILITY_FAMILIES = frozenset({"classification", "ordinal", "change", "slides", "zero_shot"})
NUM_CALIBRATION_REPLICATES = 500  # each is a fit; 500 percentiles of a slope differ from 2,000 in the third digit
COMMON = ("sensitivity", 0.90)  # the threshold of the subgroup tables: missing one melanoma of ten in training
EVEN = 0.5  # the threshold where none was chosen in training: the more probable class


@dataclass(frozen=True)
class MetricLine:
    """One metric of one encoder, as its Result states it and its predictions confirm it."""

    name: str
    title: str
    description: str
    value: MetricValue


@dataclass(frozen=True)
class LevelShare:
    """A level of an attribute in a task of several classes: the share of its units whose top class is right."""

    level: str
    num_units: int
    num_groups: int
    right: Estimate


@dataclass(frozen=True)
class FollowUp:
    """The test patients on both sides of a cut-off that training chose: Kaplan-Meier curves, and how many they are.

    low, high: by risk; None where a side has fewer than MIN_SHOWN_GROUPS groups, which `reason` says.
    """

    cut_off: float
    num_low: int
    num_high: int
    low: StepCurve | None
    high: StepCurve | None
    reason: str | None


@dataclass(frozen=True)
class EncoderDetails:
    """One encoder on the page. What a task has no use for is empty or None."""

    encoder: str
    metrics: tuple[MetricLine, ...]
    operating_points: tuple[OperatingPoint, ...]
    common: Threshold | None  # of the subgroup tables; None: EVEN
    calibration: Calibration | None
    reliability: tuple[ReliabilityBin, ...]
    curve: DecisionCurve | None
    subgroups: Mapping[str, SubgroupTable]  # two classes
    shares: Mapping[str, tuple[LevelShare, ...]]  # more classes
    confirmation: ConfirmationTable | None
    follow_up: FollowUp | None = None  # survival
    curves: Curves | None = None  # two classes
    confusion: tuple[ConfusionRow, ...] = ()
    mistakes: tuple[Mistake, ...] = ()  # shown with images only, where the user asks for them
    provenance: Provenance | None = None


@dataclass(frozen=True)
class RightMore:
    """An encoder against the reference by which units it is right on; p-values by McNemar, adjusted by Holm."""

    encoder: str
    found: McNemar
    p_adjusted: float | None


@dataclass(frozen=True)
class TaskPage:
    """A task with its encoders in one section."""

    task: Task
    protocol: str
    variant: str
    label_fraction: float
    encoders: tuple[EncoderDetails, ...]
    positive: str | None  # the class that is looked for, in a task of two
    prevalence: float | None
    notes: tuple[str, ...]  # what was left out of the test set or of the page, in words
    licence: str | None
    citation: str | None
    caution: str | None  # the card's own note
    reference: str | None = None  # the encoder that `right_more` compares with
    right_more: tuple[RightMore, ...] = ()
    source: str | None = None  # name of its shard set; None: a task of the user's own folder


def build_task_page(
    task: Task,
    facts: Mapping[str, str | None],
    test_sets: Sequence[TestSet],
    seed: int,
    runs: Mapping[str, Sequence[Result]] | None = None,
) -> TaskPage:
    """Build the page of a task from one test set an encoder, all of one section.

    facts: licence, citation, note and source of the card, where there is one. seed: of
    `statistics.compute_bootstrap_seed`. runs: all Results of each encoder's cell, by name; None: there is one.

    Raises UserError for a Result one of whose metrics does not follow from its predictions.
    """
    first = test_sets[0]
    binary = len(task.classes) == 2 and _has_probabilities(first)
    source = facts.get("source")
    notes = [str(note) for note in first.result.settings.get("split_notes", ())]
    for name, levels in first.subgroups.items():
        known = {level for level in levels if level is not None}
        if len(known) < 2:
            what = f"all test {task.unit}s with a known one are {next(iter(known))}" if known else "unknown throughout"
            notes.append(f"no subgroups by {name.replace('_', ' ')}: {what}")
    return TaskPage(
        task=task,
        protocol=first.result.protocol,
        variant=first.result.variant,
        label_fraction=first.result.label_fraction,
        encoders=tuple(
            _look_closer(
                _describe_encoder(test_set, binary, seed),
                test_set,
                binary,
                describe_provenance((runs or {}).get(test_set.result.encoder.name, [test_set.result]), source),
            )
            for test_set in test_sets
        ),
        positive=task.classes[1] if binary else None,
        prevalence=float((first.labels == 1).mean()) if binary and len(first.labels) else None,
        notes=tuple(notes),
        licence=facts.get("licence"),
        citation=facts.get("citation"),
        caution=facts.get("note"),
        source=source,
        **_compare_right(test_sets),
    )


def _compare_right(test_sets: Sequence[TestSet]) -> dict[str, Any]:
    """McNemar's test of every encoder against the reference, where each unit is a group of its own; else nothing."""
    first = test_sets[0]
    independent = len(np.unique(first.groups)) == len(first.groups)
    if len(test_sets) < 2 or not independent or not _has_probabilities(first):
        return {}
    reference = choose_reference({one.result.encoder.name: one.result.encoder for one in test_sets})
    right = {one.result.encoder.name: one.scores.argmax(axis=1) == one.labels for one in test_sets}
    assert reference is not None, "two encoders have a reference"
    others = [name for name in right if name != reference]
    found = [compare_mcnemar(right[name], right[reference], first.groups) for name in others]
    adjusted = adjust_holm([one.p_value for one in found])
    lines = tuple(RightMore(*line) for line in zip(others, found, adjusted, strict=True))
    return {"reference": reference, "right_more": lines}


def _describe_encoder(test_set: TestSet, binary: bool, seed: int) -> EncoderDetails:
    result, labels, groups = test_set.result, test_set.labels, test_set.groups
    metrics = _confirm_metrics(test_set)
    if not _has_probabilities(test_set) or len(labels) == 0:
        follow_up = _follow_up(test_set) if result.family == "survival" else None
        return EncoderDetails(result.encoder.name, metrics, (), None, None, (), None, {}, {}, None, follow_up)
    if not binary:
        top = test_set.scores.argmax(axis=1)
        reliability = build_reliability_table(test_set.scores.max(axis=1), top == labels, groups)
        shares = {name: _compute_shares(top == labels, groups, test_set.subgroups[name]) for name in _choose(test_set)}
        return EncoderDetails(result.encoder.name, metrics, (), None, None, reliability, None, {}, shares, None)
    probability = test_set.scores[:, 1]
    thresholds = read_thresholds(result.settings)
    common = next((one for one in thresholds if (one.side, one.wanted) == COMMON and one.value is not None), None)
    threshold = EVEN if common is None or common.value is None else common.value
    both = len(np.unique(labels)) == 2
    tables = {
        name: compare_subgroups(
            labels,
            probability,
            groups,
            test_set.subgroups[name],
            threshold=threshold,
            reference=find_reference(
                test_set.subgroups[name], groups, declared=result.settings.get("references", {}).get(name)
            ),
            seed=seed,
            case_mix={other: test_set.subgroups[other] for other in _choose(test_set) if other != name},
            num_replicates=NUM_CALIBRATION_REPLICATES,
        )
        for name in (_choose(test_set) if both else ())
        if name != "confirmed_by"
    }
    confirmation = None
    if both and "confirmed_by" in _choose(test_set):
        names = [name for name in ("auroc", "auprc", "balanced_accuracy") if name in result.metrics]
        confirmation = compare_confirmation(
            names,
            labels,
            test_set.scores,
            groups,
            test_set.subgroups["confirmed_by"],
            threshold=threshold,
            seed=seed,
        )
    return EncoderDetails(
        encoder=result.encoder.name,
        metrics=metrics,
        operating_points=tuple(measure_operating_point(one, labels, probability, groups) for one in thresholds),
        common=common,
        calibration=estimate_calibration(
            labels, probability, groups, seed=seed, num_replicates=NUM_CALIBRATION_REPLICATES
        ),
        reliability=build_reliability_table(probability, labels == 1, groups),
        curve=compute_decision_curve(labels, probability, groups, seed=seed),
        subgroups=tables,
        shares={},
        confirmation=confirmation,
    )


def _look_closer(details: EncoderDetails, test_set: TestSet, binary: bool, provenance: Provenance) -> EncoderDetails:
    """Add what is drawn image by image: curves, what was taken for what, mistakes; and where all of it comes from."""
    result, labels, scores, groups = test_set.result, test_set.labels, test_set.scores, test_set.groups
    details = replace(details, provenance=provenance)
    if not _has_probabilities(test_set) or len(labels) == 0 or scores.shape[1] != len(result.classes):
        return details
    keyed = result.unit.startswith("image")  # other keys are no keys of images
    return replace(
        details,
        curves=build_curves(labels, scores[:, 1], groups) if binary else None,
        confusion=build_confusion(labels, scores.argmax(axis=1), groups.tolist(), result.classes),
        mistakes=find_mistakes(test_set.keys.tolist(), labels, scores, groups.tolist(), result.classes)
        if keyed
        else (),
    )


def _follow_up(test_set: TestSet) -> FollowUp | None:
    """Split the test patients by the cut-off of training; None where training chose none."""
    cut_off = test_set.result.settings.get("chosen", {}).get("cut_off")
    if cut_off is None:
        return None
    is_high = test_set.scores[:, 0] > cut_off
    days, events = test_set.outcome.targets.T
    counts = [len(np.unique(test_set.groups[side])) for side in (~is_high, is_high)]
    if min(counts) < MIN_SHOWN_GROUPS:
        reason = f"not shown: {min(counts)} patients on one side, at least {MIN_SHOWN_GROUPS} are needed"
        return FollowUp(cut_off, counts[0], counts[1], None, None, reason)
    low, high = (compute_event_free(days[side], events[side]) for side in (~is_high, is_high))
    return FollowUp(cut_off, counts[0], counts[1], low, high, None)


def find_reference(levels: Sequence[str | None], groups: NDArray[np.str_], declared: str | None = None) -> str:
    """Find the level that the others are compared with: the declared one where a test unit has it.

    Else the one that most groups have, the first by name of equals.
    """
    if declared in levels and declared is not None:
        return declared
    sizes: dict[str, set[str]] = {}
    for level, group in zip(levels, groups.tolist(), strict=True):
        if level is not None:
            sizes.setdefault(level, set()).add(group)
    return min(sizes, key=lambda level: (level == OTHER, -len(sizes[level]), level))


def _choose(test_set: TestSet) -> list[str]:
    """The attributes with at least two levels, in the card's order."""
    return [
        name for name, levels in test_set.subgroups.items() if len({level for level in levels if level is not None}) > 1
    ]


def _has_probabilities(test_set: TestSet) -> bool:
    scores = test_set.scores
    return (
        test_set.result.family in PROBABILITY_FAMILIES
        and scores.shape[1] > 1
        and bool((scores >= 0).all())
        and bool((np.abs(scores.sum(axis=1) - 1) < PROBABILITY_TOLERANCE).all())
    )


def _confirm_metrics(test_set: TestSet) -> tuple[MetricLine, ...]:
    """All metrics of the Result; each must follow from the predictions."""
    result, lines = test_set.result, []
    for name, stored in result.metrics.items():
        point = compute_point(result.family, name, test_set.outcome)
        same = (stored.value is None) == (point.value is None)
        if not same or (stored.value is not None and abs(stored.value - (point.value or 0.0)) > SAME_VALUE):
            raise UserError(
                f"{test_set.path}: {name} is {stored.value}, but {point.value} follows from its predictions; "
                "the file was changed or is of another version, run `panfm evaluate run` again"
            )
        described = describe_metric(result.family, name)
        lines.append(MetricLine(name, described.title, described.description, stored))
    return tuple(lines)


def _compute_shares(
    right: NDArray[np.bool_], groups: NDArray[np.str_], levels: Sequence[str | None]
) -> tuple[LevelShare, ...]:
    found = []
    for level in sorted({level for level in levels if level is not None}):
        inside = np.array([one == level for one in levels], dtype=bool)
        num_groups = len(np.unique(groups[inside]))
        hidden = f"not shown: {num_groups} groups, at least {MIN_SHOWN_GROUPS} are needed"
        estimate = (
            estimate_proportion(right[inside], groups[inside])
            if num_groups >= MIN_SHOWN_GROUPS
            else Estimate(None, None, None, hidden)
        )
        found.append(LevelShare(level, int(inside.sum()), num_groups, estimate))
    return tuple(sorted(found, key=lambda share: (-share.num_groups, share.level)))
