"""What a person must know before using a classifier: counts, figures, limits, and how it was made.

    classifier.json, Fitted, Figures  --build_report-->  Page  --page.render_*-->  report.md, report.html

Counts and figures only: no file names, no patients' ids, no rows of the table.
"""

from collections.abc import Mapping
from shlex import quote
from typing import Any

import numpy as np

from panfm.clinic.figures import Figures
from panfm.clinic.fit import Fitted, ModalityHead
from panfm.clinic.outliers import OUTLIER_QUANTILE
from panfm.clinic.page import Page, Section, draw_reliability, show
from panfm.clinic.threshold import OperatingCard, compute_predictive_values

UNGROUPED = (
    "Patients are not known. Images of one patient may lie both in what was learned from and in what was tested on, so "
    "every figure on this page may be too good. Add a column patient to the table and adapt again."
)
PREVALENCES = (0.01, 0.05, 0.2)
NAMES = {"auroc": "AUROC", "balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy", "brier": "Brier score"}
MEANINGS = {
    "auroc": "0.5 is chance, 1 is perfect ranking; with more than two classes the mean of each against the rest",
    "balanced_accuracy": "mean over the classes of the share recognised, the highest probability taken as the answer",
    "accuracy": "share of images whose highest probability is right",
    "brier": "mean squared error of the probabilities; lower is better",
}


def build_report(
    card: Mapping[str, Any], fitted: Fitted, figures: Figures, modality_head: ModalityHead | None, *, keep_cases: bool
) -> Page:
    """Build the page of a classifier. card: the content of classifier.json."""
    on = card["fitted_on"]
    grouped = on["grouping"] == "patient"
    unit = "patients" if grouped else "images"
    people = f" of {on['patients']:,} patients" if grouped else ", patients not known"
    cautions = [] if grouped else [UNGROUPED]
    if on["copies"]:
        cautions.append(
            f"Two images of different {unit} that look like one photograph: {on['copies']} times. Such {unit} were "
            "held together in all folds, so that no figure gains by it; find out whether they are one person."
        )
    weak = [row.name for row in figures.classes if row.num_groups < 20]
    if weak:
        cautions.append(
            f"Fewer than 20 {unit}: {', '.join(weak)}. Take the figures as a first look, not as a validation."
        )
    return Page(
        title=f"{card['name']}, version {card['version']}",
        lead=f"Tells apart {_list(card['classes'])} on {card['modality'] or 'skin'} images. Fitted on "
        f"{on['images']:,} images{people}; written by panfm {card['panfm_version']} on {card['created']}.",
        warning=card["warning"],
        cautions=tuple(cautions),
        sections=(
            _describe_data(card, figures, unit),
            _describe_separation(figures),
            _describe_calibration(figures),
            _describe_operating_point(fitted.card, unit),
            _describe_outliers(card, fitted, modality_head),
            _describe_limits(card),
            _describe_making(card, fitted),
            _describe_use(card, keep_cases),
        ),
        footer="Made by panfm adapt; the files of the folder are locked by their SHA-256 in lock.json. Intervals are "
        "of 95 % and hold images of one patient together: by bootstrap of patients, or in closed form where patients "
        "are few.",
    )


def _describe_data(card: Mapping[str, Any], figures: Figures, unit: str) -> Section:
    heads = ("class", "images", "patients") if unit == "patients" else ("class", "images")
    rows = [
        (row.name, f"{row.num_images:,}", f"{row.num_groups:,}", _share(card["prevalence"][row.name], 1))
        if unit == "patients"
        else (row.name, f"{row.num_images:,}", _share(card["prevalence"][row.name], 1))
        for row in figures.classes
    ]
    text = (
        "The probabilities hold where the classes are as common as here (last column). Elsewhere state how common they "
        "are (--prevalence), and they are corrected by Bayes' rule."
    )
    return Section("What it was fitted on", (text,), heads=(*heads, "share of images"), rows=tuple(rows))


def _describe_separation(figures: Figures) -> Section:
    two = len(figures.classes) == 2
    rows = [(NAMES[name], show(estimate), MEANINGS[name]) for name, estimate in figures.overall.items()]
    rows += [
        (
            f"{row.name} recognised" if two else f"{row.name} against the rest, recognised",
            show(row.recall, percent=True) if two else f"AUROC {show(row.area)}, {show(row.recall, percent=True)}",
            "share of its images whose highest probability is this class",
        )
        for row in figures.classes
    ]
    text = (
        "Every image was scored by classifiers that had seen neither it nor another image of its patient; the whole "
        "fit, with all that is chosen in it, was repeated for each of them."
    )
    return Section(
        "How well it tells them apart", (text,), heads=("figure", "value (95 % interval)", "meaning"), rows=tuple(rows)
    )


def _describe_calibration(figures: Figures) -> Section:
    paragraphs = [
        f"Is a probability of 30 % right three times in ten? Judged is {figures.judged}. Slope: 1 is right, below 1 "
        "the probabilities are too extreme. Intercept: 0 is right, below 0 they are too high.",
        f"Slope {show(figures.calibration.slope)}. Intercept {show(figures.calibration.intercept)}.",
    ]
    if not figures.bins:
        paragraphs.append("Not drawn: too few patients for two groups of 20.")
    if figures.bins and figures.num_hidden_bins:
        paragraphs.append(f"{figures.num_hidden_bins} groups of images with fewer than 20 patients are not shown.")
    rows = tuple((f"{one.confidence:.2f}", show(one.right), f"{one.num_images:,}") for one in figures.bins)
    return Section(
        "Whether its probabilities can be believed",
        tuple(paragraphs),
        svg=draw_reliability(figures.bins, figures.judged) if figures.bins else "",
        heads=("mean probability", "share that was right (95 % interval)", "images"),
        rows=rows,
    )


def _describe_operating_point(point: OperatingCard | str, unit: str) -> Section:
    title = "Threshold card"
    if isinstance(point, str):
        return Section(
            title, (f"There is no operating point: {point}. The classifier gives probabilities and flags nothing.",)
        )
    side, other = (
        ("sensitivity", "specificity") if point.wanted.side == "sensitivity" else ("specificity", "sensitivity")
    )
    kind = f"with {point.positive}" if side == "sensitivity" else f"without {point.positive}"
    paragraphs = (
        f"An image is flagged where its probability of {point.positive}, at the prevalence it was fitted on, is at "
        f"least {point.threshold:.3g}. The threshold was set so that of new images {kind} at least "
        f"{_share(point.wanted.target)} are on the right side on average; the interval of the {side} is that of new "
        f"patients, not of those at hand. The {other} is what out-of-fold scores reached.",
        "The threshold is part of this version and is not changed by --prevalence. What a flag is worth depends on how "
        "common the disease is where it is used:",
    )
    sensitivity, specificity = point.sensitivity, point.specificity
    rows = [
        ("sensitivity", show(sensitivity, percent=True), f"{point.num_positive:,} {unit} with {point.positive}"),
        ("specificity", show(specificity, percent=True), f"{point.num_negative:,} {unit} without"),
    ]
    if sensitivity.value is not None and specificity.value is not None:
        for prevalence in PREVALENCES:
            ppv, npv = compute_predictive_values(sensitivity.value, specificity.value, prevalence)
            rows.append(
                (
                    f"where {_share(prevalence)} have it",
                    f"{_share(ppv)} of the flagged have it",
                    f"{_share(None if npv is None else 1 - npv, 1)} of the others have it all the same",
                )
            )
    return Section(title, paragraphs, heads=("", "value (95 % interval)", "measured on, or meaning"), rows=tuple(rows))


def _describe_outliers(card: Mapping[str, Any], fitted: Fitted, modality_head: ModalityHead | None) -> Section:
    scores, on = fitted.settled.scores, card["fitted_on"]
    num_groups = on["patients"] or on["images"]
    expected = max(1 - OUTLIER_QUANTILE, 1 / (num_groups + 1))  # by patients, as the threshold was chosen
    paragraphs = [
        "Every prediction comes with an outlier score: how far the image lies from those it was fitted on. Of images "
        f"left out of a fit half scored between {np.percentile(scores, 25):.2f} and {np.percentile(scores, 75):.2f}. "
        f"Above {fitted.outlier_threshold:.2f} it says that the image is unlike them and must not be relied on; of "
        f"images of the same kind about {_share(expected, 1)} are marked by mistake.",
        "A low score is no proof that the image is suitable: a disease that nobody labelled can look ordinary.",
    ]
    if modality_head is None:
        paragraphs.append(
            "It was given no examples of other modalities, so it does not say what modality an image is of."
        )
    else:
        own, other = modality_head.right
        told = (
            ""
            if own is None or other is None
            else f" (held-out images: {_share(own, 1)} and {_share(other, 1)} were told right)"
        )
        paragraphs.append(
            f"It also says whether an image looks {_list(list(modality_head.names), 'or')}{told}; it was fitted on "
            f"{card['modality']} images."
        )
    return Section("Images that do not belong", tuple(paragraphs))


def _describe_limits(card: Mapping[str, Any]) -> Section:
    modality = card["modality"]
    return Section(
        "What it must not be used for",
        points=(
            "No diagnosis, triage or reassurance: no decision about a patient may rest on it. It is no medical device.",
            f"Not for anything but {_list(card['classes'], 'or')}: it always answers with one of them, "
            "whatever it is shown.",
            f"Not for {'images that are not ' + modality if modality else 'images of another kind'}, nor for other "
            "devices, skin tones, ages or clinics than it was fitted on, before somebody has measured it there.",
            "Not as evidence in a publication: these figures come from the images it was fitted on, by "
            "cross-validation. A study needs patients of its own, and a comparison with what doctors see.",
            "Not for ever: compare new images with what it was fitted on (panfm monitor); adapt anew when they differ.",
        ),
    )


def _describe_making(card: Mapping[str, Any], fitted: Fitted) -> Section:
    on, encoder, transform = card["fitted_on"], card["encoder"], card["transform"]
    licences = ", ".join(encoder["licences"]) or "not recorded"
    rows = [
        ("encoder", f"{encoder['name']}, hash {encoder['hash'][:12]}; licences: {licences}"),
        (
            "image",
            f"shorter side to {transform['resize_size']} px ({transform['interpolation']}), centre crop of "
            f"{transform['image_size']} px: what lies outside is not seen",
        ),
        ("method", METHODS[on["method"]]),
        ("chosen on all images", _say(fitted.learned.chosen)),
        ("chosen in the folds", "; ".join(sorted({_say(chosen) for chosen in fitted.nested.chosen}))),
        ("folds", f"{fitted.nested.num_folds}, no {on['grouping']} in two of them, seed {on['seed']}"),
        ("temperature", f"{fitted.temperature:.3f} (divides the logits; fitted on out-of-fold logits)"),
        ("outlier score", card["outlier"]["method"]),
    ]
    return Section("How it was made", heads=("", ""), rows=tuple(rows))


METHODS = {
    "probe": "linear probe: ridge-penalised logistic regression on frozen, standardised features; its strength C by "
    "cross-validation within what it learns from",
    "lora": "LoRA: a low-rank change of the encoder learned together with a linear head, then written into the encoder",
}


def _describe_use(card: Mapping[str, Any], keep_cases: bool) -> Section:
    paragraphs = ["No network and no torch are needed; run pip install ./predict in a checkout of panfm, then:"]
    if keep_cases:
        paragraphs.insert(
            0,
            "This folder holds small copies of the fitted images (--keep-cases). They are patients' data: the folder "
            "must not leave the house.",
        )
    name = quote(card["name"])
    share = quote(f"{card['positive'] or card['classes'][0]}=0.05")
    return Section(
        "How to use it",
        tuple(paragraphs),
        code=f"panfm-predict {name} image.jpg\npanfm-predict {name} image.jpg --prevalence {share}\n"
        f"panfm-predict app {name}",
    )


def _say(chosen: Mapping[str, float | int | str]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in chosen.items()
    )


def _share(value: float | None, digits: int = 0) -> str:
    return "none" if value is None else f"{100 * value:.{digits}f} %"


def _list(names: list[str], word: str = "and") -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}" if len(names) > 1 else names[0]
