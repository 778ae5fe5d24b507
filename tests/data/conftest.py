"""Fixtures of the data room: two small archives, drawn here and built by the real writer."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.shards.packing import BuildOptions
from panfm.shards.writer import build_shards
from tests.archives import make_source_card, write_table


def draw_picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """A smooth, coloured, unmistakable picture: coarse noise, enlarged."""
    coarse = np.random.default_rng(seed).integers(30, 226, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def build_source(
    folder: Path, name: str, rows: list[dict[str, str]], *, uses: tuple[str, ...] = ("research",), shard: int = 32
) -> Path:
    """Draw one image a row, write the table, build: the folder of the shard set."""
    root = folder / f"{name}-raw"
    root.mkdir(parents=True)
    for number, row in enumerate(rows):
        row["path"] = f"{number}.jpg"
        (root / row["path"]).write_bytes(encode(draw_picture(seed=hash_name(name) + number), quality=92))
    write_table(root / "table.csv", rows)
    columns = {
        "path": "path", "patient_id": "patient", "lesion_id": "lesion", "visit_day": "day", "modality": "modality",
    }  # fmt: skip
    card = make_source_card(name, permitted_uses=uses, columns=columns)
    out = folder / name
    build_shards(card, root, out, options=BuildOptions(samples_per_shard=shard))
    return out


def hash_name(name: str) -> int:
    return sum(ord(letter) for letter in name) * 1000


@pytest.fixture(scope="session")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images: 20 patients with a lesion seen three times, 40 dermoscopic and 20 clinical, in two shards."""
    rows = [
        {
            "patient": f"p{number // 3}",
            "lesion": f"l{number // 3}",
            "day": str(number % 3),
            "modality": "clinical" if number % 3 == 2 else "dermoscopic",
        }
        for number in range(60)
    ]
    return build_source(tmp_path_factory.mktemp("alpha"), "alpha", rows)


@pytest.fixture(scope="session")
def beta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 histopathology images of 7 patients, without lesions."""
    rows = [{"patient": f"q{number}", "lesion": "", "day": "", "modality": "histopathology"} for number in range(7)]
    return build_source(tmp_path_factory.mktemp("beta"), "beta", rows)


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Image.Image]:
    return draw_picture


@pytest.fixture(scope="session")
def make_bytes() -> Callable[..., bytes]:
    return encode
