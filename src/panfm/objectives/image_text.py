"""Image and text: each image and its own caption are pulled together, other pairs pushed apart (CLIP, SigLIP).

    EncodedView  ->  mean patch token  ->  linear map  ->  embeddings [B, D]  --.
    Batch.texts  ->  TextTower         ---------------->   embeddings [B, D]  ---> gathered over ranks  ->  loss

Images without a caption take no part. Neither do pairs of which nobody knows that they do not belong together: an image
and the caption of another photograph of its lesion, or a caption that reads exactly like its own.
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
from panfm.models.text import TextConfig, build_text_tower
from panfm.objectives.interface import EncodedView, Mean, Metric, ObjectiveOutput, ViewKey, compute_modality_losses
from panfm.objectives.targets import widen
from panfm.objectives.temperature import MAX_SCALE, bound_log_scale

Loss = Literal["clip", "siglip"]
# What the publications start from: 1 / temperature, and the bias.
INITIAL_TEMPERATURE: dict[Loss, float] = {"clip": 0.07, "siglip": 0.1}
INITIAL_BIAS = -10.0


@config_class
class ImageTextConfig:
    """Contrast images with the captions beside them."""

    kind: Literal["image_text"] = "image_text"
    weight: float = Field(default=1.0, gt=0.0)
    """Factor of this loss in the sum."""
    loss: Loss = "clip"
    """clip: softmax over the batch, in both directions. siglip: each pair is a yes or no by itself, which suffers less
    from small batches and knows a bias."""
    visible_only: bool = False
    """Where the run hides patches, take the encoding of the visible ones, as FLIP does: cheaper, and shared with
    masked_image. Otherwise whole images are encoded, as exports are used."""
    temperature: float | None = Field(default=None, ge=1 / MAX_SCALE, le=1.0)
    """Divides the cosines, at the start; it is trained, between 0.01 and 1. None: 0.07 for clip, 0.1 for siglip."""
    output_dim: int = Field(default=512, ge=1)
    """Width of the embeddings that are compared; that of the weights, where text.init names any."""
    text: TextConfig = TextConfig()
    """The text tower."""


@dataclass(frozen=True)
class Captions:
    """What is known of N images and their captions: int64 [N] each, NO_GROUP where unknown."""

    captions: Tensor  # a number of the text, the same for the same text; NO_GROUP: the image has none
    lesions: Tensor
    patients: Tensor


@dataclass(frozen=True)
class ImageTextLoss:
    """A loss over captioned images, and how they fared, one by one."""

    loss: Tensor  # this rank's part: the mean over ranks is the loss of the whole batch
    losses: Tensor  # [N] of this rank's images, 0 without a caption
    captioned: Tensor  # bool [N]
    found: Tensor  # bool [N]: of all captions that count, the image's own is the nearest


def compute_image_text_loss(
    images: Tensor, texts: Tensor, known: Captions, log_scale: Tensor, bias: Tensor | None = None
) -> ImageTextLoss:
    """Contrast embeddings of images [N, D] and of texts [N, D], row by row a pair, over all ranks (N alike on each).

        s_ij = exp(log_scale) * cos(image_i, text_j)  over captioned i and j
        without a bias, CLIP (Radford et al., ICML 2021):
            loss_i = ( -s_ii + log sum over j of exp(s_ij)  -  s_ii + log sum over j of exp(s_ji) ) / 2
        with one, SigLIP (Zhai et al., ICCV 2023):
            loss_i = sum over j of softplus(-y_ij (s_ij + bias)),  y_ij = 1 for i = j, else -1
        loss = mean of loss_i over all captioned images, on all ranks; 0 if there is none

    A pair i, j is left out of both sums where it may belong together: the captions are the same text (two photographs
    of "melanoma" would be told that each is not one); the images are of one lesion; or of one patient, unless both
    lesions are known and differ. Other lesions of a patient stay: same skin, same camera, another finding is what a
    caption is about. With distinct captions and nothing known these are the originals.

    All in float32 or wider. Each rank computes its own rows; gradients through the gathered columns are exact under the
    averaging of parameter gradients that DDP and DeepSpeed do. Every rank holds its rows of the scores, [N, all N]: the
    chunked variants of the SigLIP paper save memory that is small beside that of the towers, and were left out.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = F.normalize(widen(images), dim=1), F.normalize(widen(texts), dim=1)  # [N, D]
        itself, counts = _relate(known)  # int64 [N, 1]; bool [N, world_size * N]
        captioned = known.captions != NO_GROUP
        scale = widen(log_scale).exp()

        scores = images @ gather_with_gradient(texts).T * scale  # [N, world_size * N]
        if bias is None:
            transposed = texts @ gather_with_gradient(images).T * scale
            # A row always counts itself, so no row of the sums is empty, and none without gradient.
            log_sums = [part.masked_fill(~counts, -torch.inf).logsumexp(dim=1) for part in (scores, transposed)]
            losses = (log_sums[0] + log_sums[1]) / 2 - scores.gather(1, itself).squeeze(1)
        else:
            signs = torch.full_like(scores, -1.0).scatter(1, itself, 1.0)
            losses = (F.softplus(-signs * (scores + widen(bias))) * counts).sum(dim=1)
        losses = losses * captioned
        mean_num_captioned = all_reduce_mean(captioned.sum().to(losses.dtype))  # over ranks
        loss = losses.sum() / mean_num_captioned.clamp(min=1 / get_world_size())

        best = scores.detach().masked_fill(~counts, -torch.inf).argmax(dim=1)
        found = (best == itself.squeeze(1)) & captioned
    return ImageTextLoss(loss, losses.detach(), captioned, found)


def _relate(known: Captions) -> tuple[Tensor, Tensor]:
    """This rank's rows against all ranks' columns: the column of each row's own pair, and which pairs count."""
    own = torch.stack([known.captions, known.lesions, known.patients], dim=1)  # [N, 3]
    every = gather_with_gradient(own)  # [world_size * N, 3]
    known_own, known_every = own != NO_GROUP, every != NO_GROUP
    alike = (own.unsqueeze(1) == every.unsqueeze(0)) & known_own.unsqueeze(1)  # [N, world_size * N, 3]
    same_caption, same_lesion, same_patient = alike.unbind(dim=2)
    lesions_known = known_own[:, 1:2] & known_every[:, 1]
    counts = known_every[:, 0] & ~(same_caption | same_lesion | (same_patient & ~lesions_known))
    itself = torch.arange(len(own), device=own.device).unsqueeze(1) + get_rank() * len(own)
    return itself, counts.scatter(1, itself, True)


class ImageText(nn.Module):
    """CLIP or SigLIP between images and their captions; see `compute_image_text_loss`.

    text, project, log_scale and bias are all that a zero-shot classifier needs beside the encoder.
    """

    def __init__(self, config: ImageTextConfig, input_dim: int) -> None:
        super().__init__()
        self.view_keys = (ViewKey(view=0, masked=config.visible_only),)
        self.text = build_text_tower(config.text, config.output_dim)
        self.project = nn.Linear(input_dim, config.output_dim, bias=False)
        nn.init.normal_(self.project.weight, std=input_dim**-0.5)  # as both towers of CLIP
        # One element rather than none: ZeRO flattens parameters and some of its paths want a dimension.
        temperature = config.temperature or INITIAL_TEMPERATURE[config.loss]
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(temperature)))
        self.bias = nn.Parameter(torch.full((1,), INITIAL_BIAS)) if config.loss == "siglip" else None

    def forward(self, views: tuple[EncodedView, ...], batch: Batch) -> ObjectiveOutput:
        """One encoded view and the batch's texts -> loss, temperature, accuracy of finding an image's own caption."""
        return self.compare(self.represent(views, batch), batch)

    def represent(self, views: tuple[EncodedView, ...], batch: Batch) -> Tensor:
        """What is compared [2, B, output_dim]: the images, then their captions; zeros for an image without one."""
        (view,) = views
        assert batch.captions is not None and batch.texts is not None, "image_text needs texts in the batch"
        images = self.project(view.pooled)
        return torch.stack([widen(images), widen(self._embed_texts(batch.texts, batch.captions != NO_GROUP))])

    def compare(self, embeddings: Tensor, batch: Batch) -> ObjectiveOutput:
        """Compare the embeddings [2, B, output_dim] of a batch, of which only the numbers are looked at."""
        assert batch.captions is not None
        images, texts = embeddings
        log_scale = bound_log_scale(self.log_scale, lowest=0.0)
        known = Captions(batch.captions, batch.lesions, batch.patients)
        result = compute_image_text_loss(images, texts, known, log_scale, self.bias)
        num_captioned = result.captioned.sum().to(result.losses.dtype)
        metrics: dict[str, Metric] = {
            "loss": result.loss.detach(),
            "accuracy": Mean(result.found.sum().to(num_captioned.dtype), num_captioned),
            "share_with_caption": num_captioned / batch.size,
            "temperature": torch.exp(-log_scale.detach()).squeeze(0),
            **compute_modality_losses(result.losses, batch.modalities, result.captioned),
        }
        return ObjectiveOutput(result.loss, metrics)

    def _embed_texts(self, tokens: Tensor, captioned: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, output_dim]; rows without a caption stay zero and cost nothing.

        One row goes through the tower in any case, so that each of its parameters gets a gradient in every step.
        """
        rows = captioned.nonzero().squeeze(1)
        if not len(rows):
            rows = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        embedded: Tensor = self.text(tokens[rows])
        return embedded.new_zeros(len(tokens), embedded.shape[1]).index_copy(0, rows, embedded)
