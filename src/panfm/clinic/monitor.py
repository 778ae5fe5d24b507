"""`panfm monitor`: are the images of this week still those that the classifier was fitted on?

    folder, images --embed--> features --compute_drift--> Drift --> OUT/drift.json, OUT/drift.html
    OUT/history.json  <-- one row a run, charted; a run with the same label replaces its row

Nothing that is written names an image or a patient, and of fewer than MIN_PATIENTS patients no figure is written.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panfm import __version__
from panfm.clinic.drift import MIN_PATIENTS, Drift, compute_drift
from panfm.clinic.images import ImageList, embed_images, find_images
from panfm.errors import UserError
from panfm.files import read_json, write_json, write_text
from panfm_predict import Classifier, PredictError, load_classifier

REPORT, PAGE, HISTORY = "drift.json", "drift.html", "history.json"


@dataclass(frozen=True)
class Monitored:
    """One run. report: drift.json. history: all runs with this one, the oldest first. failed: images not read."""

    drift: Drift
    report: dict[str, Any]
    history: list[dict[str, Any]]
    failed: tuple[str, ...]


def monitor(
    folder: Path,
    places: Sequence[str | Path],
    out: Path,
    *,
    label: str | None = None,
    rate: float = 0.01,
    threads: int = 0,
    seed: int = 0,
) -> Monitored:
    """Compare images with what a classifier was fitted on, and write the report, the page and the history to `out`.

    label: of this run, None: the week (2026-W47). rate: chance of an alarm where nothing changed.

    Raises UserError for a folder, images or a history that cannot be used; nothing is written then.
    """
    from panfm.clinic.monitor_page import build_page
    from panfm.clinic.page import render_html

    if not 0.0005 <= rate <= 0.2:
        raise UserError(f"--rate {rate:g}: must lie between 0.0005 and 0.2, such as 0.01: one false alarm in 100 runs")
    today = datetime.date.today()
    week = today.isocalendar()
    label = " ".join((label or f"{week.year}-W{week.week:02d}").split())
    images = find_images(places)
    try:
        classifier = load_classifier(folder, threads)
        earlier = read_history(out / HISTORY, classifier.card.name)
        embedded = embed_images(classifier.embed, images)
        predictions = classifier.predict_features(embedded.features)
    except PredictError as error:
        raise UserError(str(error)) from None
    groups = np.array(images.groups)[embedded.rows]
    probabilities = np.array([[one.probabilities[name] for name in classifier.classes] for one in predictions])
    drift = compute_drift(
        classifier.head.standardise(embedded.features),
        probabilities,
        groups,
        classifier.head,
        classifier.card.outlier.threshold,
        count_reference(classifier.card.fitted_on),
        rate=rate,
        seed=seed,
    )
    is_shown = drift.num_patients >= MIN_PATIENTS
    first = [one.top for one in predictions]
    unexpected = [one.modality_unexpected for one in predictions if one.modality is not None]
    report = {
        "panfm_drift": 1,
        "panfm_version": __version__,
        "warning": classifier.card.warning,
        "label": label,
        "date": today.isoformat(),
        "verdict": drift.verdict,
        "advice": list(advise(drift, classifier)),
        "classifier": {"name": classifier.card.name, "version": classifier.card.version},
        "images": _describe_images(images, drift, len(embedded.failed)),
        "false_alarm_rate": rate,
        "checks": [asdict(check) for check in drift.checks],
        "component_shifts": list(drift.shifts),
        "classes": {
            name: {
                "mean_probability": drift.mean_probabilities[place],
                "mean_probability_when_fitted": drift.expected_probabilities[place],
                "shift": drift.class_shifts[place],
                "named_first": first.count(name) / len(first),
                "share_of_fitted": classifier.card.prevalence[name],
            }
            for place, name in enumerate(classifier.classes)
            if is_shown
        },
        "unexpected_modality": sum(unexpected) / len(unexpected) if unexpected and is_shown else None,
    }
    history = [*(run for run in earlier if run["label"] != label), _make_row(report, drift)]
    page = render_html(build_page(report, drift, history, count_reference(classifier.card.fitted_on)))
    write_json(out / REPORT, report)
    write_text(out / PAGE, page)
    write_json(out / HISTORY, {"panfm_drift_history": 1, "classifier": classifier.card.name, "runs": history})
    return Monitored(drift, report, history, embedded.failed)


def count_reference(fitted_on: Mapping[str, Any]) -> int:
    """How many patients a classifier was fitted on; where that is unknown, images."""
    number = fitted_on.get("patients") or fitted_on.get("images")
    if not isinstance(number, int) or number < 1:
        raise UserError(f"classifier.json: fitted_on names {number!r} patients; copy the classifier folder again")
    return number


def read_history(path: Path, classifier: str) -> list[dict[str, Any]]:
    """Read the earlier runs, the oldest first; none where there is no file. UserError for another classifier's."""
    if not path.is_file():
        return []
    values = read_json(path)
    runs = values.get("runs") if isinstance(values, dict) and values.get("panfm_drift_history") == 1 else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "label" in run for run in runs):
        raise UserError(f"{path}: is no history that `panfm monitor` wrote; name another folder as --out")
    if values.get("classifier") != classifier:
        raise UserError(
            f"{path}: is the history of {values.get('classifier')!r}, not of {classifier!r}; name another --out"
        )
    return list(runs)


def advise(drift: Drift, classifier: Classifier) -> tuple[str, ...]:
    """Say in plain sentences what was found and what to do."""
    if drift.verdict == "too_few":
        return (
            f"There are images of fewer than {MIN_PATIENTS} patients: too few to tell a change from chance. Collect "
            "more, such as a month instead of a week, and run this again.",
        )
    alarms = {check.name: check for check in drift.checks if check.is_alarm}
    if not alarms:
        return (
            "No change was found that chance does not explain. This is no proof that the classifier is right: whether "
            "it is can only be told from images whose diagnosis is known.",
        )
    said = []
    if "outliers" in alarms:
        said.append(
            f"{alarms['outliers'].value:.0%} of the images are unlike those it was fitted on; about "
            f"{alarms['outliers'].expected:.0%} are expected. Look at them (panfm predict marks them): another "
            "modality, rulers or text, a dirty or broken lens? Their probabilities must not be relied on."
        )
    if "scores" in alarms:
        said.append("As a whole the images are less like those it was fitted on.")
    if "features" in alarms:
        said.append(
            "What the encoder sees has moved. Ask what changed: camera, dermatoscope, light, colour setting, size or "
            "compression of the files, export software, or who is photographed and where on the body."
        )
    if "probabilities" in alarms:
        place = alarms["probabilities"].largest or 0
        way = "higher" if alarms["probabilities"].value > 0.5 else "lower"
        said.append(
            f"The probability of {classifier.classes[place]} is {way} than it was among the fitted images. "
            + (
                "The images have changed too, so this need not be the disease."
                if {"features", "scores", "outliers"} & set(alarms)
                else "The images themselves have not moved: perhaps the mix of patients has; if its shares are known, "
                "state them with --prevalence."
            )
        )
    said.append(
        "Until it is explained, do not use the operating point. Label some of these images (panfm select proposes "
        "which), see whether the classifier is still right on them, and fit it anew with them (panfm adapt) if not."
    )
    return tuple(said)


def _describe_images(images: ImageList, drift: Drift, num_failed: int) -> dict[str, Any]:
    is_shown = drift.num_patients >= MIN_PATIENTS
    return {
        "compared": drift.num_images if is_shown else None,
        "patients": drift.num_patients if images.grouping == "patient" and is_shown else None,
        "grouping": images.grouping,
        "unreadable": num_failed,
        "repeated": images.num_repeated,
    }


def _make_row(report: Mapping[str, Any], drift: Drift) -> dict[str, Any]:
    checks = {check.name: check.value for check in drift.checks}
    return {
        "label": report["label"],
        "date": report["date"],
        "version": report["classifier"]["version"],
        "images": report["images"]["compared"],
        "verdict": drift.verdict,
        **{name: checks.get(name) for name in ("outliers", "scores", "features", "probabilities")},
        "alarms": [check.name for check in drift.checks if check.is_alarm],
    }
