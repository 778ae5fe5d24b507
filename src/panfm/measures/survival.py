"""Metrics of predicted survival: who has the event first, and how likely each is to be free of it on a given day.

    scores [N, 1 + H]: risk (higher = earlier event), probability of being event-free on each day of grid [H]
    targets [N, 2]: days, event (0 = censored, 1 = the event, 2 = a competing event)        weights [R, N] -> [R]

A unit leaves observation on its last day; one that is censored on a day is known to be event-free through that day. A
competing event is an answer, not a gap: the unit will never have the event, so from then on it counts as free of it
(Wolbers et al. 2014, Biostatistics 15:526). Censored units are made up for by inverse probabilities of being still
observed (IPCW), G(t) = P(not censored by t), a Kaplan-Meier curve of the censoring of the scored units themselves,
estimated anew in each replicate; an event on day t weighs 1 / G(t-). Where nobody is observed any more on a day of the
grid, nothing can be said of that day: NaN, as is everything without an event.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm.measures.numbers import compute_in_blocks, divide
from panfm.measures.outcomes import Direction, Floats, Measure, Outcome

Ints = NDArray[np.int64]
CENSORED, EVENT, COMPETING = 0, 1, 2
MAX_PAIRS = 4_000_000  # cases x units compared at once: 16 MB
EXACT_FLOAT32 = 2**24  # whole numbers below it are exact in float32, in which products take half as long


@dataclass(frozen=True)
class StepCurve:
    """A curve that starts at 1 and steps at `times` [U], ascending, to `values` [U]; at_risk: observed just before."""

    times: Floats
    values: Floats
    at_risk: Floats

    def read(self, days: ArrayLike) -> Floats:
        """The values on the given days [H] (a step counts from its own day on)."""
        places = np.searchsorted(self.times, np.asarray(days, dtype=np.float64), side="right")
        return np.asarray(np.concatenate([[1.0], self.values])[places])


def compute_event_free(days: ArrayLike, events: ArrayLike) -> StepCurve:
    """Estimate the share of units that are free of the event after each day: the Kaplan-Meier curve.

    With competing events 1 - cumulative incidence (Aalen-Johansen): the Kaplan-Meier curve would count as event-free
    only those who had neither, and as about to have the event those who never can. days, events: [N].
    """
    day, event = np.asarray(days, dtype=np.float64), np.asarray(events)
    times, place = np.unique(day, return_inverse=True)
    num_left = np.bincount(place, minlength=len(times))
    at_risk = len(day) - np.concatenate([[0], np.cumsum(num_left)[:-1]])
    num_events = np.bincount(place[event == EVENT], minlength=len(times))
    num_ended = np.bincount(place[event != CENSORED], minlength=len(times))
    still_free = np.cumprod(1 - num_ended / at_risk)  # of any event
    before = np.concatenate([[1.0], still_free[:-1]])
    incidence = np.cumsum(before * num_events / at_risk)
    # Without competing events both say the same, but only the product is exactly 0 after a last event.
    values = 1 - incidence if (event == COMPETING).any() else still_free
    return StepCurve(times, np.asarray(values, dtype=np.float64), at_risk.astype(np.float64))


@dataclass(frozen=True)
class _Timeline:
    """N units by their last day; `days`, `event`, `risk`, `free` run over them in that order."""

    order: Ints  # [N], places in the outcome
    days: Floats  # [N]
    event: Ints  # [N]
    risk: Floats  # [N]
    free: Floats  # [N, H], predicted
    grid: Floats  # [H]
    times: Floats  # [U], distinct days
    place: Ints  # [N], of each unit's day in `times`
    starts: Ints  # [U], units before that day
    ends: Ints  # [U], units up to it

    @classmethod
    def build(cls, outcome: Outcome) -> "_Timeline":
        order = np.argsort(outcome.targets[:, 0], kind="stable")
        days = outcome.targets[order, 0]
        times, place = np.unique(days, return_inverse=True)
        return cls(
            order=order,
            days=days,
            event=outcome.targets[order, 1].astype(np.int64),
            risk=outcome.scores[order, 0],
            free=outcome.scores[order, 1:],
            grid=outcome.grid,
            times=times,
            place=place,
            starts=np.searchsorted(days, times, side="left"),
            ends=np.searchsorted(days, times, side="right"),
        )

    def find(self, event: int) -> Ints:
        return np.flatnonzero(self.event == event)

    def sum_until(self, weights: Floats, units: NDArray[np.bool_]) -> Floats:
        """Weight of these units through each distinct day, a leading 0 for before the first: [r, U + 1]."""
        cumulated = _cumulate(np.where(units, weights, 0.0))
        return np.asarray(np.concatenate([cumulated[:, :1], cumulated[:, self.ends]], axis=1))


@dataclass(frozen=True)
class _Observed:
    """A timeline under r rows of weights [r, N] (in its order), and who of it can still be observed when."""

    line: _Timeline
    weights: Floats
    still: Floats  # [r, U + 1]: G just before the first day, then after each distinct day

    @classmethod
    def build(cls, line: _Timeline, weights: Floats) -> "_Observed":
        ended = np.diff(line.sum_until(weights, line.event != CENSORED), axis=1)
        lost = np.diff(line.sum_until(weights, line.event == CENSORED), axis=1)
        total = weights.sum(axis=1, keepdims=True)
        at_risk = total - np.concatenate([np.zeros_like(total), np.cumsum(ended + lost, axis=1)[:, :-1]], axis=1)
        # Events come first on their day: who has one is not at risk of being censored on it.
        exposed = at_risk - ended
        share = np.divide(lost, exposed, out=np.zeros_like(lost), where=exposed > 0)
        return cls(line, weights, np.concatenate([np.ones_like(total), np.cumprod(1 - share, axis=1)], axis=1))

    def weigh(self, units: Ints) -> Floats:
        """Weight / G(t-) of units [n] whose events were observed: [r, n]; 0 for a unit of weight 0."""
        weight, still = self.weights[:, units], self.still[:, self.line.place[units]]
        return np.divide(weight, still, out=np.zeros_like(weight), where=weight > 0)

    def read_still(self, days: Floats) -> Floats:
        """G on the given days [H]: [r, H]."""
        return np.asarray(self.still[:, np.searchsorted(self.line.times, days, side="right")])


def _cumulate(values: Floats) -> Floats:
    result = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=result[:, 1:])
    return result


def _compute_harrell(line: _Timeline, weights: Floats) -> Floats:
    cases = line.find(EVENT)
    rivals = line.find(COMPETING)
    right_later, later, right_never, never = _count_pairs(line, weights, cases, rivals, weights[:, rivals])
    weight = weights[:, cases]
    return divide((weight * (right_later + right_never)).sum(axis=1), (weight * (later + never)).sum(axis=1))


def _compute_uno(line: _Timeline, weights: Floats) -> Floats:
    observed = _Observed.build(line, weights)
    cases = line.find(EVENT)
    cases = cases[line.days[cases] <= line.grid[-1]]
    rivals = line.find(COMPETING)
    right_later, later, right_never, never = _count_pairs(line, weights, cases, rivals, observed.weigh(rivals))
    weight = observed.weigh(cases)
    # A pair is seen if the case is still observed before its event, and the other one, too, until that day (or until
    # its own competing event).
    still = observed.still[:, line.place[cases]]
    again = np.divide(1.0, still, out=np.zeros_like(still), where=weight > 0)
    right = (weight * (again * right_later + right_never)).sum(axis=1)
    return divide(right, (weight * (again * later + never)).sum(axis=1))


def _count_pairs(
    line: _Timeline, weights: Floats, cases: Ints, rivals: Ints, rival_weights: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """For each case [E]: the weight of the units that outlast it and have a lower risk (half of an equal one), and of
    all that outlast it; then the same of the rivals that by its day had a competing event. Each [r, E].

    Two events on one day have no order; who is censored on the day of an event outlasts it.
    """
    censored = line.sum_until(weights, line.event == CENSORED)
    place = line.place[cases]
    later = weights.sum(axis=1, keepdims=True) - _cumulate(weights)[:, line.ends[place]]
    later += censored[:, place + 1] - censored[:, place]
    is_exact = 2 * len(line.days) * (weights.max() if weights.size else 0) < EXACT_FLOAT32
    dtype = np.float32 if is_exact else np.float64
    compared = weights.astype(dtype)
    right_later, right_never, never = (np.zeros((len(weights), len(cases))) for _ in range(3))
    size = max(1, MAX_PAIRS // max(1, len(line.days)))
    for start in range(0, len(cases), size):
        block = cases[start : start + size]
        first = int(line.starts[line.place[block[0]]]) if len(block) else 0  # all before it leave earlier
        risk, day = line.risk[block, None], line.days[block, None]
        others = slice(first, None)
        outlasts = (line.days[others] > day) | ((line.days[others] == day) & (line.event[others] == CENSORED))
        wins = outlasts * ((line.risk[others] < risk) * dtype(2) + (line.risk[others] == risk) * dtype(1))
        right_later[:, start : start + size] = (compared[:, others] @ wins.T) / 2
        if len(rivals):
            gone = (line.days[rivals] <= day).astype(np.float64)
            wins_over = gone * ((line.risk[rivals] < risk) + (line.risk[rivals] == risk) / 2)
            right_never[:, start : start + size] = rival_weights @ wins_over.T
            never[:, start : start + size] = rival_weights @ gone.T
    return right_later, later, right_never, never


def _compute_auroc(line: _Timeline, weights: Floats) -> Floats:
    observed = _Observed.build(line, weights)
    still = observed.read_still(line.grid)
    cases, rivals = line.find(EVENT), line.find(COMPETING)
    case_weights, rival_weights = observed.weigh(cases), observed.weigh(rivals)
    by_risk = np.argsort(line.risk, kind="stable")
    ascending = line.risk[by_risk]
    lower = np.searchsorted(ascending, line.risk[cases], side="left")
    not_higher = np.searchsorted(ascending, line.risk[cases], side="right")
    total, mass = np.zeros(len(weights)), np.zeros(len(weights))
    before = -np.inf
    for h, day in enumerate(line.grid):
        # Both kinds of controls times G(day): that cancels, and there is nothing to divide by where it is 0.
        controls = np.where(line.days > day, weights, 0.0)
        controls[:, rivals] += still[:, h : h + 1] * rival_weights * (line.days[rivals] <= day)
        below = _cumulate(controls[:, by_risk])
        is_case = line.days[cases] <= day
        of_cases = case_weights[:, is_case]
        wins = (of_cases * (below[:, lower[is_case]] + below[:, not_higher[is_case]])).sum(axis=1) / 2
        area = divide(wins, of_cases.sum(axis=1) * below[:, -1])
        new = case_weights[:, is_case & (line.days[cases] > before)].sum(axis=1)
        total += np.where(new > 0, new * area, 0.0)
        mass += new
        before = day
    return divide(total, mass)


def _compute_brier(line: _Timeline, weights: Floats) -> Floats:
    observed = _Observed.build(line, weights)
    still = observed.read_still(line.grid)
    passed = line.days[:, None] <= line.grid  # [N, H]
    cases, rivals = line.find(EVENT), line.find(COMPETING)
    errors = observed.weigh(cases) @ (passed * line.free**2)[cases]
    errors += observed.weigh(rivals) @ (passed * (1 - line.free) ** 2)[rivals]
    errors += divide(weights @ (~passed * (1 - line.free) ** 2), still)  # NaN where nobody is observed any more
    scores = errors / weights.sum(axis=1, keepdims=True)
    if len(line.grid) == 1:
        return np.asarray(scores[:, 0])
    return np.asarray(np.trapezoid(scores, line.grid, axis=1) / (line.grid[-1] - line.grid[0]))


def _explain(outcome: Outcome, compute: Callable[[Outcome, NDArray[np.generic]], Floats]) -> str | None:
    """Why the value of all units is undefined, in words."""
    if len(outcome.labels) == 0 or len(outcome.grid) == 0:
        return "no test units" if len(outcome.labels) == 0 else "no days were given to predict for"
    if not np.isnan(compute(outcome, np.ones((1, len(outcome.labels))))[0]):
        return None
    days, happened, last = outcome.targets[:, 0], outcome.targets[:, 1] == EVENT, outcome.grid[-1]
    if not happened.any():
        return f"no event among the {len(days)} test units"
    if not happened[days <= last].any():
        return f"no event by day {last:g}, the last that is predicted"
    if days.max() <= last:
        return f"no test unit is followed beyond day {days.max():g}, predicted is up to day {last:g}"
    return "no two test units of which it is known who has the event first"


def _compute_common_brier(outcome: Outcome) -> float:
    """The integrated Brier score of telling everybody the share of these units that is event-free."""
    if len(outcome.labels) == 0 or len(outcome.grid) == 0:
        return np.nan
    common = compute_event_free(outcome.targets[:, 0], outcome.targets[:, 1]).read(outcome.grid)
    scores = np.concatenate([outcome.scores[:, :1], np.tile(common, (len(outcome.scores), 1))], axis=1)
    same = Outcome(outcome.labels, scores, outcome.groups, outcome.targets, outcome.grid)
    return float(_compute_brier(_Timeline.build(same), np.ones((1, len(outcome.labels))))[0])


def _build(
    title: str,
    direction: Direction,
    description: str,
    statistic: Callable[[_Timeline, Floats], Floats],
    chance: Callable[[Outcome], float] = lambda outcome: 0.5,
    perfect: float = 1.0,
) -> Measure:
    def compute(outcome: Outcome, weights: NDArray[np.generic]) -> Floats:
        line = _Timeline.build(outcome)
        with np.errstate(invalid="ignore"):  # NaN x 0 of a replicate that is undefined anyway
            return compute_in_blocks(lambda block: statistic(line, block), weights[:, line.order])

    return Measure(title, direction, description, compute, lambda outcome: _explain(outcome, compute), chance, perfect)


MEASURES: Mapping[str, Measure] = {
    "harrell_c": _build(
        "Harrell's C",
        "higher",
        "Share of the pairs whose order is known in which the one with the earlier event has the higher risk.",
        _compute_harrell,
    ),
    "uno_c": _build(
        "Uno's C",
        "higher",
        "As Harrell's C, for events through the last predicted day, weighted so that it does not depend on censoring "
        "(Uno et al. 2011).",
        _compute_uno,
    ),
    "time_dependent_auroc": _build(
        "Time-dependent AUROC",
        "higher",
        "AUROC of the risk for an event by a day against none by then, weighted for censoring; the mean over the "
        "predicted days, each with the share of events since the one before (Uno et al. 2007).",
        _compute_auroc,
    ),
    "integrated_brier": _build(
        "Integrated Brier score",
        "lower",
        "Mean squared error of the probability of being event-free, weighted for censoring, over the time between the "
        "first and the last predicted day (Graf et al. 1999).",
        _compute_brier,
        _compute_common_brier,
        0.0,
    ),
}
