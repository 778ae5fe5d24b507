"""Is the encoder still learning many directions, or collapsing onto few? Two numbers from pooled features [N, D].

Pure functions of a feature matrix; pretrain.py computes them every few steps on images that it trains on. Compare them
within a run and between runs of one recipe, not between methods or batch sizes.
"""

import torch
from pydantic import Field
from torch import Tensor

from panfm.config import config_class


@config_class
class MonitorConfig:
    """How often the features are looked at."""

    every: int = Field(default=200, ge=0)
    """Steps between two looks; 0 never looks."""
    num_images: int = Field(default=256, ge=2)
    """Images a look, at most this rank's share of a global batch: RankMe cannot exceed it."""


def compute_rankme(features: Tensor) -> float | None:
    """Effective rank of features [N, D] (RankMe: Garrido et al. 2023, arXiv:2210.02885), between 1 and min(N, D).

    exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7, s the singular values. None where the features are not
    finite or all zero.
    """
    singular_values = _singular_values(features)
    if singular_values is None or float(singular_values.sum()) == 0.0:
        return None
    shares = singular_values / singular_values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def compute_feature_std_ratio(features: Tensor) -> float | None:
    """Mean over dimensions of the standard deviation of L2-normalised features [N, D], times sqrt(D).

    1 for features spread evenly over the sphere, 0 for a collapse onto one point (Chen and He 2021,
    arXiv:2011.10566, section 4.1). None where the features are not finite.
    """
    if not bool(torch.isfinite(features).all()):
        return None
    normalised = torch.nn.functional.normalize(features.double(), dim=1)
    return float(normalised.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5)


def _singular_values(features: Tensor) -> Tensor | None:
    if not bool(torch.isfinite(features).all()):
        return None
    values: Tensor = torch.linalg.svdvals(features.double())
    return values
