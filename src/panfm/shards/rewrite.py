"""A shard without some of its samples, and the rows of samples.parquet that say where the others lie now.

    shard-000001.tar, keys  --rewrite_tar-->  a new tar, the places of what stays
    rows, places  --move_rows, write_rows-->  samples.parquet

The set itself is not touched: the new files lie beside it until the removal is committed (`forget`).
"""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from panfm.errors import UserError
from panfm.files import open_atomic
from panfm.shards.index import SAMPLES_FILE
from panfm.shards.schema import SAMPLES_SCHEMA
from panfm.shards.verify import Member, read_members

COPY_BYTES = 1 << 20


def rewrite_tar(tar: Path, out: Path, keys: frozenset[str]) -> dict[str, Member]:
    """Copy a shard without the members of `keys`, the others byte for byte; the new places of those by name."""
    with tar.open("rb") as file:
        members, faults = read_members(file)
    if faults:
        raise UserError(f"{tar}: {faults[0]}; copy or build the shards again, nothing was removed")
    places: dict[str, Member] = {}
    written = 0
    with tar.open("rb") as source, open_atomic(out) as file:
        for member in members:
            if member.name.partition(".")[0] in keys:
                continue
            shift = member.start - written
            places[member.name] = Member(member.name, written, member.offset - shift, member.length, member.end - shift)
            source.seek(member.start)
            left = member.end - member.start
            while left:
                block = source.read(min(left, COPY_BYTES))
                if not block:
                    raise UserError(f"{tar}: ends within {member.name}; copy or build the shards again")
                file.write(block)
                left -= len(block)
            written = places[member.name].end
        file.write(bytes(tarfile.RECORDSIZE - written % tarfile.RECORDSIZE))  # at least the two empty end blocks
    return places


def move_rows(table: pa.Table, places: dict[str, dict[str, Member]], folder: Path) -> pa.Table:
    """Give the rows of rewritten shards their new offsets; a row whose member is not where it says is an error."""
    rows = np.flatnonzero(pc.is_in(table["shard"], value_set=pa.array(sorted(places), pa.string())).to_numpy())
    samples = table.take(pa.array(rows)).to_pylist()
    for column, kind in (("offset", None), ("mask_offset", "mask.png"), ("caption_offset", "txt")):
        offsets = table[column].combine_chunks().fill_null(-1).to_numpy().copy()
        for row, sample in zip(rows.tolist(), samples, strict=True):
            if sample[column] is None:
                continue
            member = places[sample["shard"]].get(f"{sample['key']}.{kind or sample['extension']}")
            if member is None or member.length != sample[column.replace("offset", "length")]:
                raise UserError(
                    f"{folder / sample['shard']}: does not hold {sample['key']} as {SAMPLES_FILE} says; see "
                    f"`panfm shards verify {folder}`, nothing was removed"
                )
            offsets[row] = member.offset
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(place), pa.array(offsets, mask=offsets < 0))
    return table


def write_rows(path: Path, table: pa.Table) -> None:
    """Write samples.parquet as the build does: a row group a shard."""
    shards = table["shard"].combine_chunks().dictionary_encode()
    starts = np.flatnonzero(np.diff(shards.indices.to_numpy(), prepend=-1)).tolist()
    with open_atomic(path) as file, pq.ParquetWriter(file, SAMPLES_SCHEMA, compression="zstd") as writer:
        for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True):
            writer.write_table(table.slice(start, end - start))
