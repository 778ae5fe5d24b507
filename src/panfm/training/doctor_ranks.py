"""Are the ranks of a run well together, and has each what the run needs? One line a check, with a way out.

    every rank: doctor.run_checks           ->  merge_checks: one line where all agree
    ranks together: versions, all-reduce    ->  Check
    --folder                                ->  what all ranks at once write and read a second
    --shards                                ->  the same set on every rank, processes against cores, reading
    --config                                ->  memory a rank needs, images/s and hours that follow from measured rates

Under torchrun every rank calls `examine`; a single process gets the same lines. Collectives are met in one order by
all ranks, whatever each of them finds.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from panfm.data.loader import DataConfig
from panfm.distributed import (
    all_reduce_max,
    find_device,
    gather_objects,
    get_local_world_size,
    get_world_size,
    process_group,
)
from panfm.errors import UserError
from panfm.shards.index import open_shard_set
from panfm.training.doctor import Check, find_versions, run_checks
from panfm.training.engine import compute_num_micro_batches, compute_num_threads
from panfm.training.flops import compute_hours, compute_run_cost, compute_run_memory
from panfm.training.hardware import find_peak
from panfm.training.memory import compute_state_bytes
from panfm.training.meters import sum_over_ranks
from panfm.training.plan import PretrainConfig
from panfm.training.scaling import compute_volume

GB = 1e9
REDUCED_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of the all-reduce: large enough that latency is lost in it
LEAST_BANDWIDTH = {"cpu": 5e7, "cuda": 2e9}  # bytes a second on a ring: below, a network interface was chosen badly
DISK_BYTES = 2**26  # a rank
LEAST_DISK_RATE = 5e7  # bytes a second, of all ranks: a checkpoint of ViT-B, 1.7 GB, takes half a minute
READ_BYTES = 2**26  # of a shard set
PROCESS_BYTES = 7e8  # a rank on a CPU before it holds a model: libraries, and what they set aside
ASSUMED_UTILISATION = 0.3  # share of the peak that a step reaches, as the headers of configs/pretrain assume


@dataclass(frozen=True)
class AllReduce:
    """What an all-reduce over the ranks reached."""

    bandwidth: float  # bytes a second that each rank sent, on a ring
    latency: float  # seconds of the smallest one


def examine(folder: Path, shards: Sequence[str] = (), config: PretrainConfig | None = None) -> list[Check]:
    """Run every check; every rank calls it with the same arguments, and gets the same list.

    folder: where the run will write. shards: sets that it will read. config: the run whose needs are computed.
    Raises UserError where there are more ranks than GPUs.
    """
    device = find_device()
    if device.type == "cuda" and get_local_world_size() > torch.cuda.device_count():
        raise UserError(
            f"{get_local_world_size()} ranks on {torch.cuda.device_count()} GPUs: each wants its own; start with "
            f"--nproc_per_node={torch.cuda.device_count()}"
        )
    with process_group(device):
        if config is not None:
            torch.set_num_threads(compute_num_threads(config.engine))
        checks = merge_checks(gather_objects(run_checks(folder)))
        checks.append(compare_versions(gather_objects(find_versions())))
        network, reduced = check_all_reduce(device)
        checks += [network, *check_disk_rate(folder, device)]
        data = DataConfig(shards=tuple(shards) or (".",)) if config is None else config.data
        if shards:
            checks += check_shards(shards, data.workers, device)
        if config is not None:
            checks += check_plan(config, device, get_world_size(), reduced)
    return checks


def merge_checks(by_rank: Sequence[Sequence[Check]]) -> list[Check]:
    """One line a check: the first rank that is not well speaks, else rank 0; the details of each rank may differ."""
    merged = []
    for checks in zip(*by_rank, strict=True):
        bad = [rank for rank, check in enumerate(checks) if not check.ok]
        rank = bad[0] if bad else 0
        check = checks[rank]
        detail = check.detail
        if bad and len(checks) > 1:
            detail = f"rank {rank}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}: {detail}"
        elif len({other.detail for other in checks}) > 1:
            detail = f"{detail} (rank 0; the other {len(checks) - 1} are well too)"
        merged.append(Check(check.name, not bad, detail, check.way_out))
    return merged


def compare_versions(by_rank: Sequence[dict[str, str | None]]) -> Check:
    """Different versions compute different losses, or wait for each other for ever."""
    for name in by_rank[0]:
        found = {versions[name] for versions in by_rank}
        if len(found) > 1:
            other = next(rank for rank, versions in enumerate(by_rank) if versions[name] != by_rank[0][name])
            detail = f"{name} is {by_rank[0][name]} on rank 0 and {by_rank[other][name]} on rank {other}"
            return Check("same versions", False, detail, "install the same versions on every machine")
    return Check("same versions", True, f"on all {len(by_rank)} ranks" if len(by_rank) > 1 else "one rank")


def check_all_reduce(device: torch.device) -> tuple[Check, AllReduce | None]:
    """Bandwidth and latency of an all-reduce: what the gradients of every step go through."""
    backend = "NCCL" if device.type == "cuda" else "gloo"
    world_size = get_world_size()
    if world_size == 1:
        return Check("all-reduce", True, f"{backend}, one rank: nothing to send"), None
    measured = measure_all_reduce(device)
    ok = measured.bandwidth >= LEAST_BANDWIDTH[device.type]
    detail = (
        f"{backend}, {world_size} ranks: {measured.bandwidth / GB:.2f} GB/s sent by each, latency "
        f"{1e6 * measured.latency:.0f} us"
    )
    name = "NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO says what it took)" if backend == "NCCL" else "GLOO_SOCKET_IFNAME"
    return Check("all-reduce", ok, detail, "" if ok else f"name the fast network interface in {name}"), measured


def measure_all_reduce(device: torch.device, num_bytes: int | None = None, repeats: int = 5) -> AllReduce:
    """Time all-reduces of float32; every rank calls it. Medians of `repeats`, after one to connect."""
    size = num_bytes or REDUCED_BYTES[device.type]
    world_size = get_world_size()
    medians = []
    for tensor in (torch.ones(size // 4, device=device), torch.ones(1, device=device)):
        seconds = []
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            all_reduce_max(tensor).sum().item()  # waits for the device
            if repeat:
                seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    return AllReduce(2 * (world_size - 1) / world_size * size / medians[0], medians[1])


def check_disk_rate(folder: Path, device: torch.device) -> list[Check]:
    """What all ranks together write (to the disk, not to memory) and read in `folder`, all at the same time."""
    try:
        written, read = measure_disk_rate(folder)
    except OSError as error:
        written = read = float("nan")
        fault = f"{folder}: {error.strerror}"
    else:
        fault = ""
    total_written, total_read = sum_over_ranks(written, device), sum_over_ranks(read, device)
    if total_written is None or total_read is None:
        return [
            Check("disk rate", False, fault or "a rank cannot write there", "name a folder that all ranks can write")
        ]
    ok = total_written >= LEAST_DISK_RATE
    detail = f"{folder}: {get_world_size()} ranks write {total_written / GB:.2f} and read {total_read / GB:.2f} GB/s"
    way_out = "" if ok else "checkpoints will stall: a raised checkpoint.save_every, or a faster file system"
    return [Check("disk rate", ok, detail, way_out)]


def measure_disk_rate(folder: Path) -> tuple[float, float]:
    """Bytes a second that this process writes with fsync, and reads after the system was asked to forget them."""
    block = os.urandom(2**20)  # a file system that compresses is not to be flattered
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        written = DISK_BYTES / (time.perf_counter() - began)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, DISK_BYTES, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(len(block)):
            pass
        return written, DISK_BYTES / (time.perf_counter() - began)


def check_shards(shards: Sequence[str], workers: int, device: torch.device) -> list[Check]:
    """The same sets on every rank, no more processes than cores, and how fast they are read."""
    checks = []
    for path in shards:
        found, rate = _look_at_set(path)
        by_rank = gather_objects(found)
        total = sum_over_ranks(rate, device)
        fault = next((f"rank {rank}: {text}" for rank, text in enumerate(by_rank) if text.startswith("!")), None)
        if fault is not None:
            way_out = (
                "every machine must see the same whole set under this path: `panfm shards verify` says what is not"
            )
            checks.append(Check("shards", False, fault.replace("!", "", 1), way_out))
        elif len(set(by_rank)) > 1:
            other = next(rank for rank, text in enumerate(by_rank) if text != by_rank[0])
            detail = f"{path}: {by_rank[0]} on rank 0 and {by_rank[other]} on rank {other}"
            checks.append(Check("shards", False, detail, "copy the same set to every machine"))
        else:
            read = (
                "" if total is None else f"; {get_world_size()} ranks read {total / GB:.2f} GB/s (perhaps from memory)"
            )
            checks.append(Check("shards", True, f"{path}: {by_rank[0].partition(' #')[0]}{read}"))
    num_processes = get_local_world_size() * (1 + workers)
    num_cores = os.cpu_count() or 1
    ok = num_processes <= max(num_cores, 2 * get_local_world_size())
    detail = f"{get_local_world_size()} ranks x (1 + {workers} workers) on {num_cores} cores"
    checks.append(Check("workers", ok, detail, "" if ok else "set data.workers lower: processes wait for cores"))
    return checks


def check_plan(config: PretrainConfig, device: torch.device, world_size: int, reduced: AllReduce | None) -> list[Check]:
    """Memory that a rank will need, and speed and length of the run, computed from counts and measured rates."""
    engine = config.engine
    try:
        num_micro_batches = compute_num_micro_batches(engine, world_size)
    except UserError as error:
        return [Check("batches", False, str(error), "see above")]
    cost, held = compute_run_cost(config), compute_run_memory(config)
    num_parameters = cost.num_encoder + cost.num_heads
    states = compute_state_bytes(num_parameters, engine.zero_stage, world_size).total
    needed = states + held.activations + held.teachers + (PROCESS_BYTES if device.type == "cpu" else 0)
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = psutil.virtual_memory().available / get_local_world_size()
    ok = needed <= free
    detail = (
        f"a rank needs {needed / GB:.1f} GB (states {states / GB:.1f} at ZeRO {engine.zero_stage}, activations "
        f"{held.activations / GB:.1f}, teachers {held.teachers / GB:.1f}), has {free / GB:.1f}"
    )
    way_out = (
        "" if ok else "lower engine.micro_batch_size, set encoder.grad_checkpointing=true, raise engine.zero_stage"
    )
    checks = [Check("memory of the run", ok, detail, way_out)]

    peak = sum_over_ranks(find_peak(device, engine.precision), device)
    if peak is None:
        detail = "this device's peak is not known; `panfm pretrain --dry-run` measures the rate"
        return [*checks, Check("speed", True, detail)]
    compute = compute_hours(cost.total_flops, num_devices=1, peak_flops=peak, utilisation=ASSUMED_UTILISATION) * 3600
    num_steps = cost.total_samples / engine.global_batch_size
    volume = compute_volume(num_parameters, engine.zero_stage, world_size, num_micro_batches)
    sending = 0.0 if reduced is None else num_steps * volume / reduced.bandwidth
    seconds = compute + sending
    detail = (
        f"about {cost.total_samples / seconds:.0f} images/s, {seconds / 3600:.3g} hours at an assumed "
        f"{ASSUMED_UTILISATION:.0%} of {peak:.3g} operations a second; sending gradients is {sending / seconds:.0%} of "
        "it. Data not counted: `panfm pretrain --dry-run` measures"
    )
    ok = sending <= seconds / 2
    way_out = "" if ok else "more images a rank and step (engine.micro_batch_size, global_batch_size), or fewer ranks"
    return [*checks, Check("speed", ok, detail, way_out)]


def _look_at_set(path: str) -> tuple[str, float]:
    """What a rank sees of a set ("!" before what is wrong), and the bytes a second that it reads of its images."""
    try:
        shard_set = open_shard_set(path, ("key",))
    except (UserError, OSError) as error:
        return f"!{error}", float("nan")
    lengths = shard_set.places.length
    num_shards = len(shard_set.index["shards"])
    began, done, row = time.perf_counter(), 0, 0
    while done < READ_BYTES and row < shard_set.num_samples and time.perf_counter() - began < 2:
        done += len(shard_set.read_image(row))
        row += 1
    rate = done / max(time.perf_counter() - began, 1e-9)
    samples = shard_set.index["samples_sha256"][:12]
    text = f"{shard_set.num_samples:,} images of {lengths.mean() / 1e3:.0f} kB in {num_shards} shards"
    return f"{text} #{samples}", rate
