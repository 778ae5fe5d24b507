"""The parity of the engine with plain PyTorch: twenty steps of real objectives, on any number of ranks at any stage.

    python -m tests.training.parity        the whole table, as in docs/parallelism.md (some minutes)

A plain loop (one process, the whole batch, torch's AdamW and clipping) says what losses, gradient norms and weights
should be; the engine trains the same model on the same samples, cut over ranks and micro batches. Under ZeRO 3 all
parameters but norms, biases and tokens are sharded, so that there are both kinds, and on one rank all of them.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.config import validate
from panfm.data.batch import NO_GROUP, Batch
from panfm.distributed import get_rank, get_world_size, process_group
from panfm.objectives.pretraining import PretrainingModel, RunLength, build_pretraining_model
from panfm.optim import OptimConfig, build_optimizer, build_param_groups, set_lr
from panfm.training.engine import Engine
from panfm.training.engine_config import EngineConfig
from tests.objectives.conftest import read
from tests.ranks import run_ranks

NUM_STEPS = 20
BATCH_SIZE = 12  # divides by one, two and three ranks, each with several micro batches
CLIP = 0.3  # with masked pixels some steps are clipped and some are not
PEAK_LR = 2e-3
# eps: keys have a bias that changes no attention, whose gradient is nothing but rounding. With AdamW's 1e-8 it would be
# taken for a gradient, and add a walk of its own to the weights.
OPTIM = OptimConfig(base_lr=PEAK_LR, lr_scaling="none", layer_decay=0.8, weight_decay=0.05, eps=1e-6)

HALF = {"kind": "random", "ratio": 0.5}
PIXELS = {"kind": "masked_image", "mask": HALF, "target": {"kind": "pixels"}, "predictor": {"depth": 1, "width": 32}}
EMA = {"momentum": 0.9}
LATENTS = {
    "kind": "masked_image",
    "mask": HALF,
    "target": {"kind": "ema_teacher", "num_blocks": 2, "ema": EMA},
    "predictor": {"depth": 1},
}
CONTRASTIVE = {"kind": "contrastive", "visible_only": False, "hidden_dim": 32, "output_dim": 16}
DISTILLATION = {
    "kind": "self_distillation",
    "mask": HALF,
    "masked_views": 2,
    "prototypes": {"num_prototypes": 24, "hidden_dim": 32, "bottleneck_dim": 16},
    "separate_heads": True,
    "ema": EMA,
}
CENTRED = DISTILLATION | {"centring": "mean", "koleo_weight": 0.0}
TEXT = {
    "kind": "image_text",
    "loss": "siglip",
    "output_dim": 16,
    "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 8},
}


@dataclass(frozen=True)
class Case:
    """A model, and how its batch may be cut."""

    name: str
    objectives: tuple[dict[str, Any], ...]
    accumulates: bool = True  # False: its loss compares all images of a step in one pass
    rotary: bool = False  # timm's Eva with frequencies of its own in every block, instead of a VisionTransformer
    checkpointing: bool = False
    precision: str = "fp32"


CASES = {
    case.name: case
    for case in (
        Case("masked pixels", (PIXELS,)),
        Case("masked pixels, gradient checkpointing", (PIXELS,), checkpointing=True),
        Case("masked pixels, rotary encoder", (PIXELS,), rotary=True),
        Case("masked latents of the EMA teacher", (LATENTS,)),
        Case("contrastive", (CONTRASTIVE,)),
        Case("image and text", (TEXT,)),
        Case("self-distillation by centres", (CENTRED,)),
        Case("self-distillation by Sinkhorn, KoLeo", (DISTILLATION,), accumulates=False),
        Case("masked pixels, latents and contrastive", (PIXELS, LATENTS, CONTRASTIVE)),
        Case("masked pixels, bf16", (PIXELS,), precision="bf16"),
        Case("masked pixels, fp16", (PIXELS,), precision="fp16"),
    )
}


@dataclass(frozen=True)
class Training:
    """What twenty steps came to. weights: of the student and, as teacher.*, of what follows it."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Deviation:
    """How far a training is from the plain one."""

    loss: float  # largest relative deviation over the steps
    norm: float
    weights: float  # |ours - plain| / |plain - initial|, over all weights


def build(case: Case) -> PretrainingModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit: VisionTransformer | Eva
    if case.rotary:
        rotary = {"use_rot_pos_emb": True, "rope_type": "mixed", "use_abs_pos_emb": False, "dynamic_img_size": True}
        vit = Eva(**sizes, **rotary, num_classes=0, use_fc_norm=False)
    else:
        vit = VisionTransformer(**sizes, num_classes=0, reg_tokens=1)
    vit.set_grad_checkpointing(case.checkpointing)
    return build_pretraining_model(
        vit,
        read(*case.objectives),
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        teachers={},
        local_views=(2,) if any(one["kind"] == "self_distillation" for one in case.objectives) else (),
        length=RunLength(NUM_STEPS, BATCH_SIZE),
    )


def draw_batch(step: int) -> Batch:
    """The whole batch of a step: smooth images of two views and a small one, half hidden; lesions of two images."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.rand(3, BATCH_SIZE, 3, 4, 4, generator=generator) * 255
    views = [
        nn.functional.interpolate(view, side, mode="bilinear").to(torch.uint8)
        for view, side in zip(coarse, (32, 32, 16), strict=True)
    ]
    numbers = torch.arange(BATCH_SIZE)
    unknown = torch.full((BATCH_SIZE,), NO_GROUP)
    texts = torch.randint(1, 1000, (BATCH_SIZE, 8), generator=generator)
    texts[:, -1] = 49407
    return Batch(
        views=tuple(views),
        masks=torch.rand(2, BATCH_SIZE, 16, generator=generator).argsort(dim=2) < 8,
        positions=numbers + step * BATCH_SIZE,
        modalities=numbers % 4,
        sources=unknown,
        lesions=numbers // 2,
        patients=numbers // 4,
        visits=unknown,
        texts=texts,
        captions=torch.where(numbers % 3 == 0, NO_GROUP, numbers),
    )


def cut(batch: Batch, rows: slice) -> Batch:
    """Some of the images of a batch."""
    values = {
        field.name: getattr(batch, field.name)[rows] for field in fields(Batch) if field.name not in ("views", "masks")
    }
    assert batch.masks is not None
    return replace(batch, views=tuple(view[rows] for view in batch.views), masks=batch.masks[:, rows], **values)


def compute_lrs(num_steps: int) -> Iterator[tuple[int, float]]:
    for step in range(num_steps):
        yield step, PEAK_LR * min(1.0, (step + 1) / 5) * (1 - 0.8 * step / NUM_STEPS)


def train_plainly(case: Case, num_steps: int = NUM_STEPS) -> Training:
    """One process, the whole batch, nothing but PyTorch; fp32 whatever the case's precision."""
    model = build(case)
    optimizer = build_optimizer(build_param_groups(model, model.encoder, OPTIM), OPTIM)
    losses, norms = [], []
    for step, lr in compute_lrs(num_steps):
        set_lr(optimizer.param_groups, lr)
        model.begin_step(step)
        loss = model(draw_batch(step)).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step)
        losses.append(loss.item())
    return Training(losses, norms, copy_weights(model, dict(model.state_dict())))


def train(case: Case, zero_stage: int, micro_batch_size: int, num_steps: int = NUM_STEPS) -> Training:
    """The same through the engine; this rank takes its slice of every batch, in micro batches."""
    values = {
        "global_batch_size": BATCH_SIZE,
        "micro_batch_size": micro_batch_size,
        "zero_stage": zero_stage,
        "precision": case.precision,
        "clip_grad_norm": CLIP,
    }
    # A section of its own keeps the stage on one rank; without the threshold all of so small a model would stay whole.
    threshold = 0 if get_world_size() == 1 else 200
    section = {"stage3_param_persistence_threshold": threshold} if zero_stage == 3 else {"round_robin_gradients": False}
    with process_group(torch.device("cpu")):
        model = build(case)
        config = validate(EngineConfig, values, "parity")
        engine = Engine(model, model.encoder, config, OPTIM, {"zero_optimization": section})
        assert engine.zero_stage == zero_stage
        share = BATCH_SIZE // get_world_size()
        outputs = []
        for step, lr in compute_lrs(num_steps):
            batch, first = draw_batch(step), get_rank() * share
            starts = range(first, first + share, micro_batch_size)
            model.begin_step(step)
            outputs.append(engine.step([cut(batch, slice(n, n + micro_batch_size)) for n in starts], step=step, lr=lr))
            assert outputs[-1].applied and outputs[-1].grad_norm is not None, (case.name, zero_stage, step)
            with engine.gather(model.followed):
                model.after_step(step)
        weights = copy_weights(model, engine.copy_state(model))
        if get_world_size() == 1:  # on several ranks the group that it would end serves the next run too
            engine.close()
    return Training([one.loss for one in outputs], [one.grad_norm or 0.0 for one in outputs], weights)


def copy_weights(model: PretrainingModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (state | model.copy_extra_state()).items()}


def compare(ours: Training, plain: Training, case: Case) -> Deviation:
    """Largest deviations of a training; its weights must have the plain one's names and shapes."""
    model = build(case)
    initial = copy_weights(model, dict(model.state_dict()))
    assert {k: v.shape for k, v in ours.weights.items()} == {k: v.shape for k, v in plain.weights.items()}
    far = sum(float((ours.weights[name] - tensor).square().sum()) for name, tensor in plain.weights.items())
    walk = sum(float((tensor - initial[name]).square().sum()) for name, tensor in plain.weights.items())
    return Deviation(
        loss=max(abs(a - b) / abs(b) for a, b in zip(ours.losses, plain.losses, strict=True)),
        norm=max(abs(a - b) / abs(b) for a, b in zip(ours.norms, plain.norms, strict=True)),
        weights=(far / walk) ** 0.5,
    )


def train_many(runs: list[tuple[str, int, int]], num_steps: int = NUM_STEPS) -> list[Training]:
    """(name of the case, stage, micro batch size) of each run, one after the other; on every rank."""
    torch.set_num_threads(1)
    return [train(CASES[name], zero_stage, micro_batch_size, num_steps) for name, zero_stage, micro_batch_size in runs]


def list_runs(world_size: int, names: list[str], stages: tuple[int, ...] = (0, 1, 2, 3)) -> list[tuple[str, int, int]]:
    """Each case at each stage, in one micro batch a rank and, where it may be cut, in two."""
    share = BATCH_SIZE // world_size
    return [
        (name, zero_stage, size)
        for name in names
        for zero_stage in stages
        for size in ((share, share // 2) if CASES[name].accumulates else (share,))
    ]


def main(names: list[str]) -> None:
    """Print the table as Markdown: a line for each case, number of ranks and cut, the worst of the four stages."""
    torch.set_num_threads(1)
    names = names or list(CASES)
    print("| objectives | ranks | micro batches a rank | loss | gradient norm | weights |")
    print("|---|---|---|---|---|---|")
    plain = {name: train_plainly(CASES[name]) for name in names}
    for name in names:
        for world_size in (1, 2, 3):
            runs = list_runs(world_size, [name])
            results = train_many(runs) if world_size == 1 else run_ranks(train_many, world_size, runs)[0]
            for size in dict.fromkeys(size for _, _, size in runs):
                parts = [
                    compare(ours, plain[name], CASES[name])
                    for ours, run in zip(results, runs, strict=True)
                    if run[2] == size
                ]
                worst = [max(getattr(part, field.name) for part in parts) for field in fields(Deviation)]
                cells = " | ".join(f"{value:.1e}" for value in worst)
                print(f"| {name} | {world_size} | {BATCH_SIZE // world_size // size} | {cells} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
