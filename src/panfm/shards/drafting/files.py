"""Which file belongs to which row: tables name files whole, without folder or extension, in another case, or in part.

    rows + image files of the folder  ->  match_files  ->  FileMatch: what the card must say, and what stays unmatched

A card can say templates ("photos/{id}.jpg"). Where no template fits (another case, an id inside the name), the draft
writes a list, one line a file, which the card joins: a person can read and correct it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Literal

from panfm.shards.drafting.columns import Rows, is_missing
from panfm.shards.raw_files import IMAGE_SUFFIXES, is_image

MAX_TEMPLATES = 12
LIST_HEADER = ("cell", "image_path")  # of a list that maps the cells of a column to files
MIN_SHARE = 0.3  # of rows or files that a column must match to be believed
FILE_NAME = r"([^/\\]+)$"  # the last part of a path, however it is written
FILE_STEM = r"([^/\\]+?)(?:\.[A-Za-z0-9]+)?$"


@dataclass(frozen=True)
class FileMatch:
    """How rows and files belong together.

    path: the column holds paths; templates: they are made of it, or of a part of it (`pattern`); by_cell: a list maps
    its cells to files; by_file: a list names each file's row, for several files a row.
    """

    way: Literal["path", "templates", "by_cell", "by_file"]
    column: str
    files: dict[int, tuple[str, ...]]  # line -> its files
    templates: tuple[str, ...] = ()  # with {column}, or {column_name} if there is a pattern
    pattern: str | None = None
    listed: tuple[tuple[str, str], ...] = ()  # (cell, path), to be written as a list
    remarks: tuple[str, ...] = ()
    doubled: dict[str, tuple[int, ...]] = field(default_factory=dict)  # file -> the lines that all name it

    @property
    def derived(self) -> str:
        """The name of the column that `pattern` makes."""
        return derived_name(self.column)


def derived_name(column: str) -> str:
    """What the card calls the file names that it takes out of a column's paths."""
    return f"{column} (file)"


def list_images(folder: Path) -> list[str]:
    """The images below a folder as relative paths, sorted; hidden files and folders are left out."""
    files = (path for path in sorted(folder.rglob("*")) if is_image(path) and path.is_file())
    paths = (path.relative_to(folder) for path in files)
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def match_files(header: Sequence[str], rows: Rows, files: Sequence[str], likely: str | None) -> FileMatch | None:
    """Find the column that names the files, trying `likely` first; None if no column names a fair share of them."""
    index = _Index(files)
    order = sorted(header, key=lambda column: column != likely)
    named = {column: _resolve(index, rows, column) for column in order}
    best = max(order, key=lambda column: len(set(named[column].values())), default=None)
    if best is None or not files:
        return None
    found = len(set(named[best].values()))
    if found >= MIN_SHARE * min(len(rows), len(files)) or (best == likely and found):
        return _describe(rows, best, named[best], files)
    # Several files a row, or an id inside a longer name: only a column whose cells are all different can say whose.
    inside = {column: _find_inside(index, rows, column) for column in order if _is_unique(rows, column)}
    best = max(inside, key=lambda column: sum(map(len, inside[column].values())), default=None)
    if best is None or sum(map(len, inside[best].values())) < MIN_SHARE * len(files):
        return None
    by_cell = inside[best]
    owners = Counter(file for found_files in by_cell.values() for file in found_files)
    sure = {cell: tuple(file for file in found if owners[file] == 1) for cell, found in by_cell.items()}
    remarks = [f"the texts of column {best!r} stand inside the file names"]
    if lost := sum(1 for count in owners.values() if count > 1):
        remarks.append(f"{lost} files hold the texts of two rows and were left out")
    if zeros := sum(1 for cell, found in sure.items() if found and cell.casefold() not in index.by_part):
        remarks.append(f"{zeros} cells have other leading zeros than their files: Excel takes them off")
    return FileMatch(
        way="by_file",
        column=best,
        files={line: sure.get(row[best], ()) for line, row in rows},
        listed=tuple((cell, file) for cell, found in sure.items() for file in found),
        remarks=tuple(remarks),
    )


class _Index:
    """The files of a folder by all the ways in which a cell may name them; everything in lower case."""

    def __init__(self, files: Iterable[str]) -> None:
        self.by_name: dict[str, list[str]] = defaultdict(list)
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        self.by_part: dict[str, list[str]] = defaultdict(list)  # any run of words of the stem
        self.by_digits: dict[str, list[str]] = defaultdict(list)  # such a run of digits, leading zeros off
        for file in files:
            stem = PurePosixPath(file).stem.casefold()
            self.by_name[PurePosixPath(file).name.casefold()].append(file)
            self.by_stem[stem].append(file)
            cuts = [match.span() for match in re.finditer(r"[^\W_]+", stem)][:12]
            parts = {stem[cuts[i][0] : cuts[j - 1][1]] for i, j in combinations(range(len(cuts) + 1), 2)}
            for part in parts:
                self.by_part[part].append(file)
                if part.isdigit():
                    self.by_digits[part.lstrip("0")].append(file)

    def find(self, cell: str) -> str | None:
        """The one file that a cell names by its path, name or stem."""
        parts = [part for part in re.split(r"[/\\]", re.sub(r"^[A-Za-z]:", "", cell)) if part not in ("", ".", "..")]
        if not parts:
            return None
        folded = [part.casefold() for part in parts]
        stem = PurePosixPath(folded[-1]).stem if PurePosixPath(folded[-1]).suffix in IMAGE_SUFFIXES else folded[-1]
        for candidates in (self.by_name.get(folded[-1], []), self.by_stem.get(stem, [])):
            # One name in several folders: those that agree in most folders with the cell.
            agree = {
                file: _count_agreeing(PurePosixPath(file.casefold()).parts[:-1], folded[:-1]) for file in candidates
            }
            nearest = [file for file in candidates if agree[file] == max(agree.values())]
            chosen = [file for file in nearest if PurePosixPath(file).name == parts[-1]] or nearest
            if len(chosen) == 1:
                return chosen[0]
        return None


def _count_agreeing(folders: Sequence[str], wanted: Sequence[str]) -> int:
    count = 0
    for one, other in zip(reversed(folders), reversed(wanted), strict=False):
        if one != other:
            break
        count += 1
    return count


def _resolve(index: _Index, rows: Rows, column: str) -> dict[str, str]:
    """Cell -> the file that it names."""
    cells = {row[column] for _, row in rows if not is_missing(row[column])}
    return {cell: file for cell in sorted(cells) if (file := index.find(cell)) is not None}


def _is_unique(rows: Rows, column: str) -> bool:
    cells = [row[column] for _, row in rows if not is_missing(row[column])]
    return len(cells) > 0 and len(set(cells)) == len(cells)


def _find_inside(index: _Index, rows: Rows, column: str) -> dict[str, list[str]]:
    """Cell -> the files whose names hold it as whole words; numbers also with other leading zeros."""
    found: dict[str, list[str]] = {}
    for _, row in rows:
        cell = row[column].casefold()
        if len(cell) < 3 and not cell.isdigit():
            continue
        files = index.by_part.get(cell, []) if len(cell) >= 3 else []
        if not files and cell.isdigit():
            files = index.by_digits.get(cell.lstrip("0"), [])
        if files:
            found[row[column]] = files
    return found


def _describe(rows: Rows, column: str, by_cell: dict[str, str], files: Sequence[str]) -> FileMatch:
    """What the card must say so that each cell leads to its file: as little as fits every matched cell."""
    lines: dict[str, list[int]] = defaultdict(list)
    matched: dict[int, tuple[str, ...]] = {}
    for line, row in rows:
        file = by_cell.get(row[column])
        matched[line] = () if file is None else (file,)
        if file is not None:
            lines[file].append(line)
    doubled = {file: tuple(found) for file, found in lines.items() if len(found) > 1}
    present = frozenset(files)
    if not re.search(r"[{}:]", column):  # these signs mean something in a template
        if all(PurePosixPath(cell.replace("\\", "/")).as_posix() == file for cell, file in by_cell.items()):
            return FileMatch("path", column, matched, doubled=doubled)
        for pattern in (None, FILE_NAME, FILE_STEM):
            templates = _find_templates(by_cell, pattern, present)
            if templates:
                name = column if pattern is None else derived_name(column)
                shown = tuple(f"{before}{{{name}}}{after}" for before, after in templates)
                return FileMatch("templates", column, matched, shown, pattern, doubled=doubled)
    differing = sum(1 for cell, file in by_cell.items() if PurePosixPath(file).stem not in cell)
    remarks = (
        (f"{differing} cells of column {column!r} differ from their files in upper and lower case",)
        if differing
        else ()
    )
    return FileMatch("by_cell", column, matched, listed=tuple(by_cell.items()), remarks=remarks, doubled=doubled)


def _find_templates(
    by_cell: dict[str, str], pattern: str | None, present: frozenset[str]
) -> tuple[tuple[str, str], ...]:
    """(text before, text after) the cell, such that the first file that exists is the right one; empty if none do."""
    texts: dict[str, str] = {}
    for cell in by_cell:
        match = re.search(pattern, cell) if pattern else None
        texts[cell] = match[1] if match else cell.replace("\\", "/")
    found: Counter[tuple[str, str]] = Counter()
    for cell, file in by_cell.items():
        around = _cut_out(file, texts[cell])
        if around is None:
            return ()
        found[around] += 1
    templates = [template for template, _ in found.most_common()]
    if len(templates) > MAX_TEMPLATES:
        return ()
    for cell, file in by_cell.items():
        tried = (f"{before}{texts[cell]}{after}" for before, after in templates)
        if next((one for one in tried if one in present), None) != file:
            return ()
    return tuple(templates)


def _cut_out(file: str, text: str) -> tuple[str, str] | None:
    """What stands around a text that fills the end of a path, with or without the extension; None if it does not."""
    place = file.find(text)
    while place >= 0:
        before, after = file[:place], file[place + len(text) :]
        if before[-1:] in ("", "/") and (after == "" or (after[0] == "." and "/" not in after)):
            return before, after
        place = file.find(text, place + 1)
    return None
