"""Mixture: which sample is drawn at position p of the stream; a pure function of (seed, salt, index, mixture, p).

    SampleTable, MixtureConfig  ->  MixturePlan   how many draws a round every unit gets (integers, once a run)
    MixturePlan, seed, salt     ->  SampleStream  positions -> sample numbers, for any positions in any process

Ranks and workers do not occur here, so their number cannot change what is drawn. A unit is one modality of one source.

    stream   |---------- round 0 ----------|---------- round 1 ----------| ...
    round    every unit appears exactly `num_draws` times, evenly spread with a jitter: any stretch of the stream, a
             batch above all, holds the asked shares to within a draw or two
    unit     its k-th draw belongs to pass k // n; a pass draws each of its n samples once before the next pass begins
    pass     blocks of BLOCK_SAMPLES neighbouring samples in random order, WINDOW_BLOCKS shuffled together: reads
             stay near each other on disk, and a unit smaller than a window is shuffled as a whole
    groups   a share of the round are slots of `group_size` neighbouring positions that hold images of one lesion (or
             patient); slots start at multiples of their size, so no border of a rank or a micro batch cuts one
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.data.batch import NO_GROUP
from panfm.data.selection import Indices, SampleTable, derive_key
from panfm.errors import UserError
from panfm.shards.schema import MODALITIES

ROUND_DRAWS = 65_536  # a weight is realised to 1 / 65,536; laying out a round takes about 15 ms
BLOCK_SAMPLES = 32  # neighbours on disk: one read-ahead window of photographs of 50 kB
WINDOW_BLOCKS = 64  # blocks shuffled together: 2,048 samples, several global batches
GROUP_ATTEMPTS = 4  # replacements looked for inside a group before its unit is asked
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # constants of splitmix64 (Steele, Lea and Flood 2014)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@config_class
class MixtureConfig:
    """How often each source is drawn."""

    weighting: Literal["natural", "uniform", "temperature", "explicit"] = "natural"
    """natural: by number of samples. uniform: equal. temperature: number ** alpha. explicit: `weights`."""
    over: Literal["source", "modality", "source_modality"] = "source"
    """What is weighted: sources, modalities, or each source's modalities; inside one, samples count equally."""
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Exponent of `temperature`: 1 is natural, 0 is uniform."""
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """For `explicit`: name ("ham10000", "dermoscopic" or "ham10000/dermoscopic") -> weight; they need not sum to 1."""
    group_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Share of positions that draw several images of one group side by side; at most half, so that singles lead."""
    group_by: Literal["lesion", "patient"] = "lesion"
    """What a group is."""
    group_size: Annotated[int, Field(ge=2, le=8)] = 2
    """Images of one group that stand side by side; must divide micro_batch_size, so that no rank border cuts them."""


@dataclass(frozen=True)
class Unit:
    """One modality of one source: its samples (numbers in the SampleTable) and its draws in every round."""

    name: str
    samples: Indices
    num_draws: int


@dataclass(frozen=True)
class Groups:
    """Lesions (or patients) with two images or more, and the chunks of `size` images in which they are drawn.

    A group of k images has ceil(k / size) chunks; the last one is filled up from the group's first images.
    """

    size: int
    members: tuple[Indices, ...]  # sample numbers of each group
    chunk_group: Indices  # [num_chunks] number of the group
    chunk_number: Indices  # [num_chunks] number of the chunk inside its group
    num_slots: int  # in every round


@dataclass(frozen=True)
class MixturePlan:
    """How a round is made up; the same for every round, rank and worker of a run."""

    units: tuple[Unit, ...]
    unit_of_sample: NDArray[np.int32]
    groups: Groups | None
    round_draws: int  # positions of a round


def build_mixture(config: MixtureConfig, table: SampleTable) -> MixturePlan:
    """Turn weights into integer draws a round.

    Raises UserError: `weights` that name what is not there, leave out what is, or are all zero; `group_share` where no
    group has two images.
    """
    members = _find_units(table)
    shares = _compute_shares(config, members)
    members = {name: members[name] for name in shares}
    num_samples = sum(samples.size for samples in members.values())
    # A round of whole epochs makes natural weights exact wherever an epoch fits.
    round_draws = num_samples * max(1, ROUND_DRAWS // num_samples) if num_samples <= ROUND_DRAWS else ROUND_DRAWS
    groups = None
    if config.group_share:
        num_slots = max(round_draws // config.group_size, 2)
        num_group_slots = max(1, round(config.group_share * num_slots))
        groups = _build_groups(config, table, np.concatenate(list(members.values())), num_group_slots)
        round_draws = num_slots * config.group_size
    num_singles = round_draws - (groups.num_slots * groups.size if groups else 0)
    draws = _apportion(np.array(list(shares.values())), num_singles)
    units = tuple(
        Unit(name, samples, int(count)) for (name, samples), count in zip(members.items(), draws, strict=True)
    )
    unit_of_sample = np.full(table.row.size, -1, dtype=np.int32)
    for number, unit in enumerate(units):
        unit_of_sample[unit.samples] = number
    return MixturePlan(units, unit_of_sample, groups, round_draws)


class SampleStream:
    """The endless stream of one run: `compute_samples(positions)`. Caches only what it can compute again."""

    def __init__(self, plan: MixturePlan, seed: int, salt: int) -> None:
        self.plan = plan
        self._key = (seed, salt)
        self._walks = [_Walk(unit.samples.size, (seed, salt, "unit", unit.name)) for unit in plan.units]
        self._group_walk = _Walk(plan.groups.chunk_group.size, (seed, salt, "groups")) if plan.groups else None
        self._round = -1
        self._unit_of = np.zeros(0, dtype=np.int32)
        self._ordinal_of = np.zeros(0, dtype=np.int64)

    def compute_samples(self, positions: range) -> Indices:
        """Return the number in the SampleTable of the sample at each position, [len(positions)]."""
        return np.array([self._draw(position) for position in positions], dtype=np.int64)

    def compute_replacement(self, position: int, attempt: int) -> int:
        """Return the sample that stands in when `attempt` (0, 1, ...) others failed at `position`.

        It comes from the same group where the position belongs to one (so that a pair stays a pair), else from the
        same unit.
        """
        unit, ordinal = self._locate(position)
        if unit >= 0:
            candidates = self.plan.units[unit].samples
        else:
            candidates = self._find_members(ordinal)[0]
            if attempt >= GROUP_ATTEMPTS:
                candidates = self.plan.units[self.plan.unit_of_sample[candidates[0]]].samples
        return int(candidates[derive_key(*self._key, "replacement", position, attempt) % candidates.size])

    def _draw(self, position: int) -> int:
        unit, ordinal = self._locate(position)
        if unit >= 0:
            return int(self.plan.units[unit].samples[self._walks[unit].get(ordinal)])
        members, number, pass_number = self._find_members(ordinal)
        order = permute(members.size, derive_key(*self._key, "members", int(members[0]), pass_number))
        assert self.plan.groups is not None
        size = self.plan.groups.size
        return int(members[order[(number * size + position % size) % members.size]])

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the unit drawn at `position` (-1: a group) and the ordinal of that draw in the whole stream."""
        round_number, place = divmod(position, self.plan.round_draws)
        if round_number != self._round:
            self._lay_out_round(round_number)
        return int(self._unit_of[place]), int(self._ordinal_of[place])

    def _find_members(self, ordinal: int) -> tuple[Indices, int, int]:
        """Return the group of the `ordinal`-th group draw, the number of the chunk in it, and the pass."""
        groups = self.plan.groups
        assert groups is not None and self._group_walk is not None
        chunk = self._group_walk.get(ordinal)
        pass_number = ordinal // groups.chunk_group.size
        return groups.members[groups.chunk_group[chunk]], int(groups.chunk_number[chunk]), pass_number

    def _lay_out_round(self, number: int) -> None:
        counts = np.array([unit.num_draws for unit in self.plan.units])
        order = _spread(counts, derive_key(*self._key, "round", number))
        starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        units = np.repeat(np.arange(counts.size, dtype=np.int32), counts)[order]
        ordinals = (order - starts[units]) + number * counts[units]
        groups = self.plan.groups
        if groups is not None:
            num_singles = units.size // groups.size  # slots of single draws
            slots = _spread(np.array([num_singles, groups.num_slots]), derive_key(*self._key, "slots", number))
            single = slots < num_singles  # [num_slots]
            all_units = np.full((slots.size, groups.size), -1, dtype=np.int32)
            all_units[single] = units.reshape(-1, groups.size)
            all_ordinals = np.repeat((slots - num_singles + number * groups.num_slots)[:, None], groups.size, axis=1)
            all_ordinals[single] = ordinals.reshape(-1, groups.size)
            units, ordinals = all_units.reshape(-1), all_ordinals.reshape(-1)
        self._unit_of, self._ordinal_of, self._round = units, ordinals, number


class _Walk:
    """The passes over n items: ordinal -> item, each item once a pass, windows of whole blocks shuffled together."""

    def __init__(self, num_items: int, key: tuple[int | str, ...]) -> None:
        self._num_items = num_items
        self._key = key
        self._pass = -1
        self._blocks = self._starts = self._window = np.zeros(0, dtype=np.int64)
        self._first = self._stop = 0  # places of the pass that `_window` holds

    def get(self, ordinal: int) -> int:
        pass_number, place = divmod(ordinal, self._num_items)
        if pass_number != self._pass:
            self._open_pass(pass_number)
        if not self._first <= place < self._stop:
            self._open_window(bisect_right(self._starts, place) - 1)
        return int(self._window[place - self._first])

    def _open_pass(self, number: int) -> None:
        num_blocks = -(-self._num_items // BLOCK_SAMPLES)
        self._blocks = permute(num_blocks, derive_key(*self._key, number))
        sizes = np.full(num_blocks, BLOCK_SAMPLES)
        sizes[self._blocks == num_blocks - 1] = self._num_items - (num_blocks - 1) * BLOCK_SAMPLES
        self._starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))[::WINDOW_BLOCKS]
        self._pass, self._first, self._stop = number, 0, 0

    def _open_window(self, number: int) -> None:
        blocks = self._blocks[number * WINDOW_BLOCKS : (number + 1) * WINDOW_BLOCKS]
        items = (blocks[:, None] * BLOCK_SAMPLES + np.arange(BLOCK_SAMPLES)).reshape(-1)
        items = items[items < self._num_items]
        self._window = items[permute(items.size, derive_key(*self._key, self._pass, "window", number))]
        self._first = int(self._starts[number])
        self._stop = self._first + items.size


def hash_numbers(key: int, count: int) -> NDArray[np.uint64]:
    """Return splitmix64's first `count` numbers from state `key`.

    Written out because numpy promises no stream of random numbers across its versions, and a resumed run must
    not depend on that.
    """
    state = np.uint64(key) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * GOLDEN
    state = (state ^ (state >> np.uint64(30))) * MIX_1
    state = (state ^ (state >> np.uint64(27))) * MIX_2
    return state ^ (state >> np.uint64(31))


def permute(count: int, key: int) -> Indices:
    """Return the permutation of 0 .. count - 1 that belongs to `key`."""
    order: Indices = np.argsort(hash_numbers(key, count), kind="stable")
    return order


def _spread(counts: Indices, key: int) -> Indices:
    """Order sum(counts) draws so that each kind is evenly spread: draw k of n falls at (k + jitter) / n.

    Draws are numbered kind by kind; those of one kind keep their order, which is what makes passes complete.
    """
    total = int(counts.sum())
    first = np.repeat(np.concatenate(([0], np.cumsum(counts)[:-1])), counts)
    jitter = (hash_numbers(key, total) >> np.uint64(11)) * 2.0**-53
    order: Indices = np.argsort((np.arange(total) - first + jitter) / np.repeat(counts, counts), kind="stable")
    return order


def _apportion(shares: NDArray[np.float64], total: int) -> Indices:
    """Split `total` draws by largest remainder, at least one for every share: a small source is never starved."""
    ideal = shares / shares.sum() * total
    counts: Indices = np.maximum(np.floor(ideal).astype(np.int64), 1)
    assert counts.size <= total, f"{counts.size} units do not fit into a round of {total} draws"
    remainder = np.argsort(-(ideal - counts), kind="stable")
    missing = total - int(counts.sum())
    if missing >= 0:
        counts[remainder[:missing]] += 1
    while missing < 0:  # the ones given to the smallest are taken from the largest
        counts[int(np.argmax(counts))] -= 1
        missing += 1
    return counts


def _find_units(table: SampleTable) -> dict[str, Indices]:
    """Sample numbers by unit name "source/modality", sorted by name: the order of the config does not matter."""
    code = table.source.astype(np.int64) * len(MODALITIES) + table.modality
    units = {}
    for value in np.unique(code).tolist():
        source, modality = divmod(value, len(MODALITIES))
        units[f"{table.sources[source]}/{MODALITIES[modality]}"] = np.flatnonzero(code == value)
    return dict(sorted(units.items()))


def _compute_shares(config: MixtureConfig, units: dict[str, Indices]) -> dict[str, float]:
    """Share of the draws for each unit; units of weight 0 are left out."""
    part = {"source": slice(0, 1), "modality": slice(1, 2), "source_modality": slice(0, 2)}[config.over]
    entry_of = {name: "/".join(name.rsplit("/", 1)[part]) for name in units}
    sizes: dict[str, int] = {}
    for name, samples in units.items():
        sizes[entry_of[name]] = sizes.get(entry_of[name], 0) + samples.size
    if config.weighting == "explicit":
        weights = _check_weights(config, sizes)
    else:
        alpha = {"natural": 1.0, "uniform": 0.0, "temperature": config.alpha}[config.weighting]
        weights = {entry: size**alpha for entry, size in sizes.items()}
    total = sum(weights.values())
    shares = {name: weights[entry_of[name]] / total * units[name].size / sizes[entry_of[name]] for name in units}
    return {name: share for name, share in shares.items() if share > 0}


def _check_weights(config: MixtureConfig, sizes: dict[str, int]) -> dict[str, float]:
    known = ", ".join(sorted(sizes))
    for entry in config.weights:
        if entry not in sizes:
            raise UserError(f"mixture.weights: {entry} has no samples to draw; over={config.over} knows {known}")
    for entry in sizes:
        if entry not in config.weights:
            raise UserError(f"mixture.weights: {entry} has no weight; name each of {known} (0 leaves one out)")
    if not any(config.weights.values()):
        raise UserError(f"mixture.weights: all are 0, so nothing can be drawn; give one of {known} a weight above 0")
    return dict(config.weights)


def _build_groups(config: MixtureConfig, table: SampleTable, drawn: Indices, num_slots: int) -> Groups:
    drawn = np.sort(drawn)
    ids = (table.lesion if config.group_by == "lesion" else table.patient)[drawn]
    drawn, ids = drawn[ids != NO_GROUP], ids[ids != NO_GROUP]
    order = np.argsort(ids, kind="stable")
    _, starts = np.unique(ids[order], return_index=True)
    members = tuple(group for group in np.split(drawn[order], starts[1:]) if group.size >= 2)
    if not members:
        raise UserError(
            f"mixture.group_share ({config.group_share}): no {config.group_by} has two images that may be drawn; set "
            "it to 0, or add a source with several images a group"
        )
    num_chunks = np.array([-(-group.size // config.group_size) for group in members])
    first = np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
    chunk_group = np.repeat(np.arange(len(members)), num_chunks)
    return Groups(config.group_size, members, chunk_group, np.arange(chunk_group.size) - first, num_slots)
