"""Registration: how the later of two photographs of one lesion lies on the earlier one, and the later one laid so.

    earlier, later (RGB)  ->  register  ->  Alignment  ->  align_pixels  ->  the later one, turned, sized, shifted

A dermatoscope is held another way at each visit; without this, the difference of two images is mostly the hand that
held it. Every turn and size on a grid is tried, its best shift found by correlating spectra (as in Reddy and Chatterji
1996, doi:10.1109/83.506761; they read turn and size off the spectra as well, but those of a round lesion say little of
its turn), the best few are refined, and the winner is kept only where it matches better than the images as they are.

Coordinates: (x, y) from the centre of an image, in halves of its shorter side, so that images of other sizes compare.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.optimize import minimize

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

COARSE_SIDE, FINE_SIDE = 48, 64  # pixels of the central square, where the grid is searched and where it is refined
TURNS = np.arange(48) * (2 * np.pi / 48)  # radians
NUM_SIZES = 5  # of the grid, evenly in the logarithm
NUM_REFINED = 4
RADIUS = 0.9  # of the disc that is compared: outside of it lies the black ring of a dermatoscope, which never turns
MIN_OVERLAP = 0.6  # share of the earlier image's disc that the later one must cover
MIN_GAIN = 0.05  # in correlation: below it, the images stay as they are


@dataclass(frozen=True)
class Alignment:
    """Where the later image has what the earlier one shows at p: at size * R(turn) p + shift.

    turn: radians, clockwise on the screen. size: above 1 = the later image shows it larger. shift: (x, y).
    match_before, match_after: correlation of the two in brightness, -1 to 1, as they are and aligned. is_kept: whether
    it improves the match by enough to be used; where not, turn, size and shift are those of the identity.
    """

    turn: float
    size: float
    shift: tuple[float, float]
    match_before: float
    match_after: float
    is_kept: bool

    @property
    def matrix(self) -> Floats:
        """size * R(turn), [2, 2], of (x, y) columns."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return np.asarray(self.size * np.array([[cos, -sin], [sin, cos]]))


def register(earlier: Pixels, later: Pixels, *, max_size: float) -> Alignment:
    """Find how `later` lies on `earlier`: RGB images uint8 [H, W, 3] of any sizes. A pure function of the pixels.

    max_size: how much larger or smaller the later image may show things, as a factor from 1 (never) upwards.
    """
    limit = float(np.log(max_size))
    candidates = _search(_reduce(earlier, COARSE_SIDE), _reduce(later, COARSE_SIDE), limit)
    fixed, moving = _reduce(earlier, FINE_SIDE), _reduce(later, FINE_SIDE)

    def compute_match(values: Floats) -> float:
        return _compute_match(values, fixed, moving) if abs(values[1]) <= limit + 1e-9 else -1.0

    simplex = np.concatenate([np.zeros((1, 4)), np.diag([0.06, min(0.06, limit), 0.06, 0.06])])
    best = np.zeros(4)
    before = after = compute_match(best)
    for candidate in sorted(candidates, key=compute_match, reverse=True)[:NUM_REFINED]:
        found = minimize(
            lambda values: -compute_match(values),
            candidate,
            method="Nelder-Mead",
            options={"initial_simplex": candidate + simplex, "xatol": 2e-3, "fatol": 1e-4, "maxfev": 120},
        )
        if -found.fun > after:
            best, after = found.x, float(-found.fun)
    # As they are, they may match as well where both show something: what is left out of the overlap is no gain.
    before = max(before, _correlate(fixed, moving, np.isfinite(_warp(moving, best, outside=np.nan))))
    if after < before + MIN_GAIN:
        return Alignment(0.0, 1.0, (0.0, 0.0), before, before, is_kept=False)
    turn = float((best[0] + np.pi) % (2 * np.pi) - np.pi)
    return Alignment(turn, float(np.exp(best[1])), (float(best[2]), float(best[3])), before, after, is_kept=True)


def align_pixels(later: Pixels, alignment: Alignment) -> Pixels:
    """The central square of `later` as it would be had it been taken like the earlier image: uint8 [S, S, 3].

    S is the image's shorter side. What lies outside of the image is its mirror image: a black wedge would be a feature.
    """
    height, width = later.shape[:2]
    side = min(height, width)
    # Far enough that every corner of the square comes from somewhere.
    reach = int(np.ceil(side * (0.5 * np.sqrt(2) * alignment.size + 0.5 * max(map(abs, alignment.shift))))) + 2
    pad = [(max(reach - length // 2, 0),) * 2 for length in (height, width)]
    padded = np.pad(later, (*pad, (0, 0)), mode="symmetric")
    centre = np.array([width / 2 + pad[1][0], height / 2 + pad[0][0]])
    matrix = alignment.matrix
    offset = centre + np.array(alignment.shift) * side / 2 - matrix @ np.full(2, side / 2)
    values = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    turned = Image.fromarray(padded).transform(
        (side, side), Image.Transform.AFFINE, values, resample=Image.Resampling.BICUBIC
    )
    return np.asarray(turned)


def _reduce(image: Pixels, side: int) -> Floats:
    """Brightness of the central square at `side` pixels, smoothed: hairs and creases are not what is compared."""
    height, width = image.shape[:2]
    half = min(height, width) / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    grey = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BOX, box=box)
    return np.asarray(gaussian_filter(np.asarray(grey, dtype=np.float64), side / 64))


def _search(fixed: Floats, moving: Floats, limit: float) -> list[Floats]:
    """The best shift of each turn and size on the grid: [turn, log size, x, y], in order of their correlation."""
    side = len(fixed)
    window = np.outer(np.hanning(side), np.hanning(side))
    sizes = np.linspace(-limit, limit, NUM_SIZES if limit > 0 else 1)
    candidates = [np.array([turn, size, 0.0, 0.0]) for size in sizes for turn in TURNS]
    turned = np.stack([_warp(moving, candidate) for candidate in candidates])  # [C, S, S]
    first, second = (_whiten(_centre(image, window)) for image in (fixed, turned))
    surface = np.fft.irfft2(first * np.conj(second), s=(side, side))  # [C, S, S], peak at fixed minus moved
    peaks = surface.reshape(len(candidates), -1).argmax(axis=1)
    rows, columns = np.unravel_index(peaks, (side, side))
    heights = surface.reshape(len(candidates), -1).max(axis=1)
    found = []
    for place in np.argsort(-heights)[: 6 * NUM_REFINED]:
        # The earlier image at p is the turned one at p - peak.
        peak = np.array([columns[place], rows[place]], dtype=np.float64)
        peak = (peak - side * (peak >= side / 2)) * 2 / side
        candidate = candidates[place].copy()
        candidate[2:] = -_get_matrix(candidate) @ peak
        found.append(candidate)
    return found


def _centre(images: Floats, window: Floats) -> Floats:
    """Windowed and without mean, so that neither edges nor brightness make the peak: [..., S, S]."""
    mean = (images * window).sum(axis=(-2, -1), keepdims=True) / window.sum()
    return np.asarray((images - mean) * window)


def _whiten(images: Floats) -> NDArray[np.complex128]:
    """Spectra of halved contrast: between correlation, whose peak is broad, and phase correlation, full of noise."""
    spectrum = np.fft.rfft2(images)
    size = np.abs(spectrum)
    return np.asarray(spectrum / np.sqrt(size + 1e-6 * size.max(axis=(-2, -1), keepdims=True) + 1e-12))


def _get_matrix(values: Floats) -> Floats:
    cos, sin = np.cos(values[0]), np.sin(values[0])
    return np.asarray(np.exp(values[1]) * np.array([[cos, -sin], [sin, cos]]))


def _warp(image: Floats, values: Floats, *, outside: float | None = None) -> Floats:
    """`image` [S, S] at matrix p + shift for every p of the grid; outside: its value there, None = the nearest one."""
    side = len(image)
    # ndimage counts (row, column) from the first pixel's centre; ours is (x, y) from the centre of the image.
    matrix = _get_matrix(values)[::-1, ::-1]
    middle = np.full(2, (side - 1) / 2)
    offset = middle + values[:1:-1] * side / 2 - matrix @ middle
    mode = "nearest" if outside is None else "constant"
    return np.asarray(affine_transform(image, matrix, offset, order=1, mode=mode, cval=outside or 0.0))


def _compute_match(values: Floats, fixed: Floats, moving: Floats) -> float:
    """Correlation of the two in brightness where they overlap; -1 where they hardly do."""
    moved = _warp(moving, values, outside=np.nan)
    return _correlate(fixed, moved, np.isfinite(moved))


def _correlate(fixed: Floats, moved: Floats, inside: NDArray[np.bool_]) -> float:
    """Correlation of two images [S, S] over the pixels `inside` that lie in the disc."""
    disc = _get_disc(len(fixed))
    chosen = inside & disc
    if chosen.sum() < MIN_OVERLAP * disc.sum():
        return -1.0
    a, b = fixed[chosen] - fixed[chosen].mean(), moved[chosen] - moved[chosen].mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 1e-9 * len(a) else -1.0


@cache
def _get_disc(side: int) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:side, :side] + 0.5 - side / 2
    return np.asarray(np.hypot(rows, columns) <= RADIUS * side / 2)
