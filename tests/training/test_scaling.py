"""The model behind docs/scaling.md: its volumes by hand, its limits, and the page's table computed again."""

from dataclasses import replace

import pytest

from panfm.config import load_config
from panfm.files import CHECKOUT
from panfm.training.flops import compute_run_cost
from panfm.training.plan import PretrainConfig
from panfm.training.scaling import (
    FIXED,
    GROWING,
    SLOW,
    WORKLOADS,
    Cluster,
    compute_least_micro_batch,
    compute_step,
    compute_volume,
    format_table,
)

PAGE = CHECKOUT / "docs" / "scaling.md"
ENCODERS = {
    "ViT-B/16": ("vit_base_patch16_224", None),
    "ViT-L/16": ("vit_large_patch16_224", None),
    "ViT-H/14": ("vit_huge_patch14_224", 14),
}


def test_volumes_are_those_of_rings() -> None:
    whole = 4 * 1000
    assert compute_volume(1000, 0, 1) == 0
    assert compute_volume(1000, 0, 4) == 2 * 0.75 * whole
    assert compute_volume(1000, 1, 4) == 3 * 0.75 * whole
    assert compute_volume(1000, 2, 4, num_micro_batches=5) == (5 * 2 + 1) * 0.75 * whole
    assert compute_volume(1000, 3, 4, num_micro_batches=5) == (5 + 1) * 0.75 * whole
    assert compute_volume(2 * 10**9, 3, 4, num_micro_batches=5) == 5 * 3 * 0.75 * 8e9  # too large to stay gathered


def test_a_step_is_the_slower_of_loader_and_compute_and_what_cannot_be_hidden() -> None:
    workload = replace(WORKLOADS[0], sample_flops=1e9, core_ms=1.0, num_parameters=10**6, num_encoder=10**6)
    cluster = Cluster(peak_flops=1e12, utilisation=0.5, cores_per_gpu=1, inside_bandwidth=1e9, storage_bandwidth=1e9)
    step = compute_step(workload, cluster, 1, micro_batch_size=100, save_every=10)
    assert step.compute == pytest.approx(0.2)
    assert step.loader == pytest.approx(0.1)
    assert step.communication == 0
    assert step.checkpoints == pytest.approx(4 * (3 + 1) * 1e6 / 1e9 / 10)
    assert step.seconds == pytest.approx(0.2 + 0.0016)
    assert step.limit == "compute"
    slow = compute_step(replace(workload, core_ms=4.0), cluster, 1, micro_batch_size=100)
    assert slow.seconds == pytest.approx(0.4, rel=0.01) and slow.limit == "loader"
    far = compute_step(workload, replace(cluster, inside_bandwidth=1e7), 2, micro_batch_size=100, zero_stage=0)
    assert far.communication == pytest.approx(4e6 / 1e7) and far.limit == "network"
    hidden = compute_step(workload, replace(cluster, overlaps=True), 2, micro_batch_size=100, zero_stage=0)
    assert hidden.communication == 0


def test_background_checkpoints_and_more_images_move_the_limit() -> None:
    workload, cluster = WORKLOADS[1], Cluster()
    assert compute_step(workload, cluster, 64, micro_batch_size=64, background=True).checkpoints == 0
    least = compute_least_micro_batch(workload, cluster, 64)
    step = compute_step(workload, replace(cluster, latency_seconds=0.0), 64, micro_batch_size=least)
    assert step.compute == pytest.approx(step.communication, rel=1 / least)


def test_the_page_shows_what_the_model_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert format_table(GROWING, Cluster()) in text
    assert format_table(FIXED, Cluster()) in text
    assert format_table(GROWING, SLOW) in text
    for workload in WORKLOADS:
        least = [compute_least_micro_batch(workload, cluster, 1024) for cluster in (Cluster(), SLOW)]
        assert f"| {workload.name} | {least[0]} | {least[1]} |" in text
    assert "Nothing on this page was run on a GPU" in text


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_workloads_are_counted(workload) -> None:  # type: ignore[no-untyped-def]
    name, patch = ENCODERS[workload.name]
    overrides = [f"encoder.name={name}", *([f"encoder.patch_size={patch}"] if patch else [])]
    cost = compute_run_cost(load_config(PretrainConfig, "mae_vitb", overrides, folder="configs/pretrain"))
    assert workload.num_encoder == pytest.approx(cost.num_encoder, rel=0.01)
    assert workload.num_parameters == pytest.approx(cost.num_encoder + cost.num_heads, rel=0.01)
    assert workload.sample_flops == pytest.approx(cost.sample_flops, rel=0.01)
