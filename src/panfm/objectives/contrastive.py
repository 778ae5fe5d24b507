"""Contrastive learning: images that belong together are pulled together, all others pushed apart.

    EncodedViews  ->  mean patch token  ->  ProjectionHead  ->  embeddings, gathered over ranks  ->  InfoNCE

Positives are the views of one image (NT-Xent) or all images of one lesion, whatever their modality. Other images of the
same patient are neither positives nor negatives: calling them different would be wrong as often as it is right.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class
from panfm.data.batch import NO_GROUP, Batch
from panfm.distributed import all_reduce_mean, gather_with_gradient, get_rank, get_world_size
from panfm.models.heads import ProjectionHead
from panfm.objectives.interface import EncodedView, Metric, ObjectiveOutput, ViewKey, compute_modality_losses
from panfm.objectives.targets import widen
from panfm.objectives.temperature import MAX_SCALE, bound_log_scale


@config_class
class ContrastiveConfig:
    """Contrast images by InfoNCE."""

    kind: Literal["contrastive"] = "contrastive"
    weight: float = Field(default=1.0, gt=0.0)
    """Factor of this loss in the sum."""
    positives: Literal["views", "lesion"] = "views"
    """views: the two views of one image (SimCLR's NT-Xent). lesion: also other images of the same lesion, which the
    mixture should then draw together."""
    across_visits: bool = False
    """Whether images of a lesion from different visits are positives too. Off, since it trains change away, which is
    what follow-up looks for; such pairs are then left out like other images of the patient."""
    num_views: Literal[1, 2] = 2
    """Views of each image that take part. 1 halves the cost; an image without a mate in the batch has no positive."""
    visible_only: bool = True
    """Where the run hides patches, contrast encodings of the visible ones: cheaper, and view 0 is shared with
    masked_image. Otherwise whole views are encoded for this objective alone."""
    temperature: float = Field(default=0.1, ge=1 / MAX_SCALE)
    """Divides the cosines, or starts to."""
    learnable_temperature: bool = True
    """Whether the temperature is trained (its inverse in the logarithm, as in CLIP), not below 0.01."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the hidden layer of the projection head."""
    output_dim: int = Field(default=128, ge=1)
    """Width of the embeddings that are compared (SimCLR: 128)."""


@dataclass(frozen=True)
class Groups:
    """What each of N embeddings shows: int64 [N] each, NO_GROUP where unknown."""

    images: Tensor
    lesions: Tensor
    patients: Tensor
    visits: Tensor


@dataclass(frozen=True)
class InfoNCE:
    """A contrastive loss and how much of the batch it is about."""

    loss: Tensor  # this rank's part: the mean over ranks is the loss of the whole batch
    losses: Tensor  # [N] of this rank's embeddings, 0 without a positive
    has_positive: Tensor  # bool [N]; the others are negatives only


def compute_info_nce(
    embeddings: Tensor,
    groups: Groups,
    log_scale: Tensor,
    *,
    positives: Literal["views", "lesion"],
    across_visits: bool = False,
) -> InfoNCE:
    """InfoNCE with several positives, over the embeddings [N, D] of all ranks (N alike on each), in float32 or wider.

        s_ij = exp(log_scale) * cos(z_i, z_j)
        loss_i = mean over positives p of i of  -s_ip + log sum over a (not i, not ignored) of exp(s_ia)
        loss = mean of loss_i over all i, on all ranks, that have a positive; 0 if none has

    Positives of i: other views of its image; with positives="lesion" also images of its lesion at its visit (at any
    visit with `across_visits`; unknown visits count as one). Ignored: every other image of its lesion or its patient.
    All positives stay in the denominator. With two views an image and no known groups this is NT-Xent (Chen et al.,
    ICML 2020); otherwise the L_out of Khosla et al., NeurIPS 2020. lightly's NTXentLoss knows neither groups nor a
    learnable temperature; where it applies, the numbers are the same.

    Each rank computes its own rows; gradients through the gathered columns are exact under the averaging of parameter
    gradients that DDP and DeepSpeed do. Without a positive the loss is 0 with its gradient path in place.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(widen(embeddings), dim=1)  # [N, D]
        columns = gather_with_gradient(z)  # [world_size * N, D]
        own = torch.stack([groups.images, groups.lesions, groups.patients, groups.visits], dim=1)  # [N, 4]
        pairs = own.unsqueeze(1) == gather_with_gradient(own).unsqueeze(0)  # [N, world_size * N, 4]
        known = (own != NO_GROUP).unsqueeze(1)
        same_image, same_lesion, same_patient = pairs[..., 0], (pairs & known)[..., 1], (pairs & known)[..., 2]

        rows = torch.arange(len(z), device=z.device)
        itself = torch.zeros_like(same_image)
        itself[rows, rows + get_rank() * len(z)] = True
        positive = same_image
        if positives == "lesion":
            positive = positive | (same_lesion if across_visits else same_lesion & pairs[..., 3])
        positive = positive & ~itself
        ignored = (same_image | same_lesion | same_patient) & ~positive  # `itself` is among them
        num_positives = positive.sum(dim=1)
        is_anchor = num_positives > 0

        logits = z @ columns.T * widen(log_scale).exp()  # [N, world_size * N]
        # A row without a positive may have nothing left but ignored columns, whose logsumexp has no gradient: such rows
        # are left as they are and weighted by zero.
        log_sums = logits.masked_fill(ignored & is_anchor.unsqueeze(1), -torch.inf).logsumexp(dim=1)
        attraction = (logits * positive).sum(dim=1) / num_positives.clamp(min=1)
        losses = (log_sums - attraction) * is_anchor  # [N]
        mean_num_anchors = all_reduce_mean(is_anchor.sum().to(losses.dtype))  # over ranks
        loss = losses.sum() / mean_num_anchors.clamp(min=1 / get_world_size())
    return InfoNCE(loss, losses, is_anchor)


class Contrastive(nn.Module):
    """InfoNCE between the views of images, or between the images of lesions; see `compute_info_nce`."""

    def __init__(self, config: ContrastiveConfig, input_dim: int) -> None:
        super().__init__()
        self.positives = config.positives
        self.across_visits = config.across_visits
        self.view_keys = tuple(ViewKey(view, masked=config.visible_only) for view in range(config.num_views))
        self.head = ProjectionHead(input_dim, config.hidden_dim, config.output_dim)
        # One element rather than none: ZeRO flattens parameters and some of its paths want a dimension.
        self.log_scale = nn.Parameter(
            torch.full((1,), -math.log(config.temperature)), requires_grad=config.learnable_temperature
        )

    def forward(self, views: tuple[EncodedView, ...], batch: Batch) -> ObjectiveOutput:
        """Encoded views of one batch -> loss, temperature, share of embeddings that had a positive."""
        return self.compare(self.represent(views, batch), batch)

    def represent(self, views: tuple[EncodedView, ...], batch: Batch) -> Tensor:
        """What is compared: the projected mean patch token of every view [num_views, B, output_dim]."""
        return torch.stack([self.head(view.pooled) for view in views])

    def compare(self, embeddings: Tensor, batch: Batch) -> ObjectiveOutput:
        """Compare the embeddings [num_views, B, output_dim] of a batch, of which only the numbers are looked at."""
        num_views, embeddings = len(embeddings), embeddings.flatten(0, 1)  # [num_views * B, output_dim], view by view
        ids = (batch.positions, batch.lesions, batch.patients, batch.visits)
        groups = Groups(*(values.repeat(num_views) for values in ids))
        log_scale = bound_log_scale(self.log_scale)
        result = compute_info_nce(
            embeddings, groups, log_scale, positives=self.positives, across_visits=self.across_visits
        )
        modalities = batch.modalities.repeat(num_views)
        metrics: dict[str, Metric] = {
            "loss": result.loss.detach(),
            "share_with_positive": result.has_positive.to(result.loss.dtype).mean(),
            "temperature": torch.exp(-log_scale.detach()).squeeze(0),
            **compute_modality_losses(result.losses, modalities, counted=result.has_positive),
        }
        return ObjectiveOutput(result.loss, metrics)
