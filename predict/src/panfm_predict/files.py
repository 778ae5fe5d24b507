"""Which files of a folder are images: those below it that end as images do. `panfm embed` has the same rule."""

import os
from pathlib import Path
from typing import NoReturn

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".avif")


def list_images(folder: Path) -> list[Path]:
    """List the images in a folder and in those inside it, in the order of their names.

    What begins with a dot, as systems name what they write for themselves, is left out. Raises OSError for a folder
    that cannot be read, also one inside: its images would be missed in silence.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(parent) / name for name in sorted(names) if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES]
    return found


def _fail(error: OSError) -> NoReturn:
    raise error
