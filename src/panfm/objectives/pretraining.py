"""The one module that DeepSpeed wraps: an encoder and the objectives that train it.

    Batch  ->  each view that an objective asks for, encoded once  ->  objectives  ->  weighted sum of losses, metrics

A frozen teacher hangs on its objective from outside of the module tree: it is not trained, not sharded and not saved.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.data.batch import Batch
from panfm.data.masking import MaskConfig
from panfm.errors import UserError
from panfm.models.heads import Decoder, Regressor, TokenHead
from panfm.models.vit import encode_visible, get_patch_grid, split_mask
from panfm.objectives.contrastive import Contrastive, ContrastiveConfig
from panfm.objectives.interface import EncodedView, ObjectiveOutput, ViewKey
from panfm.objectives.masked_image import MaskedImageConfig, MaskedLatents, MaskedPixels
from panfm.objectives.targets import FrozenTeacherConfig, Teacher

ObjectiveConfig = Annotated[MaskedImageConfig | ContrastiveConfig, Field(discriminator="kind")]

__all__ = [
    "ObjectiveConfig",
    "ObjectiveOutput",
    "PixelNormaliser",
    "PretrainingModel",
    "build_pretraining_model",
    "get_mask_config",
    "get_num_views",
    "get_teacher_addresses",
]


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


class PretrainingModel(nn.Module):
    """Encoder and objectives: forward gives the loss of one micro batch.

    encoder: the timm VisionTransformer whose state_dict is exported.
    Every parameter that requires a gradient gets one in every step, zeros at least: ZeRO and DDP rely on it.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        objectives: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        normalise: PixelNormaliser,
    ) -> None:
        super().__init__()
        self.encoder = vit
        self.objectives = nn.ModuleDict(objectives)
        self.weights = dict(weights)
        self.normalise = normalise

    def forward(self, batch: Batch) -> ObjectiveOutput:
        """Batch on this module's device -> weighted loss (float32 scalar), metrics named objective/metric."""
        encoded: dict[ViewKey, EncodedView] = {}
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            for key in objective.view_keys:  # type: ignore[union-attr]
                if key not in encoded:
                    encoded[key] = self._encode(batch, key)
            output = objective(tuple(encoded[key] for key in objective.view_keys), batch)  # type: ignore[union-attr]
            losses.append(self.weights[name] * output.loss)
            metrics |= {f"{name}/{metric}": value for metric, value in output.metrics.items()}
        return ObjectiveOutput(torch.stack(losses).sum(), metrics)

    def _encode(self, batch: Batch, key: ViewKey) -> EncodedView:
        images = batch.views[key.view]
        split = split_mask(batch.masks[key.view]) if key.masked and batch.masks is not None else None
        tokens = encode_visible(self.encoder, images, split, self.normalise)
        return EncodedView(images, tokens, self.encoder.num_prefix_tokens, split)


def build_pretraining_model(
    vit: VisionTransformer,
    objectives: Sequence[ObjectiveConfig],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    teachers: Mapping[str, Teacher],
    seed: int = 0,
) -> PretrainingModel:
    """Put the objectives on the encoder.

    image_size: side of the views in pixels, for which teachers are asked about their grid and width.
    mean, std: of the pixel values in [0, 1], by channel.
    teachers: one for each address of `get_teacher_addresses`, on the device of the run.
    seed: of the heads' initial weights; the global random state is left as it was.
    Raises UserError where sizes do not fit together.
    """
    get_mask_config(objectives)  # masks that disagree are an error here too
    normalise = PixelNormaliser(mean, std)
    modules: dict[str, nn.Module] = {}
    weights: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for config in objectives:
            name = _name_objective(config, taken=modules)
            weights[name] = config.weight
            if isinstance(config, ContrastiveConfig):
                modules[name] = Contrastive(config, vit.embed_dim)
            else:
                modules[name] = _build_masked_image(vit, config, image_size, normalise, teachers)
    return PretrainingModel(vit, modules, weights, normalise)


def get_mask_config(objectives: Sequence[ObjectiveConfig]) -> MaskConfig | None:
    """The mask that the loader draws for these objectives, None if none hides patches; different ones are an error."""
    masks = [config.mask for config in objectives if isinstance(config, MaskedImageConfig)]
    for mask in masks[1:]:
        if mask != masks[0]:
            raise UserError(
                f"objectives: masked_image has the masks {masks[0]} and {mask}; all must be the same, because they "
                "share one encoding: give both the same mask section"
            )
    return masks[0] if masks else None


def get_teacher_addresses(objectives: Sequence[ObjectiveConfig]) -> tuple[str, ...]:
    """Encoder addresses of the frozen teachers, each once, in the order of the config."""
    targets = [config.target for config in objectives if isinstance(config, MaskedImageConfig)]
    return tuple(dict.fromkeys(target.address for target in targets if isinstance(target, FrozenTeacherConfig)))


def get_num_views(objectives: Sequence[ObjectiveConfig]) -> int:
    """How many views of each image the objectives look at: the least that `augment.views` may be."""
    return max(config.num_views if isinstance(config, ContrastiveConfig) else 1 for config in objectives)


def _build_masked_image(
    vit: VisionTransformer,
    config: MaskedImageConfig,
    image_size: int,
    normalise: PixelNormaliser,
    teachers: Mapping[str, Teacher],
) -> nn.Module:
    grid, patch_size, input_dim = get_patch_grid(vit), vit.patch_embed.patch_size, vit.embed_dim
    predictor = config.predictor
    width = predictor.width or input_dim
    num_heads = predictor.num_heads or max(1, width // 64)
    if width % num_heads or width % 4:
        raise UserError(
            f"objectives: predictor.width ({width}) must be a multiple of 4 and of predictor.num_heads ({num_heads}); "
            f"try {-(-width // (4 * num_heads)) * 4 * num_heads}"
        )
    if not isinstance(config.target, FrozenTeacherConfig):
        values = 3 * patch_size[0] * patch_size[1]
        decoder = Decoder(input_dim, width, predictor.depth, num_heads, values, grid)
        return MaskedPixels(decoder, patch_size, normalise, patch_normalise=config.target.normalise)
    teacher = teachers[config.target.address]
    with torch.inference_mode():
        probe = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=getattr(teacher, "device", "cpu"))
        output_dim = teacher.forward_tokens(probe).shape[-1]  # a CNN's map is often narrower than its features
    return MaskedLatents(
        Regressor(input_dim, width, predictor.depth, num_heads, predictor.layer_scale, grid),
        TokenHead(width, output_dim),
        teacher,
        grid,
        config.target.normalise,
        has_cls=vit.cls_token is not None,
    )


def _name_objective(config: ObjectiveConfig, taken: Mapping[str, nn.Module]) -> str:
    """A name for metrics: what it does, numbered from the second of its kind on."""
    detail = config.positives if isinstance(config, ContrastiveConfig) else config.target.kind
    name = f"{config.kind}_{detail}"
    count = sum(other == name or other.startswith(f"{name}_") for other in taken)
    return f"{name}_{count + 1}" if count else name
