"""Images of mistakes: the surest first, few of one patient, small copies without a header, and only where asked for."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.board.build import build_leaderboard
from panfm.board.standings import compute_standings
from panfm.board.task_errors import (
    MAX_A_GROUP,
    MAX_MISTAKES,
    SIDE,
    Mistake,
    find_image_set,
    find_mistakes,
    make_thumbnail,
    show_mistakes,
)
from panfm.board.task_report import IMAGES_WARNING, render_task_page
from panfm.shards.index import ShardSet
from tests.board.fabricated import GOOD, write_own_results


def make_jpeg(width: int, height: int) -> bytes:
    """A photograph whose header names a place."""
    exif = Image.Exif()
    exif[0x010E] = "ward 7"  # ImageDescription
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (190, 120, 90)).save(buffer, "JPEG", exif=exif)
    assert b"ward 7" in buffer.getvalue()
    return buffer.getvalue()


def test_the_surest_mistakes_come_first_and_few_of_one_group() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 200)
    scores = rng.dirichlet(np.ones(3), 200)
    keys = [f"k{row:03d}" for row in range(200)]
    groups = [f"g{row // 5}" for row in range(200)]
    found = find_mistakes(keys, labels, scores, groups, "abc")
    assert len(found) == MAX_MISTAKES
    sure = [one.probability for one in found]
    assert sure == sorted(sure, reverse=True)
    for one in found:
        row = keys.index(one.key)
        assert one.true == "abc"[labels[row]] != one.predicted == "abc"[scores[row].argmax()]
    assert sure[0] == scores.max(axis=1)[scores.argmax(axis=1) != labels].max()
    same = find_mistakes(keys, labels, scores, ["one"] * 200, "abc")
    assert same == found[:MAX_A_GROUP]


@pytest.mark.parametrize("size", [(1200, 800), (300, 900), (40, 48)])
def test_a_copy_is_small_and_has_no_header(size: tuple[int, int]) -> None:
    data = base64.b64decode(make_thumbnail(make_jpeg(*size)).removeprefix("data:image/jpeg;base64,"))
    copy = Image.open(io.BytesIO(data))
    assert copy.format == "JPEG" and max(copy.size) == min(SIDE, max(size))
    assert b"ward 7" not in data and not copy.getexif()


def test_images_come_from_the_set_of_the_source_alone(clinic: ShardSet) -> None:
    keys = clinic.table["key"].to_pylist()[:3]
    assert find_image_set([clinic], "clinic", keys) is clinic
    assert find_image_set([clinic], "ham10000", keys) is None
    assert find_image_set([clinic], None, keys) is clinic
    assert find_image_set([clinic], None, [*keys, "elsewhere"]) is None
    assert find_image_set([clinic, clinic], None, keys) is None  # which of them is open
    assert find_image_set([clinic], None, []) is None


@pytest.fixture
def results(clinic: ShardSet, tmp_path: Path) -> Path:
    return write_own_results(tmp_path / "results", clinic.table["key"].to_pylist())


def test_images_are_shown_where_asked_for_and_nobody_is_named(results: Path, clinic: ShardSet, tmp_path: Path) -> None:
    build_leaderboard([results], tmp_path / "plain")
    plain = (tmp_path / "plain/tasks/own.html").read_text()
    assert "data:image" not in plain and IMAGES_WARNING not in plain
    build_leaderboard([results], tmp_path / "shown", images=[clinic.folder])
    page = (tmp_path / "shown/tasks/own.html").read_text()
    images = re.findall(r'<img src="(data:image/jpeg;base64,[^"]+)"', page)
    assert 3 < len(images) <= MAX_MISTAKES and IMAGES_WARNING in page
    assert re.search(r"<b>class 1</b>taken for class 0, 0\.\d\d</li>", page)
    assert not any(name in page for column in ("key", "group_id") for name in clinic.table[column].to_pylist())
    build_leaderboard([results], tmp_path / "again", images=[clinic.folder])
    assert (tmp_path / "again/tasks/own.html").read_text() == page


def test_lost_images_are_counted(results: Path, clinic: ShardSet, tmp_path: Path) -> None:
    board = compute_standings([results])
    (page,) = board.pages
    first, *others = page.encoders[0].mistakes
    gone = [Mistake("gone", first.true, first.predicted, first.probability), *others]
    shown = show_mistakes({GOOD: gone}, "clinic", [clinic])
    assert shown is not None and [one.image is None for one in shown[GOOD]] == [True] + [False] * len(others)
    html = render_task_page(board.summary, page, shown)
    assert f"1 of {len(gone)} images are not in the given shards" in html and html.count("<img") == len(others)
