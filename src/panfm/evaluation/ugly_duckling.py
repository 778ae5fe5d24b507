"""Protocol `ugly_duckling`: which lesion of a person looks unlike that person's others? Nothing is trained.

    images in folds -> build_people: those of persons with enough lesions
    features of one person's images -> cosine distance of each to the mean of the other lesions: [1 - s, s]

Images of the same lesion are no others: a second photograph of the ugly duckling would hide it. What was tried and did
not help on the synthetic archive (31 positives of 19 persons): distances in units of the person's own spread (AUROC
0.58 against 0.72), features centred, standardised or whitened by other persons' images (0.66 to 0.71).
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.families import UglyDucklingTarget
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.shards.index import ShardSet


@config_class
class UglyDucklingConfig:
    """Settings of the ugly duckling."""

    variant: str = "default"
    """Name on the board."""


def build_people(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """Keep the images of persons with `min_lesions` lesions or more; a unit is an image.

    Raises UserError where no person has so many.
    """
    target = card.target
    assert isinstance(target, UglyDucklingTarget)
    lesions = read_lesions(shard_set, split.rows)
    _, person = np.unique(split.groups, return_inverse=True)
    pairs = np.unique(np.stack([person, np.unique(lesions, return_inverse=True)[1]], axis=1), axis=0)
    num_lesions = np.bincount(pairs[:, 0])
    kept = np.flatnonzero(num_lesions[person] >= target.min_lesions)
    num_left_out = int((num_lesions < target.min_lesions).sum())
    if len(kept) == 0:
        raise UserError(
            f"task {card.name} on {shard_set.path}: none of {len(num_lesions)} {split.group_kind}s has "
            f"{target.min_lesions} lesions (target.min_lesions; the most is {num_lesions.max()}); lower it in the card"
        )
    left_out = f"{len(split.rows) - len(kept)} images of {num_left_out} {split.group_kind}s"
    note = f"{left_out} with fewer than {target.min_lesions} lesions"
    rule = f"people of {target.min_lesions} lesions"
    return replace(split.take(kept, rule, note if num_left_out else None), members=tuple(split.rows[kept][:, None]))


def read_lesions(shard_set: ShardSet, rows: NDArray[np.int64]) -> NDArray[np.str_]:
    """The lesion of each row [N]; an image that names none is a lesion of its own."""
    table = shard_set.table.select(["lesion_id", "key"]).take(pa.array(rows))
    pairs = zip(table.column("lesion_id").to_pylist(), table.column("key").to_pylist(), strict=True)
    return np.array([lesion or f"image {key}" for lesion, key in pairs], dtype=np.str_)


def score_ugly_duckling(trial: Trial, material: Material, config: UglyDucklingConfig) -> Scored:
    """Return [M, 2] for the trial's test part: 1 - s and s, half the distance: higher where a lesion stands out."""
    rows, groups = trial.split.rows[trial.test], trial.split.groups[trial.test]
    lesions = read_lesions(material.shard_set, rows)
    features = np.asarray(material.features[rows], dtype=np.float64)
    score = np.empty(len(rows))
    names, person = np.unique(groups, return_inverse=True)
    for number in range(len(names)):
        own = np.flatnonzero(person == number)
        score[own] = compute_distances(features[own], lesions[own]) / 2
    return Scored(np.stack([1 - score, score], axis=1), {"num_people": len(names)})


def compute_distances(features: NDArray[np.float64], lesions: NDArray[np.str_]) -> NDArray[np.float64]:
    """Cosine distance [n] (0 to 2) of each image of a person [n, D] to the mean direction of the other lesions."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    _, number = np.unique(lesions, return_inverse=True)
    is_other = number[:, None] != number
    assert is_other.any(axis=1).all(), "a person with one lesion has no others; build_people leaves such out"
    others = is_other.astype(np.float64) @ unit / is_other.sum(axis=1, keepdims=True)
    others /= np.maximum(np.linalg.norm(others, axis=1, keepdims=True), 1e-12)
    return np.asarray(np.clip(1 - (unit * others).sum(axis=1), 0.0, 2.0))
