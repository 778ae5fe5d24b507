"""The short form of `python -m tests.measures.simulate`: coverage and false positives within binomial bounds.

Every bound is that of a truth between 93 and 97 % coverage (at most 6 % false positives), at a tail of 0.1 %; the seeds
are fixed. What breaks an interval or a test by a few percent shows in the long form alone.
"""

import numpy as np
import pytest

from panfm.measures.agreement import MIN_KAPPA_GROUPS
from panfm.measures.intervals import MIN_AREA_GROUPS, MIN_PROPORTION_GROUPS
from panfm.measures.statistics import FEW_GROUPS, MIN_BOOTSTRAP_GROUPS, MIN_PAIRED_GROUPS, MIN_SLOPE_GROUPS
from tests.measures.simulate import (
    COVERAGE,
    MAX_FALSE_POSITIVES,
    Design,
    Tally,
    cover_agreement,
    cover_areas,
    cover_calibration,
    cover_classes,
    cover_means,
    cover_metrics,
    cover_proportions,
    cover_tasks,
    make_designs,
    reject_areas,
    reject_mcnemar,
    reject_paired,
    reject_permutation,
)

FEWEST = {design.name: design for design in make_designs(MIN_AREA_GROUPS + 3)}  # at the edge of the regime
MANY = {design.name: design for design in make_designs(FEW_GROUPS + 10)}


def check_coverage(tally: Tally, smallest: int) -> None:
    assert tally.num_inside >= smallest, f"{tally.case}: only {tally.num_inside} trials lie inside the regime"
    assert tally.is_within(*COVERAGE), f"{tally.case}: covered in {tally.hits_inside} of {tally.num_inside}"


def check_level(tally: Tally, smallest: int) -> None:
    assert tally.num_inside >= smallest, f"{tally.case}: only {tally.num_inside} trials lie inside the regime"
    assert tally.is_within(0.0, MAX_FALSE_POSITIVES), f"{tally.case}: {tally.hits_inside} of {tally.num_inside}"


def needs_more(tally: Tally) -> bool:
    """Whether the metric's regime begins beyond the groups of MANY."""
    return any(name in tally.case for name in MIN_BOOTSTRAP_GROUPS)


@pytest.mark.parametrize("name", ["single", "patients", "mixed"])
def test_areas_cover_and_their_comparison_keeps_its_level(name: str) -> None:
    check_coverage(cover_areas(FEWEST[name], 0.85, 500, seed=1), 300)
    check_level(reject_areas(FEWEST[name], 0.85, 300, seed=2), 150)


def test_areas_by_image_do_not_cover() -> None:
    """What the simulation is for: were groups ignored, it would show."""
    from panfm.measures.intervals import estimate_area
    from tests.measures.simulate import draw_scores

    rng, tally = np.random.default_rng(0), Tally("by image")
    for _ in range(300):
        labels, scores, _ = draw_scores(MANY["patients"], 0.85, rng)
        tally.add_estimate(estimate_area(labels, scores, np.arange(len(labels))), 0.85)
    assert not tally.is_within(*COVERAGE) and tally.hits < 0.88 * 300


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_proportions_and_means_cover(share: float) -> None:
    for design in make_designs(MIN_PROPORTION_GROUPS + 3):
        check_coverage(cover_proportions(design, share, 600, seed=3), 300)
    check_coverage(cover_means(Design("patients", MIN_PROPORTION_GROUPS, images=6), 600, seed=3), 600)


@pytest.mark.slow
def test_bootstrap_intervals_cover() -> None:
    for tally in cover_metrics(MANY["patients"], 0.85, 80, seed=4) + cover_classes(MANY["patients"], 60, seed=5):
        if not needs_more(tally):
            check_coverage(tally, 30)


@pytest.mark.slow
def test_calibration_and_agreement_cover() -> None:
    for tally in cover_calibration(make_designs(MIN_SLOPE_GROUPS + 10)[1], 0.85, 60, seed=6):
        check_coverage(tally, 50)
    for tally in cover_agreement(Design("patients", MIN_KAPPA_GROUPS + 20, 0.4, images=4), 100, seed=7):
        check_coverage(tally, 90)


@pytest.mark.slow
def test_paired_bootstrap_keeps_its_level() -> None:
    for tally in reject_paired(make_designs(MIN_PAIRED_GROUPS + 15)[1], 0.85, 40, seed=8):
        check_level(tally, 30)


def test_mcnemar_and_permutation_keep_their_level() -> None:
    check_level(reject_mcnemar(60, 500, seed=9), 500)
    design = Design("patients", 60, images=4, alike=0.6)
    for within, uneven in ((False, False), (False, True), (True, False)):
        check_level(reject_permutation(design, 200, seed=10, within=within, uneven=uneven), 200)


@pytest.mark.parametrize(("between", "within"), [(1, 0.3), (0.3, 1)])
def test_mean_over_tasks_covers_and_keeps_its_level(between: float, within: float) -> None:
    covered, rejected = cover_tasks(4, between, within, 300, seed=11)
    check_coverage(covered, 300)
    check_level(rejected, 300)
