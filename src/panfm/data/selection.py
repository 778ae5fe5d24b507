"""Selection: which samples of the shard sets may be drawn; everything else is left out here, counted and said.

    ShardSet.table --(permitted use)--(excluded groups)--(modalities)--> SampleTable, SourceFacts

What comes out are plain arrays of about 45 bytes a sample: they travel to every loader worker, the table does not.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from panfm.data.batch import MODALITY_NUMBER, NO_GROUP
from panfm.errors import UserError
from panfm.shards.index import ShardSet
from panfm.shards.schema import MODALITIES, Modality

Indices = NDArray[np.int64]
COLUMNS = ("row", "modality", "lesion", "patient", "visit")


@dataclass(frozen=True)
class SourceFacts:
    """What one source brings to a run; num_samples = num_excluded + num_audited + num_filtered + num_kept."""

    source: str
    path: str
    licence: str
    synthetic: bool
    data_hash: str
    num_samples: int  # in the index
    num_excluded: int  # in groups that evaluation tests on
    num_audited: int  # of the rest, those that an audit lists: copies of test images
    num_filtered: int  # of a modality that is not drawn
    num_kept: int
    num_by_modality: dict[str, int]  # of the kept ones
    permitted_uses: tuple[str, ...]  # what the source's card permits


@dataclass(frozen=True)
class SampleTable:
    """The N samples that may be drawn, one row a sample, in the order of the sources and of their indexes."""

    sources: tuple[str, ...]
    source: NDArray[np.int32]  # number in `sources`
    row: Indices  # in that source's shard set
    modality: NDArray[np.int8]  # number in MODALITIES
    lesion: Indices  # 63-bit numbers, NO_GROUP where unknown
    patient: Indices
    visit: Indices


def select_samples(
    shard_set: ShardSet,
    modalities: Sequence[Modality],
    excluded: frozenset[str],
    training_use: str,
    excluded_keys: frozenset[str] = frozenset(),
) -> tuple[SourceFacts, SampleTable]:
    """Keep the samples of one source that may be drawn, and count what was left out and why.

    excluded: group_ids. excluded_keys: single samples, besides. Raises UserError where a sample's permitted_uses lack
    `training_use`.
    """
    table = shard_set.table
    num_refused = table.num_rows - _count_permitted(table["permitted_uses"], training_use)
    if num_refused:
        uses = ", ".join(shard_set.card.permitted_uses) or "none"
        raise UserError(
            f"{shard_set.path}: {num_refused} of {table.num_rows} samples of {shard_set.source} do not permit the use "
            f"{training_use} (the card permits: {uses}); take the source out of data.shards"
        )
    in_group = pc.is_in(table["group_id"], value_set=pa.array(sorted(excluded), pa.string())).to_numpy()
    listed = pc.is_in(table["key"], value_set=pa.array(sorted(excluded_keys), pa.string())).to_numpy()
    drop = in_group | listed
    modality = _number_values(table["modality"], MODALITY_NUMBER.__getitem__)
    drawn = np.isin(modality, [MODALITY_NUMBER[name] for name in modalities])
    kept = np.flatnonzero(~drop & drawn)
    patient = _number_values(table["patient_id"], _number_id)
    lesion = _number_values(table["lesion_id"], _number_id)
    counts = np.bincount(modality[kept], minlength=len(MODALITIES)).tolist()
    facts = SourceFacts(
        source=shard_set.source,
        path=str(shard_set.path),
        licence=shard_set.card.licence,
        synthetic=shard_set.card.synthetic,
        data_hash=shard_set.compute_data_hash(),
        num_samples=table.num_rows,
        num_excluded=int(np.count_nonzero(in_group)),
        num_audited=int(np.count_nonzero(listed & ~in_group)),
        num_filtered=int(np.count_nonzero(~drop & ~drawn)),
        num_kept=int(kept.size),
        num_by_modality={name: count for name, count in zip(MODALITIES, counts, strict=True) if count},
        permitted_uses=tuple(shard_set.card.permitted_uses),
    )
    return facts, SampleTable(
        sources=(shard_set.source,),
        source=np.zeros(kept.size, dtype=np.int32),
        row=kept,
        modality=modality[kept].astype(np.int8),
        lesion=lesion[kept],
        patient=patient[kept],
        visit=_number_visits(patient, lesion, table["visit_day"])[kept],
    )


def concatenate_tables(tables: Sequence[SampleTable]) -> SampleTable:
    """Lay the tables of several sources one below the other; sources are numbered in this order."""
    columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in COLUMNS}
    sizes = [table.row.size for table in tables]
    columns["source"] = np.repeat(np.arange(len(tables), dtype=np.int32), sizes)
    return SampleTable(sources=tuple(name for table in tables for name in table.sources), **columns)


def _count_permitted(permitted_uses: pa.ChunkedArray, use: str) -> int:
    """Number of samples whose list of permitted uses names `use`; an unknown list permits nothing."""
    uses = permitted_uses.combine_chunks()
    named = pc.equal(pc.list_flatten(uses), use).to_numpy(zero_copy_only=False)
    owners = pc.list_parent_indices(uses).to_numpy(zero_copy_only=False)
    return int(np.unique(owners[named]).size)


def _number_values(column: pa.ChunkedArray, number: Callable[[str], int]) -> Indices:
    """Map a text column through `number`, once for each distinct value; null becomes NO_GROUP."""
    encoded = column.combine_chunks().dictionary_encode()
    numbers = np.array([*map(number, encoded.dictionary.to_pylist()), NO_GROUP], dtype=np.int64)
    indices = pc.fill_null(encoded.indices, len(numbers) - 1).to_numpy(zero_copy_only=False)
    return numbers[indices]  # type: ignore[no-any-return]


def _number_id(identifier: str) -> int:
    # Identifiers are keyed hashes and the same in every source of one archive: a lesion's slide finds its photographs.
    return derive_key(identifier) >> 1


def _number_visits(patient: Indices, lesion: Indices, day: pa.ChunkedArray) -> Indices:
    """Number (patient, else lesion; day); NO_GROUP where either is unknown."""
    who = np.where(patient == NO_GROUP, lesion, patient)
    days = pc.cast(day, pa.int64()).combine_chunks()
    known = (who != NO_GROUP) & pc.is_valid(days).to_numpy(zero_copy_only=False)
    visits = np.full(who.size, NO_GROUP, dtype=np.int64)
    pairs = np.stack([who[known], pc.fill_null(days, 0).to_numpy(zero_copy_only=False)[known]], axis=1)
    distinct, inverse = np.unique(pairs, axis=0, return_inverse=True)
    numbers = np.array([derive_key("visit", *pair) >> 1 for pair in distinct.tolist()], dtype=np.int64)
    visits[known] = numbers[inverse.reshape(-1)] if numbers.size else NO_GROUP
    return visits


def derive_key(*parts: int | str) -> int:
    """Hash numbers and words to 64 bits; the same on every machine and in every version of Python and numpy."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
