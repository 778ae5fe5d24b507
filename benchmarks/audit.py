"""The audit's search and its judgement, measured: how long, how much memory, what is found, what is wrongly found.

    python benchmarks/audit.py [--quick] [--full] [--json FILE] [--images DIR]

search: planted copies among hashes that are mixtures of real-like ones; time of `search_hashes` beside the plain numpy
scan of all pairs (XOR and popcount) on a part of the queries, in one interleaved run. --full: 2,000,000 x 100,000.
recall: changed copies of real images (--images: a folder with images and a table, see IMAGE_SETS) against all images of
their set, through the same functions as `panfm audit`; and the pairs of different groups that pass as copies.
"""

import argparse
import csv
import io
import json
import platform
import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from panfm.shards.duplicates import ALIKE_DISTANCE
from panfm.shards.hash_search import (
    HASH_BITS,
    HASH_BYTES,
    MAX_DISTANCE,
    count_bits,
    count_cores,
    orient_hashes,
    search_hashes,
)
from panfm.shards.pixel_match import MIN_SCORE, make_thumbnail, orient_image, score_pairs
from panfm.shards.quality import compute_phash

IMAGE_SETS = {
    "ham10000": "dermoscopic/ham10000",
    "pad_ufes20": "clinical/pad_ufes20",
    "lc25000_colon": "histopathology/lc25000_colon",
    "bbbc038_stained": "histopathology/bbbc038_stained",
}
SIZES = {"quick": (50_000, 1_000), "plain": (400_000, 20_000), "full": (2_000_000, 100_000)}
SCANNED = 20  # queries of the plain scan
FLIPPED = 0.15  # bits of a planted copy that differ from its original
DISTANCES = (32, 48, 56, 64)

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def recompress(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def crop(image: Image.Image, share: float, rng: np.random.Generator | None) -> Image.Image:
    """Take away `share` of the area: at a random place, or (no rng) evenly around the middle."""
    width, height = (round(side * np.sqrt(1 - share)) for side in image.size)
    free = image.width - width, image.height - height
    x, y = (side // 2 for side in free) if rng is None else (int(rng.integers(0, side + 1)) for side in free)
    return image.crop((x, y, x + width, y + height))


def cut_square(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (min(image.size), min(image.size)))


def scale_channels(image: Image.Image, factors: tuple[float, float, float]) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(image) * np.array(factors), 0, 255).astype(np.uint8))


def change_gamma(image: Image.Image, gamma: float) -> Image.Image:
    return image.point([round(255 * (value / 255) ** gamma) for value in range(256)] * 3)


def add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image) + rng.normal(0, 10, (image.height, image.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def combine(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    turned = ImageOps.mirror(image).transpose(Image.Transpose.ROTATE_270)
    recoloured = scale_channels(crop(turned, 0.1, rng), (1.1, 1.0, 0.9))
    return recompress(recoloured.resize((96, 96), Image.Resampling.BILINEAR), 50)


CHANGES: dict[str, Change] = {
    "resized to half": lambda image, rng: image.resize((image.width // 2, image.height // 2)),
    "resized to 64 x 64": lambda image, rng: image.resize((64, 64), Image.Resampling.BILINEAR),
    "JPEG quality 30": lambda image, rng: recompress(image, 30),
    "JPEG quality 10": lambda image, rng: recompress(image, 10),
    "mirrored": lambda image, rng: ImageOps.mirror(image),
    "turned by 90": lambda image, rng: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180": lambda image, rng: image.transpose(Image.Transpose.ROTATE_180),
    "white balance": lambda image, rng: scale_channels(image, (1.15, 1.0, 0.85)),
    "gamma 0.7": lambda image, rng: change_gamma(image, 0.7),
    "gamma 1.5": lambda image, rng: change_gamma(image, 1.5),
    "brightness + 30 %": lambda image, rng: ImageEnhance.Brightness(image).enhance(1.3),
    "contrast - 40 %": lambda image, rng: ImageEnhance.Contrast(image).enhance(0.6),
    "grey": lambda image, rng: image.convert("L").convert("RGB"),
    "noise, 10 levels": add_noise,
    "crop 5 %, anywhere": lambda image, rng: crop(image, 0.05, rng),
    "crop 10 %, middle": lambda image, rng: crop(image, 0.1, None),
    "crop 10 %, anywhere": lambda image, rng: crop(image, 0.1, rng),
    "crop 20 %, middle": lambda image, rng: crop(image, 0.2, None),
    "crop 20 %, anywhere": lambda image, rng: crop(image, 0.2, rng),
    "square in the middle": lambda image, rng: cut_square(image),
    "mirror, turn, crop 10 %, recolour, 96 px, JPEG 50": combine,
    "turned by 2": lambda image, rng: image.rotate(2, Image.Resampling.BICUBIC),
    "turned by 5": lambda image, rng: image.rotate(5, Image.Resampling.BICUBIC),
    "turned by 15": lambda image, rng: image.rotate(15, Image.Resampling.BICUBIC),
    "black border 5 %": lambda image, rng: ImageOps.expand(image, round(0.05 * image.width)),
}


def hash_image(image: Image.Image) -> NDArray[np.uint8]:
    text = compute_phash(image)
    return np.frombuffer(bytes.fromhex(text or "00" * HASH_BYTES), dtype=np.uint8)


def make_hashes(count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Hashes as unevenly spread as real ones: the lower a frequency, the more its bit agrees with a common pattern."""
    agree = 0.5 + 0.25 * np.exp(-np.arange(HASH_BITS) / 40)  # measured bit entropies: 0.95 at the lowest, 1 above
    common = rng.random(HASH_BITS) < 0.5
    hashes = np.empty((count, HASH_BYTES), dtype=np.uint8)
    for start in range(0, count, 100_000):
        stop = min(start + 100_000, count)
        hashes[start:stop] = np.packbits((rng.random((stop - start, HASH_BITS)) < agree) == common, axis=1)
    return hashes


def scan(database: NDArray[np.uint8], queries: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Every pair compared: the smallest distance of each query over rows and orientations."""
    words = database.view(np.uint64)
    best = np.full(len(queries), HASH_BITS)
    for oriented in orient_hashes(queries):
        for number, query in enumerate(np.ascontiguousarray(oriented).view(np.uint64)):
            best[number] = min(best[number], int(count_bits(words ^ query).sum(axis=1, dtype=np.uint16).min()))
    return best


def measure_search(size: str) -> dict[str, object]:
    num_database, num_queries = SIZES[size]
    rng = np.random.default_rng(0)
    database, queries = make_hashes(num_database, rng), make_hashes(num_queries, rng)
    planted = rng.choice(num_database, num_queries // 50, replace=False)
    turned = orient_hashes(database[planted])[rng.integers(0, 8, len(planted)), np.arange(len(planted))]
    # As in real copies, low frequencies change least.
    share = FLIPPED * (0.4 + 1.2 * np.arange(HASH_BITS) / HASH_BITS)
    queries[: len(planted)] = turned ^ np.packbits(rng.random((len(planted), HASH_BITS)) < share, axis=1)
    part = queries[:SCANNED]
    started = time.perf_counter()
    scan(database, part)
    middle = time.perf_counter()
    matches = search_hashes(database, queries)
    ended = time.perf_counter()
    own = matches.query < len(planted)
    found = np.count_nonzero(matches.row[own] == planted[matches.query[own]])
    within = (
        count_bits((orient_hashes(database[planted]) ^ queries[: len(planted)]).view(np.uint64)).sum(axis=2).min(axis=0)
    )
    scan_seconds = (middle - started) * num_queries / len(part) / count_cores()
    return {
        "database": num_database,
        "queries": num_queries,
        "seconds": round(ended - middle, 2),
        "plain_scan_seconds_on_all_cores": round(scan_seconds, 1),
        "times_faster": round(scan_seconds / (ended - middle), 1),
        "planted_within_distance": int((within <= MAX_DISTANCE).sum()),
        "planted_found": int(found),
        "pairs": len(matches.query),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "cores": count_cores(),
    }


def measure_recall(folder: Path, num_copies: int, num_images: int | None) -> dict[str, object]:
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:num_images]
    groups = np.array([row["lesion_id"] or row["group_id"] for row in rows])
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:num_copies])
    hashes, thumbnails = [], []
    copies: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {name: [] for name in CHANGES}
    wanted = set(chosen.tolist())
    for number, row in enumerate(rows):
        image = Image.open(folder / row["path"]).convert("RGB")
        hashes.append(hash_image(image))
        thumbnails.append(make_thumbnail(image))
        if number in wanted:
            for name, change in CHANGES.items():
                copy = change(image, np.random.default_rng([zlib.crc32(name.encode()), number]))
                copies[name].append((hash_image(copy), make_thumbnail(copy)))
    database = np.stack(hashes)

    def judge(queries: NDArray[np.uint8], pixels: list[NDArray[np.uint8]]) -> tuple[NDArray, ...]:
        found = search_hashes(database, queries)
        laid = [orient_image(pixels[query], turn) for query, turn in zip(found.query, found.orientation, strict=True)]
        score = score_pairs(laid, [thumbnails[row] for row in found.row])
        return found.query, found.row, found.distance, score, (score >= MIN_SCORE) | (found.distance <= ALIKE_DISTANCE)

    recall = {}
    for name, pairs in copies.items():
        query, row, distance, _, copy = judge(np.stack([pair[0] for pair in pairs]), [pair[1] for pair in pairs])
        own = row == chosen[query]
        recall[name] = {
            "by_hash": round(float(np.count_nonzero(own)) / len(pairs), 3),
            "found": round(float(np.count_nonzero(own & copy)) / len(pairs), 3),
            **{
                f"found_at_{limit}": round(float(np.count_nonzero(own & copy & (distance <= limit))) / len(pairs), 3)
                for limit in DISTANCES
            },
        }
    query, row, distance, score, copy = judge(database, thumbnails)
    once = query < row
    taken = once & copy & (groups[query] != groups[row])
    different = once & (groups[query] != groups[row])
    num_different = len(rows) * (len(rows) - 1) // 2 - sum(
        n * (n - 1) // 2 for n in np.unique(groups, return_counts=True)[1]
    )
    return {
        "images": len(rows),
        "copies": len(chosen),
        "pairs_of_different_groups": int(num_different),
        "of_these_near_by_hash": {str(limit): int((different & (distance <= limit)).sum()) for limit in DISTANCES},
        "of_these_taken_for_copies": {str(limit): int((taken & (distance <= limit)).sum()) for limit in DISTANCES},
        "pairs_of_one_group_taken_for_copies": int((once & copy & ~different).sum()),
        "recall": recall,
        "taken_for_copies": [
            [rows[a]["path"], rows[b]["path"], int(bits), round(float(value), 3)]
            for a, b, bits, value in zip(*(part[taken] for part in (query, row, distance, score)), strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, for a look")
    parser.add_argument("--full", action="store_true", help="search 2,000,000 x 100,000")
    parser.add_argument("--images", type=Path, help="folder of real images, for recall and false positives")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    size = "quick" if options.quick else "full" if options.full else "plain"
    figures: dict[str, object] = {"machine": platform.machine(), "search": measure_search(size)}
    print(json.dumps(figures["search"], indent=1))
    if options.images is not None:
        for name, place in IMAGE_SETS.items():
            folder = options.images / place
            if not (folder / "manifest.csv").is_file():
                print(f"{folder}: absent, left out")
                continue
            figures[name] = measure_recall(folder, *((60, 500) if options.quick else (400, None)))
            print(name, json.dumps(figures[name], indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
