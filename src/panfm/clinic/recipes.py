"""What learns from the labels: a probe on frozen features, or a low-rank change of the encoder with its head.

    rows to learn from, rows to score  --Recipe-->  Learned: linear head of a standardised feature, features of both

Both end in one shape, so that everything after them (folds, temperature, outliers, the folder) is written once.
Whatever a recipe chooses, it chooses inside the rows that it learns from, or takes over from what is already learned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from panfm.encoder.network import EncoderNetwork
from panfm.measures.probe import fit_probe, fit_probe_cv

Floats = NDArray[np.float64]
# A feature that hardly varies among a hundred images (a channel that one of them woke) makes the next one that wakes it
# lie thousands of spreads away: of EfficientNet's 1,280 the outlier limit then was 36,000 and 4 % of dermoscopic images
# were told from clinical ones; so it is 7 and 75 %, at 1.6 % false alarms. A ViT's features vary alike, and stay.
LEAST_SCALE = 0.5  # of the median feature's
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Learned:
    """A linear head on standardised features, with the features of what it learned from and of what it has to score.

    mean, scale: [D]. weight: [K, D], bias: [K], of standardised features. learned_from: [n, D], to_score: [m, D].
    chosen: what the recipe chose or did, in plain values. network: the changed encoder; None = as it was.
    """

    mean: Floats
    scale: Floats
    weight: Floats
    bias: Floats
    learned_from: Floats
    to_score: Floats
    chosen: dict[str, float | int | str]
    network: EncoderNetwork | None = None

    def standardise(self, features: NDArray[np.floating]) -> Floats:
        """Return features [B, D] in units of what was learned from."""
        return np.asarray((features.astype(np.float64) - self.mean) / self.scale)

    def compute_logits(self, features: NDArray[np.floating]) -> Floats:
        """Return logits [B, K] of features [B, D]."""
        return np.asarray(self.standardise(features) @ self.weight.T + self.bias)


@dataclass(frozen=True)
class Recipe:
    """learn: places to learn from [n], places to score [m], what was learned before or None.

    What was learned before lends its choices.

    chooses: whether there are choices to take over.
    """

    learn: Callable[[Ints, Ints, Learned | None], Learned]
    chooses: bool


def widen_scale(learned: Learned) -> Learned:
    """Standardise no feature by less than LEAST_SCALE of the median one's spread; the logits stay as they are."""
    scale = np.maximum(learned.scale, LEAST_SCALE * np.median(learned.scale))
    return replace(learned, scale=scale, weight=learned.weight * scale / learned.scale)


def build_probe_recipe(
    features: NDArray[np.floating], labels: Ints, groups: NDArray, *, num_classes: int, seed: int
) -> Recipe:
    """The linear probe on frozen features [N, D]; its strength comes from grouped folds within what it learns from."""
    values = np.asarray(features, dtype=np.float64)

    def learn(train: Ints, test: Ints, like: Learned | None) -> Learned:
        if like is not None:
            probe = fit_probe(values[train], labels[train], num_classes=num_classes, C=float(like.chosen["C"]))
        else:
            fit = fit_probe_cv(values[train], labels[train], groups[train], num_classes=num_classes, seed=seed)
            probe = fit.probe
        chosen: dict[str, float | int | str] = {"C": float(probe.C)}
        learned = Learned(probe.mean, probe.scale, probe.weight, probe.bias, values[train], values[test], chosen)
        return widen_scale(learned)

    return Recipe(learn, chooses=True)
