"""Means and medians of one value a unit, under many rows of weights at once: what most families' metrics end in.

    values [N] + weights [R, N] of counts -> mean or median of each row [R], NaN where nothing has weight

Works in blocks of rows, so that 2,000 replicates of 100,000 units need no more memory than a few of them.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MAX_BLOCK_VALUES = 4_000_000  # weights held as float64 at once: 32 MB


def compute_means(values: Floats, weights: NDArray[np.generic]) -> Floats:
    """Compute the weighted mean of values [N] for each row of weights [R, N]: [R], NaN where all weights are 0."""
    return compute_ratios(values, np.ones(len(values)), weights)


def compute_ratios(numerator: Floats, denominator: Floats, weights: NDArray[np.generic]) -> Floats:
    """Compute sum(w * numerator) / sum(w * denominator) for each row of weights [R, N]: [R], NaN where that is 0/0."""
    sums = np.empty((len(weights), 2))
    columns = np.stack([numerator, denominator], axis=1)
    for part in _cut(weights):
        sums[part] = weights[part].astype(np.float64) @ columns
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(sums[:, 0], sums[:, 1], out=undefined, where=sums[:, 1] != 0))


def compute_medians(values: Floats, weights: NDArray[np.generic]) -> Floats:
    """Compute the median of values [N] repeated by each row of whole weights [R, N]: [R], NaN where all are 0.

    Of an even number of values it is the mean of the two in the middle, as in numpy.
    """
    order = np.argsort(values, kind="stable")
    ascending = np.append(values[order], np.nan)
    medians = np.empty(len(weights))
    for part in _cut(weights):
        counts = np.cumsum(weights[part][:, order].astype(np.float64), axis=1)  # how many values are no larger
        total = counts[:, -1:] if counts.shape[1] else np.zeros((len(counts), 1))
        lower = (counts <= np.floor((total - 1) / 2)).sum(axis=1)
        upper = (counts <= np.floor(total / 2)).sum(axis=1)
        medians[part] = (ascending[lower] + ascending[upper]) / 2
    return np.where(weights.sum(axis=1) > 0, medians, np.nan)


def _cut(weights: NDArray[np.generic]) -> list[slice]:
    size = max(1, MAX_BLOCK_VALUES // max(1, weights.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weights), size)]
