"""Copies by pixels: copies score high, other lesions and shared frames low, at the size and shift where they fit."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from panfm.shards import pixel_match
from panfm.shards.pixel_match import MIN_SCORE, cut_width, make_thumbnail, orient_image, score_pairs
from tests.shards.pictures import COPIES, draw_skin

LAID = {"mirrored": 1, "turned": 6}  # the orientation of the original that looks like the copy


def put_in_frame(image: Image.Image) -> Image.Image:
    """The black ring of a dermatoscope: the same sharp edge in every image of one device."""
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).ellipse((-8, -20, image.width + 8, image.height + 20), fill=255)
    return Image.composite(image, Image.new("RGB", image.size), mask)


def score(first: Image.Image, second: Image.Image, orientation: int = 0) -> float:
    return float(score_pairs([orient_image(make_thumbnail(first), orientation)], [make_thumbnail(second)])[0])


def test_copies_score_high_and_other_images_low() -> None:
    for name, change in COPIES.items():
        image = draw_skin(1)
        orientation = LAID.get(name, 0)
        assert score(image, change(image), orientation) > 0.7, name
        assert score(draw_skin(2), change(image), orientation) < MIN_SCORE - 0.1, name
    others = [make_thumbnail(draw_skin(seed)) for seed in range(30)]
    scores = score_pairs(others[:-1], others[1:])
    assert scores.max() < MIN_SCORE and scores.mean() < 0.25


def test_a_shared_frame_is_no_copy() -> None:
    first, second = (put_in_frame(draw_skin(seed, strength=0.03)) for seed in (4, 5))
    plain = np.corrcoef(make_thumbnail(first).ravel(), make_thumbnail(second).ravel())[0, 1]
    assert plain > 0.9, "plain correlation is fooled, or the test shows nothing"
    assert score(first, second) < MIN_SCORE
    assert score(first, COPIES["recoloured"](first)) > 0.7


def test_either_may_be_the_crop() -> None:
    image = draw_skin(6)
    part = image.crop((10, 4, 10 + 136, 4 + 102))  # 85 % of each side
    assert score(part, image) > 0.7 and score(image, part) > 0.7
    assert score(image.crop((0, 0, 80, 60)), image) < MIN_SCORE, "half the side is more than is looked for"


def test_the_square_in_the_middle_fits_when_cut() -> None:
    image = draw_skin(7)
    square = image.crop((20, 0, 140, 120))
    whole, part = make_thumbnail(image), make_thumbnail(square)
    assert score_pairs([part], [whole])[0] < 0.6
    assert score_pairs([part], [cut_width(whole, 120 / 160)])[0] > 0.7
    assert cut_width(whole, 1.0) is whole


def test_scores_do_not_depend_on_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_match, "BLOCK_PAIRS", 8)
    images = [make_thumbnail(draw_skin(seed)) for seed in range(20)]
    together = score_pairs(images, images[::-1], threads=2)
    alone = score_pairs(images[:2], images[::-1][:2])
    assert np.allclose(together[:2], alone, atol=1e-5)
    assert len(score_pairs([], [])) == 0
