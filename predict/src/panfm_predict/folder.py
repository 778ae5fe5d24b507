"""The classifier folder: its lock, and the arrays of its head.

    folder/*  --write_lock-->  lock.json  --verify-->  the same files, or an error that names the first that is not
    head.npz  --read_head-->  Head,  cases.npz  --read_cases-->  Cases

The lock is a check that a copy is whole and that nobody moved the operating point by hand; it is no signature: who can
change the folder can lock it anew. Arrays are read without pickle: a folder holds numbers, never a program.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm_predict.errors import PredictError
from panfm_predict.outliers import Outliers

LOCK, CARD, HEAD, CASES, GRAPH, THUMBNAILS = (
    "lock.json",
    "classifier.json",
    "head.npz",
    "cases.npz",
    "encoder.onnx",
    "cases",
)
LOCK_FORMAT = 1
REQUIRED = (CARD, HEAD, GRAPH)
# What file managers leave in any folder that is looked at; nothing here reads them.
IGNORED = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
NUM_QUANTILES = 101  # 0 .. 100 %

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Head:
    """The arrays of head.npz for D dimensions, K classes, M modalities, and Q2 leading components.

    mean, scale: [D], of features. weight, bias: [K, D], [K], of standardised features. reference_*: quantiles (0 to
    100 %) of the fitted images: [Q2, 101], [101], [K, 101]. modality_*: [M, D], [M] or None.
    """

    mean: Floats
    scale: Floats
    weight: Floats
    bias: Floats
    outliers: Outliers
    reference_quantiles: Floats
    reference_scores: Floats
    reference_probabilities: Floats
    modality_weight: Floats | None
    modality_bias: Floats | None

    def standardise(self, features: Floats) -> NDArray[np.float64]:
        """Features [B, D] in units of the fitted images' spread: float64 [B, D]."""
        z: NDArray[np.float64] = (features.astype(np.float64) - self.mean) / self.scale
        return z


@dataclass(frozen=True)
class Cases:
    """Fitted images that were kept to be shown: features float32 [N, D], labels [N] as indices of classes."""

    features: Floats
    labels: NDArray[np.integer]
    thumbnails: tuple[Path, ...]


def write_lock(folder: Path | str) -> dict[str, str]:
    """Write lock.json, the SHA-256 of every other file of the folder, and return it; call it last."""
    folder = Path(folder)
    files = {name: _hash(folder / name) for name in _list_files(folder)}
    descriptor, temporary = tempfile.mkstemp(prefix=".lock-", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"format": LOCK_FORMAT, "files": files}, file, indent=2, sort_keys=True)
            file.write("\n")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(folder / LOCK)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return files


def read_lock(folder: Path | str) -> dict[str, str]:
    """Return the SHA-256 of each file as lock.json states it. Raises PredictError."""
    path = Path(folder) / LOCK
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise PredictError(f"{folder}: holds no {LOCK}; name a folder that `panfm adapt` wrote, whole") from None
    except (OSError, ValueError) as error:
        raise PredictError(f"{path}: cannot be read ({error}); copy the folder again") from None
    if not isinstance(values, dict) or values.get("format") != LOCK_FORMAT or not isinstance(values.get("files"), dict):
        raise PredictError(f"{path}: is no lock of format {LOCK_FORMAT}; copy the folder again")
    return {str(name): str(digest) for name, digest in values["files"].items()}


def verify(folder: Path | str) -> dict[str, str]:
    """Check every file against lock.json and return the lock. Raises PredictError that names the first that differs."""
    folder = Path(folder)
    locked, present = read_lock(folder), _list_files(folder)
    for name in (*REQUIRED, *sorted(locked)):
        if name not in present or name not in locked:
            where = "locked but missing" if name in locked else "not locked" if name in present else "missing"
            raise PredictError(f"{folder}: {name} is {where}; copy the whole folder again")
    for name in present:
        if name not in locked:
            raise PredictError(f"{folder}: {name} was added after the folder was locked; remove it")
        if _hash(folder / name) != locked[name]:
            raise PredictError(f"{folder}: {name} is not what was locked; copy the folder again, or fit it anew")
    return locked


def read_head(path: Path, classes: int, modalities: int | None) -> Head:
    """Read head.npz and check every shape against the others. Raises PredictError that names the array."""
    arrays = _read_arrays(path)
    num_features = _get(arrays, path, "mean", (None,)).shape[0]
    components = _get(arrays, path, "outlier_components", (None, num_features))
    vector = (num_features,)
    modality: list[Floats | None] = [None, None]
    if modalities is not None:
        modality = [
            _get(arrays, path, "modality_weight", (modalities, num_features)),
            _get(arrays, path, "modality_bias", (modalities,)),
        ]
    return Head(
        mean=_get(arrays, path, "mean", vector),
        scale=_get(arrays, path, "scale", vector, positive=True),
        weight=_get(arrays, path, "weight", (classes, num_features)),
        bias=_get(arrays, path, "bias", (classes,)),
        outliers=Outliers(
            centre=_get(arrays, path, "outlier_centre", vector),
            components=components,
            variances=_get(arrays, path, "outlier_variances", (len(components),), positive=True),
            residual=float(_get(arrays, path, "outlier_residual", (1,), positive=True)[0]),
        ),
        reference_quantiles=_get(arrays, path, "reference_quantiles", (None, NUM_QUANTILES)),
        reference_scores=_get(arrays, path, "reference_scores", (NUM_QUANTILES,)),
        reference_probabilities=_get(arrays, path, "reference_probabilities", (classes, NUM_QUANTILES)),
        modality_weight=modality[0],
        modality_bias=modality[1],
    )


def read_cases(folder: Path, num_features: int, classes: int) -> Cases | None:
    """Read the kept cases; None where none were kept. Raises PredictError."""
    path = folder / CASES
    if not path.is_file():
        return None
    arrays = _read_arrays(path)
    features = _get(arrays, path, "features", (None, num_features))
    labels = arrays.get("label")
    if labels is None or labels.shape != (len(features),) or labels.dtype.kind not in "iu":
        raise PredictError(f"{path}: label must be {len(features)} whole numbers, one a case; copy the folder again")
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise PredictError(f"{path}: label must lie in 0 to {classes - 1}; copy the folder again")
    thumbnails = tuple(folder / THUMBNAILS / f"{number:04d}.jpg" for number in range(len(features)))
    absent = [thumbnail.name for thumbnail in thumbnails if not thumbnail.is_file()]
    if absent:
        raise PredictError(f"{folder / THUMBNAILS}: {absent[0]} is missing; copy the folder again")
    return Cases(features, labels, thumbnails)


def _list_files(folder: Path) -> list[str]:
    """Names of all files but the lock, with / between parts on every system, sorted."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(name.as_posix() for name in names if name.as_posix() != LOCK and name.name not in IGNORED)


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PredictError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_arrays(path: Path) -> dict[str, NDArray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise PredictError(f"{path}: cannot be read ({' '.join(str(error).split())}); copy the folder again") from None


def _get(
    arrays: dict[str, NDArray], path: Path, name: str, shape: tuple[int | None, ...], positive: bool = False
) -> Floats:
    """One array of finite floats; None in `shape` is any length."""
    array = arrays.get(name)
    if array is None:
        raise PredictError(f"{path}: {name} is missing; fit the classifier anew with this panfm")
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind != "f" or not np.isfinite(array).all() or (positive and not (array > 0).all()):
        wanted = " x ".join("any" if want is None else str(want) for want in shape)
        kind = "positive" if positive else "finite"
        raise PredictError(
            f"{path}: {name} is {array.dtype} {list(array.shape)}; must be {wanted} {kind} floats: fit it anew"
        )
    return array
