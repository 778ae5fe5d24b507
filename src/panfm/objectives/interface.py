"""What passes between the pretraining model and its objectives.

ViewKey (which view, seen how, by whom)  ->  EncodedView  ->  objective  ->  ObjectiveOutput
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from panfm.models.vit import TokenSplit
from panfm.shards.schema import MODALITIES


class ViewKey(NamedTuple):
    """An encoding that an objective asks for; objectives that ask for the same one share it."""

    view: int  # number of the view in Batch.views
    masked: bool  # whether its hidden patches are left out, where the batch has masks
    replaced: bool = False  # masked: whether a mask token stands in for them, instead of nothing
    encoder: Literal["student", "teacher"] = "student"  # the one that is trained, or its moving average
    num_blocks: int = 0  # 0: the tokens after the final norm; else the normalised mean of the last so many blocks


@dataclass(frozen=True)
class EncodedView:
    """One view of a batch, encoded."""

    images: Tensor  # uint8 [B, 3, H, W], as the loader made them
    tokens: Tensor  # [B, num_prefix + num_visible, D], after the final norm
    num_prefix: int  # CLS and registers
    split: TokenSplit | None  # None: every patch has a token, in the order of the grid
    hidden: Tensor | None = None  # int64: places in the flattened [B * N] of patches that a mask token stands in for

    @property
    def pooled(self) -> Tensor:
        """Mean of the encoded patch tokens [B, D], at least float32: what an export gives as its features."""
        patches = self.tokens[:, self.num_prefix :]
        return patches.mean(dim=1, dtype=None if patches.dtype.itemsize >= 4 else torch.float32)


@dataclass(frozen=True)
class Mean:
    """A metric that is a mean of some of the examples: the engine adds both parts over micro batches and ranks.

    A metric that is given as one scalar weighs alike in every micro batch; this one weighs by its count, and where the
    count is 0 everywhere it has no value (null in metrics.jsonl), which is not the same as 0.
    """

    total: Tensor
    count: Tensor


Metric: TypeAlias = Tensor | Mean


class ObjectiveOutput(NamedTuple):
    """What an objective returns, and the model as a whole. A tuple: DeepSpeed must find the loss in it (ZeRO 3)."""

    loss: Tensor  # scalar, at least float32
    metrics: Mapping[str, Metric]  # scalars without gradient; the same names in every step


def compute_modality_losses(losses: Tensor, modalities: Tensor, counted: Tensor | None = None) -> dict[str, Mean]:
    """Mean loss of each modality's examples: losses [B], modalities int64 [B] -> {"loss/clinical": Mean, ...}.

    counted: bool [B], the examples that have a loss at all; None: every one. All modalities are named in every step;
    one that has no example in the batch has the count 0.
    """
    numbers = torch.arange(len(MODALITIES), device=modalities.device)
    chosen = modalities.unsqueeze(0) == numbers.unsqueeze(1)  # [modalities, B]
    if counted is not None:
        chosen = chosen & counted
    # Not a product: 0 times a loss that is not finite would make every modality's not finite.
    totals = torch.where(chosen, losses.detach(), 0.0).sum(dim=1).unbind()
    counts = chosen.sum(dim=1).to(losses.dtype).unbind()
    pairs = zip(MODALITIES, totals, counts, strict=True)
    return {f"loss/{modality}": Mean(total, count) for modality, total, count in pairs}
