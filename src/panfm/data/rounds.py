"""Rounds: draws of a few kinds, each kind evenly spread; which kind stands at a place, and the how-manieth of it.

    place  ->  cycle, round  ->  kind, ordinal of the draw among all of its kind

A cycle has a whole number of draws of each kind, the same in every cycle. It is laid out a round of ROUND_DRAWS at a
time, whatever its length; how many draws of a kind come before a round is computed, not counted. Any stretch of draws,
a batch above all, holds the shares to within a draw or two. Only the key decides: no salt does, so that a rollback
changes which samples are drawn and never how many of what.
"""

import numpy as np
from numpy.typing import NDArray

from panfm.data.hashing import Indices, derive_key, hash_numbers

ROUND_DRAWS = 65_536  # laid out in about 15 ms, and 0.8 MB


class Rounds:
    """An endless sequence of draws with counts[k] draws of kind k a cycle; a pure function of (key, place)."""

    def __init__(self, counts: Indices, key: tuple[int | str, ...]) -> None:
        self._counts = counts
        self._key = key
        self._cycle = int(counts.sum())
        self._phases = _draw_fractions(derive_key(*key, "phases"), counts.size)
        self._kinds = np.zeros(0, dtype=np.int32)
        self._ordinals = np.zeros(0, dtype=np.int64)
        self._first = self._stop = 0  # places of the round that is laid out

    def locate(self, places: Indices) -> tuple[Indices, Indices]:
        """Return the kind at each of some ascending places, and the ordinal of that draw among all of its kind."""
        kinds, ordinals = np.empty((2, places.size), dtype=np.int64)
        done = 0
        while done < places.size:
            self._lay_out(int(places[done]))
            end = int(np.searchsorted(places, self._stop))
            here = places[done:end] - self._first
            kinds[done:end], ordinals[done:end] = self._kinds[here], self._ordinals[here]
            done = end
        return kinds, ordinals

    def count(self, place: int) -> Indices:
        """Return how many draws of each kind come before `place`, [num_kinds]."""
        cycle, inside = divmod(place, self._cycle)
        counts = cycle * self._counts + self._count_before(inside - inside % ROUND_DRAWS)
        if inside % ROUND_DRAWS:
            self._lay_out(place)
            counts += np.bincount(self._kinds[: place - self._first], minlength=counts.size)
        return counts

    def _lay_out(self, place: int) -> None:
        if self._first <= place < self._stop:
            return
        cycle, inside = divmod(place, self._cycle)
        start = inside - inside % ROUND_DRAWS
        stop = min(start + ROUND_DRAWS, self._cycle)
        before = self._count_before(start)
        counts = self._count_before(stop) - before
        order = spread(counts, derive_key(*self._key, cycle, start))
        kinds = np.repeat(np.arange(counts.size), counts)[order]
        first = np.cumsum(counts) - counts
        self._kinds = kinds.astype(np.int32)
        self._ordinals = (cycle * self._counts + before - first)[kinds] + order
        self._first, self._stop = cycle * self._cycle + start, cycle * self._cycle + stop

    def _count_before(self, inside: int) -> Indices:
        """Return how many draws of each kind come before place `inside` of a cycle, where a round may begin.

        Draw j of a kind with n falls due at (j + phase) / n. The answer is what is due before the time at which
        `inside` draws are, found by halving: whole numbers that add up, rise from round to round, and end at the
        counts of the cycle, however unequal these are.
        """
        if inside in (0, self._cycle):
            return self._counts * (inside > 0)
        early, late = 0.0, 1.0
        while early < (middle := (early + late) / 2) < late:
            if int(self._count_due(middle).sum()) <= inside:
                early = middle
            else:
                late = middle
        counts = self._count_due(early)
        tied = np.flatnonzero(self._count_due(late) > counts)
        counts[tied[: inside - int(counts.sum())]] += 1
        return counts

    def _count_due(self, time: float) -> Indices:
        return np.clip(np.ceil(self._counts * time - self._phases), 0, self._counts).astype(np.int64)


def spread(counts: Indices, key: int) -> Indices:
    """Order sum(counts) draws so that each kind is evenly spread: draw j of n falls at (j + jitter) / n.

    Draws are numbered kind by kind; those of one kind keep their order, which is what makes passes complete.
    """
    total = int(counts.sum())
    first = np.repeat(np.cumsum(counts) - counts, counts)
    places = (np.arange(total) - first + _draw_fractions(key, total)) / np.repeat(counts, counts)
    order: Indices = np.argsort(places, kind="stable")
    return order


def _draw_fractions(key: int, count: int) -> NDArray[np.float64]:
    """Numbers from 0 to 1, without 1."""
    return (hash_numbers(key, np.arange(count)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
