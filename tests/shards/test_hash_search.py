"""The search by hash: orientations without pixels, what it finds beside a scan of all pairs, what it refuses."""

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from panfm.errors import UserError
from panfm.shards import hash_search
from panfm.shards.hash_search import count_bits, orient_hashes, read_hashes, search_hashes
from panfm.shards.pixel_match import orient_image
from panfm.shards.quality import compute_phash
from tests.shards.pictures import draw_skin


def hash_image(image: Image.Image) -> NDArray[np.uint8]:
    text = compute_phash(image)
    assert text is not None
    return np.frombuffer(bytes.fromhex(text), dtype=np.uint8)


def measure(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.unpackbits(first ^ second, axis=-1).sum(axis=-1, dtype=np.int64)


def test_hashes_of_turned_images_follow_from_the_hash() -> None:
    image = draw_skin(3)
    oriented = orient_hashes(hash_image(image)[None])[:, 0]
    for orientation in range(8):
        laid = Image.fromarray(np.ascontiguousarray(orient_image(np.asarray(image), orientation)))
        own = measure(oriented, hash_image(laid))
        assert own[orientation] <= 10 and own.argmin() == orientation, (orientation, own)
        assert np.sort(own)[1] > 40, "another orientation must not look the same"


def test_search_finds_copies_and_reports_what_a_scan_reports() -> None:
    rng = np.random.default_rng(0)
    database = rng.integers(0, 256, (3000, 32), dtype=np.uint8)
    planted = rng.permutation(3000)[:200]
    turns = rng.integers(0, 8, 200)
    queries = orient_hashes(database[planted])[turns, np.arange(200)]
    queries = queries ^ np.packbits(rng.random((200, 256)) < 0.05, axis=1)
    found = search_hashes(database, queries)
    assert np.array_equal(found.query, np.arange(200)) and np.array_equal(found.row, planted)
    laid = orient_hashes(queries)[found.orientation, found.query]
    assert np.array_equal(measure(laid, database[found.row]), found.distance)
    assert np.array_equal(
        found.distance, measure(orient_hashes(queries)[:, found.query], database[found.row]).min(axis=0)
    )
    near = search_hashes(database, queries, max_distance=12)
    expected = found.distance <= 12
    assert 0 < expected.sum() < 200 and np.array_equal(near.query, found.query[expected])


def test_search_does_not_depend_on_threads_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    database = rng.integers(0, 256, (500, 32), dtype=np.uint8)
    database[100:150] = database[100]  # one photograph fifty times
    whole = search_hashes(database, database[:200], threads=1)
    assert np.count_nonzero((whole.query == 100) & (whole.distance == 0)) == 50
    monkeypatch.setattr(hash_search, "BLOCK_QUERIES", 64)
    monkeypatch.setattr(hash_search, "BLOCK_CANDIDATES", 10)
    cut = search_hashes(database, database[:200], threads=2)
    for name in ("query", "row", "orientation", "distance"):
        assert np.array_equal(getattr(whole, name), getattr(cut, name)), name


def test_search_of_nothing_is_empty() -> None:
    nothing = np.empty((0, 32), dtype=np.uint8)
    assert len(search_hashes(nothing, nothing).query) == 0
    assert len(search_hashes(np.zeros((5, 32), dtype=np.uint8), nothing).query) == 0


def test_too_many_pairs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_search, "MAX_MATCHES", 1000)
    with pytest.raises(UserError, match=r"more than 1000 pairs .* smaller --distance"):
        search_hashes(np.ones((200, 32), dtype=np.uint8), np.ones((200, 32), dtype=np.uint8))


def test_hashes_are_read_and_older_ones_refused() -> None:
    hashes, known = read_hashes(pa.array(["ff" * 32, None, "0f" * 32]), "shards/x")
    assert known.tolist() == [True, False, True]
    assert hashes[0].tolist() == [255] * 32 and not hashes[1].any() and hashes[2].tolist() == [15] * 32
    with pytest.raises(UserError, match=r"shards/x: a phash has 16 characters.*build the shards again"):
        read_hashes(pa.array(["0" * 16]), "shards/x")


def test_bits_are_counted_without_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([[0, 1], [2**64 - 1, 2**63 + 2**17]], dtype=np.uint64)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert count_bits(values).tolist() == [[0, 1], [64, 2]]
