"""What a tar of ours may hold, read from its 512-byte headers alone: plain files with the names of a sample, no more.

    512 bytes -> parse_header -> (name, size)        a whole stretch of a tar -> check_members -> nothing, or a fault

The list is closed, so that pickles and programs, absolute paths and `..`, links, devices, sparse files and extended
headers (which could rename a member after all checks) need no list of their own. tarfile is not used here: it would
follow GNU and PAX extensions, which must not be there. Numbers are read as written in octal digits, nothing else.
"""

import re
from collections.abc import Sequence

BLOCK = 512  # bytes of a tar's header; a member's bytes are padded to it
MEMBER_NAME = re.compile(r"([A-Za-z0-9_\-]{1,128})\.(json|jpg|png|webp|mask\.png|txt)")
_DIGITS = re.compile(rb"[0-7]{1,12}")


class MemberError(ValueError):
    """A member that may not be in a shard, or is not what the index says; the message says which and why."""


def parse_header(block: bytes) -> tuple[str, int]:
    """The name and the size in bytes of the plain file whose header this is.

    Raises MemberError for everything else: another type, another name than a sample's members have, a torn header.
    """
    if len(block) != BLOCK or block[257:262] != b"ustar" or _parse_octal(block[148:156]) != _compute_sum(block):
        raise MemberError("there is no header of a tar member where one must be")
    raw = block[:100].split(b"\0", 1)[0]
    name = raw.decode("ascii", "replace")
    if block[156:157] != b"0":  # b"\0" too: no writer of this century makes it
        raise MemberError(f"member {name[:80]!r} is no plain file (type {block[156:157]!r})")
    if not MEMBER_NAME.fullmatch(name) or any(block[345:500]):  # the prefix would stand before the name
        raise MemberError(f"member {name[:80]!r} is none that a sample has; nothing else may be in a shard")
    size = _parse_octal(block[124:136])
    if size is None:
        raise MemberError(f"member {name[:80]!r} has no readable size")
    return name, size


def check_members(
    data: bytes, start: int, offsets: Sequence[int], lengths: Sequence[int], *, is_end: bool
) -> list[tuple[str, memoryview]]:
    """Walk the members of a stretch of a tar that begins at byte `start`: the indexed ones, as (name, bytes) in order.

    Every byte must belong to a member or its padding: those that the index names, at these `offsets` with these
    `lengths`, and the .json files between them. `is_end`: the stretch ends the tar, in zeros.

    Raises MemberError for a member that may not be there, is missing, or lies elsewhere.
    """
    view = memoryview(data)
    found: list[tuple[str, memoryview]] = []
    place = 0
    while place < len(data):
        if is_end and not any(view[place : place + BLOCK]):
            if data.count(0, place) != len(data) - place:
                raise MemberError(f"bytes behind the end at byte {start + place}; damaged, or something is hidden")
            break
        name, size = parse_header(data[place : place + BLOCK])
        first, place = place + BLOCK, place + BLOCK + pad(size)
        if place > len(data):
            raise MemberError(f"member {name!r} is {size} bytes long, more than its index leaves room for")
        if len(found) < len(offsets) and start + first == offsets[len(found)]:
            if size != lengths[len(found)] or name.endswith(".json"):
                raise MemberError(f"member {name!r} of {size} bytes is not what the index says")
            found.append((name, view[first : first + size]))
        elif not name.endswith(".json"):
            raise MemberError(f"member {name!r} has no row in the index")
    if len(found) != len(offsets):
        raise MemberError(f"no member begins at byte {offsets[len(found)]}, where the index says one does")
    return found


def pad(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _parse_octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if _DIGITS.fullmatch(digits) else None


def _compute_sum(block: bytes) -> int:
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")
