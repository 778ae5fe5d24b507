"""Search by hash: the stored 256-bit perceptual hashes of two sets of images -> pairs that may be copies.

    samples.parquet --read_hashes--> uint8 [N, 32] --orient_hashes--> 8 turns and mirror images of each
    database x queries --search_hashes--> HashMatches: pairs within a Hamming distance, for shards.duplicates to verify

The search is multi-index hashing (Norouzi et al. 2012, "Fast search in Hamming space with multi-index hashing"): the
hash is cut into eight keys of 18 bits; two hashes meet where a key of one differs in at most one bit from that of the
other. Keys come from the 144 lowest frequencies, which copies change least, so that pairs of copies meet long before
the distance alone would promise it; what share does is measured in docs/audit.md. Never all pairs: 2 million images
against 100,000 in 8 orientations are 1.6 10^12 comparisons, of which about one in 1,000 is made.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.progress import progress_bar
from panfm.shards.quality import PHASH_FREQUENCIES, PHASH_VERSION

HASH_BYTES = 32
HASH_BITS = 256
NUM_ORIENTATIONS = 8
NUM_KEYS = 8
KEY_BITS = 18
MAX_DISTANCE = 64  # a quarter of the bits; docs/audit.md says what that finds and what it lets through
LOW_BITS, LOW_SHARE = 6, 0.2  # bits and share of the distance that copies may differ in among the lowest 64
BLOCK_QUERIES = 65_536
BLOCK_CANDIDATES = 2_000_000  # compared at once in a thread: about 150 MB
MAX_MATCHES = 50_000_000

Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class HashMatches:
    """M pairs within the distance, sorted by query, then row; each pair once, at its best orientation.

    query, row: int64 [M], numbers in `queries` and in `database`. orientation: int8 [M], how the query image is laid
    to look like the other (`pixel_match.orient_image`). distance: int16 [M], bits that differ.
    """

    query: NDArray[np.int64]
    row: NDArray[np.int64]
    orientation: NDArray[np.int8]
    distance: NDArray[np.int16]


def read_hashes(column: pa.ChunkedArray | pa.Array, where: str) -> tuple[Bits, NDArray[np.bool_]]:
    """Decode the phash column of a table: hashes uint8 [N, 32] (zeros where there is none), and which there are [N].

    Raises UserError for hashes of another length, which an older panfm wrote; `where` names the shard set.
    """
    texts = column.to_pylist()
    for text in texts:
        if text is not None and len(text) != 2 * HASH_BYTES:
            raise UserError(
                f"{where}: a phash has {len(text)} characters, those of version {PHASH_VERSION} have {2 * HASH_BYTES}; "
                "build the shards again with this panfm, their images cannot be compared otherwise"
            )
    blank = "0" * (2 * HASH_BYTES)
    data = bytes.fromhex("".join(blank if text is None else text for text in texts))
    known = np.array([text is not None for text in texts], dtype=bool)
    return np.frombuffer(data, dtype=np.uint8).reshape(len(texts), HASH_BYTES), known


def orient_hashes(hashes: Bits) -> Bits:
    """Hash the 8 turns and mirror images without their pixels: uint8 [N, 32] -> [8, N, 32].

    Orientation 4 t + 2 a + b: transposed where t, then rows reversed where a, then columns where b. Reversing rows
    changes the sign of the odd vertical frequencies, transposing exchanges the two axes (see `compute_phash`).
    """
    u, v = PHASH_FREQUENCIES.T
    place = {pair: number for number, pair in enumerate(map(tuple, PHASH_FREQUENCIES.tolist()))}
    exchange = np.array([place[second, first] for first, second in PHASH_FREQUENCIES.tolist()])
    transposed = np.packbits(np.unpackbits(hashes, axis=1)[:, exchange], axis=1)
    signs = [np.packbits((a * u + b * v) % 2).astype(np.uint8) for a in (0, 1) for b in (0, 1)]
    return np.stack([laid ^ sign for laid in (hashes, transposed) for sign in signs])


def search_hashes(
    database: Bits, queries: Bits, max_distance: int = MAX_DISTANCE, *, threads: int | None = None
) -> HashMatches:
    """Find the pairs of a query in any orientation and a database hash that differ in at most `max_distance` bits.

    database: uint8 [N, 32]; queries: uint8 [Q, 32]. Not every such pair is found (see the module); the same ones every
    time, whatever the number of threads. Memory: about 60 bytes for each database hash, 300 for each query, and 150 MB
    for each thread.

    Raises UserError where more than MAX_MATCHES pairs are found.
    """
    assert database.shape[1] == queries.shape[1] == HASH_BYTES
    if not len(database) or not len(queries):
        nothing = np.empty(0, dtype=np.int64)
        return HashMatches(nothing, nothing, nothing.astype(np.int8), nothing.astype(np.int16))
    oriented = np.ascontiguousarray(orient_hashes(queries).reshape(-1, HASH_BYTES))  # orientation * Q + query
    found: list[NDArray[np.int64]] = []
    num_found = 0
    with (
        ThreadPoolExecutor(threads or count_cores()) as pool,
        progress_bar("audit: hashes", NUM_KEYS * len(oriented), unit="keys") as advance,
    ):
        for number in range(NUM_KEYS):
            table = _build_table(database, number)
            keys = _cut_keys(oriented, number)
            order = np.argsort(keys, kind="stable")  # neighbours in the table one after the other
            blocks = [order[start : start + BLOCK_QUERIES] for start in range(0, len(order), BLOCK_QUERIES)]
            tasks = pool.map(lambda block, t=table, k=keys: _search_block(t, oriented, block, k, max_distance), blocks)
            for block, pairs in zip(blocks, tasks, strict=True):
                found.append(pairs)
                num_found += pairs.shape[1]
                advance(len(block))
                if num_found > MAX_MATCHES:
                    raise UserError(
                        f"more than {MAX_MATCHES} pairs of images have hashes within {max_distance} bits; search with "
                        "a smaller --distance, or leave out the sets whose images all look alike"
                    )
    return _keep_best(np.concatenate(found, axis=1), len(queries))


def count_bits(values: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Number of ones in each 64-bit number."""
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(values), dtype=np.uint8)
    halves = np.ascontiguousarray(values).view(np.uint16).reshape(*values.shape, 4)  # numpy 1.26
    return np.asarray(_ONES[halves].sum(axis=-1), dtype=np.uint8)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@dataclass(frozen=True)
class _Table:
    """One key of the database, sorted: the hashes of key k are `order[start[k] : start[k + 1]]`."""

    start: NDArray[np.int64]  # [2^KEY_BITS + 1]
    order: NDArray[np.int32]  # [N]
    low: NDArray[np.uint64]  # [N], lowest 64 frequencies, in this order
    words: NDArray[np.uint64]  # [N, 4], in the order of the database


def _cut_keys(hashes: Bits, number: int) -> NDArray[np.int32]:
    """Key `number` of each hash: every eighth of the lowest 144 frequencies, so that all keys are equally stable."""
    keys = np.zeros(len(hashes), dtype=np.int32)
    for place in range(KEY_BITS):
        bit = number + NUM_KEYS * place
        keys |= ((hashes[:, bit >> 3] >> (7 - (bit & 7))) & 1).astype(np.int32) << place
    return keys


def _build_table(database: Bits, number: int) -> _Table:
    keys = _cut_keys(database, number)
    order = np.argsort(keys, kind="stable").astype(np.int32)
    start = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=2**KEY_BITS))])
    words = np.ascontiguousarray(database).view(np.uint64)
    return _Table(start, order, words[order, 0], words)


def _search_block(
    table: _Table, oriented: Bits, block: NDArray[np.int64], keys: NDArray[np.int32], max_distance: int
) -> NDArray[np.int64]:
    """Pairs of the queries in `block`: int64 [3, M] of oriented query, row, distance."""
    words = np.ascontiguousarray(oriented[block]).view(np.uint64)
    own = keys[block]
    found = [np.empty((3, 0), dtype=np.int64)]
    for flipped in (0, *(1 << place for place in range(KEY_BITS))):
        reached = own ^ np.int32(flipped)
        begin = table.start[reached]
        counts = table.start[reached + 1] - begin
        for part in _cut_by_count(counts):
            count = counts[part]
            query = np.repeat(np.arange(part.start, part.stop), count)
            # Row numbers begin, begin + 1, ... of each query, one query after the other.
            shift = begin[part] - (np.cumsum(count) - count)
            place = np.arange(len(query)) + np.repeat(shift, count)
            near = count_bits(table.low[place] ^ words[query, 0]) <= LOW_BITS + LOW_SHARE * max_distance
            query, row = query[near], table.order[place[near]].astype(np.int64)
            distance = count_bits(table.words[row] ^ words[query]).sum(axis=1, dtype=np.int64)
            near = distance <= max_distance
            found.append(np.stack([block[query[near]], row[near], distance[near]]))
    return np.concatenate(found, axis=1)


def _cut_by_count(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Cut queries into runs of at most BLOCK_CANDIDATES candidates, at least one query each."""
    ends = np.cumsum(counts)
    start, done = 0, 0
    while start < len(counts) and done < ends[-1]:
        stop = max(start + 1, int(np.searchsorted(ends, done + BLOCK_CANDIDATES, side="right")))
        if ends[stop - 1] > done:
            yield slice(start, stop)
        start, done = stop, int(ends[stop - 1])


def _keep_best(pairs: NDArray[np.int64], num_queries: int) -> HashMatches:
    """Each (query, row) once, in the orientation with the fewest bits that differ (ties: the first)."""
    oriented, row, distance = pairs
    orientation, query = np.divmod(oriented, num_queries)
    order = np.lexsort((orientation, distance, row, query))
    query, row, orientation, distance = (part[order] for part in (query, row, orientation, distance))
    first = np.ones(len(query), dtype=bool)
    first[1:] = (query[1:] != query[:-1]) | (row[1:] != row[:-1])
    return HashMatches(query[first], row[first], orientation[first].astype(np.int8), distance[first].astype(np.int16))


_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)
