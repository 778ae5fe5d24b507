"""Do the intervals cover and the tests keep their level? Trials with a known truth in, shares with bounds out.

    python -m tests.measures.simulate [--parts areas proportions ...] [--trials N] [--seed S]

The long form: it prints a table a part (some minutes each on one core; `--trials` scales that). The short form is
`test_simulations.py`, on the same functions. A Design draws patients with one to `images` images whose scores are
alike; "mixed" patients hold both classes. Truths are closed forms or come from one drawing of 60,000 patients.
`inside` counts the trials whose estimate has no reason, hence claims to lie in its declared regime.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binom, norm

from panfm.measures.agreement import MISSING, measure_agreement
from panfm.measures.calibration import estimate_calibration
from panfm.measures.comparisons import PairedDifference, compare_areas, compare_mcnemar, compare_over_tasks
from panfm.measures.draws import spread_by_draws, widen_by_draws
from panfm.measures.intervals import Estimate, estimate_area, estimate_mean, estimate_proportion
from panfm.measures.metrics import METRICS, compute_all_replicates, compute_metric
from panfm.measures.operating_points import compute_decision_curve
from panfm.measures.statistics import (
    NO_INTERVAL,
    count_rarer_groups,
    describe_difference,
    draw_group_weights,
    estimate_metrics,
)
from panfm.measures.subgroups import permute_groups

NUM_REPLICATES = 1000  # half of the rule's 2,000: percentiles a little rougher, the simulation twice as fast
COVERAGE = (0.93, 0.97)
MAX_FALSE_POSITIVES = 0.06


@dataclass(frozen=True)
class Design:
    """How a test set comes about. share: of the patients (mixed: of the images) that are positive."""

    name: str
    num_groups: int
    share: float = 0.5
    images: int = 1  # most images a patient has; 1 .. images are equally likely
    alike: float = 0.5  # correlation of the scores of one patient's images of one class
    mixed: bool = False  # a patient's images have labels of their own

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw labels [N], noise [N] (standard normal, correlated within a patient) and groups [N]."""
        sizes = rng.integers(1, self.images + 1, self.num_groups)
        groups = np.repeat(np.arange(self.num_groups), sizes)
        drawn = rng.random(len(groups) if self.mixed else self.num_groups) < self.share
        labels = drawn if self.mixed else drawn[groups]
        return labels.astype(np.int64), self.draw_noise(groups, rng), groups

    def draw_noise(self, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw noise [N] for the groups of a trial."""
        of_groups, of_images = rng.normal(size=groups[-1] + 1), rng.normal(size=len(groups))
        return np.sqrt(self.alike) * of_groups[groups] + np.sqrt(1 - self.alike) * of_images


def make_designs(num_rarer: int, share: float = 0.3) -> tuple[Design, ...]:
    """Three kinds of test sets in which about `num_rarer` groups have the rarer class."""
    num_groups = round(num_rarer / share)
    return (
        Design("single", num_groups, share),
        Design("patients", num_groups, share, images=6, alike=0.6),
        Design("mixed", round(num_rarer / 0.7), share, images=6, alike=0.4, mixed=True),
    )


@dataclass
class Tally:
    """Trials of one case: how many had an interval and covered (or rejected), overall and inside the regime."""

    case: str
    num_trials: int = 0
    num_inside: int = 0
    hits: int = 0
    hits_inside: int = 0

    def add(self, hit: bool, inside: bool) -> None:
        """Count one trial."""
        self.num_trials += 1
        self.hits += hit
        self.num_inside += inside
        self.hits_inside += hit and inside

    def add_estimate(self, estimate: Estimate, truth: float) -> None:
        """Count whether an estimate covers; one without an interval is left out."""
        if estimate.low is not None and estimate.high is not None:
            self.add(estimate.low - 1e-12 <= truth <= estimate.high + 1e-12, estimate.reason is None)

    def add_difference(self, found: PairedDifference) -> None:
        """Count whether a comparison under the null rejects, by its interval."""
        if found.low is not None and found.high is not None:
            self.add(found.low > 0 or found.high < 0, found.reason is None)

    def is_within(self, low: float, high: float, tail: float = 0.001) -> bool:
        """Whether the share inside the regime can be of a truth between low and high, by binomial bounds."""
        n = self.num_inside
        return bool(binom.ppf(tail, n, low) <= self.hits_inside <= binom.ppf(1 - tail, n, high))


def draw_scores(design: Design, area: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw labels, binormal scores of the given AUROC, and groups; both classes in at least two groups."""
    while True:
        labels, noise, groups = design.draw(rng)
        if min(len(np.unique(groups[labels == k])) for k in (0, 1)) >= 2:
            return labels, np.sqrt(2) * norm.ppf(area) * labels + noise, groups


def make_probabilities(scores: np.ndarray, area: float, share: float) -> np.ndarray:
    """Turn binormal scores into probabilities [N, 2] that are somewhat too sure (slope 1 / 1.3) and too high."""
    shift = np.sqrt(2) * norm.ppf(area)
    logit = shift * scores - shift**2 / 2 + np.log(share / (1 - share))
    positive = 1 / (1 + np.exp(-(1.3 * logit + 0.3)))
    return np.stack([1 - positive, positive], axis=1)


def draw_classes(design: Design, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw labels, probabilities [N, 3] and groups of three classes; every class in at least two groups."""
    shares = np.array([(1 - design.share) / 2, (1 - design.share) / 2, design.share])
    while True:
        _, _, groups = design.draw(rng)
        labels = rng.choice(3, len(groups) if design.mixed else groups[-1] + 1, p=shares)
        labels = labels if design.mixed else labels[groups]
        logits = np.stack([design.draw_noise(groups, rng) for _ in range(3)], axis=1)
        logits[np.arange(len(labels)), labels] += 1.2
        scores = np.exp(1.2 * logits)
        if all(len(np.unique(groups[labels == k])) >= 2 for k in range(3)):
            return labels, scores / scores.sum(axis=1, keepdims=True), groups


def cover_areas(design: Design, area: float, num_trials: int, seed: int) -> Tally:
    """Coverage of the clustered DeLong interval of an AUROC."""
    rng, tally = np.random.default_rng(seed), Tally(f"AUROC {area:g}, {design.name}")
    for _ in range(num_trials):
        tally.add_estimate(estimate_area(*draw_scores(design, area, rng)), area)
    return tally


def cover_proportions(design: Design, share: float, num_trials: int, seed: int) -> Tally:
    """Coverage of the clustered Wilson interval of a sensitivity, whose number of positives is drawn too."""
    rng, tally = np.random.default_rng(seed), Tally(f"proportion {share:g}, {design.name}")
    for _ in range(num_trials):
        labels, noise, groups = design.draw(rng)
        counted = labels == 1
        tally.add_estimate(estimate_proportion(noise[counted] < norm.ppf(share), groups[counted]), share)
    return tally


def cover_means(design: Design, num_trials: int, seed: int) -> Tally:
    """Coverage of the clustered Student interval of a mean (the calibration gap)."""
    rng, tally = np.random.default_rng(seed), Tally(f"calibration gap, {design.name}")
    for _ in range(num_trials):
        labels, noise, groups = design.draw(rng)
        values = labels - 1 / (1 + np.exp(-noise))  # the mean of a sigmoid of symmetric noise is 1/2
        tally.add_estimate(estimate_mean(values, groups), design.share - 0.5)
    return tally


def cover_metrics(design: Design, area: float, num_trials: int, seed: int) -> list[Tally]:
    """Coverage of `estimate_metrics` for every metric of two classes."""
    names = [name for name in METRICS if name not in NO_INTERVAL]
    rng = np.random.default_rng(seed)
    labels, scores, _ = draw_scores(replace(design, num_groups=60_000), area, rng)
    probabilities = make_probabilities(scores, area, design.share)
    truths = {name: compute_metric(name, labels, probabilities).value for name in names}
    tallies = {name: Tally(f"{name}, {design.name}") for name in names}
    for trial in range(num_trials):
        labels, scores, groups = draw_scores(design, area, rng)
        probabilities = make_probabilities(scores, area, design.share)
        found = estimate_metrics(names, labels, probabilities, groups, seed=trial, num_replicates=NUM_REPLICATES)
        for name in names:
            tallies[name].add_estimate(found[name], truths[name])
    return list(tallies.values())


def cover_classes(design: Design, num_trials: int, seed: int) -> list[Tally]:
    """Coverage of `estimate_metrics` for every metric of three classes."""
    names = [name for name in METRICS if name not in NO_INTERVAL and not METRICS[name].binary_only]
    rng = np.random.default_rng(seed)
    labels, scores, _ = draw_classes(replace(design, num_groups=60_000), rng)
    truths = {name: compute_metric(name, labels, scores).value for name in names}
    tallies = {name: Tally(f"{name} of 3 classes, {design.name}") for name in names}
    for trial in range(num_trials):
        labels, scores, groups = draw_classes(design, rng)
        found = estimate_metrics(names, labels, scores, groups, seed=trial, num_replicates=NUM_REPLICATES)
        for name in names:
            tallies[name].add_estimate(found[name], truths[name])
    return list(tallies.values())


def cover_calibration(design: Design, area: float, num_trials: int, seed: int) -> list[Tally]:
    """Coverage of the calibration slope and intercept, and of the net benefit at a threshold of 30 %."""
    rng = np.random.default_rng(seed)
    labels, scores, groups = draw_scores(replace(design, num_groups=60_000), area, rng)
    positive = make_probabilities(scores, area, design.share)[:, 1]
    one = {"seed": 0, "num_replicates": 2}
    truth = estimate_calibration(labels, positive, groups, **one)
    benefit = float(np.where(labels == 1, 1, -0.3 / 0.7)[positive >= 0.3].sum() / len(labels))
    slope, intercept, net = (
        Tally(f"{name}, {design.name}") for name in ("calibration slope", "calibration intercept", "net benefit")
    )
    for trial in range(num_trials):
        labels, scores, groups = draw_scores(design, area, rng)
        positive = make_probabilities(scores, area, design.share)[:, 1]
        found = estimate_calibration(labels, positive, groups, seed=trial, num_replicates=NUM_REPLICATES)
        slope.add_estimate(found.slope, truth.slope.value)
        intercept.add_estimate(found.intercept, truth.intercept.value)
        curve = compute_decision_curve(
            labels, positive, groups, seed=trial, thresholds=[0.3], num_replicates=NUM_REPLICATES
        )
        if curve.low is not None:
            net.add(bool(curve.low[0] <= benefit <= curve.high[0]), curve.reason is None)
    return [slope, intercept, net]


def cover_agreement(design: Design, num_trials: int, seed: int) -> list[Tally]:
    """Coverage of Fleiss' kappa of three readers with gaps, and of Cohen's of the first two."""

    def draw(one: Design) -> tuple[np.ndarray, np.ndarray]:
        labels, noise, groups = one.draw(rng)
        seen = 1.5 * labels + 0.5 * noise
        readings = (seen[:, None] + 0.7 * rng.normal(size=(len(seen), 3)) > 0.75).astype(np.int64)
        readings[rng.random(readings.shape) < 0.1] = MISSING
        return readings, groups

    rng = np.random.default_rng(seed)
    truth = measure_agreement(*draw(replace(design, num_groups=60_000)), 2, seed=0, num_replicates=2)
    fleiss, cohen = Tally(f"Fleiss' kappa, {design.name}"), Tally(f"Cohen's kappa, {design.name}")
    for trial in range(num_trials):
        found = measure_agreement(*draw(design), 2, seed=trial, num_replicates=NUM_REPLICATES)
        fleiss.add_estimate(found.fleiss, truth.fleiss.value)
        cohen.add_estimate(found.pairs[0].kappa, truth.pairs[0].kappa.value)
    return [fleiss, cohen]


def cover_tasks(num_tasks: int, between: float, within: float, num_trials: int, seed: int) -> list[Tally]:
    """Coverage and false positives of the hierarchical bootstrap: task effects and patients' errors, both normal."""
    rng = np.random.default_rng(seed)
    case = f"{num_tasks} tasks, {between:g} between, {within:g} within"
    covered, rejected = Tally(f"mean over {case}"), Tally(f"mean over {case}")
    for trial in range(num_trials):
        errors = within * rng.uniform(0.5, 1.5, num_tasks)
        points = between * rng.normal(size=num_tasks) + errors * rng.normal(size=num_tasks)
        replicates = points[:, None] + errors[:, None] * rng.normal(size=(num_tasks, 500))
        found = compare_over_tasks(points, replicates, seed=trial)
        covered.add(found.low <= 0 <= found.high, found.reason is None)
        rejected.add(found.p_value < 0.05, found.reason is None)
    return [covered, rejected]


def cover_draws(
    num_draws: int, patients: float, draws: float, both: float, num_trials: int, seed: int
) -> tuple[Tally, Tally, Tally]:
    """Coverage of a mean over draws of labels by noise on replicates, by square-and-add, and by patients alone.

    The value of a draw errs by the test patients (common to all draws), by the draw, and by how both meet.
    """
    rng = np.random.default_rng(seed)
    case = f"{num_draws} draws, errors {patients:g} by patients, {draws:g} by draws, {both:g} by both"
    noise, squares, alone = Tally(f"noise: {case}"), Tally(f"square: {case}"), Tally(f"alone: {case}")
    error = np.hypot(patients, both / np.sqrt(num_draws))  # what resampling patients shows
    for trial in range(num_trials):
        values = patients * rng.normal() + rng.normal(0, np.hypot(draws, both), num_draws)
        replicates = values.mean() + error * rng.normal(size=NUM_REPLICATES)
        spread = spread_by_draws(replicates, values, range(num_draws), seed=trial)
        low, high = np.percentile(spread, [2.5, 97.5])
        noise.add(bool(low <= 0 <= high), True)
        half = norm.ppf(0.975) * error
        alone.add(bool(abs(values.mean()) <= half), True)
        low, high = widen_by_draws(values.mean(), values.mean() - half, values.mean() + half, values)
        squares.add(bool(low <= 0 <= high), True)
    return noise, squares, alone


def draw_pair(
    design: Design, area: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw two encoders of one AUROC whose scores share half of their noise: labels, scores a, scores b, groups."""
    labels, scores, groups = draw_scores(design, area, rng)
    shift = np.sqrt(2) * norm.ppf(area) * labels
    noises = [np.sqrt(0.5) * (scores - shift) + np.sqrt(0.5) * design.draw_noise(groups, rng) for _ in range(2)]
    return labels, shift + noises[0], shift + noises[1], groups


def reject_areas(design: Design, area: float, num_trials: int, seed: int) -> Tally:
    """False positives of the (clustered) DeLong test."""
    rng, tally = np.random.default_rng(seed), Tally(f"DeLong, AUROC {area:g}, {design.name}")
    for _ in range(num_trials):
        tally.add_difference(compare_areas(*draw_pair(design, area, rng)))
    return tally


def reject_paired(design: Design, area: float, num_trials: int, seed: int) -> list[Tally]:
    """False positives of the paired bootstrap for metrics of two classes: `compare_paired`, its replicates shared."""
    rng = np.random.default_rng(seed)
    names = [name for name in METRICS if name not in NO_INTERVAL]
    tallies = {name: Tally(f"paired {name}, {design.name}") for name in names}
    for trial in range(num_trials):
        labels, a, b, groups = draw_pair(design, area, rng)
        weights = draw_group_weights(groups, NUM_REPLICATES, trial)
        both = [make_probabilities(scores, area, design.share) for scores in (a, b)]
        ours, theirs = (compute_all_replicates(names, labels, scores, weights) for scores in both)
        num_rarer = count_rarer_groups(labels, groups)
        for name in names:
            found = describe_difference(name, 0.0, ours[name] - theirs[name], design.num_groups, num_rarer)
            tallies[name].add_difference(found)
    return list(tallies.values())


def reject_mcnemar(num_images: int, num_trials: int, seed: int) -> Tally:
    """False positives of McNemar's test on independent images."""
    rng, tally = np.random.default_rng(seed), Tally(f"McNemar, {num_images} images")
    for _ in range(num_trials):
        hard = rng.normal(size=num_images)
        a, b = (hard + rng.normal(size=num_images) < 1 for _ in range(2))
        p_value = compare_mcnemar(a, b, np.arange(num_images)).p_value
        tally.add(p_value is not None and p_value < 0.05, True)
    return tally


def reject_permutation(design: Design, num_trials: int, seed: int, *, within: bool, uneven: bool) -> Tally:
    """False positives of the permutation test between subgroups with one sensitivity of 80 %.

    within: a level belongs to an image (a body site), not to a patient. uneven: patients of the level have three times
    the images of the reference's, which plain permutation of means does not bear.
    """
    kind = ("images' level" if within else "patients' level") + (", uneven" if uneven else "")
    rng, tally = np.random.default_rng(seed), Tally(f"permutation, {kind}, {design.name}")
    for _ in range(num_trials):
        of_groups = rng.random(design.num_groups) < 0.3
        most = np.where(of_groups & uneven, 3 * design.images, design.images)
        groups = np.repeat(np.arange(design.num_groups), rng.integers(1, most + 1))
        level = rng.random(len(groups)) < 0.3 if within else of_groups[groups]
        found = design.draw_noise(groups, rng) < norm.ppf(0.8)
        if 0 < level.sum() < len(level):
            tally.add(permute_groups(found, groups, level, generator=rng, num_permutations=400) < 0.05, True)
    return tally


def run_areas(trials: int, seed: int) -> Iterator[Tally]:
    """Clustered DeLong intervals by number of groups in the rarer class."""
    for rarer in (10, 15, 20, 30, 60):
        for design in make_designs(rarer):
            for area in (0.65, 0.8, 0.92):
                yield named(cover_areas(design, area, trials, seed), rarer)


def run_proportions(trials: int, seed: int) -> Iterator[Tally]:
    """Clustered Wilson intervals by number of groups with positives."""
    for num_groups in (10, 15, 25, 30, 60):
        for design in make_designs(num_groups):
            for share in (0.5, 0.8, 0.9, 0.95):
                yield named(cover_proportions(design, share, trials, seed), num_groups)
        yield named(cover_means(Design("patients", num_groups, images=6), trials, seed), num_groups)


def run_metrics(trials: int, seed: int) -> Iterator[Tally]:
    """`estimate_metrics`, two and three classes."""
    for rarer in (30, 60):
        for design in make_designs(rarer)[1:]:
            for tally in cover_metrics(design, 0.85, trials // 4, seed):
                yield named(tally, rarer)
        for tally in cover_classes(make_designs(rarer)[1], trials // 4, seed):
            yield named(tally, rarer)


def run_calibration(trials: int, seed: int) -> Iterator[Tally]:
    """Calibration slope and intercept, net benefit, kappas."""
    for rarer in (30, 60):
        for design in make_designs(rarer)[1:]:
            for tally in cover_calibration(design, 0.85, trials // 4, seed):
                yield named(tally, rarer)
        for tally in cover_agreement(Design("patients", rarer, 0.4, images=4), trials // 4, seed):
            yield named(tally, rarer)


def run_comparisons(trials: int, seed: int) -> Iterator[Tally]:
    """False positives of the comparisons in closed form or by permutation."""
    for rarer in (8, 12, 20, 30):
        for design in make_designs(rarer):
            for area in (0.7, 0.9):
                yield named(reject_areas(design, area, trials, seed), rarer)
    for num_images in (30, 100, 300):
        yield named(reject_mcnemar(num_images, trials, seed), num_images)
    for num_groups in (60, 100):
        design = Design("patients", num_groups, images=4, alike=0.6)
        for within, uneven in ((False, False), (False, True), (True, False)):
            yield named(reject_permutation(design, trials // 2, seed, within=within, uneven=uneven), num_groups)


def run_paired(trials: int, seed: int) -> Iterator[Tally]:
    """False positives of the paired bootstrap."""
    for rarer in (60, 120):
        for design in make_designs(rarer)[1:]:
            for tally in reject_paired(design, 0.85, trials // 4, seed):
                yield named(tally, rarer)


def run_tasks(trials: int, seed: int) -> Iterator[Tally]:
    """The mean over tasks: coverage, then false positives by the p-value."""
    for num_tasks in (3, 5, 10, 30):
        for between, within in ((1, 0.3), (1, 1), (0.3, 1), (0, 1)):
            covered, rejected = cover_tasks(num_tasks, between, within, trials, seed)
            yield named(replace(covered, case=f"cover: {covered.case}"), num_tasks)
            yield named(replace(rejected, case=f"reject: {rejected.case}"), num_tasks)


def run_draws(trials: int, seed: int) -> Iterator[Tally]:
    """The mean over draws of labels: noise on replicates, and square-and-add."""
    for num_draws in (3, 5, 10, 20):
        for patients, draws, both in ((1, 0.3, 0.3), (1, 1, 0.3), (1, 3, 0), (0.3, 3, 0.3)):
            yield from cover_draws(num_draws, patients, draws, both, trials, seed)[:2]


def named(tally: Tally, number: int) -> Tally:
    """Write the number of groups before the case."""
    return replace(tally, case=f"{number:3d}  {tally.case}")


PARTS: dict[str, tuple[Callable[[int, int], Iterator[Tally]], str]] = {
    "areas": (run_areas, "coverage"),
    "proportions": (run_proportions, "coverage"),
    "metrics": (run_metrics, "coverage"),
    "calibration": (run_calibration, "coverage"),
    "comparisons": (run_comparisons, "false positives"),
    "paired": (run_paired, "false positives"),
    "tasks": (run_tasks, "both"),
    "draws": (run_draws, "coverage"),
}


def judge(tally: Tally, what: str) -> str:
    """Say whether the share inside the regime misses its bounds by more than two standard errors."""
    if tally.num_inside < tally.num_trials / 2:
        return "outside"
    rejects = what == "false positives" or "reject" in tally.case
    share = tally.hits_inside / tally.num_inside
    low, high = (0.0, MAX_FALSE_POSITIVES) if rejects else COVERAGE
    margin = 2 * np.sqrt(max(share * (1 - share), 1e-4) / tally.num_inside)
    return "LOW" if share < low - margin else "HIGH" if share > high + margin else "ok"


def main() -> None:
    """Print the table of the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--trials", type=int, default=4000, help="bootstrap cases take a quarter of it")
    parser.add_argument("--seed", type=int, default=20261122)
    args = parser.parse_args()
    for part in args.parts:
        run, what = PARTS[part]
        started = time.perf_counter()
        print(f"\n{part}: {what} (groups, case; all trials; trials inside the regime)")
        for tally in run(args.trials, args.seed):
            inside = f"{100 * tally.hits_inside / tally.num_inside:5.1f}" if tally.num_inside else "    -"
            print(
                f"{tally.case:62s} {100 * tally.hits / max(1, tally.num_trials):5.1f} of {tally.num_trials:5d}   "
                f"{inside} of {tally.num_inside:5d}   {judge(tally, what)}"
            )
            sys.stdout.flush()
        print(f"{part}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
