"""Levels of a real shard set: bands, units of several images, rare levels, and nothing that names anybody."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from panfm.evaluation.splits import load_split
from panfm.evaluation.subgroup_columns import OTHER, collect_subgroups, read_levels
from panfm.evaluation.tasks import TaskCard
from panfm.shards.index import ShardSet


def test_levels_are_bands() -> None:
    table = pa.table({
        "age": [0.0, 29.9, 30.0, 69.0, 88.0, None],
        "phototype_low": [1, 2, 3, 5, 6, None], "phototype_high": [2, 2, 5, 6, 6, None],
        "sex": ["female", "male", "other", None, "", "male"],
    })  # fmt: skip
    assert read_levels(table, "age") == ["0-29", "0-29", "30-49", "50-69", "70 or more", None]
    assert read_levels(table, "phototype") == ["1-2", "1-2", None, "5-6", "5-6", None]
    assert read_levels(table, "sex") == ["female", "male", "other", None, None, "male"]


@pytest.fixture
def shard_set(build_clinic: Callable[..., ShardSet]) -> ShardSet:
    """The clinic with sexes, one body site that a single test patient has, and sites that differ within a patient."""

    def change(row: dict[str, str]) -> None:
        patient, image = int(row["patient"][1:]), int(row["file"].removesuffix(".jpg")) % 2
        row["sex"] = "female" if patient // 2 % 2 else "male"
        row["site"] = "toe" if patient == 4 else ("trunk" if patient < 18 or image else "arm")

    columns = {"path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold"}
    return build_clinic(change, columns={**columns, "sex": "sex", "anatomic_site": "site"})


def test_levels_follow_the_test_units(shard_set: ShardSet, make_task: Callable[..., TaskCard]) -> None:
    card = make_task(subgroups=["sex", "anatomic_site"])
    split = load_split(card, shard_set)
    test = split.find("test")
    found = collect_subgroups(card, split, shard_set, test)
    rows = {row["key"]: row for row in shard_set.table.select(["key", "sex", "anatomic_site"]).to_pylist()}
    assert found["sex"] == [rows[key]["sex"] for key in split.keys[test].tolist()]
    sites = [rows[key]["anatomic_site"] for key in split.keys[test].tolist()]
    groups = split.groups[test]
    names = {site: len({group for group, one in zip(groups, sites, strict=True) if one == site}) for site in set(sites)}
    assert min(names.values()) < 5 <= max(names.values())  # the archive has a rare site, and one that is not
    assert found["anatomic_site"] == [site if names[site] >= 5 else OTHER for site in sites]
    assert collect_subgroups(make_task(), split, shard_set, test) == {}


def test_a_unit_of_several_images_has_the_level_they_share(
    shard_set: ShardSet, make_task: Callable[..., TaskCard]
) -> None:
    card = make_task(subgroups=["sex", "anatomic_site"])
    images = load_split(card, shard_set)
    names, first = np.unique(images.groups, return_index=True)
    units = replace(
        images,
        rows=images.rows[first],
        groups=names,
        keys=names,
        members=tuple(images.rows[images.groups == name] for name in names),
    )
    found = collect_subgroups(card, units, shard_set, np.arange(len(names)))
    table = shard_set.table.to_pydict()
    for place, members in enumerate(units.members):
        assert found["sex"][place] == table["sex"][members[0]]
        if len({table["anatomic_site"][row] for row in members}) > 1:
            assert found["anatomic_site"][place] is None
    assert None in found["anatomic_site"] and "trunk" in found["anatomic_site"]
