"""Survival metrics equal loops over all pairs in every replicate, and what they become where nobody is censored."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from panfm.measures import survival
from panfm.measures.outcomes import Floats, Outcome
from panfm.measures.statistics import draw_group_weights
from panfm.measures.survival import MEASURES, compute_event_free

GRID = (4.0, 7.0, 11.0, 13.0)


def make_outcome(seed: int, num_units: int = 40, *, competing: bool = True, censored: bool = True) -> Outcome:
    """Whole days with many ties, risks with ties, about a third censored."""
    rng = np.random.default_rng(seed)
    risk = np.round(rng.normal(0, 1, num_units), 1)
    days = np.ceil(rng.exponential(9 * np.exp(-0.5 * risk))).clip(1, 25)
    event = rng.choice([0, 1, 2], num_units, p=[0.3 * censored, 1 - 0.3 * censored - 0.2 * competing, 0.2 * competing])
    free = np.exp(-np.exp(0.5 * risk)[:, None] * np.array(GRID) / 9)
    return Outcome(
        np.zeros(num_units, np.int64),
        np.concatenate([risk[:, None], free], axis=1),
        np.array([f"P{number}" for number in rng.integers(0, 20, num_units)]),
        np.stack([days, event], axis=1),
        np.array(GRID),
    )


def still_observed(days: Floats, event: Floats, day: float, *, before: bool) -> float:
    """P(not censored before `day`, or by it): a product over the days on which somebody was censored."""
    value = 1.0
    for time in sorted(set(days[event == 0])):
        if time < day or (time == day and not before):
            exposed = ((days > time) | ((days == time) & (event == 0))).sum()
            value *= 1 - ((days == time) & (event == 0)).sum() / exposed
    return value


def count_concordance(outcome: Outcome, *, weighted: bool) -> float:
    days, event, risk = outcome.targets[:, 0], outcome.targets[:, 1], outcome.scores[:, 0]
    right = total = 0.0
    for i in np.flatnonzero(event == 1):
        if weighted and days[i] > outcome.grid[-1]:
            continue
        seen = still_observed(days, event, days[i], before=True) if weighted else 1.0
        for j in range(len(days)):
            if days[j] > days[i] or (days[j] == days[i] and event[j] == 0):
                weight = 1 / seen**2
            elif event[j] == 2:
                weight = 1 / (seen * (still_observed(days, event, days[j], before=True) if weighted else 1.0))
            else:
                continue
            total += weight
            right += weight * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
    return right / total


def count_areas(outcome: Outcome) -> float:
    days, event, risk = outcome.targets[:, 0], outcome.targets[:, 1], outcome.scores[:, 0]
    mass = {i: 1 / still_observed(days, event, days[i], before=True) for i in np.flatnonzero(event != 0)}
    total = norm = 0.0
    before = 0.0
    for day in outcome.grid:
        right = pairs = 0.0
        for i in np.flatnonzero((event == 1) & (days <= day)):
            for j in range(len(days)):
                if days[j] > day:
                    weight = mass[i] / still_observed(days, event, day, before=False)
                elif event[j] == 2:
                    weight = mass[i] * mass[j]
                else:
                    continue
                pairs += weight
                right += weight * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
        new = sum(mass[i] for i in np.flatnonzero((event == 1) & (days <= day) & (days > before)))
        if new:
            total, norm = total + new * right / pairs, norm + new
        before = day
    return total / norm


def sum_brier(outcome: Outcome) -> float:
    days, event = outcome.targets[:, 0], outcome.targets[:, 1]
    scores = []
    for h, day in enumerate(outcome.grid):
        error = 0.0
        for i in range(len(days)):
            free = outcome.scores[i, 1 + h]
            if days[i] > day:
                error += (1 - free) ** 2 / still_observed(days, event, day, before=False)
            elif event[i] != 0:
                error += (free if event[i] == 1 else 1 - free) ** 2 / still_observed(days, event, days[i], before=True)
        scores.append(error / len(days))
    return float(np.trapezoid(scores, outcome.grid) / (outcome.grid[-1] - outcome.grid[0]))


BRUTE: dict[str, Callable[[Outcome], float]] = {
    "harrell_c": lambda outcome: count_concordance(outcome, weighted=False),
    "uno_c": lambda outcome: count_concordance(outcome, weighted=True),
    "time_dependent_auroc": count_areas,
    "integrated_brier": sum_brier,
}


@pytest.mark.parametrize("competing", [False, True])
@pytest.mark.parametrize("name", MEASURES)
def test_metrics_equal_loops_over_all_pairs_in_every_replicate(
    name: str, competing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = make_outcome(0, competing=competing)
    monkeypatch.setattr(survival, "MAX_PAIRS", 40 * 5)  # several blocks of cases
    weights = np.concatenate([np.ones((1, 40), np.uint16), draw_group_weights(outcome.groups, 12, seed=1)])
    found = MEASURES[name].compute(outcome, weights)
    assert not np.isnan(found).any() and MEASURES[name].explain(outcome) is None
    for value, row in zip(found, weights, strict=True):
        assert value == pytest.approx(BRUTE[name](outcome.take(np.repeat(np.arange(40), row))), abs=1e-12)


def test_without_censoring_they_are_the_metrics_that_everybody_knows() -> None:
    outcome = make_outcome(1, competing=False, censored=False)
    ones = np.ones((1, 40))
    days, risk = outcome.targets[:, 0], outcome.scores[:, 0]
    # Somers' D of the risk given the days: 2 C - 1, ties in the risk one half, pairs of one day left out.
    expected = (1 + stats.somersd(-days, risk).statistic) / 2
    assert MEASURES["harrell_c"].compute(outcome, ones)[0] == pytest.approx(expected, abs=1e-12)
    late = Outcome(outcome.labels, outcome.scores, outcome.groups, outcome.targets, np.array([26.0]))
    assert MEASURES["uno_c"].compute(late, ones)[0] == pytest.approx(expected, abs=1e-12)
    one_day = Outcome(outcome.labels, outcome.scores[:, :2], outcome.groups, outcome.targets, np.array([4.0]))
    area = MEASURES["time_dependent_auroc"].compute(one_day, ones)[0]
    assert area == pytest.approx(roc_auc_score(days <= 4, risk), abs=1e-12)
    brier = MEASURES["integrated_brier"].compute(one_day, ones)[0]
    assert brier == pytest.approx(((outcome.scores[:, 1] - (days > 4)) ** 2).mean(), abs=1e-12)


def test_weights_for_censoring_recover_what_all_would_have_shown() -> None:
    """Censoring hides late events, so Harrell's C depends on it and Uno's does not; the same for the Brier score."""
    rng = np.random.default_rng(5)
    num_units = 4000
    risk = rng.normal(0, 1, num_units)
    days = rng.weibull(np.where(risk > 0, 3.0, 0.8)) * 10 * np.exp(-0.4 * risk)  # hazards that cross
    gone = rng.exponential(8, num_units)
    grid = np.array([2.0, 6.0, 10.0])
    scores = np.concatenate([risk[:, None], np.exp(-np.exp(0.4 * risk)[:, None] * grid / 10)], axis=1)
    groups = np.arange(num_units).astype(str)
    labels = np.zeros(num_units, np.int64)
    whole = Outcome(labels, scores, groups, np.stack([days, np.ones(num_units)], 1), grid)
    seen = Outcome(labels, scores, groups, np.stack([np.minimum(days, gone), days <= gone], 1), grid)
    ones = np.ones((1, num_units))
    for name in ("uno_c", "time_dependent_auroc", "integrated_brier"):
        true, found = (MEASURES[name].compute(outcome, ones)[0] for outcome in (whole, seen))
        assert found == pytest.approx(true, abs=0.02)
    # What happens without the weights, so that the test could fail: the same scores, censoring ignored.
    ignored = seen.take(seen.targets[:, 1] == 1)
    for name in ("time_dependent_auroc", "integrated_brier"):
        true, naive = (MEASURES[name].compute(o, np.ones((1, len(o.labels))))[0] for o in (whole, ignored))
        assert abs(naive - true) > 0.03
    assert abs(MEASURES["harrell_c"].compute(seen, ones)[0] - MEASURES["uno_c"].compute(seen, ones)[0]) > 0.01


def test_the_curve_equals_scipys_and_the_published_one() -> None:
    outcome = make_outcome(2, competing=False)
    days, event = outcome.targets.T
    curve = compute_event_free(days, event)
    expected = stats.ecdf(stats.CensoredData.right_censored(days, event == 0)).sf
    for day in np.arange(0, 27, 0.5):
        assert curve.read(day) == pytest.approx(expected.evaluate(day), abs=1e-12)
    # Acute myelogenous leukaemia, maintained group (Miller 1997): 0.909, 0.818, 0.716, 0.614, 0.491, 0.368, 0.184.
    maintained = np.array([9, 13, 13, 18, 23, 28, 31, 34, 45, 48, 161])
    relapsed = np.array([1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0])
    found = compute_event_free(maintained, relapsed).read([8, 9, 13, 18, 23, 31, 34, 48, 200])
    np.testing.assert_allclose(found, [1, 0.909, 0.818, 0.716, 0.614, 0.491, 0.368, 0.184, 0.184], atol=5e-4)


def test_with_competing_events_the_curve_is_one_minus_the_incidence() -> None:
    # Four units: a competing event on day 1, events on days 2 and 3, one censored on day 4.
    curve = compute_event_free([1, 2, 3, 4], [2, 1, 1, 0])
    # Incidence 3/4 x 1/3 = 1/4 on day 2 and another 1/4 on day 3; Kaplan-Meier would have said 2/3 and 1/3.
    np.testing.assert_allclose(curve.read([1, 2, 3, 4]), [1, 0.75, 0.5, 0.5])


def test_a_competing_event_is_never_having_the_event() -> None:
    # The unit with the competing event on day 1 has the lowest risk: right to put it last, although it left first.
    targets = np.array([[1.0, 2.0], [5.0, 1.0], [9.0, 0.0]])
    scores = np.array([[-1.0, 0.9], [1.0, 0.2], [0.0, 0.8]])
    outcome = Outcome(np.zeros(3, np.int64), scores, np.array(list("abc")), targets, np.array([6.0]))
    for name in ("harrell_c", "uno_c", "time_dependent_auroc"):
        assert MEASURES[name].compute(outcome, np.ones((1, 3)))[0] == 1
    brier = MEASURES["integrated_brier"].compute(outcome, np.ones((1, 3)))[0]
    assert brier == pytest.approx((0.1**2 + 0.2**2 + 0.2**2) / 3)


def test_what_is_undefined_is_nan_with_a_reason() -> None:
    outcome = make_outcome(3)
    nobody = Outcome(outcome.labels, outcome.scores, outcome.groups, outcome.targets * [1, 0], outcome.grid)
    for name, measure in MEASURES.items():
        weights = np.stack([np.ones(40), np.eye(40)[0]])  # all of them; one single unit
        undefined = np.isnan(measure.compute(nobody, weights))
        assert undefined[0] == (name != "integrated_brier")  # nobody has the event: that can be foretold
        assert measure.explain(nobody) == ("no event among the 40 test units" if undefined[0] else None)
        assert measure.explain(outcome.take(np.zeros(40, dtype=bool))) == "no test units"
    cut = outcome.targets.clip(max=12)
    cut[cut[:, 0] == 12, 1] = 0
    short = Outcome(outcome.labels, outcome.scores, outcome.groups, cut, outcome.grid)
    assert "followed beyond day 12" in str(MEASURES["integrated_brier"].explain(short))
    assert np.isnan(MEASURES["integrated_brier"].compute(short, np.ones((1, 40)))[0])
    assert MEASURES["harrell_c"].explain(short) is None
    late = Outcome(outcome.labels, outcome.scores, outcome.groups, outcome.targets + np.array([100, 0]), outcome.grid)
    assert MEASURES["uno_c"].explain(late) == "no event by day 13, the last that is predicted"


def test_chance_is_what_the_common_curve_reaches() -> None:
    outcome = make_outcome(4, competing=False)
    common = compute_event_free(*outcome.targets.T).read(GRID)
    scores = np.concatenate([np.zeros((40, 1)), np.tile(common, (40, 1))], axis=1)
    blind = Outcome(outcome.labels, scores, outcome.groups, outcome.targets, outcome.grid)
    for measure in MEASURES.values():
        assert measure.compute(blind, np.ones((1, 40)))[0] == pytest.approx(measure.chance(outcome), abs=1e-12)


def test_large_weights_are_summed_exactly() -> None:
    """Beyond 2^24 whole numbers are not exact in float32, in which pairs are counted where they are."""
    outcome = make_outcome(6)
    weights = np.random.default_rng(0).integers(0, 4, (5, 40))
    small, large = (MEASURES["harrell_c"].compute(outcome, weights * factor) for factor in (1, 10_000_019))
    np.testing.assert_allclose(large, small, rtol=1e-12)
