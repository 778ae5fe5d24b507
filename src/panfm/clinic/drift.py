"""Do new images look like those that a classifier was fitted on? Four checks with one stated rate of false alarms.

    new images' z [N, D], probabilities [N, K], patients [N], the folder's quantiles  --compute_drift-->  Drift

outliers       patients with an image above the outlier threshold, against the 1 % of images that it lets through
scores         are outlier scores higher as a whole
features       has any of the leading components moved
probabilities  has the probability of any class moved (camera, or another mix of patients)

The folder holds marginal quantiles, no patient's row. A new value becomes the share u of fitted images below it; where
nothing changed u is even on 0 to 1 and its mean is 1/2 (a Mann-Whitney statistic). Three things would make a naive
p-value too small, and each has its place in the null distribution:
- Images of one patient are alike: signs are flipped for whole patients (a randomisation test; exact where a patient's
  sum of u - 1/2 is symmetric around 0, as it is for single images).
- The reference is a sample of n patients too: its quantiles are off by chance, which adds a variance of 1 / (12 n).
- Many components, several checks: the largest of all shifts is judged by the distribution of largest ones (Westfall and
  Young 1993), the four p-values by Holm's step-down.
Beyond chance, a shift counts only from MIN_SHIFT on: with thousands of images every two sources differ a little.

Only the middle of the components is compared. Their spread among the fitted images is not that of new ones: the
directions were chosen to spread those. A wider spread shows as higher outlier scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from panfm_predict.folder import Head
from panfm_predict.outliers import compute_scores, project

Floats = NDArray[np.float64]
CheckName = Literal["outliers", "scores", "features", "probabilities"]
NUM_DRAWS = 9_999  # smallest p-value 1 in 10,000: 25 times below the least that Holm asks for at a rate of 0.01
MIN_SHIFT = 0.05  # of the mean share below: 55 of 100 pairs of a new and a fitted image in the same order
# Reference scores are out-of-fold: fits to fewer images shrink more, and scores come out a little lower. With 5 (10)
# folds of 200 real lesions new images of the same kind had a mean share below of 0.521 (0.510).
SCORE_SLACK = 0.02
MIN_PATIENTS = 20  # measures.subgroups.MIN_SHOWN_GROUPS: below it figures point at people, and only the gross shows
CHUNK_VALUES = 4_000_000  # signs drawn at once: 32 MB


@dataclass(frozen=True)
class Check:
    """One check. value: what was found, expected: what it is where nothing changed; shares of images, or a mean share
    below. largest: which component or class moved most, None where there is only one. adjusted: p by Holm.
    """

    name: CheckName
    value: float
    expected: float
    p_value: float
    adjusted: float
    largest: int | None
    is_alarm: bool


@dataclass(frozen=True)
class Drift:
    """What was found. checks: empty where there are fewer than MIN_PATIENTS. rate: of false alarms, of all checks.

    shifts: [Q2] of components, class_shifts: [K]: mean share below less 1/2. mean_probabilities: [K], expected [K].
    """

    num_images: int
    num_patients: int
    rate: float
    checks: tuple[Check, ...]
    shifts: tuple[float, ...]
    class_shifts: tuple[float, ...]
    mean_probabilities: tuple[float, ...]
    expected_probabilities: tuple[float, ...]

    @property
    def verdict(self) -> Literal["too_few", "no_drift", "drift"]:
        """In one word."""
        if not self.checks:
            return "too_few"
        return "drift" if any(check.is_alarm for check in self.checks) else "no_drift"


def compute_drift(
    z: NDArray[np.floating],
    probabilities: Floats,
    groups: ArrayLike,
    head: Head,
    threshold: float,
    num_reference: int,
    *,
    rate: float = 0.01,
    seed: int = 0,
) -> Drift:
    """Compare standardised features [N, D] and calibrated probabilities [N, K] with a classifier's reference.

    groups: [N], the patients. threshold: of the outlier score. num_reference: fitted patients. rate: chance of any
    alarm where nothing changed.
    """
    assert num_reference >= 1 and 0 < rate < 1
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    num_patients = int(number.max()) + 1
    if num_patients < MIN_PATIENTS:
        return Drift(len(z), num_patients, rate, (), (), (), (), ())
    rng = np.random.Generator(np.random.PCG64(seed))
    scores = compute_scores(z, head.outliers)
    places = {
        "scores": compute_shares_below(scores[:, None], head.reference_scores[None]),
        "features": compute_shares_below(
            project(z, head.outliers)[:, : len(head.reference_quantiles)], head.reference_quantiles
        ),
        "probabilities": compute_shares_below(probabilities, head.reference_probabilities),
    }
    share, expected, p_outliers = judge_outliers(scores > threshold, number, num_reference, rng)
    found: list[tuple[CheckName, float, float, float, int | None]] = [("outliers", share, expected, p_outliers, None)]
    shifts: dict[str, Floats] = {}
    for name in ("scores", "features", "probabilities"):
        slack = SCORE_SLACK if name == "scores" else 0.0
        shifts[name], p_value = judge_shifts(places[name] - slack, number, num_reference, rng, upwards=name == "scores")
        shifts[name] += slack
        largest = int(np.abs(shifts[name]).argmax()) if shifts[name].size else None
        moved = 0.0 if largest is None else float(shifts[name][largest])
        found.append((name, 0.5 + moved, 0.5, p_value, None if name == "scores" else largest))
    adjusted = adjust_holm([p_value for *_, p_value, _ in found])
    checks = tuple(
        Check(name, value, usual, p, p_all, largest, p_all <= rate and _is_large(name, value))
        for (name, value, usual, p, largest), p_all in zip(found, adjusted, strict=True)
    )
    return Drift(
        len(z),
        num_patients,
        rate,
        checks,
        tuple(shifts["features"].tolist()),
        tuple(shifts["probabilities"].tolist()),
        tuple(probabilities.mean(axis=0).tolist()),
        tuple(compute_quantile_mean(head.reference_probabilities).tolist()),
    )


def compute_shares_below(values: NDArray[np.floating], quantiles: NDArray[np.floating]) -> Floats:
    """Compute the share of reference values below each value [N, Q], by quantiles [Q, 101]; equal ones count half."""
    shares = np.empty(values.shape)
    steps = quantiles.shape[1] - 1
    for column, known in enumerate(quantiles.astype(np.float64)):
        own = values[:, column]
        below, up_to = np.searchsorted(known, own, "left"), np.searchsorted(known, own, "right")
        after = np.clip(below, 1, steps)
        width = known[after] - known[after - 1]
        inside = np.clip((own - known[after - 1]) / np.where(width > 0, width, 1.0), 0.0, 1.0)
        shares[:, column] = np.where(below == up_to, after - 1 + inside, (below + up_to - 1) / 2) / steps
    return shares


def judge_shifts(
    shares: Floats,
    number: NDArray[np.integer],
    num_reference: int,
    rng: np.random.Generator,
    upwards: bool = False,
) -> tuple[Floats, float]:
    """Test whether the mean of any column of shares below [N, Q] is not 1/2: mean - 1/2 [Q], and one p-value for all.

    number: [N], the patients 0 .. G-1. upwards: whether only a mean above 1/2 counts.
    """
    size_of = (lambda moved: moved) if upwards else np.abs
    N, Q = shares.shape
    sums = np.zeros((int(number.max()) + 1, Q))  # [G, Q]
    np.add.at(sums, number, shares - 0.5)
    shifts = sums.sum(axis=0) / N
    if Q == 0:
        return shifts, 1.0
    reference = 1 / (12 * num_reference)
    error = np.sqrt((sums**2).sum(axis=0) / N**2 + reference)
    observed = float((size_of(shifts) / error).max())
    num_larger, chunk = 0, max(1, CHUNK_VALUES // len(sums))
    for start in range(0, NUM_DRAWS, chunk):
        size = min(chunk, NUM_DRAWS - start)
        signs = rng.integers(0, 2, (size, len(sums)), dtype=np.int8) * 2.0 - 1.0
        drawn = signs @ sums / N + rng.standard_normal((size, Q)) * np.sqrt(reference)
        num_larger += int(((size_of(drawn) / error).max(axis=1) >= observed - 1e-12).sum())
    return shifts, (1 + num_larger) / (NUM_DRAWS + 1)


def judge_outliers(
    is_outlier: NDArray[np.bool_],
    number: NDArray[np.integer],
    num_reference: int,
    rng: np.random.Generator,
    quantile: float = 0.99,
) -> tuple[float, float, float]:
    """Test whether more patients have an outlier than chance gives: share of images, expected share, p-value.

    The threshold is an order statistic of n scores, so that the share above it is itself Beta distributed. Images of a
    patient are taken as independent, which makes more patients have one: the p-value errs on the cautious side.
    """
    above = max(1.0, (num_reference + 1) * (1 - quantile))
    shares = rng.beta(above, max(num_reference + 1 - above, 1e-9), NUM_DRAWS)
    sizes, counts = np.unique(np.bincount(number), return_counts=True)
    drawn = sum(
        rng.binomial(int(count), 1 - (1 - shares) ** int(size)) for size, count in zip(sizes, counts, strict=True)
    )
    observed = len(np.unique(number[is_outlier]))
    p_value = (1 + int((np.asarray(drawn) >= observed).sum())) / (NUM_DRAWS + 1)
    return float(is_outlier.mean()), above / (num_reference + 1), p_value


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): reject those at most the rate, and any false one is that rare."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = highest
    return adjusted


def compute_quantile_mean(quantiles: NDArray[np.floating]) -> Floats:
    """Compute the mean [Q] of distributions known by evenly spaced quantiles [Q, 101]."""
    return np.asarray((quantiles[:, 1:] + quantiles[:, :-1]).mean(axis=1) / 2, dtype=np.float64)


def _is_large(name: CheckName, value: float) -> bool:
    if name == "scores":
        return value - 0.5 >= MIN_SHIFT
    return name == "outliers" or abs(value - 0.5) >= MIN_SHIFT
