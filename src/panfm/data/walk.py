"""Walk: the passes over n items, each item once a pass, whatever happened to the run on the way.

    ordinal k  ->  pass k // n, place k % n  ->  window  ->  item

A pass puts blocks of BLOCK_ITEMS neighbours in random order, and shuffles WINDOW_BLOCKS of them together: reads stay
near each other on disk, and what is smaller than a window is shuffled as a whole. A new salt in the middle of a pass (a
rollback) leaves what was drawn before it as it was and draws the rest of the pass in a new order: blocks that no window
has opened stay blocks, and what is left of the open window joins them in blocks of its own.

What is kept of a pass is one number a block, n / 8 bytes, and one window.
"""

from collections.abc import Sequence

import numpy as np

from panfm.data.hashing import Indices, derive_key, permute

BLOCK_ITEMS = 32  # neighbours on disk: one read-ahead window of photographs of 50 kB
WINDOW_BLOCKS = 64  # blocks shuffled together: 2,048 samples, several global batches

Salts = Sequence[tuple[int, int]]  # (the first ordinal, or position, that a salt rules; the salt), ascending from 0


def find_salt(salts: Salts, place: int) -> int:
    """Return the salt that rules at an ordinal or a position."""
    return next(salt for first, salt in reversed(salts) if first <= place)


class Walk:
    """An endless sequence of passes over `num_items` items; a pure function of the key, the salts and the ordinal."""

    def __init__(self, num_items: int, key: tuple[int | str, ...], salts: Salts) -> None:
        self.salts: Salts = tuple(dict(salts).items())  # where two begin at one ordinal, the first ruled nothing
        self._num_items = num_items
        self._key = key
        self._pass = -1
        self._parts: list[tuple[int, _Part]] = []  # with the place of the pass at which each begins
        self._window: Indices = np.zeros(0, dtype=np.int64)
        self._first = self._stop = 0  # ordinals that the window holds

    def get(self, ordinals: Indices) -> Indices:
        """Return the item at each of some ascending ordinals."""
        items = np.empty(ordinals.size, dtype=np.int64)
        done = 0
        while done < ordinals.size:
            self._open_window(int(ordinals[done]))
            end = int(np.searchsorted(ordinals, self._stop))
            items[done:end] = self._window[ordinals[done:end] - self._first]
            done = end
        return items

    def _open_window(self, ordinal: int) -> None:
        if self._first <= ordinal < self._stop:
            return
        number, place = divmod(ordinal, self._num_items)
        if number != self._pass:
            self._parts = self._plan_pass(number)
            self._pass = number
        begin, part = next((begin, part) for begin, part in reversed(self._parts) if begin <= place)
        later = [first for first, _ in self._parts if first > begin]
        window = part.find_window(place - begin)
        self._window = part.read_window(window)
        start = number * self._num_items
        self._first = start + begin + int(part.starts[window])
        # A salt that came into force inside the window ended it there.
        self._stop = min(self._first + self._window.size, start + min(later, default=self._num_items))

    def _plan_pass(self, number: int) -> "list[tuple[int, _Part]]":
        first = number * self._num_items
        blocks = np.arange(-(-self._num_items // BLOCK_ITEMS))
        key = (*self._key, find_salt(self.salts, first), number)
        parts = [(0, _Part(self._num_items, blocks, np.zeros(0, dtype=np.int64), key))]
        for ordinal, salt in self.salts:
            if first < ordinal < first + self._num_items:
                place = ordinal - first
                begin, part = parts[-1]
                parts.append((place, _Part(self._num_items, *part.find_rest(place - begin), (*key, place, salt))))
        return parts


class _Part:
    """Some blocks and some loose items in random order, window by window.

    A piece is a block (its number) or up to BLOCK_ITEMS of the loose items, which are sorted (-1 - their number).
    """

    def __init__(self, num_items: int, blocks: Indices, loose: Indices, key: tuple[int | str, ...]) -> None:
        self._num_items = num_items
        self._loose = loose
        self._key = key
        num_chunks = -(-loose.size // BLOCK_ITEMS)
        pieces = np.concatenate((blocks, -1 - np.arange(num_chunks)))
        pieces = pieces[permute(pieces.size, derive_key(*key))]
        sizes = np.full(pieces.size, BLOCK_ITEMS)
        sizes[pieces == (num_items - 1) // BLOCK_ITEMS] = (num_items - 1) % BLOCK_ITEMS + 1
        if num_chunks:
            sizes[pieces == -num_chunks] = (loose.size - 1) % BLOCK_ITEMS + 1
        self._pieces = pieces.astype(np.int32)  # they last as long as the pass
        self.starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))[::WINDOW_BLOCKS].copy()  # of the windows

    def find_window(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def read_window(self, number: int) -> Indices:
        """Return the items of a window in the order in which they are drawn."""
        pieces = self._pieces[number * WINDOW_BLOCKS : (number + 1) * WINDOW_BLOCKS]
        items = self._read_pieces(pieces.astype(np.int64))
        return items[permute(items.size, derive_key(*self._key, "window", number))]

    def find_rest(self, place: int) -> tuple[Indices, Indices]:
        """Return what the first `place` draws leave: whole blocks, and loose items; both sorted."""
        window = self.find_window(place)
        begun = self.read_window(window)[place - int(self.starts[window]) :]
        pieces = self._pieces[(window + 1) * WINDOW_BLOCKS :].astype(np.int64)
        loose = np.concatenate((begun, self._read_pieces(pieces[pieces < 0])))
        return np.sort(pieces[pieces >= 0]), np.sort(loose)

    def _read_pieces(self, pieces: Indices) -> Indices:
        inside = np.arange(BLOCK_ITEMS)
        blocks = pieces[pieces >= 0][:, None] * BLOCK_ITEMS + inside
        chunks = (-1 - pieces[pieces < 0])[:, None] * BLOCK_ITEMS + inside
        return np.concatenate((blocks[blocks < self._num_items], self._loose[chunks[chunks < self._loose.size]]))
