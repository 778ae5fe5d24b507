"""`panfm evaluate audit`: what of a task's labels and features comes from elsewhere than from the skin.

    features of the task's images -> a probe that tells the institution, within each diagnosis, held-out patients
                                  -> a probe that tells the diagnosis, held-out patients -> labels that look wrong
    label@reader columns          -> how far readers agree

All folds take part, the test fold too: an audit is about the data, not about an encoder. So nothing that it finds may
be used to correct the test labels of an encoder that is then measured on them: have every suspect looked at by somebody
who does not see what the model says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.errors import UserError
from panfm.evaluation.site_effect import read_institutions
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.agreement import MISSING, Weighting, measure_agreement
from panfm.measures.intervals import Estimate
from panfm.measures.label_errors import compute_error_share, count_joint, find_label_errors
from panfm.measures.probe import fit_probe_cv, make_group_folds
from panfm.measures.statistics import compute_bootstrap_seed, compute_interval, draw_group_weights, estimate_metrics
from panfm.shards.index import ShardSet

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_FOLDS, NUM_INNER_FOLDS = 5, 3
MIN_GROUPS = 5  # of an institution within a diagnosis: one a fold; also the fewest that a count may show
CORRECTED = "original"  # label@original is what a correction replaced, no reader (source cards)


@dataclass(frozen=True)
class SiteSignal:
    """How well features tell the institution among the images of one diagnosis. Chance: AUROC 0.5, accuracy 1 / S."""

    diagnosis: str
    institutions: tuple[str, ...]  # those with enough groups
    num_images: int
    auroc: Estimate
    balanced_accuracy: Estimate


@dataclass(frozen=True)
class SiteAudit:
    """What the institution has to do with the features, and with the diagnosis.

    signals: one a diagnosis that at least two institutions have. counts: institution -> groups of each diagnosis, None
    where fewer than MIN_GROUPS (but not 0). told_by_institution: AUROC of the diagnosis by the institution alone.
    reason: why there is nothing, else None.
    """

    signals: tuple[SiteSignal, ...]
    counts: dict[str, tuple[int | None, ...]]
    num_unknown: int
    told_by_institution: Estimate | None  # None where no folds can be cut
    reason: str | None


@dataclass(frozen=True)
class Suspect:
    """An image whose label is doubted. place: in the split. Probabilities are those of a probe of other patients."""

    place: int
    key: str
    fold: str
    given: str
    suggested: str
    p_given: float
    p_suggested: float


@dataclass(frozen=True)
class LabelAudit:
    """Confident learning on the task's labels. joint: images labelled i (row) and confidently j (column)."""

    auroc: Estimate  # of the held-out probabilities: how much the probe's doubts are worth
    error_share: Estimate
    joint: tuple[tuple[int, ...], ...]
    suspects: tuple[Suspect, ...]


@dataclass(frozen=True)
class ReaderPair:
    """Cohen's kappa of two readers on the images that both read."""

    first: str
    second: str
    num_images: int
    kappa: Estimate


@dataclass(frozen=True)
class ReaderAudit:
    """How far readers agree; reason: why there is nothing, else None."""

    readers: tuple[str, ...]
    num_images: int
    fleiss: Estimate | None
    pairs: tuple[ReaderPair, ...]
    weighting: Weighting
    reason: str | None


@dataclass(frozen=True)
class TaskAudit:
    """All that an audit of one task found with the features of one encoder."""

    site: SiteAudit
    labels: LabelAudit
    readers: ReaderAudit


def audit_task(
    card: TaskCard,
    split: Split,
    shard_set: ShardSet,
    features: NDArray[np.float32],
    *,
    seed: int = 0,
    num_replicates: int = 2000,
) -> TaskAudit:
    """Audit a task of images with classes. features: [N, D] of the split's images, in its order.

    Raises UserError for a task of another family, and where no folds can be cut: a diagnosis of one patient only.
    """
    if card.family not in ("classification", "ordinal"):
        raise UserError(f"task {card.name} is of family {card.family}; only classification and ordinal can be audited")
    values = np.asarray(features, dtype=np.float64)
    draws = (compute_bootstrap_seed(card.name, split.hash), num_replicates)
    return TaskAudit(
        site=_audit_site(card, split, shard_set, values, seed, draws),
        labels=_audit_labels(card, split, values, seed, draws),
        readers=_audit_readers(card, split, shard_set, draws),
    )


def predict_out_of_fold(
    features: Floats, labels: Ints, groups: NDArray[np.str_], num_classes: int, seed: int
) -> Floats:
    """Probabilities [N, K] of a linear probe that saw neither the image nor another one of its group.

    C is chosen anew inside the training part of every fold. Raises UserError where no two folds can be cut.
    """
    folds = make_group_folds(labels, groups, NUM_FOLDS, seed)
    if folds.max() == 0:
        raise UserError("held-out probabilities need at least two patients (groups) of every class")
    probabilities = np.empty((len(labels), num_classes))
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        fit = fit_probe_cv(
            features[~out], labels[~out], groups[~out], num_classes=num_classes, seed=seed, num_folds=NUM_INNER_FOLDS
        )
        probabilities[out] = fit.probe.predict(features[out])
    return probabilities


def _audit_site(
    card: TaskCard, split: Split, shard_set: ShardSet, features: Floats, seed: int, draws: tuple[int, int]
) -> SiteAudit:
    institutions = read_institutions(shard_set, split.rows)
    known = institutions != ""
    num_unknown = int((~known).sum())
    names = np.unique(institutions[known]).tolist()
    if len(names) < 2:
        reason = f"the images name {len(names)} institution{'s' if not names else ''}; two are needed"
        return SiteAudit((), {}, num_unknown, None, reason)
    counts = {
        name: [_count_groups(split, (institutions == name) & (split.labels == k)) for k in range(len(card.classes))]
        for name in names
    }
    signals = []
    for k, diagnosis in enumerate(card.classes):
        enough = [name for name in names if counts[name][k] >= MIN_GROUPS]
        if len(enough) < 2:
            continue
        rows = np.flatnonzero((split.labels == k) & np.isin(institutions, enough))
        of = np.searchsorted(enough, institutions[rows]).astype(np.int64)
        told = predict_out_of_fold(features[rows], of, split.groups[rows], len(enough), seed)
        found = _estimate(("auroc", "balanced_accuracy"), of, told, split.groups[rows], draws)
        signals.append(SiteSignal(diagnosis, tuple(enough), len(rows), found["auroc"], found["balanced_accuracy"]))
    by_site = _predict_from_institution(
        institutions[known], split.labels[known], split.groups[known], len(card.classes), seed
    )
    alone = None
    if by_site is not None:
        alone = _estimate(("auroc",), split.labels[known], by_site, split.groups[known], draws)["auroc"]
    shown = {
        name: tuple(count if count == 0 or count >= MIN_GROUPS else None for count in row)
        for name, row in counts.items()
    }
    nothing = f"no diagnosis has {MIN_GROUPS} patients (groups) at each of two institutions"
    return SiteAudit(tuple(signals), shown, num_unknown, alone, None if signals else nothing)


def _predict_from_institution(
    institutions: NDArray[np.str_], labels: Ints, groups: NDArray[np.str_], num_classes: int, seed: int
) -> Floats | None:
    """Shares of the diagnoses at an image's institution among other patients, one image of each added: [N, K].

    None where no folds can be cut.
    """
    folds = make_group_folds(labels, groups, NUM_FOLDS, seed)
    if folds.max() == 0:
        return None
    number = np.unique(institutions, return_inverse=True)[1]
    probabilities = np.empty((len(labels), num_classes))
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        counts = np.ones((int(number.max()) + 1, num_classes))
        np.add.at(counts, (number[~out], labels[~out]), 1)
        probabilities[out] = (counts / counts.sum(axis=1, keepdims=True))[number[out]]
    return probabilities


def _audit_labels(card: TaskCard, split: Split, features: Floats, seed: int, draws: tuple[int, int]) -> LabelAudit:
    labels, K = split.labels, len(card.classes)
    try:
        told = predict_out_of_fold(features, labels, split.groups, K, seed)
    except UserError as error:
        raise UserError(f"task {card.name}: {error}; leave rare classes out of the card, or use more images") from None
    found = find_label_errors(labels, told)
    weights = draw_group_weights(split.groups, draws[1], draws[0])
    replicates = compute_error_share(
        count_joint(labels, found.confident, K, weights), weights.astype(np.float64) @ np.eye(K)[labels]
    )
    interval = compute_interval(replicates, len(np.unique(split.groups)))
    suspects = tuple(
        Suspect(
            place=place,
            key=str(split.keys[place]),
            fold=str(split.folds[place]),
            given=card.classes[labels[place]],
            suggested=card.classes[found.confident[place]],
            p_given=float(told[place, labels[place]]),
            p_suggested=float(told[place, found.confident[place]]),
        )
        for place in found.suspects.tolist()
    )
    return LabelAudit(
        auroc=_estimate(("auroc",), labels, told, split.groups, draws)["auroc"],
        error_share=Estimate(
            found.error_share, interval.low, interval.high, interval.reason, interval.num_undefined, interval.method
        ),
        joint=tuple(tuple(row) for row in found.joint.tolist()),
        suspects=suspects,
    )


def _audit_readers(card: TaskCard, split: Split, shard_set: ShardSet, draws: tuple[int, int]) -> ReaderAudit:
    weighting: Weighting = "quadratic" if card.family == "ordinal" else "none"
    labels = shard_set.table.column("labels").take(pa.array(split.rows)).to_pylist()
    read = [dict(entries or ()) for entries in labels]
    names: list[str] = sorted({name for entries in read for name in entries})
    names = [
        name
        for name in names
        if name == card.label or (name.startswith(f"{card.label}@") and name != f"{card.label}@{CORRECTED}")
    ]
    if len(names) < 2:
        reason = f"one reader is recorded; a second one's label is {card.label}@NAME in the source card"
        return ReaderAudit(tuple(names), 0, None, (), weighting, reason)
    class_of = {value: k for k, name in enumerate(card.classes) for value in card.get_values()[name]}
    readings = np.array([[class_of.get(entries.get(name, ""), MISSING) for name in names] for entries in read])
    agreement = measure_agreement(
        readings, split.groups, len(card.classes), seed=draws[0], weighting=weighting, num_replicates=draws[1]
    )
    pairs = tuple(
        ReaderPair(names[pair.reader_a], names[pair.reader_b], pair.num_images, pair.kappa) for pair in agreement.pairs
    )
    return ReaderAudit(tuple(names), agreement.num_images, agreement.fleiss, pairs, weighting, None)


def _estimate(
    metrics: Sequence[str], labels: Ints, scores: Floats, groups: NDArray[np.str_], draws: tuple[int, int]
) -> dict[str, Estimate]:
    return estimate_metrics(metrics, labels, scores, groups, seed=draws[0], num_replicates=draws[1])


def _count_groups(split: Split, chosen: NDArray[np.bool_]) -> int:
    return len(np.unique(split.groups[chosen]))
