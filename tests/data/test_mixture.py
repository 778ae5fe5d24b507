"""mixture: passes complete one after the other, shares as asked, groups side by side; a pure function of position."""

from collections import Counter

import numpy as np
import pytest

from panfm.config import validate
from panfm.data import mixture as mixture_module
from panfm.data.batch import NO_GROUP
from panfm.data.mixture import MixtureConfig, SampleStream, build_mixture, hash_numbers, permute
from panfm.data.selection import SampleTable
from panfm.errors import UserError
from panfm.shards.schema import MODALITIES

SEED = 11


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 4,096 draws instead of 65,536: the same code in a sixteenth of the time."""
    monkeypatch.setattr(mixture_module, "ROUND_DRAWS", 4096)


def make_table(*sizes: tuple[str, str, int], lesion_size: int = 0) -> SampleTable:
    """A table of (source, modality, number of samples); lesions of `lesion_size` neighbours, 0: none."""
    names = tuple(dict.fromkeys(name for name, _, _ in sizes))
    source = np.concatenate([np.full(count, names.index(name), dtype=np.int32) for name, _, count in sizes])
    modality = np.concatenate([np.full(count, MODALITIES.index(kind), dtype=np.int8) for _, kind, count in sizes])
    numbers = np.arange(source.size, dtype=np.int64)
    lesion = numbers // lesion_size if lesion_size else np.full(source.size, NO_GROUP, dtype=np.int64)
    return SampleTable(names, source, numbers, modality, lesion, lesion.copy(), lesion.copy())


def draw(config: MixtureConfig, table: SampleTable, positions: range, seed: int = SEED, salt: int = 0) -> np.ndarray:
    return SampleStream(build_mixture(config, table), seed, salt).compute_samples(positions)


def check_passes(samples: np.ndarray, members: np.ndarray) -> None:
    """Within the draws of `members`, every stretch of one pass holds each of them exactly once."""
    drawn = samples[np.isin(samples, members)]
    for start in range(0, drawn.size, members.size):
        part = drawn[start : start + members.size]
        assert len(set(part.tolist())) == part.size


@pytest.mark.parametrize(
    "config",
    [
        MixtureConfig(),
        MixtureConfig(weighting="uniform"),
        MixtureConfig(weighting="temperature", alpha=0.3),
        MixtureConfig(weighting="explicit", weights={"big": 0.5, "small": 0.3, "one": 0.2}),
    ],
    ids=lambda config: config.weighting,
)
def test_every_pass_over_a_unit_is_complete_before_the_next(config: MixtureConfig) -> None:
    table = make_table(("big", "clinical", 3000), ("small", "dermoscopic", 37), ("one", "total_body", 1))
    samples = draw(config, table, range(10_000))  # more than two rounds
    for source in range(3):
        check_passes(samples, np.flatnonzero(table.source == source))


def test_natural_weights_draw_every_sample_once_an_epoch() -> None:
    table = make_table(("a", "clinical", 700), ("b", "dermoscopic", 290), ("c", "histopathology", 10))
    samples = draw(MixtureConfig(), table, range(8000))
    assert np.bincount(samples[:4000]).tolist() == [4] * 1000  # a round is 4 whole epochs
    assert np.bincount(samples).tolist() == [8] * 1000


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
    num_draws = build_mixture(config, table).round_draws
    samples = draw(config, table, range(num_draws))
    asked = {
        "natural": dict(sizes),
        "uniform": dict.fromkeys(sizes, 1),
        "temperature": {name: size**0.5 for name, size in sizes.items()},
        "explicit": weights,
    }[weighting]
    total = sum(asked.values())
    names = [f"{table.sources[s]}/{MODALITIES[m]}" for s, m in zip(table.source, table.modality, strict=True)]
    part = {"source": slice(0, 1), "modality": slice(1, 2), "source_modality": slice(0, 2)}[over]
    realised = Counter("/".join(names[sample].split("/")[part]) for sample in samples)
    for name, weight in asked.items():
        assert realised[name] == pytest.approx(num_draws * weight / total, abs=1), name
    # every batch holds them too, not only the whole
    for start in range(0, num_draws - 256, 256):
        batch = Counter("/".join(names[sample].split("/")[part]) for sample in samples[start : start + 256])
        for name, weight in asked.items():
            assert abs(batch[name] - 256 * weight / total) <= 4, name


def test_a_tiny_source_is_not_starved() -> None:
    table = make_table(("huge", "clinical", 30_000), ("tiny", "clinical", 3))
    samples = draw(MixtureConfig(), table, range(4096))
    assert 1 <= np.count_nonzero(table.source[samples] == 1) <= 2


def test_a_position_does_not_depend_on_how_it_is_asked_for() -> None:
    table = make_table(("a", "clinical", 4000), ("b", "dermoscopic", 50), lesion_size=3)
    plan = build_mixture(MixtureConfig(weighting="uniform", group_share=0.3), table)
    whole = SampleStream(plan, SEED, 0).compute_samples(range(9000))
    stream = SampleStream(plan, SEED, 0)
    rng = np.random.default_rng(0)
    for start in [*rng.integers(0, 8900, size=20).tolist(), 0, 4050, 8150]:  # back and forth, across rounds
        np.testing.assert_array_equal(stream.compute_samples(range(start, start + 100)), whole[start : start + 100])


def test_seed_and_salt_change_the_stream_and_the_order_of_sources_does_not() -> None:
    table = make_table(("a", "clinical", 500), ("b", "dermoscopic", 50))
    first = draw(MixtureConfig(), table, range(300))
    assert not np.array_equal(first, draw(MixtureConfig(), table, range(300), salt=1))
    assert not np.array_equal(first, draw(MixtureConfig(), table, range(300), seed=12))
    swapped = make_table(("b", "dermoscopic", 50), ("a", "clinical", 500))
    other = draw(MixtureConfig(), swapped, range(300))
    np.testing.assert_array_equal(np.where(first < 500, first + 50, first - 500), other)


def test_epochs_have_different_orders_and_neighbours_on_disk_are_mixed() -> None:
    table = make_table(("a", "clinical", 20_000))
    samples = draw(MixtureConfig(), table, range(40_000))
    assert not np.array_equal(samples[:20_000], samples[20_000:])
    windows = [set(samples[start : start + 2048].tolist()) for start in (0, 20_000)]
    assert len(windows[0] & windows[1]) < 700  # other blocks meet in another epoch: a tenth by chance, not all
    assert np.mean(np.abs(np.diff(samples[:20_000])) == 1) < 0.01  # no runs of neighbours in a batch
    blocks = {sample // 32 for sample in samples[:2048].tolist()}
    assert len(blocks) == 64  # but a window reads 64 whole blocks and nothing else


def test_groups_stand_side_by_side_and_singles_still_pass() -> None:
    table = make_table(("a", "clinical", 500), lesion_size=5)  # 100 lesions of 5: 3 chunks of 2 each
    config = MixtureConfig(group_share=0.25, group_size=2)
    plan = build_mixture(config, table)
    assert plan.groups is not None and plan.groups.chunk_group.size == 300
    samples = draw(config, table, range(plan.round_draws))
    pairs = table.lesion[samples].reshape(-1, 2)
    together = pairs[:, 0] == pairs[:, 1]
    assert together.mean() == pytest.approx(0.25, abs=0.02)  # a chance pair of singles happens in 1 % of the others
    drawn = samples.reshape(-1, 2)[together]
    assert (drawn[:, 0] != drawn[:, 1]).mean() > 0.99  # two images, not one twice
    # a pass over the chunks draws every image of every lesion
    stream = SampleStream(plan, SEED, 0)
    group_slots = [slot for slot in range(samples.size // 2) if stream._locate(2 * slot)[0] < 0][:300]
    images = samples.reshape(-1, 2)[group_slots].reshape(-1)
    assert set(images.tolist()) == set(range(500)) and images.size == 600


def test_groups_cross_sources_and_leave_lonely_images_out() -> None:
    table = make_table(("a", "clinical", 4), ("b", "histopathology", 4))
    lesion = np.array([1, 2, 3, NO_GROUP, 1, NO_GROUP, 2, 7])
    table = SampleTable(table.sources, table.source, table.row, table.modality, lesion, table.patient, table.visit)
    plan = build_mixture(MixtureConfig(group_share=0.5), table)
    assert plan.groups is not None
    assert sorted(group.tolist() for group in plan.groups.members) == [[0, 4], [1, 6]]


def test_larger_chunks_are_filled_up_from_the_same_group() -> None:
    table = make_table(("a", "clinical", 30), lesion_size=3)
    config = MixtureConfig(group_share=0.5, group_size=4)
    samples = draw(config, table, range(build_mixture(config, table).round_draws)).reshape(-1, 4)
    lesions = table.lesion[samples]
    together = (lesions == lesions[:, :1]).all(axis=1)
    assert together.mean() == pytest.approx(0.5, abs=0.02)
    assert all(len(set(slot)) == 3 for slot in samples[together].tolist()[:50])


def test_replacements_come_from_the_unit_or_the_group() -> None:
    table = make_table(("a", "clinical", 90), ("b", "dermoscopic", 9), lesion_size=3)
    plan = build_mixture(MixtureConfig(group_share=0.5), table)
    stream = SampleStream(plan, SEED, 0)
    for position in range(100):
        sample = int(stream.compute_samples(range(position, position + 1))[0])
        replacements = [stream.compute_replacement(position, attempt) for attempt in range(8)]
        if stream._locate(position)[0] < 0:
            assert {int(table.lesion[other]) for other in replacements[:4]} == {int(table.lesion[sample])}
        assert len({int(table.source[other]) for other in replacements} | {int(table.source[sample])}) == 1


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


def test_weight_zero_leaves_a_source_out() -> None:
    table = make_table(("a", "clinical", 5), ("b", "dermoscopic", 5))
    samples = draw(MixtureConfig(weighting="explicit", weights={"a": 0, "b": 2}), table, range(500))
    assert set(table.source[samples].tolist()) == {1}


def test_hashes_stay_what_they_are() -> None:
    # Published splitmix64 output for state 0 and 1234567: a resumed run must see the stream it was started with.
    assert [int(number) for number in hash_numbers(0, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert int(hash_numbers(1234567, 1)[0]) == 6457827717110365317
    assert sorted(permute(1000, 3).tolist()) == list(range(1000))
