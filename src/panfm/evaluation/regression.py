"""Protocols `regression` and `ordinal`: linear models of a number, and of a grade among ordered classes.

    features [N, D] of the labelled images, numbers [N] -> ridge, C by grouped cross-validation     -> numbers [M, 1]
    features [N, D] of the labelled images, grades [N]  -> a binary probe a step, one C for all     -> scores [M, K]

Both choose their penalty inside the labelled training images, as the linear probe does, on its grid: by the squared
error, or by the log-loss summed over the steps of the scale. An ordinal task can also be measured by the linear probe,
which knows nothing of the order: what the order is worth is the difference.
"""

import numpy as np
from pydantic import Field

from panfm.config import config_class
from panfm.evaluation.families import RegressionTarget
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.measures.ordinal import fit_ordinal_cv
from panfm.measures.ridge import fit_ridge_cv


@config_class
class RegressionConfig:
    """Settings of the ridge regression."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where there are fewer groups."""


@config_class
class OrdinalConfig:
    """Settings of the probe of ordered classes."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where the rarest class has fewer groups."""


def score_regression(trial: Trial, material: Material, config: RegressionConfig) -> Scored:
    """Return a number for each image of the trial's test part [M, 1], within the range that the card declares.

    The numbers to learn from are the split's `targets` [N, 1]. Raises UserError where those of training are all equal.
    """
    split, train, target = trial.split, trial.train, trial.card.target
    assert isinstance(target, RegressionTarget) and split.targets.shape == (len(split.keys), 1), "one number an image"
    features = np.asarray(material.features[split.rows], dtype=np.float64)
    fit = fit_ridge_cv(
        features[train], split.targets[train, 0], split.groups[train], seed=trial.seed, num_folds=config.num_folds
    )
    predicted = fit.ridge.predict(features[trial.test])
    low, high = (-np.inf if target.low is None else target.low), (np.inf if target.high is None else target.high)
    chosen = {
        "C": float(fit.C),
        "at_boundary": bool(fit.at_boundary),
        "num_folds": int(fit.num_folds),
        "num_clipped": int(((predicted < low) | (predicted > high)).sum()),
    }
    return Scored(scores=np.clip(predicted, low, high)[:, None], chosen=chosen)


def score_ordinal(trial: Trial, material: Material, config: OrdinalConfig) -> Scored:
    """Return probabilities for the trial's test part [M, K], and the C that was chosen."""
    split, train = trial.split, trial.train
    features = np.asarray(material.features[split.rows], dtype=np.float64)
    fit = fit_ordinal_cv(
        features[train],
        split.labels[train],
        split.groups[train],
        num_classes=trial.num_classes,
        seed=trial.seed,
        num_folds=config.num_folds,
    )
    chosen = {
        "C": float(fit.C),
        "at_boundary": bool(fit.at_boundary),
        "num_folds": int(fit.num_folds),
        "converged": bool(fit.converged),
    }
    return Scored(scores=fit.probe.predict(features[trial.test]), chosen=chosen)
