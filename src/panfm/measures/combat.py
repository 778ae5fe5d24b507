"""ComBat: what the institution adds to features, estimated with empirical Bayes and taken out.

    features [N, D], batches [N], covariates [N, C] -> fit_combat -> Combat: one affine map of the features a batch
    rows of another batch, no covariates            -> estimate_batch -> its map

Johnson, Li and Rabinovic 2007 (Biostatistics 8:118). Model: feature g of row j in batch i is
mean_g + x_j beta_g + scale_g (gamma_ig + delta_ig e_ijg); gamma and delta of a batch are shrunk towards what they are
in its other features. The covariates (the diagnosis) enter the estimates, so that a batch of many melanomas is not
taken for a batch of dark photographs.

One thing differs from the usual programs: they also scale each row about the mean of its own covariates. That writes
the label of a training row into its features, and cannot be done to a row whose label is not known. Here the map of a
batch is the same for all its rows, about the mean of all: no row's label enters its features. The price is that the
distance between two diagnoses is scaled with the batch's spread, too.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TOLERANCE = 1e-6  # relative change of a parameter at which the empirical-Bayes iteration ends
MAX_ITERATIONS = 500


@dataclass(frozen=True)
class BatchEffect:
    """gamma and delta of one batch, both [D], in units of Combat.scale: its shift, and its spread as a factor."""

    shift: Floats
    spread: Floats


@dataclass(frozen=True)
class Combat:
    """What all batches share (mean and scale [D]; a constant feature has scale 0), and the effect of each by name."""

    mean: Floats
    scale: Floats
    effects: dict[str, BatchEffect]

    def remove(self, features: NDArray[np.floating], effect: BatchEffect) -> Floats:
        """Take a batch's effect out of its rows: features [n, D] -> [n, D]."""
        values = np.asarray(features, dtype=np.float64)
        return (values - self.mean - self.scale * effect.shift) / effect.spread + self.mean


def fit_combat(features: NDArray[np.floating], batches: NDArray[np.str_], covariates: Floats) -> Combat:
    """Estimate the effect of every batch; each needs two rows or more.

    features: [N, D]. batches: [N] names. covariates: [N, C], what is to stay; C may be 0, and columns may depend on
    each other.
    """
    values = np.asarray(features, dtype=np.float64)
    names, number = np.unique(batches, return_inverse=True)
    counts = np.bincount(number)
    assert counts.min() >= 2, "a batch of one row has no spread"
    centred = covariates - covariates.mean(axis=0) if covariates.shape[1] else covariates
    design = np.concatenate([np.eye(len(names))[number], centred], axis=1)  # [N, B + C]
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    mean = counts @ coefficients[: len(names)] / len(values)
    residuals = values - design @ coefficients
    scale = np.sqrt((residuals**2).mean(axis=0))
    scale[scale <= 1e-9 * np.abs(values).max(axis=0)] = 0.0
    kept = centred @ coefficients[len(names) :]
    effects = {
        str(name): _estimate_effect(values[number == place] - kept[number == place], mean, scale)
        for place, name in enumerate(names)
    }
    return Combat(mean, scale, effects)


def estimate_batch(combat: Combat, features: NDArray[np.floating]) -> BatchEffect:
    """Estimate the effect of a batch that was not there when `combat` was fitted: features [n, D], n of 2 or more.

    Nothing is known of its covariates, so a mixture of diagnoses other than the others' counts as part of its effect.
    """
    assert len(features) >= 2, "a batch of one row has no spread"
    return _estimate_effect(np.asarray(features, dtype=np.float64), combat.mean, combat.scale)


def _estimate_effect(values: Floats, mean: Floats, scale: Floats) -> BatchEffect:
    """Posterior of shift and spread, by turns until neither moves. values: [n, D], covariates' part taken off."""
    varies = scale > 0
    shift, spread = np.zeros(len(mean)), np.ones(len(mean))
    if varies.any():
        z = (values[:, varies] - mean[varies]) / scale[varies]
        shift[varies], variance = _shrink(len(z), z.mean(axis=0), z.var(axis=0, ddof=1))
        spread[varies] = np.sqrt(variance)
    return BatchEffect(shift, spread)


def _shrink(num_rows: int, raw_shift: Floats, raw_variance: Floats) -> tuple[Floats, Floats]:
    """Shrink a batch's means and variances [D] towards each other; as they are where they do not differ at all."""
    if len(raw_shift) < 2 or raw_variance.var(ddof=1) == 0 or raw_shift.var(ddof=1) == 0:
        return raw_shift, np.maximum(raw_variance, 1e-12)
    prior_shift, prior_variance = raw_shift.mean(), raw_shift.var(ddof=1)
    m, s2 = raw_variance.mean(), raw_variance.var(ddof=1)
    a, b = (2 * s2 + m**2) / s2, (m * s2 + m**3) / s2  # of the inverse gamma with that mean and variance
    shift, variance = raw_shift, np.maximum(raw_variance, 1e-12)
    for _ in range(MAX_ITERATIONS):
        n_tau = num_rows * prior_variance
        new_shift = (n_tau * raw_shift + variance * prior_shift) / (n_tau + variance)
        squares = (num_rows - 1) * raw_variance + num_rows * (raw_shift - new_shift) ** 2
        new_variance = (0.5 * squares + b) / (0.5 * num_rows + a - 1)
        change = max(
            np.max(np.abs(new_shift - shift) / np.maximum(np.abs(shift), 1e-3)),
            np.max(np.abs(new_variance - variance) / variance),
        )
        shift, variance = new_shift, new_variance
        if change < TOLERANCE:
            break
    return shift, variance
