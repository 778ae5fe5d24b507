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
import pytest
import torch

from panfm.config import validate
from panfm.data.batch import NO_GROUP, Batch
from panfm.data.loader import DataConfig, LoaderState
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig, augment_views
from panfm.errors import UserError
from panfm.shards.index import open_shard_set
from tests.data.loading import AUGMENT, GLOBAL, MICRO, START, assert_same, draw_steps, make_loader


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
@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_workers_draws_the_same_stream(
    workers: int, alpha: Path, beta: Path, reference: list[Batch]
) -> None:
    loader = make_loader(alpha, beta, mixture=MixtureConfig(group_share=0.3), workers=workers)
    assert_same(draw_steps(loader, 5), reference)


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
    kept = {keys[sample.row] for sample in loader.draw(range(49)).samples}  # an epoch
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
    assert (facts.licence, facts.path) == ("CC0 1.0", str(alpha))
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
    with pytest.raises(UserError, match="both hold source alpha"):
        make_loader(alpha, alpha)
    with pytest.raises(UserError, match=r"no index\.json"):
        make_loader(tmp_path)


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


def test_draw_holds_what_an_iteration_holds_and_says_which_samples(alpha: Path, beta: Path) -> None:
    mixture, state = MixtureConfig(group_share=0.3), LoaderState(4, ((0, 0), (2, 5)))
    loader = make_loader(alpha, beta, mixture=mixture)
    drawn = loader.draw(range(60, 62), state)
    assert drawn.failures == () and [sample.position for sample in drawn.samples] == [60, 61]
    assert_same([drawn.batch], draw_steps(loader, 2, state)[6:7])
    assert not torch.equal(loader.draw(range(60, 62)).batch.views[0], drawn.batch.views[0])  # by the first salt
    for number, sample in enumerate(drawn.samples):
        shard_set = open_shard_set({"alpha": alpha, "beta": beta}[sample.source])
        assert shard_set.table["modality"][sample.row].as_py() == sample.modality
        rngs = loader.make_view_rngs(sample.position, state)
        views = augment_views(shard_set.read_image(sample.row), sample.modality, rngs, AUGMENT)
        for view, batch in zip(views, drawn.batch.views, strict=True):
            np.testing.assert_array_equal(view, batch[number].numpy())


def test_local_views_follow_the_whole_ones_and_are_not_masked(alpha: Path) -> None:
    augment = AugmentConfig(image_size=16, views=2, local_views=3, local_size=8)
    for workers in (0, 1):
        (batch,) = draw_steps(make_loader(alpha, augment=augment, workers=workers, global_batch_size=2), 1)
        assert [tuple(view.shape) for view in batch.views] == [(2, 3, 16, 16)] * 2 + [(2, 3, 8, 8)] * 3
        assert batch.masks is not None and batch.masks.shape == (2, 2, 16)
        assert len({view.numpy().tobytes() for view in batch.views}) == 5


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's account of reads")
def test_reads_are_those_of_the_images_and_few_files_stay_open(alpha: Path, beta: Path) -> None:
    def count_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar: bytes asked for by read calls

    loader = make_loader(alpha, beta)
    loader.draw(range(1))
    before = count_read()
    samples = loader.draw(range(67, 134)).samples  # an epoch
    num_read = count_read() - before
    sets = {"alpha": open_shard_set(alpha), "beta": open_shard_set(beta)}
    num_used = sum(sets[sample.source].table["length"][sample.row].as_py() for sample in samples)
    assert num_used + 67 * 512 <= num_read < num_used + 67 * 512 + 2048  # an image, the header before it, nothing else
    opened = [Path(f"/proc/self/fd/{name}").resolve() for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    shards = {path.resolve() for path in (*alpha.glob("*.tar"), *beta.glob("*.tar"))}
    assert len(shards) == 3 == sum(path in shards for path in opened)


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
from tests.data.loading import AUGMENT, make_loader

if __name__ == "__main__":
    loader = make_loader(sys.argv[1], workers=2)
    next(loader.iterate(LoaderState(0), rank=0, world_size=1))
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
