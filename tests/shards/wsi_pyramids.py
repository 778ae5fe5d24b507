"""Small slides for the tests, written with tifffile: real pyramids whose every byte is known."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

PINK = (220, 120, 170)
SRGB_PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))  # D50, as ICC has them


def draw_tissue(width: int, height: int) -> np.ndarray:
    """A pink slide with a fine texture: tissue everywhere."""
    noise = np.random.default_rng(0).integers(-25, 26, (height // 8 + 1, width // 8 + 1, 3))
    texture = np.kron(noise, np.ones((8, 8, 1), dtype=np.int64))[:height, :width]
    return np.clip(np.array(PINK) + texture, 0, 255).astype(np.uint8)


def draw_stripes(width: int, height: int, mpp: float, period_um: float = 10.0) -> np.ndarray:
    """Upright stripes of `period_um`: they tell how many microns a tile shows."""
    red = 150 + 70 * np.sin(2 * np.pi * (np.arange(width) + 0.5) * mpp / period_um)
    image = np.stack([np.tile(red, (height, 1)), np.full((height, width), 60), np.full((height, width), 160)], axis=-1)
    return image.astype(np.uint8)


def write_pyramid(
    path: Path,
    image: np.ndarray,
    mpp: float | None,
    factors: tuple[int, ...] = (1, 2, 4),
    *,
    round_size: Callable[[float], int] = lambda size: -int(-size // 1),  # up, as some scanners do
    compression: str | None = None,
    icc: bytes | None = None,
) -> Path:
    """Write a tiled pyramid of an RGB image whose finest level has `mpp`; None: the file states no resolution."""
    tags = [] if icc is None else [(34675, 7, len(icc), icc, True)]
    with tifffile.TiffWriter(path) as file:
        for number, factor in enumerate(factors):
            size = (round_size(image.shape[1] / factor), round_size(image.shape[0] / factor))
            level = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
            stated = {} if mpp is None else {"resolution": (1e4 / mpp / factor,) * 2, "resolutionunit": "CENTIMETER"}
            file.write(
                level, subfiletype=int(number > 0), tile=(256, 256), photometric="rgb", metadata=None,
                compression=compression, extratags=tags, **stated,
            )  # fmt: skip
    return path


def damage(path: Path, *numbers: int, level: int = 0) -> None:
    """Overwrite stored tiles of a compressed pyramid with bytes that cannot be decoded."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[level]
        places = [(page.dataoffsets[number], page.databytecounts[number]) for number in numbers]
    data = bytearray(path.read_bytes())
    for offset, length in places:
        data[offset : offset + length] = b"\xff" * length
    path.write_bytes(bytes(data))


def empty(path: Path, *numbers: int, level: int = 0) -> None:
    """Take the data of stored tiles away, as scanners do for bare glass: OpenSlide draws nothing there."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[level]
        for tag, values in (("TileByteCounts", page.databytecounts), ("TileOffsets", page.dataoffsets)):
            page.tags[tag].overwrite(tuple(0 if n in numbers else value for n, value in enumerate(values)))


def make_profile(gamma: float, space: bytes = b"RGB ") -> bytes:
    """An ICC profile (version 2, matrix and curves) with the primaries of sRGB and a plain power as its curve."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    def text(kind: bytes, value: bytes) -> bytes:
        head = b"desc" + bytes(4) + struct.pack(">I", len(value) + 1) if kind == b"desc" else b"text" + bytes(4)
        return head + value + b"\0" + (bytes(78) if kind == b"desc" else b"")

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    tags = {b"desc": text(b"desc", b"test"), b"cprt": text(b"cprt", b"none"), b"wtpt": b"XYZ " + bytes(4)}
    tags[b"wtpt"] += fixed(0.9642, 1.0, 0.8249)
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
        for name, primary in zip((b"r", b"g", b"b"), SRGB_PRIMARIES, strict=True):
            tags[name + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*primary)
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(">I4sI4s4s4s12s4s", start + len(body), bytes(4), 0x02100000, b"mntr", space, b"XYZ ",
                         struct.pack(">6H", 2020, 1, 1, 0, 0, 0), b"acsp") + bytes(28)  # fmt: skip
    header += fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + body
