"""Metrics of retrieval: at which place of a gallery the first image stands that shows what the query shows.

    scores [N, 2]: rank of the best-placed partner (1 = first), size of the gallery;  targets [N, 1]: partners in it
      -> share of queries with a rank of at most k; median rank

A rank among equal similarities is the middle of their places, so an encoder that finds all images alike ranks in the
middle of the gallery, not first.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from panfm.measures.outcomes import Floats, Measure, Outcome
from panfm.measures.weighted import compute_means, compute_medians


def _recall_at(k: int) -> Measure:
    def compute(outcome: Outcome, weights: NDArray[np.generic]) -> Floats:
        return compute_means((outcome.scores[:, 0] <= k).astype(np.float64), weights)

    return Measure(
        f"Recall at {k}",
        "higher",
        f"Share of queries with a partner among the {k} most similar of the gallery. Depends on the gallery's size.",
        compute=compute,
        explain=_explain,
        chance=lambda outcome: float(_compute_hit_chance(outcome, k).mean()),
        perfect=1.0,
    )


def _compute_hit_chance(outcome: Outcome, k: int) -> Floats:
    """Probability that k of a gallery of G, drawn blindly, hold one of its P partners: 1 - C(G - P, k) / C(G, k)."""
    G, P = outcome.scores[:, 1], outcome.targets[:, 0]
    possible = G - P - k >= 0  # else k images are more than there are without a partner
    others = np.where(possible, G - P, k)
    whole = np.where(possible, G, k)
    log_miss = gammaln(others + 1) - gammaln(others - k + 1) - gammaln(whole + 1) + gammaln(whole - k + 1)
    return np.asarray(np.where(possible, 1 - np.exp(log_miss), 1.0))


def _compute_median(outcome: Outcome, weights: NDArray[np.generic]) -> Floats:
    return compute_medians(outcome.scores[:, 0], weights)


def _compute_median_chance(outcome: Outcome) -> float:
    """Median over queries of the rank to be expected of the first of P partners that lie blindly among G."""
    return float(np.median((outcome.scores[:, 1] + 1) / (outcome.targets[:, 0] + 1)))


def _explain(outcome: Outcome) -> str | None:
    return None if len(outcome.scores) else "no query with a partner in the gallery"


MEASURES: dict[str, Measure] = {
    "recall_at_1": _recall_at(1),
    "recall_at_5": _recall_at(5),
    "recall_at_10": _recall_at(10),
    "median_rank": Measure(
        "Median rank",
        "lower",
        "Median over queries of the place of the best-placed partner; 1 is the first. Depends on the gallery's size.",
        compute=_compute_median,
        explain=_explain,
        chance=_compute_median_chance,
        perfect=1.0,
    ),
}
