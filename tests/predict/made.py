"""A tiny classifier folder for tests, made without `panfm adapt`: a random ViT as ONNX under a random head.

The weights say nothing about skin; all else is as `panfm.clinic` writes it. `adapt` has tests of its own.
"""

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SIZE = 48
ENCODER = f"timm:test_vit@random:0?image_size={IMAGE_SIZE}"
CLASSES = ("melanoma", "nevus", "other")
MODALITIES = ("dermoscopic", "clinical")
QUANTILES = np.linspace(0, 1, 101)


def draw_image(seed: int, size: tuple[int, int] = (64, 56)) -> Image.Image:
    """Draw a smooth coloured picture of (width, height): random pixels look alike to any network."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def draw_bytes(seed: int, size: tuple[int, int] = (64, 56), kind: str = "JPEG", **save: Any) -> bytes:
    """Draw the same picture as the bytes of a file."""
    buffer = io.BytesIO()
    draw_image(seed, size).save(buffer, kind, **save)
    return buffer.getvalue()


def draw_page() -> bytes:
    """The bytes of a white image: unlike all that `draw_image` draws."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 56), "white").save(buffer, "PNG")
    return buffer.getvalue()


@cache
def export_graph() -> tuple[bytes, dict[str, Any]]:
    """The graph and its transform; exported once a process, since that takes seconds."""
    from panfm.encoder.load import load_encoder
    from panfm.encoder.onnx import FP32, export_onnx

    encoder = load_encoder(ENCODER)
    with TemporaryDirectory() as folder:
        export_onnx(encoder, Path(folder) / "onnx")
        return (Path(folder) / "onnx" / FP32).read_bytes(), encoder.transform.to_plain()


def make_classifier(
    folder: Path,
    *,
    classes: Sequence[str] = CLASSES,
    positive: str | None = CLASSES[0],
    threshold: float | None = 0.3,
    outlier_threshold: float | None = None,
    modality: str | None = "dermoscopic",
    modalities: Sequence[str] | None = MODALITIES,
    num_cases: int = 0,
    seed: int = 0,
    card: dict[str, Any] | None = None,
) -> Path:
    """Write a classifier folder and return it; `draw_bytes` pictures look like the first modality, a white one like the
    second, and the white one is an outlier.

    threshold: on the probability of `positive`; None: no operating point, with a reason. outlier_threshold: None: the
    99 % quantile of the pictures that the head was made from. num_cases: kept cases with thumbnails, their labels in
    turn. card: values that replace those of classifier.json, before the lock is written.
    """
    import onnxruntime

    from panfm_predict.classifier import compute_probabilities
    from panfm_predict.folder import write_lock
    from panfm_predict.outliers import Outliers, compute_scores, project
    from panfm_predict.transform import prepare

    graph, transform = export_graph()
    folder.mkdir(parents=True)
    (folder / "encoder.onnx").write_bytes(graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    values = {
        "panfm_classifier": 1,
        "name": "made for tests",
        "version": 1,
        "created": "2026-11-23",
        "panfm_version": "0.1.0",
        "classes": list(classes),
        "positive": positive,
        "modality": modality,
        "modalities": None if modalities is None else list(modalities),
        "transform": transform,
        "temperature": 1.5,
        "prevalence": {name: 1 / len(classes) for name in classes},
        "threshold_card": None,
        "threshold_reason": f"12 patients with {positive}; at least 20 are needed",
        "encoder": {"name": "test_vit", "address": ENCODER, "hash": "0" * 64, "licences": ["Apache-2.0"]},
        "fitted_on": {
            "images": 60,
            "patients": 40,
            "by_class": {name: {"images": 20, "patients": 15} for name in classes},
            "grouping": "patient",
        },
        "warning": "For research only. Not a medical device; gives no diagnosis.",
    }
    if threshold is not None:
        values["threshold_card"] = {
            "positive": positive,
            "wanted": "sensitivity",
            "target": 0.9,
            "threshold": threshold,
            "sensitivity": {"value": 0.91, "low": 0.72, "high": 0.98, "n": 22},
            "specificity": {"value": 0.64, "low": 0.52, "high": 0.75, "n": 60},
        }
        values["threshold_reason"] = None

    pictures = [draw_bytes(seed * 1000 + number, kind="PNG") for number in range(40)]
    pixels = np.stack([prepare(picture, _Plain(transform)) for picture in pictures])
    features = session.run(None, {"images": pixels})[0]  # [40, D]
    dimension = features.shape[1]
    mean, scale = features.mean(0), features.std(0) + 1e-6
    z = (features - mean) / scale
    _, singular, rows = np.linalg.svd(z.astype(np.float64), full_matrices=False)
    rank = min(8, dimension - 1)
    variances = singular**2 / len(z)
    outliers = Outliers(
        np.zeros(dimension), rows[:rank], variances[:rank], float(variances[rank:].sum() / (dimension - rank))
    )
    weight = rng.normal(size=(len(classes), dimension)) / np.sqrt(dimension)
    probabilities = compute_probabilities(z @ weight.T, values["temperature"])
    scores = compute_scores(z, outliers)
    values["outlier"] = {
        "threshold": float(np.quantile(scores, 0.99)) if outlier_threshold is None else outlier_threshold,
        "quantile": 0.99,
        "method": "probabilistic PCA",
    }
    arrays = {
        "mean": mean,
        "scale": scale,
        "weight": weight,
        "bias": np.zeros(len(classes)),
        "outlier_centre": outliers.centre,
        "outlier_components": outliers.components,
        "outlier_variances": outliers.variances,
        "outlier_residual": np.array([outliers.residual]),
        "reference_quantiles": np.quantile(project(z, outliers)[:, :32], QUANTILES, axis=0).T,
        "reference_scores": np.quantile(scores, QUANTILES),
        "reference_probabilities": np.quantile(probabilities, QUANTILES, axis=0).T,
    }
    if modalities is not None:
        # What is more like a white page than like the pictures looks like the second modality.
        pixels = np.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 255, dtype=np.uint8)
        page = (session.run(None, {"images": pixels})[0][0] - mean) / scale
        arrays["modality_weight"] = np.zeros((len(modalities), dimension))
        arrays["modality_bias"] = np.full(len(modalities), -1e9)
        arrays["modality_weight"][1] = page / (page @ page)
        arrays["modality_bias"][:2] = 0.0, -0.5
    np.savez(folder / "head.npz", **arrays)
    if num_cases:
        (folder / "cases").mkdir()
        for number in range(num_cases):
            thumbnail = draw_image(seed * 1000 + number)
            thumbnail.save(folder / "cases" / f"{number:04d}.jpg")
        labels = np.arange(num_cases) % len(classes)
        np.savez(folder / "cases.npz", features=features[:num_cases], label=labels)
    (folder / "report.md").write_text("# made for tests\n")
    (folder / "classifier.json").write_text(json.dumps(values | (card or {}), indent=2))
    write_lock(folder)
    return folder


class _Plain:
    """A plain transform as `prepare` reads it."""

    def __init__(self, plain: dict[str, Any]) -> None:
        self.image_size: int = plain["image_size"]
        self.resize_size: int = plain["resize_size"]
        self.interpolation: str = plain["interpolation"]
