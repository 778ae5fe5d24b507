"""Chance that can be asked for at any place: numbers and permutations that follow from a key and from nothing else.

    names, numbers  ->  derive_key   ->  64 bits  ->  hash_numbers, permute   ->  what the stream draws
    identifiers     ->  hash_texts   ->  63 bits that are the same in every source and on every machine

numpy promises no stream of random numbers across its versions, and a resumed run must not depend on that: splitmix64
(Steele, Lea and Flood 2014) is written out here.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # constants of splitmix64
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> int:
    """Hash numbers and words to 64 bits; the same on every machine and in every version of Python and numpy."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def hash_numbers(key: int, numbers: Indices) -> Hashes:
    """Return number k of splitmix64's sequence from state `key`, for every k = 0, 1, ... of `numbers`."""
    state: Hashes = np.uint64(key) + (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN
    return mix(state)


def mix(state: Hashes) -> Hashes:
    """Return splitmix64's finaliser of every state: each bit of the input changes half of the output's."""
    state = (state ^ (state >> np.uint64(30))) * MIX_1
    state = (state ^ (state >> np.uint64(27))) * MIX_2
    return state ^ (state >> np.uint64(31))


def permute(count: int, key: int) -> Indices:
    """Return the permutation of 0 .. count - 1 that belongs to `key`."""
    order: Indices = np.argsort(hash_numbers(key, np.arange(count)), kind="stable")
    return order


def hash_texts(texts: list[bytes]) -> Indices:
    """Return a 63-bit number for each text (no NUL in it), whatever its neighbours. A million take a fifth of a second.

    Eight bytes at a time, behind each text's end none: what pads it to the length of the longest must not count.
    """
    width = -(-max(map(len, texts), default=1) // 8) * 8 or 8
    words = np.array(texts, dtype=f"S{width}").view("<u8").reshape(len(texts), width // 8)
    state = np.full(len(texts), GOLDEN, dtype=np.uint64)
    for place in range(words.shape[1]):
        state = np.where(words[:, place] != 0, mix(state ^ words[:, place]) + GOLDEN, state)
    return (mix(state) >> np.uint64(1)).astype(np.int64)


def hash_pairs(first: Indices, second: Indices) -> Indices:
    """Return a 63-bit number for each pair of numbers."""
    state = mix(mix(first.astype(np.uint64) + GOLDEN) ^ second.astype(np.uint64))
    return (state >> np.uint64(1)).astype(np.int64)
