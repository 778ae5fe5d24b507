"""Duplicates: which images of one list are copies of images of another, or of each other.

    ImageList (rows of shard sets) x ImageList --find_exact--> same bytes, stored or original
                                               --find_copies--> near duplicates: hash_search, then pixel_match
    pairs --group_pairs--> groups of images that are one

A copy is a resized, recompressed, recoloured, slightly cropped, mirrored or quarter-turned version of one photograph.
Another photograph of the same lesion is none. docs/audit.md holds what share is found, and what is not.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from panfm.progress import progress_bar
from panfm.shards.hash_search import HASH_BITS, MAX_DISTANCE, count_cores, read_hashes, search_hashes
from panfm.shards.index import ShardSet
from panfm.shards.pixel_match import MIN_SCORE, Thumbnails, cut_width, orient_image, read_thumbnail, score_pairs

ALIKE_DISTANCE = 16  # bits; no two different photographs of the real sets came within twice that
SAME_SHAPE = 0.04  # of the logarithm of width / height
BLOCK_PAIRS = 4096

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class ImageList:
    """N images out of shard sets. member: int64 [N], number in `sets`; row: int64 [N], row of that set's table."""

    sets: tuple[ShardSet, ...]
    member: Numbers
    row: Numbers

    def __len__(self) -> int:
        return len(self.row)

    def get_column(self, name: str) -> pa.Array:
        """A column of the tables, for these images in this order: [N]."""
        parts = [_combine(shard_set.table[name]) for shard_set in self.sets]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        return pa.concat_arrays(parts).take(pa.array(starts[self.member] + self.row))

    def get_sources(self) -> NDArray[np.str_]:
        """The source of each image: [N]."""
        return np.array([shard_set.source for shard_set in self.sets], dtype=np.str_)[self.member]

    def read_thumbnails(self, images: Numbers) -> Iterator[Thumbnails]:
        """Decode some images to uint8 [64, 64] grey, in the order of `images`, on all cores."""
        with ThreadPoolExecutor(count_cores()) as pool:
            yield from pool.map(lambda i: read_thumbnail(self.sets[self.member[i]], int(self.row[i])), images.tolist())


@dataclass(frozen=True)
class Pairs:
    """M pairs of images, each once, sorted by query, then match.

    query, match: int64 [M], numbers in the two lists. score: float32 [M] in 0 .. 1. orientation: int8 [M], how the
    query is laid to look like the match (`pixel_match.orient_image`). distance: int16 [M], bits; -1: not compared.
    """

    query: Numbers
    match: Numbers
    score: NDArray[np.float32]
    orientation: NDArray[np.int8]
    distance: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.query)

    def take(self, places: NDArray) -> "Pairs":
        """The pairs at these places (numbers or a mask)."""
        return Pairs(*(getattr(self, name)[places] for name in self.__dataclass_fields__))


def list_images(sets: Sequence[ShardSet], rows: Sequence[Numbers] | None = None) -> ImageList:
    """List images of shard sets, one set after the other; rows: those of each set, None = all."""
    chosen = [np.arange(one.num_samples, dtype=np.int64) for one in sets] if rows is None else list(rows)
    member = np.repeat(np.arange(len(sets), dtype=np.int64), [len(part) for part in chosen])
    nothing = np.empty(0, dtype=np.int64)
    return ImageList(tuple(sets), member, np.concatenate([nothing, *chosen]).astype(np.int64))


def find_exact(database: ImageList, queries: ImageList | None = None) -> Pairs:
    """Find the pairs whose stored bytes, or the files they were made from, are the same.

    Inside one list (no queries) each further image stands with the first of its like, not with every other one. The
    tiles of a slide come from one file and are not the same: only stored bytes count for them.
    """
    found = []
    for column in ("sha256", "source_sha256"):
        values = []
        for images in (queries, database):
            if images is not None:
                own = images.get_column(column)
                tile = pc.is_valid(images.get_column("x0"))
                values.append(pc.if_else(tile, None, own) if column == "source_sha256" else own)
        pairs = join_values(values[0], values[1] if queries is not None else list_firsts(values[0]))
        found.append(pairs if queries is not None else pairs[::-1][:, pairs[0] != pairs[1]])
    query, match = np.unique(np.concatenate(found, axis=1), axis=1)
    return make_pairs(query, match, np.ones(len(query), dtype=np.float32))


def find_copies(
    database: ImageList,
    queries: ImageList | None = None,
    *,
    max_distance: int = MAX_DISTANCE,
    min_score: float = MIN_SCORE,
) -> tuple[Pairs, int]:
    """Find near duplicates of `queries` in `database`, or inside `database` itself; and count the candidates looked at.

    Hashes within `max_distance` bits in any of the 8 orientations are candidates; those within ALIKE_DISTANCE are
    copies, the others where their patterns correlate by `min_score` at least. The score is that correlation, and at
    least 1 - distance / 256 of the former. Images without a hash (nothing to recognise) match nothing. Pairs inside
    one list come once, the earlier image as the query.

    Raises UserError for hashes of an older version and for an image that does not decode.
    """
    inside = queries is None
    queries = database if queries is None else queries
    own, own_known = _read_hashes(queries)
    other, other_known = (own, own_known) if inside else _read_hashes(database)
    own_numbers, other_numbers = np.flatnonzero(own_known), np.flatnonzero(other_known)
    found = search_hashes(other[other_known], own[own_known], max_distance)
    pairs = Pairs(
        own_numbers[found.query],
        other_numbers[found.row],
        np.empty(len(found.query), dtype=np.float32),
        found.orientation,
        found.distance,
    )
    if inside:
        pairs = pairs.take(pairs.query < pairs.match)
    scores = compute_scores(database, queries, pairs)
    alike = pairs.distance <= ALIKE_DISTANCE
    score = np.where(alike, np.maximum(scores, 1 - pairs.distance / HASH_BITS), scores).astype(np.float32)
    scored = Pairs(pairs.query, pairs.match, np.clip(score, 0, 1), pairs.orientation, pairs.distance)
    return scored.take(alike | (scores >= min_score)), len(pairs)


def compute_scores(database: ImageList, queries: ImageList, pairs: Pairs) -> NDArray[np.float32]:
    """Score pairs on their pixels, in their orientations: float32 [M], see `pixel_match.score_pairs`.

    Where the shapes differ, one may be cut to the other's: the wider one is also tried cut to the width of the other,
    at its middle (the square in the middle of a photograph is the crop that people make). Each query is decoded once,
    the images of the database block by block.
    """
    scores = np.zeros(len(pairs), dtype=np.float32)
    wanted = np.unique(pairs.query)
    order = np.argsort(pairs.match, kind="stable")
    own_shape, other_shape = _get_aspects(queries)[pairs.query], _get_aspects(database)[pairs.match]
    share = other_shape / np.where(pairs.orientation & 4, 1 / own_shape, own_shape)  # above 1: the match is wider
    with progress_bar("audit: pixels", len(pairs), unit="pairs") as advance:
        own = dict(zip(wanted.tolist(), queries.read_thumbnails(wanted), strict=True))  # 4 KB each
        for start in range(0, len(order), BLOCK_PAIRS):
            block = order[start : start + BLOCK_PAIRS]
            matches = np.unique(pairs.match[block])
            other = dict(zip(matches.tolist(), database.read_thumbnails(matches), strict=True))
            theirs = [other[match] for match in pairs.match[block].tolist()]
            laid = [
                orient_image(own[query], orientation)
                for query, orientation in zip(
                    pairs.query[block].tolist(), pairs.orientation[block].tolist(), strict=True
                )
            ]
            scores[block] = score_pairs(laid, theirs)
            cut = np.flatnonzero(np.abs(np.log(share[block])) > SAME_SHAPE)
            cut_laid = [cut_width(laid[place], min(1.0, share[block[place]])) for place in cut]
            cut_theirs = [cut_width(theirs[place], min(1.0, 1 / share[block[place]])) for place in cut]
            scores[block[cut]] = np.maximum(scores[block[cut]], score_pairs(cut_laid, cut_theirs))
            advance(len(block))
    return scores


def make_pairs(query: Numbers, match: Numbers, score: NDArray[np.float32]) -> Pairs:
    """Pairs found without comparing hashes."""
    count = len(query)
    return Pairs(query, match, score, np.zeros(count, dtype=np.int8), np.full(count, -1, dtype=np.int16))


def join_values(first: pa.Array, second: pa.Array) -> NDArray[np.int64]:
    """All pairs of places with equal values: int64 [2, M]; null equals nothing."""
    tables = [
        pa.table({"value": values, name: pa.array(np.arange(len(values)))}).filter(pc.is_valid(values))
        for name, values in (("first", first), ("second", second))
    ]
    joined = tables[0].join(tables[1], keys="value", join_type="inner").sort_by([("first", "ascending")])
    return np.stack([joined[name].to_numpy().astype(np.int64) for name in ("first", "second")])


def list_firsts(values: pa.Array) -> pa.Array:
    """The values where they occur first, null elsewhere: [N]."""
    seen: set[str | None] = {None}
    kept: list[str | None] = []
    for value in values.to_pylist():
        kept.append(None if value in seen else value)
        seen.add(value)
    return pa.array(kept, pa.string())


def group_pairs(first: Numbers, second: Numbers, num_images: int) -> Numbers:
    """Number the groups that pairs join: int64 [num_images], equal for images joined by any chain; -1 for the others.

    Groups are numbered in the order of their first images.
    """
    links = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(num_images, num_images))
    _, label = connected_components(links, directed=False)
    joined = np.zeros(num_images, dtype=bool)
    joined[first] = joined[second] = True
    groups = np.full(num_images, -1, dtype=np.int64)
    _, start, inverse = np.unique(label[joined], return_index=True, return_inverse=True)
    groups[joined] = np.argsort(np.argsort(start))[inverse.reshape(-1)]
    return groups


def _get_aspects(images: ImageList) -> NDArray[np.float64]:
    """Width / height of each image: [N]."""
    width, height = (images.get_column(name).to_numpy().astype(np.float64) for name in ("width", "height"))
    return np.asarray(width / height)


def _read_hashes(images: ImageList) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    where = ", ".join(str(shard_set.path) for shard_set in images.sets)
    return read_hashes(images.get_column("phash"), where)


def _combine(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
