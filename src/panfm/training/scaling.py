"""Step time on many devices as a pure function: compute, what ranks send each other, the loader, checkpoints.

    Workload (parameters, operations of a sample) + Cluster (rates) + ranks, ZeRO stage, micro batches  ->  StepTime

docs/scaling.md prints its table and says what it assumes; `benchmarks/scaling.py` holds it against one, two and three
processes of one machine; `panfm doctor --config` puts measured rates into it. Volumes are those of DeepSpeed 0.19.8 as
this package sets it, read in its source and counted in runs: gradients and weights travel in fp32, and ZeRO 1 and 2 sum
gradients with an all-reduce, not with the reduce-scatter of the ZeRO paper (arXiv:1910.02054).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FP32 = 4  # bytes of a gradient or a weight under way
MAX_LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters where the config sets no other
BACKWARD_SHARE = 2 / 3  # of the compute: what communication can hide behind, where it is overlapped
Limit = Literal["compute", "network", "loader", "checkpoints"]


@dataclass(frozen=True)
class Workload:
    """What a sample and an update cost."""

    name: str
    num_parameters: int  # trained, heads included
    num_encoder: int  # of them, shipped in every checkpoint once more
    sample_flops: float  # forward and backward, all views, teachers included
    core_ms: float  # processor time of the loader a sample


# Encoders at 224 px in the MAE recipe of configs/pretrain/mae_vitb.yaml, counted by training/flops.py; a test counts
# them again. The loader's time is that of 600 x 450 JPEGs, one view (docs/performance.md: 433 images/s a core).
WORKLOADS = (
    Workload("ViT-B/16", 111_800_000, 85_800_000, 5.68e10, 2.3),
    Workload("ViT-L/16", 329_400_000, 303_300_000, 1.224e11, 2.3),
    Workload("ViT-H/14", 656_900_000, 630_800_000, 2.887e11, 2.3),
)


@dataclass(frozen=True)
class Cluster:
    """Rates of the machines; docs/scaling.md says where the defaults come from. None of them was measured."""

    gpus_per_node: int = 8
    peak_flops: float = 989e12  # a GPU: H100 SXM, bf16, dense
    utilisation: float = 0.3  # share of the peak that a step reaches without any waiting
    inside_bandwidth: float = 350e9  # bytes a second that a GPU sends to its neighbour in the node
    # Bytes a second that leave a node through all its ports. NCCL lays as many rings as there are ports and leaves a
    # node once in each, so that a rank sends at this rate where the inside of the node keeps up.
    network_bandwidth: float = 320e9
    latency_seconds: float = 2e-5  # of one message between nodes
    cores_per_gpu: int = 12  # that decode
    storage_bandwidth: float = 5e9  # bytes a second that all ranks together write
    overlaps: bool = False  # whether gradients are summed while backward goes on (deepspeed's overlap_comm)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and what they consist of; loader and compute run beside each other."""

    compute: float
    communication: float  # what is not hidden behind the backward pass
    loader: float  # to decode a step's samples
    checkpoints: float  # the stall of a checkpoint, spread over the steps between two
    images: int

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return max(self.compute + self.communication, self.loader) + self.checkpoints

    @property
    def images_per_second(self) -> float:
        """Of all ranks."""
        return self.images / self.seconds

    @property
    def efficiency(self) -> float:
        """Share of the time in which the devices compute."""
        return self.compute / self.seconds

    @property
    def limit(self) -> Limit:
        """What stands in the way first: the largest part of the step, as far as it is waited for."""
        waits: dict[Limit, float] = {
            "compute": self.compute,
            "network": self.communication,
            "loader": max(self.loader - self.compute - self.communication, 0.0),
            "checkpoints": self.checkpoints,
        }
        if self.loader > self.compute + self.communication:
            return "loader"
        return max(waits, key=lambda name: waits[name])


def compute_volume(num_parameters: int, zero_stage: int, world_size: int, num_micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step, on a ring: an all-reduce sends 2 (N - 1) / N of its bytes, a gather half that.

    0: all-reduce of the gradients. 1: and a gather of the updated weights. 2: the gradients after every micro batch,
    since no rank keeps them all. 3: a gather of the weights, which stay until the update as long as they are fewer than
    MAX_LIVE (else every micro batch gathers them twice), and the gradients of every micro batch, each to its rank.
    """
    if world_size == 1:
        return 0.0
    gather = FP32 * num_parameters * (world_size - 1) / world_size
    if zero_stage == 3:
        return gather * (num_micro_batches + 1 if num_parameters < MAX_LIVE else 3 * num_micro_batches)
    gradients = 2 * gather * (num_micro_batches if zero_stage == 2 else 1)
    return gradients + (gather if zero_stage else 0.0)


def compute_bandwidth(cluster: Cluster, world_size: int) -> float:
    """Bytes a second that a rank sends: what the inside of a node gives, or the network, where the ranks span nodes."""
    if world_size <= cluster.gpus_per_node:
        return cluster.inside_bandwidth
    return min(cluster.inside_bandwidth, cluster.network_bandwidth)


def compute_step(
    workload: Workload,
    cluster: Cluster,
    world_size: int,
    *,
    micro_batch_size: int,
    num_micro_batches: int = 1,
    zero_stage: int = 1,
    save_every: int = 1000,
    background: bool = False,
) -> StepTime:
    """Predict a step of `world_size` ranks, one GPU each.

    background: checkpoints are written beside the training, which only waits for a copy in memory (not counted).
    """
    images = micro_batch_size * num_micro_batches
    compute = images * workload.sample_flops / (cluster.peak_flops * cluster.utilisation)
    volume = compute_volume(workload.num_parameters, zero_stage, world_size, num_micro_batches)
    # NCCL's trees: messages go up and down once. Inside a node that is lost in the rest.
    spans_nodes = world_size > cluster.gpus_per_node
    latency = 2 * math.log2(world_size) * cluster.latency_seconds * num_micro_batches if spans_nodes else 0.0
    communication = volume / compute_bandwidth(cluster, world_size) + latency
    if cluster.overlaps:
        communication = max(communication - BACKWARD_SHARE * compute, 0.0)
    loader = images * workload.core_ms / 1e3 / cluster.cores_per_gpu
    num_bytes = FP32 * (3 * workload.num_parameters + workload.num_encoder)  # weights and two moments; the encoder
    stall = 0.0 if background else num_bytes / cluster.storage_bandwidth / save_every
    return StepTime(compute, communication, loader, stall, images * world_size)


def compute_least_micro_batch(workload: Workload, cluster: Cluster, world_size: int, *, zero_stage: int = 1) -> int:
    """Samples a rank and step at which half of the time is compute: below it, ranks talk more than they work."""
    volume = compute_volume(workload.num_parameters, zero_stage, world_size)
    seconds = volume / compute_bandwidth(cluster, world_size)
    return math.ceil(seconds * cluster.peak_flops * cluster.utilisation / workload.sample_flops)


def format_table(rows: Sequence[tuple[Workload, int, int]], cluster: Cluster) -> str:
    """A table of docs/scaling.md, as Markdown. rows: workload, number of ranks, images a rank and step."""
    lines = [
        "| encoder | GPUs | images a GPU | ZeRO | compute, ms | network, ms | loader, ms | checkpoints, ms | images/s "
        "| computing | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for workload, world_size, num_images in rows:
        for stage in (0, 1):
            step = compute_step(workload, cluster, world_size, micro_batch_size=num_images, zero_stage=stage)
            parts = (step.compute, step.communication, step.loader, step.checkpoints)
            lines.append(
                f"| {workload.name} | {world_size:,} | {num_images} | {stage} | "
                + " | ".join(f"{1e3 * part:.1f}" for part in parts)
                + f" | {step.images_per_second:,.0f} | {step.efficiency:.0%} | {step.limit} |"
            )
    return "\n".join(lines)


# What docs/scaling.md shows. Images a GPU that fit into 80 GB (`panfm doctor --config` says what a rank needs):
GROWING = tuple(
    (workload, world_size, num_images)
    for workload, num_images in zip(WORKLOADS, (512, 256, 128), strict=True)
    for world_size in (8, 64, 1024)
)
GLOBAL_BATCH_SIZE = 4096  # MAE's
FIXED = tuple(
    (workload, world_size, GLOBAL_BATCH_SIZE // world_size) for workload in WORKLOADS for world_size in (64, 256, 1024)
)
SLOW = Cluster(network_bandwidth=12e9)  # 100 Gbit/s a node
