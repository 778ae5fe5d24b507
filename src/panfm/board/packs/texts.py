"""Texts that cross from one house to another: what a pack's JSON may say, on the way out and on the way in.

Out: nothing that looks like a path of this machine, which would tell a user's or a patient's name. In: names of tasks
and protocols that make file names, and texts that a page can show (short, without control characters).
"""

import re
from typing import Any

from panfm.errors import UserError

# An absolute path, or one from somebody's home: at the start or behind a separator.
PATH = re.compile(r"(?:^|[\s@:=\"'(,;])(?:/[^\s/]+/|~/|\.\./|[A-Za-z]:[\\/]|\\\\)")
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
PLAIN = ("task", "protocol", "variant", "primary_metric")
MAX_TEXT, MAX_ITEMS, MAX_DEPTH = 2000, 200_000, 12


def check_no_paths(value: Any, where: str) -> None:
    """Refuse texts that look like a path of this machine, anywhere inside plain values."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_no_paths(key, where)
            check_no_paths(item, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_no_paths(item, where)
    elif isinstance(value, str) and PATH.search(value):
        raise UserError(
            f"{where}: {value[:120]!r} looks like a path of this machine, which must not leave; give the encoder a "
            "name (encoders: name) or reword the card, and evaluate again"
        )


def check_texts(value: Any, where: str, depth: int = 0) -> None:
    """Refuse what no page could show: control characters, endless texts and lists, names that are no names.

    Raises UserError that names the key.
    """
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels; ask the submitter for a fresh pack")
    if isinstance(value, str):
        if len(value) > MAX_TEXT or not value.isprintable():
            raise UserError(
                f"{where}: {value[:60]!r} is longer than {MAX_TEXT} characters or holds control characters; ask the "
                "submitter for a fresh pack"
            )
    elif isinstance(value, dict | list):
        if len(value) > MAX_ITEMS:
            raise UserError(f"{where}: {len(value):,} entries, up to {MAX_ITEMS:,} are read; ask for a fresh pack")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_texts(key, where, depth + 1)
            named = f"{where}: {key}" if isinstance(value, dict) else where
            if depth == 0 and key in PLAIN and isinstance(item, str) and PLAIN_NAME.fullmatch(item) is None:
                raise UserError(f"{named}: {item[:60]!r} is no name of letters, digits, _ and -; ask for a fresh pack")
            check_texts(item, named, depth + 1)
