"""`panfm adapt`: a clinic's own few labelled images become a classifier folder that a computer without torch can use.

    table --labels--> images, classes, patients --encoder--> features --fit--> head, temperature, operating point
      --figures, report--> what may be believed --folder--> OUT/, locked

The same table, encoder, seed and number of threads give the same bytes of head.npz.
"""

import datetime
import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from panfm import __version__
from panfm.clinic.copies import find_copies, hold_together
from panfm.clinic.figures import Figures, compute_figures
from panfm.clinic.fit import Fitted, ModalityHead, fit_classifier, fit_modality_head
from panfm.clinic.folder import Place, find_place, write_classifier
from panfm.clinic.labels import Examples, LabelTable, join_examples, read_examples, read_labels
from panfm.clinic.lora import build_lora_recipe, embed_files
from panfm.clinic.outliers import OUTLIER_QUANTILE
from panfm.clinic.page import render_html, render_markdown
from panfm.clinic.recipes import build_probe_recipe
from panfm.clinic.report import build_report
from panfm.clinic.threshold import OperatingCard, Wanted
from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.measures.intervals import Estimate
from panfm_predict.card import WARNING

Method = Literal["probe", "lora"]
FOLDS: dict[Method, int] = {"probe": 10, "lora": 5}  # a fold of LoRA is a training; more folds lose fewer images each
NUM_LORA_EPOCHS = 15  # as in the protocol `finetune`
OUTLIER_METHOD = (
    "Mahalanobis distance with a shrunk covariance (Ledoit and Wolf 2004) of standardised features, divided by their "
    "number"
)
NO_EXAMPLES = Examples((), (), ())


@dataclass(frozen=True)
class Adapted:
    """What was made: the folder, the version, where the version before it is kept, and what the report says.

    copies: pairs of places in the table that look like one photograph under two patients.
    """

    place: Place
    table: LabelTable
    copies: tuple[tuple[int, int], ...]
    fitted: Fitted
    figures: Figures


def adapt(
    address: str,
    table: Path,
    out: Path,
    *,
    images: Path | None = None,
    method: Method = "probe",
    positive: str | None = None,
    wanted: Wanted | None = None,
    modality: str | None = None,
    other_modalities: Path | None = None,
    keep_cases: bool = False,
    device: str = "cpu",
    workers: int = 1,
    epochs: int = NUM_LORA_EPOCHS,
    seed: int = 0,
) -> Adapted:
    """Fit a classifier on a table of labelled images and write its folder `out`.

    address: of the encoder. images: folder that the table's paths start in, None: the table's own. wanted: what the
    operating point for `positive` is to reach. other_modalities: a table of examples of what does not belong.

    Raises UserError for whatever is wrong with the table, the encoder or the folder, before anything is computed where
    that can be told, and never leaves a half-written folder.
    """
    place = find_place(out)
    _check_wanted(positive, wanted)
    _check_onnx()
    labelled = read_labels(table, images, modality=modality, positive=positive)
    examples = read_examples(other_modalities, images) if other_modalities is not None else NO_EXAMPLES
    examples = join_examples(labelled.others, examples, labelled.modality)
    encoder = load_encoder(address, device=device)
    if encoder.dtype != "fp32":
        raise UserError(f"{address}: a classifier is written in fp32; leave out ?dtype=")

    features = embed_files(encoder, labelled.paths, workers)
    copies = find_copies(labelled.paths, labelled.groups)
    groups, num_classes = np.array(hold_together(labelled.groups, copies)), len(labelled.classes)
    _check_groups(table, labelled, groups)
    if method == "probe":
        recipe = build_probe_recipe(features, labelled.labels, groups, num_classes=num_classes, seed=seed)
    else:
        recipe = build_lora_recipe(
            encoder,
            labelled.paths,
            features,
            labelled.labels,
            groups,
            num_classes=num_classes,
            modality=labelled.modality,
            seed=seed,
            epochs=epochs,
            workers=workers,
        )
    fitted = fit_classifier(
        recipe,
        labelled.labels,
        groups,
        classes=labelled.classes,
        positive=positive,
        wanted=wanted,
        unit="patients" if labelled.grouping == "patient" else "images",
        num_folds=FOLDS[method],
        seed=seed,
    )
    adapted = encoder if fitted.learned.network is None else _replace_network(encoder, fitted)
    head = _fit_modality_head(adapted, fitted, groups, labelled.modality, examples, workers, seed)
    figures = compute_figures(
        labelled.labels, groups, fitted.nested.probabilities, labelled.classes, positive, seed=seed
    )
    card = describe_classifier(place, adapted, labelled, len(copies), fitted, figures, head, positive, method, seed)
    page = build_report(card, fitted, figures, head, keep_cases=keep_cases)
    write_classifier(
        place,
        adapted,
        fitted,
        head,
        card,
        {"report.md": render_markdown(page), "report.html": render_html(page)},
        paths=labelled.paths,
        labels=labelled.labels,
        keep_cases=keep_cases,
        seed=seed,
    )
    return Adapted(place, labelled, tuple(copies), fitted, figures)


def describe_classifier(
    place: Place,
    encoder: Encoder,
    table: LabelTable,
    num_copies: int,
    fitted: Fitted,
    figures: Figures,
    head: ModalityHead | None,
    positive: str | None,
    method: Method,
    seed: int,
) -> dict[str, Any]:
    """The content of classifier.json."""
    facts, point = encoder.facts, fitted.card
    licences = sorted({source.licence for source in facts.sources}) if facts is not None else []
    if not licences and encoder.card.licence is not None:
        licences = [encoder.card.licence]
    counts: dict[str, dict[str, int | None]] = {
        row.name: {"images": row.num_images, "patients": row.num_groups} for row in figures.classes
    }
    if table.grouping == "image":  # how many patients there are nobody said
        counts = {name: {"images": count["images"], "patients": None} for name, count in counts.items()}
    num_images = len(table.paths)
    return {
        "panfm_classifier": 1,
        "name": place.folder.name,
        "version": place.version,
        "created": datetime.date.today().isoformat(),
        "panfm_version": __version__,
        "classes": list(table.classes),
        "positive": positive,
        "modality": table.modality,
        "modalities": None if head is None else list(head.names),
        "transform": encoder.transform.to_plain(),
        "temperature": fitted.temperature,
        "prevalence": {row.name: row.num_images / num_images for row in figures.classes},
        "threshold_card": _describe_point(point) if isinstance(point, OperatingCard) else None,
        "threshold_reason": None if isinstance(point, OperatingCard) else point,
        "outlier": {
            "threshold": fitted.outlier_threshold,
            "quantile": OUTLIER_QUANTILE,
            "method": OUTLIER_METHOD,
        },
        "encoder": {
            "name": encoder.name,
            "address": hide_folders(encoder.address),
            "hash": encoder.hash,
            "licences": licences,
            "changed_by": None if method == "probe" else method,
        },
        "fitted_on": {
            "images": num_images,
            "patients": len(set(table.groups)) if table.grouping == "patient" else None,
            "by_class": counts,
            "grouping": table.grouping,
            "copies": num_copies,
            "method": method,
            "seed": seed,
        },
        "warning": WARNING,
    }


def hide_folders(address: str) -> str:
    """Leave of an encoder's address what tells encoders apart: whose computer it lay on is nobody's business."""
    return re.sub(r"(?<=[:@])[^:@?]*[/\\]", "", address)


def _describe_point(point: OperatingCard) -> dict[str, Any]:
    def describe(estimate: Estimate, number: int) -> dict[str, Any]:
        return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": number}

    return {
        "positive": point.positive,
        "wanted": point.wanted.side,
        "target": point.wanted.target,
        "threshold": point.threshold,
        "sensitivity": describe(point.sensitivity, point.num_positive),
        "specificity": describe(point.specificity, point.num_negative),
    }


def _replace_network(encoder: Encoder, fitted: Fitted) -> Encoder:
    assert fitted.learned.network is not None
    return replace(encoder, module=fitted.learned.network)


def _fit_modality_head(
    encoder: Encoder,
    fitted: Fitted,
    groups: np.ndarray,
    modality: str | None,
    examples: Examples,
    workers: int,
    seed: int,
) -> ModalityHead | None:
    if not examples.paths:
        return None
    assert modality is not None, "join_examples asks for it"
    features = embed_files(encoder, examples.paths, workers)
    return fit_modality_head(
        fitted.learned, groups, modality, features, examples.modalities, np.array(examples.groups), seed=seed
    )


def _check_groups(table: Path, labelled: LabelTable, groups: np.ndarray) -> None:
    """A class of two patients may be one, if they have the same photograph."""
    for number, name in enumerate(labelled.classes):
        if len(set(groups[labelled.labels == number])) < 2:
            raise UserError(
                f"{table}: all images of class {name!r} look like copies of each other, under several "
                f"{labelled.grouping}s; one to learn from and one to test on are needed: add images of others"
            )


def _check_wanted(positive: str | None, wanted: Wanted | None) -> None:
    if wanted is None:
        return
    if positive is None:
        raise UserError(f"--{wanted.side} {wanted.target:g}: of which class? name it, as --positive melanoma")
    if not 0.5 <= wanted.target < 1:
        raise UserError(f"--{wanted.side} {wanted.target:g}: must lie between 0.5 and 1 (1 excluded), such as 0.95")


def _check_onnx() -> None:
    """Before hours of work, not after them."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(name) is None:
            raise UserError(f"panfm adapt writes the encoder as ONNX and needs {name}; run `pip install 'panfm[onnx]'`")
