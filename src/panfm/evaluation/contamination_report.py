"""An audit's faces: the page with the pairs side by side, and the tables for a spreadsheet.

    manifest + shown pairs --render_page--> index.html     audit.parquet's table --render_csv--> audit.csv

The page is one file and fetches nothing. It holds pixels of patients, as small JPEG copies: it belongs where the shards
lie, under the same access rules, and into no repository and no mail.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from panfm.pages import build_environment, encode_thumbnail
from panfm.shards.duplicates import ImageList
from panfm.shards.pixel_match import orient_image
from panfm.shards.quality import decode_image

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_SIDE = 160  # pixels, longest side on the page
SHOWN_QUALITY = 70
DIGITS = 4
METHOD_TITLES = {
    "sha256": "Same bytes",
    "phash": "Near duplicates by hash, verified on pixels",
    "embedding": "Near duplicates by features, verified on pixels",
    "same_group": "Same patient, lesion or slide",
    "inside pretraining": "Near duplicates inside the pretraining sets",
}
METHOD_NOTES = {
    "sha256": "The stored file, or the file that it was made from, is the same byte for byte.",
    "phash": "Resized, recompressed, recoloured, slightly cropped, mirrored or turned by quarters. The upper image is "
    "laid like the lower one.",
    "embedding": "Found by the encoder, for example larger crops. The upper image is laid like the lower one.",
    "same_group": "Not copies: other images of a patient, lesion or slide that is tested, by the hashed ids.",
    "inside pretraining": "Copies of one photograph weigh more than others in training.",
}
NOT_DETECTED = (
    "Crops that take away more than about a tenth of the area (by hash; with --encoder about a third, mostly).",
    "Turns by other angles than quarters: of 2 degrees most are found, of 5 few, of 15 none.",
    "Frames and borders added around an image, collages, and one image inside another.",
    "Other photographs of one lesion or patient, unless hashed ids of one namespace join them.",
    "Images with hardly any contrast, which have no hash: only identical bytes are found.",
    "What neither set holds: data that a published encoder saw before.",
)


@dataclass(frozen=True)
class ShownPair:
    """A pair for the page: (source, key) of the test image and of the pretraining image, and their stored bytes."""

    first: tuple[str, str]
    second: tuple[str, str]
    score: float
    distance: int  # bits; -1: not compared
    orientation: int  # how the first is laid
    first_image: bytes
    second_image: bytes


@dataclass(frozen=True)
class InsideReport:
    """Duplicates inside the pretraining sets. groups: int64 [N], the group of each image, -1 = alone.

    num_pairs: (source, source, method, pairs), sorted.
    """

    groups: NDArray[np.int64]
    num_groups: int
    num_images: int
    num_without_hash: int
    num_pairs: tuple[tuple[str, str, str, int], ...]

    def to_plain(self) -> dict[str, Any]:
        """The counts, for the manifest."""
        return {
            "num_groups": self.num_groups,
            "num_images": self.num_images,
            "num_without_hash": self.num_without_hash,
            "pairs": [
                {"first": first, "second": second, "method": method, "pairs": count}
                for first, second, method, count in self.num_pairs
            ],
        }


def render_page(manifest: Mapping[str, Any], shown: Mapping[str, Sequence[ShownPair]]) -> str:
    """Render the page of an audit; equal inputs give equal bytes."""
    pairs = {
        method: [
            {
                "pair": pair,
                "images": (
                    _make_thumbnail(pair.first_image, pair.orientation),
                    _make_thumbnail(pair.second_image, 0),
                ),
            }
            for pair in chosen
        ]
        for method, chosen in shown.items()
    }
    page = (
        build_environment(TEMPLATES)
        .get_template("audit.html.j2")
        .render(manifest=manifest, shown=pairs, titles=METHOD_TITLES, notes=METHOD_NOTES, not_detected=NOT_DETECTED)
    )
    return page.rstrip() + "\n"


def render_csv(table: pa.Table) -> str:
    """Render audit.parquet's table as CSV, one line a pair, method and task."""
    rows = [{**row, "pretrain_test_tasks": " ".join(row["pretrain_test_tasks"])} for row in table.to_pylist()]
    return _render_rows(table.schema.names, rows)


def render_inside_csv(inside: InsideReport, images: ImageList) -> str:
    """Render the groups of duplicates inside the pretraining sets: one line an image that has a duplicate."""
    joined = np.flatnonzero(inside.groups >= 0)
    joined = joined[np.argsort(inside.groups[joined], kind="stable")]
    keys = images.get_column("key").take(pa.array(joined)).to_pylist()
    rows = [
        {"group": int(inside.groups[image]), "source": source, "key": key}
        for image, source, key in zip(joined.tolist(), images.get_sources()[joined].tolist(), keys, strict=True)
    ]
    return _render_rows(["group", "source", "key"], rows)


def _render_rows(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _to_cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _to_cell(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"  # a spreadsheet would run it as a formula
    return "" if value is None else value


def _make_thumbnail(data: bytes, orientation: int) -> str:
    image, _, _ = decode_image(data, short_side=SHOWN_SIDE)
    laid = Image.fromarray(np.ascontiguousarray(orient_image(np.asarray(image.convert("RGB")), orientation)))
    return encode_thumbnail(laid, SHOWN_SIDE, SHOWN_QUALITY)
