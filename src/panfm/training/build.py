"""Everything that trains, built from the config: the same for a run and for its dry run.

    PretrainConfig, excluded samples  ->  model (encoder, heads; teachers outside)  ->  Engine
                                      ->  loader (the stream of samples)            ->  BuiltRun

Nothing is read from a run folder and nothing is written.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from panfm.data.loader import Loader, build_loader
from panfm.distributed import get_world_size
from panfm.encoder import facts as encoder_facts
from panfm.encoder import load_encoder
from panfm.encoder.initial import read_initial, start_from
from panfm.models.vit import build_vit, get_patch_grid
from panfm.models.weights import InitReport
from panfm.objectives.demands import get_mask_config, get_teacher_addresses, get_tokenizer_config
from panfm.objectives.pretraining import PretrainingModel, RunLength, build_pretraining_model
from panfm.optim import compute_num_steps
from panfm.shards.index import Exclusion
from panfm.training.engine import Engine
from panfm.training.plan import PretrainConfig, check_accumulation, check_local_size


@dataclass(frozen=True)
class BuiltRun:
    """A run that could take its first step."""

    model: PretrainingModel
    loader: Loader
    engine: Engine
    num_steps: int  # of the whole run
    init_report: InitReport | None  # what came of `encoder.init`; None: the encoder starts from nothing
    frozen_teachers: tuple[torch.nn.Module, ...]  # whole on every rank, outside the engine


def build_run(config: PretrainConfig, excluded: Exclusion, device: torch.device, stack: ExitStack) -> BuiltRun:
    """Build model, loader and engine on `device`; every rank must call it, the process group must stand.

    `stack` closes loader and engine. Raises UserError for what the config gets wrong.
    """
    check_accumulation(config, get_world_size())
    objectives, encoder_config = config.objectives, config.encoder
    batch_size, seed = config.engine.global_batch_size, config.engine.seed
    num_steps = compute_num_steps(config.schedule, batch_size)

    # 1. The model: encoder and heads inside the engine, teachers outside.
    vit = build_vit(encoder_config, seed)
    initial = None if encoder_config.init is None else read_initial(encoder_config.init)
    init_report = None if initial is None else start_from(vit, initial, encoder_config.init_random)
    check_local_size(config, vit.patch_embed.patch_size[0])
    teachers = {address: load_encoder(address, device=str(device)) for address in get_teacher_addresses(objectives)}
    learned_from = [(encoder.address, encoder.facts) for encoder in teachers.values()]
    if initial is not None:
        learned_from.append((initial.source, initial.facts))
    for name, known in learned_from:
        if known is not None:  # what an encoder learned from, its pupils learn from too
            encoder_facts.check_use(known, config.data.use, f"data.use ({config.data.use}): {name}")
    model = build_pretraining_model(
        vit,
        objectives,
        image_size=encoder_config.image_size,
        mean=config.augment.mean,
        std=config.augment.std,
        teachers=teachers,
        local_views=range(config.augment.views, config.augment.num_views),
        length=RunLength(num_steps, batch_size),
        seed=seed,
    ).to(device)
    if config.engine.compile:
        for block in model.encoder.blocks:
            block.compile()

    # 2. The stream of samples: a pure function of (config, seed, salts, step); the state is a few numbers.
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
            tokenizer=get_tokenizer_config(objectives),
        )
    )
    engine = Engine(model, model.encoder, config.engine, config.optim, config.deepspeed)
    stack.callback(engine.close)
    frozen = tuple(teacher.module for teacher in teachers.values())
    return BuiltRun(model, loader, engine, num_steps, init_report, frozen)
