"""The encoder as a module: a timm model without its classifier, with one stated pooling.

In: normalised images, float [B, 3, S, S]. Out: one feature an image [B, D] (evaluation), or one a place and the class
token before them, [B, cls + N, C] (the targets of a frozen teacher). Two families: token models (ViT, EVA, BEiT: prefix
tokens, then the patches) and feature maps (CNNs and pyramids: their own global average, and the stride-16 map as
places).
"""

from collections.abc import Callable
from typing import cast, get_args

import torch
from torch import Tensor, nn

from panfm.encoder.facts import Pooling
from panfm.errors import UserError

TEACHER_STRIDE = 16  # pixels a place of a feature map: the patch size of the students that learn from it
_TIMM_POOLING: dict[str, Pooling] = {"token": "cls", "avg": "mean", "map": "map"}


class EncoderNetwork(nn.Module):
    """A timm model (num_classes=0) and how its output becomes a feature.

    pooling of a token model: cls = the class token; mean = the mean of the patch tokens; cls_mean = both, concatenated;
    map = the model's own attention pooling. Always after the final norm. None takes what the model was published with.
    A feature map is pooled by its own head: mean.
    """

    def __init__(self, model: nn.Module, pooling: Pooling | None, where: str) -> None:
        super().__init__()
        self.model = model
        self.is_token_model = hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")
        self.pooling: Pooling = _resolve_pooling(model, pooling, self.is_token_model, where)
        self.where = where

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features: images float [B, 3, S, S] -> [B, D]."""
        if not self.is_token_model:
            return self.model(images)  # type: ignore[no-any-return]
        return self._pool(self.model.forward_features(images))  # type: ignore[operator]

    def _pool(self, tokens: Tensor) -> Tensor:
        """Tokens as the model gives them, [B, P + N, C] -> features [B, D]."""
        if self.pooling == "map":
            return self.model.forward_head(tokens, pre_logits=True)  # type: ignore[operator, no-any-return]
        cls_token, patches = tokens[:, 0], tokens[:, self.num_prefix_tokens :]
        norm = self.norm_behind_pooling
        if self.pooling == "cls":
            return norm(cls_token)
        if self.pooling == "mean":
            return norm(patches.mean(dim=1))
        return torch.cat([norm(cls_token), norm(patches.mean(dim=1))], dim=-1)  # [B, 2C]

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Return one feature a place: images float [B, 3, S, S] -> [B, h * w, C], row by row.

        Where the model has a class token, it comes first: [B, 1 + h * w, C]. Registers are left out: they stand for
        nothing that a student could align with.
        """
        if self.is_token_model:
            return self._select(self.model.forward_features(images))  # type: ignore[operator]
        (feature_map,) = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self._stride_index()], output_fmt="NCHW", intermediates_only=True, stop_early=True
        )  # [B, C, h, w]
        return feature_map.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def forward_tokens_and_feature(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward_tokens` and what `forward` do, for the cost of one pass."""
        if self.is_token_model:
            tokens = self.model.forward_features(images)  # type: ignore[operator]
            return self._select(tokens), self._pool(tokens)
        final, (feature_map,) = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self._stride_index()], output_fmt="NCHW"
        )
        return feature_map.flatten(2).transpose(1, 2), self.model.forward_head(final)  # type: ignore[operator]

    def _select(self, tokens: Tensor) -> Tensor:
        """Tokens as the model gives them, [B, P + N, C] -> class token and places, normalised."""
        tokens = torch.cat([tokens[:, : int(self.has_cls)], tokens[:, self.num_prefix_tokens :]], dim=1)
        # Models with the norm behind the pooling leave their tokens unnormalised, and a target must not be.
        return self.norm_behind_pooling(tokens)

    @property
    def norm_behind_pooling(self) -> Callable[[Tensor], Tensor]:
        """Identity, unless the model was published with its final norm behind the pooling."""
        return cast(Callable[[Tensor], Tensor], getattr(self.model, "fc_norm", nn.Identity()))

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token, registers."""
        return int(self.model.num_prefix_tokens)  # type: ignore[arg-type]

    @property
    def has_cls(self) -> bool:
        """Whether its tokens begin with a class token."""
        return self.is_token_model and getattr(self.model, "cls_token", None) is not None

    @property
    def num_tokens(self) -> int:
        """Length of the sequence that attention sees; 0 for feature maps, whose windows are short."""
        if not self.is_token_model:
            return 0
        return self.num_prefix_tokens + int(self.model.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]

    def _stride_index(self) -> int:
        levels = [level["reduction"] for level in _get_levels(self.model)]
        if TEACHER_STRIDE not in levels or not hasattr(self.model, "forward_intermediates"):
            raise UserError(
                f"{self.where}: {type(self.model).__name__} gives no feature map of stride {TEACHER_STRIDE} (it has "
                f"{levels}), so it cannot be a teacher; take a ViT, or a CNN such as tf_efficientnet_lite0 or resnet50"
            )
        return levels.index(TEACHER_STRIDE)


def _get_levels(model: nn.Module) -> list[dict[str, int]]:
    info = getattr(model, "feature_info", [])
    return list(info.info) if hasattr(info, "info") else list(info)


def _resolve_pooling(model: nn.Module, pooling: Pooling | None, is_token_model: bool, where: str) -> Pooling:
    if not is_token_model:
        if pooling not in (None, "mean"):
            raise UserError(f"{where}: pooling ({pooling}) must be mean: {type(model).__name__} has no tokens to pool")
        return "mean"
    published = "map" if getattr(model, "attn_pool", None) is not None else str(model.global_pool)
    if pooling is None:
        if published not in _TIMM_POOLING:
            raise UserError(
                f"{where}: its pooling {published} is not read; name one: ?pooling={'|'.join(get_args(Pooling))}"
            )
        pooling = _TIMM_POOLING[published]
    if pooling == "map" and published != "map":
        raise UserError(
            f"{where}: pooling (map) needs a model with attention pooling, which this is not; try pooling=mean"
        )
    if pooling in ("cls", "cls_mean") and getattr(model, "cls_token", None) is None:
        raise UserError(f"{where}: pooling ({pooling}) needs a class token, which this model has not; try pooling=mean")
    return pooling
