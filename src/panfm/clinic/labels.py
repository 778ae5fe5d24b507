"""A clinic's own list of labelled images, read and checked: the first step of `panfm adapt`.

    my_labels.csv (image, label[, patient][, modality])  --read_labels-->  LabelTable: paths, labels [N], groups [N]
    others.csv    (image, modality[, patient])           --read_examples-->  Examples of other modalities

Whatever would make the figures wrong is an error here, with the line and the way out: a file that is not there, one
image under two labels, one image under two patients (it would be learned from and tested on), a class of one patient.
Messages name files and lines of the user's own table, on the user's own screen; nothing else ever does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from panfm.clinic.images import hash_file
from panfm.errors import UserError
from panfm.shards.dialects import detect_dialect
from panfm.shards.spreadsheets import read_spreadsheet

Grouping = Literal["patient", "image"]
MIN_GROUPS = 2  # of a class: with one there is nobody to test on
MAX_NAMED = 3  # lines of one fault that are named; the rest is counted
MIN_EXAMPLES = 10  # images of another modality: fewer say little of how it looks


@dataclass(frozen=True)
class Row:
    """One line of the table, checked by itself."""

    line: int
    path: Path
    label: str  # the class, or in a table of examples the modality
    patient: str  # "" where the table has no such column
    modality: str  # the same


@dataclass(frozen=True)
class Examples:
    """Images whose modality is known. groups: [N] the patient, else the image itself."""

    paths: tuple[Path, ...]
    modalities: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class LabelTable:
    """The images to fit on. Every image is there once, and images of one patient have one group.

    labels: int64 [N], places in `classes` (sorted). groups: [N]. others: rows of another modality than `modality`.
    num_repeated: lines that were left out because their image stands in another line, with the same label and patient.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    grouping: Grouping
    modality: str | None
    others: Examples
    num_repeated: int

    def count_groups(self, label: int) -> int:
        """How many patients (images where patients are unknown) have an image of the class."""
        return len({group for group, own in zip(self.groups, self.labels.tolist(), strict=True) if own == label})


def read_labels(
    table: Path, images: Path | None = None, *, modality: str | None = None, positive: str | None = None
) -> LabelTable:
    """Read a table (CSV, Excel, ...) of labelled images; images: folder that its paths start in, None the table's own.

    modality: what the images to fit on are; rows that say otherwise become examples of other modalities. positive: the
    class of interest, which must occur.

    Raises UserError for whatever this file's docstring names.
    """
    table = Path(table)
    rows, grouping = _read_rows(table, images, "label")
    rows, num_repeated = _drop_repeated(rows, table)
    modality = modality.lower() if modality else None
    rows, strangers = _split_modalities(rows, table, modality)
    if modality is None and rows and rows[0].modality:
        modality = rows[0].modality
    classes = _check_classes([row.label for row in rows], [row.line for row in rows], table)
    place = {name: number for number, name in enumerate(classes)}
    labels = np.array([place[row.label] for row in rows], dtype=np.int64)
    found = LabelTable(
        paths=tuple(row.path for row in rows),
        labels=labels,
        classes=classes,
        groups=_make_groups(rows, grouping),
        grouping=grouping,
        modality=modality,
        others=_make_examples(strangers, grouping),
        num_repeated=num_repeated,
    )
    unit = "patient" if grouping == "patient" else "image"
    for number, name in enumerate(classes):
        if (num := found.count_groups(number)) < MIN_GROUPS:
            raise UserError(
                f"{table}: class {name!r} has {num} {unit}; at least {MIN_GROUPS} are needed, one to learn from, "
                "one to test on: add images of others, or leave the class out"
            )
    if positive is not None and positive not in classes:
        raise UserError(f"--positive {positive}: no image has this label; the labels are {', '.join(classes)}")
    return found


def read_examples(table: Path, images: Path | None = None) -> Examples:
    """Read a table of images of other modalities: columns image, modality[, patient]. UserError as in `read_labels`."""
    table = Path(table)
    rows, grouping = _read_rows(table, images, "modality")
    rows, _ = _drop_repeated(rows, table)
    return _make_examples([replace(row, modality=row.label.lower()) for row in rows], grouping)


def join_examples(first: Examples, second: Examples, modality: str | None) -> Examples:
    """Put examples of two tables together; modality: that of the images to fit on, which must not be among them.

    Raises UserError where it is among them or unknown, and for a modality with too few examples.
    """
    joined = Examples(first.paths + second.paths, first.modalities + second.modalities, first.groups + second.groups)
    if joined.paths and modality is None:
        raise UserError("there are examples of other modalities; name the one to fit on, as --modality dermoscopic")
    if modality in joined.modalities:
        raise UserError(
            f"--other-modalities: holds images of {modality}, the modality that is fitted on; put them into --csv with "
            "their label, or leave them out"
        )
    for name in sorted(set(joined.modalities)):
        if (num := joined.modalities.count(name)) < MIN_EXAMPLES:
            raise UserError(
                f"other modalities: {name} has {num} images; at least {MIN_EXAMPLES} are needed to tell what it looks "
                "like: add some, or leave these out"
            )
    return joined


# --------------------------------------------------------------------------------------------------------- one table


def _read_rows(table: Path, images: Path | None, wanted: Literal["label", "modality"]) -> tuple[list[Row], Grouping]:
    header, lines = read_spreadsheet(table, detect_dialect(table) if table.is_file() else None)
    columns = {name.lower(): name for name in header}
    for name in ("image", wanted):
        if name not in columns:
            raise UserError(
                f"{table}: has no column {name!r}; it has {', '.join(header)}: the columns are image, {wanted} and, "
                "where known, patient" + (", modality" if wanted == "label" else "")
            )
    base = Path(images) if images is not None else table.parent
    if not base.is_dir():
        raise UserError(f"--images {base}: no such folder; name the folder that the paths of {table.name} start in")
    rows = []
    for line, cells in lines:
        values = {name: cells[columns[name]] if name in columns else "" for name in ("image", "patient", "modality")}
        rows.append(
            Row(line, base / values["image"], cells[columns[wanted]], values["patient"], values["modality"].lower())
            if values["image"]
            else Row(line, Path(), "", "", "")
        )
    if not rows:
        raise UserError(f"{table}: has no rows below its header; a line for each image is needed")
    _refuse(rows, table, lambda row: row.path == Path(), "no image is named", "name its file, or remove the line")
    _refuse(rows, table, lambda row: not row.label, f"{wanted} is empty", "fill it in, or remove the line")
    for name in ("patient", "modality") if wanted == "label" else ("patient",):
        if name in columns:
            _refuse(
                rows,
                table,
                lambda row, name=name: not getattr(row, name),  # type: ignore[misc]
                f"{name} is empty",
                f"fill it in on every line, or take the column {name} out of the table",
            )
    _refuse(rows, table, lambda row: not row.path.is_file(), "no such file", "correct the path, or name --images DIR")
    return rows, "patient" if "patient" in columns else "image"


def _refuse(rows: Sequence[Row], table: Path, is_bad: Callable[[Row], bool], what: str, way: str) -> None:
    bad = [row for row in rows if is_bad(row)]
    if bad:
        named = "; ".join(
            f"line {row.line}" + (f" ({row.path})" if what == "no such file" else "") for row in bad[:MAX_NAMED]
        )
        more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        raise UserError(f"{table}, {named}{more}: {what}; {way}")


def _drop_repeated(rows: list[Row], table: Path) -> tuple[list[Row], int]:
    """Keep each image once, told by its bytes: a copy under another name would be learned from and tested on."""
    first: dict[str, Row] = {}
    for row in rows:
        seen = first.setdefault(hash_file(row.path), row)
        if seen is row:
            continue
        both = f"{table}, lines {seen.line} and {row.line}: the same image"
        if seen.label != row.label:
            raise UserError(f"{both} under two labels ({seen.label}, {row.label}); decide for one, or remove both")
        if seen.patient != row.patient:
            raise UserError(f"{both} under two patients; correct one, or remove both lines")
        if seen.modality != row.modality:
            raise UserError(f"{both} under two modalities ({seen.modality}, {row.modality}); correct one")
    return list(first.values()), len(rows) - len(first)


def _split_modalities(rows: list[Row], table: Path, modality: str | None) -> tuple[list[Row], list[Row]]:
    """Rows to fit on, and rows of other modalities."""
    named = sorted({row.modality for row in rows} - {""})
    if modality is None:
        if len(named) > 1:
            raise UserError(
                f"{table}: holds several modalities ({', '.join(named)}); name the one to fit on, as --modality "
                f"{named[0]}: the others become examples of what does not belong"
            )
        return rows, []
    if named and modality not in named:
        raise UserError(f"--modality {modality}: no row of {table} has it; its modalities are {', '.join(named)}")
    return [row for row in rows if row.modality in ("", modality)], [
        row for row in rows if row.modality not in ("", modality)
    ]


def _check_classes(labels: Sequence[str], lines: Sequence[int], table: Path) -> tuple[str, ...]:
    written: dict[str, tuple[str, int]] = {}
    for label, line in zip(labels, lines, strict=True):
        known, first = written.setdefault(" ".join(label.split()).casefold(), (label, line))
        if known != label:
            raise UserError(
                f"{table}, lines {first} and {line}: labels {known!r} and {label!r} differ in capitals or blanks "
                "alone; write them alike"
            )
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise UserError(
            f"{table}: all images have the label {classes[0]!r}; at least two classes are needed, such as melanoma and "
            "other"
        )
    return classes


def _make_groups(rows: Sequence[Row], grouping: Grouping) -> tuple[str, ...]:
    return tuple(row.patient if grouping == "patient" else str(row.path) for row in rows)


def _make_examples(rows: Sequence[Row], grouping: Grouping) -> Examples:
    return Examples(tuple(row.path for row in rows), tuple(row.modality for row in rows), _make_groups(rows, grouping))
