"""Images a second per core, from tar shards to a collated batch: panfm's loader beside the field's idiom.

    python benchmarks/loader.py [--quick] [--json FILE] [--images FOLDER]

The same shards (written by panfm, photographs at full size), the same crops of the same images, the same mirrorings,
the same filter (bicubic, antialiased), 224 pixels, batches of the same size, one worker process, one core. What counts
is the processor time of the worker and the receiving process together, so that the cost of the border between them is
in it and other work on the machine is not (but for what it does to caches and memory). The sides take turns; every
figure is the median of the rounds, and so is the ratio. Before anything is timed, panfm's views are compared with the
peer's.

    panfm                 the loader as training uses it; batches of uint8, normalised on the device
    idiom                 webdataset, Pillow, torchvision v2: crop, mirror, ToImage, ToDtype, Normalize
    idiom, tensors first  the same with ToImage first, which torchvision's documentation recommends
    torchvision's decoder `decode_jpeg` of the same bytes, alone: no crop, no resize, no batch

The photographs are drawn with the grain of a sensor, so that a JPEG of quality 90 has 2 to 3 bits a pixel as from a
camera; `--images` adds a folder of real ones. The last rows are the border between processes by itself.
"""

import argparse
import csv
import functools
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from rows import Row, write_rows
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from panfm.data.batch import Batch
from panfm.data.loader import DataConfig, ExcludeConfig, Loader, LoaderState, build_loader
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, sample_views
from panfm.shards.cards import SourceCard
from panfm.shards.index import open_shard_set
from panfm.shards.writer import BuildOptions, build_shards

SIDE = 224
CROP_SCALE = (0.2, 1.0)
BORDER_BATCH = 64
PREFETCH = 2
GRAIN = 5.0  # grey levels, see the docstring


@dataclass(frozen=True)
class Archive:
    """Images of one kind. num_distinct of them are drawn, and repeated under other names to num_samples."""

    name: str
    size: tuple[int, int]
    kind: str
    num_distinct: int
    num_samples: int
    batch_size: int  # so that a batch takes the idiom half a second


ARCHIVES = (
    Archive("600 x 450", (600, 450), "jpg", 24, 256, 64),
    Archive("1024 x 768", (1024, 768), "jpg", 16, 128, 32),
    Archive("3000 x 2000", (3000, 2000), "jpg", 6, 32, 8),
    Archive("512 x 512 PNG", (512, 512), "png", 16, 128, 64),
)


@dataclass(frozen=True)
class View:
    """What is done to one image for one view."""

    box: tuple[int, int, int, int]
    mirrored: bool


# ------------------------------------------------------------------------------------------------ images


def draw_photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Blobs of every size down to a few pixels, and grain."""
    rng = np.random.default_rng(seed)
    width, height = size
    pixels = np.full((height, width, 3), 150.0, dtype=np.float32)
    for cell in (512, 128, 32, 8):
        coarse = rng.normal(0, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        for channel in range(3):
            fine = Image.fromarray(coarse[:, :, channel] * 0.5 + coarse[:, :, 0])
            pixels[:, :, channel] += np.asarray(fine.resize(size, Image.Resampling.BICUBIC)) * (1.5 * cell**0.5)
    pixels += rng.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_archive(root: Path, archive: Archive) -> None:
    (root / "images").mkdir(parents=True)
    for number in range(archive.num_distinct):
        picture = draw_photograph(number, archive.size)
        picture.save(root / "images" / f"{number:04d}.{archive.kind}", quality=90)


def build_set(root: Path, num_samples: int) -> Path:
    """Write a table over the images, again and again, and the shards: full size, bytes as they are."""
    paths = sorted(path for path in (root / "images").iterdir())
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "file"))
        for number in range(num_samples):
            writer.writerow((number, f"images/{paths[number % len(paths)].name}"))
    card = SourceCard.model_validate(
        {
            "version": 1,
            "name": "benchmark",
            "title": "Images of the benchmark",
            "origin": "benchmarks/loader.py",
            "licence": "CC0 1.0",
            "permitted_uses": ["research"],
            "identifiers": "public",
            "access": "open",
            "how_to_obtain": "drawn",
            "modality": "clinical",
            "table": "table.csv",
            "columns": {"path": "file", "key": "id"},
        }
    )
    out = root.parent / f"{root.name}-shards"
    report = build_shards(card, root, out, options=BuildOptions(short_side=None, samples_per_shard=64))
    assert not report.num_rejected, report.num_rejected
    return out


# ------------------------------------------------------------------------------------------------ the sides


def make_augment(views: int) -> AugmentConfig:
    """Crops and mirrorings alone: the idiom turns nothing and leaves colour as it is."""
    return AugmentConfig(
        image_size=SIDE,
        views=views,
        crop_scale=CROP_SCALE,
        rotations=False,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        white_balance=0.0,
    )


def build_ours(shards: Path, batch_size: int, views: int, workers: int) -> Loader:
    return build_loader(
        DataConfig(shards=(str(shards),), exclude=ExcludeConfig(tasks="none"), workers=workers, prefetch=PREFETCH),
        MixtureConfig(),
        make_augment(views),
        mask=None,
        mask_grid=(SIDE // 16, SIDE // 16),
        seed=0,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        excluded={},
    )


def list_views(
    loader: Loader, shards: Path, num_views: int, num_samples: int
) -> tuple[Batch, list[str], dict[str, list[View]]]:
    """What panfm draws in its first epoch: the batch, the key at each position, and each key's views."""
    table = open_shard_set(shards).table
    drawn = loader.draw(range(num_samples))
    keys, views = [], {}
    for sample in drawn.samples:
        key = table["key"][sample.row].as_py()
        size = (table["width"][sample.row].as_py(), table["height"][sample.row].as_py())
        plans = sample_views(size, sample.modality, loader.make_view_rngs(sample.position), make_augment(num_views))
        assert key not in views and all(plan.jitter is None and not plan.quarter_turns for plan in plans)
        keys.append(key)
        views[key] = [View(plan.box, plan.mirrored) for plan in plans]
    return drawn.batch, keys, views


class Idiom:
    """The idiom's transform: what v2.RandomResizedCrop and v2.RandomHorizontalFlip do, with given draws."""

    def __init__(self, views: dict[str, list[View]], tensors_first: bool) -> None:
        self.views = views
        self.tensors_first = tensors_first
        self.to_image = v2.ToImage()
        self.finish = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)]
        )

    def __call__(self, sample: tuple[str, Image.Image]) -> tuple[torch.Tensor, ...]:
        key, image = sample
        return tuple(
            self.finish(picture) for picture in self.cut(key, self.to_image(image) if self.tensors_first else image)
        )

    def cut(self, key: str, image: Any) -> Iterator[torch.Tensor]:
        for view in self.views[key]:
            left, top, right, bottom = view.box
            picture = functional.resized_crop(
                image, top, left, bottom - top, right - left, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True
            )
            picture = functional.horizontal_flip(picture) if view.mirrored else picture
            yield picture if self.tensors_first else self.to_image(picture)


def build_idiom(shards: Path, archive: Archive, transform: Idiom) -> DataLoader:
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .repeat()
        .decode("pilrgb", only=[archive.kind])
        .to_tuple("__key__", archive.kind)
        .map(transform)
    )
    return DataLoader(dataset, batch_size=archive.batch_size, num_workers=1, prefetch_factor=PREFETCH)


def check_same_views(shards: Path, archive: Archive) -> None:
    """panfm's first batch is what the idiom makes of the same images with the same boxes: 33 dB, mean over pixels."""
    with build_ours(shards, archive.batch_size, 2, workers=0) as loader:
        batch, keys, views = list_views(loader, shards, 2, archive.batch_size)
    for tensors_first in (False, True):
        idiom = Idiom(views, tensors_first)
        found = 0
        for sample in webdataset.WebDataset(
            [str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False
        ).decode("pilrgb", only=[archive.kind]):
            if sample["__key__"] not in views:
                continue
            place = keys.index(sample["__key__"])
            image = sample[archive.kind]
            for number, picture in enumerate(
                idiom.cut(sample["__key__"], idiom.to_image(image) if tensors_first else image)
            ):
                error = (batch.views[number][place].float() - picture.float()).square().mean()
                assert error < 255**2 / 10**3.5, (archive.name, sample["__key__"], float(error))
                found += 1
        assert found == 2 * archive.batch_size, found


# ------------------------------------------------------------------------------------------------ measuring


class Side:
    """A running loader with one worker. `time` takes batches and counts the processor time of both processes."""

    def __init__(self, batches: Iterable[Any], batch_size: int) -> None:
        self.batch_size = batch_size
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        self.batches = iter(batches)
        next(self.batches)
        children = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        self.workers = [child for child in children if child.cpu_times().user > 0.02]  # not the fork server's helpers
        next(self.batches)

    def time(self, num_batches: int) -> float:
        """Images a second of processor time, from a full queue to a full queue: so many are made as are taken."""
        start = self._wait_until_full()
        taken = time.process_time()
        for _ in range(num_batches):
            batch = next(self.batches)
            assert batch is not None
        taken = time.process_time() - taken
        return num_batches * self.batch_size / (self._wait_until_full() - start + taken)

    def _wait_until_full(self) -> float:
        """Wait until the worker sleeps and stays asleep; return its seconds of processor time so far."""
        seconds, polls = -1.0, 0
        while polls < 8:
            time.sleep(0.02)
            now = sum(sum(worker.cpu_times()[:2]) for worker in self.workers)
            asleep = all(worker.status() == psutil.STATUS_SLEEPING for worker in self.workers)
            polls = polls + 1 if asleep and now == seconds else 0
            seconds = now
        return seconds


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            rates[name].append(run())
    return rates


def compare(name: str, rates: dict[str, list[float]], unit: str, *, less_is_better: bool = False) -> list[Row]:
    """A row a peer; the ratio is the median of the rounds' ratios."""
    ours = rates["panfm"]
    rows = []
    for peer, values in rates.items():
        if peer != "panfm":
            pairs = zip(values, ours, strict=True) if less_is_better else zip(ours, values, strict=True)
            ratio = statistics.median(first / second for first, second in pairs)
            rows.append(Row(f"{name}, {peer}", statistics.median(ours), statistics.median(values), ratio, unit))
    return rows


def measure_archive(shards: Path, archive: Archive, views: int, rounds: int, quick: bool) -> list[Row]:
    seconds = 0.3 if quick else 1.0  # a turn of a side

    def run_decoder() -> float:
        start = time.process_time()
        for data in stored:
            decode_jpeg(data)
        return len(stored) / (time.process_time() - start)

    ours = build_ours(shards, archive.batch_size, views, workers=1)
    _, _, drawn = list_views(ours, shards, views, archive.num_samples)
    running = {
        "panfm": Side(ours.iterate(LoaderState(0), rank=0, world_size=1), archive.batch_size),
        "idiom": Side(build_idiom(shards, archive, Idiom(drawn, tensors_first=False)), archive.batch_size),
    }
    if not quick:
        peer = build_idiom(shards, archive, Idiom(drawn, tensors_first=True))
        running["idiom, tensors first"] = Side(peer, archive.batch_size)
    sides: dict[str, Callable[[], float]] = {}
    for name, side in running.items():
        num_batches = max(1 if quick else 2, round(seconds * side.time(1) / archive.batch_size))
        sides[name] = functools.partial(side.time, num_batches)
    if archive.kind == "jpg":
        samples = webdataset.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False)
        stored = [torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8) for sample in samples][:32]
        sides["torchvision's decoder alone"] = run_decoder
    plural = "one view" if views == 1 else f"{views} views"
    rows = compare(f"{archive.name}, {plural}", take_turns(sides, rounds), "images/s a core")
    ours.close()
    return rows


# ------------------------------------------------------------------------------------------------ the border


class Ready(Dataset):
    """Batches that cost next to nothing to make: what is left is the border between processes."""

    def __init__(self, dtype: torch.dtype, shared: bool) -> None:
        self.dtype, self.shared = dtype, shared

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> torch.Tensor:
        shape = (BORDER_BATCH, 3, SIDE, SIDE)
        if not self.shared:
            return torch.full(shape, index % 200, dtype=self.dtype)
        storage = torch.UntypedStorage._new_shared(int(np.prod(shape)) * self.dtype.itemsize)
        return torch.empty(0, dtype=self.dtype).set_(storage, 0, shape).fill_(index % 200)  # type: ignore[call-overload]


def time_inside(dataset: Ready) -> float:
    """Microseconds an image of the same work in this process."""
    start = time.process_time()
    for number in range(10):
        assert dataset[number] is not None
    return 1e6 * (time.process_time() - start) / (10 * BORDER_BATCH)


def measure_border(rounds: int) -> list[Row]:
    """Processor time of a batch that another process fills with one value, beside filling it here."""

    def start(dtype: torch.dtype, shared: bool) -> Callable[[], float]:
        side = Side(DataLoader(Ready(dtype, shared), batch_size=None, num_workers=1, prefetch_factor=4), BORDER_BATCH)
        return lambda: 1e6 / side.time(10)

    sides = {
        "panfm": start(torch.uint8, shared=False),
        "float32 batch": start(torch.float32, shared=False),
        "uint8 batch made in shared memory": start(torch.uint8, shared=True),
        "no border, uint8": lambda: time_inside(Ready(torch.uint8, shared=False)),
    }
    rates = take_turns(sides, rounds)
    return compare("process border", rates, "us an image", less_is_better=True)


def main() -> None:
    """Measure, print one table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--images", type=Path, help="a folder of real JPEGs, measured besides")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torchvision's decoders are deprecated; webdataset warns of one shard a worker
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rounds = 3 if arguments.quick else 5
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        archives = list(ARCHIVES[:3] if arguments.quick else ARCHIVES)
        for archive in archives:
            draw_archive(Path(folder) / archive.name, archive)
        if arguments.images:
            real = Path(folder) / "real"
            (real / "images").mkdir(parents=True)
            for number, path in enumerate(sorted(arguments.images.rglob("*.jp*g"))):
                (real / "images" / f"{number:05d}.jpg").symlink_to(path.resolve())
            num_files = len(list((real / "images").iterdir()))
            if not num_files:
                sys.exit(f"{arguments.images}: no JPEG; give another --images")
            archives.append(Archive("real", (0, 0), "jpg", num_files, max(128, num_files), 32))
        for archive in archives:
            root = Path(folder) / archive.name
            shards = build_set(root, archive.num_samples)
            describe(root, archive)
            check_same_views(shards, archive)
            for views in (1, 2):
                rows += measure_archive(shards, archive, views, rounds, arguments.quick)
        rows += measure_border(rounds)
    width = max(len(row.name) for row in rows)
    print(f"{'':<{width}}  {'panfm / peer':>12}  {'panfm':>10}  {'peer':>10}")
    for row in rows:
        print(f"{row.name:<{width}}  {row.ratio:>12.2f}  {row.ours:>10.1f}  {row.peer:>10.1f}  {row.unit}")
    write_rows(arguments.json, rows)


def describe(root: Path, archive: Archive) -> None:
    """Print how large the files are."""
    num_bytes, num_pixels = 0, 0
    for path in (root / "images").iterdir():
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            num_pixels += image.width * image.height
        num_bytes += path.stat().st_size
    mean = num_bytes / archive.num_distinct / 1e3
    print(f"{archive.name}: {mean:.0f} kB an image, {8 * num_bytes / num_pixels:.2f} bits a pixel", flush=True)


if __name__ == "__main__":
    main()
