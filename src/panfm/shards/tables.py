"""Where a source's rows come from: a table or the files themselves, tables joined to them, columns made of others.

    ROOT/table.csv | listing of ROOT  ->  joins  ->  derive  ->  only  ->  (line, {column: cell text}), a row at a time

Cells are stripped text; what they mean is the business of `sources`. Rows stream; only joined tables are held, and of
them only the columns that the card uses. Every fault is a UserError that names file, line, column and rule.
"""

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from panfm.errors import UserError
from panfm.shards.cards import TEMPLATE, Derived, Join, SourceCard, find_placeholders
from panfm.shards.raw_files import IMAGE_SUFFIXES, find_stem, is_image
from panfm.shards.spreadsheets import Dialect, read_spreadsheet

PLACEHOLDER = re.compile(r"\{([^{}:]+)(?::((?:[^{}]|\{[0-9,]+\})+))?\}")  # {column} or {column:REGEX} of a listing
DICOM_AGE = re.compile(r"([0-9]{3})([DWMY])")  # 047Y, 018M, ...
AGES_A_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
LISTED = ("path", "stem", "folder")  # columns that every listing has
ROW_NUMBER = "row_number"  # a column of every table: 0, 1, 2, ...; some sources list the rows of their splits by it
STEM = "stem"  # also of every table: the name of the row's image file without its suffix, for columns.key

Row = dict[str, str]


def iterate_rows(card: SourceCard, root: Path) -> Iterator[tuple[int, Row]]:
    """Yield (line, cells) for every row that the card reads; only columns that it names are in it.

    Raises UserError: a missing or empty table, a column that the card names and the tables lack, a join whose rows
    have no or two partners, a derived column whose pattern does not fit.
    """
    needed = find_needed_columns(card)
    header, rows = _open_rows(card, root)
    header = [*header, ROW_NUMBER]
    where = describe_table(card, root)
    joined = []
    for join in card.joins:
        for column in join.match:
            _check_column(column, header, f"joins.match of card {card.name}", where)
        right_header, partners = _read_join(card, join, root, needed)
        joined.append((join, partners))
        header += [name for name in (*right_header, *join.mark) if name not in header]
    absent = [column for column in card.optional_columns if column not in header]
    header += absent
    for column, origin in card.derive.items():
        used = [origin.column] if origin.column else find_placeholders(origin.template or "")
        for name in used:
            _check_column(name, header, f"derive.{column} of card {card.name}", where)
        header.append(column)
    for place, column in _name_columns(card):
        if (place, column) != ("columns.key", STEM):
            _check_column(column, header, f"{place} of card {card.name}", where)
    num_rows = num_kept = 0
    for line, cells in rows:
        row = {name: cells[name] for name in cells if name in needed} | dict.fromkeys(absent, "")
        if ROW_NUMBER in needed:
            row.setdefault(ROW_NUMBER, str(num_rows))
        num_rows += 1
        for join, partners in joined:
            _add_partner(card, join, partners, row, f"{where}, line {line}")
        for column, origin in card.derive.items():
            row[column] = _derive(column, origin, row, f"{where}, line {line}")
        if all(row[name] in texts for name, texts in card.only.items()):
            num_kept += 1
            yield line, row
    if not num_rows:
        if card.listing:
            patterns = ", ".join(card.listing)
            raise UserError(f"{where}: has no rows: no image file below {root} fits {patterns}; correct the pattern")
        raise UserError(f"{where}: has no rows; an empty archive cannot become shards")
    if not num_kept:
        raise UserError(f"{where}: none of its {num_rows} rows is among those that `only` of card {card.name} keeps")


def describe_table(card: SourceCard, root: Path) -> str:
    """What errors call the origin of the rows."""
    return str(root / card.table) if card.table is not None else f"{root} (listing)"


def find_needed_columns(card: SourceCard) -> frozenset[str]:
    """The columns that the card uses anywhere; all others are not even held in memory."""
    names = {column for _, column in _name_columns(card)}
    for join in card.joins:
        names |= set(join.match)
    for origin in card.derive.values():
        names |= {origin.column} if origin.column else set(find_placeholders(origin.template or ""))
    return frozenset(names)


def _name_columns(card: SourceCard) -> list[tuple[str, str]]:
    """(Place in the card, column) of every column that a finished row must have."""
    named: list[tuple[str, str]] = [(f"columns.{name}", column) for name, column in card.columns.items()]
    named += [(f"labels.{name}", column) for name, label in card.labels.items() for column in label.columns]
    for name, entry in card.image_entries.items():
        named += [
            (f"images.{name}", column) for text in (*entry.path, *entry.mask) for column in find_placeholders(text)
        ]
    named += [("tabular", column) for column in card.tabular]
    named += [("identifying_columns", column) for column in card.identifying_columns]
    named += [("only", column) for column in card.only]
    return named


def _check_column(column: str, header: Iterable[str], named_by: str, where: str) -> None:
    header = list(header)
    if column not in header:
        near = get_close_matches(column, header, n=1, cutoff=0.4)
        hint = f"the nearest is {near[0]}" if near else f"it has {', '.join(header) or 'none'}"
        raise UserError(f"{where}: has no column {column}, which {named_by} names; {hint}")


# ------------------------------------------------------------------------------------------------ tables


def _open_rows(card: SourceCard, root: Path) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    if card.table is not None:
        return _open_table(card, root, card.table, card.dialect)
    return _open_listing(root, card.listing, card.dicom_tags)


def _open_table(
    card: SourceCard, root: Path, table: str, dialect: Dialect
) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    path = root / table
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; --root must be the folder that holds {table}")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; card {card.name} reads its table there, so check --root or the card's table"
        )
    return read_spreadsheet(path, dialect)


def _read_join(
    card: SourceCard, join: Join, root: Path, needed: frozenset[str]
) -> tuple[list[str], dict[tuple[str, ...], Row]]:
    """The header (prefixed) of a joined table, and its rows by the cells that must equal ours."""
    where = str(root / join.table) if join.table is not None else f"{root} (listing {join.listing[0]})"
    if join.table is not None:
        header, rows = _open_table(card, root, join.table, join.dialect)
    else:
        header, rows = _open_listing(root, join.listing, ())
    for column in join.match.values():
        _check_column(column, header, f"joins.match of card {card.name}", where)
    partners: dict[tuple[str, ...], Row] = {}
    for line, row in rows:
        place = tuple(row[column] for column in join.match.values())
        if place in partners:
            raise UserError(
                f"{where}, line {line}: a second row with {', '.join(join.match.values())} = {', '.join(place)}; a "
                "join needs one partner a row, so delete one or match more columns"
            )
        partners[place] = {join.prefix + name: row[name] for name in row if join.prefix + name in needed}
    return [join.prefix + name for name in header], partners


def _add_partner(card: SourceCard, join: Join, partners: dict[tuple[str, ...], Row], row: Row, where: str) -> None:
    place = tuple(row[column] for column in join.match)
    partner = partners.get(place)
    if partner is None and not join.required:
        for name in (*next(iter(partners.values()), {}), *join.mark):
            row.setdefault(name, "")
        return
    if partner is None:
        raise UserError(
            f"{where}: {', '.join(join.match)} = {', '.join(place)} has no row in {join.table or join.listing[0]}; "
            f"complete that table, or set required: false in the join of card {card.name}"
        )
    for name, cell in (partner | join.mark).items():
        if not row.get(name):  # tables that each hold a part of the rows fill one column together
            row[name] = cell
        elif cell and cell != row[name]:
            raise UserError(
                f"{where}, column {name}: {row[name]!r} here, {cell!r} in {join.table or join.listing[0]}; correct "
                f"one, or give the join of card {card.name} a prefix, so that both columns stay"
            )


def _derive(column: str, origin: Derived, row: Row, where: str) -> str:
    if origin.template is not None:
        return TEMPLATE.sub(lambda match: row[match[1]], origin.template)
    assert origin.column is not None and origin.pattern is not None
    cell = row[origin.column]
    if cell == "":
        return ""
    match = re.search(origin.pattern, cell)
    if match is None:
        raise UserError(
            f"{where}, column {origin.column}: {cell!r} does not fit pattern {origin.pattern!r} of derive.{column}; "
            "correct the cell or the pattern"
        )
    return (match[1] or "").strip()


# ------------------------------------------------------------------------------------------------ listings


def _open_listing(
    root: Path, patterns: tuple[str, ...], dicom_tags: tuple[str, ...]
) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    """The columns and rows of the files that fit one of the patterns, in the order of their paths."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --root must be the folder that holds the images")
    compiled = [_compile_pattern(pattern) for pattern in patterns]
    names = list(dict.fromkeys(name for expression, _ in compiled for name in expression.groupindex))
    header = [*names, *(name for name in LISTED if name not in names), *dicom_tags]

    def iterate() -> Iterator[tuple[int, Row]]:
        line = 0
        for path in _walk(root, max(pattern.count("/") for pattern in patterns)):
            file = Path(path)
            has_suffix = file.suffix.lower() in IMAGE_SUFFIXES
            for expression, any_suffix in compiled:
                match = expression.fullmatch(path.removesuffix(file.suffix) if any_suffix and has_suffix else path)
                if match is None or (any_suffix and not is_image(root / path)):
                    continue
                line += 1
                row = {"path": path, STEM: find_stem(path), "folder": file.parts[0] if len(file.parts) > 1 else ""}
                row |= dict.fromkeys(names, "") | {name: text or "" for name, text in match.groupdict().items()}
                if dicom_tags:
                    row |= _read_dicom_tags(root / path, dicom_tags)
                yield line, row
                break

    return header, iterate()


def _compile_pattern(pattern: str) -> tuple[re.Pattern[str], bool]:
    """A pattern as a regular expression, and whether any image suffix may follow it."""
    expression, end, seen = "", 0, set()
    for match in PLACEHOLDER.finditer(pattern):
        expression += re.escape(pattern[end : match.start()]).replace(r"\*", "[^/]*")
        name, inner = match[1], match[2] or "[^/]+"
        if not name.isidentifier():
            raise UserError(f"listing {pattern}: {name!r} is no name for a column; use letters, digits and _")
        expression += f"(?P={name})" if name in seen else f"(?P<{name}>{inner})"
        seen.add(name)
        end = match.end()
    expression += re.escape(pattern[end:]).replace(r"\*", "[^/]*")
    last = PLACEHOLDER.sub("x", pattern).rpartition("/")[2]
    return re.compile(expression), "." not in last


def _walk(root: Path, depth: int, folder: str = "") -> Iterator[str]:
    """Relative paths of the files down to `depth` folders below the root, sorted; hidden ones are left out."""
    with os.scandir(root / folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in found:
        path = f"{folder}/{name}" if folder else name
        if not is_folder:
            yield path
        elif depth > 0:
            yield from _walk(root, depth - 1, path)


def _read_dicom_tags(path: Path, tags: tuple[str, ...]) -> Row:
    """Header tags of a DICOM file as text; a tag that is not there is an empty cell."""
    try:
        import pydicom
    except ImportError:
        raise UserError(f'{path}: reading DICOM needs pydicom; install it with: pip install "panfm[dicom]"') from None
    try:
        header: Any = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
    except Exception as error:  # any: pydicom raises what damaged bytes make it raise
        raise UserError(f"{path}: is no readable DICOM file ({error}); remove it or narrow the listing") from None
    cells = {tag: str(header.get(tag, "") or "").strip() for tag in tags}
    if age := DICOM_AGE.fullmatch(cells.get("PatientAge", "")):
        cells["PatientAge"] = f"{int(age[1]) / AGES_A_YEAR[age[2]]:.4g}"  # in years, as columns.age wants it
    return cells
