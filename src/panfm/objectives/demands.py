"""What a list of objectives asks of the data and of the model: masks, views, teachers, captions, whole batches.

    objectives of a config  ->  its one mask, its one EMA teacher, addresses of teachers, number of views, ...

Objectives that ask for different things, of which a run has one, are a UserError.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from panfm.data.captions import TokenizerConfig
from panfm.data.masking import MaskConfig
from panfm.errors import UserError
from panfm.objectives.contrastive import ContrastiveConfig
from panfm.objectives.ema import EmaConfig
from panfm.objectives.image_text import ImageTextConfig
from panfm.objectives.masked_image import MaskedImageConfig
from panfm.objectives.self_distillation import NUM_GLOBAL, SelfDistillationConfig
from panfm.objectives.targets import EmaTeacherConfig, FrozenTeacherConfig

ObjectiveConfig = Annotated[
    MaskedImageConfig | SelfDistillationConfig | ContrastiveConfig | ImageTextConfig, Field(discriminator="kind")
]


def get_mask_config(objectives: Sequence[ObjectiveConfig]) -> MaskConfig | None:
    """The mask that the loader draws for these objectives, None if none hides patches; different ones are an error."""
    masks: dict[MaskConfig, str] = {}
    for config in objectives:
        if isinstance(config, ContrastiveConfig | ImageTextConfig):
            continue
        if isinstance(config, SelfDistillationConfig) and config.mask is None:
            if config.ibot_weight:
                raise UserError(
                    f"objectives: self_distillation with ibot_weight {config.ibot_weight} predicts hidden patches, and "
                    "its mask is null; give it a mask, or set ibot_weight: 0"
                )
            continue
        assert config.mask is not None
        masks.setdefault(config.mask, config.kind)
    if len(masks) > 1:
        (first, name), (second, other) = list(masks.items())[:2]
        raise UserError(
            f"objectives: {name} has the mask {first} and {other} has {second}; all must be the same, because the "
            "views of a batch have one mask each: give both the same mask section"
        )
    return next(iter(masks), None)


def get_ema_config(objectives: Sequence[ObjectiveConfig]) -> EmaConfig | None:
    """How the EMA teacher of these objectives follows, None if none has one; different ways are an error."""
    configs = [config.ema for config in objectives if isinstance(config, SelfDistillationConfig)]
    targets = [config.target for config in objectives if isinstance(config, MaskedImageConfig)]
    configs += [target.ema for target in targets if isinstance(target, EmaTeacherConfig)]
    for config in configs[1:]:
        if config != configs[0]:
            raise UserError(
                f"objectives: one teacher follows with {configs[0]}, another with {config}; a run has one teacher: "
                "give both the same ema section"
            )
    return configs[0] if configs else None


def get_teacher_addresses(objectives: Sequence[ObjectiveConfig]) -> tuple[str, ...]:
    """Encoder addresses of the frozen teachers, each once, in the order of the config."""
    targets = [config.target for config in objectives if isinstance(config, MaskedImageConfig)]
    return tuple(dict.fromkeys(target.address for target in targets if isinstance(target, FrozenTeacherConfig)))


def get_tokenizer_config(objectives: Sequence[ObjectiveConfig]) -> TokenizerConfig | None:
    """How the loader makes token ids of captions, None if no objective reads them; two ways are an error."""
    lengths = sorted({config.text.context_length for config in objectives if isinstance(config, ImageTextConfig)})
    if len(lengths) > 1:
        raise UserError(
            f"objectives: image_text has text.context_length {lengths[0]} and {lengths[1]}; all must be the same, "
            "because a batch holds its captions once: give both the same"
        )
    return TokenizerConfig(context_length=lengths[0]) if lengths else None


def get_num_views(objectives: Sequence[ObjectiveConfig]) -> int:
    """How many views of each image the objectives look at, local ones aside: the least that `augment.views` may be."""
    return max(_count_views(config) for config in objectives)


def takes_local_views(objectives: Sequence[ObjectiveConfig]) -> bool:
    """Whether an objective looks at local views; else drawing them (`augment.local_views`) is for nothing."""
    return any(isinstance(config, SelfDistillationConfig) for config in objectives)


def find_coupling(objectives: Sequence[ObjectiveConfig]) -> str | None:
    """The first part of these objectives that needs all images of a step in one micro batch of each rank, in words.

    None: there is no such part. A running centre adds up over micro batches, and for contrastive and image-text losses
    gradients are cached. Sinkhorn-Knopp and KoLeo compare the images of one pass. (DINOv2 has no accumulation, and
    KoLeo on each rank by itself.)
    """
    for config in objectives:
        if isinstance(config, SelfDistillationConfig):
            if config.centring == "sinkhorn_knopp":
                return "self_distillation with Sinkhorn-Knopp (centring: mean does without)"
            if config.koleo_weight:
                return "self_distillation with KoLeo (koleo_weight: 0 does without)"
    return None


def _count_views(config: ObjectiveConfig) -> int:
    if isinstance(config, SelfDistillationConfig):
        return NUM_GLOBAL
    return config.num_views if isinstance(config, ContrastiveConfig) else 1
