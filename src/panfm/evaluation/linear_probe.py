"""Protocol `linear_probe`: a ridge-penalised logistic regression on frozen features; the ranked protocol.

    features [N, D] of the labelled images -> standardise, choose C by grouped cross-validation, refit -> scores [M, K]

C is chosen inside the labelled training images by grouped, stratified cross-validation on log-loss: neither the val
fold nor the test fold takes part. Loss = sum of cross-entropies + |W|^2 / (2 C), bias unpenalised.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.evaluation.protocol import Scored, Trial
from panfm.measures.probe import ProbeFit, fit_probe_cv


@config_class
class LinearProbeConfig:
    """Settings of the linear probe."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where the rarest class has fewer groups."""


def fit_linear_probe(trial: Trial, features: NDArray[np.float32], config: LinearProbeConfig) -> ProbeFit:
    """Fit the probe on the trial's labelled images. features: [N, D] of all images of the split, in its order."""
    split, train = trial.split, trial.train
    return fit_probe_cv(
        np.asarray(features[train], dtype=np.float64),
        split.labels[train],
        split.groups[train],
        num_classes=trial.num_classes,
        seed=trial.seed,
        num_folds=config.num_folds,
    )


def score_linear_probe(trial: Trial, features: NDArray[np.float32], config: LinearProbeConfig) -> Scored:
    """Return probabilities for the trial's test part, and the C that was chosen."""
    fit = fit_linear_probe(trial, features, config)
    scores = fit.probe.predict(np.asarray(features[trial.test], dtype=np.float64))
    return Scored(scores=scores, chosen=describe_fit(fit))


def describe_fit(fit: ProbeFit) -> dict[str, Any]:
    """What a reader of the Result needs to judge the fit: C, whether the grid was too narrow, convergence."""
    return {
        "C": float(fit.C),
        "at_boundary": bool(fit.at_boundary),
        "num_folds": int(fit.num_folds),
        "converged": bool(fit.converged),
    }
