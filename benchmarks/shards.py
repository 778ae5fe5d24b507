"""Images a second per core: `panfm shards build` beside a plain Pillow + WebDataset loop on the same images.

    python benchmarks/shards.py [--quick] [--json FILE] [--images FOLDER] [--memory]

Both read the same table and the same JPEGs, shrink to a short side of 512, and store JPEGs of quality 95 without
chroma subsampling. The plain loop decodes with Pillow at a fraction (`draft`), resizes, encodes, and hands image and
JSON to `webdataset.ShardWriter`; it neither checks nor hashes nor pseudonymises, and nothing survives its being killed.
It runs with two filters: Lanczos, which panfm uses too, and bicubic, Pillow's default. One process on one core,
interleaved, medians. Images are drawn, with the grain of a sensor; `--images` adds a folder of real ones.
`--memory` measures how the memory of the building process grows with the archive instead.
"""

import argparse
import csv
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rows import Row, write_rows

from panfm.shards.cards import SourceCard
from panfm.shards.synthetic import write_archive
from panfm.shards.writer import BuildOptions, build_shards

SHORT_SIDE = 512
# Width and height of the drawn photographs, and their grain in grey levels: with it the files have as many bits a pixel
# as dermoscopic archives have at these sizes (1.6, and 0.4 to 0.9 where the camera has more pixels than the lens).
SIZES = ((1024, 768, 4.0), (2000, 1500, 1.5), (3000, 2000, 1.5))
FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
MEMORY_SIZES = (2_000, 20_000, 200_000)


def draw_archive(root: Path, size: tuple[int, int], grain: float, num_images: int) -> None:
    """Photographs of `size` and a table: drawn small, enlarged, with the grain of a sensor, as 4:2:0 JPEG."""
    (root / "images").mkdir(parents=True)
    drawn = root.parent / "drawn"
    if not drawn.exists():
        write_archive(drawn, num_patients=8, seed=0)
    paths = sorted((drawn / "images").glob("*.jpg"))
    for number in range(num_images):
        with Image.open(paths[number * 7 % len(paths)]) as image:
            smooth = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        noise = np.random.default_rng(number).normal(0, grain, (size[1], size[0], 1))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:04d}.jpg", quality=90)


def copy_archive(root: Path, folder: Path) -> None:
    """The JPEGs of a folder that are larger than the short side."""
    (root / "images").mkdir(parents=True)
    for path in sorted(folder.rglob("*.jp*g")):
        with Image.open(path) as image:
            large = min(image.size) > SHORT_SIDE
        if large:
            shutil.copy(path, root / "images" / path.name)


def write_table(root: Path, num_rows: int) -> SourceCard:
    """A table of `num_rows` over the images of the archive, again and again, and its card."""
    paths = sorted((root / "images").iterdir())
    if not paths:
        sys.exit(f"{root}: no JPEG larger than {SHORT_SIDE} px; give another --images")
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "file", "patient", "age", "sex", "dx"))
        for number in range(num_rows):
            name = f"images/{paths[number % len(paths)].name}"
            row = (number, name, f"P{number // 4}", 20 + number % 60, "fm"[number % 2], ("nv", "mel")[number % 2])
            writer.writerow(row)
    return SourceCard.model_validate(
        {
            "version": 1,
            "name": "benchmark",
            "title": "Images of the benchmark",
            "origin": "benchmarks/shards.py",
            "licence": "CC0 1.0",
            "permitted_uses": ["research"],
            "identifiers": "public",
            "access": "open",
            "how_to_obtain": "drawn",
            "modality": "clinical",
            "table": "table.csv",
            "columns": {"path": "file", "key": "id", "patient_id": "patient", "age": "age", "sex": "sex"},
            "values": {"sex": {"f": "female", "m": "male"}},
            "labels": {"diagnosis": {"column": "dx", "values": {"nv": "nevus", "mel": "melanoma"}}},
        }
    )


def build_plainly(root: Path, out: Path, resample: Image.Resampling) -> int:
    """The peer; returns the bytes of its images."""
    import webdataset  # here, because it loads torch, which would be in the way of measuring memory

    num_bytes = 0
    out.mkdir()
    sink = webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=1024, verbose=0)
    with (root / "table.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            with Image.open(root / row["file"]) as image:
                scale = SHORT_SIDE / min(image.size)
                size = (round(image.width * scale), round(image.height * scale))
                facts = {**row, "original_width": image.width, "original_height": image.height}
                image.draft("RGB", size)
                shrunk = image.convert("RGB").resize(size, resample)
            buffer = io.BytesIO()
            shrunk.save(buffer, "JPEG", quality=95, subsampling=0)
            num_bytes += buffer.tell()
            sink.write({"__key__": row["id"], "jpg": buffer.getvalue(), "json": facts})
    sink.close()
    return num_bytes


def build_ours(card: SourceCard, root: Path, out: Path) -> int:
    """`panfm shards build` in this process; returns the bytes of its images."""
    report = build_shards(card, root, out, options=BuildOptions(short_side=SHORT_SIDE))
    assert not report.num_rejected, report.num_rejected
    return int(sum(pq.read_table(out / "samples.parquet", columns=["length"])["length"].to_pylist()))


def measure(name: str, root: Path, num_rows: int, rounds: int) -> list[Row]:
    """Ours and both peers in turn on one archive."""
    card = write_table(root, num_rows)
    out = root.parent / "out"
    seconds: dict[str, list[float]] = {}
    num_bytes: dict[str, int] = {}

    def time_one(who: str, build: Callable[[], int]) -> None:
        start = time.perf_counter()
        num_bytes[who] = build()
        seconds.setdefault(who, []).append(time.perf_counter() - start)
        shutil.rmtree(out)

    build_plainly(root, out, Image.Resampling.BOX)  # imports and file caches are not what is compared
    shutil.rmtree(out)
    for _ in range(rounds):
        time_one("ours", lambda: build_ours(card, root, out))
        for which, resample in FILTERS.items():
            time_one(which, lambda resample=resample: build_plainly(root, out, resample))  # type: ignore[misc]
    rates = {who: num_rows / statistics.median(times) for who, times in seconds.items()}
    rows = [
        Row(f"{name}, plain loop {which}", rates["ours"], rates[which], rates["ours"] / rates[which], "images/s a core")
        for which in FILTERS
    ]
    size, peer = num_bytes["ours"] / num_rows / 1e3, num_bytes["Lanczos"] / num_rows / 1e3
    return [*rows, Row(f"{name}, stored size", size, peer, peer / size, "kB an image")]


# ------------------------------------------------------------------------------------------------ memory

MEMORY_PROGRAM = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import shards
root = Path(sys.argv[2])
card = shards.write_table(root, int(sys.argv[3]))
shards.build_shards(card, root, root.parent / "out", options=shards.BuildOptions())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure_memory(sizes: tuple[int, ...]) -> list[Row]:
    """Peak memory of a building process, for archives that differ in their number of rows alone."""
    peaks = []
    for num_rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "raw"
            (root / "images").mkdir(parents=True)
            pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(root / "images/a.jpg")
            here = str(Path(__file__).resolve().parent)
            command = [sys.executable, "-c", MEMORY_PROGRAM, here, str(root), str(num_rows)]
            answer = subprocess.run(command, capture_output=True, check=True, text=True)  # noqa: S603 - itself
            peaks.append(int(answer.stdout) * 1024)
    rows = []
    for (few, low), (many, high) in zip(
        zip(sizes[:-1], peaks[:-1], strict=True), zip(sizes[1:], peaks[1:], strict=True), strict=True
    ):
        rows.append(Row(f"peak memory, {many:,} rows beside {few:,}", high / 1e6, low / 1e6, low / high, "MB"))
        growth = (high - low) / (many - few)
        rows.append(Row(f"growth from {few:,} to {many:,} rows", growth, 1500.0, 1500.0 / growth, "bytes a row"))
    return rows


def print_rows(rows: list[Row]) -> list[Row]:
    """Print lines of the table as they are ready, or its head where there are none; and hand them on."""
    if not rows:
        print(f"{'':<44}  {'ratio':>6}  {'panfm':>9}  {'peer':>9}")
    for row in rows:
        print(f"{row.name:<44}  {row.ratio:>6.2f}  {row.ours:>9.1f}  {row.peer:>9.1f}  {row.unit}", flush=True)
    return rows


def main() -> None:
    """Measure, print one table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--images", type=Path, help="a folder of real JPEGs, measured besides")
    parser.add_argument("--memory", action="store_true", help="memory instead of speed; takes some ten minutes")
    arguments = parser.parse_args()
    if arguments.memory:
        print_rows([])
        rows = print_rows(measure_memory(MEMORY_SIZES[:2] if arguments.quick else MEMORY_SIZES))
    else:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        rounds, num_files, num_rows = (3, 6, 48) if arguments.quick else (3, 24, 400)
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            archives: list[tuple[str, Path]] = []
            if arguments.images:
                archives.append((f"real ({arguments.images.name})", Path(folder) / "real"))
                copy_archive(archives[-1][1], arguments.images)
            for width, height, grain in SIZES:
                archives.append((f"drawn {width} x {height}", Path(folder) / f"drawn-{width}"))
                draw_archive(archives[-1][1], (width, height), grain, num_files)
            print_rows([])
            for name, root in archives:
                rows += print_rows(measure(name, root, num_rows, rounds))
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
