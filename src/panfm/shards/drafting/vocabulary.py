"""What hospitals write: header names, values and diagnoses in French, English, German and Spanish, as plain data.

A draft looks words up here after `fold`; nothing else in panfm does. ICD-10 codes are those of the WHO's edition, and
only where one is well established; a diagnosis without a code gets none.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Literal

Role = Literal[
    "path",
    "mask_path",
    "patient_id",
    "lesion_id",
    "visit_date",
    "age",
    "sex",
    "phototype",
    "anatomic_site",
    "diagnosis",
    "malignant",
    "confirmed_by",
    "modality",
    "device",
    "institution",
    "official_split",
    "family_name",
    "given_name",
    "birth_date",
    "identifying",
    "free_text",
]

NEVER_STORED: tuple[Role, ...] = ("family_name", "given_name", "birth_date", "identifying")


@lru_cache(maxsize=1 << 17)  # columns repeat their texts, and every look at a cell begins here
def fold(text: str) -> str:
    """Lower case, no accents, every run of other signs one blank: "N° Dossier" -> "n dossier", "Nævus" -> "naevus"."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)  # PatientId
    for ligature, letters in (("æ", "ae"), ("Æ", "ae"), ("œ", "oe"), ("Œ", "oe"), ("ß", "ss"), ("°", " ")):
        text = text.replace(ligature, letters)
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return " ".join(re.findall(r"[a-z0-9]+", plain.casefold()))


def _words(text: str) -> tuple[str, ...]:
    """The entries of a block of synonyms, separated by commas or lines."""
    return tuple(entry.strip() for entry in re.split(r"[,\n]", text) if entry.strip())


# Folded header names. A header that holds one of several words or more ("sexe du patient") counts as a weaker hit.
HEADERS: dict[Role, tuple[str, ...]] = {
    "path": _words(
        """file, files, filename, file name, path, file path, filepath, image, image file, image name, image path, img,
        image id, isic id, photo, photo file, photo name, picture, fichier, nom fichier, nom du fichier, nom image,
        nom de l image, nom photo, chemin, chemin fichier, cliche, datei, dateiname, bild, bilddatei, bildname, foto,
        pfad, archivo, nombre archivo, nombre de archivo, nombre del archivo, imagen, fichero, ruta"""
    ),
    "mask_path": _words(
        "mask, masks, mask path, mask file, mask image, segmentation, segmentation mask, masque, fichier masque, maske"
    ),
    "patient_id": _words(
        """patient, patient id, patientid, id patient, patient no, patient nr, patient number, patient code, pat id,
        subject, subject id, subjectid, participant id, case id, code patient, n patient, no patient, num patient,
        numero patient, numero de patient, identifiant patient, identifiant, ipp, nip, mrn, medical record number,
        hospital number, record number, hospital id, n dossier, no dossier, num dossier, numero dossier,
        numero de dossier, dossier, n ipp, no ipp, patienten id, patientennummer, patienten nr, patientennr, pid,
        fallnummer, fall nr, paciente, id paciente, numero paciente, numero de historia, historia clinica, nhc,
        n historia clinica"""
    ),
    "lesion_id": _words(
        """lesion, lesion id, lesionid, id lesion, lesion no, lesion nr, lesion number, n lesion, no lesion,
        num lesion, numero lesion, numero de lesion, code lesion, identifiant lesion, lasion, laesion, lasions id,
        laesions id, lasionsnummer, laesionsnummer, lasion nr, laesion nr, numero de la lesion"""
    ),
    "visit_date": _words(
        """visit date, date visit, date of visit, exam date, examination date, date of examination, consultation date,
        acquisition date, image date, photo date, date taken, study date, date, date consultation,
        date de consultation, date de la consultation, date visite, date de visite, date examen, date d examen,
        date de l examen, date photo, date de la photo, date de prise de vue, date prise de vue, date image,
        date cliche, date acquisition, untersuchungsdatum, datum, aufnahmedatum, datum der untersuchung, besuchsdatum,
        fecha, fecha consulta, fecha de consulta, fecha visita, fecha de visita, fecha de la visita, fecha foto"""
    ),
    "age": _words(
        """age, age years, age at visit, age at exam, age at diagnosis, patient age, age approx, age patient,
        age ans, age consultation, age a la consultation, age au diagnostic, alter, alter jahre, edad, edad anos"""
    ),
    "sex": _words("sex, gender, sexe, genre, geschlecht, sexo, genero"),
    "phototype": _words(
        """phototype, fitzpatrick, skin type, skin phototype, fitzpatrick skin type, fitzpatrick scale,
        fitzpatrick type, fst, phototype cutane, phototype fitzpatrick, phototype de fitzpatrick, hauttyp,
        hauttyp fitzpatrick, fototipo, fototipo fitzpatrick"""
    ),
    "anatomic_site": _words(
        """site, body site, anatomic site, anatomical site, anatom site, anatom site general, location, localization,
        localisation, body part, body location, region, localisation anatomique, localisation lesion,
        localisation de la lesion, site anatomique, siege, zone, lokalisation, korperregion, koerperregion,
        lokalisierung, localizacion, localizacion anatomica, sitio anatomico, zona"""
    ),
    "diagnosis": _words(
        """diagnosis, diagnoses, dx, final diagnosis, clinical diagnosis, histological diagnosis, histologic diagnosis,
        pathology diagnosis, pathological diagnosis, label, class, diagnostic, diagnostic final, diagnostic clinique,
        diagnostic histologique, diagnostic retenu, diagnostic anapath, dg, diag, diagnose, enddiagnose,
        klinische diagnose, histologische diagnose, diagnostico, diagnostico final, diagnostico clinico,
        diagnostico histologico"""
    ),
    "malignant": _words(
        """malignant, malignancy, benign malignant, malin, malignite, maligne, benin malin, nature, bosartig,
        boesartig, malignitat, malignitaet, dignitat, dignitaet, maligno, malignidad"""
    ),
    "confirmed_by": _words(
        """confirmed by, confirmation, diagnosis confirm type, dx type, ground truth, confirmation type, histology,
        histopathology, biopsy, biopsed, biopsied, histologie, histopathologie, anapath, biopsie, preuve,
        mode de confirmation, confirmation histologique, type de confirmation, confirme par, histologie gesichert,
        histologisch gesichert, gesichert durch, bestatigung, bestaetigung, biopsia, histologia, confirmacion"""
    ),
    "modality": _words(
        """modality, image type, type of image, imaging modality, imaging type, type d image, type image,
        type de photo, type photo, type de cliche, modalite, modalite d imagerie, bildart, bildtyp, modalitat,
        modalitaet, aufnahmeart, tipo de imagen, tipo imagen, modalidad"""
    ),
    "device": _words(
        """device, camera, camera model, device model, dermatoscope, dermoscope, appareil, appareil photo, modele,
        gerat, geraet, kamera, dermatoskop, dispositivo, camara, dermatoscopio, equipo"""
    ),
    "institution": _words(
        """institution, hospital, center, centre, clinic, department, hopital, etablissement, service,
        centre hospitalier, klinik, krankenhaus, zentrum, centro, clinica"""
    ),
    "official_split": _words("split, fold, set, subset, partition, ensemble, jeu"),
    "family_name": _words(
        """name, names, full name, fullname, last name, lastname, surname, family name, patient name, name of patient,
        nom, nom patient, nom du patient, nom de famille, nom usuel, nom de naissance, nom prenom, nom et prenom,
        nom jeune fille, nachname, familienname, patientenname, name des patienten, vorname nachname, name vorname,
        nombre completo, apellido, apellidos, nombre y apellidos, nombre paciente, nombre del paciente"""
    ),
    "given_name": _words("first name, firstname, given name, prenom, prenoms, prenom patient, vorname, nombre"),
    "birth_date": _words(
        """birth date, birthdate, birthday, date of birth, dob, year of birth, birth year, date naissance,
        date de naissance, naissance, ne le, nee le, ddn, annee de naissance, annee naissance, geburtsdatum, geburtstag,
        geb datum, geboren am, geburtsjahr, fecha de nacimiento, fecha nacimiento, nacimiento, ano de nacimiento"""
    ),
    "identifying": _words(
        """phone, phone number, telephone, tel, mobile, portable, email, e mail, mail, courriel, address, adresse,
        street, postcode, zip, zip code, code postal, ville, city, ssn, social security number, nhs number, nir,
        n secu, numero de securite sociale, securite sociale, num secu, ins, telefon, handy, strasse, plz, ort,
        wohnort, versichertennummer, krankenkassennummer, telefono, correo, direccion, codigo postal, ciudad, dni,
        nie, nss, tarjeta sanitaria, iep, n sejour, numero de sejour, medecin, physician, doctor, arzt, medico,
        dermatologue, dermatologist, referring physician, medecin traitant"""
    ),
    "free_text": _words(
        """comment, comments, note, notes, remark, remarks, description, report, history, commentaire, commentaires,
        remarque, remarques, observation, observations, compte rendu, antecedents, conclusion, motif, bemerkung,
        bemerkungen, kommentar, befund, befundtext, anamnese, comentario, comentarios, observaciones, informe"""
    ),
}
# Too general to decide a longer header: "age du patient" is an age, "date de la photo" a date.
GENERAL_WORDS = frozenset(
    _words(
        """patient, subject, paciente, lesion, lasion, laesion, image, photo, foto, bild, picture, imagen, cliche,
        date, datum, fecha, set, jeu, ensemble, fold, nature, service, region, zone, zona, class, label, name, nom,
        nombre, note, notes, report, history, identifiant, dossier, ins, ort, motif, modele, nie, centre, center"""
    )
)
READER = re.compile(
    r"\b(?:lecteur|lecture|reader|rater|grader|annotator|annotateur|observer|observateur|expert|leser|befunder|lector|"
    r"evaluador)\s*([0-9]{1,2}|[a-h])\b"
)

YES = frozenset(_words("yes, y, true, 1, oui, o, vrai, ja, j, wahr, si, s, x, verdadero, positive, positif, positiv"))
NO = frozenset(_words("no, n, false, 0, non, faux, nein, falsch, falso, negative, negatif, negativ"))
MISSING = frozenset(
    _words(
        """na, n a, nan, null, none, nd, n d, nr, nc, ns, unknown, unk, not known, not available, missing, inconnu,
        inconnue, non renseigne, non renseignee, non precise, non connu, indetermine, non fait, unbekannt, k a, ka,
        keine angabe, fehlt, desconocido, desconocida, no consta, sin dato, sin datos"""
    )
)
MISSING_SIGNS = frozenset({"-", "--", "?", "??", "/", ".", "_", "#N/A", "#NV", "#VALUE!", "#REF!"})

# M alone may be masculin, Mann, male or mujer; whether it can be mapped is decided beside the other values.
SEXES: dict[str, str] = {
    **dict.fromkeys(_words("f, female, femme, feminin, feminine, fille, woman, w, weiblich, frau, mujer"), "female"),
    **dict.fromkeys(_words("femenino, femenina, fem, girl"), "female"),
    **dict.fromkeys(_words("h, male, homme, masculin, masculine, garcon, man, mann, mannlich, maennlich"), "male"),
    **dict.fromkeys(_words("hombre, varon, masculino, masc, boy"), "male"),
    **dict.fromkeys(_words("other, autre, divers, d, otro, x, non binary, non binaire, intersex"), "other"),
}

MODALITY_WORDS: dict[str, tuple[str, ...]] = {
    "dermoscopic": _words(
        """dermoscopy, dermoscopic, dermatoscopy, dermatoscopic, dermoscope, dermatoscope, dermoscopie, dermatoscopie,
        dermoscopique, dermatoscopique, dermatoskopie, dermatoskopisch, auflichtmikroskopie, auflicht, dermatoscopia,
        dermoscopia, dermatoscopica, epiluminescence, elm, videodermoscopie"""
    ),
    "total_body": _words(
        """total body, total body photography, tbp, whole body, corps entier, vue d ensemble, overview, full body,
        ganzkorper, ganzkoerper, ubersicht, uebersicht, cuerpo entero, cuerpo completo, cartographie"""
    ),
    "histopathology": _words(
        """histopathology, histology, histo, histologie, histopathologie, lame, lames, slide, wsi, anapath, biopsie,
        microscopie, schnitt, histologia, histopatologia, pathology, anatomopathologie"""
    ),
    "clinical": _words(
        """clinical, clinic, clinique, cliniques, photo, photos, photograph, photographie, photographies, photography,
        macro, macroscopic, macroscopique, makro, close up, closeup, klinisch, foto, fotos, clinica, clinicas,
        smartphone, camera, kamera"""
    ),
}

CONFIRMATIONS: dict[str, tuple[str, ...]] = {
    "histopathology": _words(
        """histopathology, histology, histo, biopsed, biopsied, histologic, histological, histologie, histologique,
        histopathologie, anapath, anatomopathologie, biopsy, biopsie, biopsia, pathology, exerese, excision,
        histologisch, histologia, histopatologia"""
    ),
    "follow_up": _words(
        "follow up, followup, serial imaging, suivi, surveillance, evolution, verlauf, verlaufskontrolle, seguimiento"
    ),
    "consensus": _words("consensus, expert consensus, panel, staff, rcp, konsens, consenso, concertation"),
    "confocal": _words("confocal, rcm, microscopie confocale, confocal microscopy, konfokal, vivascope, lcrm"),
    "single_expert": _words("single expert, single image expert, expert seul, un expert, ein experte"),
}

SPLITS = frozenset(_words("train, training, test, testing, val, valid, validation, dev, eval"))

MALIGNANT: dict[str, str] = {
    **dict.fromkeys(_words("malignant, malin, maligne, bosartig, boesartig, maligno, maligna, cancer"), "malignant"),
    **dict.fromkeys(_words("benign, benin, benigne, gutartig, benigno, benigna"), "benign"),
}

# Our name, ICD-10 code (None: the name joins diseases of several codes), folded synonyms.
DIAGNOSES: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    (
        "melanoma",
        "C43.9",
        _words(
            """melanoma, melanome, melanom, mel, mm, malignant melanoma, melanome malin, malignes melanom,
            melanoma maligno, melanome invasif, invasive melanoma, invasives melanom, superficial spreading melanoma,
            ssm, melanome ssm, melanome a extension superficielle, superfiziell spreitendes melanom, nodular melanoma,
            melanome nodulaire, nodulares melanom, noduläres melanom, acral melanoma, acral lentiginous melanoma,
            melanome acral, akrolentiginoses melanom, lentigo maligna melanoma, lmm, melanome lentigo maligna"""
        ),
    ),
    (
        "melanoma_in_situ",
        "D03.9",
        _words("melanoma in situ, melanome in situ, in situ melanom, melanom in situ, mis"),
    ),
    ("lentigo_maligna", "D03.9", _words("lentigo maligna, lentigo malin, melanose de dubreuilh, lm")),
    (
        "basal_cell_carcinoma",
        "C44.9",
        _words(
            """basal cell carcinoma, bcc, carcinome basocellulaire, cbc, basocellulaire, basaliom, basalzellkarzinom,
            bzk, carcinoma basocelular, epithelioma basocellulaire, nodular basal cell carcinoma,
            carcinome basocellulaire nodulaire, carcinome basocellulaire superficiel"""
        ),
    ),
    (
        "squamous_cell_carcinoma",
        "C44.9",
        _words(
            """squamous cell carcinoma, scc, cscc, carcinome epidermoide, carcinome epidermoide cutane,
            carcinome spinocellulaire, csc, ce, cec, spinaliom, plattenepithelkarzinom, pek, stachelzellkarzinom,
            carcinoma espinocelular, carcinoma epidermoide, carcinoma escamoso"""
        ),
    ),
    (
        "bowen_disease",
        "D04.9",
        _words(
            """bowen disease, bowen s disease, bowens disease, bowen, maladie de bowen, morbus bowen, m bowen,
            enfermedad de bowen, squamous cell carcinoma in situ, scc in situ, carcinome epidermoide in situ"""
        ),
    ),
    (
        "actinic_keratosis",
        "L57.0",
        _words(
            """actinic keratosis, actinic keratoses, solar keratosis, ak, ack, keratose actinique,
            keratoses actiniques, keratose solaire, aktinische keratose, aktinische keratosen, solare keratose,
            queratosis actinica"""
        ),
    ),
    ("actinic_keratosis_or_bowen_disease", None, _words("akiec")),
    ("keratoacanthoma", "L85.8", _words("keratoacanthoma, keratoacanthome, keratoakanthom, queratoacantoma")),
    ("merkel_cell_carcinoma", "C44.9", _words("merkel cell carcinoma, carcinome de merkel, merkelzellkarzinom, mcc")),
    (
        "nevus",
        "D22.9",
        _words(
            """nevus, naevus, nevi, naevi, nv, nev, melanocytic nevus, melanocytic naevus, naevus melanocytaire,
            naevus naevocellulaire, naevocellular nevus, naevuszellnaevus, navuszellnavus, nzn, navus, mole,
            grain de beaute, grains de beaute, muttermal, lunar, nevus melanocitico, common nevus, naevus commun,
            naevus banal, naevus benin, compound nevus, naevus compose, junctional nevus, naevus jonctionnel,
            dermal nevus, naevus dermique, nevo, melanozytarer navus, melanozytaerer naevus"""
        ),
    ),
    (
        "atypical_nevus",
        "D22.9",
        _words(
            """atypical nevus, atypical naevus, dysplastic nevus, dysplastic naevus, clark nevus, naevus atypique,
            naevus dysplasique, naevus de clark, dysplastischer navus, dysplastischer naevus, atypischer naevus,
            nevus displasico, nevus atipico"""
        ),
    ),
    (
        "congenital_nevus",
        "D22.9",
        _words("congenital nevus, congenital naevus, naevus congenital, kongenitaler naevus, nevus congenito"),
    ),
    ("blue_nevus", "D22.9", _words("blue nevus, blue naevus, naevus bleu, blauer naevus, blauer navus, nevus azul")),
    ("spitz_nevus", "D22.9", _words("spitz nevus, spitz naevus, naevus de spitz, spitznaevus, reed nevus")),
    (
        "seborrheic_keratosis",
        "L82",
        _words(
            """seborrheic keratosis, seborrhoeic keratosis, seborrheic keratoses, sk, sek, keratose seborrheique,
            keratoses seborrheiques, verrue seborrheique, verrues seborrheiques, seborrhoische keratose,
            seborrhoeische keratose, queratosis seborreica, alterswarze"""
        ),
    ),
    ("benign_keratosis", None, _words("bkl, benign keratosis, keratose benigne, benign keratosis like lesion")),
    (
        "solar_lentigo",
        "L81.4",
        _words("solar lentigo, lentigo solaire, lentigo senile, lentigo solaris, lentigo solar, lentigo actinique"),
    ),
    (
        "dermatofibroma",
        "D23.9",
        _words("dermatofibroma, dermatofibrome, dermatofibrom, df, histiocytofibrome, histiozytom, histiocitoma"),
    ),
    (
        "hemangioma",
        "D18.0",
        _words(
            """hemangioma, haemangioma, hemangiome, hamangiom, haemangiom, angioma, angiome, angiom, cherry angioma,
            angiome rubis, tache rubis, angiome senile, angioma senil"""
        ),
    ),
    ("vascular_lesion", None, _words("vasc, vascular lesion, lesion vasculaire, vaskulare lasion, lesion vascular")),
    (
        "pyogenic_granuloma",
        "L98.0",
        _words("pyogenic granuloma, granulome pyogenique, botriomycome, granuloma pyogenicum, granuloma piogeno"),
    ),
    ("lipoma", "D17.9", _words("lipoma, lipome, lipom")),
    (
        "epidermal_cyst",
        "L72.0",
        _words("epidermal cyst, epidermoid cyst, kyste epidermique, kyste epidermoide, epidermoidzyste"),
    ),
    ("keloid", "L91.0", _words("keloid, cheloide, keloide, queloide")),
    ("mycosis_fungoides", "C84.0", _words("mycosis fungoides, mycosis fongoide, micosis fungoide")),
    ("kaposi_sarcoma", "C46.9", _words("kaposi sarcoma, sarcome de kaposi, maladie de kaposi, kaposi sarkom")),
    ("psoriasis", "L40.9", _words("psoriasis, pso, psoriasis vulgaris, psoriasis vulgaire, schuppenflechte")),
    (
        "atopic_dermatitis",
        "L20.9",
        _words(
            """atopic dermatitis, atopic eczema, dermatite atopique, eczema atopique, atopische dermatitis,
            atopisches ekzem, neurodermitis, dermatitis atopica"""
        ),
    ),
    ("eczema", "L30.9", _words("eczema, ekzem, dermatitis, dermatite, eccema")),
    (
        "contact_dermatitis",
        "L25.9",
        _words("contact dermatitis, dermatite de contact, eczema de contact, kontaktekzem, dermatitis de contacto"),
    ),
    (
        "seborrheic_dermatitis",
        "L21.9",
        _words("seborrheic dermatitis, seborrhoeic dermatitis, dermatite seborrheique, seborrhoisches ekzem"),
    ),
    ("acne", "L70.9", _words("acne, akne")),
    ("rosacea", "L71.9", _words("rosacea, rosacee, couperose, rosazea")),
    ("vitiligo", "L80", _words("vitiligo")),
    ("alopecia_areata", "L63.9", _words("alopecia areata, pelade")),
    ("lichen_planus", "L43.9", _words("lichen planus, lichen plan, lichen ruber planus, liquen plano")),
    ("urticaria", "L50.9", _words("urticaria, urticaire, urtikaria")),
    ("pityriasis_rosea", "L42", _words("pityriasis rosea, pityriasis rose, pityriasis rose de gibert")),
    ("hidradenitis_suppurativa", "L73.2", _words("hidradenitis suppurativa, maladie de verneuil, acne inversa")),
    ("melasma", "L81.1", _words("melasma, chloasma")),
    ("prurigo_nodularis", "L28.1", _words("prurigo nodularis, prurigo nodulaire")),
    ("lichen_simplex", "L28.0", _words("lichen simplex chronicus, lichen simplex, nevrodermite")),
    ("bullous_pemphigoid", "L12.0", _words("bullous pemphigoid, pemphigoide bulleuse, bulloses pemphigoid")),
    ("pemphigus", "L10.9", _words("pemphigus, pemphigus vulgaris, pemphigus vulgaire")),
    ("discoid_lupus", "L93.0", _words("discoid lupus erythematosus, discoid lupus, lupus discoide, dle")),
    ("impetigo", "L01.0", _words("impetigo")),
    ("erysipelas", "A46", _words("erysipelas, erysipele, erysipel, erisipela")),
    ("tinea", "B35.9", _words("tinea, dermatophytosis, dermatophytose, dermatophytie, tina")),
    ("onychomycosis", "B35.1", _words("onychomycosis, onychomycose, onychomykose, tinea unguium")),
    ("pityriasis_versicolor", "B36.0", _words("pityriasis versicolor, tinea versicolor")),
    ("herpes_zoster", "B02.9", _words("herpes zoster, zona, shingles, gurtelrose")),
    ("herpes_simplex", "B00.9", _words("herpes simplex, herpes, herpes labial")),
    (
        "viral_wart",
        "B07",
        _words("wart, warts, viral wart, verruca, verruca vulgaris, verrue, verrues, warze, verruga"),
    ),
    ("molluscum_contagiosum", "B08.1", _words("molluscum contagiosum, molluscum, mollusca contagiosa")),
    ("scabies", "B86", _words("scabies, gale, kratze, sarna")),
    ("cutaneous_leishmaniasis", "B55.1", _words("cutaneous leishmaniasis, leishmaniose cutanee, leishmaniose")),
)
SYNONYMS: dict[str, str] = {fold(word): name for name, _, words in DIAGNOSES for word in (name, *words)}
ICD10: dict[str, str] = {name: code for name, code, _ in DIAGNOSES if code is not None}
# Groups of codes that mean one of our names whatever follows; C44 and D23 do not.
CODE_GROUPS: dict[str, str] = {
    "C43": "melanoma",
    "D03": "melanoma_in_situ",
    "D22": "nevus",
    "D04": "bowen_disease",
    "L82": "seborrheic_keratosis",
    "L57.0": "actinic_keratosis",
    "L40": "psoriasis",
    "L20": "atopic_dermatitis",
    "L80": "vitiligo",
}
# A cell with one of these is a question or a list of two, not a diagnosis.
DOUBT = re.compile(
    r"\?|/|\b(?:vs|versus|ou|or|oder|o|dd|susp|suspicion|suspect|suspecte|suspected|suspicious|verdacht|v[.]? ?a|"
    r"possible|probable|rule out|eliminer|exclure|pas d.|no|non|not|kein|keine|sin|without|sans|ohne|et|and|und|y)\b"
)
