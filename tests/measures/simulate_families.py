"""Do the intervals of numbers, grades and survival cover? The long form, beside `simulate` and in its words.

    python -m tests.measures.simulate_families [--parts regression ordinal survival] [--trials N] [--seed S]

Truths come from one drawing of 20,000 patients. Numbers and grades: patients with one to four images that are alike;
survival: one row a patient, about half or a quarter of them with the event.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from panfm.measures.by_family import compute_point, estimate_outcome
from panfm.measures.numbers import MEASURES_ORDINAL, MEASURES_REGRESSION
from panfm.measures.outcomes import Outcome
from panfm.measures.survival import MEASURES
from tests.measures.simulate import NUM_REPLICATES, Design, Tally, judge

NUM_TRUE = 20_000
FAMILIES = {"regression": MEASURES_REGRESSION, "ordinal": MEASURES_ORDINAL, "survival": MEASURES}
FOLLOWED_DAYS = {0.5: 1500, 0.25: 450}  # end of the study at which about this share has had the event

Draw = Callable[[Design, np.random.Generator], Outcome]


def draw_numbers(design: Design, rng: np.random.Generator) -> Outcome:
    """True values 50 +- 15, predictions that shrink them by half and err by 6, both alike within a patient."""
    _, noise, groups = design.draw(rng)
    true = 50 + 15 * noise
    predicted = 50 + 0.5 * (true - 50) + 6 * design.draw_noise(groups, rng)
    return Outcome(np.zeros(len(groups), np.int64), predicted[:, None], groups.astype(str), true[:, None])


def draw_grades(design: Design, rng: np.random.Generator) -> Outcome:
    """Four grades of a hidden value, probabilities around a noisy copy of it."""
    _, noise, groups = design.draw(rng)
    labels = np.digitize(noise, [-0.5, 0.5, 1.5])
    seen = noise + 0.8 * design.draw_noise(groups, rng)
    scores = np.exp(-1.5 * np.abs(np.arange(4) - (seen + 1)[:, None]))
    return Outcome(labels, scores / scores.sum(axis=1, keepdims=True), groups.astype(str), np.zeros((len(labels), 0)))


def draw_courses(design: Design, rng: np.random.Generator) -> Outcome:
    """Exponential times whose log hazard is partly known; the share of events is that of the design."""
    last = FOLLOWED_DAYS[design.share]
    hidden = rng.normal(size=design.num_groups)
    days, gone = rng.exponential(1000 * np.exp(-0.8 * hidden)), rng.uniform(1, last, design.num_groups)
    risk = 0.6 * hidden + rng.normal(0, 0.4, design.num_groups)
    grid = np.linspace(0.1, 0.6, 6) * last
    free = np.exp(-np.exp(0.8 * risk)[:, None] * grid / 1000)
    targets = np.stack([np.ceil(np.minimum(days, gone)), days <= gone], axis=1)
    scores = np.concatenate([risk[:, None], free], axis=1)
    return Outcome(np.zeros(len(risk), np.int64), scores, np.arange(len(risk)).astype(str), targets, grid)


def cover_family(family: str, draw: Draw, design: Design, num_trials: int, seed: int) -> list[Tally]:
    """Coverage of `estimate_outcome` for every metric of a family's own."""
    names = list(FAMILIES[family])
    rng = np.random.default_rng(seed)
    large = draw(replace(design, num_groups=NUM_TRUE), rng)
    truths = {name: compute_point(family, name, large).value for name in names}
    tallies = {name: Tally(f"{design.num_groups:3d}  {name}, {design.name}") for name in names}
    for trial in range(num_trials):
        outcome = draw(design, rng)
        found = estimate_outcome(family, names, outcome, seed=trial, num_replicates=NUM_REPLICATES)
        for name in names:
            truth = truths[name]
            assert truth is not None, "defined for 20,000 patients"
            tallies[name].add_estimate(found[name], truth)
    return list(tallies.values())


def run_regression(trials: int, seed: int) -> Iterator[Tally]:
    """Numbers of 20 to 200 patients."""
    for number in (20, 30, 60, 100, 200):
        yield from cover_family("regression", draw_numbers, Design("numbers", number, images=4), trials, seed)


def run_ordinal(trials: int, seed: int) -> Iterator[Tally]:
    """Grades of 20 to 200 patients."""
    for number in (20, 30, 60, 100, 200):
        yield from cover_family("ordinal", draw_grades, Design("grades", number, images=4), trials, seed)


def run_survival(trials: int, seed: int) -> Iterator[Tally]:
    """Courses of 30 to 200 patients, half or a quarter of them with the event."""
    for share in FOLLOWED_DAYS:
        for number in (30, 60, 100, 200):
            design = Design(f"{share:.0%} with the event", number, share)
            yield from cover_family("survival", draw_courses, design, trials, seed)


PARTS = {"regression": run_regression, "ordinal": run_ordinal, "survival": run_survival}


def main() -> None:
    """Print the table of the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20261122)
    args = parser.parse_args()
    for part in args.parts:
        print(f"\n{part}: coverage (groups, case; all trials; trials inside the regime)")
        for tally in PARTS[part](args.trials, args.seed):
            inside = f"{100 * tally.hits_inside / tally.num_inside:5.1f}" if tally.num_inside else "    -"
            share = 100 * tally.hits / max(1, tally.num_trials)
            verdict = judge(tally, "coverage")
            print(f"{tally.case:52s} {share:5.1f} of {tally.num_trials:5d}   {inside}   {verdict}", flush=True)


if __name__ == "__main__":
    main()
