"""Protocol `change`: two visits of one lesion, and the class of the later one.

    the split's images, and what the shards hold of the same lesions at other visits -> build_pairs -> split over pairs
    earlier image a, later image b  -> registration: b laid on a -> encoded again -> features f(a), f(b on a)
        f(b) - f(a)     -> linear probe    variant difference        log of the days between -> variant interval_only
        [f(a), f(b)]    -> linear probe    variant concatenation     f(b as it is)           -> variant single_image
        one layer for both, symmetric      variant siamese

The last two are not rivals but rulers: who is seen again after two weeks tells something by itself, and so does the
later image without any memory. A protocol that does not beat them has measured no change.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class
from panfm.data.decode import DecodeError, decode_rgb
from panfm.encoder.embedding import iterate_features
from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.evaluation.families import ChangeTarget
from panfm.evaluation.linear_probe import score_probe
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.registration import Alignment, align_pixels, register
from panfm.evaluation.small_heads import HeadConfig, score_head
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.files import compute_json_hash
from panfm.progress import progress_bar
from panfm.shards.index import ShardSet

Inputs = Literal["difference", "concatenation", "siamese", "interval_only", "single_image"]
SIAMESE_WIDTH, SIAMESE_DROPOUT = 128, 0.25
MAX_KEPT = 4  # sets of registered features an encoder keeps: tasks whose trials come one after the other


@config_class
class ChangeConfig:
    """Settings of the protocol of two visits."""

    variants: tuple[Inputs, ...] = ("difference", "concatenation", "siamese", "interval_only", "single_image")
    """What is looked at, a section on the board each; the last two are what the others must beat."""
    max_size: float = Field(default=1.25, ge=1, le=2)
    """How much registration may resize the later image, up or down, as a factor. 1 = never: right where every image was
    taken with the glass on the skin, for a difference in size is growth there; else it is mostly distance."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the probe's inner cross-validation; fewer where the rarest class has fewer groups."""
    siamese: HeadConfig = HeadConfig(max_epochs=60, batch_size=32)
    """Training of the Siamese head: rate and number of epochs chosen in inner folds, five seeds."""
    batch_size: int = Field(default=64, ge=1)
    """Registered images at once while encoding."""


@dataclass(frozen=True)
class _Visit:
    """A lesion on one day: the image that stands for it, and whether it belongs to the split."""

    day: int
    row: int
    place: int | None  # in the split; None = the image has no label, or no fold


def build_pairs(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """Pair the visits of each lesion: a split over pairs, as the card's `target` says.

    The later image is one of the split, and gives the pair its label, group and fold. The earlier one may have no label
    of its own, but must be of the same lesion, modality and group. A visit with several images is represented by the
    one of the smallest key (of those in the split, if any are). members: (earlier, later). keys: "EARLIER+LATER".

    Raises UserError where there is no pair.
    """
    target = card.target
    assert isinstance(target, ChangeTarget), "a card of family change"
    left_out: Counter[str] = Counter()
    keys = shard_set.table.column("key").to_pylist()
    groups = shard_set.table.column("group_id").to_pylist()
    pairs: list[tuple[str, int, int, int]] = []  # key, earlier row, later row, place of the later image
    for visits in _list_visits(card, split, shard_set, left_out):
        if len(visits) < 2:
            left_out["lesions of one visit"] += visits[0].place is not None
            continue
        for earlier, later in [(visits[0], visits[-1])] if target.pairs == "first_and_last" else pairwise(visits):
            days = later.day - earlier.day
            if later.place is None:
                left_out["pairs whose later image has no label or fold"] += 1
            elif days < target.min_days or (target.max_days is not None and days > target.max_days):
                left_out["pairs too close or too far apart in days"] += 1
            elif groups[earlier.row] != groups[later.row]:
                left_out[f"pairs across two groups ({split.group_kind})"] += 1
            else:
                pairs.append((f"{keys[earlier.row]}+{keys[later.row]}", earlier.row, later.row, later.place))
    notes = tuple(f"{count} {what}" for what, count in left_out.items() if count)
    if not pairs:
        raise UserError(
            f"task {card.name} on {shard_set.path}: no lesion has two visits to pair ({'; '.join(notes)}); it needs "
            f"lesion_id and visit_date in the source card, and lesions that were seen again"
        )
    pairs.sort()
    places = np.array([place for *_, place in pairs], dtype=np.int64)
    members = tuple(np.array([earlier, later], dtype=np.int64) for _, earlier, later, _ in pairs)
    names = [key for key, *_ in pairs]
    return replace(
        split,
        rows=np.array([rows[0] for rows in members], dtype=np.int64),
        keys=np.array(names, dtype=np.str_),
        groups=split.groups[places],
        labels=split.labels[places],
        folds=split.folds[places],
        hash=compute_json_hash([split.hash, "pairs", target.model_dump(mode="json"), names]),
        notes=(*split.notes, *notes),
        members=members,
    )


def score_change(trial: Trial, material: Material, config: ChangeConfig) -> Scored:
    """Return probabilities for the trial's test pairs. What is looked at is the variant of the trial's recipe."""
    variant: Inputs = trial.recipe["variant"]
    pairs = np.stack(trial.split.members)  # [N, 2]
    if variant == "interval_only":
        return score_probe(trial, np.log1p(_read_days(material.shard_set, pairs))[:, None], config.num_folds, {})
    if variant == "single_image":
        return score_probe(trial, np.asarray(material.features[pairs[:, 1]], np.float64), config.num_folds, {})
    registered = _get_registered(material, trial, config)
    earlier = np.asarray(material.features[pairs[:, 0]], dtype=np.float64)  # [N, D]
    later = np.asarray(registered.later, dtype=np.float64)
    if variant == "siamese":
        return _score_siamese(trial, material, earlier, later, config, registered.describe())
    inputs = later - earlier if variant == "difference" else np.concatenate([earlier, later], axis=1)
    return score_probe(trial, inputs, config.num_folds, registered.describe())


class SiameseHead(nn.Module):
    """One layer for both images, then what does not depend on their order: |h(a) - h(b)| and h(a) + h(b) -> logits."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(num_features, SIAMESE_WIDTH), nn.GELU(), nn.Dropout(SIAMESE_DROPOUT))
        self.classify = nn.Linear(2 * SIAMESE_WIDTH, num_classes)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits [b, K]; pairs: float32 [b, 2, D], standardised."""
        a, b = self.embed(pairs).unbind(dim=1)
        return self.classify(torch.cat([(a - b).abs(), a + b], dim=1))  # type: ignore[no-any-return]


def _list_visits(card: TaskCard, split: Split, shard_set: ShardSet, left_out: Counter[str]) -> Iterator[list[_Visit]]:
    """Yield the visits of each lesion in one modality, in order of days; lesions without an image in the split too."""
    columns = shard_set.table.select(["key", "lesion_id", "visit_day", "modality"]).to_pydict()
    place_of = {row: place for place, row in enumerate(split.rows.tolist())}
    images: dict[tuple[str, str], dict[int, list[tuple[bool, str, int]]]] = {}
    for row, (key, lesion, day, modality) in enumerate(zip(*columns.values(), strict=True)):
        if card.modality is not None and modality != card.modality:
            continue
        if lesion is None or day is None:
            left_out["images without a lesion id or a day of the visit"] += row in place_of
            continue
        images.setdefault((lesion, modality), {}).setdefault(day, []).append((row not in place_of, key, row))
    for days in images.values():
        visits = []
        for day, found in sorted(days.items()):
            row = min(found)[2]
            left_out["further images of a visit"] += sum(other in place_of for *_, other in found if other != row)
            visits.append(_Visit(day, row, place_of.get(row)))
        yield visits


def _read_days(shard_set: ShardSet, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Days between the two images of each pair [N]."""
    days = np.array(shard_set.table.column("visit_day").take(pairs.ravel()).to_pylist(), dtype=np.float64)
    return np.asarray(np.diff(days.reshape(-1, 2), axis=1)[:, 0])


def _score_siamese(
    trial: Trial,
    material: Material,
    earlier: NDArray[np.float64],
    later: NDArray[np.float64],
    config: ChangeConfig,
    chosen: dict[str, Any],
) -> Scored:
    device = material.encoder.device
    known = np.concatenate([earlier[trial.train], later[trial.train]])
    mean, spread = known.mean(axis=0), known.std(axis=0)
    scale = np.where(spread > 1e-7 * np.abs(mean) + 1e-12, spread, 1.0)
    values = torch.from_numpy((np.stack([earlier, later], axis=1) - mean) / scale).float().to(device)  # [N, 2, D]
    found = score_head(
        lambda num_classes: SiameseHead(earlier.shape[1], num_classes),
        lambda module, places, rng: module(values[torch.from_numpy(places).to(device)]),
        labels=trial.split.labels,
        groups=trial.split.groups,
        train=trial.train,
        test=trial.test,
        num_classes=trial.num_classes,
        seed=trial.seed,
        config=config.siamese,
        device=device,
        description=f"Siamese head on {trial.card.name}",
    )
    return Scored(found.scores, {**found.describe(), **chosen})


@dataclass(frozen=True)
class _Registered:
    """Features of the later images of all pairs, laid on the earlier ones, [N, D]; and how they were laid."""

    later: NDArray[np.float32]
    alignments: tuple[Alignment, ...]

    def describe(self) -> dict[str, Any]:
        """How many images were registered, and how much better they match: the medians of the correlations."""
        kept = [alignment for alignment in self.alignments if alignment.is_kept]
        facts: dict[str, Any] = {"num_pairs": len(self.alignments), "num_registered": len(kept)}
        if kept:
            facts["match_before"] = round(float(np.median([alignment.match_before for alignment in kept])), 4)
            facts["match_after"] = round(float(np.median([alignment.match_after for alignment in kept])), 4)
            facts["size"] = round(float(np.median([alignment.size for alignment in kept])), 4)
        return facts


# Kept while the encoder lives: every variant, fraction, draw and outer fold of a task looks at the same pairs, and they
# cost an encoding each. Small (a feature a pair), so bounded by number.
_KEPT: WeakKeyDictionary[Encoder, dict[str, _Registered]] = WeakKeyDictionary()


def _get_registered(material: Material, trial: Trial, config: ChangeConfig) -> _Registered:
    kept = _KEPT.setdefault(material.encoder, {})
    name = compute_json_hash([trial.split.hash, trial.data_hash, config.max_size])
    if name not in kept:
        if len(kept) >= MAX_KEPT:
            del kept[next(iter(kept))]
        kept[name] = _register_pairs(material, trial, config)
    return kept[name]


def _register_pairs(material: Material, trial: Trial, config: ChangeConfig) -> _Registered:
    """Register all pairs of the split and encode the later images that moved; the others keep their feature.

    Labels take no part in it, so test pairs are treated as any others.
    """
    shard_set, encoder = material.shard_set, material.encoder
    alignments = []
    with progress_bar(f"register {trial.card.name}", len(trial.split.members), unit="pairs") as advance:
        for earlier, later in trial.split.members:
            alignments.append(
                register(_read_pixels(shard_set, earlier), _read_pixels(shard_set, later), max_size=config.max_size)
            )
            advance()
    features = np.stack([material.features[later] for _, later in trial.split.members]).astype(np.float32)
    moved = [place for place, alignment in enumerate(alignments) if alignment.is_kept]
    readers: list[Callable[[], bytes]] = [
        partial(_read_aligned, shard_set, int(trial.split.members[place][1]), alignments[place]) for place in moved
    ]
    names = [f"{trial.split.keys[place]}, the later image registered" for place in moved]
    done = 0
    with progress_bar(f"features of registered {trial.card.name} by {encoder.name}", len(moved)) as advance:
        for block in iterate_features(encoder, readers, names, config.batch_size):
            features[moved[done : done + len(block)]] = block
            done += len(block)
            advance(len(block))
    return _Registered(features, tuple(alignments))


def _read_pixels(shard_set: ShardSet, row: int) -> NDArray[np.uint8]:
    try:
        return decode_rgb(shard_set.read_image(int(row)))
    except DecodeError as error:
        key = shard_set.table.column("key")[int(row)].as_py()
        raise UserError(f"{shard_set.path}: {key} does not decode ({error}); build the shards again") from None


def _read_aligned(shard_set: ShardSet, row: int, alignment: Alignment) -> bytes:
    """The registered image as a file, so that it goes through the encoder's own transform; PNG loses nothing."""
    data = io.BytesIO()
    Image.fromarray(align_pixels(_read_pixels(shard_set, row), alignment)).save(data, "PNG", compress_level=0)
    return data.getvalue()
