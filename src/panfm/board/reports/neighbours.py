"""Nearest-neighbour sheets: an image and its nearest by cosine from other groups than its own, as one HTML page.

    Points --find_neighbours--> places [Q, k] --thumbnails of the shard sets--> neighbours.html

The page holds patients' images and is written only where somebody asks for it. No keys stand on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.board.render import build_environment
from panfm.board.reports.document import NO_DIAGNOSIS
from panfm.board.reports.pictures import Points
from panfm.data.decode import decode_rgb
from panfm.files import write_text
from panfm.pages import encode_thumbnail
from panfm.shards.index import ShardSet

SIDE, QUALITY = 160, 85  # pixels of a thumbnail, JPEG
WARNING = (
    "This page holds images of patients. Keep it where the shards may lie, look for faces and writing before anybody "
    "else sees it, and do not publish it."
)


@dataclass(frozen=True)
class Tile:
    """A thumbnail with what is known of it. similarity: cosine to the image of its row; None: that image itself."""

    image: str  # data: URI
    caption: str
    similarity: float | None


def choose_queries(
    points: Points, shard_sets: Sequence[ShardSet], num: int, seed: int, keys: Sequence[str]
) -> list[int]:
    """Places of the images of the sheet: those named, in their order, else `num` at random from different groups."""
    if keys:
        of_key = {shard_sets[one].table["key"][row].as_py(): place for place, (one, row) in enumerate(points.owners)}
        return [of_key[key] for key in keys]
    order = np.random.default_rng([seed, 1]).permutation(len(points.groups))
    chosen: dict[str, int] = {}
    for place in order.tolist():
        chosen.setdefault(str(points.groups[place]), place)
    return list(chosen.values())[:num]


def find_neighbours(points: Points, queries: Sequence[int], k: int) -> NDArray[np.int64]:
    """Places [Q, k] of the nearest images by cosine, none of the query's own group; -1 where there are fewer."""
    nearest = np.full((len(queries), k), -1, dtype=np.int64)
    for number, place in enumerate(queries):
        similarity = points.values @ points.values[place]
        similarity[points.groups == points.groups[place]] = -np.inf
        order = np.argsort(-similarity.round(6), kind="stable")[:k]
        order = order[np.isfinite(similarity[order])]
        nearest[number, : len(order)] = order
    return nearest


def write_neighbours(
    points: Points, shard_sets: Sequence[ShardSet], queries: Sequence[int], k: int, out: Path, name: str
) -> Path:
    """Write neighbours.html into the folder `out` and return its path. name: of the encoder."""
    nearest = find_neighbours(points, queries, k)
    rows = [
        [_make_tile(points, shard_sets, query, None)]
        + [
            _make_tile(points, shard_sets, int(place), float(points.values[place] @ points.values[query]))
            for place in places
            if place >= 0
        ]
        for query, places in zip(queries, nearest, strict=True)
    ]
    page = build_environment().get_template("neighbours.html.j2").render(
        rows=rows, name=name, warning=WARNING, no_diagnosis=NO_DIAGNOSIS, num=len(points.groups)
    )  # fmt: skip
    path = out / "neighbours.html"
    write_text(path, page.rstrip() + "\n")
    return path


def _make_tile(points: Points, shard_sets: Sequence[ShardSet], place: int, similarity: float | None) -> Tile:
    number, row = points.owners[place]
    image = Image.fromarray(decode_rgb(shard_sets[number].read_image(row)))
    known = [
        f"skin type {levels[place]}" if name == "phototype" else f"{levels[place]}"
        for name, levels in points.columns.items()
        if name != "source" and levels[place]
    ]
    return Tile(encode_thumbnail(image, SIDE, QUALITY), ", ".join(known).replace("_", " "), similarity)
