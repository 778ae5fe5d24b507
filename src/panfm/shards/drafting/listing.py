"""A folder of class folders without a table: the card lists the files, and the folders say what there is to know.

train/nevus/a.jpg, test/melanoma/b.jpg, ...  ->  draft_listing_card  ->  card with `listing`, findings, mapping
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from panfm.shards.drafting.columns import find_diagnosis
from panfm.shards.drafting.findings import Finding
from panfm.shards.drafting.text import quote, write_head, write_map
from panfm.shards.drafting.values import MappedValue, map_diagnoses, map_modality
from panfm.shards.drafting.vocabulary import MODALITY_WORDS, SPLITS, fold

MANY_FOLDERS = 0.3  # more folders than this share of the files are people or visits, not classes


def draft_listing_card(name: str, files: Sequence[str]) -> tuple[str, tuple[Finding, ...], tuple[MappedValue, ...]]:
    """The card of a folder without a table; load_card accepts it as it is."""
    depths = Counter(file.count("/") for file in files)
    depth = max(depths, key=lambda one: (depths[one], one))
    kept = [file for file in files if file.count("/") == depth]
    levels = [Counter(PurePosixPath(file).parts[level] for file in kept) for level in range(depth)]
    names = _name_levels(levels, len(kept))
    pattern = "/".join(
        [*(f"{{{one}}}" if one else next(iter(level)) for one, level in zip(names, levels, strict=True)), "{name}"]
    )
    mapping: tuple[MappedValue, ...] = ()
    lines = write_head(name, f"{len(files):,} image files without a table")
    lines += [
        "cohort:",
        "  design: unknown  # TODO: retrospective, prospective or mixed",
        "  kind: clinical  # TODO: registry, clinical or trial",
        "",
        f"listing: {quote(pattern)}  # guessed: {len(kept)} of {len(files)} files lie so deep",
    ]
    columns = {"split": "official_split", "patient": "patient_id", "modality": "modality"}
    used = [one for one in names if one in columns]
    if used:
        lines += ["columns:", *(f"  {columns[one]}: {one}  # TODO: is this what these folders are?" for one in used)]
    if "modality" in names:
        modalities = map_modality(levels[names.index("modality")])
        mapping += modalities
        lines += ["values:", "  modality:", *write_map(modalities, "    ")]
    else:
        lines.append("modality: clinical  # TODO: clinical, dermoscopic, total_body or histopathology?")
    if "class" in names:
        classes = map_diagnoses("diagnosis", levels[names.index("class")])
        mapping += classes
        codes = {one.value: one.code for one in classes if one.value is not None and one.code is not None}
        lines += ["labels:", "  diagnosis:", "    column: class", "    values:", *write_map(classes, "      ")]
        if codes:
            lines += [
                "    codes:",
                "      icd10:",
                *(f"        {one}: {quote(code)}" for one, code in sorted(codes.items())),
            ]
    lines += ["", f"expected: {{images: {len(kept)}}}  # as drafted; a build reports any difference"]
    return "\n".join(lines) + "\n", tuple(_find_faults(files, kept, names)), mapping


def _name_levels(levels: Sequence[Counter[str]], num_files: int) -> list[str]:
    """What the folders of each level are: split, modality, class, patient, level1, ...; "" for one and the same."""
    names = []
    for place, level in enumerate(levels, 1):
        if len(level) == 1 and not re.search(r"[{}*]", next(iter(level))):
            names.append("")
        elif all(fold(folder) in SPLITS for folder in level):
            names.append("split")
        elif all(any(fold(folder) in words for words in MODALITY_WORDS.values()) for folder in level):
            names.append("modality")
        else:
            names.append(f"level{place}")
    for one in ("split", "modality"):
        for place in [place for place, name in enumerate(names) if name == one][1:]:
            names[place] = f"level{place + 1}"
    open_levels = [place for place, name in enumerate(names) if name.startswith("level")]

    def count_known(place: int) -> int:
        return sum(count for folder, count in levels[place].items() if find_diagnosis(folder) is not None)

    few = [
        place for place in open_levels if len(levels[place]) <= max(2.0, MANY_FOLDERS * num_files) or count_known(place)
    ]
    if few:
        names[max(few, key=lambda place: (count_known(place), place))] = "class"
    many = [place for place in open_levels if place not in few]
    if many:
        names[many[-1]] = "patient"
    return names


def _find_faults(files: Sequence[str], kept: Sequence[str], names: Sequence[str]) -> list[Finding]:
    found = []
    if len(kept) < len(files):
        others = sorted(set(files) - set(kept))
        text = f"{len(others)} of {len(files)} files lie at another depth and are not listed; add a pattern for them"
        found.append(Finding("files", text, tuple(others[:10])))
    if "patient" not in names:
        found.append(
            Finding(
                "ids",
                "nothing names the patients: images of one patient can stand on both sides of a split; if file names "
                'hold an id, say so in the listing, as in "{patient:[0-9]+}_{name}"',
            )
        )
    if any(file.lower().endswith(".dcm") for file in files):
        text = "there are DICOM files: dicom_tags of the card can make columns of PatientID, StudyDate, PatientSex"
        found.append(Finding("columns", text))
    return found
