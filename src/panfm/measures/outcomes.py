"""What was scored and what is known of it: the one shape that the metrics of every task family are computed from.

    Outcome (N units: labels or targets, scores, groups) + weights [R, N] -> Measure.compute -> a value a replicate [R]

The point estimate is the replicate in which everything weighs 1, so value and interval come from the same code.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Outcome:
    """N scored units. What `targets`, `scores` and `grid` hold is the family's own; its measures say it.

    labels: int64 [N], place in the card's class_names (0 where a family has no classes). scores: float64 [N, K].
    groups: [N], names of what is resampled together. targets: float64 [N, T]; T is 0 where the label says it all.
    grid: float64 [H], points that the scores refer to (days of a survival curve); H is 0 where there are none.
    """

    labels: NDArray[np.int64]
    scores: Floats
    groups: NDArray[np.str_]
    targets: Floats
    grid: Floats = field(default_factory=lambda: np.zeros(0))

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> "Outcome":
        """The outcome of some of the units: places or a mask [N]."""
        return Outcome(self.labels[places], self.scores[places], self.groups[places], self.targets[places], self.grid)


@dataclass(frozen=True)
class Measure:
    """A metric of one family: what it is called, which way is better, how it is computed.

    compute: (outcome, weights [R, N] of non-negative counts) -> float64 [R], NaN where a replicate leaves it undefined.
    explain: why the value of all units together is undefined, in words; None where it is defined.
    chance: the value of a predictor that knows what is common in these units and nothing of each: normalised 0.
    perfect: the best value there is: normalised 1.
    """

    title: str
    direction: Direction
    description: str
    compute: Callable[[Outcome, NDArray[np.generic]], Floats]
    explain: Callable[[Outcome], str | None]
    chance: Callable[[Outcome], float]
    perfect: float
