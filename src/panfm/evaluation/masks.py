"""Masks of a segmentation task: from the stored PNG of an image to one region a structure.

    <key>.mask.png, values 1, 2, ... = structures; overlapping: bits 1, 2, 4, ... = structures -> bool [S, H, W]

A sample holds one mask. A single structure is whatever is not 0 (published masks say 1 or 255). Structures that overlap
cannot share the values of a pixel, but they can share its bits.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.errors import UserError
from panfm.evaluation.families import SegmentationTarget
from panfm.shards.index import ShardSet

MAX_OVERLAPPING = 8  # bits of a pixel


def read_regions(shard_set: ShardSet, row: int, target: SegmentationTarget) -> NDArray[np.bool_]:
    """Read the mask of a row as one region a structure: bool [S, H, W], at the mask's own resolution.

    Raises UserError for a mask that is missing or does not decode, and for values that stand for no structure.
    """
    where = f"{shard_set.path}: {shard_set.table.column('key')[row].as_py()}"
    data = shard_set.read_mask(row)
    if data is None:
        raise UserError(f"{where}: has no mask; build the shards again with the mask_path of the source card")
    try:
        values = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    except OSError as error:
        raise UserError(f"{where}: its mask does not decode ({error}); copy or build the shards again") from None
    S = len(target.structures)
    if target.overlapping:
        if S > MAX_OVERLAPPING:
            raise UserError(
                f"target.structures: {S} structures; a mask holds {MAX_OVERLAPPING} that overlap (its bits)"
            )
        highest = 2**S - 1
        regions = (values[None] >> np.arange(S, dtype=np.uint8)[:, None, None]) & 1 == 1
    elif S == 1:
        return values[None] > 0
    else:
        highest = S
        regions = values[None] == np.arange(1, S + 1, dtype=np.uint8)[:, None, None]
    if values.max(initial=0) > highest:
        kind = "bits" if target.overlapping else "values"
        raise UserError(
            f"{where}: its mask has the value {values.max()}; {S} structures have {kind} up to {highest}: name them "
            "all in target.structures, or map the values when the masks are written"
        )
    return np.asarray(regions)
