"""The operating point: one threshold on the probability of the positive class, and what may be promised of it.

    labels, out-of-fold probabilities, groups, wanted side and share  --choose_operating_point-->  OperatingCard

A threshold that lets through just 95 % of the positives at hand will let through fewer of the next ones: it was put
where these happen to lie. With n positives of which r are at or above it, the share of the next ones is on average
n r / (n + 1), and its distribution is Beta(n r, n (1 - r) + 1) whatever the scores are (Wilks 1941; split conformal
prediction, Vovk 2005). So the threshold is set where that average reaches what was asked for, and 95 % cannot be had
from fewer than 19 positives. n is the number of images, less where they cluster in few patients (Kish). The other side
has not chosen the threshold: it is a plain proportion with its clustered Wilson interval.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from panfm.measures.intervals import (
    CONFIDENCE,
    Estimate,
    count_effective_groups,
    estimate_proportion,
    number_groups,
)
from panfm.measures.operating_points import ROUNDING, Side, choose_threshold

MIN_CARD_GROUPS = 20  # patients with the positive class, and without
Unit = Literal["patients", "images"]


@dataclass(frozen=True)
class Wanted:
    """What the operating point is to reach: sensitivity 0.95."""

    side: Side
    target: float


@dataclass(frozen=True)
class OperatingCard:
    """An image is flagged where the calibrated probability of `positive` is at least `threshold`.

    num_positive, num_negative: patients (images where patients are unknown) behind sensitivity and specificity.
    """

    positive: str
    wanted: Wanted
    threshold: float
    sensitivity: Estimate
    specificity: Estimate
    num_positive: int
    num_negative: int


def choose_operating_point(
    labels: ArrayLike, probabilities: ArrayLike, groups: ArrayLike, *, positive: str, wanted: Wanted, unit: Unit
) -> OperatingCard | str:
    """Choose the threshold on out-of-fold probabilities [N] of the class `positive`, or say why there is none.

    labels: [N], 1 = positive. groups: [N], the patients.
    """
    is_positive, probability = np.asarray(labels) == 1, np.asarray(probabilities, dtype=np.float64)
    group = np.asarray(groups)
    num_positive, num_negative = len(np.unique(group[is_positive])), len(np.unique(group[~is_positive]))
    for number, which in ((num_positive, f"with {positive}"), (num_negative, f"without {positive}")):
        if number < MIN_CARD_GROUPS:
            return f"{number} {unit} {which}; at least {MIN_CARD_GROUPS} are needed"
    deciding = is_positive if wanted.side == "sensitivity" else ~is_positive
    effective = count_effective_groups(number_groups(group[deciding])[0])
    share = wanted.target * (effective + 1) / effective  # of those at hand, for `target` of the next ones
    if share > 1 + ROUNDING:
        way = f"from {int(np.ceil(wanted.target / (1 - wanted.target) - ROUNDING))} {unit} on"
        kind = f"{'with' if wanted.side == 'sensitivity' else 'without'} {positive}"
        return (
            f"a {wanted.side} of {100 * wanted.target:g} % can be promised {way}; those {kind} count as "
            f"{effective:.1f} (several images of one patient count less than as many patients); ask for less, or add "
            "patients"
        )
    chosen = choose_threshold(is_positive.astype(np.int64), probability, wanted.side, min(share, 1.0))
    assert chosen.value is not None and chosen.reached is not None, "both classes occur"
    called = probability >= chosen.value
    promised = _promise(chosen.reached, effective)
    if wanted.side == "sensitivity":
        sensitivity, specificity = promised, estimate_proportion(~called[~is_positive], group[~is_positive])
    else:
        sensitivity, specificity = estimate_proportion(called[is_positive], group[is_positive]), promised
    return OperatingCard(positive, wanted, chosen.value, sensitivity, specificity, num_positive, num_negative)


def _promise(reached: float, number: float) -> Estimate:
    """The share of the next ones at a threshold that `reached` of `number` at hand: mean and interval of the Beta."""
    inside, outside = number * reached, number * (1 - reached) + 1
    tail = (1 - CONFIDENCE) / 2
    low, high = beta.ppf([tail, 1 - tail], inside, outside)
    return Estimate(inside / (inside + outside), float(low), float(high))


def compute_predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float | None, float | None]:
    """Compute the shares of flagged images that are positive and of the others that are not; None where none is."""
    flagged = sensitivity * prevalence + (1 - specificity) * (1 - prevalence)
    ppv = sensitivity * prevalence / flagged if flagged > 0 else None
    npv = specificity * (1 - prevalence) / (1 - flagged) if flagged < 1 else None
    return ppv, npv
