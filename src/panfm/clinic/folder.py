"""The classifier folder: written beside its place, checked by the very program that will read it, then put there.

    Fitted, encoder, card, report  --write_classifier-->  OUT/ {encoder.onnx, head.npz, classifier.json, ..., lock.json}

A version that was in use stays as it was: OUT of version 1 becomes OUT-v1 when version 2 takes its place. Its threshold
was locked, predictions were made with it, and somebody may have to look them up. What lies in OUT is whole at any time.
"""

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from panfm.clinic.fit import Fitted, ModalityHead
from panfm.clinic.recipes import Ints
from panfm.data.decode import decode_upright
from panfm.encoder.load import Encoder
from panfm.encoder.onnx import FP32, export_onnx
from panfm.errors import UserError
from panfm.files import read_json, sync_folder, write_bytes, write_json, write_text
from panfm_predict import PredictError, load_classifier
from panfm_predict.classifier import compute_probabilities
from panfm_predict.folder import CARD, CASES, GRAPH, HEAD, THUMBNAILS, write_lock

THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 160, 85  # pixels: enough to compare, too little to read a label on the skin
NUM_CHECKED = 16  # images whose prediction by the written folder is compared with what was fitted
MAX_PROBABILITY_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Place:
    """Where a classifier goes: its version, and where the version before it is kept (None: there is none)."""

    folder: Path
    version: int
    previous: Path | None


def find_place(out: Path) -> Place:
    """Decide on the version before any work is done. Raises UserError for a folder that holds something else."""
    out = Path(out)
    if not out.name:
        raise UserError(f"--out {out}: must name the folder to write, such as my_classifier")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return Place(out, 1, None)
    if not (out / CARD).is_file():
        raise UserError(f"--out {out}: exists and is no classifier folder; name a new one, or an earlier classifier")
    values = read_json(out / CARD)
    version = values.get("version") if isinstance(values, dict) else None
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{out / CARD}: version is {version!r}, not a number from 1 on; name a new folder as --out")
    previous = out.with_name(f"{out.name}-v{version}")
    if previous.exists():
        raise UserError(
            f"{previous}: exists, and version {version} in {out} would be kept there; move one of them away"
        )
    return Place(out, version + 1, previous)


def write_classifier(
    place: Place,
    encoder: Encoder,
    fitted: Fitted,
    modality_head: ModalityHead | None,
    card: Mapping[str, Any],
    pages: Mapping[str, str],
    *,
    paths: Sequence[Path],
    labels: Ints,
    keep_cases: bool,
    seed: int,
) -> None:
    """Write, check and put in place. encoder: as fitted (a LoRA merged). card: classifier.json. pages: name -> text.

    paths: [N] the fitted images, labels: [N]; keep_cases: small copies of them go into the folder.

    Raises UserError where the encoder has no ONNX form, or what was written predicts something else than was fitted.
    """
    place.folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{place.folder.name}.tmp-", dir=place.folder.parent))
    try:
        _write_graph(encoder, temporary)
        write_bytes(temporary / HEAD, pack_head(fitted, modality_head))
        write_json(temporary / CARD, dict(card))
        for name, text in pages.items():
            write_text(temporary / name, text)
        if keep_cases:
            _write_cases(temporary, fitted.learned.learned_from, labels, paths, seed)
        write_lock(temporary)
        _check(temporary, place.folder, fitted, paths)
        temporary.chmod(0o700 if keep_cases else 0o755)
        if place.previous is not None:
            place.folder.replace(place.previous)
        elif place.folder.exists():
            place.folder.rmdir()
        temporary.replace(place.folder)
        sync_folder(place.folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pack_head(fitted: Fitted, modality_head: ModalityHead | None) -> bytes:
    """The bytes of head.npz; the same arrays give the same bytes."""
    learned, outliers = fitted.learned, fitted.outliers
    arrays = {
        "mean": learned.mean,
        "scale": learned.scale,
        "weight": learned.weight,
        "bias": learned.bias,
        "outlier_centre": outliers.centre,
        "outlier_components": outliers.components,
        "outlier_variances": outliers.variances,
        "outlier_residual": [outliers.residual],
        "reference_quantiles": fitted.reference_quantiles,
        "reference_scores": fitted.reference_scores,
        "reference_probabilities": fitted.reference_probabilities,
    }
    if modality_head is not None:
        arrays |= {"modality_weight": modality_head.weight, "modality_bias": modality_head.bias}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(array, np.float64) for name, array in arrays.items()})
    return buffer.getvalue()


def _write_graph(encoder: Encoder, folder: Path) -> None:
    if encoder.device.type != "cpu":
        encoder = replace(encoder, module=encoder.module.cpu(), device=torch.device("cpu"))
    export_onnx(encoder, folder / "onnx")
    (folder / "onnx" / FP32).replace(folder / GRAPH)
    shutil.rmtree(folder / "onnx")


def _write_cases(folder: Path, features: NDArray[np.float64], labels: Ints, paths: Sequence[Path], seed: int) -> None:
    """Small copies from pixels alone, without any header, in an order that tells nothing of the table's."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(paths))
    (folder / THUMBNAILS).mkdir()
    for number, place in enumerate(order.tolist()):
        image = Image.fromarray(decode_upright(paths[place].read_bytes()))
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(folder / THUMBNAILS / f"{number:04d}.jpg", "JPEG", quality=THUMBNAIL_QUALITY)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, features=features[order].astype(np.float32), label=labels[order])
    write_bytes(folder / CASES, buffer.getvalue())


def _check(folder: Path, out: Path, fitted: Fitted, paths: Sequence[Path]) -> None:
    """What the folder predicts of a few fitted images must be what was fitted: decoder, transform, graph and head."""
    chosen = np.unique(np.linspace(0, len(paths) - 1, NUM_CHECKED).astype(np.int64))
    expected = compute_probabilities(
        fitted.learned.compute_logits(fitted.learned.learned_from[chosen]), fitted.temperature
    )
    try:
        classifier = load_classifier(folder)
        predictions = classifier.predict([paths[place].read_bytes() for place in chosen.tolist()])
    except PredictError as error:
        raise UserError(f"{out}: what was written cannot be used, and was not kept ({error})") from None
    found = np.array([[one.probabilities[name] for name in classifier.classes] for one in predictions])
    difference = float(np.abs(found - expected).max())
    if difference > MAX_PROBABILITY_DIFFERENCE:
        raise UserError(
            f"{out}: what was written predicts probabilities {difference:.4f} away from those fitted (at most "
            f"{MAX_PROBABILITY_DIFFERENCE:g} is tolerated); it was not kept: compute on the CPU, in fp32"
        )
