"""The files of one sample, from the archive's bytes or a slide's tile to what the tar holds; or why it is none.

Record -> read_photograph -> Stored: image, mask, what only the pixels told        or a Reason, which is counted
slide plan + places -> read_slide_tiles -> (number, Stored or Reason), ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from panfm.files import compute_sha256
from panfm.shards.pixels import Pixels, compute_means, encode_jpeg
from panfm.shards.privacy import clean_image, encode_image
from panfm.shards.quality import RejectedImageError, RejectReason, check_not_blank, compute_phash, decode_image
from panfm.shards.raw_files import read_raw
from panfm.shards.sources import Record
from panfm.shards.wsi import SlidePlan, SlideReason, TilePlace, read_tiles

HASH_SIDE = 32  # pixels of the small copy that the perceptual hash and the blank check look at
MASK_ASPECT_TOLERANCE = 0.03  # a mask of other proportions than its image was drawn on another image
Reason = (
    RejectReason
    | SlideReason
    | Literal[
        "missing_file",
        "unreadable_file",
        "missing_mask",
        "undecodable_mask",
        "mismatched_mask",
        "unreadable_region",
        "repeated_slide",
    ]
)


@dataclass(frozen=True)
class Stored:
    """The members of one sample and the facts that only its pixels told."""

    image: bytes
    extension: Literal["jpg", "png"]
    mask: bytes | None
    facts: dict[str, Any]  # fields of Sample


def read_photograph(record: Record, *, min_side: int, short_side: int | None) -> Stored | Reason:
    """Read, clean, shrink and check the image of a record, and its mask if it has one."""
    try:
        data = read_raw(record.path, record.member)
    except FileNotFoundError:
        return "missing_file"
    except OSError:
        return "unreadable_file"
    try:
        # Tiles are cut at a physical size already; only photographs are shrunk.
        clean = clean_image(
            data, min_side=min_side, short_side=None if record.modality == "histopathology" else short_side
        )
        small = _draw_small(clean.pixels)
        check_not_blank(small)
    except RejectedImageError as error:
        return error.reason
    mask: bytes | None = None
    if record.mask_path is not None:
        answer = _read_mask(record.mask_path, record.mask_member, (clean.width, clean.height))
        if not isinstance(answer, bytes):
            return answer
        mask = answer
    facts = {
        "width": clean.width,
        "height": clean.height,
        "original_width": clean.original_width,
        "original_height": clean.original_height,
        "device": clean.device,
        "source_sha256": compute_sha256(data),
        "phash": compute_phash(small),
    }
    return Stored(clean.data, clean.extension, mask, facts)


def _draw_small(pixels: Pixels) -> Image.Image:
    """The block means that both the hash and the blank check start from; made once, where it is fastest."""
    return Image.fromarray(compute_means(pixels, HASH_SIDE))


def _read_mask(path: Path, member: str | None, size: tuple[int, int]) -> bytes | Reason:
    """A mask as a grey PNG of the stored image's `size`, by nearest neighbour, for its values are classes."""
    try:
        mask, width, height = decode_image(read_raw(path, member))
    except FileNotFoundError:
        return "missing_mask"
    except (RejectedImageError, OSError):
        return "undecodable_mask"
    if abs(width / height / (size[0] / size[1]) - 1) > MASK_ASPECT_TOLERANCE:
        return "mismatched_mask"
    if mask.mode == "P":
        mask = Image.frombytes("L", mask.size, mask.tobytes())  # palette numbers are the classes, not their colours
    elif mask.mode != "L":
        mask = mask.convert("L")
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.NEAREST)
    return encode_image(mask, "png")


def read_slide_tiles(
    plan: SlidePlan, places: Sequence[tuple[int, TilePlace]], source_sha256: str
) -> Iterator[tuple[int, Stored | Reason]]:
    """Read numbered tiles of one slide, row by row, which is how slides are read fast; yields them by number."""
    placed = sorted((place.y0, place.x0, number, place) for number, place in places)
    for tile, (_, _, number, _) in zip(read_tiles(plan, [place for *_, place in placed]), placed, strict=True):
        if tile.image is None:
            yield number, "unreadable_region"
            continue
        pixels = np.ascontiguousarray(tile.image)
        facts = {
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "original_width": pixels.shape[1],
            "original_height": pixels.shape[0],
            "mpp": tile.mpp,
            "x0": tile.x0,
            "y0": tile.y0,
            "level": tile.level,
            "tissue_fraction": tile.tissue_fraction,
            "colour": tile.colour,
            "source_sha256": source_sha256,
            "phash": compute_phash(_draw_small(pixels)),
        }
        yield number, Stored(encode_jpeg(pixels), "jpg", None, facts)
