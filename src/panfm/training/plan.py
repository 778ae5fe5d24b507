"""What a run is about to do, before it does it: the config as one document, checked as a whole, described and printed.

    PretrainConfig (all sections)  ->  check_config, check_accumulation  ->  UserError where sections disagree
                                   ->  describe_encoder                  ->  the facts that every checkpoint carries
                                   ->  print_plan                        ->  sources, parameters, steps, a line each

Nothing here trains or draws; pretrain.py calls these once, in this order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from panfm import __version__
from panfm.config import config_class
from panfm.data.loader import DataConfig, SourceFacts
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig
from panfm.distributed import get_world_size, is_main
from panfm.encoder import facts as encoder_facts
from panfm.encoder.facts import EncoderFacts, TransformFacts
from panfm.errors import UserError
from panfm.models.vit import EncoderConfig, get_timm_kwargs
from panfm.objectives.demands import (
    ObjectiveConfig,
    find_coupling,
    get_ema_config,
    get_mask_config,
    get_num_views,
    takes_local_views,
)
from panfm.optim import OptimConfig, ScheduleConfig, check_schedule
from panfm.progress import console
from panfm.shards.index import Exclusion
from panfm.tracking import TrackingConfig
from panfm.training.checkpoint import CheckpointConfig, describe_writers
from panfm.training.engine import Engine, EngineConfig, compute_num_micro_batches
from panfm.training.watch import MonitorConfig

RESIZE_RATIO = 256 / 224  # evaluation resizes the short side to image_size times this, then crops the centre


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


def check_config(config: PretrainConfig, resume: str) -> None:
    """What only several sections together can get wrong."""
    check_schedule(config.schedule, config.optim)
    if resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: it must be auto or never")
    if config.augment.image_size != config.encoder.image_size:
        raise UserError(
            f"augment.image_size ({config.augment.image_size}) must equal encoder.image_size "
            f"({config.encoder.image_size}); set both to one number"
        )
    if config.augment.views < (num_views := get_num_views(config.objectives)):
        raise UserError(f"augment.views ({config.augment.views}) must be at least {num_views} for these objectives")
    if config.augment.local_views and not takes_local_views(config.objectives):
        raise UserError(
            f"augment.local_views ({config.augment.local_views}): none of the objectives looks at local views, as "
            "self_distillation does; set it to 0"
        )
    get_mask_config(config.objectives)
    get_ema_config(config.objectives)
    for world_size in config.engine.world_sizes:
        compute_num_micro_batches(config.engine, world_size)
        check_accumulation(config, world_size)


def check_accumulation(config: PretrainConfig, world_size: int) -> None:
    """Some losses compare the images of one batch: cut into micro batches they would be other losses."""
    together = config.engine.micro_batch_size * world_size
    coupling = find_coupling(config.objectives)
    if coupling is not None and together < config.engine.global_batch_size:
        raise UserError(
            f"objectives: {coupling} sees only {together} images together (engine.micro_batch_size "
            f"{config.engine.micro_batch_size} x world_size {world_size}) of engine.global_batch_size "
            f"{config.engine.global_batch_size}; make them equal, for example engine.global_batch_size={together}"
        )


def check_local_size(config: PretrainConfig, patch_size: int) -> None:
    """Local views must be tiled by the patches that the encoder has."""
    if config.augment.local_views and config.augment.local_size % patch_size:
        better = max(1, round(config.augment.local_size / patch_size)) * patch_size
        raise UserError(
            f"augment.local_size ({config.augment.local_size}) must be a multiple of the patch size ({patch_size}); "
            f"try {better}"
        )


def describe_encoder(
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


def print_plan(
    config: PretrainConfig, sources: Sequence[SourceFacts], engine: Engine, num_steps: int, resumed: Path | None
) -> None:
    """What is about to happen, in a few lines: sources with counts, parameters, steps, batch."""
    for source in sources:
        audited = "" if config.data.exclude.audit is None else f", {source.num_audited:,} more listed by the audit"
        say(
            f"source {source.source}: {source.num_kept:,} images kept, {source.num_excluded:,} excluded (test groups)"
            f"{audited}"
        )
    num_encoder, num_all = engine.num_encoder_parameters, engine.num_parameters
    say(
        f"{config.encoder.name} at {config.encoder.image_size} px: {num_encoder / 1e6:.1f} M parameters, "
        f"{(num_all - num_encoder) / 1e6:.1f} M in heads that are thrown away"
    )
    say(
        f"{num_steps:,} steps of {config.engine.global_batch_size} images = {engine.num_micro_batches} micro batches "
        f"of {config.engine.micro_batch_size} on {get_world_size()} ranks ({engine.device}, {config.engine.precision}, "
        f"ZeRO {engine.zero_stage}, {torch.get_num_threads()} threads a rank)"
    )
    if resumed is not None:
        say(f"going on from {resumed}, {describe_writers(resumed)}")


def say(text: str) -> None:
    """Print one line, on rank 0 only."""
    if is_main():
        console.print(text, highlight=False, soft_wrap=True, markup=False)
