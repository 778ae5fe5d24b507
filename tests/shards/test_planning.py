"""Which record or tile goes into which shard: orders, and what a plan and its tasks weigh."""

import gc
import pickle
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from panfm.shards.index import open_shard_set
from panfm.shards.packing import BuildOptions
from panfm.shards.planning import arrange, compute_plan_hash, plan_build
from panfm.shards.privacy import PUBLIC_KEY, PseudonymKey, pseudonymise
from panfm.shards.sources import read_records
from panfm.shards.writer import build_shards
from panfm.shards.wsi import judge_plan, plan_tiles
from tests.shards.wsi_pyramids import damage, draw_tissue, write_pyramid


def cut(order: np.ndarray, starts: np.ndarray, groups: np.ndarray) -> list[list[int]]:
    """The groups of each shard's units."""
    return [groups[order[first:last]].tolist() for first, last in pairwise(starts)]


def make_groups(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def test_contiguous_slides_are_in_no_more_shards_than_it_takes() -> None:
    rng = np.random.default_rng(0)
    for counts in [(4, 3, 5), (12,), (5, 5), (1, 5, 5), (3, 7, 1), (0,), *rng.integers(0, 23, (40, 9)).tolist()]:
        groups = make_groups(*counts)
        options = BuildOptions(order="contiguous", samples_per_shard=5)
        order, starts = arrange(groups, options, pooled=True)
        assert order.tolist() == list(range(len(groups)))  # slide by slide, row by row
        shards = cut(order, starts, groups)
        assert all(0 < len(shard) <= 5 for shard in shards)
        for slide, count in enumerate(counts):
            assert sum(slide in shard for shard in shards) == -(-count // 5), counts


def test_contiguous_puts_the_tiles_of_a_slide_together_wherever_they_stand() -> None:
    groups = np.array([0, 1, 0, 3, 1, 0], dtype=np.int32)
    order, starts = arrange(groups, BuildOptions(order="contiguous", samples_per_shard=3), pooled=False)
    assert order.tolist() == [0, 2, 5, 1, 4, 3] and starts.tolist() == [0, 3, 6]


def test_shuffled_slides_are_mixed_in_pools() -> None:
    groups = make_groups(*[40] * 100)
    options = BuildOptions(samples_per_shard=256)
    order, starts = arrange(groups, options, pooled=True)
    assert sorted(order.tolist()) == list(range(4000))
    shards = cut(order, starts, groups)
    assert all(200 <= len(shard) <= 256 for shard in shards)  # no rest that fills no shard
    for shard in shards:  # a few slides each, so that few are opened, and well mixed
        assert 25 <= len(set(shard)) <= 64 and shard != sorted(shard)
    again, _ = arrange(groups, options, pooled=True)
    other, _ = arrange(groups, BuildOptions(samples_per_shard=256, seed=1), pooled=True)
    assert np.array_equal(order, again) and not np.array_equal(order, other)
    few = make_groups(3, 0, 4)
    assert len(arrange(few, options, pooled=True)[0]) == 7 and len(arrange(few[:0], options, pooled=True)[1]) == 1


def test_slides_in_both_orders(make_slides: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_slides((448, 224), (336, 336), (448, 112))
    tables = {}
    for order in ("shuffled", "contiguous"):
        options = BuildOptions(order=order, samples_per_shard=9)
        build_shards(archive.card, archive.root, tmp_path / order, options=options)
        shard_set = open_shard_set(tmp_path / order)
        assert shard_set.index["order"] == shard_set.index["options"]["order"] == order
        overlays = {path.stem for path in (tmp_path / order / "overlays").iterdir()}
        assert overlays == set(shard_set.table["slide_id"].to_pylist()) and len(overlays) == 3
        assert not (tmp_path / order / ".build").exists()
        tables[order] = shard_set.table.select(["slide_id", "y0", "x0", "shard", "key"]).to_pylist()
    assert {row["key"] for row in tables["shuffled"]} == {row["key"] for row in tables["contiguous"]}
    slides = [row["slide_id"] for row in tables["contiguous"]]
    assert [slides[0]] * 8 + [slides[8]] * 9 + [slides[17]] * 4 == slides and len(set(slides)) == 3
    for first, last in ((0, 8), (8, 17)):
        places = [(row["y0"], row["x0"]) for row in tables["contiguous"][first:last]]
        assert places == sorted(places)
        assert len({row["shard"] for row in tables["contiguous"][first:last]}) == 1
    assert [row["slide_id"] for row in tables["shuffled"]] != sorted(slides, key=slides.index)


def test_damage_that_planning_did_not_see(make_slides: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_slides((1344, 672), (336, 336))
    path = archive.root / "slides/slide0.tiff"
    write_pyramid(path, draw_tissue(1344, 672), 0.5, (1, 2, 4), compression="zlib")
    damage(path, 10)  # of the finest level, under 9 of its 72 tiles; planning reads 8 others, and a coarser level
    assert judge_plan(plan_tiles(path, archive.card.slides)) is None
    options = BuildOptions(max_rejected_share=0.6)
    report = build_shards(archive.card, archive.root, tmp_path / "without", options=options)
    assert (report.num_samples, report.num_rejected) == (9, {"bad_slide": 1})
    assert "9 of 72 regions cannot be read" in report.rejected[0].detail
    archive.values["slides"]["max_bad_fraction"] = 0.4
    report = build_shards(archive.card, archive.root, tmp_path / "with", options=options)
    assert (report.num_samples, report.num_rejected) == (72 - 9 + 9, {"unreadable_region": 9})
    name = pseudonymise(PUBLIC_KEY, "small_slides", "slide", "S0")
    for folder in ("without", "with"):  # red hatches on both: drawn again when all tiles had been read
        picture = np.asarray(Image.open(tmp_path / f"{folder}/overlays/{name}.png").convert("RGB")).astype(int)
        assert (np.abs(picture - (215, 0, 0)).max(axis=-1) < 10).sum() > 1000


@pytest.mark.parametrize("kind", ["photographs", "slides"])
def test_what_a_task_carries(
    make_archive: Callable[..., Any], make_slides: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    archive = make_archive(12) if kind == "photographs" else make_slides((448, 224), (336, 224))
    key = PseudonymKey(b"secret of the test" * 2, "private")
    records = read_records(archive.card, archive.root)
    options = BuildOptions(samples_per_shard=5)
    plan_hash = compute_plan_hash(archive.card, records, archive.root, options, key)
    plan = plan_build(archive.card, records, tmp_path / "out", options, key, plan_hash)
    task = plan.make_task(1)
    data = pickle.dumps(task)
    assert key.secret not in data and len(data) < 20_000
    assert repr(task) == "ShardTask(shard-000001)" and "P0" not in repr(task)
    assert pickle.loads(data).load_key() == PUBLIC_KEY  # without a key file
    assert plan.make_task(1).hash == task.hash != plan.make_task(0).hash
    assert sum(len(plan.make_task(number).units) for number in range(plan.num_shards)) == plan.num_units


def test_the_hash_of_a_plan_is_of_all_that_decides_the_bytes(make_archive: Callable[..., Any]) -> None:
    archive = make_archive(4)

    def compute(**options: Any) -> str:
        records = read_records(archive.card, archive.root)
        return compute_plan_hash(archive.card, records, archive.root, BuildOptions(**options), PUBLIC_KEY)

    first = compute()
    assert first == compute(processes=4, max_rejected_share=0.9, scheduler="tcp://x")
    changed = [compute(seed=1), compute(order="contiguous"), compute(short_side=64), compute(min_side=33)]
    (archive.root / "masks/photo0.png").write_bytes(b"longer or shorter")
    changed.append(compute())
    archive.rows[2]["age"] = "77"
    archive.write_table()
    changed.append(compute())
    assert len({first, *changed}) == 7


def test_a_plan_holds_little_for_each_image(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    """What stays in memory while shards are written; `benchmarks/shards.py --memory` measures the peak."""
    archive = make_archive(1)
    archive.values["columns"]["key"] = "number"

    def measure(num_rows: int) -> int:
        row = archive.rows[0]
        archive.rows = [
            row | {"number": f"image {number}", "patient": f"P{number}", "lesion": ""} for number in range(num_rows)
        ]
        archive.write_table()
        gc.collect()
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        records = read_records(archive.card, archive.root)
        plan = plan_build(archive.card, records, tmp_path / "out", BuildOptions(), PUBLIC_KEY, "hash")
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        assert plan.num_units == num_rows
        return held

    measure(100)  # imports
    growth = (measure(3000) - measure(1000)) / 2000
    assert 20 < growth < 500, f"{growth:.0f} bytes an image"
