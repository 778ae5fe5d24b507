"""Is an image unlike anything that the classifier was fitted on: one number from its standardised feature.

    z float [B, D]  --compute_scores-->  float64 [B], compared with the card's threshold

A Gaussian in the few directions in which the fitted images differ most, and one common variance for all the others:
the Mahalanobis distance of probabilistic principal component analysis (Tipping and Bishop 1999). It is divided by D, so
that an image from the same source scores about 1 whatever the encoder.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Outliers:
    """What was fitted, in the space of standardised features.

    centre: [D]. components: [Q, D], orthonormal rows. variances: [Q], of the projections on them. residual: variance
    of each direction that is left out.
    """

    centre: Floats
    components: Floats
    variances: Floats
    residual: float


def project(z: Floats, outliers: Outliers) -> NDArray[np.float64]:
    """Project standardised features [B, D] on the components: float64 [B, Q]."""
    return (z.astype(np.float64) - outliers.centre) @ outliers.components.T.astype(np.float64)


def compute_scores(z: Floats, outliers: Outliers) -> NDArray[np.float64]:
    """Score standardised features [B, D]: float64 [B], 0 at the centre, larger the less like the fitted images."""
    projections = project(z, outliers)  # [B, Q]
    distance = ((z.astype(np.float64) - outliers.centre) ** 2).sum(axis=1)
    # Of orthonormal rows, so that the rest's length needs no second matrix product; rounding may leave it below zero.
    rest = np.maximum(distance - (projections**2).sum(axis=1), 0.0)
    inside = (projections**2 / outliers.variances).sum(axis=1)
    scores: NDArray[np.float64] = (inside + rest / outliers.residual) / z.shape[1]
    return scores
