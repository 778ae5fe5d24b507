"""Where each sample's bytes lie in the tars of a set, as plain arrays; and whether that can be at all.

    samples.parquet -> read_places -> Places -> list_members -> Members in the order of the tars, checked

A row's numbers may come from anybody: before a byte is read by them, every member must lie inside of a shard that the
index names, behind its own header, at a whole block, and apart from all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.shards.storage import ShardUrl
from panfm.shards.tars import BLOCK

# What read_places needs of samples.parquet.
PLACE_COLUMNS = ("shard", "offset", "length", "mask_offset", "mask_length", "caption_offset", "caption_length")
MAX_MEMBER_BYTES = 1 << 30  # read at once into memory; no stored image comes near it


@dataclass(frozen=True)
class Places:
    """Where each row's bytes lie, as plain arrays [num_samples]: reading a row must not go through Arrow scalars."""

    shard_names: tuple[str, ...]
    shard: np.ndarray  # number in shard_names
    offset: np.ndarray
    length: np.ndarray
    mask_offset: np.ndarray  # -1: none
    mask_length: np.ndarray
    caption_offset: np.ndarray  # -1: none
    caption_length: np.ndarray


@dataclass(frozen=True)
class Members:
    """Images, masks and captions as members of the tars, [num_members], shard by shard and by offset in each."""

    shard: NDArray[np.int64]  # number in the index's list of shards
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    row: NDArray[np.int64]
    is_image: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.int64]) -> "Members":
        """Those of the given numbers, in their order."""
        return Members(*(getattr(self, column.name)[chosen] for column in fields(self)))

    def are_sorted(self) -> bool:
        """Whether they stand in the order of the tars."""
        together = self.shard[1:] == self.shard[:-1]
        return bool(((self.shard[1:] > self.shard[:-1]) | (together & (self.offset[1:] >= self.offset[:-1]))).all())


def read_places(table: pa.Table) -> Places:
    """The columns of SAMPLES_SCHEMA that say where a row's bytes lie."""
    shards = table["shard"].combine_chunks().dictionary_encode()

    def column(name: str) -> np.ndarray:
        return table[name].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]

    return Places(
        shard_names=tuple(shards.dictionary.to_pylist()),
        shard=shards.indices.to_numpy(zero_copy_only=False),
        offset=column("offset"),
        length=column("length"),
        mask_offset=column("mask_offset"),
        mask_length=column("mask_length"),
        caption_offset=column("caption_offset"),
        caption_length=column("caption_length"),
    )


def list_members(places: Places, shards: Sequence[dict[str, Any]], where: Path | ShardUrl) -> Members:
    """Images, masks and captions in the order in which they lie in the shards of index.json.

    where: samples.parquet, for messages. Raises UserError for the first row whose numbers cannot be: a shard that the
    index does not name, bytes outside of it, between two blocks, under a header or in another member, or above
    MAX_MEMBER_BYTES.
    """
    numbers = {shard["name"]: number for number, shard in enumerate(shards)}
    if foreign := set(places.shard_names) - set(numbers):
        raise UserError(
            f"{where}: names the shard {min(foreign)[:80]!r}, which index.json does not; build the set again"
        )
    number = np.array([numbers[name] for name in places.shard_names], dtype=np.int64)[places.shard]
    rows = np.arange(number.size)
    kinds = (
        ("image", rows, places.offset, places.length),
        ("mask", np.flatnonzero(places.mask_offset != -1), places.mask_offset, places.mask_length),
        ("caption", np.flatnonzero(places.caption_offset != -1), places.caption_offset, places.caption_length),
    )
    sizes = np.array([shard["num_bytes"] for shard in shards], dtype=np.int64)
    for kind, chosen, offsets, lengths in kinds:
        offset, length, size = offsets[chosen], lengths[chosen], sizes[number[chosen]]
        bad = (offset < BLOCK) | (offset % BLOCK != 0) | (length < 0) | (length > MAX_MEMBER_BYTES)
        bad |= (offset > size) | (length > size - offset)  # no sum of theirs: it could wrap around
        if bad.any():
            first = int(chosen[np.argmax(bad)])
            raise UserError(
                f"{where}: row {first} has its {kind} at bytes {offsets[first]} + {lengths[first]} of "
                f"{shards[number[first]]['name']} ({sizes[number[first]]} bytes), where none can lie; copy or build "
                "the set again"
            )
    row = np.concatenate([chosen for _, chosen, _, _ in kinds])
    members = Members(
        shard=number[row],
        offset=np.concatenate([offsets[chosen] for _, chosen, offsets, _ in kinds]),
        length=np.concatenate([lengths[chosen] for _, chosen, _, lengths in kinds]),
        row=row,
        is_image=np.arange(row.size) < rows.size,
    )
    if not members.are_sorted():  # they are, in a set without masks and captions
        members = members.take(np.lexsort((members.offset, members.shard)))
    shard, offset, length = members.shard, members.offset, members.length
    behind = offset + -(-length // BLOCK) * BLOCK  # where the next header may begin
    together = shard[1:] == shard[:-1]
    same = together & (offset[1:] == offset[:-1]) & (length[1:] == length[:-1])
    across = np.flatnonzero(together & (offset[1:] - BLOCK < behind[:-1]) & ~same)
    if across.size:
        first = int(across[0])
        raise UserError(
            f"{where}: rows {members.row[first]} and {members.row[first + 1]} lie across each other in "
            f"{shards[shard[first]]['name']} (around byte {offset[first + 1]}); copy or build the set again"
        )
    # Two rows of one image are odd, and harmless.
    return members.take(np.flatnonzero(np.append(True, ~same))) if same.any() else members
