"""loader: killed at any moment with any number of workers, it goes on bit for bit; shards of odd numbers and sizes."""

import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from panfm.data.loader import LoaderState
from panfm.data.mixture import MixtureConfig
from panfm.errors import UserError
from panfm.shards.index import open_shard_set
from tests.data.conftest import build_source
from tests.data.loading import (
    START,
    assert_same,
    compute_digest,
    draw_steps,
    make_loader,
    read_notes,
    start_trainer,
    wait_for_notes,
)

NUM_KILLS, MAX_STEPS = 3, 6  # steps from one kill to the next, at most


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killed_at_random_moments_it_goes_on_bit_for_bit(workers: int, alpha: Path, beta: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    rng = random.Random(workers)
    for _ in range(NUM_KILLS):
        wanted = len(read_notes(notes)) + rng.randint(1, MAX_STEPS)
        trainer = start_trainer((alpha, beta), notes, workers, num_steps=10**6)
        wait_for_notes(notes, wanted, trainer)
        time.sleep(rng.random() * 0.02)  # anywhere inside a step
        trainer.kill()
        trainer.join()
        assert trainer.exitcode == -signal.SIGKILL
    trainer = start_trainer((alpha, beta), notes, workers, num_steps=len(read_notes(notes)) + 3)
    trainer.join(60)
    assert trainer.exitcode == 0
    noted = read_notes(notes)
    assert len(set(noted)) == len(noted) >= 3 + NUM_KILLS
    mixture = MixtureConfig(weighting="uniform", group_share=0.3)
    with make_loader(alpha, beta, mixture=mixture) as loader:
        steps = loader.iterate(START, rank=0, world_size=1)
        assert noted == [compute_digest(next(steps)) for _ in noted]


@pytest.mark.parametrize("group_share", [0.0, 0.3])
def test_every_position_is_drawn_once_across_world_sizes_and_a_rollback(
    group_share: float, alpha: Path, beta: Path
) -> None:
    """World sizes 1, 3 and 2; after step 17 the run goes back to step 12 and draws on by another salt."""
    mixture = MixtureConfig(weighting="uniform", group_share=group_share)
    loader = make_loader(alpha, beta, mixture=mixture, global_batch_size=12, micro_batch_size=2)
    seen, state = [], LoaderState(0)
    for world_size, num_steps, back_to in ((1, 10, None), (3, 7, 12), (2, 17, None)):
        seen += draw_steps(loader, num_steps, state, world_size)
        state = LoaderState(state.step + num_steps, state.salts)
        if back_to is not None:
            state = state.roll_back(back_to, salt=1)
            undone = seen[back_to * 6 :]
            seen = seen[: back_to * 6]
    assert torch.cat([batch.positions for batch in seen]).tolist() == list(range(29 * 12))
    # bit for bit what a loader draws that knows of the rollback from the start
    assert_same(seen, draw_steps(loader, 29, LoaderState(0, state.salts)))
    redone = seen[12 * 6 :][: len(undone)]
    assert [batch.positions.tolist() for batch in redone] == [batch.positions.tolist() for batch in undone]
    assert not any(torch.equal(one.views[0], other.views[0]) for one, other in zip(redone, undone, strict=True))
    assert not all(torch.equal(one.masks, other.masks) for one, other in zip(redone, undone, strict=True))
    if not group_share:
        samples = loader.draw(range(29 * 12), state).samples
        for source, modality, size in (("alpha", "clinical", 20), ("alpha", "dermoscopic", 40), ("beta", None, 7)):
            rows = [s.row for s in samples if s.source == source and modality in (s.modality, None)]
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                assert len(set(part)) == len(part)
        drawn = loader.count_drawn(LoaderState(29, state.salts))
        assert drawn == Counter(f"{sample.source}/{sample.modality}" for sample in samples)


def test_every_image_is_drawn_once_an_epoch_across_changing_world_sizes(alpha: Path, beta: Path) -> None:
    loader = make_loader(alpha, beta, global_batch_size=6, micro_batch_size=1)
    seen = []
    for first, num_steps, world_size in ((0, 10, 1), (10, 7, 3), (17, 17, 2)):  # 34 steps of 6 > 3 epochs of 67
        seen += draw_steps(loader, num_steps, LoaderState(first), world_size)
    assert torch.cat([batch.positions for batch in seen]).tolist() == list(range(204))
    samples = [(int(batch.patients), int(batch.visits)) for batch in seen]
    assert Counter(Counter(samples[:201]).values()) == {3: 67}
    for start in (0, 67, 134):
        assert len(set(samples[start : start + 67])) == 67  # in each epoch


def test_resuming_goes_on_where_it_stopped(alpha: Path, beta: Path) -> None:
    loader = make_loader(alpha, beta, mixture=MixtureConfig(group_share=0.3))
    whole = draw_steps(loader, 5)
    for step in (1, 3):
        assert_same(draw_steps(loader, 5 - step, LoaderState(step)), whole[step * 6 :])
    far = draw_steps(loader, 1, LoaderState(10_000_000))
    assert far[0].positions.tolist() == [120_000_000, 120_000_001]
    again = make_loader(alpha, beta, mixture=MixtureConfig(group_share=0.3))
    assert_same(draw_steps(again, 1, LoaderState(10_000_000)), far)


def test_another_salt_draws_other_samples_with_other_views(alpha: Path) -> None:
    loader = make_loader(alpha)
    first, second = draw_steps(loader, 5), draw_steps(loader, 5, LoaderState(0, ((0, 1),)))
    visits = [torch.cat([batch.visits for batch in batches]).tolist() for batches in (first, second)]
    assert visits[0] != visits[1] and sorted(visits[0]) == sorted(visits[1])  # one whole epoch each
    masks = [torch.cat([batch.masks for batch in batches], dim=1) for batches in (first, second)]
    assert not torch.equal(*masks)


# --------------------------------------------------------------------------------- odd numbers of shards and samples


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 3, 64], ids=["a shard a sample", "uneven shards", "one shard"])
def test_any_number_of_shards_feeds_any_number_of_workers(shard: int, tmp_path: Path) -> None:
    rows = [{"patient": f"p{n}", "lesion": "", "day": "", "modality": "clinical"} for n in range(8)]
    folder = build_source(tmp_path, "gamma", rows, shard=shard)
    assert len(list(folder.glob("*.tar"))) == {1: 8, 3: 3, 64: 1}[shard]
    alone = draw_steps(make_loader(folder), 4)
    with make_loader(folder, workers=3) as loader:
        ranks = [loader.iterate(START, rank=rank, world_size=2) for rank in range(2)]
        steps = [[next(batches) for batches in ranks] for _ in range(4)]
    assert {len(batches) for step in steps for batches in step} == {3}  # the same on every rank, in every step
    assert_same([batch for step in steps for batches in step for batch in batches], alone)


def test_a_batch_larger_than_the_data_runs_on_across_epochs(beta: Path) -> None:
    batches = draw_steps(make_loader(beta, global_batch_size=42, micro_batch_size=21), 1, world_size=2)
    patients = torch.cat([batch.patients for batch in batches]).reshape(6, 7)
    assert all(len(set(epoch)) == 7 for epoch in patients.tolist())


def test_one_sample_is_drawn_again_and_again(tmp_path: Path) -> None:
    row = {"patient": "p", "lesion": "l", "day": "1", "modality": "clinical"}
    folder = build_source(tmp_path, "single", [row])
    batches = draw_steps(make_loader(folder), 2, world_size=3)
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(24))
    views = torch.cat([batch.views[0] for batch in batches])
    assert len({view.numpy().tobytes() for view in views}) > 20  # the one image, never the same view


def test_a_source_with_nothing_left_is_no_part_of_the_stream(alpha: Path, beta: Path) -> None:
    groups = frozenset(open_shard_set(beta).table["group_id"].to_pylist())
    loader = make_loader(alpha, beta, excluded={"beta": groups}, mixture=MixtureConfig(weighting="uniform"))
    assert [fact.num_kept for fact in loader.sources] == [60, 0]
    assert [unit.section.name for unit in loader.units] == ["alpha/clinical", "alpha/dermoscopic"]
    batches = draw_steps(loader, 5)
    assert {int(source) for batch in batches for source in batch.sources} == {0}
    assert_same(batches, draw_steps(make_loader(alpha, mixture=MixtureConfig(weighting="uniform")), 5))
    first = draw_steps(make_loader(beta, alpha, excluded={"beta": groups}, mixture=MixtureConfig()), 1)
    assert {int(source) for batch in first for source in batch.sources} == {1}  # numbered as the config names them
    weights = MixtureConfig(weighting="explicit", weights={"alpha": 1, "beta": 1})
    with pytest.raises(UserError, match=r"mixture\.weights: beta has no samples to draw; over=source knows alpha"):
        make_loader(alpha, beta, excluded={"beta": groups}, mixture=weights)


def test_the_log_of_what_was_drawn_counts_the_batches(alpha: Path, beta: Path) -> None:
    mixture = MixtureConfig(weighting="explicit", weights={"alpha": 3, "beta": 1}, group_share=0.25)
    loader = make_loader(alpha, beta, mixture=mixture)
    batches = draw_steps(loader, 40, world_size=2)
    kinds = torch.stack([torch.cat([b.sources for b in batches]), torch.cat([b.modalities for b in batches])]).T
    counts = Counter(map(tuple, kinds.tolist()))
    drawn = loader.count_drawn(LoaderState(40))
    assert drawn == {
        "alpha/clinical": counts[0, 0],
        "alpha/dermoscopic": counts[0, 1],
        "beta/histopathology": counts[1, 3],
    }
    assert sum(drawn.values()) == 480
    assert np.allclose([unit.share for unit in loader.units], [0.25, 0.5, 0.25])
    lines = loader.describe_drawn(LoaderState(40))
    beta_images = drawn["beta/histopathology"]
    assert lines[2] == (
        f"drawn from beta/histopathology: {beta_images} images, {beta_images / 480:.2%} of all (asked: 25.00%), "
        f"{beta_images / 7:.2f} times its 7"
    )
