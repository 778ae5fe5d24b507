"""Protocol `case_fusion`: one lesion, all that is known of it: its images of every modality, and the metadata.

    a split of images -> build_cases -> a split over lesions, with the images that other modalities have of them
    features of its images of one modality -> mean [D] -> standardised, 0 where there is none  }
    the same for each further modality                                                         } side by side
    age, sex, anatomic site, tabular columns (evaluation/metadata)                             } -> linear probe

A missing view counts as the mean of the training cases, so it moves no score, and nothing tells the probe that it is
missing: that a lesion was looked at through a dermatoscope at all gives much away about what somebody thought of it.
Each modality alone, over the same cases, stands beside as the baseline.
"""

from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.linear_probe import score_probe
from panfm.evaluation.metadata import Metadata, encode_metadata, read_metadata
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.slides import compute_mean_features
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.files import compute_json_hash
from panfm.shards.index import ShardSet

Floats = NDArray[np.float64]
Inputs = Literal["images", "images_metadata", "clinical", "dermoscopic", "total_body", "histopathology"]


@config_class
class CaseFusionConfig:
    """Settings of the fusion of a lesion's images."""

    variants: tuple[Inputs, ...] = ("images", "images_metadata", "clinical", "dermoscopic")
    """What is looked at, a section on the board each: images = every modality; images_metadata = and the metadata; a
    modality's name = its images alone, the baseline (cases without one get what an unknown case gets)."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where the rarest class has fewer groups."""


def build_cases(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """Gather the images of each lesion of a split: a split over lesions.

    A lesion of the split brings all its images along, of whatever modality, labelled or not. Images without a lesion id
    make a case where they are all that a patient has: one image a modality, and none with a lesion id. members: rows of
    the images, by key. keys: the lesion's (else the patient's) id.

    Raises UserError where no lesion has images of two modalities.
    """
    left_out: Counter[str] = Counter()
    table = shard_set.table
    keys, groups = table.column("key").to_pylist(), table.column("group_id").to_pylist()
    modalities = table.column("modality").to_pylist()
    place_of = {row: place for place, row in enumerate(split.rows.tolist())}
    cases: list[tuple[str, list[int], int]] = []  # name, rows, place of a labelled image
    for name, rows in _gather_rows(shard_set, place_of, left_out).items():
        places = [place_of[row] for row in rows if row in place_of]
        if not places:
            continue
        if len(set(split.labels[places].tolist())) > 1:
            left_out["lesions whose images are of several classes"] += 1
            continue
        group = split.groups[places[0]]
        inside = [row for row in rows if groups[row] == group]
        left_out[f"images of another group ({split.group_kind}) than their lesion"] += len(rows) - len(inside)
        cases.append((name, sorted(inside, key=lambda row: keys[row]), places[0]))
    notes = tuple(f"{count} {what}" for what, count in left_out.items() if count)
    if not any(len({modalities[row] for row in rows}) > 1 for _, rows, _ in cases):
        raise UserError(
            f"task {card.name} on {shard_set.path}: none of its {len(cases)} lesions has images of two modalities, "
            f"which case_fusion joins; leave the protocol out, or map lesion_id in the source card"
        )
    cases.sort()
    names = [name for name, *_ in cases]
    labelled = np.array([place for *_, place in cases], dtype=np.int64)
    members = tuple(np.array(rows, dtype=np.int64) for _, rows, _ in cases)
    return replace(
        split,
        rows=np.array([rows[0] for rows in members], dtype=np.int64),
        keys=np.array(names, dtype=np.str_),
        groups=split.groups[labelled],
        labels=split.labels[labelled],
        folds=split.folds[labelled],
        hash=compute_json_hash(
            [split.hash, "cases", [[name, *(keys[row] for row in rows)] for name, rows, _ in cases]]
        ),
        notes=(*split.notes, *notes),
        members=members,
    )


def score_case_fusion(trial: Trial, material: Material, config: CaseFusionConfig) -> Scored:
    """Return probabilities for the trial's test cases. What is looked at is the variant of the trial's recipe.

    Raises UserError where no training case has an image of the variant's modality, or nothing is known as metadata.
    """
    variant: Inputs = trial.recipe["variant"]
    with_metadata = variant == "images_metadata"
    views = _read_views(trial, material)
    if variant not in ("images", "images_metadata"):
        views = {name: values for name, values in views.items() if name == variant}
    blocks: list[Floats] = []
    chosen: dict[str, Any] = {}
    for modality, values in views.items():
        has = ~np.isnan(values[:, 0])
        if not has[trial.train].any():
            continue  # nothing is learned of it
        blocks.append(_standardise(values, trial.train))
        chosen[f"num_{modality}"] = {"train": int(has[trial.train].sum()), "test": int(has[trial.test].sum())}
    if not blocks:
        raise UserError(
            f"task {trial.card.name}: none of the {len(trial.train)} training cases has an image of modality "
            f"{variant}; leave it out of case_fusion.variants"
        )
    if with_metadata:
        metadata = _read_case_metadata(trial.split, material.shard_set)
        known = encode_metadata(metadata, trial.train)
        if known.shape[1] == 0:
            raise UserError(
                f"task {trial.card.name}: no age, sex, anatomic site or tabular column of source {trial.card.source} "
                f"differs between its lesions; leave images_metadata out of case_fusion.variants"
            )
        blocks.append(known)
        chosen["columns"] = list(metadata.columns)
    inputs = np.concatenate(blocks, axis=1)
    return score_probe(trial, inputs, config.num_folds, chosen)


def _gather_rows(shard_set: ShardSet, place_of: dict[int, int], left_out: Counter[str]) -> dict[str, list[int]]:
    """The rows of each lesion by its id, and of each patient of whom only one lesion can be meant by the patient's."""
    columns = shard_set.table.select(["lesion_id", "patient_id", "modality"]).to_pydict()
    lesions: dict[str, list[int]] = {}
    nameless: dict[str | None, list[int]] = {}
    with_lesions: set[str | None] = set()
    for row, (lesion, patient, _) in enumerate(zip(*columns.values(), strict=True)):
        if lesion is not None:
            lesions.setdefault(lesion, []).append(row)
            with_lesions.add(patient)
        else:
            nameless.setdefault(patient, []).append(row)
    for patient, rows in nameless.items():
        found = Counter(columns["modality"][row] for row in rows)
        if patient is not None and patient not in with_lesions and max(found.values()) == 1:
            lesions[patient] = rows
        else:
            left_out["images of which nobody says which lesion they show"] += sum(row in place_of for row in rows)
    return lesions


def _read_views(trial: Trial, material: Material) -> dict[str, Floats]:
    """The mean feature of each case's images of one modality, [N, D] a modality; NaN where it has none."""
    members = trial.split.members
    sizes = [len(rows) for rows in members]
    flat = material.shard_set.table.column("modality").take(pa.array(np.concatenate(members))).to_pylist()
    of_case = np.split(np.array(flat, dtype=np.str_), np.cumsum(sizes)[:-1])
    views = {}
    for modality in sorted(set(flat)):
        rows = [own[names == modality] for own, names in zip(members, of_case, strict=True)]
        views[modality] = compute_mean_features(material.features, rows)
    return views


def _standardise(values: Floats, train: NDArray[np.int64]) -> Floats:
    """Standardise by the training cases that have the view; a missing one is their mean, 0 in every feature."""
    known = values[train][~np.isnan(values[train, 0])]
    spread = known.std(axis=0)
    scale = np.where(spread > 1e-7 * np.abs(known.mean(axis=0)) + 1e-12, spread, 1.0)
    return np.asarray(np.nan_to_num((values - known.mean(axis=0)) / scale, nan=0.0))


def _read_case_metadata(split: Split, shard_set: ShardSet) -> Metadata:
    """What is known of each case: of a number the mean over its images, of a category the first that is known."""
    bounds = np.cumsum([0, *(len(rows) for rows in split.members)])
    of_images = read_metadata(shard_set, np.concatenate(split.members))
    spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))

    def average(values: Floats) -> float:
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else float("nan")

    numbers = {
        name: np.array([average(values[first:last]) for first, last in spans])
        for name, values in of_images.numbers.items()
    }
    categories: dict[str, list[str | None]] = {
        name: [next((value for value in values[first:last] if value is not None), None) for first, last in spans]
        for name, values in of_images.categories.items()
    }
    return Metadata(numbers, categories, num_rows=len(split.members))
