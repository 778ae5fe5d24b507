"""A run's plan, from its first two steps: what it will need and how long it will take. Nothing is written.

    PretrainConfig -> build_run, as for the run itself -> two real steps -> DryRun -> lines

The first step warms up and is watched for activations, the second is timed. Both train, on samples of the stream;
what they learned is thrown away. On few ranks the table says what other numbers of ranks would hold.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch

from panfm.data.loader import Loader, LoaderState
from panfm.data.mixture import Unit
from panfm.distributed import all_reduce_max, all_reduce_mean, find_device, get_rank, get_world_size, process_group
from panfm.optim import compute_lr, is_encoder_frozen
from panfm.shards.index import Exclusion, open_shard_set
from panfm.training.build import BuiltRun, build_run
from panfm.training.checkpoint import CheckpointConfig
from panfm.training.energy import JOULES_PER_KWH, EnergyMeter
from panfm.training.engine import compute_num_threads
from panfm.training.flops import RunCost, compute_run_cost
from panfm.training.hardware import find_peak, measure_memory
from panfm.training.memory import STAGES, SavedTensors, compute_checkpoint_bytes, compute_state_bytes
from panfm.training.meters import sum_over_ranks
from panfm.training.plan import PretrainConfig, check_config, print_plan, say

GB = 1e9
OTHER_WORLD_SIZE = 8  # ranks of the table's second part: one node of most clusters


@dataclass(frozen=True)
class DryRun:
    """What two steps showed, and what follows for the run. Bytes are of one rank where nothing else is said."""

    cost: RunCost
    num_steps: int
    global_batch_size: int
    world_size: int
    zero_stage: int
    activation_bytes: int  # most that autograd held at one time
    teacher_bytes: int  # frozen and EMA teachers, whole on every rank
    memory_gib: float  # of the rank that holds most, after the second step: measured, all included
    checkpoint_bytes: int  # of all ranks
    sample_bytes: float  # stored image, mean over the mixture
    step_seconds: float  # of the second step, its wait for data included
    data_wait_share: float
    peak_flops: float | None  # operations a second of all ranks, at best
    step_joules: float | None  # of the second step, all ranks
    energy_source: str | None

    @property
    def step_flops(self) -> float:
        """Operations of one step."""
        return self.cost.sample_flops * self.global_batch_size

    @property
    def images_per_second(self) -> float:
        """Of all ranks together."""
        return self.global_batch_size / self.step_seconds

    @property
    def hours(self) -> float:
        """Of the steps alone; looks, probes and checkpoints come on top."""
        return self.num_steps * self.step_seconds / 3600

    @property
    def mfu(self) -> float | None:
        """Share of the peak that the second step reached."""
        return None if self.peak_flops is None else self.step_flops / self.step_seconds / self.peak_flops

    @property
    def energy_kwh(self) -> float | None:
        """Of the whole run, if every step takes what the second did."""
        return None if self.step_joules is None else self.step_joules * self.num_steps / JOULES_PER_KWH

    @property
    def data_bytes_per_hour(self) -> float:
        """Image bytes that are read."""
        return self.sample_bytes * self.images_per_second * 3600


def dry_run(config: PretrainConfig, *, excluded: Exclusion) -> DryRun:
    """Build the run, take two steps, print and return its plan; every rank calls this with the same arguments.

    Raises UserError for what the config gets wrong, as the run would.
    """
    check_config(config, "auto")
    device = find_device()
    torch.set_num_threads(compute_num_threads(config.engine))
    with ExitStack() as stack:
        stack.enter_context(process_group(device))
        built = build_run(config, excluded, device, stack)
        print_plan(config, built.loader.sources, built.engine, built.num_steps, None)
        plan = _measure(config, built, device)
        for line in describe_dry_run(plan, config.checkpoint):
            say(line)
    return plan


def describe_dry_run(plan: DryRun, checkpoint: CheckpointConfig) -> list[str]:
    """The plan in lines."""
    states = []
    for world_size in sorted({plan.world_size, OTHER_WORLD_SIZE}):
        for stage in STAGES if world_size > 1 else (0,):
            part = compute_state_bytes(plan.cost.num_encoder + plan.cost.num_heads, stage, world_size)
            states.append(
                f"  {world_size:>4} {'ranks' if world_size > 1 else 'rank '} ZeRO {stage}: weights "
                f"{part.weights / GB:.2f}, gradients {part.gradients / GB:.2f}, optimizer {part.optimizer / GB:.2f} GB"
                f"; with teachers and activations "
                f"{(part.total + plan.teacher_bytes + plan.activation_bytes) / GB:.2f} GB"
                f"{'  <- this run' if (world_size, stage) == (plan.world_size, plan.zero_stage) else ''}"
            )
    num_checkpoints = plan.num_steps // checkpoint.save_every + 1
    mfu = "unknown" if plan.mfu is None else f"{plan.mfu:.1%} of the {plan.peak_flops or 0:.3g} a second at best"
    energy = "unknown: no counter, and no published watts for this device"
    if plan.energy_kwh is not None:
        energy = f"{plan.energy_kwh:.3g} kWh if every step takes what the second did ({plan.energy_source})"
    return [
        f"operations: {plan.step_flops:.3g} a step, {plan.cost.total_flops:.3g} in all",
        f"activations: {plan.activation_bytes / GB:.2f} GB a rank (watched in a step); teachers "
        f"{plan.teacher_bytes / GB:.2f} GB",
        "memory a rank, computed; under ZeRO 3 the weights are whole while a step runs, and come on top, unless "
        "deepspeed.zero_optimization.stage3_max_live_parameters is lowered:",
        *states,
        f"memory, measured: {plan.memory_gib:.2f} GiB on the rank that holds most",
        f"checkpoint: {plan.checkpoint_bytes / GB:.2f} GB every {checkpoint.save_every:,} steps, {num_checkpoints:,} "
        f"of them, the newest {checkpoint.keep_last} kept",
        f"second step: {plan.step_seconds:.3g} s, {plan.images_per_second:.1f} images/s, of which "
        f"{plan.data_wait_share:.0%} waiting for data (workers that have just started are slower); MFU {mfu}",
        f"data: {plan.data_bytes_per_hour / GB:.2f} GB an hour at that rate, {plan.sample_bytes / 1e3:.0f} kB an image",
        f"time: {plan.hours:.3g} hours for {plan.num_steps:,} steps at that rate; looks, probes and checkpoints on top",
        f"energy: {energy}",
        "dry run: nothing was written",
    ]


def _measure(config: PretrainConfig, built: BuiltRun, device: torch.device) -> DryRun:
    batch_size = config.engine.global_batch_size
    rank, world_size = get_rank(), get_world_size()
    stream = built.loader.iterate(LoaderState(0), rank=rank, world_size=world_size)
    watched = SavedTensors(built.model)
    meter = EnergyMeter(device)
    seconds = waited = joules = 0.0
    for step in range(2):
        before = meter.read(least_seconds=0)
        began = time.perf_counter()
        micro_batches = next(stream)
        waited = time.perf_counter() - began
        built.model.begin_step(step)
        with watched if step == 0 else nullcontext():
            output = built.engine.step(
                micro_batches,
                step=step,
                lr=compute_lr(config.optim, config.schedule, min(step, built.num_steps - 1), batch_size),
                freeze_encoder=is_encoder_frozen(config.optim, step, batch_size),
            )
        if output.applied:
            with built.engine.gather(built.model.followed):
                built.model.after_step(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        after = meter.read(least_seconds=0)
        joules = float("nan") if before is None or after is None else after - before
    slowest = all_reduce_max(
        torch.tensor((seconds, measure_memory(device), watched.peak), dtype=torch.float64, device=device)
    ).tolist()
    share = float(all_reduce_mean(torch.tensor(waited / seconds, dtype=torch.float64, device=device)))
    built.loader.close()  # what its workers decode ahead would take from the peak that is measured below
    sample_bytes = _compute_sample_bytes(built.loader)
    extra, tower = built.model.copy_extra_state(), built.model.text_objective
    text = {} if tower is None else built.engine.copy_state(tower)
    frozen = sum(tensor.nbytes for module in built.frozen_teachers for tensor in module.state_dict().values())
    held = sum(tensor.nbytes for tensor in extra.values())
    cost = compute_run_cost(config)
    num_parameters, stage = cost.num_encoder + cost.num_heads, built.engine.zero_stage
    others = 4 * cost.num_encoder + held + sum(tensor.nbytes for tensor in text.values())
    return DryRun(
        cost=cost,
        num_steps=built.num_steps,
        global_batch_size=batch_size,
        world_size=world_size,
        zero_stage=stage,
        activation_bytes=round(slowest[2]),
        teacher_bytes=frozen + held,
        memory_gib=slowest[1],
        checkpoint_bytes=compute_checkpoint_bytes(num_parameters, others),
        sample_bytes=sample_bytes,
        step_seconds=slowest[0],
        data_wait_share=share,
        peak_flops=sum_over_ranks(find_peak(device, config.engine.precision), device),
        step_joules=sum_over_ranks(joules, device),
        energy_source=meter.source,
    )


def _compute_sample_bytes(loader: Loader) -> float:
    """Mean size of the stored images, each source by its share of the mixture."""
    means = {fact.source: float(open_shard_set(fact.path, ("key",)).places.length.mean()) for fact in loader.sources}
    units: Sequence[Unit] = loader.units
    total = sum(unit.share for unit in units)
    return sum(unit.share * means[unit.section.name.rpartition("/")[0]] for unit in units) / total
