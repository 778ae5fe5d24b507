"""How an audit finds one patient on both sides, and what several methods found once.

    pretraining images x test images --find_same_groups--> pairs by hashed id
    pairs by method --keep_first_method--> each pair of copies once

Nothing here needs torch: an audit without an encoder is for computers that only hold the shards.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.evaluation.contamination_list import METHODS
from panfm.shards.duplicates import ImageList, Pairs, join_values, list_firsts, make_pairs

IDENTIFIERS = ("patient_id", "lesion_id", "slide_id")


def find_same_groups(known: ImageList, images: ImageList) -> Pairs:
    """Pairs by equal hashed ids in one namespace.

    A patient with n images here and m there is n + m - 1 pairs, not n m: each image stands with the other side's
    first, so that every image of the group is named.
    """
    namespaces = [
        np.array([shard_set.card.namespace for shard_set in side.sets], dtype=np.str_)[side.member]
        if len(side)
        else np.empty(0, dtype=np.str_)
        for side in (images, known)
    ]
    found = [np.empty((2, 0), dtype=np.int64)]
    for name in IDENTIFIERS:
        ours, theirs = (
            _name_ids(space, side.get_column(name) if len(side) else pa.array([], pa.string()))
            for space, side in zip(namespaces, (images, known), strict=True)
        )
        first_ours, first_theirs = list_firsts(ours), list_firsts(theirs)
        found += [join_values(ours, first_theirs), join_values(first_ours, theirs)]
    query, match = np.unique(np.concatenate(found, axis=1), axis=1)
    return make_pairs(query, match, np.ones(len(query), dtype=np.float32))


def keep_first_method(findings: dict[str, Pairs]) -> dict[str, Pairs]:
    """A pair of copies is counted once, by the first of METHODS that found it; same_group speaks for itself."""
    seen = np.empty((0, 2), dtype=np.int64)
    kept = {}
    for method in METHODS:
        if method not in findings:
            continue
        pairs = findings[method]
        if method != "same_group":
            both = np.stack([pairs.query, pairs.match], axis=1)
            _, where = np.unique(np.concatenate([seen, both]), axis=0, return_index=True)
            new = np.zeros(len(pairs), dtype=bool)
            new[where[where >= len(seen)] - len(seen)] = True
            seen = np.concatenate([seen, both[new]])
            pairs = pairs.take(new)
        kept[method] = pairs
    return kept


def _name_ids(namespaces: NDArray[np.str_], ids: pa.Array) -> pa.Array:
    """Hashed ids with their namespace: the same hash in another namespace is another person."""
    named = zip(namespaces.tolist(), ids.to_pylist(), strict=True)
    return pa.array([None if own is None else f"{space}/{own}" for space, own in named], pa.string())
