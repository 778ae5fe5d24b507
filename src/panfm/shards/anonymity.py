"""How alone each patient stands in the metadata: k-anonymity of what somebody else may know about a patient.

    samples.parquet -> collect_profiles -> one profile a group -> compute_anonymity -> Anonymity (counts only)

A group is a patient where patients are known, else a lesion, slide or image. Its profile is what somebody who knows the
patient could look up: for each field the set of values over all its images, unknown being a value of its own. k is the
number of groups with the same profile; k = 1 means that the profile points at one patient (Sweeney, "k-anonymity: a
model for protecting privacy", IJUFKS 10, 2002). Diagnoses are the sensitive values: where all groups of one profile
share them, knowing the profile tells the diagnosis (l = 1; Machanavajjhala et al., "l-diversity", TKDD 1, 2007).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from panfm.errors import UserError
from panfm.shards.index import ShardSet
from panfm.shards.text_scan import OLD_AGE

AGE, VISITS = "age band", "several visits"
QUASI_IDENTIFIERS = (AGE, "sex", "phototype", "anatomic_site", "institution", VISITS)
SMALL = 5  # groups: fewer are shown as "<5"
UNKNOWN = "unknown"

Profile = tuple[frozenset[str], ...]  # one set of values a field


@dataclass(frozen=True)
class Spread:
    """How many groups stand alone, nearly alone, and in company."""

    num_alone: int  # k = 1
    num_few: int  # k < SMALL, those alone among them
    num_groups: int
    least: int  # smallest k

    @property
    def num_many(self) -> int:
        """Groups with k >= SMALL."""
        return self.num_groups - self.num_few


@dataclass(frozen=True)
class FieldSpread:
    """What one field contributes."""

    field: str
    num_values: int  # known values
    share_known: float  # of groups
    alone: Spread  # by this field alone
    without: Spread  # by all other fields
    rare: tuple[str, ...]  # values that fewer than SMALL groups have, in alphabetical order


@dataclass(frozen=True)
class Diversity:
    """How far a profile gives away a label."""

    label: str
    num_labelled: int  # groups with a known label
    num_revealed: int  # labelled groups with k >= 2 whose profile has one single set of labels, with no gaps
    least: int  # smallest number of different label sets in a profile with k >= 2; 0: there is no such profile


@dataclass(frozen=True)
class Anonymity:
    """Counts about groups; never a row."""

    group_kinds: dict[str, int]  # what a group is -> number of groups
    age_band: int  # years
    spread: Spread
    fields: tuple[FieldSpread, ...]
    wider_bands: Spread  # with age bands twice as wide
    diversities: tuple[Diversity, ...]
    num_old: int | None  # groups with an age above OLD_AGE; None: no age is known


def collect_profiles(shard_set: ShardSet, *, age_band: int = 5) -> dict[str, Profile]:
    """The profile of each group by group_id, its fields in the order of QUASI_IDENTIFIERS."""
    if age_band < 1:
        raise UserError(f"age_band ({age_band}) must be at least 1 year; 5 is usual")
    table = shard_set.table
    low, high = table["phototype_low"].to_pylist(), table["phototype_high"].to_pylist()
    columns = {
        AGE: [_band(age, age_band) for age in table["age"].to_pylist()],
        "phototype": [
            None if a is None and b is None else str(a) if a == b else f"{a or '?'}-{b or '?'}"
            for a, b in zip(low, high, strict=True)
        ],
        # Which day is relative to an unknown first visit; that there were several is what somebody may know.
        VISITS: [None if day is None else "yes" if day > 0 else "no" for day in table["visit_day"].to_pylist()],
    }
    columns |= {name: table[name].to_pylist() for name in QUASI_IDENTIFIERS if name not in columns}
    groups = table["group_id"].to_pylist()
    per_field = [_gather(groups, columns[name]) for name in QUASI_IDENTIFIERS]
    visits = QUASI_IDENTIFIERS.index(VISITS)
    for group, values in per_field[visits].items():
        if "yes" in values:
            per_field[visits][group] = frozenset({"yes"})
    return {group: tuple(field[group] for field in per_field) for group in per_field[0]}


def _band(age: float | None, width: int) -> str | None:
    if age is None:
        return None
    start = int(age // width) * width
    return f"{start}-{start + width - 1}"


def _gather(groups: Sequence[str], values: Sequence[str | None]) -> dict[str, frozenset[str]]:
    """The known values of each group; {UNKNOWN} where there is none."""
    found: dict[str, set[str]] = {group: set() for group in groups}
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            found[group].add(value)
    shared: dict[frozenset[str], frozenset[str]] = {}  # equal sets are one object: a group costs a few pointers
    none = frozenset({UNKNOWN})
    return {
        group: shared.setdefault(frozenset(known), frozenset(known)) if known else none
        for group, known in found.items()
    }


def compute_anonymity(shard_set: ShardSet, *, age_band: int = 5) -> Anonymity:
    """Count how alone the groups of a shard set stand; `age_band` is the width of age classes in years."""
    profiles = collect_profiles(shard_set, age_band=age_band)
    table = shard_set.table
    groups = table["group_id"].to_pylist()
    kinds = dict(zip(groups, table["group_kind"].to_pylist(), strict=True))
    ages = table["age"].to_pylist()
    return Anonymity(
        group_kinds=dict(Counter(kinds.values()).most_common()),
        age_band=age_band,
        spread=_spread(list(profiles.values())),
        fields=tuple(_describe_field(profiles, place) for place in range(len(QUASI_IDENTIFIERS))),
        wider_bands=_spread(list(collect_profiles(shard_set, age_band=2 * age_band).values())),
        diversities=_compute_diversities(shard_set, groups, profiles),
        num_old=(
            None
            if table["age"].null_count == len(ages)
            else len({group for group, age in zip(groups, ages, strict=True) if age is not None and age > OLD_AGE})
        ),
    )


def _spread(profiles: Sequence[object]) -> Spread:
    sizes = np.array(list(Counter(profiles).values()))
    return Spread(
        num_alone=int((sizes == 1).sum()),
        num_few=int(sizes[sizes < SMALL].sum()),
        num_groups=int(sizes.sum()),
        least=int(sizes.min()),
    )


def _describe_field(profiles: Mapping[str, Profile], place: int) -> FieldSpread:
    values = [profile[place] for profile in profiles.values()]
    counts = Counter(value for one in values for value in one if value != UNKNOWN)
    return FieldSpread(
        field=QUASI_IDENTIFIERS[place],
        num_values=len(counts),
        share_known=sum(UNKNOWN not in one for one in values) / len(values),
        alone=_spread(values),
        without=_spread([profile[:place] + profile[place + 1 :] for profile in profiles.values()]),
        rare=tuple(sorted(value for value, count in counts.items() if count < SMALL)),
    )


def _compute_diversities(
    shard_set: ShardSet, groups: Sequence[str], profiles: Mapping[str, Profile]
) -> tuple[Diversity, ...]:
    labels = [dict(pairs or ()) for pairs in shard_set.table["labels"].to_pylist()]
    answers = []
    for name in sorted({name for one in labels for name in one}):
        if "#" in name:  # the same label as a code
            continue
        values = _gather(groups, [one.get(name) for one in labels])
        by_profile: dict[Profile, list[frozenset[str]]] = {}
        for group, profile in profiles.items():
            by_profile.setdefault(profile, []).append(values[group])
        shared = [found for found in by_profile.values() if len(found) > 1]
        unknown = frozenset({UNKNOWN})
        answers.append(
            Diversity(
                label=name,
                num_labelled=sum(value != unknown for value in values.values()),
                num_revealed=sum(len(found) for found in shared if len(set(found)) == 1 and found[0] != unknown),
                least=min((len(set(found)) for found in shared), default=0),
            )
        )
    return tuple(answers)
