"""Protocols `panderm_compat` and `dinov2_compat`: published linear probes, to compare with published numbers.

    features [N, D] of the labelled images, as the publication reads them (CLS)  ->  its probe  ->  scores [M, K]

They are never ranked with `linear_probe`: `measures/published_probes.py` says what is wrong with each. Metrics,
intervals and label fractions are panfm's, so only what is fitted is the publication's.
"""

import numpy as np
from numpy.typing import NDArray

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.protocol import Scored, Trial
from panfm.measures.published_probes import fit_dinov2_probe, fit_panderm_probe


@config_class
class PandermCompatConfig:
    """Settings of PanDerm's probe: it has none."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""


@config_class
class Dinov2CompatConfig:
    """Settings of DINOv2's logistic regression."""

    variant: str = "default"
    """Name on the board. Results of another recipe under the same name are stale and made again."""


def score_panderm_compat(
    trial: Trial, features: NDArray[np.float32], config: PandermCompatConfig, *, has_cls: bool
) -> Scored:
    """Return probabilities for the trial's test part. features: [N, D] of all images of the split, in its order.

    has_cls: whether the encoder has a class token, which it then must be read by (UserError).
    """
    _check_pooling(trial, has_cls)
    train, test = trial.train, trial.test
    probe = fit_panderm_probe(features[train], trial.split.labels[train], num_classes=trial.num_classes)
    return Scored(
        scores=probe.predict(features[test]),
        chosen={"C": probe.C, "is_zero": not probe.weight.any(), "converged": probe.converged},
    )


def score_dinov2_compat(
    trial: Trial, features: NDArray[np.float32], config: Dinov2CompatConfig, *, has_cls: bool
) -> Scored:
    """Return probabilities for the trial's test part. features: [N, D] of all images of the split, in its order.

    has_cls: whether the encoder has a class token, which it then must be read by (UserError).
    """
    _check_pooling(trial, has_cls)
    train, test = trial.train, trial.test
    probe = fit_dinov2_probe(features[train], trial.split.labels[train], num_classes=trial.num_classes, seed=trial.seed)
    return Scored(scores=probe.predict(features[test]), chosen={"C": probe.C, "converged": probe.converged})


def _check_pooling(trial: Trial, has_cls: bool) -> None:
    """Both publications read the class token; an encoder that has none (a CNN) is read as it was published."""
    if has_cls and trial.encoder.pooling != "cls":
        raise UserError(
            f"encoder {trial.encoder.name}: its pooling is {trial.encoder.pooling}, and {trial.protocol} reads the "
            f"class token; give the address {trial.encoder.address} with ?pooling=cls, under a name of its own"
        )
