"""All protocols in one table: what each measures, which units it scores, and the function that scores them.

PROTOCOLS[name] -> families, unit, build_units (images -> units), score(trial, material, settings)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from panfm.evaluation.case_fusion import build_cases, score_case_fusion
from panfm.evaluation.change import build_pairs, score_change
from panfm.evaluation.compat import score_dinov2_compat, score_panderm_compat
from panfm.evaluation.families import Family, RegressionTarget, read_numbers
from panfm.evaluation.finetune import score_finetune
from panfm.evaluation.knn import score_knn
from panfm.evaluation.linear_probe import score_linear_probe, score_linear_probes
from panfm.evaluation.metadata_fusion import score_metadata_fusion
from panfm.evaluation.out_of_distribution import score_out_of_distribution
from panfm.evaluation.protocol import Material, Protocol, Scored, Trial
from panfm.evaluation.prototype import score_prototype
from panfm.evaluation.regression import score_ordinal, score_regression
from panfm.evaluation.retrieval import build_queries, score_retrieval
from panfm.evaluation.segmentation import score_segmentation
from panfm.evaluation.site_effect import build_institutions, score_leave_institution_out
from panfm.evaluation.slides import build_bags, score_slides
from panfm.evaluation.splits import Split
from panfm.evaluation.survival import build_patients, score_survival
from panfm.evaluation.tasks import TaskCard
from panfm.evaluation.ugly_duckling import build_people, score_ugly_duckling
from panfm.evaluation.zero_shot import score_zero_shot
from panfm.shards.index import ShardSet

Score = Callable[[Trial, Material, Any], Scored]
CLASSES: tuple[Family, ...] = ("classification", "ordinal")  # an image has a class, whatever else is asked of it


@dataclass(frozen=True)
class ProtocolEntry:
    """What the run must know of a protocol.

    families: whose tasks it measures. build_units: where it does not score single images, makes the units from the
    images' split. is_trained: False where it has nothing to learn from labels, so that no label fraction applies.
    has_seed: whether its training draws at random, so that each of the run's seeds is a measurement of its own.
    shows_progress: whether one trial takes minutes and shows a bar of its own. score_many: scores all trials of a piece
    at once; taken on GPUs, which one small fit after the other leaves idle.
    """

    families: tuple[Family, ...]
    score: Score
    unit: str = "image"
    build_units: Callable[[TaskCard, Split, ShardSet], Split] | None = None
    is_trained: bool = True
    has_seed: bool = False
    shows_progress: bool = False
    score_many: Callable[[Sequence[Trial], Material, Any], list[Scored]] | None = None


def _on_features(score: Callable[..., Scored]) -> Score:
    """A protocol that looks at the features of the split's images alone."""
    return lambda trial, material, config: score(trial, material.features[trial.split.rows], config)


def _on_cls(score: Callable[..., Scored]) -> Score:
    """A protocol of a publication that reads the class token where there is one."""

    def call(trial: Trial, material: Material, config: Any) -> Scored:
        features = material.features[trial.split.rows]
        return score(trial, features, config, has_cls=material.encoder.module.has_cls)

    return call


def _score_linear_probes(trials: Sequence[Trial], material: Material, config: Any) -> list[Scored]:
    features = material.features[trials[0].split.rows]
    return score_linear_probes(trials, features, config, material.encoder.device)


def _score_metadata_fusion(trial: Trial, material: Material, config: Any) -> Scored:
    return score_metadata_fusion(trial, material.features[trial.split.rows], material.shard_set, config)


def _score_finetune(trial: Trial, material: Material, config: Any) -> Scored:
    features = material.features[trial.split.rows]
    return score_finetune(trial, features, material.encoder, material.shard_set, config)


def _add_numbers(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """The images with the number that is asked of each."""
    assert isinstance(card.target, RegressionTarget), "a number is asked for"
    numbers = read_numbers(shard_set.table.take(pa.array(split.rows)), card.target.column)
    low, high = card.target.low, card.target.high
    inside = (numbers >= (-np.inf if low is None else low)) & (numbers <= (np.inf if high is None else high))
    if inside.all():
        return replace(split, targets=numbers[:, None])
    note = f"{(~inside).sum()} images whose {card.target.column} lies outside {low} to {high}: errors of the source"
    kept = split.take(np.flatnonzero(inside), f"inside {low} {high}", note)
    return replace(kept, targets=numbers[inside][:, None])


PROTOCOLS: Mapping[Protocol, ProtocolEntry] = {
    "linear_probe": ProtocolEntry(CLASSES, _on_features(score_linear_probe), score_many=_score_linear_probes),
    "knn": ProtocolEntry(CLASSES, _on_features(score_knn)),
    "prototype": ProtocolEntry(CLASSES, _on_features(score_prototype)),
    "finetune": ProtocolEntry(CLASSES, _score_finetune, has_seed=True, shows_progress=True),
    "metadata_fusion": ProtocolEntry(CLASSES, _score_metadata_fusion),
    "case_fusion": ProtocolEntry(("classification",), score_case_fusion, "case", build_cases),
    "leave_institution_out": ProtocolEntry(
        ("classification",), score_leave_institution_out, "image of a known institution", build_institutions
    ),
    "panderm_compat": ProtocolEntry(("classification",), _on_cls(score_panderm_compat)),
    "dinov2_compat": ProtocolEntry(("classification",), _on_cls(score_dinov2_compat)),
    "regression": ProtocolEntry(("regression",), score_regression, build_units=_add_numbers),
    "ordinal": ProtocolEntry(("ordinal",), score_ordinal),
    "out_of_distribution": ProtocolEntry(("out_of_distribution",), score_out_of_distribution),
    "segmentation": ProtocolEntry(("segmentation",), score_segmentation, has_seed=True, shows_progress=True),
    "slides": ProtocolEntry(("slides",), score_slides, "bag", build_bags, shows_progress=True),
    "change": ProtocolEntry(("change",), score_change, "pair", build_pairs, shows_progress=True),
    "survival": ProtocolEntry(("survival",), score_survival, "patient", build_patients),
    "retrieval": ProtocolEntry(("retrieval",), score_retrieval, "query", build_queries, is_trained=False),
    "zero_shot": ProtocolEntry(("zero_shot",), score_zero_shot, is_trained=False),
    "ugly_duckling": ProtocolEntry(("ugly_duckling",), score_ugly_duckling, build_units=build_people, is_trained=False),
}
