"""What a draft rests on: roles of columns, values, aliases of patients and names of files, each rule by its cases."""

from collections import Counter
from itertools import combinations

import pytest

from panfm.shards.drafting.aliases import Person, propose_aliases
from panfm.shards.drafting.columns import find_diagnosis, guess_columns, parse_age, parse_phototype, read_dates
from panfm.shards.drafting.files import match_files
from panfm.shards.drafting.values import (
    map_confirmation,
    map_diagnoses,
    map_malignant,
    map_modality,
    map_sex,
    name_label,
)
from panfm.shards.drafting.vocabulary import DIAGNOSES, DOUBT, HEADERS, ICD10, SYNONYMS, fold


def rows_of(column: str, *cells: str) -> list[tuple[int, dict[str, str]]]:
    return [(line, {column: cell}) for line, cell in enumerate(cells, 2)]


# ------------------------------------------------------------------------------------------------ vocabulary


def test_the_vocabulary_is_folded_and_says_one_thing() -> None:
    for words in HEADERS.values():
        assert all(fold(word) == word for word in words)
    owners = Counter(word for words in HEADERS.values() for word in set(words))
    assert [word for word, count in owners.items() if count > 1] == []
    meanings = {fold(word): set() for _, _, words in DIAGNOSES for word in words}
    for name, _, words in DIAGNOSES:
        for word in words:
            meanings[fold(word)].add(name)
    assert {word: names for word, names in meanings.items() if len(names) > 1} == {}
    assert ICD10["melanoma"] == "C43.9" and ICD10["nevus"] == "D22.9" and ICD10["basal_cell_carcinoma"] == "C44.9"
    assert [word for word in SYNONYMS if DOUBT.search(word)] == ["actinic keratosis or bowen disease"]
    assert "ka" not in SYNONYMS and "ks" not in SYNONYMS  # keratoacanthoma or keratose actinique?


@pytest.mark.parametrize(
    ("text", "folded"),
    [("N° Dossier", "n dossier"), ("NÆVUS", "naevus"), ("PatientID", "patient id"), ("Größe_(mm)", "grosse mm")],
)
def test_folding(text: str, folded: str) -> None:
    assert fold(text) == folded


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("Naevus", "nevus"),
        ("carcinome basocellulaire", "basal_cell_carcinoma"),
        ("CSC", "squamous_cell_carcinoma"),
        ("Kératose séborrhéique", "seborrheic_keratosis"),
        ("Aktinische Keratose", "actinic_keratosis"),
        ("C43.5", "melanoma"),
        ("D225", "nevus"),
        ("C44.3", None),  # basal or squamous
        ("mélanome ?", None),
        ("suspicion de mélanome", None),
        ("kyste", None),
    ],
)
def test_diagnoses(cell: str, name: str | None) -> None:
    assert find_diagnosis(cell) == name


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("column", "cells", "role"),
    [
        ("Sexe du patient", ("F", "H"), "sex"),
        ("sex", ("7", "8"), None),  # the cells belie the name
        ("x1", ("F", "H", "F"), "sex"),
        ("x1", ("F", "F"), None),  # one letter in all cells is no proof
        ("x1", ("II", "IV", "III"), "phototype"),
        ("x1", ("2", "4", "3"), None),
        ("x1", ("a.b@example.org", "c@example.org"), "identifying"),
        ("x1", ("06 12 34 56 78", "01.23.45.67.89"), "identifying"),
        ("x1", ("naevus", "mélanome", "cicatrice"), "diagnosis"),
        ("Nom du patient", ("Dupont", "Durand"), "family_name"),
        ("Date de naissance", ("1/2/1960", "1961"), "birth_date"),
        ("Date photo", ("01/02/2019", "03/02/2019"), "visit_date"),
        ("Histologie", ("oui", "non"), "confirmed_by"),
        ("Histologie", ("CBC", "naevus"), "diagnosis"),
        ("Lecteur 1", ("naevus", "CBC"), "diagnosis"),
        ("Lecteur 1", ("Dr Martin", "Dr Petit"), "identifying"),
        ("Taille", ("1", "2"), None),
        ("IPP", ("", "NR"), None),  # a column without a known cell is no column
    ],
)
def test_roles(column: str, cells: tuple[str, ...], role: str | None) -> None:
    guesses, _ = guess_columns([column], rows_of(column, *cells))
    assert [guess.role for guess in guesses] == ([role] if role else [])


def test_a_second_patient_number_is_never_stored() -> None:
    header = ["IPP", "N° dossier", "Date", "Date examen"]
    rows = [(2, dict(zip(header, ("1", "2", "1/2/2020", "2/2/2020"), strict=True)))]
    guesses, notes = guess_columns(header, rows)
    assert {guess.column: guess.role for guess in guesses} == {
        "IPP": "patient_id",
        "N° dossier": "identifying",
        "Date": "visit_date",
    }
    assert notes == ("column 'Date examen' could be visit_date too; 'Date' was taken",)


@pytest.mark.parametrize(
    ("cells", "date_format", "alternative", "misfits"),
    [
        (("13/02/2020", "01/02/2020"), "%d/%m/%Y", None, ()),
        (("02/13/2020", "02/01/2020"), "%m/%d/%Y", None, ()),
        (("01/02/2020", "03/04/2020"), "%d/%m/%Y", "%m/%d/%Y", ()),
        (("01/01/2020", "02/02/2020"), "%d/%m/%Y", None, ()),  # the same either way
        (("13.02.20", "NR", ""), "%d.%m.%y", None, ()),
        (("2020-02-01", "2020-02-02T08:30:00", "2020-03-01"), "%Y-%m-%d", None, (3,)),
        (("2020-02-01", "13/02/2020", "14/02/2020"), "%d/%m/%Y", None, (2,)),
    ],
)
def test_dates(cells: tuple[str, ...], date_format: str, alternative: str | None, misfits: tuple[int, ...]) -> None:
    reading = read_dates(rows_of("d", *cells), "d", day_first=True)
    assert reading is not None
    assert (reading.format, reading.alternative, reading.misfits) == (date_format, alternative, misfits)
    assert read_dates(rows_of("d", "spring", "autumn"), "d", day_first=True) is None


def test_numbers_with_words() -> None:
    assert [
        parse_phototype(cell) for cell in ("III", "2", "3.0", "type IV", "II-III", "2 à 3", "III/IV", "VII", "x")
    ] == [*((3, 3), (2, 2), (3, 3), (4, 4), (2, 3), (2, 3), (3, 4), None, None)]
    assert [parse_age(cell) for cell in ("45", "45,5", "45 ans", "3 years", "200", "12/3", "")] == [
        *(45, 45.5, 45, 3, None, None, None)
    ]


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("cells", "mapped"),
    [
        ("FH", ["female", "male"]),
        ("FM", ["female", "male"]),
        ("MW", ["male", "female"]),
        ("HM", ["male", None]),  # hombre and mujer, or homme and masculin
        ("FHM", ["female", "male", None]),
        ("M", [None]),
        ("12", [None, None]),
    ],
)
def test_sexes(cells: str, mapped: list[str | None]) -> None:
    found = map_sex(Counter(dict.fromkeys(cells, 1)))
    assert [one.value for one in found] == mapped
    assert all((one.value is None) == (one.state == "open") for one in found)


def test_modalities_and_confirmations() -> None:
    cells = ("Photo dermoscopique", "photo clinique", "corps entier", "lame HES", "photo et dermoscopie", "scanner")
    assert [one.value for one in map_modality(Counter(dict.fromkeys(cells, 1)))] == [
        *("dermoscopic", "clinical", "total_body", "histopathology", None, None)
    ]
    cells = ("oui", "non", "Suivi", "pas d'histologie")
    assert [(one.value, one.state) for one in map_confirmation(Counter(dict.fromkeys(cells, 1)), "Histologie ?")] == [
        *(("histopathology", "known"), (None, "known"), ("follow_up", "known"), (None, "open"))
    ]
    assert map_confirmation(Counter(oui=1), "Confirmation")[0].state == "open"  # confirmed by what?


def test_malignancy() -> None:
    def values(column: str, *cells: str) -> list[str | None]:
        return [one.value for one in map_malignant(Counter(dict.fromkeys(cells, 1)), column)]

    assert values("Malin", "oui", "0") == ["malignant", "benign"]
    assert values("Bénin/Malin", "oui", "malin") == [None, "malignant"]


def test_open_diagnoses_say_why() -> None:
    cells = ("naevus", "mélanome vs naevus", "naevus dysplasique remanié", "C44.9", "kyste")
    found = {one.raw: one for one in map_diagnoses("diagnosis", Counter(dict.fromkeys(cells, 2)))}
    assert (found["naevus"].value, found["naevus"].code, found["naevus"].count) == ("nevus", "D22.9", 2)
    assert "names of" in found["mélanome vs naevus"].remark and "question" in found["mélanome vs naevus"].remark
    assert "atypical_nevus" in found["naevus dysplasique remanié"].remark
    assert "joins several" in found["C44.9"].remark and found["kyste"].remark == "not known to panfm"
    assert {one.state for raw, one in found.items() if raw != "naevus"} == {"open"}


def test_labels_are_named_after_what_they_rest_on() -> None:
    assert [name_label(column) for column in ("Diagnostic histologique", "Klinische Diagnose", "Dx")] == [
        *("diagnosis_histology", "diagnosis_clinical", "diagnosis")
    ]


# ------------------------------------------------------------------------------------------------ aliases


def propose(*ids: str, **facts: set) -> dict[frozenset[str], tuple[str, bool]]:
    persons = {one: Person(1, **{name: set(values) for name, values in facts.items()}) for one in ids}
    return {frozenset((one.patient_id, one.same_as)): (one.why, one.weak) for one in propose_aliases(persons)}


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ("p007", "P007", "differ in case"),
        ("P 007", "P007", "differ in blanks"),
        ("P-007", "P007", "differ in signs"),
        ("Zoe Muster", "Zoé Muster", "differ in accents"),
        ("p-7", "P007", "differ in leading zeros"),
        ("0012", "12", "differ in leading zeros"),
        ("01-2", "1-02", "differ in leading zeros"),
        ("O12345", "012345", "differ in signs that look alike (O and 0, l and 1)"),
        ("Dupont Marie", "Marie DUPONT", "same names in another order"),
    ],
)
def test_one_patient_written_two_ways(one: str, other: str, why: str) -> None:
    assert propose(one, other) == {frozenset((one, other)): (why, False)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1-12", "11-2"),
        ("A-01", "A10"),
        ("P1", "P10"),
        ("12", "21"),
        ("100001", "100002"),
        ("Dupont Marie", "Dupont Paul"),
    ],
)
def test_two_patients_stay_two(one: str, other: str) -> None:
    assert propose(one, other, sexes={"female"}, ages={45.0}) == {}


def test_an_id_that_could_be_either_is_neither() -> None:
    assert propose("1-12", "11-2", "112") == {}
    assert propose("1-12", "112") == {frozenset(("1-12", "112")): ("differ in signs", True)}


def test_typing_errors_are_weak_and_need_a_witness() -> None:
    pair = frozenset(("IPP800123", "IPP800132"))
    assert propose(*pair) == {}
    assert propose(*pair, sexes={"f"}, births={"1950-01-01"})[pair][1]
    assert propose(*pair, sexes={"f"}, ages={45.0}) == {}  # numbers given in a row look like this too
    names = frozenset(("Dupont Marie", "Dupond Marie"))
    assert propose(*names, sexes={"f"}, ages={45.0})[names] == (
        "one sign differs, same sex and birth date or age",
        True,
    )
    persons = {"IPP800123": Person(1, {"f"}, {"1950"}), "IPP800132": Person(1, {"f"}, {"1951"})}
    assert propose_aliases(persons) == ()


def test_names_lesions_and_contradictions() -> None:
    persons = {
        "A1": Person(1, {"f"}, {"1950"}, names={"Dupont Élodie"}),
        "B2": Person(3, {"f"}, {"1950"}, names={"ELODIE DUPONT"}),
        "C3": Person(1, {"f"}, {"1960"}, names={"Dupont Elodie"}),
        "X-1": Person(1, {"f"}, {"1950"}),
        "X1": Person(2, {"m"}, {"1951"}),
        "D4": Person(1, lesions={"L9"}),
        "E5": Person(1, lesions={"L9"}),
        "F6": Person(1, {"f"}, ages={20.0}, lesions={"1"}),  # lesions numbered alike prove nothing of others
        "G7": Person(1, {"m"}, ages={20.0}, lesions={"1"}),
        "H8": Person(1, {"f"}, ages={60.0}, lesions={"1"}),
    }
    found = {one.patient_id: one for one in propose_aliases(persons)}
    assert found["A1"].same_as == "B2" and found["A1"].why == "same name and birth date under two ids"
    assert not found.keys() & {"C3", "F6", "G7", "H8"}
    assert found["X-1"].weak and found["X-1"].why == "differ in signs; but they differ in sex and birth date"
    assert (found["D4"].same_as, found["D4"].weak) == ("E5", True)


def test_lesions_that_meet_by_chance_propose_nothing() -> None:
    persons = {f"{kind}{i * 17:04d}": Person(1, lesions={str(i)}) for kind in ("A", "B") for i in range(3)}
    assert len(propose_aliases(persons)) == 3
    persons |= {f"{kind}{i * 17:04d}": Person(1, lesions={str(i)}) for kind in ("A", "B") for i in range(4)}
    assert propose_aliases(persons) == ()


def test_three_spellings_lead_to_the_commonest() -> None:
    persons = {"7": Person(2), "007": Person(5), "07": Person(1), "8": Person(9)}
    assert {(one.patient_id, one.same_as) for one in propose_aliases(persons)} == {("7", "007"), ("07", "007")}


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("cells", "files", "way", "templates"),
    [
        (("a/1.jpg", "a/2.jpg"), ("a/1.jpg", "a/2.jpg"), "path", ()),
        (("a\\1.jpg", ".\\a\\2.jpg"), ("a/1.jpg", "a/2.jpg"), "path", ()),
        (("1.jpg", "2.jpg"), ("x/y/1.jpg", "x/y/2.jpg"), "templates", ("x/y/{f}",)),
        (("1", "2"), ("x/1.jpg", "x/2.png"), "templates", ("x/{f}.jpg", "x/{f}.png")),
        (("C:\\old\\1.jpg", "C:\\old\\2.jpg"), ("x/1.jpg", "x/2.jpg"), "templates", ("x/{f (file)}",)),
        (("1.TIF", "2.TIF"), ("x/1.jpg", "x/2.jpg"), "templates", ("x/{f (file)}.jpg",)),
        (("a/1", "b/1"), ("p/a/1.jpg", "p/b/1.jpg"), "templates", ("p/{f}.jpg",)),
        (("IMG1", "IMG2"), ("img1.jpg", "img2.jpg"), "by_cell", ()),
        (("1012", "1013"), ("S_1012_a.jpg", "S_1013_b.jpg"), "by_file", ()),
        (("77", "78"), ("1.jpg", "2.jpg"), None, ()),
    ],
)
def test_files_of_rows(
    cells: tuple[str, ...], files: tuple[str, ...], way: str | None, templates: tuple[str, ...]
) -> None:
    match = match_files(["f"], rows_of("f", *cells), files, None)
    assert (match.way if match else None) == way
    if match:
        assert list(match.files.values()) == [(file,) for file in files]
        assert match.templates == templates


def test_one_name_in_two_folders_is_no_match() -> None:
    rows = rows_of("f", "1.jpg", "2.jpg")
    match = match_files(["f"], rows, ("a/1.jpg", "b/1.jpg", "b/2.jpg"), "f")
    assert match is not None and match.files == {2: (), 3: ("b/2.jpg",)}


def test_the_column_that_finds_most_files_wins() -> None:
    files = [f"{one}{other}.jpg" for one, other in combinations("abcd", 2)]
    rows = [(line, {"n": str(line), "photo": file}) for line, file in enumerate(files, 2)]
    match = match_files(["n", "photo"], rows, [*files, "2.jpg"], "n")
    assert match is not None and match.column == "photo"
