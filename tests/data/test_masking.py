"""masking: the asked number on every grid, and blocks that look like the original generator's."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, label

from panfm.config import validate
from panfm.data.masking import MaskConfig, _grow, num_hidden, sample_mask
from panfm.errors import UserError

KINDS = ("random", "block", "inverse_block")


@pytest.mark.parametrize("kind", KINDS)
def test_every_grid_of_up_to_forty_patches_a_side_has_its_number(kind: str) -> None:
    rng = np.random.default_rng(0)
    for height, width in itertools.product(range(1, 41), repeat=2):
        for ratio in (0.0, 0.3, 0.75, 0.999) if height * width <= 64 else (0.6,):
            config = MaskConfig(kind=kind, ratio=ratio)
            mask = sample_mask(config, (height, width), rng)
            assert mask.shape == (height * width,) and mask.dtype == np.bool_
            assert int(mask.sum()) == num_hidden(config, (height, width)) < height * width


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    ratio=st.floats(0.0, 0.999),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_every_mask_hides_exactly_the_asked_number(kind: str, ratio: float, height: int, width: int, seed: int) -> None:
    config = MaskConfig(kind=kind, ratio=ratio)
    mask = sample_mask(config, (height, width), np.random.default_rng(seed))
    assert mask.shape == (height * width,) and mask.dtype == np.bool_
    assert int(mask.sum()) == num_hidden(config, (height, width))
    assert num_hidden(config, (height, width)) == min(int(ratio * (height * width) + 0.5), height * width - 1)


def test_counts_that_papers_use() -> None:
    assert num_hidden(MaskConfig(ratio=0.75), (14, 14)) == 147
    assert num_hidden(MaskConfig(ratio=0.5), (14, 14)) == 98
    assert num_hidden(MaskConfig(ratio=0.0), (8, 8)) == 0
    assert num_hidden(MaskConfig(ratio=0.999), (8, 8)) == 63  # one stays visible
    with pytest.raises(UserError, match=r"ratio \(1.0\)"):
        validate(MaskConfig, {"ratio": 1.0}, where="test")


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_decides_and_every_patch_gets_its_turn(kind: str) -> None:
    config = MaskConfig(kind=kind, ratio=0.6)
    first, again = (sample_mask(config, (7, 9), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    rng = np.random.default_rng(0)
    masks = np.stack([sample_mask(config, (7, 9), rng) for _ in range(400)])
    frequency = masks.mean(axis=0)
    assert (frequency > 0.02).all() and (frequency < 0.999).all()
    if kind == "random":
        assert abs(frequency - num_hidden(config, (7, 9)) / 63).max() < 0.12


def measure(masks: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Hidden share per ring from border to centre, neighbouring pairs that differ, connected components."""
    depth = np.minimum(np.arange(14), 13 - np.arange(14))
    ring = np.minimum(depth[:, None], depth[None, :])
    shares = np.array([masks.mean(axis=0)[ring == number].mean() for number in range(7)])
    down = (masks[:, 1:] ^ masks[:, :-1]).sum(axis=(1, 2))
    across = (masks[:, :, 1:] ^ masks[:, :, :-1]).sum(axis=(1, 2))
    return shares, float((down + across).mean()), float(np.mean([label(mask)[1] for mask in masks]))


def test_blocks_have_the_statistics_of_the_published_generator() -> None:
    # Of 200 masks that the CAE code (MaskingGenerator: 14 x 14, 98 hidden, blocks of at least 16) drew.
    published = np.array([0.207, 0.407, 0.567, 0.699, 0.783, 0.845, 0.884])
    rng = np.random.default_rng(1)
    config = MaskConfig(kind="block", ratio=0.5)
    masks = np.stack([sample_mask(config, (14, 14), rng).reshape(14, 14) for _ in range(400)])
    shares, num_borders, num_components = measure(masks)
    np.testing.assert_allclose(shares, published, atol=0.045)
    assert 41 < num_borders < 46  # published 43.1, random masks 183
    assert 1.1 < num_components < 1.5  # published 1.3
    corners = masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert 0.03 < corners < 0.10  # published 0.066


def test_inverse_blocks_leave_blocks_visible() -> None:
    rng = np.random.default_rng(2)
    config = MaskConfig(kind="inverse_block", ratio=0.75)
    visible = np.stack([~sample_mask(config, (14, 14), rng).reshape(14, 14) for _ in range(100)])
    assert visible.sum(axis=(1, 2)).tolist() == [49] * 100
    shares, num_borders, num_components = measure(visible)
    assert num_borders < 60 and num_components < 1.6  # random visible patches: about 137 borders
    assert shares[-1] > 0.4 and shares[0] < 0.15  # the blocks, not what blocks leave over at the border


def test_a_row_of_patches_is_filled_too() -> None:
    for kind, grid in itertools.product(KINDS, [(1, 12), (12, 1), (1, 1), (2, 2)]):
        assert sample_mask(MaskConfig(kind=kind, ratio=0.5), grid, np.random.default_rng(0)).size == grid[0] * grid[1]


@pytest.mark.parametrize("grid", [(1, 9), (9, 1), (2, 7), (7, 2), (6, 5)])
def test_a_remainder_grows_ring_by_ring_and_never_around_the_border(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        before = rng.random(grid) < 0.2
        before[rng.integers(grid[0]), rng.integers(grid[1])] = True
        missing = int(rng.integers(0, before.size - before.sum() + 1))
        grown = _grow(sum(1 << int(cell) for cell in np.flatnonzero(before)), missing, grid, rng)
        after = np.array([grown >> cell & 1 for cell in range(before.size)], dtype=np.bool_).reshape(grid)
        assert grown < 1 << before.size and after.sum() == before.sum() + missing
        inner, left = before, missing
        while 0 < (ring := binary_dilation(inner) & ~inner).sum() <= left:
            inner, left = inner | ring, left - ring.sum()
        assert after[inner].all() and not after[~inner & ~ring].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_side_of_the_grid_is_preferred(kind: str) -> None:
    rng = np.random.default_rng(4)
    mean = np.mean([sample_mask(MaskConfig(kind=kind, ratio=0.5), (8, 8), rng) for _ in range(1500)], axis=0)
    mean = mean.reshape(8, 8)
    for other in (mean[::-1], mean[:, ::-1], mean.T):
        assert np.abs(mean - other).max() < 0.09
