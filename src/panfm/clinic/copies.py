"""Copies across patients: one photograph under two patients would be learned from and tested on.

    paths [N], groups [N]  --find_copies-->  pairs of images of different groups  --hold_together-->  groups [N]

Exact copies are refused or dropped when the table is read. What is found here was resized, recompressed, cropped a
little, turned or mirrored (`shards.hash_search`, then `shards.pixel_match`). It may be one person under two codes, or a
mistake of the search; in either case the figures are right if the two are never on both sides of a fold.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from panfm.shards.duplicates import ALIKE_DISTANCE, group_pairs
from panfm.shards.hash_search import read_hashes, search_hashes
from panfm.shards.pixel_match import MIN_SCORE, SIDE, make_thumbnail, orient_image, score_pairs
from panfm.shards.quality import RejectedImageError, compute_phash, decode_image


def find_copies(paths: Sequence[Path], groups: Sequence[str]) -> list[tuple[int, int]]:
    """Find images of different groups that look like one photograph: places (first, second), in order.

    An image in which there is nothing to recognise, or that does not decode, is like no other.
    """
    texts: list[str | None] = []
    thumbnails = []
    for path in paths:
        try:
            image, _, _ = decode_image(path.read_bytes(), short_side=SIDE)
        except RejectedImageError:
            texts.append(None)
            thumbnails.append(np.zeros((SIDE, SIDE), dtype=np.uint8))
            continue
        texts.append(compute_phash(image))
        thumbnails.append(make_thumbnail(image))
    hashes, known = read_hashes(pa.array(texts, pa.string()), "the images")
    places = np.flatnonzero(known)
    found = search_hashes(hashes[known], hashes[known])
    candidates = [
        (first, second, orientation, distance)
        for first, second, orientation, distance in zip(
            places[found.query].tolist(),
            places[found.row].tolist(),
            found.orientation.tolist(),
            found.distance.tolist(),
            strict=True,
        )
        if first < second and groups[first] != groups[second]
    ]
    scores = score_pairs(
        [orient_image(thumbnails[first], orientation) for first, _, orientation, _ in candidates],
        [thumbnails[second] for _, second, _, _ in candidates],
    )
    return [
        (first, second)
        for (first, second, _, distance), score in zip(candidates, scores.tolist(), strict=True)
        if distance <= ALIKE_DISTANCE or score >= MIN_SCORE
    ]


def hold_together(groups: Sequence[str], pairs: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Name the groups [N] anew, so that those which a pair joins, by any chain, are one."""
    names = sorted(set(groups))
    place = {name: number for number, name in enumerate(names)}
    first, second = (np.array([place[groups[pair[side]]] for pair in pairs], dtype=np.int64) for side in (0, 1))
    joined = group_pairs(first, second, len(names)).tolist()
    leader: dict[int, str] = {}
    for name, number in zip(names, joined, strict=True):
        if number >= 0:
            leader.setdefault(number, name)
    return tuple(leader.get(joined[place[group]], group) for group in groups)
