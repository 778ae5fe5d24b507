"""Protocol `linear_probe`: a ridge-penalised logistic regression on frozen features; the ranked protocol.

    features [N, D] of the labelled images -> standardise, choose C by grouped cross-validation, refit -> scores [M, K]

C is chosen inside the labelled training images by grouped, stratified cross-validation on log-loss: neither the val
fold nor the test fold takes part. Loss = sum of cross-entropies + |W|^2 / (2 C), bias unpenalised.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.evaluation.operating import describe_thresholds
from panfm.evaluation.protocol import Scored, Trial
from panfm.measures.probe import ProbeFit, fit_probe_cv
from panfm.measures.probe_batched import Labelled, fit_probes_cv


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
    """Return probabilities for the trial's test part, the C and, for two classes, the thresholds that were chosen."""
    return _score_fit(trial, fit_linear_probe(trial, features, config), features)


def score_linear_probes(
    trials: Sequence[Trial], features: NDArray[np.float32], config: LinearProbeConfig, device: torch.device
) -> list[Scored]:
    """Score several trials on the same features at once, as a GPU likes it; what each says is `score_linear_probe`'s.

    features: [N, D] of all images of the trials' common split, in its order.
    """
    split = trials[0].split
    assert all(trial.split is split for trial in trials), "one split, one matrix of features"
    choices = [Labelled(t.train, split.labels[t.train], split.groups[t.train], t.seed) for t in trials]
    values = np.asarray(features, dtype=np.float64)
    fits = fit_probes_cv(values, choices, num_classes=trials[0].num_classes, num_folds=config.num_folds, device=device)
    return [_score_fit(trial, fit, values) for trial, fit in zip(trials, fits, strict=True)]


def _score_fit(trial: Trial, fit: ProbeFit, features: NDArray[np.floating]) -> Scored:
    scores = fit.probe.predict(np.asarray(features[trial.test], dtype=np.float64))
    return Scored(scores=scores, chosen=describe_probe(trial, fit))


def score_probe(trial: Trial, inputs: NDArray[np.float64], num_folds: int, chosen: Mapping[str, Any]) -> Scored:
    """The linear probe on whatever numbers a protocol makes of its units: inputs [N, E] of all units of the split.

    chosen: what the protocol chose besides; it stands beside what the probe chose.
    """
    fit = fit_probe_cv(
        inputs[trial.train],
        trial.split.labels[trial.train],
        trial.split.groups[trial.train],
        num_classes=trial.num_classes,
        seed=trial.seed,
        num_folds=num_folds,
    )
    return Scored(fit.probe.predict(inputs[trial.test]), {**describe_probe(trial, fit), **chosen})


def describe_probe(trial: Trial, fit: ProbeFit) -> dict[str, Any]:
    """What a reader of the Result needs of a probe of the trial's classes: the fit and, for two classes, thresholds."""
    return {**describe_fit(fit), **describe_thresholds(trial.split.labels[trial.train], fit.held_out)}


def describe_fit(fit: ProbeFit) -> dict[str, Any]:
    """What a reader of the Result needs to judge the fit: C, whether the grid was too narrow, convergence."""
    return {
        "C": float(fit.C),
        "at_boundary": bool(fit.at_boundary),
        "num_folds": int(fit.num_folds),
        "converged": bool(fit.converged),
    }
