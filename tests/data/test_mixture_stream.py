"""stream: each position once, passes complete one after the other, groups side by side; after rollbacks too."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.data import mixture as mixture_module
from panfm.data import rounds as rounds_module
from panfm.data.examples import Tasks
from panfm.data.loader import LoaderState
from panfm.data.mixture import MixtureConfig, MixturePlan, build_mixture
from panfm.data.selection import SampleTable
from panfm.data.stream import SampleStream
from panfm.data.walk import Walk
from tests.data.tables import find_units, make_table

SEED, CYCLE = 11, 512
Salts = Sequence[tuple[int, int]]


@pytest.fixture(autouse=True, scope="module")
def short_cycles() -> object:
    """Cycles and rounds of 512 draws instead of 65,536: their borders are met everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_module, "CYCLE_DRAWS", CYCLE)
        patch.setattr(rounds_module, "ROUND_DRAWS", CYCLE)
        yield


def draw(config: MixtureConfig, table: SampleTable, positions: range, salts: Salts = ((0, 0),)) -> np.ndarray:
    return SampleStream(build_mixture(config, table), SEED, salts).compute_samples(positions)


def train(
    plan: MixturePlan, batch_size: int, micro: int, segments: Sequence[tuple[LoaderState, int, int]]
) -> tuple[dict[int, int], list[int]]:
    """Run ranks, each with a stream of its own, through segments of (state, world size, steps).

    Returns the sample at each position that was kept, and how often each was drawn in one segment.
    """
    kept: dict[int, int] = {}
    times = []
    for state, world_size, num_steps in segments:
        kept = {position: sample for position, sample in kept.items() if position < state.step * batch_size}
        salts = [(step * batch_size, salt) for step, salt in state.salts]
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            tasks = Tasks(state.step, rank, world_size, batch_size, micro)
            stream = SampleStream(plan, SEED, salts)
            for positions, _ in zip(tasks, range(num_steps * tasks.num_micro_batches), strict=False):
                samples = stream.compute_samples(positions).tolist()
                kept |= dict(zip(positions, samples, strict=True))
                seen.update(positions)
        times += [*seen.values()]
        assert sorted(kept) == list(range(len(kept)))
    return kept, times


def check_passes(plan: MixturePlan, samples: np.ndarray, stream: SampleStream) -> None:
    """Every pass over every unit, and over the chunks of groups, is complete before the next begins."""
    units, ordinals = stream._locate(range(samples.size))
    for number, unit in enumerate(plan.units):
        drawn = samples[units == number] - unit.section.first
        size = unit.section.size
        whole = drawn[: drawn.size - drawn.size % size].reshape(-1, size)
        assert (np.sort(whole) == np.arange(size)).all()
        assert len({*drawn[whole.size :].tolist()}) == drawn.size - whole.size
    groups = plan.groups
    if groups is None:
        return
    in_groups, passes = samples[units < 0], ordinals[units < 0] // groups.num_chunks
    assert in_groups.size % groups.size == 0
    for number in range(in_groups.size // groups.size // groups.num_chunks):
        counts = Counter(in_groups[passes == number].tolist())
        for start, stop in zip(groups.starts[:-1], groups.starts[1:], strict=True):
            times = [counts[member] for member in groups.members[start:stop].tolist()]
            assert sum(times) == -(-len(times) // groups.size) * groups.size
            assert max(times) - min(times) <= 1 <= min(times)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_position_once_and_every_pass_complete_over_ranks_and_rollbacks(data: st.DataObject) -> None:
    """World sizes 1, 3 and 2 in turn, rolled back twice at most, with weights and with groups."""
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    kinds = ("clinical", "dermoscopic", "histopathology", "total_body")
    table = make_table(*((f"s{number}", kinds[number], size) for number, size in enumerate(sizes)))
    lesions = data.draw(st.integers(1, sum(sizes)))
    table.records["lesion"] = np.random.default_rng(lesions).integers(0, lesions, sum(sizes))
    table.records["lesion"][:2] = 0
    share = data.draw(st.sampled_from((0.0, 0.2, 0.5))) if sum(sizes) > 1 else 0.0
    size = data.draw(st.integers(2, 5))
    weighting = data.draw(st.sampled_from(("natural", "uniform", "temperature", "explicit")))
    weights = {f"s{number}": number + 0.7 for number in range(len(sizes))} if weighting == "explicit" else {}
    config = MixtureConfig(weighting=weighting, weights=weights, group_share=share, group_size=size)
    plan = build_mixture(config, table)
    micro = size
    batch_size = 6 * micro * data.draw(st.integers(1, 3))
    state, segments, salt = LoaderState(0), [], 0
    for world_size, may_roll_back in ((1, True), (3, True), (2, False)):
        num_steps = data.draw(st.integers(1, 20))
        segments.append((state, world_size, num_steps))
        state = LoaderState(state.step + num_steps, state.salts)
        if may_roll_back and data.draw(st.booleans()):
            salt += 1
            state = state.roll_back(data.draw(st.integers(0, state.step)), salt)
    kept, times = train(plan, batch_size, micro, segments)
    assert set(times) == {1}
    samples = np.array([kept[position] for position in range(len(kept))])
    assert samples.size == (segments[-1][0].step + segments[-1][2]) * batch_size
    check_passes(plan, samples, SampleStream(plan, SEED, [(0, 0)]))
    # the layout is that of a run which was never rolled back
    straight = SampleStream(plan, SEED, [(0, 0)]).compute_samples(range(samples.size))
    if not share:
        np.testing.assert_array_equal(find_units(table, samples), find_units(table, straight))
    if weighting == "natural" and not share:
        epochs = samples[: samples.size - samples.size % sum(sizes)].reshape(-1, sum(sizes))
        assert (np.sort(epochs) == np.arange(sum(sizes))).all()


def test_a_rollback_keeps_what_was_before_and_changes_what_follows() -> None:
    table = make_table(("a", "clinical", 5000), ("b", "dermoscopic", 700), lesion_size=4)
    config = MixtureConfig(weighting="uniform", group_share=0.2)
    first = draw(config, table, range(12_000))
    second = draw(config, table, range(12_000), [(0, 0), (3000, 7)])
    third = draw(config, table, range(12_000), [(0, 0), (3000, 7), (6000, 8)])
    np.testing.assert_array_equal(first[:3000], second[:3000])
    np.testing.assert_array_equal(second[:6000], third[:6000])
    for one, other, start in ((first, second, 3000), (second, third, 6000)):
        assert np.mean(one[start:] == other[start:]) < 0.02
        assert np.mean(one[start : start + 200] == other[start : start + 200]) < 0.05  # at once
    # a second rollback behind the first takes its salt away; one at the very start leaves nothing of the first stream
    assert LoaderState(9, ((0, 0), (5, 1))).roll_back(3, 2) == LoaderState(3, ((0, 0), (3, 2)))
    assert LoaderState(9, ((0, 0), (5, 1))).roll_back(5, 2) == LoaderState(5, ((0, 0), (5, 2)))
    assert LoaderState(9).roll_back(0, 4) == LoaderState(0, ((0, 4),))


def test_reads_stay_coalesced_after_a_rollback() -> None:
    walk = Walk(40_000, ("test",), [(0, 0), (10_500, 1), (20_100, 2)])
    items = walk.get(np.arange(40_000))
    assert sorted(items.tolist()) == list(range(40_000))
    windows = [*range(0, 10_240, 2048), *range(20_100, 39_000, 2048)]
    blocks = [len(set((items[start : start + 2048] // 32).tolist())) for start in windows]
    assert max(blocks[:5]) == 64  # before it a window is 64 whole blocks
    # behind it some are made of what two open windows left: of half-read blocks, each of two or three neighbours' rests
    assert np.mean(blocks[5:]) < 100 and max(blocks[5:]) < 130


def test_a_position_does_not_depend_on_how_it_is_asked_for() -> None:
    table = make_table(("a", "clinical", 4000), ("b", "dermoscopic", 50), lesion_size=3)
    plan = build_mixture(MixtureConfig(weighting="uniform", group_share=0.3), table)
    salts = [(0, 0), (4000, 1), (6002, 2)]
    whole = SampleStream(plan, SEED, salts).compute_samples(range(9000))
    stream = SampleStream(plan, SEED, salts)
    rng = np.random.default_rng(0)
    for start in [*rng.integers(0, 8900, size=20).tolist(), 0, 3990, 5999]:  # back and forth, across rounds and salts
        np.testing.assert_array_equal(stream.compute_samples(range(start, start + 100)), whole[start : start + 100])
    far = range(10**12, 10**12 + 9)
    again = SampleStream(plan, SEED, salts)
    np.testing.assert_array_equal(stream.compute_samples(far), again.compute_samples(far))


def test_seed_and_salt_change_the_stream() -> None:
    table = make_table(("a", "clinical", 500), ("b", "dermoscopic", 50))
    plan = build_mixture(MixtureConfig(), table)
    first = SampleStream(plan, SEED, [(0, 0)]).compute_samples(range(300))
    assert not np.array_equal(first, SampleStream(plan, SEED, [(0, 1)]).compute_samples(range(300)))
    assert not np.array_equal(first, SampleStream(plan, 12, [(0, 0)]).compute_samples(range(300)))


def test_epochs_have_different_orders_and_neighbours_on_disk_are_mixed() -> None:
    table = make_table(("a", "clinical", 20_000))
    samples = draw(MixtureConfig(), table, range(40_000))
    assert not np.array_equal(samples[:20_000], samples[20_000:])
    windows = [set(samples[start : start + 2048].tolist()) for start in (0, 20_000)]
    assert len(windows[0] & windows[1]) < 700  # other blocks meet in another epoch: a tenth by chance, not all
    assert np.mean(np.abs(np.diff(samples[:20_000])) == 1) < 0.01  # no runs of neighbours in a batch
    blocks = {sample // 32 for sample in samples[:2048].tolist()}
    assert len(blocks) == 64  # but a window reads 64 whole blocks and nothing else


@pytest.mark.parametrize("group_by", ["lesion", "patient"])
def test_groups_stand_side_by_side_and_singles_still_pass(group_by: str) -> None:
    table = make_table(("a", "clinical", 500), lesion_size=5)  # 100 groups of 5: 3 chunks of 2 each
    other = "patient" if group_by == "lesion" else "lesion"
    table.records[other] = np.arange(500)  # each alone
    config = MixtureConfig(group_share=0.25, group_by=group_by)
    plan = build_mixture(config, table)
    assert plan.groups is not None and plan.groups.num_chunks == 300
    samples = draw(config, table, range(20 * CYCLE))
    pairs = table.records[group_by][samples].reshape(-1, 2)
    together = pairs[:, 0] == pairs[:, 1]
    assert together.mean() == pytest.approx(0.25, abs=0.02)  # a chance pair of singles happens in 1 % of the others
    drawn = samples.reshape(-1, 2)[together]
    assert (drawn[:, 0] != drawn[:, 1]).mean() > 0.99  # two images, not one twice
    for start in range(0, 20 * CYCLE, 512):  # in every stretch, not only in all
        assert together[start // 2 : start // 2 + 256].mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("clinical", "dermoscopic"), [(1, 1), (1, 2), (2, 3), (3, 3), (1, 4), (2, 5), (4, 2)])
def test_pairs_cross_modalities_where_a_lesion_has_several(clinical: int, dermoscopic: int) -> None:
    """The dermoscopic images lie in another source."""
    table = make_table(("a", "clinical", 50 * clinical), ("b", "dermoscopic", 50 * dermoscopic))
    table.records["lesion"] = np.arange(table.records.size) % 50
    plan = build_mixture(MixtureConfig(group_share=0.5), table)
    num_chunks = -(-(clinical + dermoscopic) // 2)
    num_passes = 4 * (clinical + dermoscopic)
    assert plan.groups is not None and plan.groups.num_chunks == 50 * num_chunks
    positions = range(2 * 2 * plan.groups.num_chunks * num_passes)
    units, ordinals = SampleStream(plan, SEED, [(0, 0)])._locate(positions)
    pairs = draw(MixtureConfig(group_share=0.5), table, positions)[units < 0].reshape(-1, 2)
    lesion = table.records["lesion"][pairs]
    assert (lesion[:, 0] == lesion[:, 1]).all() and (pairs[:, 0] != pairs[:, 1]).all()
    crossing = np.diff(table.records["modality"][pairs], axis=1)[:, 0] != 0
    passes = ordinals[units < 0][::2] // plan.groups.num_chunks
    assert passes[-1] == num_passes - 1
    for number in range(num_passes):
        counts = np.bincount(lesion[(passes == number) & crossing, 0], minlength=50)
        assert counts.min() >= min(clinical, dermoscopic)
    # Where a chunk is filled up, the images that are drawn twice take turns.
    drawn = np.bincount(pairs.reshape(-1))
    assert (drawn == drawn[0]).all()


def test_larger_chunks_are_filled_up_from_the_same_group() -> None:
    table = make_table(("a", "clinical", 30), lesion_size=3)
    config = MixtureConfig(group_share=0.5, group_size=4)
    samples = draw(config, table, range(10 * CYCLE)).reshape(-1, 4)
    lesions = table.records["lesion"][samples]
    together = (lesions == lesions[:, :1]).all(axis=1)
    assert together.mean() == pytest.approx(0.5, abs=0.02)
    assert all(len(set(slot)) == 3 for slot in samples[together].tolist()[:50])


def test_replacements_come_from_the_unit_or_the_group_and_follow_the_salt() -> None:
    table = make_table(("a", "clinical", 90), ("b", "dermoscopic", 9), lesion_size=3)
    plan = build_mixture(MixtureConfig(group_share=0.5), table)
    stream, rolled_back = (SampleStream(plan, SEED, salts) for salts in ([(0, 0)], [(0, 0), (50, 1)]))
    lesion, changed = table.records["lesion"], 0
    for position in range(100):
        sample = int(stream.compute_samples(range(position, position + 1))[0])
        replacements = [stream.compute_replacement(position, attempt) for attempt in range(8)]
        if stream._locate(range(position, position + 1))[0][0] < 0:
            assert {int(lesion[other]) for other in replacements[:4]} == {int(lesion[sample])}
        assert np.unique(find_units(table, np.array([*replacements, sample]))).size == 1
        others = [rolled_back.compute_replacement(position, attempt) for attempt in range(8)]
        assert others == replacements or position >= 50
        changed += others != replacements
    assert changed > 45
