"""The Batch: what the loader hands to the training step, and all that an objective may look at."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from panfm.shards.schema import MODALITIES

MODALITY_NUMBER: dict[str, int] = {modality: number for number, modality in enumerate(MODALITIES)}
NO_GROUP = -1


@dataclass(frozen=True)
class Batch:
    """One micro batch of B examples, collated. Images stay uint8 until they are on the device.

    views: one uint8 tensor [B, 3, H, W] a view of the image; views of one size come first, in fixed order.
    masks: bool [B, num_patches], True = hidden, for view 0 .. V-1 stacked as [V, B, num_patches]; None if no
        objective hides patches.
    positions: int64 [B], the place of each example in the sample stream.
    modalities: int64 [B], number in MODALITIES.
    sources: int64 [B], number of the source in the run's source list.
    lesions, patients, visits: int64 [B], stable 63-bit numbers of the ids, NO_GROUP where unknown.
    captions: int64 [B], a number that captions of the same text share, NO_GROUP without a caption; None if no objective
        reads captions.
    texts: int64 [B, L], their token ids, as long as the longest; zeros without a caption; None likewise.
    """

    views: tuple[Tensor, ...]
    masks: Tensor | None
    positions: Tensor
    modalities: Tensor
    sources: Tensor
    lesions: Tensor
    patients: Tensor
    visits: Tensor
    captions: Tensor | None = None
    texts: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples B."""
        return int(self.positions.shape[0])

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`, asynchronously from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Pin every tensor (DataLoader calls this when pin_memory is on)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                changed[field.name] = tuple(function(item) for item in value)
            elif value is not None:
                changed[field.name] = function(value)
        return replace(self, **changed)
