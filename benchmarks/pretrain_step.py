"""Images a second of one MAE training step: panfm beside lightly, at the same ViT, mask ratio, decoder and batch.

    python benchmarks/pretrain_step.py [--quick] [--json FILE] [--threads N]

Both train timm's ViT under bf16 autocast with the same fused AdamW, hide 75 % of the patches, decode with the blocks of
lightly's own example (one, 512 wide, 16 heads; eight in a further row), and predict standardised pixels of the hidden
patches. lightly runs with its default attention (fused) and with the explicit one that panfm takes for sequences this
short. It gets its images as normalised floats for nothing; panfm gets bytes and normalises them in the step.
In two settings panfm also takes the step inside its engine, as a run does, plain and with compiled blocks.

Each contestant is a process of its own, since panfm's engine also tells the C library to keep freed memory; they take
their steps in turn, in a new order each time, and medians are compared. With --threads 1 the time is that of the
processor, so that other work on the machine counts little; with more (the default: a thread a core) it is the clock's.
The peak is the rate of the fastest of three bf16 matrix products, measured in the same turns. Operations are counted,
not estimated: every matrix product and convolution of forward and backward. A contestant takes 2 GB, of ViT-Base 4.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import Row, write_rows
from torch import Tensor, nn

from panfm.data.batch import NO_GROUP, Batch
from panfm.data.masking import MaskConfig
from panfm.distributed import process_group
from panfm.models.flops import count_flops
from panfm.models.vit import EncoderConfig, build_vit
from panfm.objectives.masked_image import MaskedImageConfig, PredictorConfig
from panfm.objectives.pretraining import PretrainingModel, build_pretraining_model
from panfm.objectives.targets import PixelTargetConfig
from panfm.optim import OptimConfig, build_optimizer, build_param_groups
from panfm.training.engine import Engine, EngineConfig, keep_freed_memory

MASK_RATIO = 0.75
PATCH, PREFIX = 16, 1
DECODER_WIDTH, DECODER_HEADS = 512, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PEAK_SHAPES = ((2048, 2048, 2048), (1600, 768, 3072), (6304, 512, 512))  # rows, summed over, columns

OURS, ENGINE, COMPILED = "panfm", "panfm in its engine", "panfm in its engine, compiled"
FUSED, EXPLICIT, KEEPING = "lightly", "lightly, explicit attention", "lightly, explicit attention, memory kept"
PEAK = "peak"


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    encoder: str
    image_size: int  # pixels
    batch_size: int
    decoder_depth: int
    contestants: tuple[str, ...]
    rounds: int

    @property
    def name(self) -> str:
        blocks = "block" if self.decoder_depth == 1 else "blocks"
        return f"{self.encoder} {self.image_size} px, {self.decoder_depth} decoder {blocks}"

    @property
    def num_patches(self) -> int:
        return (self.image_size // PATCH) ** 2


QUICK = (Setting("vit_small_patch16_224", 224, 16, 1, (OURS, FUSED, EXPLICIT), 3),)
FULL = (
    Setting("vit_small_patch16_224", 224, 32, 1, (OURS, ENGINE, COMPILED, FUSED, EXPLICIT, KEEPING), 7),
    Setting("vit_small_patch16_224", 128, 64, 1, (OURS, FUSED, EXPLICIT), 7),
    Setting("vit_base_patch16_224", 224, 32, 1, (OURS, ENGINE, COMPILED, FUSED, EXPLICIT), 5),
    Setting("vit_small_patch16_224", 224, 16, 8, (OURS, FUSED, EXPLICIT), 5),
)


def draw_batch(setting: Setting) -> Batch:
    """Random images and masks, as the loader would hand them over."""
    generator = torch.Generator().manual_seed(0)
    size = setting.batch_size
    images = torch.randint(0, 256, (size, 3, setting.image_size, setting.image_size), generator=generator)
    order = torch.rand(size, setting.num_patches, generator=generator).argsort(dim=1)
    zeros = torch.zeros(size, dtype=torch.int64)
    return Batch(
        views=(images.to(torch.uint8),),
        masks=(order < round(MASK_RATIO * setting.num_patches))[None],
        positions=zeros,
        modalities=zeros,
        sources=zeros,
        lesions=zeros + NO_GROUP,
        patients=zeros + NO_GROUP,
        visits=zeros + NO_GROUP,
    )


def build_ours(setting: Setting) -> PretrainingModel:
    """panfm's masked_image with pixels as its target."""
    objective = MaskedImageConfig(
        mask=MaskConfig(kind="random", ratio=MASK_RATIO),
        target=PixelTargetConfig(normalise=True),
        predictor=PredictorConfig(depth=setting.decoder_depth, width=DECODER_WIDTH, num_heads=DECODER_HEADS),
    )
    vit = build_vit(EncoderConfig(name=setting.encoder, image_size=setting.image_size), seed=0)
    size = setting.image_size
    return build_pretraining_model(vit, (objective,), image_size=size, mean=MEAN, std=STD, teachers={})


class LightlyMAE(nn.Module):
    """lightly's example for PyTorch, its targets standardised."""

    def __init__(self, setting: Setting, *, fused: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MAEDecoderTIMM is deprecated in favour of one that does the same work
            from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

            vit = build_vit(EncoderConfig(name=setting.encoder, image_size=setting.image_size), seed=0)
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = MAEDecoderTIMM(
                num_patches=setting.num_patches,
                patch_size=PATCH,
                embed_dim=vit.embed_dim,
                decoder_embed_dim=DECODER_WIDTH,
                decoder_depth=setting.decoder_depth,
                decoder_num_heads=DECODER_HEADS,
            )
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", fused)  # noqa: B010

    def forward(self, images: Tensor) -> Tensor:
        from lightly.models import utils

        size, length = images.shape[0], self.backbone.sequence_length
        keep, hide = utils.random_token_mask(size=(size, length), mask_ratio=MASK_RATIO, device=images.device)
        embedded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (size, length))
        tokens = utils.set_at_index(tokens, keep, embedded.type_as(tokens))
        predictions = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hide))
        targets = utils.get_at_index(utils.patchify(images, PATCH), hide - PREFIX)
        return F.mse_loss(predictions, utils.normalize_mean_var(targets, dim=-1))


def make_losses(setting: Setting, contestant: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The module of a contestant, and its loss of one batch."""
    batch = draw_batch(setting)
    if contestant in (OURS, ENGINE, COMPILED):
        model = build_ours(setting)
        if contestant == COMPILED:
            for block in model.encoder.blocks:
                block.compile()
        return model, lambda: model(batch).loss
    peer = LightlyMAE(setting, fused=contestant == FUSED)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = (batch.views[0] / 255 - mean) / std
    return peer, lambda: peer(images)


def count_operations(setting: Setting, contestant: str) -> float:
    """Multiplications and additions of forward and backward, per image."""
    _, compute_loss = make_losses(setting, contestant)
    return count_flops(lambda: compute_loss().backward()) / setting.batch_size


@contextmanager
def make_step(setting: Setting, contestant: str) -> Iterator[Callable[[], object]]:
    """What a contestant does in a turn."""
    if contestant == PEAK:
        yield run_products
        return
    if contestant in (OURS, ENGINE, COMPILED, KEEPING):
        keep_freed_memory()
    model, compute_loss = make_losses(setting, contestant)
    optim = OptimConfig(base_lr=1e-4)
    if contestant in (ENGINE, COMPILED):
        with process_group(torch.device("cpu")):
            size = setting.batch_size
            config = EngineConfig(global_batch_size=size, micro_batch_size=size, num_threads=torch.get_num_threads())
            engine = Engine(model, model.encoder, config, optim, {})  # type: ignore[arg-type]
            batch = draw_batch(setting)
            yield lambda: engine.step([batch], step=0, lr=1e-4)
            engine.close()
        return
    optimizer = build_optimizer(build_param_groups(model, getattr(model, "encoder", model), optim), optim)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    yield step


def run_products() -> float:
    """The highest rate among a few bf16 matrix products, operations a second."""
    rates = []
    for rows, inner, columns in PEAK_SHAPES:
        a, b = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((rows, inner), (inner, columns)))
        torch.mm(a, b)
        started = read_clock()
        for _ in range(10):
            torch.mm(a, b)
        rates.append(10 * 2 * rows * inner * columns / (read_clock() - started))
    return max(rates)


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_clock() -> float:
    """Seconds of the processor with one thread, of the wall with more."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def work(connection: Connection, setting: Setting, contestant: str, num_threads: int) -> None:
    """A contestant's process: a step for every message, answered by its seconds (the peak: by its rate)."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    with make_step(setting, contestant) as step:
        while connection.recv():
            started = read_clock()
            result = step()
            connection.send(result if contestant == PEAK else read_clock() - started)


def measure(setting: Setting, num_threads: int) -> dict[str, list[float]]:
    """Seconds of every contestant's steps, and the peak's rates, in turns; the first turn warms up."""
    context = multiprocessing.get_context("spawn")
    names = (PEAK, *setting.contestants)
    results: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        connections: dict[str, Connection] = {}
        for name in names:
            ours, theirs = context.Pipe()
            process: Any = context.Process(target=work, args=(theirs, setting, name, num_threads), daemon=True)
            process.start()
            theirs.close()  # so that a contestant that fails is an error here, not a wait for ever
            stack.callback(process.join, 60)
            stack.callback(ours.send, False)
            connections[name] = ours
        order = random.Random(0)
        for turn in range(1 + setting.rounds):
            for name in order.sample(names, len(names)):
                connections[name].send(True)
                answer = connections[name].recv()
                if turn:
                    results[name].append(answer)
    return results


def compare(setting: Setting, num_threads: int) -> list[Row]:
    """Measure a setting and put it into rows; says how many operations were counted."""
    results = {name: statistics.median(values) for name, values in measure(setting, num_threads).items()}
    peak = results.pop(PEAK)
    counted = {name: count_operations(setting, name) for name in (OURS, EXPLICIT)}
    print(
        f"\n{setting.name}, batch {setting.batch_size}, threads {num_threads}: {counted[OURS] / 1e9:.2f} G operations "
        f"an image, lightly {counted[EXPLICIT] / 1e9:.2f}; peak {peak / 1e9:.0f} G a second",
        flush=True,
    )
    rates = {name: setting.batch_size / seconds for name, seconds in results.items()}  # images a second
    shares = {name: rate * counted[OURS if name.startswith(OURS) else EXPLICIT] / peak for name, rate in rates.items()}
    print(
        "".join(
            f"    {name:<42} {rate:>7.2f} images/s  {shares[name]:>6.1%} of the peak\n" for name, rate in rates.items()
        )
    )
    rows = [
        Row(f"{setting.name}: {ours} beside {peer}", rates[ours], rates[peer], rates[ours] / rates[peer], "images/s")
        for ours in (OURS, ENGINE, COMPILED)
        for peer in (FUSED, EXPLICIT, KEEPING)
        if ours in rates and peer in rates and (ours == OURS or peer == FUSED)
    ]
    return rows + [
        Row(
            f"{setting.name}: share of the peak, {ours}",
            shares[ours],
            shares[FUSED],
            shares[ours] / shares[FUSED],
            "share",
        )
        for ours in (OURS, ENGINE, COMPILED)
        if ours in shares
    ]


def main() -> None:
    """Measure, print one table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting, within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--threads", type=int, default=count_cores(), help="threads of each contestant")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the processes started from here
    rows: list[Row] = []
    for setting in QUICK if arguments.quick else FULL:
        rows += compare(setting, arguments.threads)
    print(f"{'':<78}  {'ratio':>6}  {'panfm':>8}  {'peer':>8}")
    for row in rows:
        print(f"{row.name:<78}  {row.ratio:>6.2f}  {row.ours:>8.2f}  {row.peer:>8.2f}  {row.unit}")
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
