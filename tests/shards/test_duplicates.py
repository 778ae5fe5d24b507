"""Duplicates among the images of built shard sets: same bytes, copies, groups; tiles of one slide are not the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from panfm.errors import UserError
from panfm.shards.duplicates import Pairs, find_copies, find_exact, group_pairs, join_values, list_firsts, list_images
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.packing import BuildOptions
from panfm.shards.writer import build_shards
from tests.archives import make_source_card
from tests.shards.pictures import COPIES, draw_skin

NUM_IMAGES = 12


def list_pairs(pairs: Pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.query.tolist(), pairs.match.tolist(), strict=True))


def build(folder: Path, name: str, images: dict[str, object]) -> ShardSet:
    root = folder / f"{name}-raw"
    root.mkdir()
    for file, image in images.items():
        if isinstance(image, bytes):
            (root / file).write_bytes(image)
        else:
            image.save(root / file, quality=95)  # type: ignore[attr-defined]
    (root / "table.csv").write_text("path\n" + "".join(f"{file}\n" for file in images))
    card = make_source_card(name, modality="dermoscopic", columns={"path": "path"})
    build_shards(card, root, folder / name, options=BuildOptions(min_side=16))
    return open_shard_set(folder / name)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    """A clinic of 12 lesions, and an atlas with changed copies of the first six, two originals and four others."""
    folder = tmp_path_factory.mktemp("duplicates")
    clinic = build(folder, "clinic", {f"{seed}.jpg": draw_skin(seed) for seed in range(NUM_IMAGES)})
    files: dict[str, object] = {
        f"{name}.jpg": change(draw_skin(seed)) for seed, (name, change) in enumerate(COPIES.items())
    }
    files |= {f"same-{seed}.jpg": (folder / "clinic-raw" / f"{seed}.jpg").read_bytes() for seed in (7, 8)}
    files |= {f"other-{seed}.jpg": draw_skin(100 + seed) for seed in range(4)}
    return clinic, build(folder, "atlas", files)


def test_every_copy_is_found_and_nothing_else(sets: tuple[ShardSet, ShardSet]) -> None:
    clinic, atlas = (list_images([shard_set]) for shard_set in sets)
    assert len(clinic) == NUM_IMAGES and len(atlas) == len(COPIES) + 6
    exact = find_exact(atlas, clinic)
    assert len(exact) == 2 and (exact.score == 1).all() and (exact.distance == -1).all()
    copies, num_candidates = find_copies(atlas, clinic)
    assert num_candidates >= len(copies) == len(COPIES) + 2
    assert len(np.unique(copies.query)) == len(np.unique(copies.match)) == len(COPIES) + 2
    assert list_pairs(exact) <= list_pairs(copies)
    strict, _ = find_copies(atlas, clinic, max_distance=0)
    assert len(strict) < len(copies), "the distance must matter"


def test_duplicates_inside_and_across_sources_form_groups(sets: tuple[ShardSet, ShardSet]) -> None:
    both = list_images(sets)
    pairs, _ = find_copies(both)
    assert (pairs.query < pairs.match).all() and len(pairs) == len(COPIES) + 2
    groups = group_pairs(pairs.query, pairs.match, len(both))
    assert groups.max() + 1 == len(COPIES) + 2 and np.count_nonzero(groups >= 0) == 2 * (len(COPIES) + 2)
    exact = find_exact(both)
    assert (exact.query < exact.match).all() and len(exact) == 2


def test_images_of_one_file_are_the_same_but_tiles_are_not(sets: tuple[ShardSet, ShardSet]) -> None:
    clinic, _ = sets
    table = clinic.table
    one_file = table.set_column(
        table.schema.get_field_index("source_sha256"), "source_sha256", pa.array(["ab"] * len(table))
    )
    photographs = list_images([replace(clinic, table=one_file)])
    assert len(find_exact(photographs)) == NUM_IMAGES - 1, "each with the first, not with every other one"
    tiles = one_file.set_column(one_file.schema.get_field_index("x0"), "x0", pa.array([0] * len(table), pa.int32()))
    assert len(find_exact(list_images([replace(clinic, table=tiles)]))) == 0


def test_chains_are_groups_and_are_numbered_by_their_first_image() -> None:
    groups = group_pairs(np.array([4, 1, 6]), np.array([2, 7, 1]), 9)
    assert groups.tolist() == [-1, 0, 1, -1, 1, -1, 0, 0, -1]
    assert group_pairs(np.empty(0, np.int64), np.empty(0, np.int64), 2).tolist() == [-1, -1]


def test_null_equals_nothing() -> None:
    first, second = pa.array(["a", None, "b", "a"]), pa.array([None, "a", "a"])
    assert sorted(join_values(first, second).T.tolist()) == [[0, 1], [0, 2], [3, 1], [3, 2]]
    assert list_firsts(first).to_pylist() == ["a", None, "b", None]


def test_a_set_of_an_older_hash_is_refused(sets: tuple[ShardSet, ShardSet]) -> None:
    clinic, _ = sets
    place = clinic.table.schema.get_field_index("phash")
    old = clinic.table.set_column(place, "phash", pa.array(["0" * 16] * NUM_IMAGES))
    with pytest.raises(UserError, match="build the shards again"):
        find_copies(list_images([replace(clinic, table=old)]))
