"""The other half of the cards: atlases, class folders, slides, captions, and the templates for own data."""

import json
from pathlib import Path

import pytest

from panfm.errors import UserError
from panfm.shards.cards import load_card
from panfm.shards.index import open_shard_set
from panfm.shards.privacy import PUBLIC_KEY, create_key, pseudonymise
from panfm.shards.sources import read_records
from panfm.shards.writer import BuildOptions, build_shards
from tests.shards.official_layouts import Layout, describe
from tests.shards.official_layouts_b import PUBLIC, TEMPLATES, write_panderm_csv_classes

CASES = [*PUBLIC.items(), *TEMPLATES.items(), ("panderm_csv", write_panderm_csv_classes)]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[*PUBLIC, *TEMPLATES, "panderm_csv with classes"])
def test_official_layout_becomes_shards(name: str, layout: Layout, tmp_path: Path) -> None:
    root, out, key_file = tmp_path / "raw", tmp_path / "shards", tmp_path / "key"
    expected = layout(root)
    card = load_card(name)
    assert [describe(record, root) for record in read_records(card, root)] == expected

    private = card.identifiers == "private"
    assert private == (name in TEMPLATES)
    key = create_key(key_file, shard_folder=out) if private else PUBLIC_KEY
    report = build_shards(card, root, out, options=BuildOptions(key_file=key_file if private else None))
    num_tiles = 4 if card.slides else 1  # each drawn slide is two tiles wide and two high
    assert (report.num_samples, report.num_rejected) == (len(expected) * num_tiles, {})
    rows = open_shard_set(out).table.to_pylist()
    for record in expected:
        kinds = {"patient": record.patient_id, "lesion": record.lesion_id, "slide": record.slide_id}
        kind = next((kind for kind, known in kinds.items() if known), "sample")
        if card.slides:
            slide = pseudonymise(key, card.namespace, "slide", record.slide_id or record.raw_id)
            found = [row for row in rows if row["slide_id"] == slide]
            assert {row["mpp"] for row in found} == {0.5}
        else:
            sample = pseudonymise(key, card.namespace, "sample", record.raw_id)
            found = [row for row in rows if row["key"] == sample]
        assert len(found) == num_tiles
        for row in found:
            assert (row["source"], row["modality"], row["group_kind"]) == (card.name, record.modality, kind)
            assert dict(row["labels"]) == record.labels and json.loads(row["tabular"]) == record.tabular
            assert {field: row[field] for field in record.metadata} == record.metadata
            assert (row["mask_length"] is not None) == (record.mask is not None)
            assert (row["caption_length"] is not None) == (record.caption is not None)


@pytest.mark.parametrize("name", [*PUBLIC, *TEMPLATES])
def test_card_says_what_a_reader_must_know(name: str) -> None:
    card = load_card(name)
    assert card.cohort is not None and card.note and card.how_to_obtain and (card.citation or card.origin)
    free = any(word in card.licence for word in ("CC BY 3.0", "CC BY 4.0", "CC0", "open access"))
    assert ("commercial" in card.permitted_uses) == free  # a doubtful licence is read strictly
    for label, counts in card.expected.labels.items():
        entry = card.labels[label]
        assert set(counts) <= set((entry.values or entry.one_hot or {}).values())
        assert sum(counts.values()) == card.expected.images


def test_images_that_no_table_of_derm1m_names_are_not_read(tmp_path: Path) -> None:
    PUBLIC["derm1m"](tmp_path)
    (tmp_path / "Derm1M_v2_validation.csv").unlink()
    with pytest.raises(UserError, match=r"Derm1M_v2_validation.csv: no such file"):
        read_records(load_card("derm1m"), tmp_path)
