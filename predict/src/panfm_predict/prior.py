"""The same image where the disease is rarer or commoner: probabilities under another prevalence.

    probabilities [B, K] at the fitted prevalence  --correct-->  [B, K] at the one of this clinic

By Bayes' rule, multiplied by new / old share of each class and brought to sum 1 (Elkan 2001; Saerens et al. 2002). It
holds where the images of each class look the same here and there and only their shares differ. With two classes the
order of images does not change; the operating point is therefore applied before the correction, as it was measured.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from panfm_predict.errors import PredictError

Floats = NDArray[np.floating]
TOLERANCE = 1e-6  # of a sum of shares


def correct(probabilities: Floats, old: Floats, new: Floats) -> NDArray[np.float64]:
    """Turn probabilities [B, K] at the shares `old` [K] into those at the shares `new` [K]: float64 [B, K]."""
    weighted = probabilities.astype(np.float64) * (np.asarray(new, np.float64) / np.asarray(old, np.float64))
    total: NDArray[np.float64] = weighted / weighted.sum(axis=1, keepdims=True)
    return total


def complete_prevalence(given: Mapping[str, float], fitted: Mapping[str, float]) -> dict[str, float]:
    """Complete a prevalence stated for some classes: the others share what is left in proportion to `fitted`.

    Raises PredictError for an unknown class, a share that is not between 0 and 1, and shares that do not leave room.
    """
    for name, share in given.items():
        if name not in fitted:
            raise PredictError(f"prevalence of {name!r}: no such class; it has {', '.join(fitted)}")
        if not (math.isfinite(share) and 0 < share < 1):
            raise PredictError(f"prevalence {name}={share:g}: must lie between 0 and 1, both excluded; try {name}=0.05")
    stated, others = sum(given.values()), [name for name in fitted if name not in given]
    if others and stated >= 1 - TOLERANCE:
        raise PredictError(
            f"prevalences add up to {stated:g}: they must leave room for {', '.join(others)}; lower them"
        )
    if not others and abs(stated - 1) > TOLERANCE:
        raise PredictError(f"prevalences add up to {stated:g}: those of all classes must add up to 1; leave one out")
    left = sum(fitted[name] for name in others)
    return {name: given[name] if name in given else (1 - stated) * share / left for name, share in fitted.items()}


def parse_prevalence(texts: Sequence[str]) -> dict[str, float]:
    """Read "melanoma=0.05" as a command line has it. Raises PredictError."""
    given: dict[str, float] = {}
    for text in texts:
        name, sign, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not sign or math.isnan(value):
            raise PredictError(f"--prevalence {text}: must be CLASS=SHARE, such as melanoma=0.05")
        if name in given:
            raise PredictError(f"--prevalence {name}: stated twice; state it once")
        given[name] = value
    return given
