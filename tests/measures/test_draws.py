"""The choice of labels inside an interval: Student's t, paired between encoders, and it covers."""

import numpy as np
import pytest
from scipy.special import stdtrit
from scipy.stats import sem

from panfm.measures.comparisons import compare_area_parts, compare_areas
from panfm.measures.draws import MIN_DRAWS, compute_draw_variance, spread_by_draws, widen_by_draws
from panfm.measures.intervals import compute_area_parts
from tests.measures.simulate import COVERAGE, cover_draws

VALUES = np.array([0.71, 0.74, 0.69, 0.78, 0.73])


def test_noise_is_students_t_of_the_mean_over_draws() -> None:
    spread = spread_by_draws(np.full(40_000, 0.73), VALUES, range(5), seed=1)
    for share in (0.025, 0.25, 0.9, 0.975):
        expected = 0.73 + stdtrit(4, share) * sem(VALUES)
        assert np.quantile(spread, share) == pytest.approx(expected, abs=0.05 * sem(VALUES) / 0.5)
    assert np.array_equal(spread, spread_by_draws(np.full(40_000, 0.73), VALUES, range(5), seed=1))


def test_encoders_on_the_same_draws_stay_paired() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 100))
    other = VALUES[::-1] * 0.9
    apart = spread_by_draws(ours, VALUES, range(5), seed=3) - spread_by_draws(theirs, other, range(5), seed=3)
    np.testing.assert_allclose(apart, spread_by_draws(ours - theirs, VALUES - other, range(5), seed=3), atol=1e-12)
    shifted = spread_by_draws(ours, VALUES, range(5), 3) - spread_by_draws(ours, VALUES - 0.2, range(5), 3)
    np.testing.assert_allclose(shifted, 0, atol=1e-12)  # one encoder better by the same in every draw: nothing varies


def test_too_few_draws_add_nothing() -> None:
    few = VALUES[: MIN_DRAWS - 1]
    assert np.array_equal(spread_by_draws(np.arange(9.0), few, range(len(few)), seed=0), np.arange(9.0))
    assert widen_by_draws(0.7, 0.6, 0.8, few) == (0.6, 0.8) and compute_draw_variance(few) == 0


def test_square_and_add() -> None:
    half = stdtrit(4, 0.975) * sem(VALUES)
    low, high = widen_by_draws(0.73, 0.65, 0.78, VALUES)
    assert (low, high) == pytest.approx((0.73 - np.hypot(0.08, half), 0.73 + np.hypot(0.05, half)))


def test_area_comparison_takes_the_draws_in() -> None:
    rng = np.random.default_rng(5)
    labels, groups = np.repeat([0, 1], 40), np.arange(80) // 2
    a, b = labels + rng.normal(size=80), labels + rng.normal(size=80)
    parts = compute_area_parts(labels, a, groups), compute_area_parts(labels, b, groups)
    plain = compare_areas(labels, a, b, groups)
    assert compare_area_parts(*parts, independent=False) == plain
    wider = compare_area_parts(*parts, independent=False, further_variance=0.01, further_freedom=4.0)
    variance, freedom = parts[0].subtract(parts[1]).variance, parts[0].subtract(parts[1]).freedom
    together = (variance + 0.01) ** 2 / (variance**2 / freedom + 0.01**2 / 4)
    assert wider.high - wider.difference == pytest.approx(stdtrit(together, 0.975) * np.sqrt(variance + 0.01))
    assert wider.p_value > plain.p_value and wider.difference == plain.difference


@pytest.mark.parametrize("num_draws", [5, 10])
def test_mean_over_draws_covers(num_draws: int) -> None:
    noise, squares, alone = cover_draws(num_draws, 1.0, 1.5, 0.3, 500, seed=1)
    assert noise.is_within(*COVERAGE) and squares.is_within(*COVERAGE)
    assert alone.hits < 0.93 * alone.num_trials  # what the draws are in the interval for
