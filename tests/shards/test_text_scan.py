"""The text scan finds the archive's own people in every text, and leaves medical language alone."""

import csv
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from panfm.errors import UserError
from panfm.shards.cards import SourceCard
from panfm.shards.records import Record
from panfm.shards.text_patterns import find_patterns
from panfm.shards.text_scan import TextScanner
from tests.archives import make_source_card


def make_card(**values: Any) -> SourceCard:
    facts = {"identifiers": "private", "synthetic": None, "modality": "clinical", "columns": {"path": "file"}}
    return make_source_card("clinic", **(facts | values))


def make_record(line: int = 2, path: str = "images/photo.jpg", **values: Any) -> Record:
    facts: dict[str, Any] = {"line": line, "path": Path("/archive") / path, "raw_id": path, "modality": "clinical"}
    return Record(**(facts | values))


def clean(caption: str, *others: Record, **values: Any) -> tuple[str | None, dict[str, int]]:
    """A caption after the scan of a private archive of its record and others, and what was found in it."""
    record = make_record(caption=caption, **values)
    cleaned, counts = TextScanner.from_records(make_card(), [record, *others]).clean(record)
    return cleaned.caption, {name.removeprefix("caption."): number for name, number in counts.items()}


# ------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "jean.dupont-2@chu-lyon.fr"),
        ("phone", "+33 1 42 49 49 49"),
        ("phone", "0033142494949"),
        ("phone", "01.42.49.49.49"),
        ("phone", "0142494949"),
        ("phone", "044 255 11 11"),
        ("phone", "030/1234567"),
        ("phone", "(212) 555-0123"),
        ("phone", "Tel.: 55 51 23"),
        ("date", "12/03/1961"),
        ("date", "3.12.61"),
        ("date", "03-25-2019"),
        ("date", "1961-03-12"),
        ("date", "2019:03:12"),
        ("date", "12 mars 2019"),
        ("date", "12. März 2019"),
        ("date", "1er février"),
        ("date", "March 3, 2019"),
        ("date", "3rd of February"),
        ("date", "12-MAY-2019"),
        ("date", "Feb 2019"),
        ("national_id", "1 84 12 76 451 089 46"),
        ("national_id", "756.1234.5678.97"),
        ("national_id", "123-45-6789"),
        ("name", "Mme de la Tour"),
        ("name", "MR DUPONT Jean"),
        ("name", "Dr. H. Müller-Lüdenscheidt"),
        ("name", "Herrn Öztürk"),
        ("name", "Patient: Jean Dupont"),
        ("name", "née : Martin"),
        ("name", "Anna's iPhone"),
        ("long_number", "1234567"),
        ("file_name", "DUPONT_Jean-1.JPG"),
    ],
)
def test_patterns_find(kind: str, text: str) -> None:
    for sentence in (text, f"seen before ({text}), left arm", f"nevus {text}"):
        found = [sentence[span.start : span.end] for span in find_patterns(sentence) if span.kind == kind]
        assert found and text in found[0], sentence


@pytest.mark.parametrize(
    "text",
    [
        "Nodular melanoma, Breslow 1.23 mm, Clark III, 12 mitoses/mm2, pT2a",
        "a plaque of 2.5 x 3.5 cm, 10/12 of the area, grew by 0.123456 in 2019",
        "these may 5 years later, or march 2 steps, be 3 may-apples",
        "grade 3/4, FST 2-3, age 45-50, ratio 1:2, 10 % of 99,999 cells, stage T1b",
        "Spitz nevus (Reed), Bowen's disease, Paget, M. canis, dr = 0.5, sr 90",
        "Acne vulgaris treated with 5-fluorouracil 5 % and 0.05 % clobetasol",
        "the patient: a man with a mole; name of the lesion: seborrhoeic keratosis",
        "5 to 10 to 15 minutes, 400x, 20-40x, ICD-10 C43.9, SNOMED CT, HLA-B27, CD34",
    ],
)
def test_medical_language_passes(text: str) -> None:
    assert list(find_patterns(text)) == []
    assert clean(text) == (text, {})


# ------------------------------------------------------------------------------------------------ captions


def test_own_ids_leave_captions_in_every_spelling() -> None:
    facts = {"patient_id": "PAT_0042", "lesion_id": "L-917/b", "slide_id": "S19.00713", "raw_id": "exam 55123"}
    for text, kind in [
        ("pat-0042", "patient_id"),
        ("PAT 0042", "patient_id"),
        ("img_PAT0042_left", "patient_id"),
        ("L917b", "lesion_id"),
        ("s1900713", "slide_id"),
        ("EXAM-55123", "image_id"),
    ]:
        assert clean(f"A nevus ({text}) on the arm.", **facts) == ("A nevus ([removed]) on the arm.", {kind: 1}), text


def test_numbers_of_patients_are_found_with_and_without_zeros() -> None:
    assert clean("number 12345, red", patient_id="0012345") == ("number [removed], red", {"patient_id": 1})
    assert clean("number 0012345, red", patient_id="12345") == ("number [removed], red", {"patient_id": 1})
    assert clean("DUPONT_12345_2, red", patient_id="12345")[0] == "[removed], red"  # the name beside it goes too
    assert clean("4711: red", patient_id="4711")[0] == "[removed]: red"


def test_other_rows_are_looked_for_too() -> None:
    other = make_record(3, "x/IMG_00917.jpg", patient_id="PAT_0099", identifying=("Dupont", "Marie"))
    assert clean("see PAT-0099", other)[0] == "see [removed]"
    assert clean("see img 00917", other)[0] == "see [removed]"
    assert clean("sister of Marie DUPONT, red", other) == ("sister of [removed] [removed], red", {"identifying": 2})
    assert clean("DUPONT: red", other)[0] == "[removed]: red"


def test_common_words_and_small_numbers_of_other_rows_stay() -> None:
    others = [
        make_record(3, identifying=("Brown",), patient_id="2019"),
        make_record(4, patient_id="12", lesion_id="left1"),
        make_record(5, "nevus/nevus.jpg", patient_id="left"),
        make_record(6, "grade3/photo12.jpg"),
    ]
    text = "Brown nevus on the left 1, photo 12, in 2019: brown, grade 3"
    assert clean(text, *others) == (text, {})
    assert clean("seen with Brown", *others)[0] == "seen with [removed]"  # a capital inside a sentence is a name


def test_texts_of_identifying_columns_leave_captions() -> None:
    facts = {"identifying": ("Léa Dùpont", "12/03/1961", "Rue Cler 5", "99-1234")}
    for text in ("lea dupont", "DUPONT Lea", "Dupont", "léa", "12.3.1961", "1961-03-12", "991234", "Cler"):
        cleaned, counts = clean(f"red, {text}, flat", **facts)
        assert cleaned is not None and set(cleaned) <= set("red, [removed] flat"), text
        assert sum(counts.values()) >= 1


def test_folders_named_after_patients_leave_captions() -> None:
    path = "2019/DUPONT_1961/nevus/100CANON/IMG_1.jpg"
    assert clean("DUPONT 1961, a nevus of 2019", path=path) == ("[removed], a nevus of 2019", {"folder": 1})


def test_a_caption_of_nothing_else_is_dropped() -> None:
    assert clean("Mme Dupont 12/03/1961") == (None, {"name": 1, "date": 1})


def test_public_sources_keep_their_texts_but_for_addresses() -> None:
    caption = "ISIC_0024306 on 12/03/2019 by Dr. Dupont, mail a@b.org or 01 42 49 49 49"
    record = make_record(
        path="ISIC_0024306.jpg", caption=caption, labels={"note": "ask c@d.org", "dx": "nevus of 2019-03-12"}
    )
    cleaned, counts = TextScanner.from_records(make_card(identifiers="public"), [record]).clean(record)
    assert cleaned.caption == "ISIC_0024306 on 12/03/2019 by Dr. Dupont, mail [removed] or [removed]"
    assert cleaned.labels == {"note": "ask [removed]", "dx": "nevus of 2019-03-12"}
    assert counts == {
        "caption.image_id": 1,
        "caption.date": 1,
        "caption.name": 1,
        "caption.email": 1,
        "caption.phone": 1,
        "labels.note.email": 1,
        "labels.dx.date": 1,
    }


# ------------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("labels.diagnosis", "nevus, Mme Dupont", "a person's name"),
        ("labels.diagnosis", "nevus of PAT-0042", "a patient id"),
        ("labels.diagnosis", "nevus (lea)", "a text of the identifying columns"),
        ("institution", "ward 3, tel. 01 42 49 49 49", "a telephone number"),
        ("device", "Dermlite 3, 12/03/2019", "a date"),
        ("anatomic_site", "arm, see IMG_1.JPG", "a file name"),
        ("official_split", "train_PAT_0042", "a patient id"),
        ("phototype_source", "a@b.org", "an e-mail address"),
        ("tabular.note", "1 84 12 76 451 089 46", "a national id number"),
        ("tabular.code", 1234567.0, "a number of six or more digits"),
    ],
)
def test_a_guilty_field_stops_a_private_build(field: str, value: Any, words: str) -> None:
    column, _, key = field.partition(".")
    facts = {column: {key: value}} if key else {"metadata": {column: value}}
    records = [
        make_record(2, "a.jpg", labels={"diagnosis": "nevus"}, metadata={"institution": "north"}),
        make_record(3, "b.jpg", patient_id="PAT_0042", identifying=("Léa",), **facts),
    ]
    with pytest.raises(UserError) as error:
        TextScanner.from_records(make_card(), records)
    message = str(error.value)
    assert f"line 3, {field}: holds {words}, which must not enter" in message and str(value) not in message
    assert f"list {field} under text_scan_allow" in message and "\n" not in message
    counts = TextScanner.from_records(make_card(identifiers="public"), records).clean(records[1])[1]
    assert sum(counts.values()) == 1  # counted, where names are public
    with pytest.raises(UserError, match=field):  # and a scanner that never saw the record judges it the same
        TextScanner.from_records(make_card(), records[:1]).clean(records[1])


def test_values_that_the_card_maps_have_been_read() -> None:
    card = make_card(
        labels={"diagnosis": {"column": "dx", "values": {"Mme Dupont, nevus": "nevus (Bowen)"}}},
        constants={"institution": "Clinic of Dr. Bowen"},
    )
    record = make_record(
        identifying=("Bowen",), labels={"diagnosis": "nevus (Bowen)"}, metadata={"institution": "Clinic of Dr. Bowen"}
    )
    scanner = TextScanner.from_records(card, [record])
    assert scanner.clean(record) == (record, Counter())
    stored = scanner.clean_card(card)
    assert stored["labels"]["diagnosis"]["values"] == {"[removed 1]": "nevus (Bowen)"}
    assert SourceCard.model_validate(stored).name == "clinic"  # the index is read back


def test_a_column_that_repeats_the_ids_is_caught_even_if_they_are_short() -> None:
    for column, value in (("tabular.mrn", float), ("tabular.number", str), ("labels.number", str)):
        part, _, key = column.partition(".")
        records = [
            make_record(n + 2, f"{n}.jpg", patient_id=f"{n + 1:03d}", **{part: {key: value(n + 1)}}) for n in range(9)
        ]
        with pytest.raises(UserError, match=rf"line 2 \(and 8 more rows\), {column}: holds a patient id"):
            TextScanner.from_records(make_card(), records)
    ages = [make_record(n + 2, f"{n}.jpg", patient_id=str(n), tabular={"size": float(n % 7)}) for n in range(40)]
    TextScanner.from_records(make_card(), ages)  # 7 of 40 agree by chance


def test_lesions_numbered_by_patient_are_no_ids() -> None:
    records = [make_record(n + 2, f"{n}.jpg", patient_id=f"P{n}xy", lesion_id="lesion 1001") for n in range(3)]
    caption = make_record(9, "z.jpg", caption="lesion 1001 is red")
    per_patient = TextScanner.from_records(make_card(lesion_id_scope="patient"), records)
    assert per_patient.clean(caption)[0].caption == "lesion 1001 is red"
    assert TextScanner.from_records(make_card(), records).clean(caption)[0].caption == "[removed] is red"


def test_great_ages_are_reported() -> None:
    records = [make_record(n + 2, f"{n}.jpg", metadata={"age": age}) for n, age in enumerate((89.0, 90.0))]
    scanner = TextScanner.from_records(make_card(), records)
    assert [dict(scanner.clean(record)[1]) for record in records] == [{}, {"age.above_89": 1}]


def test_a_camera_named_after_its_owner_or_a_patient_is_dropped() -> None:
    record = make_record(patient_id="PAT_0042", identifying=("Dupont",))
    scanner = TextScanner.from_records(make_card(), [record])
    assert scanner.clean_device("Canon EOS 5D Mark IV", record) == ("Canon EOS 5D Mark IV", Counter())
    assert scanner.clean_device(None, record) == (None, Counter())
    for device, kind in (("Canon pat 0042", "patient_id"), ("Dupont EOS", "identifying"), ("Sony 2019-03-12", "date")):
        assert scanner.clean_device(device, record) == (None, Counter({f"device.{kind}": 1}))


# ------------------------------------------------------------------------------------------------ scale


def test_a_narrowed_scanner_is_small_and_judges_the_same() -> None:
    records = [
        make_record(
            n + 2,
            f"IMG_{n:06d}.jpg",
            patient_id=f"PAT_{n // 2:05d}",
            caption=f"as IMG_{(n * 7) % 3000:06d}, PAT {n:05d} and photo {n}",
            identifying=(f"Dupont{chr(97 + n % 26)}",),
        )
        for n in range(2000)
    ]
    scanner = TextScanner.from_records(make_card(), records)
    assert len(pickle.dumps(scanner)) < 40 * len(records)
    few = records[100:120]
    narrow = pickle.loads(pickle.dumps(scanner.narrow(few)))
    assert len(narrow.ids) <= 60 and len(pickle.dumps(narrow)) < 2000
    assert [narrow.clean(record) for record in few] == [scanner.clean(record) for record in few]
    assert any("[removed]" in (scanner.clean(record)[0].caption or "") for record in few)


@pytest.mark.real
def test_no_false_alarm_on_real_tables(real_data: Path) -> None:
    def read(name: str) -> list[dict[str, str]]:
        with (real_data / "metadata" / name).open(encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))

    tables = [
        [
            make_record(
                line,
                f"{row['md5hash']}.jpg",
                caption=f"{row['label'].capitalize()} ({row['nine_partition_label']}), {row['three_partition_label']}",
                labels={name: row[name] for name in ("label", "nine_partition_label", "three_partition_label")},
                tabular={"qc": row["qc"]},
            )
            for line, row in enumerate(read("fitzpatrick17k.csv"), start=2)
        ],
        [
            make_record(
                line,
                f"{row['image_id']}.jpg",
                lesion_id=row["lesion_id"],
                metadata={"anatomic_site": row["localization"]},
                labels={name: row[name] for name in ("dx", "dx_type")},
            )
            for line, row in enumerate(read("HAM10000_metadata.csv"), start=2)
        ],
    ]
    for records in tables:
        scanner = TextScanner.from_records(make_card(), records)  # raises for a field
        found = sum((scanner.clean(record)[1] for record in records[::5]), Counter[str]())
        assert not found
