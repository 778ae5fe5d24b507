"""What each rank of test_ranks does: one step of every model on its slice of a batch; runs that stop and go on.

Ranks get unequal shares of everything that couples images: lesions have their only mate on the other rank, hidden
patches differ in number, one rank has a modality that the other has not.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from panfm.config import validate
from panfm.data.batch import NO_GROUP, Batch
from panfm.distributed import all_reduce_mean, get_rank, get_world_size
from panfm.encoder.facts import EncoderFacts, TransformFacts
from panfm.objectives.interface import Mean
from panfm.objectives.pretraining import PretrainingModel, RunLength, build_pretraining_model
from panfm.optim import OptimConfig
from panfm.training.checkpoint import (
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    read_extra_state,
)
from panfm.training.checkpoint_writer import write_checkpoint
from tests.objectives.conftest import EMA_LATENTS, SELF_DISTILLATION, read

FACTS = EncoderFacts(
    timm_name="vit_tiny_patch16_224",
    transform=TransformFacts(
        image_size=32, resize_size=36, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
    ),
    samples_seen=0,
    step=0,
    code_version="0",
)

PROTOTYPES = {"num_prototypes": 24, "hidden_dim": 32, "bottleneck_dim": 16}
DISTILLATION = {"kind": "self_distillation", "prototypes": PROTOTYPES, "koleo_weight": 1.0}
HALF = {"kind": "random", "ratio": 0.5}
# Objectives of one model each; the second entry says whether images hide different numbers of patches.
MODELS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "masked and contrastive": (
        [
            {"kind": "masked_image", "mask": HALF, "target": {"kind": "pixels"}, "predictor": {"depth": 1}},
            {"kind": "masked_image", "mask": HALF, "target": {"kind": "ema_teacher", "num_blocks": 2}},
            {"kind": "contrastive", "positives": "lesion", "num_views": 1, "hidden_dim": 32, "output_dim": 16},
            {"kind": "contrastive", "visible_only": False, "hidden_dim": 32, "output_dim": 16},
        ],
        False,
    ),
    "self-distillation by Sinkhorn": ([DISTILLATION | {"separate_heads": True}], True),
    "self-distillation by centres": ([DISTILLATION | {"centring": "mean", "masked_views": 2}], True),
}


def make_batch(unequal: bool) -> Batch:
    """Eight images; unequal: the first hides nothing, the last seven patches."""
    generator = torch.Generator().manual_seed(0)
    size = 8
    noise = torch.rand(2, size, 16, generator=generator).argsort(dim=2)
    sides = (32, 32, 16)
    unknown = torch.full((size,), NO_GROUP)
    return Batch(
        views=tuple(torch.randint(0, 256, (size, 3, s, s), dtype=torch.uint8, generator=generator) for s in sides),
        masks=noise < (torch.arange(size).view(1, size, 1) if unequal else 8),
        positions=torch.arange(size),
        modalities=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]),
        sources=unknown,
        lesions=torch.tensor([1, 1, 2, 3, 2, 4, NO_GROUP, 5]),
        patients=torch.tensor([1, 1, 2, 2, 2, 6, NO_GROUP, 6]),
        visits=unknown,
    )


def take(batch: Batch, rows: slice) -> Batch:
    """The part of a batch that a rank gets."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    views, masks = tuple(view[rows] for view in values.pop("views")), values.pop("masks")[:, rows]
    return Batch(
        views=views, masks=masks, **{name: value if value is None else value[rows] for name, value in values.items()}
    )


def build(objectives: list[dict[str, Any]]) -> PretrainingModel:
    """A model whose teacher is not what the student is, in float64."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    model = build_pretraining_model(
        vit,
        read(*objectives),
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        teachers={},
        local_views=(2,),
        length=RunLength(num_steps=10, global_batch_size=8),
    ).double()
    generator = torch.Generator().manual_seed(1)
    model.load_extra_state(
        {
            name: tensor + 0.05 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
            for name, tensor in model.copy_extra_state().items()
        },
        "test",
    )
    return model


def compute_step(name: str) -> dict[str, Any]:
    """Loss, gradients, metrics and extra state of one step of this model, as every rank sees them."""
    objectives, unequal = MODELS[name]
    model, size = build(objectives), 8 // get_world_size()
    model.begin_step(0)
    output = model(take(make_batch(unequal), slice(get_rank() * size, (get_rank() + 1) * size)))
    output.loss.backward()
    gradients = {key: all_reduce_mean(value.grad) for key, value in model.named_parameters()}
    model.after_step(0)
    return {
        "loss": float(all_reduce_mean(output.loss)),
        "gradients": gradients,
        "metrics": {key: _average(metric) for key, metric in output.metrics.items()},
        "extra": model.copy_extra_state(),
    }


def compute_steps() -> dict[str, dict[str, Any]]:
    """`compute_step` of every model."""
    return {name: compute_step(name) for name in MODELS}


def train_and_resume(folder: Path) -> dict[tuple[int, str], tuple[list[float], dict[str, Tensor]]]:
    """Losses of steps 2 and 3 and the state after them, of a run and of one resumed after step 1, at ZeRO 1 and 2."""
    from panfm.training.engine import Engine, EngineConfig  # DeepSpeed takes its time

    found = {}
    for zero_stage in (1, 2):
        for name, first in (("whole", 0), ("resumed", 2)):
            model = build([SELF_DISTILLATION | {"centring": "mean", "koleo_weight": 0.0}, EMA_LATENTS]).float()
            sizes = {"global_batch_size": 8, "micro_batch_size": 2, "zero_stage": zero_stage}
            engine = Engine(model, model.encoder, validate(EngineConfig, sizes, "test"), OptimConfig(), {})
            if first:
                (newest,) = list_checkpoints(folder / str(zero_stage))
                assert load_checkpoint(newest, engine, {}, FACTS).step == first
                model.load_extra_state(read_extra_state(newest), str(newest))
            losses = []
            for step in range(first, 4):
                model.begin_step(step)
                batch = make_batch(unequal=False)
                batches = [take(batch, slice(start, start + 2)) for start in (4 * get_rank(), 4 * get_rank() + 2)]
                losses.append(engine.step(batches, step=step, lr=1e-3).loss)
                model.after_step(step)
                if step == 1:
                    state, extra = TrainingState(step=2, samples_seen=16), model.copy_extra_state()
                    out = folder / str(zero_stage)
                    write_checkpoint(out, engine, state, config={}, facts=FACTS, keep_last=1, extra=extra)
            found[zero_stage, name] = losses[-2:], engine.copy_state(model) | model.copy_extra_state()
    return found


def do_both(folder: Path) -> tuple[dict[str, Any], dict[tuple[int, str], Any]]:
    """One start of the ranks for two tests."""
    return compute_steps(), train_and_resume(folder)


def _average(metric: Tensor | Mean) -> float | None:
    if isinstance(metric, Tensor):
        return float(all_reduce_mean(metric))
    total, count = all_reduce_mean(metric.total), all_reduce_mean(metric.count)
    return float(total / count) if count else None
