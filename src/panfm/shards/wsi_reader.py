"""Whole-slide images, the reading of them: a file or folder -> an open slide -> boxes of pixels in sRGB.

    path -> find_slide_file -> open_slide (a few handles a thread, one tile cache a process) -> read_box -> Picture

Every read comes from the levels of the pyramid. Label and macro images are never opened: they hold patients' names.
A box that cannot be read is None, for the caller to count; nothing is put in its place.
"""

import math
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import openslide
from PIL import Image, ImageCms

from panfm.errors import UserError
from panfm.files import compute_file_sha256, compute_sha256

SlideReason = Literal[
    "unreadable_slide",
    "several_slides",
    "no_mpp",
    "implausible_mpp",
    "too_coarse",
    "too_small",
    "no_tissue",
    "bad_slide",
]
# srgb: the profile says so; converted: from the slide's ICC profile; the other two are as stored.
Colour = Literal["srgb", "converted", "untagged", "unconvertible"]

CACHE_BYTES = 256 * 2**20  # two rows of decoded tiles of a slide 100,000 px wide; OpenSlide's own 32 MiB hold no row
NUM_HANDLES = 32  # slides open at a time in a thread: a shuffled shard goes back to the same slides
COPY_TOLERANCE = 0.05  # pixels: a box that fits the stored pixels this closely is copied, for resampling only blurs
SAME_COLOUR = 2  # grey levels: a conversion that changes less only says "sRGB" in other numbers


class SlideError(UserError):
    """A slide that cannot become tiles: one line for the user, and `reason` for the count of rejected files."""

    def __init__(self, reason: SlideReason, message: str) -> None:
        super().__init__(message)
        self.reason: SlideReason = reason


@dataclass(frozen=True)
class Picture:
    """A box of a slide: `image` is RGB in sRGB on white, `scanned` (mode L, 255 or 0) is None where all of it is."""

    image: Image.Image
    scanned: Image.Image | None

    @property
    def scanned_share(self) -> float:
        """Share of the box that holds pixels at all; scanners leave out bare glass."""
        return 1.0 if self.scanned is None else float(np.asarray(self.scanned).mean()) / 255


class OpenedSlide:
    """An open slide whose reads give None where it is damaged, and which goes on after that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = self._open()
        self.properties = dict(self._handle.properties)
        self.downsamples: tuple[float, ...] = self._handle.level_downsamples
        self.level_sizes: tuple[tuple[int, int], ...] = self._handle.level_dimensions
        self.colour, self._transform = _build_transform(self._handle)

    def _open(self) -> openslide.OpenSlide:
        try:
            handle = openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:  # an unsupported format too
            raise SlideError(
                "unreadable_slide",
                f"{self.path}: OpenSlide cannot open it ({error}); check the copy or convert it to a pyramidal TIFF",
            ) from None
        handle.set_cache(_get_cache())
        return handle

    @property
    def series(self) -> str | None:
        """The same text for every file of one DICOM slide; None for the formats whose slide is one file."""
        is_dicom = self.properties.get(openslide.PROPERTY_NAME_VENDOR) == "dicom"
        return self.properties.get(openslide.PROPERTY_NAME_QUICKHASH1) if is_dicom else None

    def read_box(
        self, level: int, origin: tuple[int, int], size: tuple[float, float], out: tuple[int, int]
    ) -> Picture | None:
        """Read the box at `origin` of `size` level-0 pixels from `level`, resampled to `out` pixels.

        None where the file cannot be read.
        """
        limit = self.level_sizes[level]
        # Level sizes are rounded, so each axis has its own ratio; OpenSlide turns places into pixels by their mean.
        ratio = [self.level_sizes[0][axis] / limit[axis] for axis in (0, 1)]
        mean = self.downsamples[level]
        start = [origin[axis] / ratio[axis] for axis in (0, 1)]  # the box in pixels of the level
        end = [min((origin[axis] + size[axis]) / ratio[axis], limit[axis]) for axis in (0, 1)]
        first = [round(value) for value in start]
        if all(
            max(
                abs(start[axis] - first[axis]),
                abs(end[axis] - start[axis] - out[axis]),
                abs(round(first[axis] * mean) / mean - first[axis]),
            )
            < COPY_TOLERANCE
            and first[axis] + out[axis] <= limit[axis]
            for axis in (0, 1)
        ):
            resampled = False
            last = [first[axis] + out[axis] for axis in (0, 1)]
        else:
            resampled = True
            # The filter looks two pixels of `out` beyond the box, which are read with it where the slide goes on.
            margin = [math.ceil(2 * max(1.0, (end[axis] - start[axis]) / out[axis])) + 1 for axis in (0, 1)]
            first = [max(0, math.floor(start[axis]) - margin[axis]) for axis in (0, 1)]
            last = [min(limit[axis], math.ceil(end[axis]) + margin[axis]) for axis in (0, 1)]
        location = (round(first[0] * mean), round(first[1] * mean))
        try:
            region = self._handle.read_region(location, level, (last[0] - first[0], last[1] - first[1]))
        except openslide.OpenSlideError:
            # After its first error a handle of OpenSlide answers nothing but that error.
            self._handle.close()
            self._handle = self._open()
            return None
        scanned = None
        if region.getextrema()[3] == (255, 255):
            image = region.convert("RGB")
        else:
            scanned = region.getchannel("A").point(lambda alpha: 255 * (alpha > 0))
            image = Image.alpha_composite(Image.new("RGBA", region.size, "white"), region).convert("RGB")
        if resampled:
            left, top = start[0] - location[0] / mean, start[1] - location[1] / mean
            right, bottom = (
                min(value, side)
                for value, side in zip((left + end[0] - start[0], top + end[1] - start[1]), image.size, strict=True)
            )
            box = (max(left, 0.0), max(top, 0.0), right, bottom)
            image = image.resize(out, Image.Resampling.BICUBIC, box=box)
            scanned = scanned and scanned.resize(out, Image.Resampling.BICUBIC, box=box)
        if self._transform is not None:
            ImageCms.applyTransform(image, self._transform, inPlace=True)
            if scanned is not None:  # the white put below what was not scanned is white in every colour space
                image.paste("white", mask=scanned.point(lambda value: 255 * (value == 0)))
        return Picture(image, scanned)


def open_slide(path: Path) -> OpenedSlide:
    """An open slide, shared within this thread and opened in this process.

    Raises SlideError (a UserError) for a file that is not there or that OpenSlide cannot open.
    """
    try:
        stat = path.stat()
    except OSError:  # OpenSlide calls it an unsupported format
        raise SlideError("unreadable_slide", f"{path}: no such file; check the source card's table") from None
    slides = _get_slides()
    key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)  # a file that was replaced is another slide
    slide = slides.pop(key, None) or OpenedSlide(path)
    slides[key] = slide
    while len(slides) > NUM_HANDLES:
        slides.popitem(last=False)  # closed when its last reader lets go of it
    return slide


# One cache for all handles of a process: a cache a handle would hold the memory as often as slides are open.
_caches: dict[int, openslide.OpenSlideCache] = {}
_threads = threading.local()  # `slides`, and the process that opened them


def _get_cache() -> openslide.OpenSlideCache:
    process = os.getpid()
    if process not in _caches:
        _caches[process] = openslide.OpenSlideCache(CACHE_BYTES)
    return _caches[process]


def _get_slides() -> OrderedDict[tuple[str, int, int, int], OpenedSlide]:
    """The open slides of this thread, least recently used first; one handle's error is no other thread's."""
    if getattr(_threads, "process", None) != os.getpid():
        # Handles that came over a fork share file positions and locks with the parent: neither used nor closed here.
        _threads.inherited = getattr(_threads, "slides", None)
        _threads.process, _threads.slides = os.getpid(), OrderedDict()
    slides: OrderedDict[tuple[str, int, int, int], OpenedSlide] = _threads.slides
    return slides


def _build_transform(handle: openslide.OpenSlide) -> tuple[Colour, ImageCms.ImageCmsTransform | None]:
    """What the stored colours are, and the way from them to sRGB (None: leave them)."""
    try:
        profile = handle.color_profile
        if profile is None:
            return "untagged", None
        transform = ImageCms.buildTransform(
            profile, ImageCms.createProfile("sRGB"), "RGB", "RGB", ImageCms.Intent(ImageCms.getDefaultIntent(profile))
        )
    except (OSError, ImageCms.PyCMSError):  # a damaged profile, or one of grey or ink
        return "unconvertible", None
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    if np.abs(converted.astype(int) - colours).max() <= SAME_COLOUR:
        return "srgb", None
    return "converted", transform


# ------------------------------------------------------------------------------------------------ slides of many files


def find_slide_file(path: Path) -> Path:
    """The file that OpenSlide opens for `path`: the file itself, or the first of a folder with one DICOM slide.

    Raises SlideError for a folder without a DICOM slide, and for one with several: which of them is meant?
    """
    if not path.is_dir():
        return path
    series: dict[str, Path] = {}
    for file in _list_dicom_files(path):
        try:
            slide = open_slide(file)
        except SlideError:
            continue  # a DICOMDIR, a file of another kind
        series.setdefault(slide.series or str(file), file)
    if not series:
        raise SlideError("unreadable_slide", f"{path}: a folder without a DICOM slide that OpenSlide can open")
    if len(series) > 1:
        raise SlideError(
            "several_slides",
            f"{path}: holds {len(series)} slides (DICOM series); give each its own folder, or name one file of each",
        )
    return min(series.values())


def list_slide_files(path: Path) -> tuple[Path, ...]:
    """The files behind `path`: all DICOM files of a folder; of an .mrxs its companion folder too; else the file."""
    if path.is_dir():
        return _list_dicom_files(path)
    companions = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and companions.is_dir():
        return (path, *sorted(file for file in companions.rglob("*") if file.is_file()))
    return (path,)


def compute_slide_sha256(path: Path) -> str:
    """The SHA-256 of a slide's file; where several make it up, of the sorted list of theirs."""
    hashes = sorted(compute_file_sha256(file) for file in list_slide_files(path))
    return hashes[0] if len(hashes) == 1 else compute_sha256("\n".join(hashes).encode())


def count_slide_bytes(path: Path) -> int:
    """The bytes of all files of a slide. Raises OSError where one cannot be seen."""
    return sum(file.stat().st_size for file in list_slide_files(path))


def _list_dicom_files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that can be DICOM, by name; archives export them without an extension too."""
    return tuple(
        sorted(
            file
            for file in folder.iterdir()
            if file.is_file() and file.suffix.lower() in ("", ".dcm") and not file.name.startswith(".")
        )
    )
