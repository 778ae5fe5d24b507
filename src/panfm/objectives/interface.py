"""What passes between the pretraining model and its objectives.

ViewKey (which view, masked or whole)  ->  EncodedView  ->  objective  ->  ObjectiveOutput
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from panfm.models.vit import TokenSplit


class ViewKey(NamedTuple):
    """An encoding that an objective asks for; objectives that ask for the same one share it."""

    view: int  # number of the view in Batch.views
    masked: bool  # encode its visible patches only, where the batch has masks


@dataclass(frozen=True)
class EncodedView:
    """One view of a batch, encoded."""

    images: Tensor  # uint8 [B, 3, H, W], as the loader made them
    tokens: Tensor  # [B, num_prefix + num_visible, D], after the final norm
    num_prefix: int  # CLS and registers
    split: TokenSplit | None  # None: every patch was encoded, in the order of the grid

    @property
    def pooled(self) -> Tensor:
        """Mean of the encoded patch tokens [B, D], at least float32: what an export gives as its features."""
        patches = self.tokens[:, self.num_prefix :]
        return patches.mean(dim=1, dtype=None if patches.dtype.itemsize >= 4 else torch.float32)


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns, and the model as a whole."""

    loss: Tensor  # scalar, at least float32
    metrics: dict[str, Tensor]  # scalars without gradient; the same names in every step
