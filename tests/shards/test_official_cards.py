"""The cards of the public sources: each on a small archive in its official layout, and on the official tables."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from panfm.errors import UserError
from panfm.evaluation.tasks import load_task
from panfm.shards.cards import SourceCard, list_cards, load_card
from panfm.shards.index import open_shard_set
from panfm.shards.privacy import PUBLIC_KEY, pseudonymise
from panfm.shards.sources import RecordTable, compare_with_expected, read_records
from panfm.shards.writer import BuildOptions, build_shards
from tests.shards.official_layouts import LAYOUTS, Layout, describe, write_hiba_before_2024, write_isic2020

# card -> official table below the real metadata -> its place in the archive
OFFICIAL_TABLES = {
    "ham10000": {"HAM10000_metadata.csv": "HAM10000_metadata.csv"},
    "isic2019": {
        "ISIC_2019_Training_Metadata.csv": "ISIC_2019_Training_Metadata.csv",
        "ISIC_2019_Training_GroundTruth.csv": "ISIC_2019_Training_GroundTruth.csv",
    },
    "isic2020": {"ISIC_2020_Training_GroundTruth.csv": "ISIC_2020_Training_GroundTruth.csv"},
    "pad_ufes20": {"PAD-UFES-20_metadata.csv": "metadata.csv"},
    "fitzpatrick17k": {"fitzpatrick17k.csv": "fitzpatrick17k.csv"},
}


@pytest.mark.parametrize(
    ("name", "layout"), [*LAYOUTS.items(), ("hiba", write_hiba_before_2024)], ids=[*LAYOUTS, "hiba before 2024"]
)
def test_official_layout_becomes_shards(name: str, layout: Layout, tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "shards"
    expected = layout(root)
    card = load_card(name)
    assert [describe(record, root) for record in read_records(card, root)] == expected

    report = build_shards(card, root, out, options=BuildOptions())
    assert (report.num_samples, report.num_rejected) == (len(expected), {})
    shard_set = open_shard_set(out)
    rows = {row["key"]: row for row in shard_set.table.to_pylist()}
    for record in expected:
        row = rows[pseudonymise(PUBLIC_KEY, card.namespace, "sample", record.raw_id)]
        kind = "patient" if record.patient_id else "lesion" if record.lesion_id else "sample"
        assert (row["source"], row["modality"], row["group_kind"]) == (card.name, record.modality, kind)
        assert dict(row["labels"]) == record.labels and json.loads(row["tabular"]) == record.tabular
        assert {field: row[field] for field in record.metadata} == record.metadata
        assert (row["mask_length"] is not None) == (record.mask is not None)
        assert row["permitted_uses"] == list(card.permitted_uses)


@pytest.mark.parametrize("name", LAYOUTS)
def test_card_says_what_a_reader_must_know(name: str) -> None:
    card = load_card(name)
    assert card.cohort is not None and card.citation and card.note and card.how_to_obtain
    assert card.identifiers == "public" and not card.synthetic
    free = "NC" not in card.licence and "agreement" not in card.licence.lower()
    assert free or "commercial" not in card.permitted_uses  # a doubtful licence is read strictly
    for label, counts in card.expected.labels.items():
        assert set(counts) <= list_values(card, label)
    if card.expected.images is not None:
        assert all(sum(counts.values()) <= card.expected.images for counts in card.expected.labels.values())


def list_values(card: SourceCard, label: str) -> set[str]:
    """All values that a card's map gives a label."""
    entry = card.labels[label]
    return {value for value in (entry.values or entry.one_hot or {}).values() if value is not None}


@pytest.mark.parametrize(("card", "variant"), [("ham10000", "ham10000_200px"), ("pad_ufes20", "pad_ufes20_320px")])
def test_variants_of_a_source_serve_the_same_tasks(card: str, variant: str) -> None:
    official, small = load_card(card), load_card(variant)
    assert official.name == small.name == card and official.namespace == small.namespace
    for label in small.labels:
        assert list_values(official, label) == list_values(small, label)
    for task in (load_task(f"{card}_diagnosis"), load_task(f"{card}_malignancy")):
        assert set(task.classes) == list_values(official, task.label)


def test_sources_with_the_same_ids_share_a_namespace() -> None:
    # HAM10000 is the training part of ISIC 2018 and a part of ISIC 2019, under the same image and lesion ids.
    challenges = ["ham10000", "isic2018_classification", "isic2018_masks", "isic2019"]
    assert {load_card(name).namespace for name in challenges} == {"ham10000"}
    archive = ["isic2020", "isic2024", "isic2024_hdf5", "bcn20000", "mskcc", "hiba", "milk10k"]
    assert {load_card(name).namespace for name in archive} == {"isic"}


def test_a_table_of_another_edition_is_named(tmp_path: Path) -> None:
    write_isic2020(tmp_path)
    table = tmp_path / "ISIC_2020_Training_GroundTruth.csv"
    table.write_text(table.read_text().replace("benign_malignant", "malignant"))
    with pytest.raises(UserError, match=r"GroundTruth.csv: has no column benign_malignant, which labels.malignant"):
        read_records(load_card("isic2020"), tmp_path)


# ------------------------------------------------------------------------------------------------ official tables


@pytest.fixture(scope="module")
def read_official(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RecordTable]:
    """Reads a source's official tables, without its images, once."""

    @cache
    def read(name: str) -> RecordTable:
        root = tmp_path_factory.mktemp(name)
        for source, place in OFFICIAL_TABLES[name].items():
            shutil.copyfile(real_data / "metadata" / source, root / place)
        return read_records(load_card(name), root)

    return read


@pytest.mark.real
@pytest.mark.parametrize("name", OFFICIAL_TABLES)
def test_counts_of_the_official_tables(name: str, read_official: Callable[[str], RecordTable]) -> None:
    differences = compare_with_expected(load_card(name), read_official(name))
    differences = tuple(text for text in differences if " masks, " not in text)  # images and masks are not there
    # Of Fitzpatrick17k only the first 1,500 rows are at hand.
    assert differences == (("1500 images, 16577 expected",) if name == "fitzpatrick17k" else ())


@pytest.mark.real
def test_isic2020_keeps_its_duplicates_in_one_group(real_data: Path, read_official: Callable[..., RecordTable]) -> None:
    table = read_official("isic2020").table
    patients = dict(zip(table["raw_id"].to_pylist(), table["patient_id"].to_pylist(), strict=True))
    lines = (real_data / "metadata" / "ISIC_2020_Training_Duplicates.csv").read_text().splitlines()[1:]
    assert len(lines) == 425  # as the card's note says
    assert all(patients[one] == patients[two] for one, two in (line.split(",") for line in lines))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "variant", "folder"),
    [
        ("ham10000", "ham10000_200px", "dermoscopic/ham10000"),
        ("pad_ufes20", "pad_ufes20_320px", "clinical/pad_ufes20"),
    ],
)
def test_variants_agree_image_by_image(
    name: str, variant: str, folder: str, real_data: Path, read_official: Callable[[str], RecordTable]
) -> None:
    official = {record.raw_id: record for record in read_official(name)}
    for record in read_records(load_card(variant), real_data / folder):
        twin = official[record.raw_id]  # equal texts make equal keys, so committed splits fit both
        assert (twin.patient_id, twin.lesion_id) == (record.patient_id, record.lesion_id)
        assert {label: twin.labels[label] for label in record.labels} == record.labels
        own = {field: value for field, value in record.metadata.items() if field != "official_split"}
        assert {field: twin.metadata[field] for field in own} == own


@pytest.mark.real
def test_isic2024_reads_the_official_columns(real_data: Path, tmp_path: Path) -> None:
    # Three real rows of the test part; the training table has eleven columns more, which are filled in here.
    header, *rows = (real_data / "metadata" / "ISIC2024_test-metadata.csv").read_text().splitlines()
    more = "target,lesion_id,iddx_full,iddx_1,iddx_2,iddx_3,iddx_4,iddx_5,mel_mitotic_index,mel_thick_mm"
    lines = [f"{header},{more},tbp_lv_dnn_lesion_confidence", *(f"{row},0,,Benign,Benign,,,,,,,97.5" for row in rows)]
    (tmp_path / "train-metadata.csv").write_text("\n".join(lines))
    records = read_records(load_card("isic2024_hdf5"), tmp_path)
    assert [record.raw_id for record in records] == ["ISIC_0015657", "ISIC_0015729", "ISIC_0015740"]
    assert [record.patient_id for record in records] == ["IP_6074337", "IP_1664139", "IP_7142616"]
    assert records[2].metadata["institution"] == "FNQH Cairns" and records[2].metadata["age"] == 65.0
    assert records[0].tabular["tbp_lv_nevi_confidence"] == 0.01698104 and len(records[0].tabular) == 36


def test_every_layout_has_its_card() -> None:
    assert set(LAYOUTS) <= set(list_cards())
