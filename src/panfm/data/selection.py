"""Selection: which samples of the shard sets may be drawn; everything else is left out here, counted and said.

    ShardSet --(permitted use)--(excluded groups)--(modalities)--> SourceFacts, Selection
    Selections of all sources  -->  SampleTable

What comes out are plain arrays of 48 bytes a sample, and its key; they lie in one file that all workers share
(`columns`), and nothing else as long as the data set stays in any process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from panfm.data.batch import MODALITY_NUMBER, NO_GROUP
from panfm.data.hashing import Indices, hash_pairs, hash_texts
from panfm.errors import UserError
from panfm.shards.index import ShardReader, ShardSet
from panfm.shards.schema import MODALITIES, Modality

# The columns of samples.parquet that are read here, besides where the bytes lie.
COLUMNS = ("key", "sha256", "modality", "patient_id", "lesion_id", "group_id", "visit_day", "permitted_uses")

# One record a sample, its fields together: what is drawn at random costs one page of memory, not nine.
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # of the image file in its shard
        ("lesion", "<i8"),  # 63-bit numbers, NO_GROUP where unknown
        ("patient", "<i8"),
        ("visit", "<i8"),
        ("length", "<u4"),  # bytes; `shards.places` refuses images above 1 GiB
        ("row", "<u4"),  # in its source's shard set
        ("shard", "<u4"),  # number in its source's shard names
        ("source", "<u2"),  # number in the run's sources
        ("modality", "<u2"),  # number in MODALITIES
    ]
)
Records = NDArray[Any]  # of RECORD
CAPTION = np.dtype([("offset", "<i8"), ("length", "<u4")])  # of its file in the same shard; offset -1: there is none


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
class Selection:
    """The samples of one source that may be drawn, in the order of its index."""

    source: str
    shards: tuple[str, ...]
    reader: ShardReader
    records: Records
    keys: pa.StringArray
    captions: NDArray[Any] | None = None  # of CAPTION, where they were asked for


@dataclass(frozen=True)
class Section:
    """One modality of one source ("ham10000/dermoscopic"): `size` neighbouring samples of the table from `first` on."""

    name: str
    modality: Modality
    first: int
    size: int


@dataclass(frozen=True)
class SampleTable:
    """The N samples that may be drawn, section by section; inside one, in the order of the source's index.

    columns: "records" [N] of RECORD; "key_bytes" and "key_ends" [N + 1], the keys one after the other; where they were
        asked for, "captions" [N] of CAPTION.
    """

    sources: tuple[str, ...]
    shards: tuple[tuple[str, ...], ...]  # names, by source
    sections: tuple[Section, ...]
    columns: Mapping[str, NDArray[Any]]

    @property
    def records(self) -> Records:
        """What is known of each sample, [N] of RECORD."""
        return self.columns["records"]

    def get_shard(self, sample: int) -> str:
        """Name of the shard that holds a sample."""
        record = self.records[sample]
        return self.shards[int(record["source"])][int(record["shard"])]

    def get_key(self, sample: int) -> str:
        """Key of a sample; unique in its source."""
        start, stop = self.columns["key_ends"][sample : sample + 2].tolist()
        return self.columns["key_bytes"][start:stop].tobytes().decode()


def select_samples(
    shard_set: ShardSet,
    modalities: Sequence[Modality],
    excluded: frozenset[str],
    training_use: str,
    excluded_keys: frozenset[str] = frozenset(),
    with_captions: bool = False,
) -> tuple[SourceFacts, Selection]:
    """Keep the samples of one source that may be drawn, and count what was left out and why.

    shard_set: opened with COLUMNS at least. excluded: group_ids. excluded_keys: single samples, besides. Raises
    UserError where a sample's permitted_uses lack `training_use`.
    """
    table, places = shard_set.table, shard_set.places
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
    modality = _number_modalities(table["modality"])
    drawn = np.isin(modality, [MODALITY_NUMBER[name] for name in modalities])
    kept = np.flatnonzero(~drop & drawn)
    patient, lesion = _number_identifiers(table["patient_id"]), _number_identifiers(table["lesion_id"])
    records = np.empty(kept.size, dtype=RECORD)
    for name, values in (
        ("offset", places.offset),
        ("lesion", lesion),
        ("patient", patient),
        ("visit", _number_visits(patient, lesion, table["visit_day"])),
        ("length", places.length),
        ("row", np.arange(table.num_rows)),
        ("shard", places.shard),
        ("modality", modality),
    ):
        records[name] = values[kept]
    records["source"] = 0
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
    keys = table["key"].combine_chunks().take(pa.array(kept))
    captions = None
    if with_captions:
        captions = np.empty(kept.size, dtype=CAPTION)
        captions["offset"] = places.caption_offset[kept]
        captions["length"] = np.maximum(places.caption_length[kept], 0)
    return facts, Selection(shard_set.source, places.shard_names, shard_set.reader, records, keys, captions)


def build_table(selections: Sequence[Selection]) -> SampleTable:
    """Lay the samples of several sources one below the other, sorted by source and modality.

    A section's name decides its place: the order in which a config names its sources does not matter to the stream.
    """
    names = {
        f"{one.source}/{MODALITIES[modality]}": (number, modality)
        for number, one in enumerate(selections)
        for modality in np.flatnonzero(np.bincount(one.records["modality"])).tolist()
    }
    records, keys, sections, captions, first = [], [], [], [], 0
    for name, (number, modality) in sorted(names.items()):
        chosen = np.flatnonzero(selections[number].records["modality"] == modality)
        part = selections[number].records[chosen]
        part["source"] = number
        records.append(part)
        keys.append(selections[number].keys.take(pa.array(chosen)))
        if (own := selections[number].captions) is not None:
            captions.append(own[chosen])
        sections.append(Section(name, MODALITIES[modality], first, chosen.size))
        first += chosen.size
    text = pa.chunked_array(keys, pa.string()).cast(pa.large_binary()).combine_chunks()
    lengths = pc.binary_length(text).to_numpy(zero_copy_only=False)
    _, _, data = text.buffers()
    columns = {
        "records": np.concatenate([np.empty(0, RECORD), *records]),
        "key_ends": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        "key_bytes": np.frombuffer(data or b"", np.uint8)[: int(lengths.sum())].copy(),
    }
    if captions:
        columns["captions"] = np.concatenate(captions)
    shards = tuple(one.shards for one in selections)
    return SampleTable(tuple(one.source for one in selections), shards, tuple(sections), columns)


def _count_permitted(permitted_uses: pa.ChunkedArray, use: str) -> int:
    """Number of samples whose list of permitted uses names `use`; an unknown list permits nothing."""
    uses = permitted_uses.combine_chunks()
    named = pc.equal(pc.list_flatten(uses), use).to_numpy(zero_copy_only=False)
    owners = pc.list_parent_indices(uses).to_numpy(zero_copy_only=False)
    permitted = np.zeros(len(uses), dtype=np.bool_)
    permitted[owners[named]] = True
    return int(np.count_nonzero(permitted))


def _number_modalities(column: pa.ChunkedArray) -> Indices:
    encoded = column.combine_chunks().dictionary_encode()
    numbers = np.array([MODALITY_NUMBER[name] for name in encoded.dictionary.to_pylist()], dtype=np.int64)
    return numbers[encoded.indices.to_numpy(zero_copy_only=False)]  # type: ignore[no-any-return]


def _number_identifiers(column: pa.ChunkedArray) -> Indices:
    """Hash each identifier; null becomes NO_GROUP.

    Identifiers are keyed hashes and the same in every source of one archive: a lesion's slide finds its photographs.
    """
    encoded = column.combine_chunks().dictionary_encode()
    numbers = np.append(hash_texts(encoded.dictionary.cast(pa.binary()).to_pylist()), NO_GROUP)
    identifiers: Indices = numbers[pc.fill_null(encoded.indices, len(numbers) - 1).to_numpy(zero_copy_only=False)]
    return identifiers


def _number_visits(patient: Indices, lesion: Indices, day: pa.ChunkedArray) -> Indices:
    """Number (patient, else lesion; day); NO_GROUP where either is unknown."""
    who = np.where(patient == NO_GROUP, lesion, patient)
    days = pc.cast(day, pa.int64()).combine_chunks()
    known = (who != NO_GROUP) & pc.is_valid(days).to_numpy(zero_copy_only=False)
    visits: Indices = np.where(known, hash_pairs(who, pc.fill_null(days, 0).to_numpy(zero_copy_only=False)), NO_GROUP)
    return visits
