"""The short form of `python -m tests.measures.simulate_families`: coverage within the binomial bounds of 93 to 97 %."""

import pytest

from tests.measures.simulate import COVERAGE, Design
from tests.measures.simulate_families import Draw, cover_family, draw_courses, draw_grades, draw_numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "draw", "design"),
    [
        ("regression", draw_numbers, Design("numbers", 100, images=4)),
        ("ordinal", draw_grades, Design("grades", 100, images=4)),
        ("survival", draw_courses, Design("half with the event", 100, 0.5)),
    ],
)
def test_intervals_cover(family: str, draw: Draw, design: Design) -> None:
    for tally in cover_family(family, draw, design, num_trials=40, seed=3):
        assert tally.num_inside >= 35, tally.case
        assert tally.is_within(*COVERAGE), f"{tally.case}: covered in {tally.hits_inside} of {tally.num_inside}"
