"""Stream: which sample is drawn at position p; a pure function of (seed, salts, index, mixture, p).

    position  ->  slot: single or group (Rounds)  ->  single: unit and ordinal (Rounds)  ->  sample (Walk)
                                                  ->  group: chunk (Walk)                ->  its images

Ranks and workers do not occur here, so their number cannot change what is drawn. The LAYOUT (which unit or group slot
stands where) follows from the seed alone. A salt rules from a position on: it decides which samples fill the rest of
each pass. So every position is drawn once and every pass is complete after a rollback too.
"""

from collections.abc import Mapping

import numpy as np

from panfm.data.hashing import Indices, derive_key, hash_numbers
from panfm.data.mixture import Groups, MixturePlan
from panfm.data.rounds import ROUND_DRAWS, Rounds
from panfm.data.walk import Salts, Walk, find_salt
from panfm.shards.schema import MODALITIES

GROUP_ATTEMPTS = 4  # replacements looked for inside a group before its unit is asked


class SampleStream:
    """The endless stream of one run: `compute_samples(positions)`. Caches only what it can compute again."""

    def __init__(self, plan: MixturePlan, seed: int, salts: Salts) -> None:
        self.plan = plan
        self._seed = seed
        self._salts = salts
        self._firsts = np.array([unit.section.first for unit in plan.units])
        self._modalities = np.array([MODALITIES.index(unit.section.modality) for unit in plan.units])
        self._units = Rounds(np.array([unit.num_draws for unit in plan.units]), (seed, "units"))
        self._slots: Rounds | None = None
        if plan.groups is not None:
            num_slots = ROUND_DRAWS // plan.groups.size
            num_groups = max(1, round(plan.groups.share * num_slots))
            self._slots = Rounds(np.array([num_slots - num_groups, num_groups]), (seed, "slots"))
        # A salt rules a unit's walk from the ordinal at which the layout stands where the salt begins.
        begun = [(*self.count_draws(position), salt) for position, salt in salts]
        self._walks = [
            Walk(
                unit.section.size,
                (seed, "unit", unit.section.name),
                [(int(singles[number]), salt) for singles, _, salt in begun],
            )
            for number, unit in enumerate(plan.units)
        ]
        if plan.groups is not None:
            chunk_salts = [(chunks, salt) for _, chunks, salt in begun]
            self._chunks = Walk(plan.groups.num_chunks, (seed, "groups"), chunk_salts)

    def compute_samples(self, positions: range) -> Indices:
        """Return the number in the SampleTable of the sample at each position, [len(positions)]."""
        units, ordinals = self._locate(positions)
        samples = np.empty(units.size, dtype=np.int64)
        for unit in np.unique(units).tolist():
            chosen = np.flatnonzero(units == unit)
            if unit >= 0:
                samples[chosen] = self._firsts[unit] + self._walks[unit].get(ordinals[chosen])
            else:
                insides = (positions.start + chosen) % self._get_groups().size
                samples[chosen] = self._compute_group_samples(insides, ordinals[chosen])
        return samples

    def compute_replacement(self, position: int, attempt: int) -> int:
        """Return the sample that stands in when `attempt` (0, 1, ...) others failed at `position`.

        It comes from the same group where the position belongs to one (so that a pair stays a pair), else from the
        same unit.
        """
        units, ordinals = self._locate(range(position, position + 1))
        salt = find_salt(self._salts, position)
        number = derive_key(self._seed, salt, "replacement", position, attempt)
        unit = int(units[0])
        if unit < 0:
            groups = self._get_groups()
            group = int(_find(groups.first_chunks, self._chunks.get(ordinals))[0])
            members = groups.members[groups.starts[group] : groups.starts[group + 1]]
            if attempt < GROUP_ATTEMPTS:
                return int(members[number % members.size])
            unit = int(_find(self._firsts, members[:1])[0])
        section = self.plan.units[unit].section
        return section.first + number % section.size

    def count_draws(self, position: int) -> tuple[Indices, int]:
        """Return the single draws of each unit, [num_units], and the chunks of groups, that come before `position`.

        `position` lies at the border of a slot, as every micro batch does.
        """
        if self._slots is None:
            return self._units.count(position), 0
        size = self._get_groups().size
        assert position % size == 0, f"position {position} lies inside a slot of {size}"
        num_singles, num_groups = self._slots.count(position // size).tolist()
        return self._units.count(num_singles * size), num_groups

    def count_group_images(self, first: int, stop: int) -> Indices:
        """Return how many images of each unit the chunks that are drawn first, ... stop - 1 -th hold, [num_units]."""
        groups = self._get_groups()
        counts = np.zeros(len(self.plan.units), dtype=np.int64)
        while first < stop:
            number, place = divmod(first, groups.num_chunks)
            num_passes = (stop - first) // groups.num_chunks
            if place == 0 and num_passes > 0:  # whole passes are computed, however many they are
                counts += self._count_passes(number + num_passes) - self._count_passes(number)
                first += num_passes * groups.num_chunks
                continue
            end = min(stop, (number + 1) * groups.num_chunks)
            for start in range(first, end, ROUND_DRAWS):
                ordinals = np.arange(start, min(start + ROUND_DRAWS, end))
                insides = np.tile(np.arange(groups.size), ordinals.size)
                samples = self._compute_group_samples(insides, np.repeat(ordinals, groups.size))
                counts += np.bincount(_find(self._firsts, samples), minlength=counts.size)
            first = end
        return counts

    def _locate(self, positions: range) -> tuple[Indices, Indices]:
        """Return the unit drawn at each position (-1: a group) and the ordinal of that draw in the whole stream."""
        places = np.arange(positions.start, positions.stop)
        if self._slots is None:
            return self._units.locate(places)
        slots, inside = np.divmod(places, self._get_groups().size)
        kinds, ordinals = self._slots.locate(slots)
        units = np.full(places.size, -1)
        single = np.flatnonzero(kinds == 0)
        units[single], ordinals[single] = self._units.locate(
            ordinals[single] * self._get_groups().size + inside[single]
        )
        return units, ordinals

    def _compute_group_samples(self, insides: Indices, ordinals: Indices) -> Indices:
        """Return image `insides[i]` of the chunk that is drawn `ordinals[i]`-th, for every i."""
        groups = self._get_groups()
        chunks = self._chunks.get(ordinals)
        numbers, passes = _find(groups.first_chunks, chunks), ordinals // groups.num_chunks
        places = (chunks - groups.first_chunks[numbers]) * groups.size + insides
        places %= groups.starts[numbers + 1] - groups.starts[numbers]
        samples = np.empty(ordinals.size, dtype=np.int64)
        for number in np.unique(passes).tolist():
            chosen = np.flatnonzero(passes == number)
            drawn, which = np.unique(numbers[chosen], return_inverse=True)
            members, firsts = self._order_groups(drawn, number)
            samples[chosen] = members[firsts[which] + places[chosen]]
        return samples

    def _order_groups(self, numbers: Indices, pass_number: int) -> tuple[Indices, Indices]:
        """Return the images of some groups in the order of a pass, and the place of each group's first.

        Modalities take turns, so that a chunk holds several where the group has them. Where the last chunk is not full,
        it is filled up from the front of the order. The images that stand there take turns from pass to pass, so that
        none is repeated more often than another.
        """
        groups = self._get_groups()
        starts = groups.starts[numbers]
        sizes = groups.starts[numbers + 1] - starts
        firsts = np.cumsum(sizes) - sizes
        group = np.repeat(np.arange(numbers.size), sizes)
        place = np.arange(group.size) - firsts[group]  # in the group
        members = groups.members[starts[group] + place]
        # The salt at the start of the pass: chunks of one pass fit together only in one order.
        salt = find_salt(self._chunks.salts, pass_number * groups.num_chunks)
        chance = hash_numbers(derive_key(self._seed, salt, "members", pass_number), starts[group] + place)
        kind = group * len(MODALITIES) + self._modalities[_find(self._firsts, members)]
        repeated = _count_repeated(sizes, groups.size)
        behind = (place - (pass_number * repeated)[group]) % sizes[group] >= repeated[group]
        by_kind = np.lexsort((chance, behind, kind))
        turn = np.empty_like(group)  # 0 for one image of each modality, 1 for the next, ...
        turn[by_kind] = np.arange(group.size) - np.searchsorted(kind[by_kind], kind[by_kind])
        return members[np.lexsort((chance, turn, behind, group))], firsts

    def _count_passes(self, number: int) -> Indices:
        """Return how many images of each unit the first `number` passes over all chunks hold, [num_units]."""
        groups = self._get_groups()
        sizes = np.diff(groups.starts)
        repeated = _count_repeated(sizes, groups.size)
        fillers = -sizes % groups.size // sizes  # of every image, where a group is smaller than half a chunk
        rest, member = number * repeated, np.arange(groups.members.size) - np.repeat(groups.starts[:-1], sizes)
        images = np.repeat(number * (1 + fillers) + rest // sizes, sizes) + (member < np.repeat(rest % sizes, sizes))
        units = _find(self._firsts, groups.members)
        return np.bincount(units, weights=images, minlength=len(self.plan.units)).astype(np.int64)

    def _get_groups(self) -> Groups:
        assert self.plan.groups is not None
        return self.plan.groups


class DrawCounter:
    """How many images of each unit were drawn before a position: computed, not communicated between ranks."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream
        self._num_chunks = 0  # of groups, that `_images` holds
        self._images = np.zeros(len(stream.plan.units), dtype=np.int64)

    def count(self, position: int) -> Mapping[str, int]:
        """Return unit name -> images; asked for ascending positions, it counts on from the last one."""
        singles, num_chunks = self._stream.count_draws(position)
        if num_chunks:
            self._images += self._stream.count_group_images(self._num_chunks, num_chunks)
            self._num_chunks = num_chunks
        names = [unit.section.name for unit in self._stream.plan.units]
        return dict(zip(names, (singles + self._images).tolist(), strict=True))


def _find(firsts: Indices, numbers: Indices) -> Indices:
    """Return for each number the last of `firsts` (ascending) that is not above it."""
    return np.searchsorted(firsts, numbers, side="right") - 1


def _count_repeated(sizes: Indices, chunk_size: int) -> Indices:
    """Return how many images of each group are drawn once more than its others in a pass."""
    return -sizes % chunk_size % sizes
