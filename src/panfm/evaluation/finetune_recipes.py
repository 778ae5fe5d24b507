"""Settings of a fine-tuning, and the recipes, each of which changes a few: what a config names and a Result holds."""

import copy
from typing import Any, Literal

from pydantic import Field

from panfm.config import config_class, to_plain, validate
from panfm.data.transforms import Scale
from panfm.errors import UserError
from panfm.evaluation.finetune_network import Trained

# What a shipped recipe changes. LoRA's factors begin at nothing and are few: they take a higher rate, and no decay.
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"train": "lora", "base_lr": 2e-3, "layer_decay": 1.0, "weight_decay": 0.0},
    "last_blocks": {"train": "last_blocks"},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "sampler": {"balance": "sampler"},
    "tta": {"test_views": 8},
}


@config_class
class FinetuneConfig:
    """Settings of fine-tuning."""

    variants: tuple[str, ...] = ("default",)
    """Recipes to measure, a section on the board each: default = the settings below, else a name in `recipes`."""
    recipes: dict[str, dict[str, Any]] = Field(default_factory=lambda: copy.deepcopy(RECIPES))
    """Name -> what the recipe changes of the settings below: {lora: {train: lora, base_lr: 2.0e-3}}."""
    epochs: int = Field(default=15, ge=1)
    """Passes over the labelled images; fixed, nothing is picked on held-out images."""
    batch_size: int = Field(default=32, ge=1)
    """Images a step."""
    train: Trained = "full"
    """full = every weight; lora = a low-rank change of the projections (of a CNN's convolutions), merged for scoring;
    last_blocks = the last blocks alone. The head learns in each."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank of that change; the lower, the fewer numbers are learned."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """The change counts alpha / rank times, so that another rank needs no other rate."""
    num_last_blocks: int = Field(default=2, ge=1)
    """Blocks that learn with last_blocks, counted as timm counts layers."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """rmsprop = TensorFlow's, with the constants of Esteva et al. 2017."""
    base_lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate of the head and the last layer."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Each layer below the head learns at this share of the rate of the one above: early layers are already general."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decay of the weights: AdamW's decoupled one, rmsprop's as L2; none on norms and biases."""
    schedule: Literal["cosine", "staircase"] = "cosine"
    """After the warm-up: half a cosine to zero, or a 16th every 30 epochs (Esteva et al. 2017)."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Linear warm-up of the rate."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradient clipping by global norm; null = none."""
    batch_norm: Literal["frozen", "trained"] = "frozen"
    """frozen = batch norms keep the statistics of the pretraining: small batches of few images would spoil them.
    trained = they follow the batches; for large batches, and for random weights, which have no statistics."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of residual branches that are left out at random, in the last block; less in those before it."""
    mixup: float = Field(default=0.0, ge=0)
    """Mean of two images, their share from Beta(mixup, mixup); 0 = off."""
    cutmix: float = Field(default=0.0, ge=0)
    """A rectangle of one image in the other, its share from Beta(cutmix, cutmix); 0 = off. With both: either."""
    balance: Literal["none", "loss", "sampler"] = "none"
    """loss = weights of 1 / (images of the class); sampler = classes drawn equally often; none = calibrated scores."""
    head: Literal["linear_probe", "zero"] = "linear_probe"
    """How the head starts: as the linear probe on the frozen features, or at zero."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto = bf16 autocast on a GPU that has it, else fp32; bf16 also halves the time on CPUs with AVX512-BF16."""
    crop_scale: Scale = (0.5, 1.0)
    """Area share of the random crops. Light: a lesion must not leave the picture."""
    test_views: Literal[1, 8] = 1
    """8 = scores are the mean over an image's four turns and their mirror images: eight times the time of scoring."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode and augment; 0 = in this process. Scores do not depend on it."""


def resolve_recipe(config: FinetuneConfig, variant: str) -> FinetuneConfig:
    """Return the settings of one variant, without recipes of its own.

    Raises UserError for a variant that is not among the recipes, and for a setting that a recipe gets wrong.
    """
    if variant != "default" and variant not in config.recipes:
        known = ", ".join(["default", *config.recipes])
        raise UserError(f"finetune.variants ({variant}): no such recipe; known: {known}; add it to finetune.recipes")
    changes = {} if variant == "default" else config.recipes[variant]
    inner = sorted({"variants", "recipes"} & set(changes))
    if inner:
        raise UserError(f"finetune.recipes.{variant}: a recipe has no {inner[0]} of its own; name plain settings")
    values = {**to_plain(config), "variants": [variant], "recipes": {}, **changes}
    return validate(FinetuneConfig, values, where=f"finetune.recipes.{variant}")


def describe_recipe(config: FinetuneConfig, variant: str) -> dict[str, Any]:
    """The settings of one variant as plain values, `variant` among them: what a Result holds as its recipe."""
    settings: dict[str, Any] = to_plain(resolve_recipe(config, variant))
    del settings["variants"], settings["recipes"]
    return {**settings, "variant": variant}
