"""A small archive as a hospital might hand it over: photographs, masks, a table; written anew for each test."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panfm.shards.cards import SourceCard
from tests.archives import describe_source_card, write_table
from tests.shards.wsi_pyramids import draw_tissue, write_pyramid


def draw_picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Smooth coloured noise of `size` (width, height): different for each seed, far from blank, and it compresses."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@dataclass
class Archive:
    """A raw archive on disk; change `rows` or `card` and call `write_table` again."""

    root: Path
    rows: list[dict[str, str]]
    values: dict[str, Any]

    @property
    def card(self) -> SourceCard:
        return SourceCard.model_validate(self.values)

    def write_table(self) -> None:
        write_table(self.root / "table.csv", self.rows)


@pytest.fixture
def make_archive(tmp_path: Path) -> Callable[..., Archive]:
    def make(num_images: int = 12, size: tuple[int, int] = (80, 60)) -> Archive:
        root = tmp_path / "raw"
        (root / "images").mkdir(parents=True)
        (root / "masks").mkdir()
        rows = []
        for number in range(num_images):
            picture = draw_picture(number, size)
            picture.save(root / "images" / f"photo{number}.jpg", quality=90)
            mask = Image.fromarray((np.asarray(picture.convert("L")) > 128).astype(np.uint8) * 255)
            if number % 3 == 0:
                mask.save(root / "masks" / f"photo{number}.png")
            rows.append(
                {
                    "file": f"images/photo{number}.jpg",
                    "patient": f"P{number // 4}" if number < 8 else "",
                    "lesion": f"L{number // 2}",
                    "mask": f"masks/photo{number}.png" if number % 3 == 0 else "",
                    "age": "" if number == 1 else str(30 + number),
                    "sex": ("f", "m")[number % 2],
                    "date": f"2020-01-{number + 1:02d}",
                    "dx": ("nv", "mel", "?")[number % 3],
                    "skin": ("", "3")[number % 2],
                    "diameter": f"{number}.5",
                    "text": f"a mole of patient number {number}" if number == 2 else "",
                }
            )
        values = describe_source_card("small") | {
            "modality": "clinical",
            "columns": {
                "path": "file",
                "patient_id": "patient",
                "lesion_id": "lesion",
                "mask_path": "mask",
                "age": "age",
                "sex": "sex",
                "visit_date": "date",
                "phototype": "skin",
                "caption": "text",
            },
            "constants": {"institution": "north", "phototype_source": "clinician"},
            "values": {"sex": {"f": "female", "m": "male"}},
            "labels": {"diagnosis": {"column": "dx", "values": {"nv": "nevus", "mel": "melanoma", "?": None}}},
            "tabular": ["diameter"],
        }
        archive = Archive(root, rows, values)
        archive.write_table()
        return archive

    return make


@pytest.fixture
def make_slides(tmp_path: Path) -> Callable[..., Archive]:
    """Slides of given sizes (width, height) at 0.5 mpp, tissue all over, to be cut into tiles of 112 px."""

    def make(*sizes: tuple[int, int]) -> Archive:
        root = tmp_path / "raw"
        (root / "slides").mkdir(parents=True)
        rows = []
        for number, size in enumerate(sizes):
            write_pyramid(root / f"slides/slide{number}.tiff", draw_tissue(*size), 0.5, (1,), compression="zlib")
            rows.append({"file": f"slides/slide{number}.tiff", "slide": f"S{number}"})
        values = describe_source_card("small_slides") | {
            "modality": "histopathology",
            "columns": {"path": "file", "slide_id": "slide"},
            "slides": {"tile_um": 56.0, "mpp": 0.5},
        }
        archive = Archive(root, rows, values)
        archive.write_table()
        return archive

    return make
