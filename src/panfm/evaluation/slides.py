"""Protocol `slides`: one class for all tiles of a slide, or of all slides of a patient.

    the split's tiles  -> build_bags ->  a split over bags
    features of a bag's tiles [T, D]  -> mean [D]                     -> linear probe           variant mean (ranked)
                                      -> attention over the tiles [T] -> weighted mean -> head  variant abmil

Mean pooling and a logistic regression has nothing to tune but its C and is hard to beat on a few hundred slides; gated
attention (Ilse et al. 2018, arXiv 1802.04712) stands beside it. Both look at all tiles of a test slide.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.families import SlidesTarget
from panfm.evaluation.linear_probe import describe_probe
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.small_heads import HeadConfig, score_head
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.files import compute_json_hash
from panfm.measures.probe import fit_probe_cv
from panfm.shards.index import ShardSet

Floats = NDArray[np.float64]
PROJECTION, ATTENTION, DROPOUT = 512, 256, 0.25  # of gated attention, as its users in pathology have it


@config_class
class SlidesConfig:
    """Settings of the protocol of slides."""

    variants: tuple[Literal["mean", "abmil"], ...] = ("mean", "abmil")
    """mean = the mean of a bag's features, and the linear probe: what is ranked; abmil = gated attention, trained."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the probe's inner cross-validation; fewer where the rarest class has fewer groups."""
    abmil: HeadConfig = HeadConfig()
    """Training of the attention: rates from 1e-4 to 1e-3 and the number of epochs chosen in inner folds, five seeds."""
    tiles_a_step: int = Field(default=2048, ge=1)
    """Tiles of a bag that one training step looks at, drawn anew each time: bounds memory. In scoring it is all."""


def build_bags(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """Put the tiles of a split into bags: a split over slides, or patients, as the card's `target.bag` says.

    members: the bag's tiles, by key. keys: the slide's or the patient's id. Tiles without one are left out and counted.
    Raises UserError where a bag holds tiles of two classes, groups or folds, and where there is no bag.
    """
    target = card.target
    assert isinstance(target, SlidesTarget), "a card of family slides"
    names = shard_set.table.column(f"{target.bag}_id").to_pylist()
    places: dict[str, list[int]] = {}
    num_nameless = 0
    for place, row in enumerate(split.rows.tolist()):
        if names[row] is None:
            num_nameless += 1
        else:
            places.setdefault(names[row], []).append(place)
    if not places:
        raise UserError(
            f"task {card.name}: none of the {len(split.rows)} tiles has a {target.bag}_id, which makes the bags; map "
            f"it in the source card and build the shards again"
        )
    bags = sorted(places)
    for bag in bags:
        _check_bag(card, split, bag, places[bag])
    first = np.array([places[bag][0] for bag in bags], dtype=np.int64)
    notes = (f"{num_nameless} tiles without a {target.bag} id",) if num_nameless else ()
    members = tuple(split.rows[places[bag]] for bag in bags)
    return replace(
        split,
        rows=split.rows[first],
        keys=np.array(bags, dtype=np.str_),
        groups=split.groups[first],
        labels=split.labels[first],
        folds=split.folds[first],
        hash=compute_json_hash([split.hash, "bags", target.bag, bags, [len(rows) for rows in members]]),
        notes=(*split.notes, *notes),
        members=members,
    )


def score_slides(trial: Trial, material: Material, config: SlidesConfig) -> Scored:
    """Return probabilities for the trial's test bags: by mean pooling or attention, as its recipe's variant says."""
    counts = [len(rows) for rows in trial.split.members]
    chosen: dict[str, Any] = {
        "tiles_a_bag": {"least": min(counts), "median": float(np.median(counts)), "most": max(counts)}
    }
    if trial.recipe["variant"] == "abmil":
        return _score_attention(trial, material, config, chosen)
    used = np.concatenate([trial.train, trial.test])
    pooled = compute_mean_features(material.features, [trial.split.members[place] for place in used])
    num_train = len(trial.train)
    fit = fit_probe_cv(
        pooled[:num_train],
        trial.split.labels[trial.train],
        trial.split.groups[trial.train],
        num_classes=trial.num_classes,
        seed=trial.seed,
        num_folds=config.num_folds,
    )
    return Scored(fit.probe.predict(pooled[num_train:]), {**describe_probe(trial, fit), **chosen})


def compute_mean_features(features: NDArray[np.float32], members: Sequence[NDArray[np.int64]]) -> Floats:
    """The mean of each unit's rows of features [rows, D] -> float64 [N, D]; a unit without rows is NaN."""
    pooled = np.full((len(members), features.shape[1]), np.nan)
    for place, rows in enumerate(members):
        if len(rows):
            pooled[place] = features[rows].mean(axis=0, dtype=np.float64)
    return pooled


class GatedAttention(nn.Module):
    """Attention-based pooling of a bag, with the gate: a_t ~ exp(w . (tanh(V h_t) * sigmoid(U h_t))), sum over t = 1.

    Tile features are standardised first, by the mean and deviation [D] of the training tiles.
    """

    def __init__(self, mean: Tensor, scale: Tensor, num_classes: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.project = nn.Sequential(nn.Linear(len(mean), PROJECTION), nn.ReLU(), nn.Dropout(DROPOUT))
        self.value = nn.Sequential(nn.Linear(PROJECTION, ATTENTION), nn.Tanh(), nn.Dropout(DROPOUT))
        self.gate = nn.Sequential(nn.Linear(PROJECTION, ATTENTION), nn.Sigmoid(), nn.Dropout(DROPOUT))
        self.weigh = nn.Linear(ATTENTION, 1)
        self.classify = nn.Linear(PROJECTION, num_classes)

    def forward(self, tiles: Tensor) -> Tensor:
        """Logits [K] of one bag; tiles: float32 [T, D]."""
        hidden = self.project((tiles - self.mean) / self.scale)  # [T, P]
        attention = self.weigh(self.value(hidden) * self.gate(hidden)).softmax(dim=0)  # [T, 1]
        return self.classify((attention * hidden).sum(dim=0))  # type: ignore[no-any-return]


def _score_attention(trial: Trial, material: Material, config: SlidesConfig, chosen: dict[str, Any]) -> Scored:
    members, features, device = trial.split.members, material.features, material.encoder.device
    mean, scale = _measure_tiles(features, [members[place] for place in trial.train])

    def compute_logits(module: nn.Module, places: NDArray[np.int64], rng: np.random.Generator | None) -> Tensor:
        logits = []
        for place in places.tolist():
            rows = members[place]
            if rng is not None and len(rows) > config.tiles_a_step:
                rows = np.sort(rng.choice(rows, size=config.tiles_a_step, replace=False))
            logits.append(module(torch.from_numpy(np.ascontiguousarray(features[rows], np.float32)).to(device)))
        return torch.stack(logits)

    found = score_head(
        lambda num_classes: GatedAttention(mean, scale, num_classes),
        compute_logits,
        labels=trial.split.labels,
        groups=trial.split.groups,
        train=trial.train,
        test=trial.test,
        num_classes=trial.num_classes,
        seed=trial.seed,
        config=config.abmil,
        device=device,
        description=f"attention on {trial.card.name}",
    )
    return Scored(found.scores, {**found.describe(), **chosen})


def _measure_tiles(features: NDArray[np.float32], bags: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] of all tiles of some bags; a feature that never varies is left as it is."""
    count, total, squares = 0, np.zeros(features.shape[1]), np.zeros(features.shape[1])
    # Sums of squares lose digits where the mean is large; taken from a first bag's mean, they do not.
    origin = features[bags[0]].mean(axis=0, dtype=np.float64)
    for rows in bags:
        values = features[rows].astype(np.float64) - origin
        count += len(rows)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    spread = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
    mean = origin + total / count
    scale = np.where(spread > 1e-7 * np.abs(mean) + 1e-12, spread, 1.0)
    return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()


def _check_bag(card: TaskCard, split: Split, bag: str, places: list[int]) -> None:
    """A bag has one class, one group, one fold; anything else is a fault of the labels or the card."""
    kind = card.target.bag if isinstance(card.target, SlidesTarget) else "slide"
    classes = Counter(split.labels[places].tolist())
    if len(classes) > 1:
        names = ", ".join(f"{count} {card.classes[number]}" for number, count in classes.most_common())
        hint = "use bag: slide, or repair the labels" if kind == "patient" else "repair the labels"
        raise UserError(f"task {card.name}: the tiles of {kind} {bag} are of several classes ({names}); {hint}")
    if len(set(split.groups[places].tolist())) > 1:
        raise UserError(
            f"task {card.name}: the tiles of {kind} {bag} are of {len(set(split.groups[places].tolist()))} groups "
            f"({split.group_kind}), so a split could cut it; set group: {kind} in the card"
        )
