"""The one module that DeepSpeed wraps: an encoder and the objectives that train it.

    Batch  ->  each view that an objective asks for, encoded once  ->  objectives  ->  weighted sum of losses, metrics

Teachers hang on it from outside of the module tree: DeepSpeed neither trains nor shards nor saves them. A frozen one is
never saved. The EMA teacher and the centres of its heads are the model's extra state, which a checkpoint holds in a
file of its own; the loop moves them by calling `begin_step` before and `after_step` after each step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from panfm.data.batch import Batch
from panfm.errors import UserError
from panfm.models.heads import Decoder, Regressor, TokenHead
from panfm.models.vit import Vit, get_patch_grid
from panfm.objectives.centring import Centre
from panfm.objectives.contrastive import Contrastive, ContrastiveConfig
from panfm.objectives.demands import ObjectiveConfig, get_ema_config, get_mask_config
from panfm.objectives.ema import EmaTeacher, find_misfit
from panfm.objectives.encoding import encode_views
from panfm.objectives.gradient_cache import CachedGradients, Comparing, cache_gradients
from panfm.objectives.image_text import ImageText, ImageTextConfig
from panfm.objectives.interface import EncodedView, Metric, ObjectiveOutput, ViewKey
from panfm.objectives.masked_image import MaskedImageConfig, MaskedLatents, MaskedPixels
from panfm.objectives.self_distillation import SelfDistillation, SelfDistillationConfig
from panfm.objectives.targets import (
    EmaTargets,
    EmaTeacherConfig,
    FrozenTargets,
    PixelTargetConfig,
    Teacher,
)


class PixelNormaliser(nn.Module):
    """(x / 255 - mean) / std of each channel; uint8 [*, 3, H, W] -> float32."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
        self.register_buffer("scale", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("shift", (-means / stds).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise; one multiplication that also converts, one addition in place."""
        return (images * self.scale).add_(self.shift)


@dataclass(frozen=True)
class RunLength:
    """How long the run is: what the schedules of a teacher are about."""

    num_steps: int
    global_batch_size: int  # samples a step


class PretrainingModel(nn.Module):
    """Encoder and objectives: forward gives the loss of one micro batch.

    encoder: the timm ViT that is trained. teacher: what its averages hang on, where an objective has an EMA teacher.
    Every parameter that requires a gradient gets one in every step, zeros at least: ZeRO and DDP rely on it.
    """

    def __init__(
        self,
        vit: Vit,
        objectives: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        normalise: PixelNormaliser,
        teacher: EmaTeacher | None = None,
    ) -> None:
        super().__init__()
        self.encoder = vit
        self.objectives = nn.ModuleDict(objectives)
        self.weights = dict(weights)
        self.normalise = normalise
        self.teacher = teacher
        self.teacher_encoder: tuple[Vit, ...] = ()  # in a tuple, so that it is no submodule
        if teacher is not None:
            self.teacher_encoder = (teacher.follow("encoder", vit),)
            self.teacher_encoder[0].set_grad_checkpointing(False)  # it has no backward to save memory for
        self.view_keys: tuple[ViewKey, ...] = tuple(
            dict.fromkeys(key for objective in objectives.values() for key in objective.view_keys)  # type: ignore[union-attr]
        )
        # One for all objectives, so that they can share an encoding; as in BEiT, iBOT and DINOv2 it begins as zeros.
        replaces = any(key.replaced for key in self.view_keys)
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim)) if replaces else None

    @property
    def exported_encoder(self) -> Vit:
        """The encoder that checkpoints ship and that is worth measuring: the teacher's or the student's (`export`)."""
        if self.teacher is None or self.teacher.config.export == "student":
            return self.encoder
        return self.teacher_encoder[0]

    def forward(self, batch: Batch, cached: Mapping[str, CachedGradients] | None = None) -> ObjectiveOutput:
        """Batch on this module's device -> weighted loss (float32 scalar), metrics named objective/metric.

        cached: of objectives that compare the images of all micro batches of the step; see `cache_gradients`.
        """
        encoded = self._encode(batch, self.view_keys)
        losses: list[Tensor] = []
        metrics: dict[str, Metric] = {}
        for name, objective in self.objectives.items():
            views = tuple(encoded[key] for key in objective.view_keys)  # type: ignore[union-attr]
            if cached is not None and name in cached:
                output = cached[name].replay(objective, objective.represent(views, batch))  # type: ignore[operator]
            else:
                output = objective(views, batch)
            losses.append(self.weights[name] * output.loss)
            metrics |= {f"{name}/{metric}": value for metric, value in output.metrics.items()}
        return ObjectiveOutput(torch.stack(losses).sum(), metrics)

    @property
    def comparing(self) -> dict[str, nn.Module]:
        """The objectives that compare the images of a batch in a way that gradients can be cached for."""
        return {name: objective for name, objective in self.objectives.items() if isinstance(objective, Comparing)}

    @torch.no_grad()
    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """What each of the comparing objectives compares of a batch on this module's device: [V, B, D], no gradient."""
        keys = {name: objective.view_keys for name, objective in self.comparing.items()}
        encoded = self._encode(batch, chain.from_iterable(keys.values()))  # type: ignore[arg-type]
        return {
            name: objective.represent(tuple(encoded[key] for key in keys[name]), batch)  # type: ignore[operator, union-attr]
            for name, objective in self.comparing.items()
        }

    def cache_gradients(
        self, represented: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch]
    ) -> list[dict[str, CachedGradients]]:
        """What `represent` gave for all micro batches of a step -> what `forward` needs to know for each of them."""
        caches: list[dict[str, CachedGradients]] = [{} for _ in batches]
        for name, objective in self.comparing.items():
            found = cache_gradients(objective, [embeddings[name] for embeddings in represented], batches)
            for cache, gradients in zip(caches, found, strict=True):
                cache[name] = gradients
        return caches

    def _encode(self, batch: Batch, keys: Iterable[ViewKey]) -> dict[ViewKey, EncodedView]:
        teacher = self.teacher_encoder[0] if self.teacher_encoder else None
        return encode_views(batch, keys, self.encoder, self.normalise, teacher=teacher, mask_token=self.mask_token)

    def begin_step(self, step: int) -> None:
        """Take the schedules' values for optimizer step `step` (0-based); before its first forward."""
        for objective in self.objectives.values():
            if isinstance(objective, SelfDistillation):
                objective.begin_step(step)

    def after_step(self, step: int) -> None:
        """Move the teacher and its centres; on every rank, once after step `step`, and only if it was applied."""
        if self.teacher is not None:
            self.teacher.update(step)
        for objective in self.objectives.values():
            if isinstance(objective, SelfDistillation):
                objective.after_step()

    def copy_extra_state(self) -> dict[str, Tensor]:
        """What must be saved beside the state dict, as CPU copies: the teacher's averages, the centres; {}: nothing."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._get_extra_state().items()}

    def load_extra_state(self, saved: Mapping[str, Tensor], where: str) -> None:
        """Take back what `copy_extra_state` gave; UserError naming `where` if it is not exactly what this run needs."""
        own = self._get_extra_state()
        if (misfit := find_misfit(own, saved)) is not None:
            raise UserError(
                f"{where}: {misfit}; it must hold the EMA teacher of this run's objectives: resume from a checkpoint "
                "of this run, or start a new run with another --out"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    @property
    def followed(self) -> list[nn.Module]:
        """The parts whose weights `after_step` reads; under ZeRO 3 they must be whole then."""
        return [] if self.teacher is None else self.teacher.students

    @property
    def text_objective(self) -> nn.Module | None:
        """The first image_text objective, whose state exports hold beside the encoder; None without one."""
        return next((objective for objective in self.objectives.values() if isinstance(objective, ImageText)), None)

    def _get_extra_state(self) -> dict[str, Tensor]:
        averages = {} if self.teacher is None else self.teacher.get_state()
        centres = {f"{name}.value": module.value for name, module in self.named_modules() if isinstance(module, Centre)}
        return {f"teacher.{name}": tensor for name, tensor in averages.items()} | centres

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take the teacher along wherever the module tree goes (`to`)."""
        if self.teacher is not None:
            self.teacher.apply(fn)
        super()._apply(fn, recurse)
        return self


def build_pretraining_model(
    vit: Vit,
    objectives: Sequence[ObjectiveConfig],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    teachers: Mapping[str, Teacher],
    local_views: Sequence[int] = (),
    length: RunLength | None = None,
    seed: int = 0,
) -> PretrainingModel:
    """Put the objectives on the encoder.

    image_size: side of the views in pixels, for which teachers are asked about their grid and width.
    mean, std: of the pixel values in [0, 1], by channel.
    teachers: one for each address of `get_teacher_addresses`, on the device of the run.
    local_views: numbers of the small views in Batch.views, for self-distillation.
    length: of the run; needed where an objective has an EMA teacher.
    seed: of the heads' initial weights; the global random state is left as it was.
    Raises UserError where sizes do not fit together.
    """
    get_mask_config(objectives)  # masks that disagree are an error here too
    normalise = PixelNormaliser(mean, std)
    ema = get_ema_config(objectives)
    assert ema is None or length is not None, "an EMA teacher has a schedule, which needs the length of the run"
    teacher = None if ema is None or length is None else EmaTeacher(ema, length.num_steps)
    modules: dict[str, nn.Module] = {}
    weights: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for config in objectives:
            name = _name_objective(config, taken=modules)
            weights[name] = config.weight
            if isinstance(config, ContrastiveConfig):
                modules[name] = Contrastive(config, vit.embed_dim)
            elif isinstance(config, ImageTextConfig):
                modules[name] = ImageText(config, vit.embed_dim)
            elif isinstance(config, SelfDistillationConfig):
                assert teacher is not None and length is not None
                modules[name] = SelfDistillation(
                    config,
                    vit.embed_dim,
                    has_cls=vit.cls_token is not None,
                    local_views=local_views,
                    teacher=teacher,
                    name=f"objectives.{name}",
                    global_batch_size=length.global_batch_size,
                )
            else:
                modules[name] = _build_masked_image(vit, config, image_size, normalise, teachers)
    return PretrainingModel(vit, modules, weights, normalise, teacher)


def _build_masked_image(
    vit: Vit,
    config: MaskedImageConfig,
    image_size: int,
    normalise: PixelNormaliser,
    teachers: Mapping[str, Teacher],
) -> nn.Module:
    grid, patch_size, input_dim = get_patch_grid(vit), vit.patch_embed.patch_size, vit.embed_dim
    predictor, target = config.predictor, config.target
    width = predictor.width or input_dim
    num_heads = predictor.num_heads or max(1, width // 64)
    if width % num_heads or width % 4:
        raise UserError(
            f"objectives: predictor.width ({width}) must be a multiple of 4 and of predictor.num_heads ({num_heads}); "
            f"try {-(-width // (4 * num_heads)) * 4 * num_heads}"
        )
    if isinstance(target, PixelTargetConfig):
        values = 3 * patch_size[0] * patch_size[1]
        decoder = Decoder(input_dim, width, predictor.depth, num_heads, values, grid)
        return MaskedPixels(decoder, patch_size, normalise, patch_normalise=target.normalise)
    regressor = Regressor(input_dim, width, predictor.depth, num_heads, predictor.layer_scale, grid)
    has_cls = vit.cls_token is not None
    if isinstance(target, EmaTeacherConfig):
        if target.num_blocks > len(vit.blocks):
            raise UserError(
                f"objectives: target.num_blocks ({target.num_blocks}) must not exceed the encoder's {len(vit.blocks)} "
                f"blocks; try {max(1, len(vit.blocks) // 2)}"
            )
        head, targets = TokenHead(width, input_dim), EmaTargets(target.num_blocks)
        return MaskedLatents(regressor, head, targets, has_cls=has_cls, tokens=target.tokens, loss=target.loss)
    teacher = teachers[target.address]
    with torch.inference_mode():
        probe = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=getattr(teacher, "device", "cpu"))
        tokens, feature = teacher.forward_tokens_and_feature(probe)  # a CNN's map is often narrower than its feature
    with_feature = target.feature_weight > 0
    return MaskedLatents(
        regressor,
        TokenHead(width, tokens.shape[-1]),
        FrozenTargets(teacher, grid, target.normalise, with_feature),
        has_cls=has_cls,
        feature_head=TokenHead(input_dim, feature.shape[-1]) if with_feature else None,
        feature_weight=target.feature_weight,
    )


def _name_objective(config: ObjectiveConfig, taken: Mapping[str, nn.Module]) -> str:
    """A name for metrics: what it does, numbered from the second of its kind on."""
    if isinstance(config, MaskedImageConfig):
        name = f"{config.kind}_{config.target.kind}"
    elif isinstance(config, ContrastiveConfig):
        name = f"{config.kind}_{config.positives}"
    elif isinstance(config, ImageTextConfig):
        name = f"{config.kind}_{config.loss}"
    else:
        name = config.kind
    count = sum(other == name or other.startswith(f"{name}_") for other in taken)
    return f"{name}_{count + 1}" if count else name
