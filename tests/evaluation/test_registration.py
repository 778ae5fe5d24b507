"""Registration: a known alignment is found again, pixels go where the formula says, nothing moves in vain."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from panfm.evaluation.registration import Alignment, align_pixels, register

Pixels = NDArray[np.uint8]


def draw_lesion(seed: int, side: int = 160) -> Pixels:
    """Skin with a dark uneven lesion off the centre, uint8 [side, side + 20, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, : side + 20]
    texture = gaussian_filter(rng.normal(size=rows.shape), 6)
    distance = np.hypot((rows - 0.52 * side) / 0.3, (columns - 0.6 * side) / 0.22) / side
    lesion = 1 / (1 + np.exp(8 * (distance + 8 * texture / texture.max() * 0.05 - 1)))
    brightness = 190 - lesion * (90 + 60 * texture / texture.std()) + rng.normal(0, 4, rows.shape)
    return np.clip(brightness[..., None] * [1.1, 0.85, 0.7], 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("turn", "size", "shift"), [(2.2, 1.12, (0.1, -0.08)), (-0.4, 0.9, (-0.12, 0.05)), (3.1, 1.0, (0.0, 0.15))]
)
def test_a_known_alignment_is_found_under_other_light(turn: float, size: float, shift: tuple[float, float]) -> None:
    later = draw_lesion(3)
    truth = Alignment(turn, size, shift, 0.0, 1.0, is_kept=True)
    earlier = align_pixels(later, truth)
    dimmed = earlier * 0.8 + 12 + np.random.default_rng(0).normal(0, 6, earlier.shape)
    found = register(np.clip(dimmed, 0, 255).astype(np.uint8), later, max_size=1.25)
    assert found.is_kept and found.match_after > 0.95 > found.match_before
    assert abs((found.turn - turn + np.pi) % (2 * np.pi) - np.pi) < 0.03
    assert found.size == pytest.approx(size, rel=0.03)
    np.testing.assert_allclose(found.shift, shift, atol=0.02)
    middle = slice(40, 120)
    error = np.abs(align_pixels(later, found).astype(float) - earlier)[middle, middle].mean()
    assert error < 0.3 * np.abs(later[:, 10:-10].astype(float) - earlier)[middle, middle].mean()


def test_pixels_are_taken_from_where_the_formula_says() -> None:
    height, width = 60, 90
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([2 * columns + 20, 3 * rows + 20, np.full_like(rows, 7)], axis=-1).astype(np.uint8)
    alignment = Alignment(0.5, 1.1, (0.2, -0.1), 0.0, 1.0, is_kept=True)
    aligned = align_pixels(ramp, alignment)
    assert aligned.shape == (height, height, 3)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(height)), axis=-1)  # (x, y) of every pixel
    points = (grid + 0.5 - height / 2) / (height / 2)  # from the centre, in halves of the shorter side
    turned = points @ np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]).T
    source = (1.1 * turned + [0.2, -0.1]) * height / 2 + [width / 2, height / 2] - 0.5
    inside = ((source > 2) & (source < [width - 3, height - 3])).all(axis=-1)
    error = aligned[inside][:, :2] - (source[inside] * [2, 3] + 20)
    assert inside.mean() > 0.6
    assert (np.abs(error.mean(axis=0)) < 0.7).all() and np.abs(error).max() < 1.6  # half a pixel off is 1 and 1.5


def test_the_mirror_fills_what_lies_outside() -> None:
    plain = np.full((40, 60, 3), 150, np.uint8)
    far = Alignment(0.8, 1.25, (0.9, -0.9), 0.0, 1.0, is_kept=True)
    assert (align_pixels(plain, far) == 150).all()


def test_what_lies_well_or_shows_nothing_stays_as_it_is() -> None:
    image = draw_lesion(5)
    same = register(image, image, max_size=1.25)
    assert not same.is_kept and (same.turn, same.size, same.shift) == (0.0, 1.0, (0.0, 0.0))
    assert same.match_before == pytest.approx(1.0)
    blank = register(np.full((50, 50, 3), 90, np.uint8), image, max_size=1.25)
    assert not blank.is_kept


def test_size_is_kept_where_it_means_growth() -> None:
    later = draw_lesion(4)
    earlier = align_pixels(later, Alignment(1.0, 1.2, (0.0, 0.0), 0.0, 1.0, is_kept=True))
    assert register(earlier, later, max_size=1.25).size == pytest.approx(1.2, rel=0.03)
    found = register(earlier, later, max_size=1.0)
    assert found.size == pytest.approx(1.0) and found.is_kept
    assert found.turn == pytest.approx(1.0, abs=0.1)


def test_the_lesion_is_followed_not_the_ring_of_the_dermatoscope() -> None:
    later = draw_lesion(6)[:, 10:-10]
    earlier = align_pixels(later, Alignment(1.5, 1.0, (0.15, 0.1), 0.0, 1.0, is_kept=True))
    rows, columns = np.mgrid[:160, :160] - 79.5
    ring = np.hypot(rows, columns) > 0.93 * 80
    found = register(np.where(ring[..., None], 0, earlier), np.where(ring[..., None], 0, later), max_size=1.25)
    assert found.is_kept and found.turn == pytest.approx(1.5, abs=0.06)
    np.testing.assert_allclose(found.shift, (0.15, 0.1), atol=0.04)
