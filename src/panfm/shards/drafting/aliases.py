"""Ids that look like one patient written several ways: a wrong split of one patient is leakage. Proposed, never made.

    patient ids of the rows (+ sex, birth date, age, name)  ->  propose_aliases  ->  Alias(patient_id, same_as, why)

"P-007", "p7" and "P007" are most likely one person; "1-12" and "11-2" are not. A person reads the list, strikes out
what is wrong, and saves it as patient_aliases.csv; only then does a build see it.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from panfm.shards.drafting.vocabulary import fold

MIN_LONG = 6  # signs from which on one typing error still leaves an id recognisable
MAX_YEARS = 5  # between the visits of one patient with one lesion
MAX_TORN = 0.02  # share of lesions with two patients that can be slips of the pen
MAX_BUCKET = 2000  # patients who share sex and birth date or age; beyond this an age says nothing


@dataclass(frozen=True)
class Alias:
    """A merge that a person may make: `patient_id` is most likely `same_as`. Weak ones need a look at the files."""

    patient_id: str
    same_as: str
    why: str
    weak: bool = False


@dataclass
class Person:
    """What the rows say about one patient id."""

    num_rows: int = 0
    sexes: set[str] = field(default_factory=set)
    births: set[str] = field(default_factory=set)
    ages: set[float] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    lesions: set[str] = field(default_factory=set)  # empty where lesions are numbered patient by patient


def propose_aliases(persons: dict[str, Person]) -> tuple[Alias, ...]:
    """Pair ids that look alike; the spelling with most rows becomes `same_as`.

    Sure: ids that differ only in case, blanks, signs, accents, leading zeros, look-alike letters or the order of names;
    two ids with one name and birth date. Weak: one lesion under two ids of a like sex and age; one typing error between
    long ids of one sex and one birth date or age; a sure pair whose sex or birth date differs.
    """
    reasons: dict[tuple[str, str], tuple[str, bool]] = {}
    for why, normalise in FORMS:
        groups: dict[str, list[str]] = defaultdict(list)
        for one in persons:
            if key := normalise(one):
                groups[key].append(one)
        for members in groups.values():
            cuts = {cut for one in members if len(cut := _cut(one)) > 1}
            for pair in combinations(sorted(members), 2):
                whole, other = sorted((_cut(one) for one in pair), key=len)
                if whole == other or why == LOOKALIKE:
                    reasons.setdefault(pair, (_explain(*pair) or why, False))
                elif len(whole) <= 1 and len(cuts) == 1:  # 112 may be 1-12, unless it may be 11-2 as well
                    reasons.setdefault(pair, (_explain(*pair) or why, True))
    for pair in _find_namesakes(persons):
        reasons.setdefault(pair, ("same name and birth date under two ids", False))
    for pair in _find_sharing(persons):
        reasons.setdefault(pair, ("one lesion under two ids", True))
    for pair in _find_typing_errors(persons):
        reasons.setdefault(pair, ("one sign differs, same sex and birth date or age", True))
    return tuple(_gather(persons, reasons))


# ------------------------------------------------------------------------------------------------ forms of an id


def _plain(text: str) -> str:
    return fold(text).replace(" ", "")


def _without_zeros(text: str) -> str:
    """Runs of letters and of digits, leading zeros off; a sign between two numbers stays, for 1-12 is not 11-2."""
    runs = re.findall(r"[a-z]+|[0-9]+", fold(text))
    shown = ""
    for run in runs:
        if shown and shown[-1].isdigit() and run.isdigit():
            shown += "-"
        shown += run.lstrip("0") or "0" if run.isdigit() else run
    return shown


def _without_lookalikes(text: str) -> str:
    plain = _plain(text)
    if not any(sign.isdigit() for sign in plain) or len(plain) < 4:
        return ""
    return plain.translate(str.maketrans("oil", "011"))


def _sorted_names(text: str) -> str:
    words = fold(text).split()
    return " ".join(sorted(words)) if len(words) > 1 and all(word.isalpha() for word in words) else ""


LOOKALIKE = "differ in signs that look alike (O and 0, l and 1)"
FORMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("differ in case, blanks, signs or accents", _plain),
    ("differ in leading zeros", _without_zeros),
    (LOOKALIKE, _without_lookalikes),
    ("same names in another order", _sorted_names),
)


def _without_accents(text: str) -> str:
    return "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))


def _explain(one: str, other: str) -> str:
    """The least difference between two spellings, in words; empty if it takes more than one of these."""
    steps: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("differ in case", str.casefold),
        ("differ in blanks", lambda text: "".join(text.split())),
        ("differ in accents", _without_accents),
        ("differ in signs", lambda text: re.sub(r"[\W_]", "", text)),
    )
    return next((why for why, change in steps if change(one) == change(other)), "")


def _cut(text: str) -> tuple[str, ...]:
    """The numbers of an id: two ids that are cut at different places, 1-12 and 11-2, are two people."""
    return tuple(run.lstrip("0") for run in re.findall(r"[0-9]+", fold(text)))


# ------------------------------------------------------------------------------------------------ people


def _find_namesakes(persons: dict[str, Person]) -> Iterator[tuple[str, str]]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one, person in persons.items():
        for name in {" ".join(sorted(fold(name).split())) for name in person.names}:
            for birth in person.births:
                if name:
                    groups[(name, birth)].append(one)
    for members in groups.values():
        yield from combinations(sorted(set(members)), 2)


def _find_sharing(persons: dict[str, Person]) -> Iterator[tuple[str, str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for one, person in persons.items():
        for lesion in person.lesions:
            groups[lesion].append(one)
    torn = {lesion: members for lesion, members in groups.items() if len(members) > 1}
    if len(torn) > max(3, MAX_TORN * len(groups)):
        return  # then numbers of lesions meet by chance, and say nothing about patients
    for members in torn.values():
        for one, other in combinations(sorted(members), 2):
            mine, theirs = persons[one], persons[other]
            near = any(abs(age - another) <= MAX_YEARS for age in mine.ages for another in theirs.ages)
            if not _contradict(mine, theirs) and (
                mine.births & theirs.births or near or not mine.ages or not theirs.ages
            ):
                yield one, other


def _find_typing_errors(persons: dict[str, Person]) -> Iterator[tuple[str, str]]:
    """Long ids that differ by one sign, or by two neighbours swapped, among those of one sex and birth date (or age).

    Numbers given in a row differ by one sign too, so for ids with digits an age is not enough.
    """
    buckets: dict[tuple[str, object], list[str]] = defaultdict(list)
    for one, person in persons.items():
        if len(_plain(one)) < MIN_LONG:
            continue
        facts: Iterable[object] = person.births or (() if re.search(r"\d", one) else person.ages)
        for sex in person.sexes:
            for fact in facts:
                buckets[(sex, fact)].append(one)
    for members in buckets.values():
        near: dict[str, list[str]] = defaultdict(list)
        if len(members) > MAX_BUCKET:
            continue
        for one in sorted(set(members)):
            plain = _plain(one)
            for key in {plain, *(plain[:i] + plain[i + 1 :] for i in range(len(plain)))}:
                near[key].append(one)
        for candidates in near.values():
            for pair in combinations(candidates, 2):
                if _is_one_error(_plain(pair[0]), _plain(pair[1])):
                    yield pair


def _is_one_error(one: str, other: str) -> bool:
    """Whether one sign was added, left out, replaced, or swapped with its neighbour."""
    if one == other:
        return False
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    rest, others = one[start:], other[start:]
    swapped = len(rest) > 1 and rest[1::-1] == others[:2] and rest[2:] == others[2:]
    return swapped or rest[1:] == others[1:] or rest[1:] == others or rest == others[1:]


def _gather(persons: dict[str, Person], reasons: dict[tuple[str, str], tuple[str, bool]]) -> Iterator[Alias]:
    """Groups of ids that hang together by pairs; each member is given the commonest spelling of its group."""
    leader = {one: one for pair in reasons for one in pair}

    def find(one: str) -> str:
        while leader[one] != one:
            one = leader[one]
        return one

    for one, other in sorted(reasons):
        leader[find(other)] = find(one)
    groups: dict[str, list[str]] = defaultdict(list)
    for one in sorted(leader):
        groups[find(one)].append(one)
    for _, members in sorted(groups.items()):
        chosen = max(members, key=lambda one: (persons[one].num_rows, len(one), one))
        for one in members:
            if one == chosen:
                continue
            direct = reasons.get((min(one, chosen), max(one, chosen)))
            via = [(pair, reason) for pair, reason in reasons.items() if one in pair]
            why, weak = (
                direct
                if direct
                else (f"{via[0][1][0]}, by way of {_other(via[0][0], one)!r}", any(weak for _, (_, weak) in via))
            )
            differing = _contradict(persons[one], persons[chosen])
            yield Alias(one, chosen, why + (f"; but {differing}" if differing else ""), weak or bool(differing))


def _other(pair: tuple[str, str], one: str) -> str:
    return pair[1] if pair[0] == one else pair[0]


def _contradict(one: Person, other: Person) -> str:
    said: Sequence[tuple[str, set[str], set[str]]] = (
        ("sex", one.sexes, other.sexes),
        ("birth date", one.births, other.births),
    )
    names = [name for name, mine, theirs in said if mine and theirs and not mine & theirs]
    return f"they differ in {' and '.join(names)}" if names else ""
