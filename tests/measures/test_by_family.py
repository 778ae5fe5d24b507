"""The one door to all families' metrics: what an interval's declared regime counts."""

import numpy as np
import pytest

from panfm.measures.by_family import count_regime_groups, estimate_outcome
from panfm.measures.outcomes import Outcome


def make_outcome(labels: np.ndarray, num_scores: int, targets: np.ndarray | None = None) -> Outcome:
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(num_scores), len(labels))
    groups = np.array([f"p{number // 2}" for number in range(len(labels))])
    given = np.zeros((len(labels), 0)) if targets is None else targets
    return Outcome(labels, scores, groups, given, np.array([100.0]))


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("out_of_distribution", "unknown_auroc", (10, "in the rarer of known and unknown")),
        ("out_of_distribution", "balanced_accuracy", (10, "in the rarer class")),
        ("ugly_duckling", "recall_at_1", (45, "with a positive")),
        ("retrieval", "recall_at_1", (100, "in all")),
    ],
)
def test_a_regime_counts_the_groups_that_a_metric_hangs_on(family: str, name: str, expected: tuple[int, str]) -> None:
    # 200 units in 100 groups of two: 90 of class 0, 90 of class 1, the last 20 (ten groups) of class 2.
    labels = np.repeat([0, 1, 2], [90, 90, 20])
    assert count_regime_groups(family, name, make_outcome(labels, 3)) == expected


def test_survival_counts_events() -> None:
    events = np.zeros(200)
    events[:24] = 1
    outcome = make_outcome(np.zeros(200, dtype=np.int64), 2, np.stack([np.arange(200.0) + 1, events], axis=1))
    assert count_regime_groups("survival", "uno_c", outcome) == (12, "with the event")
    found = estimate_outcome("survival", ["harrell_c"], outcome, seed=0, num_replicates=100)["harrell_c"]
    assert "12 groups with the event, shown to cover from 15 on" in str(found.reason) and found.low is not None
