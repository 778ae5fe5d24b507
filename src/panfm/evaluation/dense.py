"""Frozen features of places: whole images through an encoder, one vector a place of a grid, from one depth or several.

    stored image -> resized to the encoder's square, nothing cropped -> encoder -> maps [B, C, h, w], one a depth

The evaluation transform crops the centre, and a region outside of it could not be found; so the whole image is squeezed
into the square that the encoder sees; size, interpolation, colours and precision stay the encoder's own. Maps are large
(a ViT-S's patch tokens 150 KB an image in half precision, its pooled feature 1.5 KB), so they are kept in memory up to
a bound and computed again beyond it.
"""

from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from panfm.data.decode import DecodeError, decode_rgb
from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.shards.index import ShardSet

Depths = Literal["last", "several"]
NUM_DEPTHS = 4  # of "several", as in UPerNet
LARGEST_HALF = 65504.0


class PlaceMaps:
    """The maps of a shard set's images by one encoder; those that fit into `max_bytes` are computed once.

    Values are rounded to half precision whether they are kept or not: what memory there is must not change a number.
    """

    def __init__(self, shard_set: ShardSet, depths: Depths, max_bytes: int) -> None:
        self.shard_set, self.depths, self.max_bytes = shard_set, depths, max_bytes
        self._kept: dict[int, list[Tensor]] = {}  # row -> half precision [C, h, w], one a depth, on the CPU
        self._num_bytes = 0

    def read(self, encoder: Encoder, rows: Sequence[int] | NDArray[np.int64]) -> list[Tensor]:
        """Return the maps of some rows of the shard set, float32 [B, C, h, w] on the encoder's device, one a depth.

        Raises UserError for an image that does not decode, or gives a value that is not finite.
        """
        numbers = [int(row) for row in rows]
        missing = [row for row in dict.fromkeys(numbers) if row not in self._kept]
        computed = self._compute(encoder, missing) if missing else {}
        found = [self._kept.get(row) or computed[row] for row in numbers]
        return [torch.stack(values).to(encoder.device).float() for values in zip(*found, strict=True)]

    def _compute(self, encoder: Encoder, rows: list[int]) -> dict[int, list[Tensor]]:
        images = torch.from_numpy(np.stack([_read_whole(encoder, self.shard_set, row) for row in rows]))
        maps = [
            values.clamp(-LARGEST_HALF, LARGEST_HALF).half().cpu()
            for values in compute_maps(encoder, images, self.depths)
        ]
        bad = [row for place, row in enumerate(rows) if not all(values[place].isfinite().all() for values in maps)]
        if bad:
            raise UserError(
                f"{_name(self.shard_set, bad[0])}: {encoder.name} gives a feature that is not finite; try dtype=fp32"
            )
        computed = {}
        for place, row in enumerate(rows):
            of_row = [values[place].clone() for values in maps]
            computed[row] = of_row
            size = sum(values.nbytes for values in of_row)
            if self._num_bytes + size <= self.max_bytes:
                self._kept[row] = of_row
                self._num_bytes += size
        return computed


# One set of maps an encoder, gone with it: the trials of a task (fractions, draws) look at the same images.
_OPEN: WeakKeyDictionary[Encoder, PlaceMaps] = WeakKeyDictionary()


def open_maps(encoder: Encoder, shard_set: ShardSet, depths: Depths, max_bytes: int) -> PlaceMaps:
    """Return the maps of `shard_set` by `encoder`, those computed before where they are of the same kind."""
    maps = _OPEN.get(encoder)
    if maps is None or (maps.depths, maps.max_bytes) != (depths, max_bytes) or maps.shard_set is not shard_set:
        maps = _OPEN[encoder] = PlaceMaps(shard_set, depths, max_bytes)
    return maps


@torch.no_grad()
def compute_maps(encoder: Encoder, images: Tensor, depths: Depths) -> list[Tensor]:
    """Compute one feature a place: images uint8 [B, 3, S, S] -> float32 [B, C, h, w], one a depth, shallow to deep.

    last: what the encoder gives a student as its teacher: patch tokens behind the final norm, or a CNN's map of stride
    16. several: of a token model blocks at a quarter, half, three quarters and the end; of a CNN its four last strides.
    Raises UserError for a network that gives no such maps.
    """
    if depths == "last":
        tokens = encoder.forward_tokens(images)[:, int(encoder.module.has_cls) :]  # [B, h * w, C]
        height, width = encoder.token_grid(images.shape[-1])
        return [tokens.transpose(1, 2).unflatten(2, (height, width))]
    model = encoder.module.model
    if not hasattr(model, "forward_intermediates"):
        raise UserError(
            f"{encoder.name}: {type(model).__name__} has no maps of several depths; use segmentation.variants=[linear]"
        )
    normalised = encoder.transform.normalise(images.to(encoder.device))
    with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=encoder.dtype == "bf16"):
        maps = model.forward_intermediates(  # type: ignore[operator]
            normalised, indices=_choose_depths(encoder), output_fmt="NCHW", intermediates_only=True
        )
    return [values.float() for values in maps]


def _choose_depths(encoder: Encoder) -> list[int]:
    model = encoder.module.model
    info = model.feature_info
    num_levels = len(info.info if hasattr(info, "info") else info)  # type: ignore[arg-type]
    if not encoder.module.is_token_model:
        return list(range(max(0, num_levels - NUM_DEPTHS), num_levels))
    return sorted({round(num_levels * (depth + 1) / NUM_DEPTHS) - 1 for depth in range(NUM_DEPTHS)})


def _read_whole(encoder: Encoder, shard_set: ShardSet, row: int) -> NDArray[np.uint8]:
    """The whole image of a row in the encoder's square: uint8 [3, S, S]."""
    try:
        image = Image.fromarray(decode_rgb(shard_set.read_image(row)))
    except DecodeError as error:
        raise UserError(
            f"{_name(shard_set, row)}: does not decode ({error}); copy the shards again, or build them again"
        ) from None
    side = encoder.image_size
    resized = image.resize((side, side), Image.Resampling[encoder.transform.interpolation.upper()])
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _name(shard_set: ShardSet, row: int) -> str:
    return f"{shard_set.path}: {shard_set.table.column('key')[row].as_py()}"
