"""A look at a finished shard set, by counts and by eye, before a GPU hour is spent on it.

ShardSet -> summarise          -> Summary: counts by field, what is missing, sizes, groups, review
         -> draw_contact_sheet -> one PNG of a seeded choice of images of every label
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from PIL import Image, ImageDraw

from panfm.errors import UserError
from panfm.files import write_bytes
from panfm.shards.index import ShardSet
from panfm.shards.review import ReviewState, read_review_state

COUNTED = ("modality", "official_split", "sex", "anatomic_site", "institution", "device", "confirmed_by", "group_kind")
MISSING_MATTERS = (
    "patient_id",
    "lesion_id",
    "age",
    "sex",
    "anatomic_site",
    "phototype_low",
    "confirmed_by",
    "visit_day",
)
UNKNOWN = "unknown"
TILE = 128  # pixels of a picture on the contact sheet
CAPTION = 26  # pixels of the two lines below it


@dataclass(frozen=True)
class Summary:
    """What a shard set holds. A count is a mapping from value to number of images, most frequent first."""

    source: str
    title: str
    licence: str
    synthetic: bool
    num_samples: int
    num_bytes: int  # of all shards
    num_shards: int
    num_groups: int  # what splits may not cut through: patients, else lesions, slides or single images
    num_with_mask: int
    num_near_copies: int  # images whose perceptual hash an earlier image has too
    counts: dict[str, dict[str, int]]  # field -> count
    labels: dict[str, dict[str, int]]  # label name -> count, unlabelled images among them as "unknown"
    phototypes: dict[str, int]  # "2", "2-3" where the source gives a range
    missing: dict[str, int]  # field -> number of images that lack it
    rejected: dict[str, int]  # reason -> number, from the build
    short_sides: tuple[int, int, int]  # least, median and greatest short side in pixels
    age_years: tuple[float, float, float] | None  # least, median, greatest; None if no age is known
    age_decades: dict[str, int]  # "30-39" -> number of images, in order of age; "unknown" last
    short_side_quartiles: tuple[int, int]  # pixels
    bytes_per_image: tuple[int, int, int]  # least, median, greatest stored file
    review: ReviewState

    def __str__(self) -> str:
        """A page for the terminal: a line a field, values by number of images."""
        marked = "SYNTHETIC, " if self.synthetic else ""
        lines = [
            f"{self.source}: {self.title} ({marked}{self.licence})",
            f"{self.num_samples:,} images of {self.num_groups:,} groups in {self.num_shards} shards, "
            f"{self.num_bytes / 1e6:,.1f} MB; {self.num_with_mask:,} with masks; "
            f"{self.num_near_copies:,} share their perceptual hash with another",
            f"short side in pixels: {self.short_sides[0]} to {self.short_sides[2]}, median {self.short_sides[1]}, half "
            f"of them {self.short_side_quartiles[0]} to {self.short_side_quartiles[1]}",
            f"kB an image: {self.bytes_per_image[0] / 1e3:,.1f} to {self.bytes_per_image[2] / 1e3:,.1f}, median "
            f"{self.bytes_per_image[1] / 1e3:,.1f}",
        ]
        if self.age_years is not None:
            lines.append(f"age in years: {self.age_years[0]:g} to {self.age_years[2]:g}, median {self.age_years[1]:g}")
        fields = {f"label {name}": values for name, values in self.labels.items()} | self.counts
        for name, values in (fields | {"phototype": self.phototypes, "age": self.age_decades}).items():
            shown = {value: count for value, count in values.items() if count}
            if shown and set(shown) != {UNKNOWN}:
                lines.append(f"{name}: " + ", ".join(f"{value} {count:,}" for value, count in shown.items()))
        if lacking := {name: count for name, count in self.missing.items() if count}:
            shares = (f"{name} {count:,} ({_percent(count, self.num_samples)})" for name, count in lacking.items())
            lines.append("missing: " + ", ".join(shares))
        if self.rejected:
            lines.append("rejected: " + ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.items()))
        lines.append(str(self.review))
        return "\n".join(lines)


def summarise(shard_set: ShardSet) -> Summary:
    """Count a shard set's samples by everything that decides what it is good for."""
    table = shard_set.table
    labels: dict[str, Counter[str]] = {}
    rows = [dict(pairs) for pairs in table["labels"].to_pylist()]
    for name in sorted({name for row in rows for name in row}):
        labels[name] = Counter(row.get(name, UNKNOWN) for row in rows)
    phototypes = Counter(
        UNKNOWN if low is None and high is None else str(low) if low == high else f"{low or '?'}-{high or '?'}"
        for low, high in zip(table["phototype_low"].to_pylist(), table["phototype_high"].to_pylist(), strict=True)
    )
    sides = np.minimum(table["width"].to_numpy(), table["height"].to_numpy())
    ages = table["age"].drop_null().to_numpy()
    lengths = shard_set.places.length
    hashes = [value for value in table["phash"].to_pylist() if value is not None]
    return Summary(
        source=shard_set.source,
        title=shard_set.card.title,
        licence=shard_set.card.licence,
        synthetic=shard_set.card.synthetic,
        num_samples=shard_set.num_samples,
        num_bytes=sum(shard["num_bytes"] for shard in shard_set.index["shards"]),
        num_shards=len(shard_set.index["shards"]),
        num_groups=len(pc.unique(table["group_id"])),
        num_with_mask=shard_set.num_samples - table["mask_offset"].null_count,
        num_near_copies=len(hashes) - len(set(hashes)),
        counts={name: _count(table[name].to_pylist()) for name in COUNTED},
        labels={name: dict(values.most_common()) for name, values in labels.items()},
        phototypes=dict(sorted(phototypes.items())),
        missing={name: table[name].null_count for name in MISSING_MATTERS},
        rejected=dict(shard_set.index["num_rejected"]),
        short_sides=(int(sides.min()), int(np.median(sides)), int(sides.max())),
        age_years=(float(ages.min()), float(np.median(ages)), float(ages.max())) if len(ages) else None,
        age_decades=_count_decades(ages, table["age"].null_count),
        short_side_quartiles=(int(np.quantile(sides, 0.25)), int(np.quantile(sides, 0.75))),
        bytes_per_image=(int(lengths.min()), int(np.median(lengths)), int(lengths.max())),
        review=read_review_state(shard_set),
    )


def format_total(summaries: Sequence[Summary]) -> str:
    """One line a source and their sum, for several shard sets; groups of different sources are counted apart."""
    width = max(len(summary.source) for summary in summaries)
    lines = [
        f"{summary.source:<{width}}  {summary.num_samples:>11,} images  {summary.num_groups:>11,} groups  "
        f"{summary.num_bytes / 1e6:>11,.1f} MB"
        for summary in summaries
    ]
    num_samples, num_groups = (sum(getattr(one, name) for one in summaries) for name in ("num_samples", "num_groups"))
    size = sum(summary.num_bytes for summary in summaries) / 1e6
    return "\n".join(
        [*lines, f"{'all':<{width}}  {num_samples:>11,} images  {num_groups:>11,} groups  {size:>11,.1f} MB"]
    )


def _count(values: list[str | None]) -> dict[str, int]:
    return dict(Counter(UNKNOWN if value is None else value for value in values).most_common())


def _count_decades(ages: npt.NDArray[np.float32], num_unknown: int) -> dict[str, int]:
    starts, counts = np.unique((ages // 10).astype(int) * 10, return_counts=True)
    decades = {f"{start}-{start + 9}": int(count) for start, count in zip(starts, counts, strict=True)}
    return decades | ({UNKNOWN: num_unknown} if num_unknown else {})


def _percent(count: int, total: int) -> str:
    """A share that does not call some all or a few none."""
    share = 100 * count / total
    return "<1 %" if share < 1 else "99 %" if 99 < share < 100 else f"{share:.0f} %"


def draw_contact_sheet(shard_set: ShardSet, path: str | Path, *, num_images: int = 48, seed: int = 0) -> Path:
    """Draw a seeded choice of images with modality and first label as one PNG at `path`, and return the path.

    The values of the first label take turns, so that rare ones are seen too. The sheet names no image, but it shows
    pixels of patients: it belongs where the shards belong.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a contact sheet is a PNG; give it a name that ends in .png")
    chosen = _choose_balanced(shard_set, num_images, seed)
    columns = min(8, len(chosen))
    lines = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * TILE, lines * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(chosen):
        left, top = place % columns * TILE, place // columns * (TILE + CAPTION)
        with Image.open(io.BytesIO(shard_set.read_image(row))) as image:
            picture = image.convert("RGB")
        picture.thumbnail((TILE - 4, TILE - 4))
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        labels = dict(shard_set.table["labels"][row].as_py())
        words = [shard_set.table["modality"][row].as_py(), next(iter(labels.values()), "no label")]
        draw.multiline_text((left + 3, top + TILE), "\n".join(word[:20] for word in words), fill="black", spacing=1)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
    return path


def _choose_balanced(shard_set: ShardSet, num_images: int, seed: int) -> list[int]:
    """Rows in turns over the values of the first label, rows without it being one value; shown side by side."""
    labels = [next(iter(pairs), ("", ""))[1] for pairs in shard_set.table["labels"].to_pylist()]
    queues: dict[str, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(shard_set.num_samples).tolist():
        queues.setdefault(labels[row], []).append(row)
    turns = [rows[turn] for turn in range(num_images) for rows in queues.values() if turn < len(rows)]
    return sorted(turns[:num_images], key=lambda row: labels[row])
