"""The synthetic archive's numbers, before anything is drawn: seed + patient number -> Patient with lesions and visits.

    (seed, number) -> Patient -> Lesion (diagnosis, traits) -> Visit (day, traits of that day)

A trait is something that can be seen in an image: how irregular the border is, how much blue veil, how many nests of
cells. Each diagnosis has its own mean and spread of each trait, and every trait is now and then drawn from another
diagnosis (MIMICRY), so that no reader, human or not, can be right about every lesion. Nothing here describes a person.
"""

import datetime
from dataclasses import dataclass, fields, replace

import numpy as np

NOTICE = "SYNTHETIC: drawn by panfm, of no person; not for any statement about skin."
DIAGNOSES = ("nevus", "melanoma", "basal_cell_carcinoma", "seborrheic_keratosis", "dermatofibroma")
MALIGNANT = frozenset({"melanoma", "basal_cell_carcinoma"})
MIMICRY = 0.30  # share of a lesion's traits that are drawn from another diagnosis
TISSUE_MIMICRY = 0.15  # the same for what only the microscope shows: tissue misleads less often
TISSUE_TRAITS = frozenset({"nests", "atypia", "islands", "acanthosis", "spindles", "lymphocytes"})
ANATOMIC_SITES = ("head_neck", "trunk", "upper_extremity", "lower_extremity", "palms_soles")


@dataclass(frozen=True)
class LesionTraits:
    """What can be seen of a lesion on one day; strengths are 0 (absent) to about 1 (marked)."""

    diameter_mm: float
    growth: float  # mm a year
    elongation: float
    asymmetry: float
    irregularity: float  # of the border
    edge_mm: float  # width of the transition to skin
    melanin: float
    blood: float
    variegation: float  # of the colour
    network: float
    globules: float
    streaks: float
    veil: float  # blue-white
    vessels: float
    ulcer: float
    cysts: float  # milia-like cysts and comedo-like openings
    fissures: float
    scar: float  # central white patch
    elevation: float
    gloss: float
    nests: float  # in tissue: round nests of melanocytes
    atypia: float  # in tissue: large, dark, uneven nuclei
    islands: float  # in tissue: basaloid islands with a palisade and a cleft
    acanthosis: float  # in tissue: thick epidermis with horn cysts
    spindles: float  # in tissue: whorls of spindle cells
    lymphocytes: float


# Mean and standard deviation of each trait, in the order of DIAGNOSES.
TRAITS: dict[str, tuple[tuple[float, float], ...]] = {
    "diameter_mm": ((4.8, 1.5), (7.2, 2.2), (6.3, 2.2), (7.6, 2.4), (5.2, 1.3)),
    "growth": ((0.1, 0.15), (1.7, 0.8), (0.8, 0.5), (0.3, 0.25), (0.05, 0.1)),
    "elongation": ((0.08, 0.06), (0.14, 0.09), (0.10, 0.07), (0.14, 0.08), (0.06, 0.05)),
    "asymmetry": ((0.08, 0.07), (0.26, 0.13), (0.17, 0.10), (0.11, 0.08), (0.06, 0.05)),
    "irregularity": ((0.10, 0.08), (0.34, 0.15), (0.24, 0.12), (0.19, 0.12), (0.08, 0.06)),
    "edge_mm": ((0.35, 0.15), (0.22, 0.12), (0.50, 0.22), (0.10, 0.06), (0.60, 0.20)),
    "melanin": ((0.80, 0.28), (1.05, 0.35), (0.20, 0.18), (0.75, 0.32), (0.42, 0.20)),
    "blood": ((0.12, 0.10), (0.22, 0.18), (0.48, 0.20), (0.12, 0.12), (0.34, 0.16)),
    "variegation": ((0.22, 0.15), (0.72, 0.22), (0.34, 0.20), (0.38, 0.20), (0.20, 0.12)),
    "network": ((0.60, 0.28), (0.55, 0.32), (0.05, 0.08), (0.12, 0.14), (0.42, 0.22)),
    "globules": ((0.35, 0.28), (0.50, 0.30), (0.22, 0.22), (0.15, 0.18), (0.08, 0.10)),
    "streaks": ((0.06, 0.10), (0.42, 0.30), (0.10, 0.14), (0.05, 0.08), (0.03, 0.06)),
    "veil": ((0.05, 0.08), (0.48, 0.30), (0.22, 0.20), (0.10, 0.14), (0.03, 0.06)),
    "vessels": ((0.05, 0.08), (0.18, 0.18), (0.70, 0.25), (0.15, 0.16), (0.16, 0.14)),
    "ulcer": ((0.02, 0.05), (0.16, 0.20), (0.42, 0.30), (0.05, 0.10), (0.02, 0.05)),
    "cysts": ((0.06, 0.10), (0.08, 0.12), (0.08, 0.12), (0.75, 0.25), (0.04, 0.08)),
    "fissures": ((0.08, 0.10), (0.12, 0.14), (0.08, 0.12), (0.62, 0.26), (0.08, 0.10)),
    "scar": ((0.04, 0.08), (0.20, 0.22), (0.10, 0.14), (0.06, 0.10), (0.72, 0.20)),
    "elevation": ((0.30, 0.22), (0.48, 0.28), (0.68, 0.25), (0.70, 0.22), (0.55, 0.22)),
    "gloss": ((0.18, 0.14), (0.25, 0.18), (0.70, 0.22), (0.28, 0.22), (0.22, 0.16)),
    "nests": ((0.75, 0.22), (0.60, 0.28), (0.04, 0.08), (0.04, 0.08), (0.03, 0.06)),
    "atypia": ((0.18, 0.14), (0.75, 0.22), (0.42, 0.18), (0.12, 0.10), (0.20, 0.14)),
    "islands": ((0.02, 0.05), (0.05, 0.08), (0.80, 0.20), (0.06, 0.10), (0.03, 0.06)),
    "acanthosis": ((0.18, 0.14), (0.25, 0.18), (0.12, 0.10), (0.80, 0.20), (0.48, 0.20)),
    "spindles": ((0.12, 0.12), (0.22, 0.18), (0.18, 0.14), (0.08, 0.08), (0.80, 0.20)),
    "lymphocytes": ((0.14, 0.12), (0.45, 0.25), (0.38, 0.22), (0.22, 0.18), (0.15, 0.12)),
}
SMALLEST = {"diameter_mm": 2.0, "edge_mm": 0.05, "melanin": 0.05}
LARGEST = {"diameter_mm": 12.0, "growth": 4.0, "melanin": 1.8, "edge_mm": 1.0}


@dataclass(frozen=True)
class Visit:
    """One day on which a lesion was looked at, and how it looked."""

    number: int  # 1-based, of the patient
    date: datetime.date
    traits: LesionTraits
    follow_up_days: int  # from this visit to the event or the last contact
    modalities: tuple[str, ...]


@dataclass(frozen=True)
class Lesion:
    """One lesion: its diagnosis, its visits, whether tissue was taken at the last one."""

    raw_id: str
    diagnosis: str
    anatomic_site: str
    confirmed_by: str
    event: bool
    has_slide: bool
    visits: tuple[Visit, ...]
    seed: tuple[int, ...]  # of its shape and texture, the same in every image


@dataclass(frozen=True)
class Patient:
    """One invented patient; every value is known here, the table leaves some out."""

    raw_id: str
    birth: datetime.date
    sex: str
    phototype: int
    institution: int
    lesions: tuple[Lesion, ...]
    seed: tuple[int, ...]


def draw_patient(seed: int, number: int) -> Patient:
    """Draw patient `number` (0-based): a pure function of the two numbers, whatever else the archive holds."""
    rng = np.random.default_rng([seed, number, 1])
    raw_id = f"SYN-P{number:05d}"
    institution = int(rng.choice(4, p=[0.36, 0.28, 0.22, 0.14]))
    # Institutions serve different people and see different lesions: what a fair comparison has to get right.
    phototypes = [[0.18, 0.32, 0.24, 0.13, 0.08, 0.05], [0.06, 0.14, 0.24, 0.24, 0.19, 0.13]]
    phototype = 1 + int(rng.choice(6, p=phototypes[institution % 2]))
    first = datetime.date(2014, 1, 1) + datetime.timedelta(days=int(rng.integers(0, 3000)))
    age = float(np.clip(rng.normal(52, 17), 8, 92))
    birth = first - datetime.timedelta(days=round(age * 365.25))
    gaps = rng.integers(80, 420, size=3)
    days = [0, int(gaps[0]), int(gaps[0] + gaps[1]), int(gaps.sum())][
        : int(rng.choice([1, 2, 3, 4], p=[0.3, 0.3, 0.26, 0.14]))
    ]
    dates = [first + datetime.timedelta(days=day) for day in days]
    lesions = tuple(
        _draw_lesion(rng, f"{raw_id}-L{index + 1}", (seed, number, 2, index), age, phototype, institution, dates)
        for index in range(int(rng.choice([1, 2, 3, 4], p=[0.24, 0.36, 0.26, 0.14])))
    )
    sex = str(rng.choice(["female", "male"], p=[0.51, 0.49]))
    return Patient(raw_id, birth, sex, phototype, institution, lesions, (seed, number, 3))


def grow(traits: LesionTraits, years: float) -> LesionTraits:
    """The traits `years` later: what grows becomes larger, and more uneven as it does."""
    added = traits.growth * years
    return replace(
        traits,
        diameter_mm=min(traits.diameter_mm + added, 13.0),
        irregularity=traits.irregularity * (1 + 0.12 * added),
        variegation=min(traits.variegation * (1 + 0.10 * added), 1.3),
        elevation=min(traits.elevation + 0.05 * added, 1.4),
        veil=min(traits.veil * (1 + 0.15 * added), 1.2),
    )


def compute_risk(traits: LesionTraits) -> float:
    """How threatening a lesion looks, about -1 to 3: what the hazard of the followed event depends on."""
    return 1.6 * traits.ulcer + 1.2 * traits.veil + 1.0 * traits.atypia + 0.18 * (traits.diameter_mm - 6)


def _draw_traits(rng: np.random.Generator, diagnosis: int) -> LesionTraits:
    names = [field.name for field in fields(LesionTraits)]
    others = rng.integers(0, len(DIAGNOSES), size=len(names))
    shares = np.array([TISSUE_MIMICRY if name in TISSUE_TRAITS else MIMICRY for name in names])
    mimics = rng.random(len(names)) < shares
    values = {}
    for index, name in enumerate(names):
        mean, spread = TRAITS[name][int(others[index]) if mimics[index] else diagnosis]
        value = mean + spread * rng.standard_normal()
        values[name] = float(np.clip(value, SMALLEST.get(name, 0.0), LARGEST.get(name, 1.2)))
    return LesionTraits(**values)


def _draw_lesion(
    rng: np.random.Generator,
    raw_id: str,
    seed: tuple[int, ...],
    age: float,
    phototype: int,
    institution: int,
    dates: list[datetime.date],
) -> Lesion:
    old, fair = (age - 50) / 20, (3 - phototype) / 3
    odds = np.exp(
        [0.9 - 0.5 * old, 0.1 + 0.15 * old + 0.3 * fair, -0.2 + 0.5 * old + 0.6 * fair, -0.2 + 0.5 * old, -0.6]
    )
    odds[1:3] *= (1.25, 0.9, 1.5, 0.6)[institution]  # referral centres see more cancer
    diagnosis = int(rng.choice(len(DIAGNOSES), p=odds / odds.sum()))
    name = DIAGNOSES[diagnosis]
    sites = np.array(
        [[1, 5, 2, 2, 0.2], [1, 4, 2, 3, 0.4], [6, 2, 1, 0.7, 0], [3, 5, 1, 1, 0], [0.2, 1, 2, 5, 0]][diagnosis]
    )
    first = _draw_traits(rng, diagnosis)
    malignant = name in MALIGNANT
    has_slide = bool(rng.random() < (0.42 if malignant else 0.15))
    # What is cut out is not seen again; what is watched is seen on several of the patient's days.
    num_seen = min(
        len(dates), int(rng.choice([1, 2, 3, 4], p=[0.5, 0.3, 0.15, 0.05] if malignant else [0.25, 0.35, 0.25, 0.15]))
    )
    start = int(rng.integers(0, len(dates) - num_seen + 1))
    seen = dates[start : start + num_seen]
    hazard = 0.035 * float(np.exp(1.1 * compute_risk(first)))  # events a year
    years_to_event = (seen[-1] - seen[0]).days / 365.25 + rng.exponential(1 / hazard)
    years_to_censoring = (seen[-1] - seen[0]).days / 365.25 + rng.uniform(0.3, 6.0)
    event = bool(years_to_event <= years_to_censoring)
    last_contact = round(365.25 * min(years_to_event, years_to_censoring))
    visits = []
    for index, date in enumerate(seen):
        since = (date - seen[0]).days
        modalities = [
            kind
            for kind, share in (("clinical", 0.85), ("dermoscopic", 0.92), ("total_body", 0.85))
            if rng.random() < share
        ]
        visits.append(
            Visit(
                number=start + index + 1,
                date=date,
                traits=grow(first, since / 365.25),
                follow_up_days=last_contact - since,
                modalities=tuple(modalities) or ("dermoscopic",),
            )
        )
    confirmed_by = "histopathology" if has_slide or (malignant and rng.random() < 0.8) else ""
    if not confirmed_by:
        confirmed_by = "follow_up" if num_seen > 1 else str(rng.choice(["consensus", "single_expert"]))
    return Lesion(
        raw_id=raw_id,
        diagnosis=name,
        anatomic_site=str(rng.choice(ANATOMIC_SITES, p=sites / sites.sum())),
        confirmed_by=confirmed_by,
        event=event,
        has_slide=has_slide,
        visits=tuple(visits),
        seed=seed,
    )
