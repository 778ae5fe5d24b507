"""Metrics of what stands out: a lesion among a person's own (ugly duckling), an image of no known class.

    ugly_duckling        scores [N, 2]: 1 - s, s (higher = stands out); labels 1 = positive; groups = persons
    out_of_distribution  scores [N, K + 1]: K classes, then the unknownness; labels K = unknown

The metrics of classification of both are those of `metrics`; here is what only these families have.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from panfm.measures.metrics import compute_replicates
from panfm.measures.outcomes import Floats, Measure, Outcome
from panfm.measures.weighted import compute_ratios


def compute_ranks_within(scores: Floats, groups: NDArray[np.str_]) -> Floats:
    """Rank each of N scores among those of its group, the highest first (1); equal ones share their middle place."""
    _, number = np.unique(groups, return_inverse=True)
    order = np.lexsort((-scores, number))
    sorted_scores, sorted_groups = scores[order], number[order]
    places = np.arange(len(scores))
    new_group = np.append(True, sorted_groups[1:] != sorted_groups[:-1])[: len(scores)]
    new_step = new_group | np.append(True, sorted_scores[1:] != sorted_scores[:-1])[: len(scores)]
    step = np.cumsum(new_step) - 1
    middle = np.bincount(step, places) / np.bincount(step)  # of the places of equal scores
    ranks = np.empty(len(scores))
    ranks[order] = middle[step] - np.maximum.accumulate(np.where(new_group, places, 0)) + 1
    return ranks


def _recall_at(k: int) -> Measure:
    def compute(outcome: Outcome, weights: NDArray[np.generic]) -> Floats:
        # A person is drawn whole, so ranks within one are the same in every replicate.
        positive = (outcome.labels == 1).astype(np.float64)
        found = positive * (compute_ranks_within(outcome.scores[:, 1], outcome.groups) <= k)
        return compute_ratios(found, positive, weights)

    def compute_chance(outcome: Outcome) -> float:
        _, number, sizes = np.unique(outcome.groups, return_inverse=True, return_counts=True)
        return float(np.minimum(1.0, k / sizes[number])[outcome.labels == 1].mean())

    return Measure(
        f"Recall at {k} a person",
        "higher",
        f"Share of the positive images that are among the {k} of their person that stand out most.",
        compute=compute,
        explain=lambda outcome: None if (outcome.labels == 1).any() else "no positive test image",
        chance=compute_chance,
        perfect=1.0,
    )


def _find_unknown(outcome: Outcome) -> NDArray[np.int64]:
    return np.asarray(outcome.labels == outcome.scores.shape[1] - 1, dtype=np.int64)


def _area(name: str) -> Callable[[Outcome, NDArray[np.generic]], Floats]:
    def compute(outcome: Outcome, weights: NDArray[np.generic]) -> Floats:
        unknownness = outcome.scores[:, -1]
        return compute_replicates(name, _find_unknown(outcome), np.stack([-unknownness, unknownness], 1), weights)

    return compute


def _compute_false_positives(outcome: Outcome, weights: NDArray[np.generic]) -> Floats:
    # Seen from the other side it is a metric that exists: knowns that pass while at least 95 % of the unknown do not.
    unknownness = outcome.scores[:, -1]
    scores = np.stack([unknownness, -unknownness], axis=1)
    return 1 - compute_replicates("sensitivity_at_95_specificity", 1 - _find_unknown(outcome), scores, weights)


def _explain_unknown(outcome: Outcome) -> str | None:
    unknown = _find_unknown(outcome)
    if unknown.all():  # also of no unit at all
        return "no test image of a known class"
    return None if unknown.any() else "no test image of an unknown class"


MEASURES_UGLY_DUCKLING: dict[str, Measure] = {"recall_at_1": _recall_at(1), "recall_at_3": _recall_at(3)}
MEASURES_OUT_OF_DISTRIBUTION: dict[str, Measure] = {
    "unknown_auroc": Measure(
        "AUROC of unknown",
        "higher",
        "Probability that an image of an unknown class looks more unknown than one of a known class.",
        compute=_area("auroc"),
        explain=_explain_unknown,
        chance=lambda outcome: 0.5,
        perfect=1.0,
    ),
    "unknown_auprc": Measure(
        "AUPRC of unknown",
        "higher",
        "Average precision with the unknown classes as the positive one. Depends on their share.",
        compute=_area("auprc"),
        explain=_explain_unknown,
        chance=lambda outcome: float(_find_unknown(outcome).mean()),
        perfect=1.0,
    ),
    "fpr_at_95_tpr": Measure(
        "False positives at 95 % of unknown",
        "lower",
        "Share of the images of known classes that are called unknown where at least 95 % of the unknown are.",
        compute=_compute_false_positives,
        explain=_explain_unknown,
        chance=lambda outcome: 0.95,
        perfect=0.0,
    ),
}
