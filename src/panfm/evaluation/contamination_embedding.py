"""How an audit finds images that are near for an encoder: larger crops than perceptual hashes find.

    pretraining images x test images --features--> pairs with a high cosine --pixels, turned as needed--> copies

The cosine from which a pair is looked at comes from pairs of known different patients, unless it is given.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.features import compute_features
from panfm.progress import track
from panfm.shards.duplicates import ImageList, Pairs, compute_scores, make_pairs
from panfm.shards.hash_search import NUM_ORIENTATIONS, orient_hashes, read_hashes

DIFFERENT_SHARE = 1e-4  # of known different pairs may pass the cosine threshold: pixels decide after it
MIN_DIFFERENT = 20_000  # pairs of known different groups, for that share to be of something
MAX_CALIBRATION = 4000  # images whose pairs are compared
BLOCK_ROWS = 8192  # of the pretraining features, compared at once


def find_by_embedding(
    known: ImageList, images: ImageList, encoder: Encoder, *, cosine: float | None, min_score: float, cache_dir: Path
) -> tuple[Pairs, float]:
    """Pairs whose features are nearer than those of known different groups, and whose pixels agree; and the cosine.

    cosine: threshold; None = from the pairs of known different groups among `images`. The pairs' score is the cosine.
    Raises UserError where there are too few of those.
    """

    def embed(side: ImageList) -> NDArray[np.float32]:
        parts = [
            compute_features(encoder, shard_set, side.row[side.member == number], cache_dir=cache_dir).values
            for number, shard_set in enumerate(side.sets)
        ]
        values = np.concatenate(parts)
        return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))

    own, other = embed(images), embed(known)
    cosine = _choose_cosine(own, images) if cosine is None else cosine
    found = []
    for start in track(range(0, len(other), BLOCK_ROWS), "audit: embeddings", unit="blocks"):
        score = own @ other[start : start + BLOCK_ROWS].T
        query, match = np.nonzero(score >= cosine)
        found.append((query, match + start, score[query, match]))
    query, match, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((match, query))
    pairs = make_pairs(query[order], match[order], score[order].astype(np.float32))
    return _verify_turned(known, images, pairs, min_score), cosine


def _choose_cosine(features: NDArray[np.float32], images: ImageList) -> float:
    """The cosine that DIFFERENT_SHARE of the pairs of test images of different, known groups reach."""
    known = np.array([kind != "sample" for kind in images.get_column("group_kind").to_pylist()])
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(known))[:MAX_CALIBRATION]
    groups = np.unique(np.array(images.get_column("group_id").to_pylist(), dtype=np.str_), return_inverse=True)[1]
    different = np.triu(groups[chosen][:, None] != groups[chosen][None], 1)
    count = int(np.count_nonzero(different))
    if count < MIN_DIFFERENT:
        raise UserError(
            f"--encoder: only {count} pairs of test images are of known different patients, lesions or slides, and a "
            f"cosine threshold needs {MIN_DIFFERENT}; give one with --cosine, for example 0.9"
        )
    values = (features[chosen] @ features[chosen].T)[different]
    return float(np.quantile(values, 1 - DIFFERENT_SHARE))


def _verify_turned(known: ImageList, images: ImageList, pairs: Pairs, min_score: float) -> Pairs:
    """Keep the pairs whose pixels agree in any orientation.

    Those in which the hashes are nearest are tried first, but all are: a large crop moves a hash far from its own.
    """
    own, other = (
        read_hashes(side.get_column("phash"), ", ".join(str(shard_set.path) for shard_set in side.sets))[0]
        for side in (images, known)
    )
    oriented = orient_hashes(own)
    distances = np.empty((NUM_ORIENTATIONS, len(pairs)), dtype=np.int16)
    for start in range(0, len(pairs), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        differing = oriented[:, pairs.query[part]] ^ other[pairs.match[part]]
        distances[:, part] = np.unpackbits(differing, axis=2).sum(axis=2, dtype=np.int16)
    nearest = np.argsort(distances, axis=0, kind="stable")
    open_pairs, kept = np.arange(len(pairs)), []
    for orientation in nearest:
        own_turn = orientation[open_pairs]
        tried = pairs.take(open_pairs)
        tried = Pairs(tried.query, tried.match, tried.score, own_turn.astype(np.int8), distances[own_turn, open_pairs])
        agrees = compute_scores(known, images, tried) >= min_score
        kept.append(tried.take(agrees))
        open_pairs = open_pairs[~agrees]
    found = Pairs(*(np.concatenate([getattr(part, name) for part in kept]) for name in Pairs.__dataclass_fields__))
    return found.take(np.lexsort((found.match, found.query)))
