"""Subgroups: does one threshold mean the same for everybody? One attribute's levels in, a table with differences out.

    labels, probabilities, groups, levels [N], ONE threshold
        --a level--> sensitivity, specificity, calibration, each with n positive, n negative and interval, case mix
        --level against the declared reference--> difference, p-value (whole groups permuted), Holm over the table

A level is a value of phototype, age band, sex, anatomic site, institution, device, modality or confirmation type; None
is unknown, counted and left out. A group may hold images of several levels (one patient, many anatomic sites). The
permutation test exchanges levels between whole groups and never cuts one. What it replaces: a bootstrap of the largest
minus the smallest level excludes zero nearly always, also where all levels are alike.

A difference is not a cause: levels differ in what they are made of (more melanomas, fewer biopsies), so the case mix
stands beside every level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.errors import UserError
from panfm.measures.calibration import Calibration, estimate_calibration
from panfm.measures.comparisons import adjust_holm
from panfm.measures.intervals import (
    MIN_PROPORTION_GROUPS,
    Estimate,
    estimate_mean,
    estimate_proportion,
    number_groups,
    sum_by_group,
)
from panfm.measures.statistics import NUM_REPLICATES, estimate_metrics

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# A figure is shown from this many groups on that have images of its class. Below, its interval is outside the regime in
# which it was shown to cover, spans 40 percentage points and more, and a level of a handful of patients points at them.
MIN_SHOWN_GROUPS = MIN_PROPORTION_GROUPS
NUM_PERMUTATIONS = 2000
MAX_PERMUTED_VALUES = 4_000_000  # permutations x groups held at once: 32 MB


@dataclass(frozen=True)
class Difference:
    """A level's value minus the reference level's, and the p-value of 'levels are exchangeable between groups'."""

    value: float | None
    p_value: float | None
    p_adjusted: float | None = None  # Holm over all differences of the table
    reason: str | None = None


@dataclass(frozen=True)
class SubgroupLevel:
    """One level of an attribute. What is not shown is None with the reason; the counts are always there."""

    level: str
    num_positive: int
    num_negative: int
    num_positive_groups: int
    num_negative_groups: int
    prevalence: float
    case_mix: Mapping[str, Mapping[str, float]]  # column -> value -> share of the level's images
    sensitivity: Estimate
    specificity: Estimate
    calibration: Calibration
    calibration_gap: Estimate  # share of positives minus mean probability
    sensitivity_difference: Difference | None  # to the reference level; None at the reference itself
    specificity_difference: Difference | None
    calibration_gap_difference: Difference | None


@dataclass(frozen=True)
class SubgroupTable:
    """All levels of an attribute at one threshold, the reference first, then by number of images."""

    threshold: float
    reference: str
    levels: tuple[SubgroupLevel, ...]
    num_unknown: int  # images without a level, in no row of the table


@dataclass(frozen=True)
class ConfirmationTable:
    """Performance by how the diagnosis was confirmed: everything on histology, specificity alone by type.

    Malignant images are nearly all confirmed by histology (in HAM10000 every melanoma is, and all follow-up is naevus),
    so a sensitivity or an AUROC by type would compare histology with nothing.
    """

    histology: Mapping[str, Estimate]
    num_histology: int
    specificity: Mapping[str, Estimate]  # type -> specificity at the threshold
    num_negative: Mapping[str, int]
    num_unknown: int


def compare_subgroups(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    levels: Sequence[str | None],
    *,
    threshold: float,
    reference: str,
    seed: int,
    case_mix: Mapping[str, Sequence[str | None]] | None = None,
    num_replicates: int = NUM_REPLICATES,
    num_permutations: int = NUM_PERMUTATIONS,
) -> SubgroupTable:
    """Compare the levels of one attribute at one common threshold (positive where the probability reaches it).

    labels: [N], 1 = positive. probabilities: [N] of that class. groups: [N]. levels: [N], None = unknown. reference:
    the level that the others are compared with, declared before looking. case_mix: columns [N] whose shares are stated.

    Raises UserError if no image has the reference level.
    """
    positive, probability = np.asarray(labels) == 1, np.asarray(probabilities, dtype=np.float64)
    level = np.array(["" if value is None else value for value in levels], dtype=np.str_)
    known = np.array([value is not None for value in levels], dtype=bool)
    names, counts = np.unique(level[known], return_counts=True)
    if reference not in names:
        raise UserError(f"reference level {reference!r}: no image has it; levels with images: {', '.join(names)}")
    called = probability >= threshold
    number, _ = number_groups(groups)
    order = [reference, *(str(name) for name in names[np.lexsort((names, -counts))] if name != reference)]
    rows: list[SubgroupLevel] = []
    for place, name in enumerate(order):
        inside = known & (level == name)
        row = _describe_level(name, inside, positive, probability, called, number, case_mix or {}, seed, num_replicates)
        if place > 0:
            row = _add_differences(
                row,
                rows[0],
                inside,
                known & (level == reference),
                positive,
                probability,
                called,
                number,
                np.random.default_rng([seed, place]),
                num_permutations,
            )
        rows.append(row)
    return SubgroupTable(threshold, reference, _adjust(rows), int((~known).sum()))


def compare_confirmation(
    names: Sequence[str],
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    confirmed_by: Sequence[str | None],
    *,
    threshold: float,
    seed: int,
    histology: str = "histopathology",
    num_replicates: int = NUM_REPLICATES,
) -> ConfirmationTable:
    """Measure `names` (of `metrics`) on images confirmed by histology, and specificity by confirmation type.

    labels: [N], 1 = positive. scores: [N, 2]. threshold: on scores[:, 1]. confirmed_by: [N], None = unknown.
    """
    label, score, group = np.asarray(labels), np.asarray(scores, dtype=np.float64), np.asarray(groups)
    kind = np.array(["" if value is None else value for value in confirmed_by], dtype=np.str_)
    known = np.array([value is not None for value in confirmed_by], dtype=bool)
    proven = known & (kind == histology)
    estimates = estimate_metrics(
        names, label[proven], score[proven], group[proven], seed=seed, num_replicates=num_replicates
    )
    specificity, num_negative = {}, {}
    for name in np.unique(kind[known]).tolist():
        inside = known & (kind == name) & (label == 0)
        specificity[name] = _show_proportion(score[inside, 1] < threshold, group[inside], "negative")
        num_negative[name] = int(inside.sum())
    return ConfirmationTable(estimates, int(proven.sum()), specificity, num_negative, int((~known).sum()))


def permute_groups(
    values: ArrayLike,
    groups: ArrayLike,
    in_level: ArrayLike,
    *,
    generator: np.random.Generator,
    num_permutations: int = NUM_PERMUTATIONS,
) -> float:
    """Test that a mean is the same in a level and in the reference: two-sided p-value, whole groups permuted.

    values: [N], one a row of the two levels (found or not, ...). groups: [N]. in_level: [N] bool, else reference.

    Groups with rows of one level alone exchange it among each other; a group with both levels swaps its two parts or
    not. The difference of means is divided by its clustered standard error under every permutation, so that levels
    whose groups differ in size or spread keep the test's level too (Janssen 1997; Chung and Romano 2013).
    """
    value, inside = np.asarray(values, dtype=np.float64), np.asarray(in_level, dtype=bool)
    number, G = number_groups(groups)
    parts = [  # of each group in the level and in the reference: number of rows [2, G], sum of values [2, G]
        np.stack([sum_by_group(rows[side], number[side], G) for side in (inside, ~inside)])
        for rows in (np.ones(len(value)), value)
    ]
    sizes, sums = parts
    single = np.flatnonzero((sizes == 0).any(axis=0))
    own = sizes[0] > 0  # of a single group: is it in the level
    observed = _studentise(sizes, sums, np.zeros((1, G), dtype=bool))[0]
    num_beyond = 0
    block = max(1, MAX_PERMUTED_VALUES // max(1, G))
    for start in range(0, num_permutations, block):
        size = min(block, num_permutations - start)
        swapped = generator.random((size, G)) < 0.5
        # A single group is swapped to the other side where its drawn level is not its own.
        drawn = generator.permuted(np.broadcast_to(own[single], (size, len(single))), axis=1)
        swapped[:, single] = drawn != own[single]
        statistic = _studentise(sizes, sums, swapped)
        num_beyond += int((np.abs(statistic) >= abs(observed) * (1 - 1e-9)).sum())
    return (num_beyond + 1) / (num_permutations + 1)


def _studentise(sizes: Floats, sums: Floats, swapped: Bools) -> Floats:
    """Difference of means over its clustered standard error, the groups of `swapped` [P, G] changing sides: [P]."""
    difference, variance = np.zeros(len(swapped)), np.zeros(len(swapped))
    for side, sign in ((0, 1), (1, -1)):
        # Sums over groups of 1, n, s, n^2, n s, s^2 on this side, all by one matrix product.
        n, s, n_other, s_other = sizes[side], sums[side], sizes[1 - side], sums[1 - side]
        stays = np.stack([n > 0, n, s, n * n, n * s, s * s], axis=1)
        comes = np.stack([n_other > 0, n_other, s_other, n_other**2, n_other * s_other, s_other**2], axis=1)
        totals = stays.sum(axis=0) + swapped.astype(np.float64) @ (comes - stays)
        groups, N, S, nn, ns, ss = totals.T
        mean = np.divide(S, N, out=np.zeros_like(S), where=N > 0)
        errors = np.maximum(ss - 2 * mean * ns + mean**2 * nn, 0)
        variance += errors / np.maximum(N, 1) ** 2 * groups / np.maximum(groups - 1, 1)
        difference += sign * mean
    return np.asarray(difference / np.sqrt(variance + 1e-12))


def _describe_level(
    name: str,
    inside: Bools,
    positive: Bools,
    probability: Floats,
    called: Bools,
    number: NDArray[np.int64],
    case_mix: Mapping[str, Sequence[str | None]],
    seed: int,
    num_replicates: int,
) -> SubgroupLevel:
    found, missed = inside & positive, inside & ~positive
    num_positive_groups, num_negative_groups = len(np.unique(number[found])), len(np.unique(number[missed]))
    few = _explain_hidden(num_positive_groups, "positive") or _explain_hidden(num_negative_groups, "negative")
    hidden = Estimate(None, None, None, few)
    return SubgroupLevel(
        level=name,
        num_positive=int(found.sum()),
        num_negative=int(missed.sum()),
        num_positive_groups=num_positive_groups,
        num_negative_groups=num_negative_groups,
        prevalence=float(positive[inside].mean()),
        case_mix={column: _share(values, inside) for column, values in case_mix.items()},
        sensitivity=_show_proportion(called[found], number[found], "positive"),
        specificity=_show_proportion(~called[missed], number[missed], "negative"),
        calibration=Calibration(hidden, hidden)
        if few
        else estimate_calibration(
            positive[inside], probability[inside], number[inside], seed=seed, num_replicates=num_replicates
        ),
        calibration_gap=hidden if few else estimate_mean(positive[inside] - probability[inside], number[inside]),
        sensitivity_difference=None,
        specificity_difference=None,
        calibration_gap_difference=None,
    )


def _add_differences(
    row: SubgroupLevel,
    reference: SubgroupLevel,
    inside: Bools,
    outside: Bools,
    positive: Bools,
    probability: Floats,
    called: Bools,
    number: NDArray[np.int64],
    generator: np.random.Generator,
    num_permutations: int,
) -> SubgroupLevel:
    either = inside | outside

    def compare(ours: Estimate, theirs: Estimate, values: Floats | Bools, counted: Bools) -> Difference:
        if ours.value is None or theirs.value is None:
            which = row if ours.value is None else reference
            return Difference(None, None, reason=f"{which.level}: {ours.reason or theirs.reason}")
        used = either & counted
        p_value = permute_groups(
            values[used], number[used], inside[used], generator=generator, num_permutations=num_permutations
        )
        return Difference(ours.value - theirs.value, p_value)

    every = np.ones(len(positive), dtype=bool)
    return replace(
        row,
        sensitivity_difference=compare(row.sensitivity, reference.sensitivity, called, positive),
        specificity_difference=compare(row.specificity, reference.specificity, ~called, ~positive),
        calibration_gap_difference=compare(
            row.calibration_gap, reference.calibration_gap, positive - probability, every
        ),
    )


def _adjust(rows: Sequence[SubgroupLevel]) -> tuple[SubgroupLevel, ...]:
    """Holm over all differences of the table."""
    fields = ("sensitivity_difference", "specificity_difference", "calibration_gap_difference")
    found: list[Difference | None] = [getattr(row, field) for row in rows for field in fields]
    adjusted = iter(adjust_holm([None if item is None else item.p_value for item in found]))
    changed = []
    for row in rows:
        values: dict[str, Difference | None] = {}
        for field in fields:
            item: Difference | None = getattr(row, field)
            p_adjusted = next(adjusted)
            values[field] = None if item is None else replace(item, p_adjusted=p_adjusted)
        changed.append(
            replace(
                row,
                sensitivity_difference=values[fields[0]],
                specificity_difference=values[fields[1]],
                calibration_gap_difference=values[fields[2]],
            )
        )
    return tuple(changed)


def _show_proportion(hits: Bools, groups: ArrayLike, which: str) -> Estimate:
    reason = _explain_hidden(len(np.unique(np.asarray(groups))), which)
    return Estimate(None, None, None, reason) if reason else estimate_proportion(hits, groups)


def _explain_hidden(num_groups: int, which: str) -> str | None:
    if num_groups >= MIN_SHOWN_GROUPS:
        return None
    return f"not shown: {num_groups} groups with a {which} image, at least {MIN_SHOWN_GROUPS} are needed"


def _share(values: Sequence[str | None], inside: Bools) -> dict[str, float]:
    chosen = [values[row] or "unknown" for row in np.flatnonzero(inside).tolist()]
    names, counts = np.unique(np.array(chosen, dtype=np.str_), return_counts=True)
    return {str(name): count / len(chosen) for name, count in zip(names, counts.tolist(), strict=True)}
