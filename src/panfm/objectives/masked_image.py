"""Masked image modelling: hide patches, encode the visible ones, predict what the hidden ones hold.

    EncodedView  ->  Decoder               ->  hidden pixels   against  compute_pixel_targets  ->  mean squared error
                 ->  Regressor, TokenHead  ->  tokens          against  a frozen teacher's     ->  1 - cosine
                                                               against  the EMA teacher's      ->  that or smooth L1

Losses run in float32 whatever the autocast.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class
from panfm.data.batch import Batch
from panfm.data.masking import MaskConfig
from panfm.models.heads import Decoder, Regressor, TokenHead
from panfm.models.vit import TokenSplit, take_tokens
from panfm.objectives.interface import EncodedView, Metric, ObjectiveOutput, ViewKey, compute_modality_losses
from panfm.objectives.targets import (
    EmaTargets,
    EmaTeacherConfig,
    FrozenTargets,
    FrozenTeacherConfig,
    PixelTargetConfig,
    TeacherTargets,
    compute_pixel_targets,
    widen,
)

TargetConfig = Annotated[PixelTargetConfig | FrozenTeacherConfig | EmaTeacherConfig, Field(discriminator="kind")]


@config_class
class PredictorConfig:
    """What predicts the target from the visible tokens: MAE's decoder for pixels, CAE v2's regressor for latents."""

    depth: int = Field(default=4, ge=1)
    """Number of blocks. MAE uses 8 and CAE v2 4; fewer cost less and leave more of the work to the encoder."""
    width: int | None = Field(default=None, ge=4)
    """Width of its tokens; None: the encoder's (CAE v2). MAE uses 512. A multiple of 4 and of num_heads."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; None: one for each 64 of the width."""
    layer_scale: float = Field(default=0.1, gt=0.0)
    """Initial factor of the regressor's residual branches (CAE v2 Base: 0.1); the decoder has none."""


@config_class
class MaskedImageConfig:
    """Hide patches of view 0 and predict them."""

    kind: Literal["masked_image"] = "masked_image"
    weight: float = Field(default=1.0, gt=0.0)
    """Factor of this loss in the sum."""
    mask: MaskConfig = MaskConfig(kind="block", ratio=0.5)
    """What is hidden; the same for all masked objectives of a run, which share one encoding. MAE: random, 0.75."""
    target: TargetConfig
    """What is predicted."""
    predictor: PredictorConfig = PredictorConfig()
    """What predicts it."""


class MaskedPixels(nn.Module):
    """MAE (He et al., CVPR 2022): mean squared error of hidden patches.

    loss = sum over hidden patches of mean((prediction - target)^2) / number of hidden patches in the batch
    """

    view_keys = (ViewKey(view=0, masked=True),)

    def __init__(
        self,
        decoder: Decoder,
        patch_size: tuple[int, int],
        pixel_normalise: Callable[[Tensor], Tensor],
        *,
        patch_normalise: bool,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.patch_size = patch_size
        self.pixel_normalise = pixel_normalise
        self.patch_normalise = patch_normalise

    def forward(self, views: tuple[EncodedView, ...], batch: Batch) -> ObjectiveOutput:
        """One encoded view -> loss; without a hidden patch the loss is 0, with its gradient path in place."""
        (view,) = views
        assert view.split is not None, "masked_image needs masks in the batch"
        with torch.no_grad():
            targets = compute_pixel_targets(
                view.images,
                view.split.hidden,
                self.patch_size,
                self.pixel_normalise,
                patch_normalise=self.patch_normalise,
            )
        predictions = self.decoder(view.tokens, view.split)  # [B, H, p * p * 3]
        with torch.autocast(predictions.device.type, enabled=False):
            # Every image hides the same number of patches, so the mean over images is the mean over hidden patches.
            squares = F.mse_loss(widen(predictions), targets, reduction="none")  # [B, H, p * p * 3]
            losses = squares.flatten(1).sum(dim=1) / max(1, targets[0].numel())  # [B]
            loss = losses.mean()
        return ObjectiveOutput(loss, {"loss": loss.detach(), **compute_modality_losses(losses, batch.modalities)})


class MaskedLatents(nn.Module):
    """Predict the tokens of a teacher that sees the whole view.

        loss = mean over the batch and over the tokens of  1 - cos(prediction, target)  or of the mean smooth L1 error

    A frozen teacher, cosine, all tokens [CLS, visible, hidden]: CAE v2 (Zhang et al., TMLR 2023) and PanDerm. The
    student's own average, smooth L1, hidden tokens: data2vec (Baevski et al., ICML 2022), with the hidden patches left
    out of the encoder and a regressor behind it in place of mask tokens inside.

    CLS is aligned with the teacher's CLS or, where it has none (a CNN), with the mean of its map, and counts as one
    token. A student without CLS aligns its patches only.

    feature_head, feature_weight: of a further term, feature_weight * mean(1 - cos(prediction, pooled feature)), whose
    prediction is made of the mean of the visible patches (`FrozenTeacherConfig.feature_weight`).
    """

    def __init__(
        self,
        regressor: Regressor,
        head: TokenHead,
        targets: FrozenTargets | EmaTargets,
        *,
        has_cls: bool,
        tokens: Literal["hidden", "all"] = "all",
        loss: Literal["cosine", "smooth_l1"] = "cosine",
        feature_head: TokenHead | None = None,
        feature_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.regressor = regressor
        self.head = head
        self.targets = targets  # no module: a teacher in it is not trained, wrapped, moved or saved
        self.view_keys = targets.view_keys
        self.has_cls = has_cls
        self.tokens = tokens
        self.loss = loss
        self.feature_head = feature_head
        self.feature_weight = feature_weight

    def forward(self, views: tuple[EncodedView, ...], batch: Batch) -> ObjectiveOutput:
        """The views of `view_keys` -> loss, and the mean cosine of whole image, visible and hidden tokens.

        Without a token to predict the loss is 0, with its gradient path in place.
        """
        view = views[0]
        split = view.split
        assert split is not None, "masked_image needs masks in the batch"
        targets = self.targets.compute(views)
        tokens = self.regressor(view.tokens, split)  # [B, prefix + visible + hidden, width]
        if self.tokens == "hidden":
            tokens = tokens[:, view.tokens.shape[1] :]
        elif view.num_prefix > self.has_cls:  # registers have no target
            tokens = torch.cat([tokens[:, : int(self.has_cls)], tokens[:, view.num_prefix :]], dim=1)
        predictions = self.head(tokens)  # [B, cls + visible + hidden, D], or [B, hidden, D]
        with torch.autocast(predictions.device.type, enabled=False):
            predictions, expected = widen(predictions), self._arrange(targets, split)
            if self.loss == "cosine":
                cosines = F.cosine_similarity(predictions, expected, dim=-1)
                errors = 1 - cosines
            else:
                cosines = F.cosine_similarity(predictions.detach(), expected, dim=-1)
                errors = F.smooth_l1_loss(predictions, expected, reduction="none").mean(dim=-1)
            losses = errors.sum(dim=1) / max(1, errors.shape[1])  # [B]; every image has the same number of tokens
            metrics: dict[str, Metric] = self._describe(cosines.detach(), split)
            if self.feature_head is not None:
                similarity = self._compare_features(view, targets)  # [B]
                losses = losses + self.feature_weight * (1 - similarity)
                metrics["cosine_feature"] = similarity.detach().mean()
            loss = losses.mean()
        metrics = {"loss": loss.detach(), **metrics}
        if isinstance(self.targets, EmaTargets):  # about 1; towards 0 all places of all images look alike to it
            metrics["target_std"] = targets.patches.flatten(0, 1).std(dim=0, correction=0).mean()
        return ObjectiveOutput(loss, {**metrics, **compute_modality_losses(losses, batch.modalities)})

    def _arrange(self, targets: TeacherTargets, split: TokenSplit) -> Tensor:
        """Targets in the order of the predictions: [CLS, visible, hidden], or hidden alone."""
        if self.tokens == "hidden":
            return take_tokens(targets.patches, split.hidden)
        patches = take_tokens(targets.patches, torch.cat([split.visible, split.hidden], dim=1))
        return torch.cat([targets.whole.unsqueeze(1), patches], dim=1) if self.has_cls else patches

    def _compare_features(self, view: EncodedView, targets: TeacherTargets) -> Tensor:
        """Cosine [B] of the feature that is predicted from the mean of the visible patches and the teacher's."""
        assert self.feature_head is not None and targets.feature is not None
        feature = widen(view.tokens[:, view.num_prefix :]).mean(dim=1, keepdim=True)  # [B, 1, D]
        return F.cosine_similarity(self.feature_head(feature)[:, 0], targets.feature, dim=-1)

    def _describe(self, cosines: Tensor, split: TokenSplit) -> dict[str, Metric]:
        """Mean cosine by kind of token; a kind that the config leaves without tokens has no entry."""
        sizes = [int(self.has_cls), split.visible.shape[1], split.hidden.shape[1]]
        if self.tokens == "hidden":
            sizes[:2] = 0, 0
        parts = zip(("cosine_cls", "cosine_visible", "cosine_hidden"), cosines.split(sizes, dim=1), strict=True)
        return {name: part.mean() for name, part in parts if part.shape[1]}
