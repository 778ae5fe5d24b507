"""Protocol `out_of_distribution`: does the probe notice an image of a class that it was never taught?

    features, known classes -> linear probe -> probabilities [M, K] --+-> scores [M, K + 1]
                            -> unknownness (higher = more unknown) ---+

Five ways to tell, none of which sees an unknown image in training:
max_probability       1 - the highest probability (Hendrycks and Gimpel 2017, arXiv 1610.02136)
energy                -log sum exp of the probe's logits (Liu et al. 2020, arXiv 2010.03759)
mahalanobis           squared distance to the nearest class mean, one shrunk covariance (Lee et al. 2018, 1807.03888)
relative_mahalanobis  the same less the distance to the mean of all, so that what varies in every class counts little
                      (Ren et al. 2021, arXiv 2106.09022)
knn                   cosine distance to the k-th nearest training image (Sun et al. 2022, arXiv 2204.06507)
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import logsumexp

from panfm.config import config_class
from panfm.evaluation.linear_probe import LinearProbeConfig, describe_fit, fit_linear_probe
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.measures.probe import Probe

Floats = NDArray[np.float64]
Unknownness = Literal["max_probability", "energy", "mahalanobis", "relative_mahalanobis", "knn"]
CHUNK_VALUES = 8_000_000  # similarities held at once: 64 MB


@config_class
class OutOfDistributionConfig:
    """Settings of the detection of unknown classes."""

    variants: tuple[Unknownness, ...] = ("max_probability", "energy", "mahalanobis", "relative_mahalanobis", "knn")
    """How unknownness is told, a section on the board each; the probabilities of the known classes are the same."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the probe's inner cross-validation; fewer where the rarest class has fewer groups."""
    k: int = Field(default=10, ge=1)
    """Of variant knn: which neighbour's distance counts; the farthest where there are fewer training images."""


def score_out_of_distribution(trial: Trial, material: Material, config: OutOfDistributionConfig) -> Scored:
    """Return [M, K + 1] for the trial's test part: probabilities of the known classes, then the unknownness.

    Raises UserError where fewer than two known classes have labels.
    """
    K = trial.num_classes
    known = trial.split.labels[trial.train] < K
    assert known.all(), "an unknown class never trains"
    features = material.features[trial.split.rows]
    fit = fit_linear_probe(trial, features, LinearProbeConfig(num_folds=config.num_folds))
    train, labels = np.asarray(features[trial.train], dtype=np.float64), trial.split.labels[trial.train]
    test = np.asarray(features[trial.test], dtype=np.float64)
    probabilities = fit.probe.predict(test)
    chosen: dict[str, Any] = describe_fit(fit)
    variant: Unknownness = trial.recipe["variant"]
    if variant == "max_probability":
        unknownness = 1 - probabilities.max(axis=1)
    elif variant == "energy":
        unknownness = compute_energy(fit.probe, test)
    elif variant == "knn":
        chosen["k"] = min(config.k, len(train))
        unknownness = compute_kth_distance(train, test, config.k)
    else:
        # In the probe's standardised features: the shrinkage pulls towards one variance for all of them.
        train, test = ((values - fit.probe.mean) / fit.probe.scale for values in (train, test))
        unknownness, chosen["shrinkage"] = compute_mahalanobis(train, labels, test)
        if variant == "relative_mahalanobis":
            unknownness = unknownness - compute_mahalanobis(train, np.zeros_like(labels), test)[0]
    return Scored(np.hstack([probabilities, unknownness[:, None]]), chosen)


def compute_energy(probe: Probe, features: Floats) -> Floats:
    """Compute -log sum exp of the probe's logits [M]: low where some class is far above its usual."""
    logits = (features - probe.mean) / probe.scale @ probe.weight.T + probe.bias
    return np.asarray(-logsumexp(logits, axis=1))


def compute_mahalanobis(train: Floats, labels: NDArray[np.int64], test: Floats) -> tuple[Floats, float]:
    """Compute the squared Mahalanobis distance [M] to the nearest class mean, and the covariance's shrinkage.

    train: [N, D], labels [N]. The covariance within classes is Ledoit and Wolf's, invertible also where N < D.
    """
    classes, number = np.unique(labels, return_inverse=True)
    means = np.stack([train[number == k].mean(axis=0) for k in range(len(classes))])
    covariance, shrinkage = compute_shrunk_covariance(train - means[number])
    values, axes = np.linalg.eigh(covariance)
    # Features that are constant in training have variance 0 with or without shrinkage towards a mean of 0.
    whitened = axes / np.sqrt(np.maximum(values, 1e-10 * max(float(values[-1]), 1e-10)))
    distances = [(((test - mean) @ whitened) ** 2).sum(axis=1) for mean in means]
    return np.asarray(np.min(distances, axis=0)), shrinkage


def compute_shrunk_covariance(centred: Floats) -> tuple[Floats, float]:
    """Compute the covariance [D, D] of rows with mean 0 [N, D], shrunk towards a multiple of one, and by how much.

    The shrinkage is the one with the least expected squared error (Ledoit and Wolf 2004, J Multivar Anal 88:365).
    """
    N, D = centred.shape
    covariance = centred.T @ centred / N
    variance = float(np.trace(covariance)) / D
    size = float((covariance**2).sum())
    away = size / D - variance**2  # squared distance to the target
    error = (float(((centred**2).sum(axis=1) ** 2).mean()) - size) / (N * D)
    shrinkage = min(max(error, 0.0) / away, 1.0) if away > 0 else 0.0
    return (1 - shrinkage) * covariance + shrinkage * variance * np.eye(D), shrinkage


def compute_kth_distance(train: Floats, test: Floats, k: int) -> Floats:
    """Compute the cosine distance [M] of test [M, D] to the k-th nearest of train [N, D]; to the farthest if N < k."""
    own, others = _normalise(test), _normalise(train)
    k = min(k, len(others))
    distances = np.empty(len(own))
    chunk = max(1, CHUNK_VALUES // len(others))
    for start in range(0, len(own), chunk):
        similarity = own[start : start + chunk] @ others.T  # [m, N]
        distances[start : start + chunk] = 1 - np.partition(similarity, len(others) - k, axis=1)[:, len(others) - k]
    return distances


def _normalise(values: Floats) -> Floats:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
