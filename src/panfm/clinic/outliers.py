"""What the fitted images look like as a whole, so that one which is unlike them can be told: fitted here, scored there.

    standardised features z [N, D], groups [N]  --fit_outliers-->  panfm_predict.outliers.Outliers
    out-of-fold scores [N], groups [N]  --choose_outlier_threshold-->  what 99 % of the next images stay below

A Gaussian with a shrunk covariance. Few images are many fewer than a covariance has entries: the largest of its
eigenvalues come out too large and the smallest too small (0 where N < D), and a plain Mahalanobis distance is then
mostly noise. Ledoit and Wolf (2004, J Multivar Anal 88:365) mix it with a multiple of one, so that the expected squared
error is least; what they mix in is what the form of `Outliers` calls `residual`. Their error counts independent rows;
here it counts patients, since ten images of one patient say less about the others than ten patients do. On real images
(docs/monitoring.md) it ranks other modalities and things that are no skin above others as well as principal components,
neighbours and an unshrunk distance do or better, and its limit marks more of them; a probe's doubt is no warning.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm_predict.outliers import Outliers

Floats = NDArray[np.float64]
OUTLIER_QUANTILE = 0.99  # share of images of the same kind that should pass


def fit_outliers(z: NDArray[np.floating], groups: ArrayLike | None = None) -> Outliers:
    """Fit the Gaussian to standardised features [N, D] of N >= 1 images; groups [N]: the patients, None: each its own.

    Directions in which the images do not differ (constant features, more dimensions than images) get the residual
    variance. Where no direction differs it is 1, the variance of a standardised feature.
    """
    values = np.asarray(z, dtype=np.float64)
    N, D = values.shape
    centre = values.mean(axis=0)
    centred = values - centre
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)  # [min(N, D)], [min(N, D), D]
    sample = singular**2 / N
    mean = float(sample.sum()) / D
    if mean == 0:
        return Outliers(centre, np.zeros((0, D)), np.zeros(0), 1.0)
    shrinkage = compute_shrinkage(centred, groups)
    rank = int((sample > 1e-12 * sample[0]).sum())
    variances = (1 - shrinkage) * sample[:rank] + shrinkage * mean
    return Outliers(centre, axes[:rank], variances, shrinkage * mean)


def compute_shrinkage(centred: Floats, groups: ArrayLike | None = None) -> float:
    """Compute how much of the covariance of rows with mean 0 [N, D] gives way to a multiple of one: 0 to 1.

    Ledoit and Wolf's estimate where each row is a group [N] of its own; else its error is that of a mean over groups.
    At least 1 / number of groups.
    """
    N, D = centred.shape
    # The smaller of the two matrices tells both sizes: |x' x| = |x x'| (Frobenius).
    inner = centred @ centred.T if N <= D else centred.T @ centred
    size = float((inner**2).sum()) / N**2  # of the covariance, squared
    variance = float((centred**2).sum()) / (N * D)
    away = size - D * variance**2  # squared distance to the target
    number = np.arange(N) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    order = np.argsort(number, kind="stable")
    error = 0.0
    for rows in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
        own = centred[rows]  # [n, D]
        # |sum of a group's x x' - n covariance|^2, without any [D, D] matrix of the group
        with_covariance = float((inner[rows] ** 2).sum() if N <= D else ((own @ inner) * own).sum()) / N
        error += float(((own @ own.T) ** 2).sum()) - 2 * len(rows) * with_covariance + len(rows) ** 2 * size
    shrinkage = max(error, 0.0) / N**2 / away if away > 0 else 1.0
    # Of very few groups the error looks small, since each is half of what it is compared with; never less than one's.
    return min(max(shrinkage, 1 / (int(number.max()) + 1)), 1.0)


def choose_outlier_threshold(scores: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Choose what OUTLIER_QUANTILE of the next images of the same kind should not exceed, from out-of-fold scores [N].

    groups: [N], the patients. The rank is that among these images and those of one more patient, who has as many as the
    others on average; where all fit below it (99 patients are needed) it is the highest score, which images of the next
    patient exceed with a chance of 1 in number of patients + 1.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    N = len(values)
    num_groups = N if groups is None else len(np.unique(np.asarray(groups)))
    rank = int(np.ceil((N + N / num_groups) * OUTLIER_QUANTILE - 1e-9))
    return float(values[min(rank, N) - 1])
