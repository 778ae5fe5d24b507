"""loader: the same bits for every number of ranks, workers and interruptions; what may not be drawn never is."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from panfm.config import validate
from panfm.data.batch import NO_GROUP, Batch
from panfm.data.loader import DataConfig, Loader, LoaderState, build_loader
from panfm.data.masking import MaskConfig
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig
from panfm.errors import UserError
from panfm.shards.index import open_shard_set

GLOBAL, MICRO = 12, 2
AUGMENT = AugmentConfig(image_size=16, views=2)
START = LoaderState(step=0, salt=0)


def make_loader(*shards: Path, mixture: MixtureConfig | None = None, **options: object) -> Loader:
    data = {"workers": 0, "shards": [str(path) for path in shards]}
    data |= {key: options.pop(key) for key in ("workers", "modalities", "max_failed_share", "use") if key in options}
    arguments = {
        "mask": MaskConfig(kind="block", ratio=0.5),
        "mask_grid": (4, 4),
        "seed": 3,
        "global_batch_size": GLOBAL,
        "micro_batch_size": MICRO,
        "excluded": {},
    }
    return build_loader(
        validate(DataConfig, data, where="test"), mixture or MixtureConfig(), AUGMENT, **(arguments | options)
    )


def draw_steps(loader: Loader, num_steps: int, state: LoaderState = START, world_size: int = 1) -> list[Batch]:
    """The micro batches of `num_steps` steps in the order of the stream, all ranks together."""
    with loader:
        ranks = [loader.iterate(state, rank=rank, world_size=world_size) for rank in range(world_size)]
        return [batch for _ in range(num_steps) for batches in ranks for batch in next(batches)]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in ("positions", "modalities", "sources", "lesions", "patients", "visits", "masks"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        for view, other_view in zip(one.views, other.views, strict=True):
            assert torch.equal(view, other_view)


@pytest.fixture(scope="module")
def reference(alpha: Path, beta: Path) -> list[Batch]:
    return draw_steps(make_loader(alpha, beta, mixture=MixtureConfig(group_share=0.3)), 5)


def test_a_batch_is_what_it_says(reference: list[Batch]) -> None:
    assert len(reference) == 5 * GLOBAL // MICRO
    assert torch.cat([batch.positions for batch in reference]).tolist() == list(range(5 * GLOBAL))
    for batch in reference:
        assert batch.size == MICRO
        assert [view.shape for view in batch.views] == [(MICRO, 3, 16, 16)] * 2
        assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in batch.views)
        assert not torch.equal(*batch.views)
        assert batch.masks is not None and batch.masks.shape == (2, MICRO, 16)
        assert batch.masks.sum(dim=2).unique().tolist() == [8]
        assert not torch.equal(batch.masks[0, 0], batch.masks[0, 1])
        slides = batch.sources == 1
        assert torch.equal(slides, batch.modalities == 3)
        assert (batch.lesions[slides] == NO_GROUP).all() and (batch.lesions[~slides] >= 0).all()
        assert (batch.visits[slides] == NO_GROUP).all() and (batch.patients >= 0).all()


def test_the_metadata_belong_to_the_sample(alpha: Path) -> None:
    batches = draw_steps(make_loader(alpha), 5)  # one epoch of 60
    table = open_shard_set(alpha).table
    lesions = torch.cat([batch.lesions for batch in batches])
    assert sorted(Counter(lesions.tolist()).values()) == [3] * 20
    assert len(set(torch.cat([batch.visits for batch in batches]).tolist())) == 60  # three days a patient
    kinds = Counter(torch.cat([batch.modalities for batch in batches]).tolist())
    assert kinds == {0: 20, 1: 40} == {0: table["modality"].to_pylist().count("clinical"), 1: 40}


@pytest.mark.parametrize("world_size", [2, 3])
def test_another_number_of_ranks_draws_the_same_stream(
    world_size: int, alpha: Path, beta: Path, reference: list[Batch]
) -> None:
    loader = make_loader(alpha, beta, mixture=MixtureConfig(group_share=0.3))
    assert_same(draw_steps(loader, 5, world_size=world_size), reference)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_another_number_of_workers_draws_the_same_stream(
    workers: int, alpha: Path, beta: Path, reference: list[Batch]
) -> None:
    loader = make_loader(alpha, beta, mixture=MixtureConfig(group_share=0.3), workers=workers)
    assert_same(draw_steps(loader, 5), reference)


def test_resuming_goes_on_where_it_stopped(alpha: Path, beta: Path, reference: list[Batch]) -> None:
    loader = make_loader(alpha, beta, mixture=MixtureConfig(group_share=0.3))
    per_step = GLOBAL // MICRO
    for step in (1, 3):
        assert_same(draw_steps(loader, 5 - step, LoaderState(step, 0)), reference[step * per_step :])
    far = draw_steps(loader, 1, LoaderState(10_000_000, 0))
    assert far[0].positions.tolist() == [120_000_000, 120_000_001]


def test_another_salt_draws_other_samples_with_other_views(alpha: Path) -> None:
    loader = make_loader(alpha)
    first, second = draw_steps(loader, 5), draw_steps(loader, 5, LoaderState(0, 1))
    lesions = [torch.cat([batch.visits for batch in batches]).tolist() for batches in (first, second)]
    assert lesions[0] != lesions[1] and sorted(lesions[0]) == sorted(lesions[1])  # one whole epoch each
    masks = [torch.cat([batch.masks for batch in batches], dim=1) for batches in (first, second)]
    assert not torch.equal(*masks)


def test_every_image_is_drawn_once_an_epoch_across_changing_world_sizes(alpha: Path, beta: Path) -> None:
    loader = make_loader(alpha, beta, global_batch_size=6, micro_batch_size=1)
    with loader:
        seen = []
        for first, num_steps, world_size in ((0, 10, 1), (10, 7, 3), (17, 17, 2)):  # 34 steps of 6 > 3 epochs of 67
            seen += draw_steps(loader, num_steps, LoaderState(first, 0), world_size)
    assert torch.cat([batch.positions for batch in seen]).tolist() == list(range(204))
    samples = [int(batch.visits) if int(batch.visits) != NO_GROUP else int(batch.patients) for batch in seen]
    assert Counter(Counter(samples[:201]).values()) == {3: 67}


def test_groups_stay_inside_a_micro_batch_on_every_rank(alpha: Path) -> None:
    mixture = MixtureConfig(group_share=0.5, group_size=2)
    batches = draw_steps(make_loader(alpha, mixture=mixture), 40, world_size=3)
    together = np.mean([int(batch.lesions[0]) == int(batch.lesions[1]) for batch in batches])
    assert 0.47 < together < 0.58  # half, and pairs of singles by chance (1 in 30)
    with pytest.raises(UserError, match=r"micro_batch_size \(3\).*group_size \(2\).*try 4"):
        make_loader(alpha, mixture=mixture, micro_batch_size=3)


def test_images_that_an_audit_lists_never_appear(alpha: Path) -> None:
    table = open_shard_set(alpha).table
    groups = sorted(set(table["group_id"].to_pylist()))
    keys = table["key"].to_pylist()
    grouped = [key for key, group in zip(keys, table["group_id"].to_pylist(), strict=True) if group in groups[:2]]
    listed = frozenset({*grouped[:2], *[key for key in keys if key not in grouped][:5]})
    loader = make_loader(
        alpha, excluded={"alpha": frozenset(groups[:2])}, excluded_keys={"alpha": listed, "elsewhere": frozenset(keys)}
    )
    facts = loader.sources[0]
    assert (facts.num_excluded, facts.num_audited, facts.num_kept) == (6, 5, 49), "none counted twice"
    kept = {keys[row] for row in loader._examples.table.row.tolist()}
    assert len(kept) == 49 and not kept & listed and not kept & set(grouped)


def test_excluded_groups_never_appear(alpha: Path, beta: Path) -> None:
    table = open_shard_set(alpha).table
    groups = sorted(set(table["group_id"].to_pylist()))
    excluded = {"alpha": frozenset(groups[:8])}
    everything = make_loader(alpha, beta)
    loader = make_loader(alpha, beta, excluded=excluded)
    facts = loader.sources[0]
    assert (facts.source, facts.num_samples, facts.num_excluded, facts.num_kept) == ("alpha", 60, 24, 36)
    assert facts.num_by_modality == {"clinical": 12, "dermoscopic": 24}
    assert (facts.licence, facts.path) == ("CC0", str(alpha))
    assert facts.data_hash == open_shard_set(alpha).compute_data_hash()
    assert loader.sources[1].num_kept == 7 and loader.num_samples == 43
    drawn = {int(p) for batch in draw_steps(loader, 15) for p in batch.patients}
    allowed = {int(p) for batch in draw_steps(everything, 15) for p in batch.patients}
    assert len(allowed - drawn) == 8 and drawn < allowed


def test_other_modalities_are_left_out_and_an_empty_rest_is_said(alpha: Path) -> None:
    loader = make_loader(alpha, modalities=["clinical"])
    assert (loader.sources[0].num_filtered, loader.num_samples) == (40, 20)
    assert {int(m) for batch in draw_steps(loader, 4) for m in batch.modalities} == {0}
    with pytest.raises(UserError, match=r"nothing is left to draw \(alpha: 60 less 0 excluded, 60 filtered\)"):
        make_loader(alpha, modalities=["total_body"])
    groups = frozenset(open_shard_set(alpha).table["group_id"].to_pylist())
    with pytest.raises(UserError, match="60 less 60 excluded, 0 filtered"):
        make_loader(alpha, excluded={"alpha": groups})


def test_a_source_that_does_not_permit_the_use_is_refused(alpha: Path, beta: Path) -> None:
    with pytest.raises(
        UserError, match=r"60 of 60 samples of alpha do not permit the use commercial.*permits: research"
    ):
        make_loader(alpha, beta, use="commercial")


def test_batch_sizes_that_do_not_divide_are_said_with_a_way_out(alpha: Path) -> None:
    with pytest.raises(UserError, match=r"global_batch_size \(10\).*micro_batch_size \(4\) x world_size \(1\); try 12"):
        make_loader(alpha, global_batch_size=10, micro_batch_size=4)
    loader = make_loader(alpha, global_batch_size=1000, micro_batch_size=1000 // 8)
    with pytest.raises(UserError, match=r"\(1000\).*\(125\) x world_size \(3\); try 1125"):
        loader.iterate(START, rank=0, world_size=3)


def test_the_same_source_twice_and_no_shard_set_are_said(alpha: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 folders hold source alpha"):
        make_loader(alpha, alpha)
    with pytest.raises(UserError, match=r"no index\.json"):
        make_loader(tmp_path)


def damage(shard_set: Path, out: Path, rows: list[int]) -> Path:
    """Copy a shard set and overwrite the middle of some images: same lengths, other bytes."""
    shutil.copytree(shard_set, out)
    table = pq.read_table(out / "samples.parquet")
    for row in rows:
        offset, length = table["offset"][row].as_py(), table["length"][row].as_py()
        with (out / table["shard"][row].as_py()).open("r+b") as file:
            file.seek(offset)
            file.write(b"\0" * length)
    return out


def test_a_sample_that_fails_is_replaced_counted_and_the_same_everywhere(alpha: Path, tmp_path: Path) -> None:
    damaged = damage(alpha, tmp_path / "damaged", rows=[7, 40])
    loader = make_loader(damaged, max_failed_share=0.1)
    batches = draw_steps(loader, 10)  # two epochs
    table = open_shard_set(damaged).table
    # A replacement that is the other damaged sample fails as well, hence "at least".
    assert {failed.key for failed in loader.failures} == {table["key"][row].as_py() for row in (7, 40)}
    assert len({failed.position for failed in loader.failures}) == 4
    assert {(failed.source, failed.reason) for failed in loader.failures} == {("alpha", "undecodable")}
    assert {failed.shard for failed in loader.failures} == {table["shard"][row].as_py() for row in (7, 40)}
    again = make_loader(damaged, max_failed_share=0.1, workers=1)
    assert_same(draw_steps(again, 10, world_size=2), batches)
    assert set(again.failures) == set(loader.failures) and again.num_drawn == 120
    good = draw_steps(make_loader(alpha), 10)
    bad_positions = {failed.position for failed in loader.failures}
    visits = dict(zip(range(120), torch.cat([batch.visits for batch in batches]).tolist(), strict=True))
    assert len({visits[position] for position in bad_positions}) > 1  # not one favourite stand-in
    for one, other in zip(batches, good, strict=True):
        for number, position in enumerate(one.positions.tolist()):
            assert torch.equal(one.views[0][number], other.views[0][number]) == (position not in bad_positions)


def test_too_many_failures_stop_the_run_and_name_the_worst_shard(alpha: Path, tmp_path: Path) -> None:
    table = open_shard_set(alpha).table
    shards = table["shard"].to_pylist()
    worst = [row for row, shard in enumerate(shards) if shard == shards[0]][:20]
    damaged = damage(alpha, tmp_path / "damaged", rows=worst)
    loader = make_loader(damaged, max_failed_share=0.05)
    with pytest.raises(UserError, match=rf"{shards[0]}: \d+ of the \d+ failed samples.*max_failed_share \(0\.05\)"):
        draw_steps(loader, 20)
    every = damage(alpha, tmp_path / "every", rows=list(range(60)))
    with pytest.raises(UserError, match="failed samples"):
        draw_steps(make_loader(every, max_failed_share=1.0), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_short_under_way_is_one_line(workers: int, alpha: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(alpha, cut)
    loader = make_loader(cut, workers=workers)
    for shard in cut.glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"^[^\n]*\.tar: ends before byte \d+") as caught:
        draw_steps(loader, 1)
    assert "\n" not in str(caught.value)


def test_closing_ends_the_workers_at_once(alpha: Path) -> None:
    loader = make_loader(alpha, workers=2)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    batches = loader.iterate(START, rank=0, world_size=1)
    next(batches)
    workers = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert len(workers) >= 2
    started = time.monotonic()
    loader.close()
    gone, alive = psutil.wait_procs(workers, timeout=5)
    assert len(gone) >= 2 and len(alive) <= 2  # what stays are Python's own fork server and resource tracker
    assert time.monotonic() - started < 6
    with pytest.raises(StopIteration):
        next(batches)


def test_drawing_leaves_the_global_generators_alone(alpha: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw_steps(make_loader(alpha, workers=1), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_masks_without_a_mask_config(alpha: Path) -> None:
    assert draw_steps(make_loader(alpha, mask=None), 1)[0].masks is None


def test_config_faults_are_named() -> None:
    for key, value in (("workers", -1), ("modalities", ["radiology"]), ("max_failed_share", 2.0), ("shards", [])):
        with pytest.raises(UserError, match=key):
            validate(DataConfig, {"shards": ["x"], key: value}, where="test")
    assert validate(DataConfig, {"shards": ["x"], "exclude": {"tasks": ["a"]}}, where="test").exclude.tasks == ("a",)


TRAINER = """
import psutil, sys, time
from panfm.data.loader import LoaderState
from tests.data.test_loader import make_loader

if __name__ == "__main__":
    loader = make_loader(sys.argv[1], workers=2)
    next(loader.iterate(LoaderState(0, 0), rank=0, world_size=1))
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_when_the_trainer_is_killed(alpha: Path, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    root = Path(__file__).resolve().parents[2]
    trainer = subprocess.Popen(
        [sys.executable, script, alpha], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert trainer.stdout is not None
    children = [int(number) for number in trainer.stdout.readline().split()]
    assert len(children) >= 3  # the fork server and two workers, at least
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(is_running(child) for child in children):
        time.sleep(0.2)
    assert [child for child in children if is_running(child)] == []


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
