"""The online probe: what is the encoder worth by now, on labelled images that pretraining never draws?

    ProbeConfig, shard sets  ->  build_probe  ->  Probe: images in memory, by modality, patients on one side each
    Probe, encoder           ->  run          ->  kNN: AUROC and balanced accuracy of each modality, None if undefined

Nothing is fitted and nothing is random: images and sides follow from the groups' hashed ids alone, so a curve goes on
where a resumed run left it, and two runs on the same sets are measured on the same images. It is for watching and for
choosing recipes; choose nothing by it on images that a reported test is made of.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from panfm.config import config_class
from panfm.data.decode import DecodeError
from panfm.data.loader import DataConfig
from panfm.data.transforms import EvalTransform
from panfm.distributed import gather_objects, get_rank, get_world_size, is_main
from panfm.errors import UserError
from panfm.files import compute_sha256
from panfm.measures.knn import predict_knn
from panfm.measures.metrics import compute_metric
from panfm.shards.index import Exclusion, ShardSet, open_shard_set, read_index
from panfm.shards.schema import MODALITIES

METRICS = ("auroc", "balanced_accuracy")
MIN_PER_CLASS = 5  # images of a class on each side: a class seen less often says more about chance than the encoder
IDENTITIES = ("group_id", "patient_id", "lesion_id", "sha256")  # what a probe image must not share with a drawn one
BATCH_SIZE = 64  # images a forward pass


@config_class
class ProbeConfig:
    """Nearest neighbours on held-out images, every so many steps."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Shard sets whose labelled images are probed. None of them may be drawn in pretraining: take sets that data.shards
    does not name; of one that it names, only the groups that data.exclude keeps out are taken."""
    label: str = "diagnosis"
    """Name of the label that the neighbours vote on."""
    every: int = Field(default=1000, ge=1)
    """Steps between two probes; the first is after step 1, when the encoder is nearly what the run started from."""
    num_samples: int = Field(default=1000, ge=20)
    """Images of each modality, half of them neighbours, half tested. At 224 px 1000 take 150 MB over the ranks."""
    k: int = Field(default=20, ge=1)
    """Neighbours that vote, as in panfm's kNN protocol."""


@dataclass(frozen=True)
class ProbePart:
    """The images of one modality: rows of the probe's images, and what the neighbours vote on."""

    modality: str
    train: NDArray[np.int64]  # numbers of images
    test: NDArray[np.int64]
    train_labels: NDArray[np.int64]  # 0 .. num_classes - 1
    test_labels: NDArray[np.int64]
    num_classes: int  # fewer than two: nothing to tell apart, every value is None


@dataclass(frozen=True)
class Probe:
    """What is probed. Each rank holds and encodes every world_size-th image; rank 0 judges."""

    config: ProbeConfig
    parts: tuple[ProbePart, ...]
    images: Tensor = field(repr=False)  # uint8 [N / world_size, 3, S, S]: those of this rank
    num_images: int  # N, over all ranks
    num_groups: int
    num_reserved: int  # of N, images of a source that is drawn: of groups that evaluation tests on

    def describe(self) -> list[str]:
        """What is probed, by modality, in a line; and a second one where reported tests may be made of it."""
        parts = [
            f"{part.modality} {len(part.train)} neighbours, {len(part.test)} tested, {part.num_classes} classes"
            if part.num_classes > 1
            else f"{part.modality} none (fewer than two classes with {MIN_PER_CLASS} images on each side)"
            for part in self.parts
        ]
        lines = [f"probe of {self.config.label}: {'; '.join(parts)}; {self.num_groups:,} patients or other groups"]
        if self.num_reserved:
            lines.append(
                f"{self.num_reserved:,} of the {self.num_images:,} images probed are of groups that evaluation tasks "
                "test on: a run that is chosen by them must not be reported on those tasks"
            )
        return lines

    def run(self, compute_features: Callable[[Tensor], Tensor]) -> dict[str, float | None]:
        """Measure the encoder: compute_features maps uint8 [B, 3, S, S] to features [B, D]; every rank must call it.

        Returns probe/<modality>/<metric> on rank 0, nothing elsewhere. None where a modality has fewer than two classes
        or a feature is not finite.
        """
        own = [compute_features(batch).float().cpu().numpy() for batch in self.images.split(BATCH_SIZE)]
        gathered = gather_objects(np.concatenate(own) if own else None)
        if not is_main():
            return {}
        width = max(block.shape[1] for block in gathered if block is not None)
        features = np.empty((self.num_images, width), dtype=np.float32)
        for rank, block in enumerate(gathered):
            if block is not None:
                features[rank :: len(gathered)] = block
        values: dict[str, float | None] = {}
        for part in self.parts:
            values |= {f"probe/{part.modality}/{name}": value for name, value in self._judge(part, features).items()}
        return values

    def _judge(self, part: ProbePart, features: NDArray[np.float32]) -> dict[str, float | None]:
        train, test = features[part.train], features[part.test]
        if part.num_classes < 2 or not (np.isfinite(train).all() and np.isfinite(test).all()):
            return dict.fromkeys(METRICS)
        scores = predict_knn(train, part.train_labels, test, num_classes=part.num_classes, k=self.config.k)
        return {name: compute_metric(name, part.test_labels, scores).value for name in METRICS}


@dataclass(frozen=True)
class Candidate:
    """A labelled image that might be probed."""

    shard_set: int
    row: int
    modality: str
    group: str
    label: str


def build_probe(config: ProbeConfig, data: DataConfig, excluded: Exclusion, transform: EvalTransform) -> Probe:
    """Choose the images, check that pretraining draws none of them, and decode this rank's share.

    transform: the encoder's evaluation transform. Raises UserError: an image that may be drawn, or one of a patient, a
    lesion or a group that may be; no labelled image; one that does not decode.
    """
    where = f"monitor.probe.shards ({', '.join(config.shards)})"
    shard_sets = [open_shard_set(path, (*IDENTITIES, "key", "modality", "labels")) for path in config.shards]
    drawn_sources = {read_index(path)["card"]["name"] for path in data.shards}
    candidates = [
        candidate
        for number, shard_set in enumerate(shard_sets)
        for candidate in _list_candidates(shard_set, number, config.label, excluded, drawn_sources)
    ]
    if not candidates:
        raise UserError(
            f"{where}: no image there has the label {config.label} and is kept out of pretraining; name another "
            "monitor.probe.label, or sets that data.shards does not name"
        )
    chosen = choose_samples(candidates, config.num_samples)
    _check_undrawn([candidate for candidate, _ in chosen], shard_sets, data, excluded, where)

    own = [candidate for candidate, _ in chosen][get_rank() :: get_world_size()]
    with ThreadPoolExecutor(max_workers=max(data.workers, 1)) as pool:
        images = list(pool.map(lambda one: _decode(shard_sets[one.shard_set], one.row, transform), own))
    size = transform.image_size
    return Probe(
        config,
        tuple(
            _make_part(modality, chosen)
            for modality in MODALITIES
            if any(one.modality == modality for one, _ in chosen)
        ),
        torch.from_numpy(np.stack(images)) if images else torch.empty((0, 3, size, size), dtype=torch.uint8),
        num_images=len(chosen),
        num_groups=len({one.group for one, _ in chosen}),
        num_reserved=sum(shard_sets[one.shard_set].source in drawn_sources for one, _ in chosen),
    )


def choose_samples(candidates: Sequence[Candidate], num_samples: int) -> list[tuple[Candidate, bool]]:
    """Choose up to `num_samples` images of each modality: (candidate, whether it is tested), in a fixed order.

    A group's hash decides its side, for all its images of all modalities. As many groups as possible take part: first
    one image of each, then a second, until each side has half.
    """
    draw = {one.group: compute_sha256(f"probe {one.group}".encode()) for one in candidates}
    ordered = sorted(candidates, key=lambda one: (draw[one.group], one.shard_set, one.row))
    count: dict[tuple[str, str], int] = {}
    turns: list[tuple[int, str, Candidate]] = []
    for one in ordered:
        turn = count[one.modality, one.group] = count.get((one.modality, one.group), -1) + 1
        turns.append((turn, draw[one.group], one))
    chosen: list[tuple[Candidate, bool]] = []
    taken: dict[tuple[str, bool], int] = {}
    for _, number, one in sorted(turns, key=lambda turn: turn[:2]):
        is_tested = bool(int(number[-1], 16) % 2)  # the last digit: the first ones decide the order
        if (so_far := taken.get((one.modality, is_tested), 0)) < num_samples // 2:
            taken[one.modality, is_tested] = so_far + 1
            chosen.append((one, is_tested))
    return chosen


def find_drawable(shard_set: ShardSet, data: DataConfig, excluded: Exclusion) -> NDArray[np.bool_]:
    """Which samples of a set in data.shards pretraining may draw, [N]."""
    table, source = shard_set.table, shard_set.source
    groups, keys = excluded.groups.get(source, frozenset()), excluded.keys.get(source, frozenset())
    kept_out = pc.or_(
        pc.is_in(table["group_id"], value_set=pa.array(sorted(groups), pa.string())),
        pc.is_in(table["key"], value_set=pa.array(sorted(keys), pa.string())),
    )
    of_modality = pc.is_in(table["modality"], value_set=pa.array(data.modalities, pa.string()))
    drawable: NDArray[np.bool_] = pc.and_not(of_modality, kept_out).to_numpy()
    return drawable


def _list_candidates(
    shard_set: ShardSet, number: int, label: str, excluded: Exclusion, drawn_sources: set[str]
) -> list[Candidate]:
    table = shard_set.table
    labels = pc.map_lookup(table["labels"].combine_chunks(), pa.scalar(label), "first")
    usable = pc.is_valid(labels)
    if shard_set.source in drawn_sources:
        groups = excluded.groups.get(shard_set.source, frozenset())
        usable = pc.and_(
            usable, pc.is_in(table["group_id"].combine_chunks(), value_set=pa.array(sorted(groups), pa.string()))
        )
    rows = np.flatnonzero(usable.to_numpy(zero_copy_only=False))
    taken = table.select(["modality", "group_id"]).take(pa.array(rows))
    columns = (rows.tolist(), taken["modality"].to_pylist(), taken["group_id"].to_pylist())
    return [
        Candidate(number, row, modality, group, value)
        for row, modality, group, value in zip(*columns, labels.take(pa.array(rows)).to_pylist(), strict=True)
    ]


def _check_undrawn(
    chosen: Sequence[Candidate],
    shard_sets: Sequence[ShardSet],
    data: DataConfig,
    excluded: Exclusion,
    where: str,
) -> None:
    """Refuse a probe that shares an image, a lesion, a patient or a group with what pretraining may draw."""
    rows = {number: [one.row for one in chosen if one.shard_set == number] for number in range(len(shard_sets))}
    for path in data.shards:
        drawn = open_shard_set(path, (*IDENTITIES, "key", "modality"))  # one after the other: they may be large
        drawable = drawn.table.select(IDENTITIES).filter(pa.array(find_drawable(drawn, data, excluded)))
        for number, shard_set in enumerate(shard_sets):
            probed = shard_set.table.select(IDENTITIES).take(pa.array(rows[number], pa.int64()))
            for name in IDENTITIES:
                # Ids are keyed hashes: the same one in two sources of an archive is the same patient or lesion.
                shared = pc.and_(
                    pc.is_valid(probed[name]), pc.is_in(probed[name], value_set=drawable[name].combine_chunks())
                )
                if count := int(pc.sum(shared).as_py() or 0):
                    raise UserError(
                        f"{where}: {count} of the {len(rows[number])} images chosen of {shard_set.source} share their "
                        f"{name} with images of {drawn.source} that pretraining may draw; a probe must be of other "
                        "patients: take another set, or keep these groups out with data.exclude"
                    )


def _make_part(modality: str, chosen: Sequence[tuple[Candidate, bool]]) -> ProbePart:
    """The images of one modality whose class has MIN_PER_CLASS images on each side."""
    sides = [
        [i for i, (one, tested) in enumerate(chosen) if one.modality == modality and tested is side]
        for side in (False, True)
    ]
    values = [[chosen[i][0].label for i in side] for side in sides]
    classes = sorted(name for name in set(values[0]) if min(side.count(name) for side in values) >= MIN_PER_CLASS)
    number = {name: place for place, name in enumerate(classes)}
    train, test = ([i for i in side if chosen[i][0].label in number] for side in sides)
    train_labels, test_labels = ([number[chosen[i][0].label] for i in side] for side in (train, test))
    numbers, tested, labels, expected = (np.array(v, dtype=np.int64) for v in (train, test, train_labels, test_labels))
    return ProbePart(modality, numbers, tested, labels, expected, num_classes=len(classes))


def _decode(shard_set: ShardSet, row: int, transform: EvalTransform) -> NDArray[np.uint8]:
    try:
        return transform.apply(shard_set.read_image(row))
    except DecodeError as error:
        key = shard_set.table["key"][row].as_py()
        raise UserError(f"{shard_set.path}: {key} does not decode ({error}); build this source again") from None
