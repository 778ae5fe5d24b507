"""Between a finished shard set and the person who looks at it: which images may show a face, an eye or writing.

    ShardSet -> screen_images -> [Flag(key, kind, box, score), ...] -> review: a sheet, a decision, a removal

The detectors are small, classical and miss a lot: no flag does not mean that nobody can be recognised. Tattoos,
jewellery, scars and faces turned away are not looked for at all; a ruler's digits, a wristband and a name on a label
are all "text". Needs the extra `screen` (OpenCV 4).

Measured on 2026-11-22 on 550 dermoscopic and clinical images (HAM10000 at 200 x 150 pixels, PAD-UFES-20, ISIC UDA-1): a
pasted line of print is found on 91 % of them (letters of up to 10 pixels: 75 %, from 24: 95 %), in a thin script on
54 %. As they are, 2 % were flagged for text (5 % of the clinical ones), 6 % of 350 for a face, under 1 % for an eye. Of
faces, 90 of 100 frontal press portraits pasted on skin were found and 28 of 40 close-ups of eyes. Handwriting, real
wristbands, turned faces and patients' photographs were not tested. An OCR network (PP-OCRv4) missed none of 120 pasted
lines and flagged none of 120 plain images, at several times the cost; it is no dependency of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from panfm.errors import UserError
from panfm.executor import run_tasks
from panfm.shards.index import ShardReader, ShardSet

SCREENING_VERSION = 1  # raise it when the same image would get other flags
IMAGES_PER_TASK = 128

FlagKind = Literal["face", "eye", "text"]
FLAG_KINDS: tuple[FlagKind, ...] = get_args(FlagKind)

# Faces and eyes: Viola and Jones, "Rapid object detection using a boosted cascade of simple features", CVPR 2001, with
# the cascades that OpenCV ships. (cascade, kind, neighbours that must agree, least size as a share of the short side).
# The plain eye cascade flags half of all dermoscopic images (a mole is a dark disc, as is a pupil): not used.
CASCADES: tuple[tuple[str, FlagKind, int, float], ...] = (
    ("haarcascade_frontalface_alt2.xml", "face", 4, 0.12),
    ("haarcascade_profileface.xml", "face", 4, 0.15),
    ("haarcascade_eye_tree_eyeglasses.xml", "eye", 3, 0.10),
)
FACE_SIDE = 240  # pixels of the short side at which faces are looked for
MAX_ENLARGEMENT = 3.0

# Writing: blobs of even brightness (MSER: Matas et al., BMVC 2002) that stand in a row, alike in size, stroke and
# contrast. The limits separate pasted lines of print from hair, pores, scales and reflections on real skin images.
TEXT_SIDE = 480  # pixels of the short side at which writing is looked for
MIN_LETTERS = 4  # in a row
MIN_LETTER_SIDE, MAX_LETTER_SHARE = 7, 0.3  # pixels; share of the short side
MIN_CONTRAST = 25.0  # grey levels of one letter against its rim
MIN_LINE_CONTRAST = 42.0  # mean of a row
MAX_STROKE_SHARE = 0.30  # stroke width by letter size, mean of a row
MAX_LENGTH_ALONG = 4.0  # length of a blob along its row by its width
MAX_GAP = 1.9  # distance of neighbours' centres by the larger one's size
MAX_BLOBS = 400  # the strongest ones of an image: texture gives thousands


@dataclass(frozen=True)
class Flag:
    """A place in an image that a person should look at."""

    key: str
    kind: FlagKind
    left: int  # of the box, in stored pixels
    top: int
    width: int
    height: int
    score: float  # text: letters in the row; face, eye: side of the box as a share of the image's short side


@dataclass(frozen=True)
class _Task:
    reader: ShardReader
    images: tuple[tuple[str, str, int, int], ...]  # key, shard, offset, length


def screen_images(shard_set: ShardSet, *, processes: int = 1) -> list[Flag]:
    """Look through all images of a shard set and return the flags in the order of its rows.

    Raises UserError where OpenCV is missing or has no cascades.
    """
    _load_cascades(_import_opencv())
    places, keys = shard_set.places, shard_set.table["key"].to_pylist()
    images = [
        (key, places.shard_names[places.shard[row]], int(places.offset[row]), int(places.length[row]))
        for row, key in enumerate(keys)
    ]
    tasks = [
        _Task(shard_set.reader, tuple(images[start : start + IMAGES_PER_TASK]))
        for start in range(0, len(images), IMAGES_PER_TASK)
    ]
    answers = run_tasks(
        _screen_some,
        tasks,
        description=f"screening of {shard_set.source}",
        processes=processes,
        unit="images",
        size=lambda task: len(task.images),
    )
    return [flag for answer in answers for flag in answer]


def _screen_some(task: _Task) -> list[Flag]:
    cv2 = _import_opencv()
    cv2.setNumThreads(1)  # the processes are the parallelism
    cascades = _load_cascades(cv2)
    flags = []
    for key, shard, offset, length in task.images:
        with Image.open(BytesIO(task.reader.read(shard, offset, length))) as image:
            pixels = np.asarray(image.convert("L"))
        for kind, box, score in [*find_faces(pixels, cascades), *find_text(pixels)]:
            flags.append(Flag(key, kind, *box, score))
    return flags


def _import_opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise UserError(
            'screening for faces and writing needs OpenCV, which is not installed; run pip install "panfm[screen]", or '
            "look at the images without it: --no-screen with --all or --sample N"
        ) from None
    return cv2


Box = tuple[int, int, int, int]  # left, top, width, height in pixels
Found = tuple[FlagKind, Box, float]


# ------------------------------------------------------------------------------------------------ faces and eyes


def _load_cascades(cv2: Any) -> list[tuple[Any, FlagKind, int, float]]:
    """Load the cascades; OpenCV 5 ships none."""
    folder = Path(getattr(getattr(cv2, "data", None), "haarcascades", ""))
    loaded = []
    for name, kind, neighbours, least in CASCADES:
        if not (folder / name).is_file():
            raise UserError(
                f"OpenCV {cv2.__version__}: has no {name}, which finds faces (OpenCV 5 dropped it); "
                'run pip install "panfm[screen]", which takes version 4'
            )
        loaded.append((cv2.CascadeClassifier(str(folder / name)), kind, neighbours, least))
    return loaded


def find_faces(pixels: np.ndarray, cascades: Sequence[tuple[Any, FlagKind, int, float]] | None = None) -> list[Found]:
    """Find upright faces, profiles (of either side) and eyes in grey `pixels` [height, width]; overlaps are merged."""
    cv2 = _import_opencv()
    grey, scale = _resize(cv2, pixels, FACE_SIDE)
    grey = cv2.equalizeHist(grey)
    short = min(grey.shape)
    found: list[Found] = []
    for cascade, kind, neighbours, least in _load_cascades(cv2) if cascades is None else cascades:
        side = max(8, round(short * least))
        boxes = [tuple(map(int, box)) for box in cascade.detectMultiScale(grey, 1.1, neighbours, 0, (side, side))]
        if kind == "face" and not boxes:  # the profile cascade knows one side only
            mirrored = cascade.detectMultiScale(cv2.flip(grey, 1), 1.1, neighbours, 0, (side, side))
            boxes = [(grey.shape[1] - int(x) - int(w), int(y), int(w), int(h)) for x, y, w, h in mirrored]
        for x, y, w, h in boxes:
            box = (round(x / scale), round(y / scale), round(w / scale), round(h / scale))
            if not any(kind == other[0] and _overlap(box, other[1]) > 0.3 for other in found):
                found.append((kind, box, round(w / short, 3)))
    return found


def _resize(cv2: Any, pixels: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """Bring the short side to `side` pixels; small images are enlarged, but not beyond what they can show."""
    scale = min(side / min(pixels.shape), MAX_ENLARGEMENT)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=method), scale


def _overlap(a: Box, b: Box) -> float:
    """Shared area as a share of the smaller box."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / max(min(a[2] * a[3], b[2] * b[3]), 1)


# ------------------------------------------------------------------------------------------------ writing


def find_text(pixels: np.ndarray) -> list[Found]:
    """Find rows of letter-like blobs, at any angle, in grey `pixels` [height, width]."""
    cv2 = _import_opencv()
    grey, scale = _resize(cv2, pixels, TEXT_SIDE)
    letters = _find_letters(cv2, grey)
    found: list[Found] = []
    for row in _find_rows(letters):
        members = letters[row]
        if np.abs(members[:, CONTRAST]).mean() < MIN_LINE_CONTRAST:
            continue
        if (members[:, STROKE] / members[:, SIZE]).mean() > MAX_STROKE_SHARE or _is_broken_line(members):
            continue
        low = members[:, [X, Y]] - members[:, [WIDTH, HEIGHT]] / 2
        high = members[:, [X, Y]] + members[:, [WIDTH, HEIGHT]] / 2
        left, top = (low.min(axis=0) / scale).tolist()
        right, bottom = (high.max(axis=0) / scale).tolist()
        found.append(("text", (round(left), round(top), round(right - left), round(bottom - top)), float(len(row))))
    return found


# Columns of a blob: centre, box, larger side, stroke width, contrast (negative: darker than its rim), unevenness of the
# stroke, direction of its long axis times how many times longer than wide it is.
X, Y, WIDTH, HEIGHT, SIZE, STROKE, CONTRAST, ROUGHNESS, AXIS_X, AXIS_Y = range(10)


def _is_broken_line(row: np.ndarray) -> bool:
    """Whether half of the blobs are drawn out along their row: pieces of a hair, where letters stand across it."""
    direction = row[-1, [X, Y]] - row[0, [X, Y]]
    along = np.abs(row[:, [AXIS_X, AXIS_Y]] @ direction) / max(float(np.linalg.norm(direction)), 1e-9)
    return bool((along > MAX_LENGTH_ALONG).mean() >= 0.5)


def _find_letters(cv2: Any, grey: np.ndarray) -> np.ndarray:
    """Blobs that could be a letter or digit, [num_blobs, 10], nested ones reduced to the most even."""
    detector = cv2.MSER_create(4, 12, int(grey.size * 0.02), 0.35, 0.2)
    regions, boxes = detector.detectRegions(grey)
    height, width = grey.shape
    kernel = np.ones((3, 3), np.uint8)
    blobs = []
    for points, (x, y, w, h) in zip(regions, boxes, strict=True):
        larger, smaller = max(w, h), min(w, h)
        if not MIN_LETTER_SIDE <= larger <= MAX_LETTER_SHARE * min(height, width):
            continue
        if smaller < 2 or larger > 9 * smaller or x <= 1 or y <= 1 or x + w >= width - 1 or y + h >= height - 1:
            continue
        if not 0.15 <= len(points) / (w * h) <= 0.97:
            continue
        blob = np.zeros((h + 4, w + 4), np.uint8)
        blob[points[:, 1] - y + 2, points[:, 0] - x + 2] = 1
        depth = cv2.distanceTransform(blob, cv2.DIST_L2, 3)
        ridge = depth[(depth >= cv2.dilate(depth, kernel)) & (depth > 0)]  # half the stroke width, along its middle
        rim = np.argwhere(cv2.dilate(blob, kernel, iterations=2) != blob) + np.array([y - 2, x - 2])
        rim = rim[(rim >= 0).all(axis=1) & (rim < (height, width)).all(axis=1)]
        inside = grey[points[:, 1], points[:, 0]].mean()
        contrast = inside - np.median(grey[rim[:, 0], rim[:, 1]])
        stroke, roughness = 2 * ridge.mean(), ridge.std() / ridge.mean()
        if abs(contrast) < MIN_CONTRAST or roughness >= 0.5 or stroke >= 0.5 * larger:
            continue
        variances, axes = np.linalg.eigh(np.cov(points, rowvar=False))
        axis = axes[:, 1] * np.sqrt(variances[1] / max(variances[0], 1 / 12))  # 1/12: a line of one pixel
        blobs.append((x + w / 2, y + h / 2, w, h, larger, stroke, contrast, roughness, *axis))
    letters = np.array(blobs, dtype=float).reshape(-1, 10)
    letters = letters[np.argsort(-np.abs(letters[:, CONTRAST]), kind="stable")[:MAX_BLOBS]]
    return _drop_nested(letters)


def _drop_nested(letters: np.ndarray) -> np.ndarray:
    order = np.argsort(letters[:, ROUGHNESS] - np.abs(letters[:, CONTRAST]) / 100, kind="stable")
    kept: list[int] = []
    low, high = letters[:, :2] - letters[:, 2:4] / 2, letters[:, :2] + letters[:, 2:4] / 2
    area = letters[:, WIDTH] * letters[:, HEIGHT]
    for one in order.tolist():
        shared = np.clip(np.minimum(high[kept], high[one]) - np.maximum(low[kept], low[one]), 0, None).prod(axis=1)
        if not (shared > 0.5 * np.minimum(area[kept], area[one])).any():
            kept.append(one)
    return letters[sorted(kept)]


def _find_rows(letters: np.ndarray) -> list[list[int]]:
    """Chains of at least MIN_LETTERS neighbours on a straight line; each blob in one chain, longest first."""
    if len(letters) < MIN_LETTERS:
        return []
    centres, size, contrast = letters[:, :2], letters[:, SIZE], letters[:, CONTRAST]
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    larger, smaller = np.maximum(size[:, None], size), np.minimum(size[:, None], size)
    alike = (larger < 2 * smaller) & (np.sign(contrast)[:, None] == np.sign(contrast))
    near = alike & (distance < MAX_GAP * larger) & (distance > 0.3 * smaller)
    for values in (letters[:, STROKE], np.abs(contrast)):
        near &= np.maximum(values[:, None], values) < 2.2 * np.minimum(values[:, None], values)
    chains = []
    for first, second in np.argwhere(np.triu(near, 1)).tolist():
        direction = (centres[second] - centres[first]) / distance[first, second]
        offset = centres - centres[first]
        across = np.abs(offset[:, 0] * direction[1] - offset[:, 1] * direction[0])
        on_line = np.flatnonzero((across < 0.3 * max(size[first], size[second])) & (alike[first] | alike[second]))
        on_line = on_line[np.argsort(offset[on_line] @ direction, kind="stable")].tolist()
        start = stop = on_line.index(first)
        while start > 0 and near[on_line[start], on_line[start - 1]]:
            start -= 1
        while stop + 1 < len(on_line) and near[on_line[stop], on_line[stop + 1]]:
            stop += 1
        if stop + 1 - start >= MIN_LETTERS:
            chains.append(on_line[start : stop + 1])
    rows: list[list[int]] = []
    taken: set[int] = set()
    for chain in sorted(chains, key=len, reverse=True):
        if taken.isdisjoint(chain):
            taken.update(chain)
            rows.append(chain)
    return rows
