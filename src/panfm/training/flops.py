"""What a run costs before it is started: floating-point operations of a sample, and the hours that follow from them.

    PretrainConfig  ->  its model without values, a batch of blank images with real masks  ->  RunCost
                    ->  the same, under the precision of the run                           ->  RunMemory
    RunCost, devices, their peak, an assumed share of it                                   ->  compute_hours

The model is the one that would be trained, teachers included, run forward and backward on shapes alone
(models/flops.py): no weights, no data, no GPU. Hours are an estimate, since nobody knows the share of the peak
beforehand; the headers of `configs/pretrain/` say which share they assume, and a test computes them again.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from panfm.data.batch import NO_GROUP, Batch
from panfm.data.masking import sample_mask
from panfm.encoder.address import parse_address
from panfm.encoder.network import EncoderNetwork
from panfm.encoder.schemes import BUILDERS
from panfm.models.flops import count_flops
from panfm.models.vit import build_vit, get_patch_grid
from panfm.objectives.demands import get_mask_config, get_teacher_addresses, get_tokenizer_config
from panfm.objectives.image_text import ImageTextConfig
from panfm.objectives.pretraining import PretrainingModel, RunLength, build_pretraining_model
from panfm.optim import compute_num_steps
from panfm.training.memory import SavedTensors
from panfm.training.plan import PretrainConfig

# In the blank batch. In a larger one, losses that compare images cost more and what is done once a batch costs less:
# each by less than a percent.
NUM_IMAGES = 4


@dataclass(frozen=True)
class RunCost:
    """How large a run's model is and what a sample of it costs."""

    num_encoder: int  # parameters that are shipped
    num_heads: int  # parameters that are trained beside them and thrown away
    sample_flops: float  # forward and backward of one sample, all its views, teachers included
    total_samples: int

    @property
    def total_flops(self) -> float:
        """Operations of the whole run."""
        return self.sample_flops * self.total_samples


def compute_run_cost(config: PretrainConfig) -> RunCost:
    """Count parameters and operations; multiplications and additions apart, matrix products and convolutions only.

    Blocks that gradient checkpointing computes again count again. Teachers need no weights at hand, only their
    architecture: for `panfm:` and `hf:` addresses that is their folder.
    """
    model, _ = _build_blank(config)
    num_encoder, num_all = (sum(p.numel() for p in module.parameters()) for module in (model.encoder, model))
    batch = _make_batch(config, get_patch_grid(model.encoder))
    flops = count_flops(lambda: model(batch).loss.backward())  # noqa: PLW0108  the forward is to be counted too
    return RunCost(num_encoder, num_all - num_encoder, flops / NUM_IMAGES, config.schedule.total_samples)


@dataclass(frozen=True)
class RunMemory:
    """What a rank holds besides parameters, gradients and optimizer; bytes."""

    activations: float  # that autograd keeps of one micro batch
    teachers: int  # frozen ones and averages, whole on every rank


def compute_run_memory(config: PretrainConfig) -> RunMemory:
    """Watch what autograd keeps of two small batches; the line through them is that of a micro batch."""
    model, teachers = _build_blank(config)
    peaks = []
    for num_images in (NUM_IMAGES // 2, NUM_IMAGES):
        batch = _make_batch(config, get_patch_grid(model.encoder), num_images)
        watched = SavedTensors(model)

        def run(batch: Batch = batch, watched: SavedTensors = watched) -> None:
            enabled = config.engine.precision != "fp32"
            with watched, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(batch).loss
            loss.backward()

        count_flops(run)
        peaks.append(watched.peak)
    slope = (peaks[1] - peaks[0]) / (NUM_IMAGES - NUM_IMAGES // 2)
    frozen = sum(p.nbytes for teacher in teachers for p in teacher.network.parameters())
    averages = [] if model.teacher is None else list(model.teacher.get_state().values())
    activations = peaks[1] + slope * (config.engine.micro_batch_size - NUM_IMAGES)
    return RunMemory(activations, frozen + sum(tensor.nbytes for tensor in averages))


def _build_blank(config: PretrainConfig) -> "tuple[PretrainingModel, list[_BlankTeacher]]":
    """The model that would be trained and its frozen teachers, on the CPU, in memory that nobody filled."""
    size = config.encoder.image_size
    teachers = {address: _BlankTeacher(address, size) for address in get_teacher_addresses(config.objectives)}
    batch_size = config.engine.global_batch_size
    objectives = [
        replace(objective, text=replace(objective.text, init=None))
        if isinstance(objective, ImageTextConfig)
        else objective
        for objective in config.objectives
    ]
    with torch.device("meta"):
        vit = build_vit(replace(config.encoder, init=None), config.engine.seed)
        model = build_pretraining_model(
            vit,
            objectives,
            image_size=size,
            mean=config.augment.mean,
            std=config.augment.std,
            teachers=teachers,
            local_views=range(config.augment.views, config.augment.num_views),
            length=RunLength(compute_num_steps(config.schedule, batch_size), batch_size),
        )
    return model.to_empty(device="cpu"), list(teachers.values())


def compute_hours(total_flops: float, *, num_devices: int, peak_flops: float, utilisation: float) -> float:
    """Hours on `num_devices` of `peak_flops` operations a second each, of which the share `utilisation` is reached."""
    return total_flops / (num_devices * peak_flops * utilisation) / 3600


class _BlankTeacher:
    """A frozen teacher's network without its weights: what `Encoder` does as a teacher, on blank images."""

    device = torch.device("meta")  # of the images by which the model that is built asks for its width

    def __init__(self, text: str, image_size: int) -> None:
        address = parse_address(text)
        if address.scheme == "timm":  # else the folder says what the network is
            address = replace(address, weights=None, seed=0)
        with torch.device("meta"):
            parts = BUILDERS[address.scheme](address)
        self.network = EncoderNetwork(parts.model, address.pooling or parts.pooling, where=text).to_empty(device="cpu")
        self.network.eval().requires_grad_(False)
        has_fixed_size = self.network.is_token_model or address.image_size is not None
        self.size = parts.transform.image_size if has_fixed_size else image_size
        outputs: list[Tensor] = []
        count_flops(lambda: outputs.extend(self.forward_tokens_and_feature(torch.zeros(1, 3, 1, 1))))
        self.shape, self.feature_shape = (output.shape[1:] for output in outputs)  # of an image
        side = math.isqrt(self.shape[0] - int(self.network.has_cls))
        self.grid = (side, side)

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> [B, cls + rows * columns, D]."""
        if images.is_meta:
            return torch.empty(len(images), *self.shape, device="meta")
        with torch.no_grad():
            return self.network.forward_tokens(torch.zeros(len(images), 3, self.size, self.size))

    def forward_tokens_and_feature(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] -> the same, and [B, F]."""
        if images.is_meta:
            return self.forward_tokens(images), torch.empty(len(images), *self.feature_shape, device="meta")
        with torch.no_grad():
            return self.network.forward_tokens_and_feature(torch.zeros(len(images), 3, self.size, self.size))

    def token_grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of the run's size."""
        return self.grid


def _make_batch(config: PretrainConfig, grid: tuple[int, int], num_images: int = NUM_IMAGES) -> Batch:
    """Blank images of unknown groups, with masks as the loader draws them."""
    augment, mask = config.augment, get_mask_config(config.objectives)
    tokenizer = get_tokenizer_config(config.objectives)
    sizes = [augment.image_size] * augment.views + [augment.local_size] * augment.local_views
    rng = np.random.default_rng(0)
    masks = None
    if mask is not None:
        drawn = [[sample_mask(mask, grid, rng) for _ in range(num_images)] for _ in range(augment.views)]
        masks = torch.from_numpy(np.array(drawn))
    unknown = torch.full((num_images,), NO_GROUP)
    return Batch(
        views=tuple(torch.zeros(num_images, 3, size, size, dtype=torch.uint8) for size in sizes),
        masks=masks,
        positions=torch.arange(num_images),
        modalities=torch.zeros(num_images, dtype=torch.int64),
        sources=torch.zeros(num_images, dtype=torch.int64),
        lesions=unknown,
        patients=unknown,
        visits=unknown,
        # Every image with a caption of full length: what a run on captioned images costs at most.
        captions=None if tokenizer is None else torch.arange(num_images),
        texts=None if tokenizer is None else torch.ones(num_images, tokenizer.context_length, dtype=torch.int64),
    )
