"""`panfm-predict FOLDER IMAGE...`: what a classifier says of images, as text, JSON or CSV; `panfm-predict app FOLDER`.

    arguments  --main-->  exit code: 0 done, 1 some image could not be read (and was named), 2 the user's input (one
    line, no traceback), 130 Ctrl-C

`panfm predict` runs the same `run`. Images are named in the output as they were on the command line, for who typed
them; nothing is written anywhere but to the standard output.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

from panfm_predict.card import Card, Rate
from panfm_predict.classifier import Classifier, Prediction, load_classifier
from panfm_predict.errors import ImageError, PredictError
from panfm_predict.files import SUFFIXES, list_images
from panfm_predict.prior import complete_prevalence, parse_prevalence

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130
Output = Literal["text", "json", "csv"]
Answer = tuple[str, Prediction | ImageError]


def run(
    folder: Path | str,
    images: Sequence[str],
    prevalence: Sequence[str] = (),
    output: Output = "text",
    threads: int = 0,
    out: TextIO | None = None,
) -> int:
    """Predict images (files, or folders of them) and write the answers to `out`; return the exit code.

    Without images what the classifier is: its classes, what it was fitted on, its operating point. Raises PredictError.
    """
    out = sys.stdout if out is None else out
    paths = _find_images(images)
    given = parse_prevalence(prevalence)
    classifier = load_classifier(folder, threads)
    shares = complete_prevalence(given, classifier.card.prevalence) if given else None
    if not images:
        out.write(describe(classifier))
        return 0
    answers = zip(paths, classifier.iterate_predictions(paths, shares), strict=True)
    write = {"text": _write_text, "json": _write_json, "csv": _write_csv}[output]
    num_failed = write(answers, classifier.card, shares, out)
    return EXIT_FAILED if num_failed else 0


def describe(classifier: Classifier) -> str:
    """What a classifier is, for people: lines of text."""
    card = classifier.card
    fitted = card.fitted_on
    lines = [
        f"{card.name}, version {card.version} of {card.created} (panfm {card.panfm_version})",
        f"classes: {', '.join(card.classes)}",
        f"modality: {card.modality or 'not stated'}",
        f"fitted on: {fitted.get('images', '?')} images of {fitted.get('patients') or '?'} patients",
        f"encoder: {card.encoder.get('name', '?')}, licences of its training data: "
        f"{', '.join(card.encoder.get('licences') or []) or 'not stated'}",
        f"operating point: {_describe_threshold(card)}",
        card.warning,
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a class's name that a Windows console has no letters for
        if arguments[:1] == ["app"]:
            from panfm_predict.app.cli import run as run_app

            code = run_app(arguments[1:])
        else:
            options = _build_parser().parse_args(arguments)
            output: Output = "json" if options.json else "csv" if options.csv else "text"
            code = run(options.folder, options.images, options.prevalence, output, options.threads)
    except PredictError as error:
        sys.stderr.write(f"panfm-predict: {' '.join(str(error).split())}\n")
        code = EXIT_USER
    except KeyboardInterrupt:
        sys.stderr.write("panfm-predict: stopped\n")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        code = 0
    sys.exit(code)


def _build_parser() -> argparse.ArgumentParser:
    from panfm_predict import __version__

    parser = argparse.ArgumentParser(
        prog="panfm-predict",
        description="What a classifier folder says of images. For research only; gives no diagnosis. "
        "Without images: what the classifier is. `panfm-predict app FOLDER` opens it as a page on this computer.",
        epilog="Example: panfm-predict my_classifier a.jpg photos/ --prevalence melanoma=0.05",
    )
    parser.add_argument("folder", help="Classifier folder that `panfm adapt` wrote.")
    parser.add_argument("images", nargs="*", help="Image files, or folders of images, with those inside them.")
    parser.add_argument(
        "--prevalence",
        action="append",
        default=[],
        metavar="CLASS=SHARE",
        help="How common a class is where the images come from; repeat for several. Default: as in the fitted images.",
    )
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="One JSON object with all answers.")
    formats.add_argument("--csv", action="store_true", help="A table, one row an image.")
    parser.add_argument("--threads", type=int, default=0, help="Processor threads; 0: as many as there are cores.")
    parser.add_argument("--version", action="version", version=f"panfm-predict {__version__}")
    return parser


def _find_images(images: Sequence[str]) -> list[str]:
    """Files as they are named; a folder stands for its images (Windows does not expand *.jpg)."""
    paths = []
    for name in images:
        if not Path(name).is_dir():
            paths.append(name)
            continue
        try:
            inside = list_images(Path(name))
        except OSError as error:
            raise PredictError(f"{error.filename}: cannot be read ({error.strerror}); check who may read it") from None
        if not inside:
            raise PredictError(f"{name}: holds no image ({', '.join(SUFFIXES)}); name image files")
        paths += map(str, inside)
    return paths


def _describe_threshold(card: Card) -> str:
    point = card.threshold_card
    if point is None:
        return f"none ({card.threshold_reason or 'not chosen'})"
    rates = f"sensitivity {_describe_rate(point.sensitivity)}, specificity {_describe_rate(point.specificity)}"
    return (
        f"flagged where the probability of {point.positive} is at least {point.threshold:.3f} (chosen for "
        f"{point.wanted} {point.target:g}; out of fold {rates})"
    )


def _describe_rate(rate: Rate) -> str:
    if rate.value is None:
        return "not measured"
    interval = "" if rate.low is None or rate.high is None else f" [{rate.low:.2f} to {rate.high:.2f}]"
    return f"{rate.value:.2f}{interval}"


def _write_text(answers: Iterator[Answer], card: Card, shares: dict[str, float] | None, out: TextIO) -> int:
    num_failed = 0
    for name, answer in answers:
        if isinstance(answer, ImageError):
            num_failed += 1
            out.write(f"{answer}\n")
            continue
        ranked = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])
        line = ", ".join(f"{label} {value:.3f}" for label, value in ranked)
        flag = {True: "; FLAGGED", False: "; not flagged", None: ""}[answer.flagged]
        out.write(f"{name}: {line}{flag}\n" + "".join(f"    {note}\n" for note in answer.notes))
    out.write(f"operating point: {_describe_threshold(card)}\n")
    if shares is not None:
        stated = ", ".join(f"{label} {share:.3g}" for label, share in shares.items())
        out.write(f"probabilities are those at the prevalence {stated}; the operating point is applied before that\n")
    if num_failed:
        out.write(f"{num_failed} of the images could not be read\n")
    out.write(f"{card.warning}\n")
    return num_failed


def _write_json(answers: Iterator[Answer], card: Card, shares: dict[str, float] | None, out: TextIO) -> int:
    rows: list[dict[str, Any]] = []
    num_failed = 0
    for name, answer in answers:
        if isinstance(answer, ImageError):
            num_failed += 1
            rows.append({"image": name, "error": str(answer)})
        else:
            plain = asdict(answer)
            rows.append({"image": name, **{field: plain[field] for field in _FIELDS}})
    document = {
        "warning": card.warning,
        "classifier": {"name": card.name, "version": card.version, "classes": list(card.classes)},
        "threshold_card": None if card.threshold_card is None else asdict(card.threshold_card),
        "threshold_reason": card.threshold_reason,
        "corrected_for": shares,
        "predictions": rows,
    }
    json.dump(document, out, indent=2, allow_nan=False)
    out.write("\n")
    return num_failed


def _write_csv(answers: Iterator[Answer], card: Card, shares: dict[str, float] | None, out: TextIO) -> int:
    table = csv.writer(out, lineterminator="\n")
    columns = ["flagged", "outlier_score", "is_outlier", "modality", "modality_unexpected"]
    last = ["corrected_for", "notes", "error", "warning"]
    table.writerow(["image", "top", *(f"p_{name}" for name in card.classes), *columns, *last])
    corrected = " ".join(f"{label}={share:.6g}" for label, share in (shares or {}).items())
    num_failed = 0
    for name, answer in answers:
        if isinstance(answer, ImageError):
            num_failed += 1
            table.writerow([name, *[""] * (len(card.classes) + len(columns) + 3), str(answer), card.warning])
            continue
        facts = [getattr(answer, column) for column in columns]
        probabilities = [f"{answer.probabilities[label]:.6f}" for label in card.classes]
        plain = [_to_cell(fact) for fact in facts]
        table.writerow([name, answer.top, *probabilities, *plain, corrected, " ".join(answer.notes), "", card.warning])
    return num_failed


def _to_cell(fact: bool | float | str | None) -> str:
    if fact is None:
        return ""
    return f"{fact:.6f}" if isinstance(fact, float) else str(fact).lower() if isinstance(fact, bool) else fact


_FIELDS = [field.name for field in fields(Prediction) if field.name not in ("corrected_for", "warning")]


if __name__ == "__main__":
    main()
