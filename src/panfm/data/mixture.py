"""Mixture: how often each source is drawn, and which images are drawn together; planned once a run.

    MixtureConfig, SampleTable  ->  MixturePlan: units with their draws a cycle, groups with their slots
    MixturePlan, seed, salts    ->  SampleStream (`stream`)

A unit is one modality of one source. A cycle is a number of draws in which every unit has its exact, whole number:

    natural weights (or alpha 1)   an epoch: each sample once
    all others                     CYCLE_DRAWS: a weight is realised to 1 / 65,536, and no unit gets less than that

Groups are lesions (or patients) with several images. A share of the positions, realised to one slot in 65,536 /
group_size, are slots of `group_size` neighbours that hold images of one group. Modalities take turns in them: a lesion
with c clinical and d dermoscopic images has at least min(c, d) pairs of both in every pass. They come on top: all other
positions are single draws, and pass over each unit as if there were no groups. What groups draw follows from who has
several images, not from the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.data.batch import NO_GROUP
from panfm.data.hashing import Indices
from panfm.data.selection import SampleTable, Section
from panfm.errors import UserError

CYCLE_DRAWS = 65_536  # of weights that are no counts of samples; see above


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
    """One modality of one source: a section of the SampleTable, its asked share, and its draws in every cycle."""

    section: Section
    share: float  # of the single draws
    num_draws: int


@dataclass(frozen=True)
class Groups:
    """Lesions (or patients) with two images or more, and the chunks of `size` images in which they are drawn.

    A group of k images has ceil(k / size) chunks; where k does not divide, some images of it are drawn twice a pass.
    columns: "group_members", sample numbers, group by group; "group_starts" and "group_chunks" [num_groups + 1], the
    first member and the first chunk of each group.
    """

    size: int
    share: float  # of all positions, as asked
    num_chunks: int
    columns: Mapping[str, NDArray[Any]]

    @property
    def members(self) -> Indices:
        """Sample numbers, group by group and ascending inside one."""
        return self.columns["group_members"]

    @property
    def starts(self) -> Indices:
        """First member of each group, and the number of all."""
        return self.columns["group_starts"]

    @property
    def first_chunks(self) -> Indices:
        """First chunk of each group, and the number of all."""
        return self.columns["group_chunks"]


@dataclass(frozen=True)
class MixturePlan:
    """What the stream is made of; the same for every rank and worker of a run."""

    units: tuple[Unit, ...]
    groups: Groups | None

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays of the plan that are as long as the data set."""
        return {} if self.groups is None else dict(self.groups.columns)

    def with_columns(self, columns: Mapping[str, NDArray[Any]]) -> "MixturePlan":
        """Return the same plan over another place of the same arrays."""
        return self if self.groups is None else replace(self, groups=replace(self.groups, columns=columns))


def build_mixture(config: MixtureConfig, table: SampleTable) -> MixturePlan:
    """Turn weights into whole numbers of draws.

    Raises UserError: `weights` that name what is not there, leave out what is, or are all zero; `group_share` where no
    group has two images.
    """
    shares = _compute_shares(config, table.sections)
    sections = [section for section in table.sections if shares[section.name] > 0]
    if _is_natural(config):
        draws = np.array([section.size for section in sections])
    else:
        draws = _apportion(np.array([shares[section.name] for section in sections]), CYCLE_DRAWS)
    units = tuple(
        Unit(section, shares[section.name], int(count)) for section, count in zip(sections, draws, strict=True)
    )
    return MixturePlan(units, _build_groups(config, table, sections) if config.group_share else None)


def _is_natural(config: MixtureConfig) -> bool:
    return config.weighting == "natural" or (config.weighting == "temperature" and config.alpha == 1.0)


def _compute_shares(config: MixtureConfig, sections: tuple[Section, ...]) -> dict[str, float]:
    """Share of the single draws for each section."""
    part = {"source": slice(0, 1), "modality": slice(1, 2), "source_modality": slice(0, 2)}[config.over]
    entry_of = {section.name: "/".join(section.name.rsplit("/", 1)[part]) for section in sections}
    sizes: dict[str, int] = {}
    for section in sections:
        sizes[entry_of[section.name]] = sizes.get(entry_of[section.name], 0) + section.size
    if config.weighting == "explicit":
        weights = _check_weights(config, sizes)
    else:
        alpha = {"natural": 1.0, "uniform": 0.0, "temperature": config.alpha}[config.weighting]
        weights = {entry: size**alpha for entry, size in sizes.items()}
    total = sum(weights.values())
    return {
        section.name: weights[entry_of[section.name]] / total * section.size / sizes[entry_of[section.name]]
        for section in sections
    }


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


def _apportion(shares: NDArray[np.float64], total: int) -> Indices:
    """Split `total` draws by largest remainder, at least one for every share: a small source is never starved."""
    ideal = shares / shares.sum() * total
    counts: Indices = np.maximum(np.floor(ideal).astype(np.int64), 1)
    assert counts.size <= total, f"{counts.size} units do not fit into a cycle of {total} draws"
    remainder = np.argsort(-(ideal - counts), kind="stable")
    missing = total - int(counts.sum())
    if missing >= 0:
        counts[remainder[:missing]] += 1
    while missing < 0:  # the ones given to the smallest are taken from the largest
        counts[int(np.argmax(counts))] -= 1
        missing += 1
    return counts


def _build_groups(config: MixtureConfig, table: SampleTable, sections: list[Section]) -> Groups:
    drawn = np.concatenate([np.arange(section.first, section.first + section.size) for section in sections])
    ids = table.records[config.group_by][drawn]
    drawn, ids = drawn[ids != NO_GROUP], ids[ids != NO_GROUP]
    order = np.lexsort((drawn, ids))
    drawn = drawn[order]
    _, starts, sizes = np.unique(ids[order], return_index=True, return_counts=True)
    several = sizes >= 2
    if not several.any():
        raise UserError(
            f"mixture.group_share ({config.group_share}): no {config.group_by} has two images that may be drawn; set "
            "it to 0, or add a source with several images a group"
        )
    # Groups are numbered by their first sample, so that neighbours in a walk over chunks are neighbours on disk.
    order = np.argsort(np.where(several, drawn[starts], drawn.size + table.records.size), kind="stable")
    order = order[: int(several.sum())]
    starts, sizes = starts[order], sizes[order]
    first_members = np.concatenate(([0], np.cumsum(sizes)))
    places = np.repeat(starts - first_members[:-1], sizes) + np.arange(first_members[-1])
    first_chunks = np.concatenate(([0], np.cumsum(-(-sizes // config.group_size))))
    columns = {"group_members": drawn[places], "group_starts": first_members, "group_chunks": first_chunks}
    return Groups(config.group_size, config.group_share, int(first_chunks[-1]), columns)
