"""Captions of synthetic photographs: what a colleague would write beside the image, from what was drawn into it.

    Lesion, Visit, kind of photograph  ->  write_caption  ->  "Dermoscopic image of a nevus: brown, regular border, ..."

A caption names what this kind of photograph shows: network and veil under the dermatoscope, elevation to the naked eye,
size and place from afar. As in a clinic some photographs have none, some leave the diagnosis open, and what is hardly
there goes unmentioned.
"""

import numpy as np

from panfm.shards.scenery import PhotographModality
from panfm.shards.synthetic_patients import Lesion, LesionTraits, Visit

WITHOUT_CAPTION = 0.15  # share of photographs
WITHOUT_DIAGNOSIS = 0.3  # share of captions
SITES = {
    "head_neck": "the face",
    "trunk": "the trunk",
    "upper_extremity": "an arm",
    "lower_extremity": "a leg",
    "palms_soles": "the sole of a foot",
}
KINDS: dict[PhotographModality, str] = {
    "clinical": "Clinical photograph",
    "dermoscopic": "Dermoscopic image",
    "total_body": "Overview photograph",
}
# Trait, strength from which it is mentioned, words for it; in the order in which they are written.
SEEN: dict[PhotographModality, tuple[tuple[str, float, str], ...]] = {
    "clinical": (
        ("asymmetry", 0.2, "asymmetric"),
        ("irregularity", 0.3, "irregular border"),
        ("variegation", 0.5, "several colours"),
        ("elevation", 0.5, "raised"),
        ("gloss", 0.5, "shiny"),
        ("ulcer", 0.3, "ulcerated"),
        ("fissures", 0.5, "rough surface"),
    ),
    "dermoscopic": (
        ("asymmetry", 0.2, "asymmetric"),
        ("variegation", 0.5, "several colours"),
        ("network", 0.4, "pigment network"),
        ("globules", 0.4, "brown globules"),
        ("streaks", 0.3, "streaks at the edge"),
        ("veil", 0.3, "blue-white veil"),
        ("vessels", 0.5, "branching vessels"),
        ("cysts", 0.5, "milia-like cysts"),
        ("scar", 0.5, "central white patch"),
    ),
    "total_body": (("variegation", 0.7, "several colours"),),
}


def write_caption(lesion: Lesion, visit: Visit, kind: PhotographModality) -> str:
    """The caption of one photograph, "" for one without; the same for the same lesion, visit and kind."""
    rng = np.random.default_rng([*lesion.seed, visit.number, 16, tuple(KINDS).index(kind)])
    is_missing, is_open = rng.random(2) < (WITHOUT_CAPTION, WITHOUT_DIAGNOSIS)
    if is_missing:
        return ""
    traits = visit.traits
    name = "lesion" if is_open else lesion.diagnosis.replace("_", " ")
    words = [_name_colour(traits), *(words for trait, least, words in SEEN[kind] if getattr(traits, trait) > least)]
    place = f" on {SITES[lesion.anatomic_site]}" if kind != "dermoscopic" else ""
    size = f", {round(traits.diameter_mm)} mm" if kind != "dermoscopic" else ""
    return f"{KINDS[kind]} of a {name}{place}{size}: {', '.join(words)}."


def _name_colour(traits: LesionTraits) -> str:
    if traits.melanin > 1.0:
        return "dark brown"
    if traits.melanin > 0.45:
        return "brown"
    return "red" if traits.blood > 0.3 else "skin-coloured"
