"""The model of docs/scaling.md held against one, two and three processes of this machine: bytes and seconds of a step.

    python benchmarks/scaling.py [--quick] [--json FILE]

Every rank is a process with one thread that trains a ViT-Small (MAE, 224 px) through the engine, gloo over loopback,
at each ZeRO stage: the same images a rank whatever their number, as the model has it. Bytes are counted where torch
hands a tensor to the process group, and turned into what a ring sends. The predicted step is that of one rank,
stretched where there are more ranks than cores, plus the model's bytes over the bandwidth that an all-reduce reached in
the same process right before.

`ours` is what the model says and `peer` what was seen; a ratio of 1 is a model that holds. Only the bytes must agree:
cores, caches and other work on the machine stretch the seconds.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pretrain_step import QUICK as STEP_SETTINGS
from pretrain_step import Setting, build_ours, draw_batch
from rows import Row, write_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panfm.distributed import get_world_size, process_group
from panfm.optim import OptimConfig
from panfm.training.doctor_ranks import measure_all_reduce
from panfm.training.engine import Engine, EngineConfig
from panfm.training.scaling import compute_volume

SETTING = replace(STEP_SETTINGS[0], batch_size=4, rounds=7)  # images a rank
QUICK = Setting("vit_tiny_patch16_224", 64, 2, 1, (), rounds=3)
STAGES = (0, 1, 2, 3)
SIZES = (1, 2, 3)


@dataclass(frozen=True)
class Seen:
    """What one rank saw at one stage."""

    num_parameters: int
    num_bytes: float  # that it sent in a step, on a ring
    seconds: float  # of a step, median
    bandwidth: float  # bytes a second that it sent in an all-reduce of all gradients


class CountBytes(TorchDispatchMode):
    """Adds up what the tensors that pass through a process group make a rank of a ring send."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = func._schema.name
        if kind.startswith("c10d::"):
            share = (get_world_size() - 1) / get_world_size()
            if kind == "c10d::allreduce_":
                self.total += 2 * share * count_bytes(args[0])
            elif "reduce_scatter" in kind:
                self.total += share * count_bytes(args[1])
            elif "allgather" in kind or kind in ("c10d::reduce_", "c10d::broadcast_"):
                self.total += share * count_bytes(args[0])
        return func(*args, **(kwargs or {}))


def count_bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def work(rank: int, world_size: int, port: int, setting: Setting) -> dict[int, Seen]:
    """One rank: every stage in turn."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    seen = {}
    device = torch.device("cpu")
    for stage in STAGES if world_size > 1 else (0,):
        os.environ["MASTER_PORT"] = str(port + stage)  # the engine ends its group; the next stage meets anew
        with process_group(device):
            model = build_ours(setting)
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            reduced = None if world_size == 1 else measure_all_reduce(device, 4 * num_parameters, setting.rounds)
            config = EngineConfig(
                global_batch_size=setting.batch_size * world_size,
                micro_batch_size=setting.batch_size,
                num_threads=1,
                zero_stage=stage,
                precision="fp32",
            )
            engine = Engine(model, model.encoder, config, OptimConfig(), {})
            batch = draw_batch(setting)
            engine.step([batch], step=0, lr=1e-4)
            with CountBytes() as counted:
                engine.step([batch], step=1, lr=1e-4)
            seconds = []
            for step in range(2, 2 + setting.rounds):
                began = time.perf_counter()
                engine.step([batch], step=step, lr=1e-4)
                seconds.append(time.perf_counter() - began)
            engine.close()
        bandwidth = 0.0 if reduced is None else reduced.bandwidth
        seen[stage] = Seen(num_parameters, counted.total, statistics.median(seconds), bandwidth)
    return seen


def run(world_size: int, setting: Setting) -> dict[int, Seen]:
    """Start the ranks; what rank 0 saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        calls = [pool.submit(work, rank, world_size, port, setting) for rank in range(world_size)]
        first, *_ = [call.result(timeout=600) for call in calls]
    return first


def compare(setting: Setting) -> list[Row]:
    """Measure all sizes, and put what the model says beside it."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows = []
    alone = run(1, setting)[0]
    print(
        f"{setting.name}, 1 rank: {alone.num_parameters / 1e6:.1f} M parameters, {alone.seconds:.2f} s a step",
        flush=True,
    )
    for world_size in SIZES[1:]:
        stretch = max(1.0, world_size / num_cores)
        for stage, seen in run(world_size, setting).items():
            volume = compute_volume(seen.num_parameters, stage, world_size)
            predicted = alone.seconds * stretch + volume / seen.bandwidth
            name = f"{world_size} ranks, ZeRO {stage}"
            rows.append(Row(f"{name}: sent", volume / 1e6, seen.num_bytes / 1e6, volume / seen.num_bytes, "MB a step"))
            rows.append(Row(f"{name}: step", predicted, seen.seconds, predicted / seen.seconds, "s"))
            print(f"{name}: all-reduce {seen.bandwidth / 1e9:.2f} GB/s sent by each", flush=True)
    return rows


def main() -> None:
    """Measure, print one table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a ViT-Tiny at 64 px, within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows = compare(QUICK if arguments.quick else SETTING)
    print(f"{'':<26}  {'ratio':>6}  {'model':>9}  {'seen':>9}")
    for row in rows:
        print(f"{row.name:<26}  {row.ratio:>6.2f}  {row.ours:>9.3f}  {row.peer:>9.3f}  {row.unit}")
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
