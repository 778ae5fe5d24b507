"""Pretraining, from config to checkpoint: one loop that reads top to bottom.

    shards -> loader -> micro batches -> PretrainingModel (encoder + objectives) -> loss -> engine -> checkpoints
                                                                                     -> metrics.jsonl, loss.png, wandb

The run folder holds config.yaml (resolved), metrics.jsonl, loss.png, checkpoints/ and, where asked for, wandb/. The
same call runs on one process and under torchrun. SIGTERM and SIGUSR1 end the run after the step in hand, saved.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil
import torch
from pydantic import Field
from torch import Tensor

from panfm import __version__
from panfm.config import config_class, to_plain, write_config
from panfm.data.loader import DataConfig, LoaderState, SourceFacts, build_loader
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig
from panfm.distributed import (
    all_reduce_max,
    barrier,
    broadcast_object,
    find_device,
    get_rank,
    get_world_size,
    is_main,
    process_group,
)
from panfm.encoder import facts as encoder_facts
from panfm.encoder import load_encoder
from panfm.encoder.facts import EncoderFacts, TransformFacts
from panfm.errors import UserError
from panfm.models.vit import EncoderConfig, build_vit, encode_visible, get_patch_grid, get_timm_kwargs
from panfm.objectives.contrastive import ContrastiveConfig
from panfm.objectives.pretraining import (
    ObjectiveConfig,
    PretrainingModel,
    build_pretraining_model,
    get_mask_config,
    get_num_views,
    get_teacher_addresses,
)
from panfm.optim import OptimConfig, ScheduleConfig, check_schedule, compute_lr, compute_num_steps
from panfm.progress import console, progress_bar
from panfm.shards.index import Exclusion
from panfm.tracking import TrackingConfig, append_metrics, open_wandb, trim_metrics, write_loss_curve
from panfm.training.checkpoint import (
    CheckpointConfig,
    TrainingState,
    compute_folder,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    write_checkpoint,
)
from panfm.training.engine import Engine, EngineConfig, compute_num_threads
from panfm.training.monitor import MonitorConfig, compute_feature_std_ratio, compute_rankme

RESIZE_RATIO = 256 / 224  # evaluation resizes the short side to image_size times this, then crops the centre

Outcome = Literal["finished", "interrupted", "diverged"]
# 75 is sysexits.h's EX_TEMPFAIL, "try again": what a scheduler requeues on. Under torchrun the agent reports its own.
EXIT_CODES: dict[Outcome, int] = {"finished": 0, "interrupted": 75, "diverged": 4}


@config_class
class PretrainConfig:
    """A pretraining run as a document; each section's class stands beside the code that it configures."""

    data: DataConfig
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    encoder: EncoderConfig
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's own; what the sections above decide is refused here."""


@dataclass(frozen=True)
class PretrainSummary:
    """How a run ended. `checkpoint` is the newest whole one; loss is that of the last step done (None: no step)."""

    out: Path
    checkpoint: Path | None
    outcome: Outcome
    step: int
    samples_seen: int
    loss: float | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 finished; 75 interrupted by a signal, saved: start the same command again; 4 diverged."""
        return EXIT_CODES[self.outcome]


def pretrain(config: PretrainConfig, *, out: Path, excluded: Exclusion, resume: str = "auto") -> PretrainSummary:
    """Train an encoder into the run folder `out`; every rank calls this with the same arguments.

    `excluded` names the groups that must never be drawn (`panfm.evaluation.splits.compute_excluded`), and the images
    that an audit lists (`panfm.evaluation.contamination_list`). With
    resume="auto" the newest whole checkpoint in `out` is continued, if there is one; "never" refuses a folder that
    holds any. Raises UserError for what the config gets wrong, before anything is trained.
    """
    started = time.monotonic()
    _check_config(config, resume)
    device = find_device()
    torch.set_num_threads(compute_num_threads(config.engine))

    with ExitStack() as stack:
        stack.enter_context(process_group(device))
        stop = stack.enter_context(_catch_signals())
        _check_accumulation(config, get_world_size())
        plain = to_plain(config)
        objectives = config.objectives
        encoder_config, batch_size, seed = config.encoder, config.engine.global_batch_size, config.engine.seed
        num_steps = compute_num_steps(config.schedule, batch_size)

        # 1. The model: encoder and heads inside the engine, frozen teachers outside.
        initial = encoder_config.init
        origin = None if initial is None else load_encoder(initial)
        weights = None if origin is None else origin.module.model.state_dict()
        vit = build_vit(encoder_config, seed, weights)
        teachers = {address: load_encoder(address, device=str(device)) for address in get_teacher_addresses(objectives)}
        for encoder in (*teachers.values(), *((origin,) if origin is not None else ())):
            if encoder.facts is not None:  # what an encoder learned from, its pupils learn from too
                encoder_facts.check_use(
                    encoder.facts, config.data.use, f"data.use ({config.data.use}): {encoder.address}"
                )
        model = build_pretraining_model(
            vit,
            objectives,
            image_size=encoder_config.image_size,
            mean=config.augment.mean,
            std=config.augment.std,
            teachers=teachers,
            seed=seed,
        ).to(device)
        if config.engine.compile:
            for block in model.encoder.blocks:
                block.compile()

        # 2. The stream of samples: a pure function of (config, seed, salt, step); the state is two numbers.
        loader = stack.enter_context(
            build_loader(
                config.data,
                config.mixture,
                config.augment,
                mask=get_mask_config(objectives),
                mask_grid=get_patch_grid(model.encoder),
                seed=seed,
                global_batch_size=batch_size,
                micro_batch_size=config.engine.micro_batch_size,
                excluded=excluded.groups,
                excluded_keys=excluded.keys,
            )
        )

        engine = Engine(model, model.encoder, config.engine, config.optim, config.deepspeed)
        stack.callback(engine.close)

        # 3. Where the run stands: at the beginning, or where its newest whole checkpoint left off.
        state = TrainingState(step=0, samples_seen=0, salt=0)
        facts = _describe_encoder(config, plain, loader.sources, excluded)
        found = list_checkpoints(out)
        if found and resume == "never":
            raise UserError(
                f"{out}: holds {found[-1].name}; with --resume never give another --out, or remove the folder"
            )
        newest, passed_over = broadcast_object(find_checkpoint(out) if is_main() else (None, []))
        for line in passed_over:
            _say(line)
        if newest is not None:
            state = load_checkpoint(newest, engine, plain, facts)
        if is_main():
            for leftover in (out / "checkpoints").glob("step-*.tmp"):
                shutil.rmtree(leftover)
            out.mkdir(parents=True, exist_ok=True)
            write_config(config, out / "config.yaml")
            trim_metrics(out / "metrics.jsonl", state.step)
        barrier()
        _print_plan(config, loader.sources, engine, num_steps, newest)
        log_wandb = stack.enter_context(open_wandb(config.tracking, out, plain)) if is_main() else None

        def save() -> Path:
            now = facts.model_copy(update={"step": state.step, "samples_seen": state.samples_seen})
            keep_last = config.checkpoint.keep_last
            return write_checkpoint(out, engine, state, config=plain, facts=now, keep_last=keep_last)

        # 4. The loop.
        outcome: Outcome = "finished"
        loss: float | None = None
        note = ""
        window_started, window_wait, window_steps = time.monotonic(), 0.0, 0
        stream = loader.iterate(LoaderState(state.step, state.salt), rank=get_rank(), world_size=get_world_size())
        advance = stack.enter_context(
            progress_bar("pretraining", num_steps * batch_size, done=state.samples_seen)
            if is_main()
            else _no_progress()
        )
        while state.step < num_steps:
            asked = time.monotonic()
            micro_batches = next(stream)
            window_wait += time.monotonic() - asked

            lr = compute_lr(config.optim, config.schedule, state.step, batch_size)
            output = engine.step(micro_batches, step=state.step, lr=lr)
            if not output.applied or output.grad_norm is None:
                outcome = "diverged"
                break
            loss = output.loss
            state = replace(state, step=state.step + 1, samples_seen=state.samples_seen + batch_size)
            window_steps += 1

            record: dict[str, Any] = {}
            if every(state.step, config.monitor.every):
                images = torch.cat([batch.views[0] for batch in micro_batches])[: config.monitor.num_images]
                features = compute_pooled_features(model, images.to(device))
                record["rankme"] = compute_rankme(features)
                record["feature_std_ratio"] = compute_feature_std_ratio(features)

            last = state.step == num_steps
            if every(state.step, config.tracking.log_every) or record or last:
                seconds = time.monotonic() - window_started
                record |= {
                    "step": state.step,
                    "samples_seen": state.samples_seen,
                    "loss": output.loss,
                    **output.metrics,
                    "lr": lr,
                    "grad_norm": output.grad_norm,
                    "images_per_second": window_steps * batch_size / seconds,
                    "data_wait_share": window_wait / seconds,
                    "memory_gib": measure_memory(device),
                }
                window_started, window_wait, window_steps = time.monotonic(), 0.0, 0
                if log_wandb is not None:
                    append_metrics(out / "metrics.jsonl", record)
                    log_wandb(record)
                note = f"loss {loss:.4f} lr {lr:.2e} data wait {record['data_wait_share']:.0%}"
            advance(batch_size, note)

            stopped = bool(all_reduce_max(torch.tensor(float(stop.requested), device=device)))
            if every(state.step, config.checkpoint.save_every) or stopped or last:
                newest = save()
                if is_main():
                    write_loss_curve(out / "metrics.jsonl", out / "loss.png", title=f"{out.name}: pretraining loss")
            if stopped and not last:
                outcome = "interrupted"
                break

        # 5. The end: a run that diverged keeps its last good weights, if they are still there.
        if outcome == "diverged":
            good = all(bool(torch.isfinite(tensor).all()) for tensor in engine.copy_state(model).values())
            if good and state.step > 0 and newest != compute_folder(out, state.step):
                newest = save()
            kept = f"saved {newest.name}" if newest is not None else "nothing to save"
            _say(
                f"stopped at step {state.step + 1}: loss {output.loss}, gradient norm "
                f"{'not finite' if output.grad_norm is None else output.grad_norm}; {kept}. Start again with a lower "
                f"optim.base_lr ({config.optim.base_lr}) or a longer schedule.warmup_samples "
                f"({config.schedule.warmup_samples}) and another --out"
            )
        if outcome == "interrupted":
            _say(f"stopped by a signal after step {state.step}, saved; the same command goes on from here")
        summary = PretrainSummary(
            out=out,
            checkpoint=newest,
            outcome=outcome,
            step=state.step,
            samples_seen=state.samples_seen,
            loss=loss,
            seconds=time.monotonic() - started,
        )
        if outcome == "finished":
            _say(f"pretrained {state.step:,} steps, loss {_show(loss)}, {summary.seconds:.0f} s: {newest}")
    return summary


def every(step: int, distance: int) -> bool:
    """Whether something that happens every `distance` steps (0: never) happens after `step`."""
    return distance > 0 and step % distance == 0


def compute_pooled_features(model: PretrainingModel, images: Tensor) -> Tensor:
    """Mean patch token of whole images, uint8 [N, 3, H, W] -> float32 [N, D]; the model's mode is left as it was."""
    encoder = model.encoder
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            tokens = encode_visible(encoder, images, None, model.normalise)  # [N, prefix + num_patches, D]
            return tokens[:, encoder.num_prefix_tokens :].mean(dim=1).float()
    finally:
        encoder.train(was_training)


def measure_memory(device: torch.device) -> float:
    """Memory of this rank in GiB: the most that tensors took on a GPU, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def _check_config(config: PretrainConfig, resume: str) -> None:
    """What only several sections together can get wrong."""
    check_schedule(config.schedule)
    if resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: it must be auto or never")
    if config.augment.image_size != config.encoder.image_size:
        raise UserError(
            f"augment.image_size ({config.augment.image_size}) must equal encoder.image_size "
            f"({config.encoder.image_size}); set both to one number"
        )
    if config.augment.views < (num_views := get_num_views(config.objectives)):
        raise UserError(f"augment.views ({config.augment.views}) must be at least {num_views} for these objectives")


def _check_accumulation(config: PretrainConfig, world_size: int) -> None:
    """A contrastive loss compares the images of one batch: cut into micro batches it would be another loss."""
    together = config.engine.micro_batch_size * world_size
    contrasts = any(isinstance(objective, ContrastiveConfig) for objective in config.objectives)
    if contrasts and together < config.engine.global_batch_size:
        raise UserError(
            f"objectives: contrastive sees only {together} images together (engine.micro_batch_size "
            f"{config.engine.micro_batch_size} x world_size {world_size}) of engine.global_batch_size "
            f"{config.engine.global_batch_size}; make them equal, for example engine.global_batch_size={together}"
        )


def _describe_encoder(
    config: PretrainConfig, plain: dict[str, Any], sources: Sequence[SourceFacts], excluded: Exclusion
) -> EncoderFacts:
    """The facts that every checkpoint of this run carries; step and samples_seen are filled in at each."""
    size = config.encoder.image_size
    return EncoderFacts(
        timm_name=config.encoder.name,
        timm_kwargs=get_timm_kwargs(config.encoder),
        transform=TransformFacts(
            image_size=size,
            resize_size=round(size * RESIZE_RATIO),
            interpolation="bicubic",
            mean=config.augment.mean,
            std=config.augment.std,
        ),
        samples_seen=0,
        step=0,
        config=plain,
        sources=tuple(
            encoder_facts.SourceFacts(
                source=source.source,
                licence=source.licence,
                num_kept=source.num_kept,
                num_excluded=source.num_excluded,
                num_audited=source.num_audited,
                data_hash=source.data_hash,
                synthetic=source.synthetic,
                permitted_uses=source.permitted_uses,
            )
            for source in sources
        ),
        excluded_tasks=excluded.tasks,
        audit=excluded.audit,
        use=config.data.use,
        code_version=__version__,
    )


def _print_plan(
    config: PretrainConfig, sources: Sequence[SourceFacts], engine: Engine, num_steps: int, resumed: Path | None
) -> None:
    """What is about to happen, in a few lines: sources with counts, parameters, steps, batch."""
    for source in sources:
        audited = "" if config.data.exclude.audit is None else f", {source.num_audited:,} more listed by the audit"
        _say(
            f"source {source.source}: {source.num_kept:,} images kept, {source.num_excluded:,} excluded (test groups)"
            f"{audited}"
        )
    num_encoder, num_all = (sum(p.numel() for p in m.parameters()) for m in (engine.encoder, engine.model))
    _say(
        f"{config.encoder.name} at {config.encoder.image_size} px: {num_encoder / 1e6:.1f} M parameters, "
        f"{(num_all - num_encoder) / 1e6:.1f} M in heads that are thrown away"
    )
    _say(
        f"{num_steps:,} steps of {config.engine.global_batch_size} images = {engine.num_micro_batches} micro batches "
        f"of {config.engine.micro_batch_size} on {get_world_size()} ranks ({engine.device}, {config.engine.precision}, "
        f"ZeRO {engine.zero_stage}, {torch.get_num_threads()} threads a rank)"
    )
    if resumed is not None:
        _say(f"going on from {resumed}")


class _StopRequest:
    """Whether a signal asked the run to end."""

    requested = False


@contextmanager
def _catch_signals() -> Iterator[_StopRequest]:
    """SIGTERM and SIGUSR1 ask the loop to save and end; a second one has its usual effect and ends at once."""
    stop = _StopRequest()
    caught = (signal.SIGTERM, signal.SIGUSR1)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for name in caught:
            signal.signal(name, signal.SIG_DFL)

    before = {name: signal.signal(name, request) for name in caught}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _no_progress() -> Iterator[Callable[..., None]]:
    yield lambda count=1, note="": None


def _say(text: str) -> None:
    if is_main():
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def _show(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
