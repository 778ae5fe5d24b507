"""Another choice of labelled patients would have given another number: how far, put into intervals and comparisons.

    values of B draws of labels [B] --Student's t on B - 1 degrees--> noise [R], added to patients' replicates [R]
                                    `--------------------------------> half width, square and add: closed forms

An encoder's value at a label fraction is the mean over B draws of labels on one test set. Its error has two parts: the
test patients, whom the bootstrap (or a formula) resamples, and the draws, of which B were seen. The variance of a mean
of B draws is their sample variance / B, and with few draws that is itself uncertain, hence Student's t. Draws of one
number are the same labelled patients for every encoder, and get the same noise: differences stay paired.

What it is: a multiplier bootstrap with Student's mixing (sum over draws of z_b (m_b - mean), z standard normal), and
for closed forms Zou and Donner's square-and-add (Stat Med 27:1693, 2008). The draws' sample variance on one test set
also holds how the test patients interact with the draw, 1 / B of which the patients' part has already: intervals are
wider by that, never narrower. Draws come from one pool of training patients; another pool is another task. What it
covers: `python -m tests.measures.simulate --parts draws`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from panfm.measures.intervals import CONFIDENCE

Floats = NDArray[np.float64]

MIN_DRAWS = 3  # two draws have one degree of freedom: an interval of 13 standard errors says nothing


def spread_by_draws(replicates: ArrayLike, values: ArrayLike, draws: Sequence[int], seed: int) -> Floats:
    """Add the error of the choice of labels to replicates [R] of a mean over draws: [R].

    values: [B], the metric of each draw (or, subtracted, a difference of two encoders on the same draws). draws: [B],
    their numbers: a draw of one number and one seed moves every encoder at once. Fewer than MIN_DRAWS add nothing.
    """
    rows, value = np.asarray(replicates, dtype=np.float64), np.asarray(values, dtype=np.float64)
    assert len(value) == len(draws), "one number a draw"
    B, R = len(value), len(rows)
    if B < MIN_DRAWS:
        return rows
    normal = np.stack([np.random.default_rng([seed, draw]).standard_normal(R) for draw in draws])  # [B, R]
    mixing = np.sqrt((B - 1) / np.random.default_rng([seed, 2**32 - 1, B]).chisquare(B - 1, R))
    return np.asarray(rows + mixing * ((value - value.mean()) @ normal) / np.sqrt(B * (B - 1)))


def compute_draw_variance(values: ArrayLike) -> float:
    """Variance of the mean of draws [B] by the choice of labels; 0 for fewer than MIN_DRAWS, of which nobody knows."""
    value = np.asarray(values, dtype=np.float64)
    return float(value.var(ddof=1) / len(value)) if len(value) >= MIN_DRAWS else 0.0


def widen_by_draws(value: float, low: float, high: float, values: ArrayLike) -> tuple[float, float]:
    """Widen an interval low .. high of `value`, which holds the test patients, by the choice of labels (values [B])."""
    draw = np.asarray(values, dtype=np.float64)
    if len(draw) < MIN_DRAWS:
        return low, high
    half = float(stdtrit(len(draw) - 1, 0.5 + CONFIDENCE / 2)) * np.sqrt(compute_draw_variance(draw))
    return value - float(np.hypot(value - low, half)), value + float(np.hypot(high - value, half))
