"""mixture: shares as asked, in the whole and in every batch; faults said; groups found; what was drawn counted."""

from collections import Counter

import numpy as np
import pytest

from panfm.config import validate
from panfm.data import mixture as mixture_module
from panfm.data import rounds as rounds_module
from panfm.data.batch import NO_GROUP
from panfm.data.hashing import hash_numbers, hash_texts, permute
from panfm.data.mixture import MixtureConfig, build_mixture
from panfm.data.rounds import Rounds
from panfm.data.selection import SampleTable
from panfm.data.stream import DrawCounter, SampleStream
from panfm.errors import UserError
from tests.data.tables import find_units, make_table

SEED, CYCLE = 11, 4096


@pytest.fixture(autouse=True)
def short_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cycles and rounds of 4,096 draws instead of 65,536: the same code in a sixteenth of the time."""
    monkeypatch.setattr(mixture_module, "CYCLE_DRAWS", CYCLE)
    monkeypatch.setattr(rounds_module, "ROUND_DRAWS", CYCLE)


def draw(config: MixtureConfig, table: SampleTable, positions: range, seed: int = SEED, salt: int = 0) -> np.ndarray:
    return SampleStream(build_mixture(config, table), seed, [(0, salt)]).compute_samples(positions)


def test_natural_weights_draw_every_sample_once_an_epoch() -> None:
    table = make_table(("a", "clinical", 700), ("b", "dermoscopic", 290), ("c", "histopathology", 10))
    for config in (MixtureConfig(), MixtureConfig(weighting="temperature", alpha=1.0)):
        samples = draw(config, table, range(8000))
        assert (np.sort(samples.reshape(8, 1000)) == np.arange(1000)).all()  # each of eight epochs, not only all


def test_natural_epochs_longer_than_a_round_are_exact_too() -> None:
    # 1 in 30,000 draws falls into every seventh round only: a share rounded to whole draws a round starves or repeats
    table = make_table(("huge", "clinical", 29_000), ("small", "clinical", 999), ("tiny", "dermoscopic", 1))
    samples = draw(MixtureConfig(), table, range(60_000))
    assert (np.sort(samples.reshape(2, 30_000)) == np.arange(30_000)).all()
    small = find_units(table, samples).reshape(-1, 3000) == 1
    assert abs(small.sum(axis=1) - 99.9).max() <= 2  # evenly spread, over the borders of rounds too


@pytest.mark.parametrize("over", ["source", "modality", "source_modality"])
@pytest.mark.parametrize("weighting", ["natural", "uniform", "temperature", "explicit"])
def test_realised_shares_are_the_asked_ones(weighting: str, over: str) -> None:
    table = make_table(("a", "clinical", 900), ("a", "dermoscopic", 300), ("b", "dermoscopic", 100))
    sizes = {
        "source": {"a": 1200, "b": 100},
        "modality": {"clinical": 900, "dermoscopic": 400},
        "source_modality": {"a/clinical": 900, "a/dermoscopic": 300, "b/dermoscopic": 100},
    }[over]
    weights = {name: number + 1.0 for number, name in enumerate(sizes)} if weighting == "explicit" else {}
    config = MixtureConfig(weighting=weighting, over=over, alpha=0.5, weights=weights)
    num_draws = 1300 if weighting == "natural" else CYCLE
    samples = draw(config, table, range(num_draws))
    asked = {
        "natural": dict(sizes),
        "uniform": dict.fromkeys(sizes, 1),
        "temperature": {name: size**0.5 for name, size in sizes.items()},
        "explicit": weights,
    }[weighting]
    total = sum(asked.values())
    names = [table.sections[unit].name for unit in find_units(table, samples)]
    part = {"source": slice(0, 1), "modality": slice(1, 2), "source_modality": slice(0, 2)}[over]
    realised = Counter("/".join(name.split("/")[part]) for name in names)
    for name, weight in asked.items():
        assert realised[name] == pytest.approx(num_draws * weight / total, abs=1), name
    # every batch holds them too, not only the whole
    for start in range(0, num_draws - 256, 256):
        batch = Counter("/".join(name.split("/")[part]) for name in names[start : start + 256])
        for name, weight in asked.items():
            assert abs(batch[name] - 256 * weight / total) <= 4, name
    plan = build_mixture(config, table)
    assert sum(unit.share for unit in plan.units) == pytest.approx(1.0)
    counts = Counter(names)
    for unit in plan.units:
        assert counts[unit.section.name] == pytest.approx(num_draws * unit.share, abs=1)


def test_a_tiny_source_is_not_starved() -> None:
    table = make_table(("huge", "clinical", 30_000), ("tiny", "clinical", 3))
    samples = draw(MixtureConfig(weighting="temperature", alpha=0.9), table, range(CYCLE))
    assert np.count_nonzero(find_units(table, samples) == 1) == 1
    weights = {"huge": 1.0, "tiny": 1e-9}
    samples = draw(MixtureConfig(weighting="explicit", weights=weights), table, range(3 * CYCLE))
    assert np.bincount(samples)[30_000:].tolist() == [1, 1, 1]


def test_the_order_of_sources_does_not_matter() -> None:
    table = make_table(("a", "clinical", 500), ("b", "dermoscopic", 50))
    swapped = make_table(("b", "dermoscopic", 50), ("a", "clinical", 500))
    samples, others = draw(MixtureConfig(), table, range(300)), draw(MixtureConfig(), swapped, range(300))
    np.testing.assert_array_equal(samples, others)
    assert swapped.sources == ("b", "a") and swapped.records["source"][others[0]] != table.records["source"][samples[0]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weighting": "explicit", "weights": {"a": 1, "b": 1, "c": 1}}, "c has no samples.*knows a, b"),
        ({"weighting": "explicit", "weights": {"a": 1}}, "b has no weight"),
        ({"weighting": "explicit", "weights": {"a": 0, "b": 0}}, "all are 0"),
        ({"group_share": 0.1}, "no lesion has two images"),
    ],
)
def test_faults_are_said(config: dict, message: str) -> None:
    table = make_table(("a", "clinical", 5), ("b", "dermoscopic", 5))
    with pytest.raises(UserError, match=message):
        build_mixture(validate(MixtureConfig, config, where="test"), table)


def test_weight_zero_leaves_a_source_out_of_groups_too() -> None:
    table = make_table(("a", "clinical", 5), ("b", "dermoscopic", 6), ("c", "clinical", 6), lesion_size=2)
    config = MixtureConfig(weighting="explicit", weights={"a": 2, "b": 0, "c": 2}, group_share=0.4)
    samples = draw(config, table, range(2000))
    assert set(find_units(table, samples).tolist()) == {0, 2}


def test_groups_cross_sources_and_leave_lonely_images_out() -> None:
    table = make_table(("a", "clinical", 4), ("b", "histopathology", 4))
    table.records["lesion"] = [1, 2, 3, NO_GROUP, 1, NO_GROUP, 2, 7]
    table.records["patient"] = [5, 5, 5, NO_GROUP, 6, 6, 6, NO_GROUP]
    for group_by, members, starts in (("lesion", [0, 4, 1, 6], [0, 2, 4]), ("patient", [0, 1, 2, 4, 5, 6], [0, 3, 6])):
        groups = build_mixture(MixtureConfig(group_share=0.5, group_by=group_by), table).groups
        assert groups is not None
        assert groups.members.tolist() == members and groups.starts.tolist() == starts


@pytest.mark.parametrize(
    "config",
    [
        MixtureConfig(),
        MixtureConfig(weighting="uniform", group_share=0.3, group_size=4),
        MixtureConfig(weighting="temperature", group_share=0.5, group_size=3),
    ],
    ids=lambda config: config.weighting,
)
def test_what_was_drawn_is_counted_from_the_layout(config: MixtureConfig) -> None:
    table = make_table(("a", "clinical", 90), ("a", "dermoscopic", 160), ("b", "clinical", 1))
    table.records["lesion"] = np.random.default_rng(0).integers(0, 70, 251)
    stream = SampleStream(build_mixture(config, table), SEED, [(0, 0), (1200, 1)])
    units = find_units(table, stream.compute_samples(range(20_400)))
    going_on = DrawCounter(stream)
    for position in (0, 12, 240, 252, 5_400, 20_400):
        expected = np.bincount(units[:position], minlength=3).tolist()
        names = ["a/clinical", "a/dermoscopic", "b/clinical"]
        assert going_on.count(position) == dict(zip(names, expected, strict=True))
        assert DrawCounter(stream).count(position) == going_on.count(position)  # after a resume


def test_rounds_count_what_they_lay_out_wherever_they_are_asked() -> None:
    counts = np.array([1, 9_000, 70, 3, 2_999])  # a cycle of two rounds and a half
    rounds = Rounds(counts, ("test", 0))
    kinds, ordinals = rounds.locate(np.arange(50_000))
    for kind in range(5):
        np.testing.assert_array_equal(ordinals[kinds == kind], np.arange(np.count_nonzero(kinds == kind)))
    for place in (0, 1, 4095, 4096, 10_000, 12_073, 12_074, 36_222, 49_999):
        assert Rounds(counts, ("test", 0)).count(place).tolist() == np.bincount(kinds[:place], minlength=5).tolist()
        assert Rounds(counts, ("test", 0)).locate(np.array([place]))[0][0] == kinds[place]
    assert (np.diff(kinds.reshape(-1, 100) == 1).sum(axis=1) > 0).all()  # mixed, not one after the other


def test_rounds_are_whole_where_kinds_fall_due_at_one_time() -> None:
    rounds = Rounds(np.array([3000, 3000, 3000]), ("test", 0))  # a cycle of two rounds and a bit
    rounds._phases[:] = 0.5  # chance makes them equal once in 2 ** 53
    kinds, ordinals = rounds.locate(np.arange(18_000))
    for kind in range(3):
        np.testing.assert_array_equal(ordinals[kinds == kind], np.arange(6000))


def test_hashes_stay_what_they_are() -> None:
    # Published splitmix64 output for state 0 and 1234567: a resumed run must see the stream it was started with.
    first = np.arange(2)
    assert [int(number) for number in hash_numbers(0, first)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert int(hash_numbers(1234567, first)[0]) == 6457827717110365317
    assert sorted(permute(1000, 3).tolist()) == list(range(1000))
    texts = [b"", b"l5ee8cd2bb06f4c36", b"l5ee8cd2bb06f4c37", b"l5ee8cd2bb06f4c36" * 2]
    numbers = hash_texts(texts).tolist()
    assert len(set(numbers)) == 4 and min(numbers) >= 0
    assert [int(hash_texts([text])[0]) for text in texts] == numbers  # whatever stands beside it: sources share ids
    assert hash_texts([]).size == 0
