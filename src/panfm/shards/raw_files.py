"""The bytes of an archive's files, whether they lie in folders, in a .zip or in an .hdf5 file.

    ROOT/photos/a.jpg   ROOT/images.zip::photos/a.jpg   ROOT/train-image.hdf5::ISIC_0015670   ->  read_raw  ->  bytes

An archive inside an archive file is read in place: nothing is unpacked. Handles stay open in the process that opened
them and are never used by its children.
"""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

from panfm.errors import UserError

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".dcm")
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif", ".svslide")
IMAGE_SUFFIXES = frozenset((*PHOTOGRAPHS, *SLIDES))
CONTAINERS = (".zip", ".hdf5", ".h5")
MAX_OPEN = 8

_handles: OrderedDict[tuple[int, Path], Any] = OrderedDict()  # (process, container) -> its open handle


def read_raw(path: Path, member: str | None = None) -> bytes:
    """Read a file, or a member of a .zip or .hdf5 file.

    Raises FileNotFoundError where the file or the member is not there, OSError where it cannot be read.
    """
    if member is None:
        return path.read_bytes()
    handle = _open_container(path)
    try:
        if isinstance(handle, zipfile.ZipFile):
            return handle.read(member)
        value = handle[member][()]
    except KeyError:
        raise FileNotFoundError(f"{path}: has no member {member}") from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, odd compression
        raise OSError(f"{path}, member {member}: {error}") from None
    return bytes(value)


def is_image(path: Path) -> bool:
    """Whether a file is an image: by its suffix, or DICOM by its first bytes (exports write IM00001 and 1.2.840.7)."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if (suffix and not suffix[1:].isdigit()) or path.name.upper() == "DICOMDIR":
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_stem(path: str) -> str:
    """The name of a file without its suffix; a number at the end (1.2.840.7) is none."""
    name = PurePosixPath(path).name
    suffix = PurePosixPath(name).suffix
    return name if suffix[1:].isdigit() else name.removesuffix(suffix)


def list_members(path: Path) -> frozenset[str]:
    """Name the members of a .zip (files only) or the data sets of an .hdf5 file."""
    handle = _open_container(path)
    if isinstance(handle, zipfile.ZipFile):
        return frozenset(info.filename for info in handle.infolist() if not info.is_dir())
    names: list[str] = []
    handle.visit(names.append)
    return frozenset(names)


class FileFinder:
    """Whether files below a root exist; each folder or container is listed once, however many files are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, frozenset[str]] = {}
        self._members: dict[str, frozenset[str]] = {}

    def has(self, path: str, member: str | None = None) -> bool:
        """Tell whether `path` (relative to the root) exists, and in it `member` if one is given."""
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            try:
                self._folders[folder] = frozenset(os.listdir(self.root / folder))  # noqa: PTH208 - names only
            except OSError:
                self._folders[folder] = frozenset()
        if name not in self._folders[folder]:
            return False
        if member is None:
            return True
        if path not in self._members:
            self._members[path] = list_members(self.root / path)
        return member in self._members[path]


def _open_container(path: Path) -> Any:
    """The open handle of a container, in this process: a forked child must not share its parent's file position."""
    place = (os.getpid(), path)
    if place in _handles:
        _handles.move_to_end(place)
        return _handles[place]
    suffix = path.suffix.lower()
    if suffix not in CONTAINERS:
        raise UserError(f"{path}: only {', '.join(CONTAINERS)} files have members; name the file alone in the card")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if suffix == ".zip":
        try:
            handle: Any = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: is no whole zip file ({error}); download it again") from None
    else:
        try:
            import h5py
        except ImportError:
            raise UserError(f'{path}: reading HDF5 needs h5py; install it with: pip install "panfm[hdf5]"') from None
        try:
            handle = h5py.File(path, "r")
        except OSError as error:
            raise UserError(f"{path}: is no whole HDF5 file ({error}); download it again") from None
    _handles[place] = handle
    if len(_handles) > MAX_OPEN:
        _handles.popitem(last=False)[1].close()
    return handle
