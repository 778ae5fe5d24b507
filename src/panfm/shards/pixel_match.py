"""Copies by pixels: is this pair of images, whose hashes are near, one photograph? -> a score of each pair.

    image -> read_thumbnail -> grey 64 x 64     two of them --orient, shift, scale--> score_pairs -> -1 .. 1

Two dermoscopic images of different lesions share a dark blob in the middle of pale skin: hashes and plain correlation
take them for copies. What only a copy shares is the fine pattern everywhere, so both thumbnails are high-passed and
divided by their local contrast before they are correlated: skin then counts as much as the lesion. Either may be a crop
of the other, up to about a third of its area; the score is that of the best size and shift. Measured on real images in
docs/audit.md, with what is not found: small rotations above about 2 degrees, collages, borders, overlaid text.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.errors import UserError
from panfm.shards.hash_search import count_cores
from panfm.shards.index import ShardSet
from panfm.shards.quality import RejectedImageError, decode_image

SIDE = 64  # pixels of a thumbnail
COARSE = 32  # pixels at which size and shift are looked for
LEAST = 26  # of COARSE: a crop keeps at least 81 % of the side, 66 % of the area
PASS_SIGMA = 1.0  # pixels of the coarse thumbnail, twice that of the fine one: what is smoother is taken away
CONTRAST_SIGMA = 2.0  # times PASS_SIGMA: the neighbourhood whose contrast divides
NOISE = 2.0  # grey levels added to the local contrast: flat skin must not count as pattern
DARK = 40.0  # grey levels: the frame of a dermatoscope, the ground of a cut-out lesion; its edge is no pattern of skin
FRAME_SHARE = 0.1  # of dark pixels around, from which a pixel counts nothing
HOPELESS = 0.1  # score of the coarse search below which the fine one is left out
MIN_SCORE = 0.45  # what counts as a copy; docs/audit.md says why
BLOCK_PAIRS = 256  # their arrays fit into the processor's cache

Thumbnails = NDArray[np.uint8]
Floats = NDArray[np.float32]


def read_thumbnail(shard_set: ShardSet, row: int) -> Thumbnails:
    """Read the image of a row as uint8 [64, 64] grey, squeezed to a square as the hash does it.

    Raises UserError for an image that does not decode, naming the shard set and the key.
    """
    try:
        image, _, _ = decode_image(shard_set.read_image(row), short_side=SIDE)
    except RejectedImageError as error:
        key = shard_set.table["key"][row].as_py()
        raise UserError(
            f"{shard_set.path}: image {key} does not decode ({error}); check the set with `panfm shards verify`"
        ) from None
    return make_thumbnail(image)


def make_thumbnail(image: Image.Image) -> Thumbnails:
    """Shrink an 8-bit image to uint8 [64, 64] grey."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def orient_image(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Lay an image [H, W, ...] in one of the 8 orientations of `hash_search.orient_hashes`."""
    if orientation & 4:
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation & 2:
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation & 1 else pixels


def cut_width(pixels: Thumbnails, share: float) -> Thumbnails:
    """The middle `share` (at most 1) of a thumbnail's width, as a thumbnail of its own."""
    if share >= 1:
        return pixels
    half = share * SIDE / 2
    box = (SIDE / 2 - half, 0, SIDE / 2 + half, SIDE)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))


def score_pairs(
    first: Sequence[Thumbnails] | Thumbnails, second: Sequence[Thumbnails] | Thumbnails, *, threads: int | None = None
) -> Floats:
    """Score N pairs of thumbnails, `first` already laid as `second`: float32 [N], 1 = the same, about 0 = unrelated.

    The correlation of the local patterns where the one, as a crop of some size at some shift, fits the other best;
    either may be the crop.
    """
    starts = range(0, len(first), BLOCK_PAIRS)

    def score(start: int) -> Floats:
        own = np.stack(list(first[start : start + BLOCK_PAIRS])).astype(np.float32)
        other = np.stack(list(second[start : start + BLOCK_PAIRS])).astype(np.float32)
        return np.maximum(_fit(own, other), _fit(other, own))

    with ThreadPoolExecutor(threads or count_cores()) as pool:
        return np.concatenate([np.empty(0, dtype=np.float32), *pool.map(score, starts)])


def _fit(crop: Floats, whole: Floats) -> Floats:
    """Best score over sizes and shifts at which `crop` may lie in `whole`; both [n, 64, 64]."""
    small, large = _halve(crop), _normalise(_halve(whole), PASS_SIGMA)
    best = np.full(len(crop), -1.0, dtype=np.float32)
    where = np.zeros((len(crop), 3), dtype=np.int64)
    for size in range(COARSE, LEAST - 1, -1):
        pattern = _centre(_normalise(_resize(small, size), PASS_SIGMA))
        for y in range(COARSE + 1 - size):
            for x in range(COARSE + 1 - size):
                score = _correlate(pattern, large[:, y : y + size, x : x + size])
                better = score > best
                best[better] = score[better]
                where[better] = size, y, x

    large = _normalise(whole, 2 * PASS_SIGMA)
    fine = best.copy()
    for size in range(COARSE, LEAST - 1, -1):
        chosen = np.flatnonzero((where[:, 0] == size) & (best > HOPELESS))
        if not len(chosen):
            continue
        fine[chosen] = -1.0
        for exact in range(2 * size - 1, min(2 * size + 1, SIDE) + 1):
            pattern = _centre(_normalise(_resize(crop[chosen], exact), 2 * PASS_SIGMA))
            windows = np.lib.stride_tricks.sliding_window_view(large, (exact, exact), axis=(1, 2))
            for shift_y in (-1, 0, 1):
                for shift_x in (-1, 0, 1):
                    y = np.clip(2 * where[chosen, 1] + shift_y, 0, SIDE - exact)
                    x = np.clip(2 * where[chosen, 2] + shift_x, 0, SIDE - exact)
                    fine[chosen] = np.maximum(fine[chosen], _correlate(pattern, windows[chosen, y, x]))
    return fine


def _halve(images: Floats) -> Floats:
    return np.asarray(images.reshape(len(images), COARSE, 2, COARSE, 2).mean(axis=(2, 4)), dtype=np.float32)


def _resize(images: Floats, size: int) -> Floats:
    rows = _resampling_rows(size, images.shape[1])
    return np.asarray(rows @ images @ rows.T, dtype=np.float32)


def _normalise(images: Floats, sigma: float) -> Floats:
    """Take away what is smoother than sigma (pixels), and divide by the contrast around."""
    side = images.shape[1]
    smooth, around = _blur_rows(side, sigma), _blur_rows(side, CONTRAST_SIGMA * sigma)
    pattern = images - smooth @ images @ smooth.T
    pattern /= np.sqrt(np.maximum(around @ (pattern * pattern) @ around.T, 0)) + NOISE
    frame = around @ (images < DARK).astype(np.float32) @ around.T
    pattern *= np.maximum(0, 1 - frame / FRAME_SHARE)
    return np.asarray(pattern, dtype=np.float32)


def _centre(pattern: Floats) -> Floats:
    """Zero mean, unit norm: [n, h, w]."""
    pattern = pattern - pattern.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt(np.einsum("nij,nij->n", pattern, pattern))[:, None, None]
    return np.asarray(pattern / (norm + 1e-6), dtype=np.float32)


def _correlate(pattern: Floats, window: Floats) -> Floats:
    """Correlation of centred patterns with windows of the same shape: [n]."""
    mean = window.mean(axis=(1, 2))
    square = np.einsum("nij,nij->n", window, window) - mean * mean * window[0].size
    score = np.einsum("nij,nij->n", pattern, window) / (np.sqrt(np.maximum(square, 0)) + 1e-6)
    return np.asarray(score, dtype=np.float32)


@lru_cache(maxsize=64)
def _resampling_rows(size: int, side: int) -> Floats:
    """[size, side]: shrink a row of `side` pixels to `size` by a triangle filter."""
    centre = (np.arange(size) + 0.5) * side / size - 0.5
    width = max(1.0, side / size)
    rows = np.maximum(0, 1 - np.abs(np.arange(side)[None] - centre[:, None]) / width)
    return np.asarray(rows / rows.sum(axis=1, keepdims=True), dtype=np.float32)


@lru_cache(maxsize=64)
def _blur_rows(side: int, sigma: float) -> Floats:
    """[side, side]: a Gaussian filter along a row, its weights summing to 1 at the edges too."""
    rows = np.exp(-((np.arange(side)[:, None] - np.arange(side)[None]) ** 2) / (2 * sigma * sigma))
    return np.asarray(rows / rows.sum(axis=1, keepdims=True), dtype=np.float32)
