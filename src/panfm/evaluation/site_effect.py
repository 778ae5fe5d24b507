"""Protocol `leave_institution_out`: how well the linear probe does on an institution that it has not learned from.

    each institution of the test fold in turn: labelled images of all OTHERS -> probe -> scores of its test images
    variant none: the ranked probe          same_size: as many patients, its own among them, as the yardstick
    combat, balanced, group_dro: remedies that stand beside it

Only images of the test fold are scored, by a probe that learned from training-fold images of the other institutions.
Leaving an institution out of all folds and scoring all of its images would give more of them; but most of these are
training images, which the encoder's own pretraining may have seen (it keeps test patients out, not institutions), and
which `linear_probe` is not measured on. So the two stand on the same images, and their difference is paired. What an
encoder may have seen without a label is the institution's look in its training images: that cannot be undone here.

With an institution its labels go, too: less is learned from. The difference to `same_size` is what the institution
costs, the difference of that to `linear_probe` what the fewer labels do. Scores of several probes stand in one ranking;
a metric of each institution by itself is in the board's subgroup table of `institution`.
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.label_subsets import compute_label_subset
from panfm.evaluation.linear_probe import describe_fit
from panfm.evaluation.protocol import TRAIN_FOLDS, Material, Scored, Trial
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.combat import BatchEffect, Combat, estimate_batch, fit_combat
from panfm.measures.probe import ProbeFit, fit_probe_cv
from panfm.measures.robust_probe import fit_robust_probe_cv
from panfm.shards.index import ShardSet

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Remedy = Literal["none", "same_size", "combat", "balanced", "group_dro"]

POOLED = "small institutions"  # no institution has this name: it would be a code


@config_class
class LeaveInstitutionOutConfig:
    """Settings of leaving each institution out in turn."""

    variants: tuple[Remedy, ...] = ("none", "same_size", "combat", "balanced", "group_dro")
    """A section on the board each. none = the linear probe; same_size = as many labelled patients, those of the
    institution among them; combat = features harmonised (ComBat, fitted on training folds only); balanced = every
    institution counts as much as another; group_dro = the worst institution's loss is what is minimised."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where the rarest class has fewer groups."""
    min_images: int = Field(default=20, ge=2)
    """Institutions with fewer labelled training images are taken as one by the remedies: neither a mean and a spread of
    every feature nor a loss to be guarded against can be had from a few images."""


def build_institutions(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """Keep the images whose institution is known; what is left out is counted in the notes.

    Raises UserError where fewer than two institutions are left.
    """
    known = read_institutions(shard_set, split.rows) != ""
    names = np.unique(read_institutions(shard_set, split.rows)[known])
    if len(names) < 2:
        found = "no image has an institution" if len(names) == 0 else f"all images are of one institution ({names[0]})"
        raise UserError(
            f"task {card.name}: {found}, so none can be left out; map the column `institution` in the source card, or "
            f"leave leave_institution_out out of the protocols"
        )
    note = None if known.all() else f"{(~known).sum()} images of unknown institution"
    return split.take(np.flatnonzero(known), "institution known", note)


def read_institutions(shard_set: ShardSet, rows: Ints) -> NDArray[np.str_]:
    """The institution of each row [N]; empty where unknown."""
    values = shard_set.table.column("institution").take(pa.array(rows)).to_pylist()
    return np.array([value or "" for value in values], dtype=np.str_)


def score_leave_institution_out(trial: Trial, material: Material, config: LeaveInstitutionOutConfig) -> Scored:
    """Return probabilities for the trial's test part, each image's from a probe that its institution did not train.

    Raises UserError for a test image of unknown institution, and where the other institutions have one class only.
    """
    variant: Remedy = trial.recipe["variant"]
    split = trial.split
    features = np.asarray(material.features[split.rows], dtype=np.float64)
    institutions = read_institutions(material.shard_set, split.rows)
    if (institutions[trial.test] == "").any():
        raise UserError(
            f"task {trial.card.name}: {(institutions[trial.test] == '').sum()} of {len(trial.test)} test images have "
            f"no institution; score those of build_institutions only"
        )
    scores = np.zeros((len(trial.test), trial.num_classes))
    chosen: dict[str, Any] = {}
    for name in np.unique(institutions[trial.test]).tolist():
        of_test = institutions[trial.test] == name
        train = _choose_train(trial, institutions, name, variant)
        if len(np.unique(split.labels[train])) < 2:
            raise UserError(
                f"task {trial.card.name}: without institution {name} the {len(train)} labelled training images hold "
                f"fewer than two classes, so no probe can be scored on it; use a larger label fraction, or leave "
                f"leave_institution_out out"
            )
        test = trial.test[of_test]
        fit, test_features, notes = _fit(trial, features, institutions, train, test, name, variant, config)
        scores[of_test] = fit.probe.predict(test_features)
        chosen[name] = {
            **describe_fit(fit),
            "num_train": len(train),
            "num_train_institutions": len(np.unique(institutions[train])),
            "num_test": int(of_test.sum()),
            "classes_without_training": [
                trial.card.classes[k] for k in sorted(set(range(trial.num_classes)) - set(split.labels[train].tolist()))
            ],
            **notes,
        }
    return Scored(scores=scores, chosen={"institutions": chosen})


def _choose_train(trial: Trial, institutions: NDArray[np.str_], name: str, variant: Remedy) -> Ints:
    """Labelled training places of the other institutions; of same_size as many groups of all, drawn by class."""
    known: Ints = trial.train[institutions[trial.train] != ""]
    others: Ints = known[institutions[known] != name]
    if variant != "same_size":
        return others
    groups = trial.split.groups
    fraction = len(np.unique(groups[others])) / max(len(np.unique(groups[known])), 1)
    if fraction == 0:
        return others
    subset = compute_label_subset(
        trial.split.labels[known],
        groups[known],
        fraction=fraction,
        draw=trial.draw,
        task=f"{trial.card.name} without {name}",
        split_hash=trial.split.hash,
    )
    chosen: Ints = known[subset]
    return chosen


def _fit(
    trial: Trial,
    features: Floats,
    institutions: NDArray[np.str_],
    train: Ints,
    test: Ints,
    name: str,
    variant: Remedy,
    config: LeaveInstitutionOutConfig,
) -> tuple[ProbeFit, Floats, dict[str, Any]]:
    """The probe, the features of the test places as it takes them, and what else was chosen."""
    split = trial.split
    labels, groups = split.labels[train], split.groups[train]
    inner = {"num_classes": trial.num_classes, "seed": trial.seed, "num_folds": config.num_folds}
    if variant in ("none", "same_size"):
        return fit_probe_cv(features[train], labels, groups, **inner), features[test], {}
    batches = pool_small(institutions[train], config.min_images)
    notes: dict[str, Any] = {"num_pooled": int((batches == POOLED).sum())}
    if variant == "combat":
        harmonised, effect, combat, more = _harmonise(trial, features, institutions, batches, train, name, config)
        test_features = features[test] if effect is None else combat.remove(features[test], effect)
        return fit_probe_cv(harmonised, labels, groups, **inner), test_features, {**notes, **more}
    aim: Literal["balanced", "worst_case"] = "balanced" if variant == "balanced" else "worst_case"
    fit = fit_robust_probe_cv(features[train], labels, batches, groups, aim=aim, **inner)
    return fit, features[test], notes


def pool_small(institutions: NDArray[np.str_], min_images: int) -> NDArray[np.str_]:
    """Name the institutions with fewer images as one, and join the largest other where even they are too few."""
    names, number, counts = np.unique(institutions, return_inverse=True, return_counts=True)
    if (counts >= min_images).all() or (counts < min_images).all():
        return np.array(institutions if (counts >= min_images).all() else [POOLED] * len(institutions), dtype=np.str_)
    small = counts < min_images
    rest = POOLED if counts[small].sum() >= min_images else str(names[counts.argmax()])
    return np.where(small[number], rest, institutions).astype(np.str_)


def _harmonise(
    trial: Trial,
    features: Floats,
    institutions: NDArray[np.str_],
    batches: NDArray[np.str_],
    train: Ints,
    name: str,
    config: LeaveInstitutionOutConfig,
) -> tuple[Floats, BatchEffect | None, Combat, dict[str, Any]]:
    """Training features without their institutions' effects, and the effect of the one that is left out.

    Its effect is estimated from its images of the training folds, without their labels: a hospital has images long
    before it has diagnoses for them. No test image takes part, so each is scored as if it came alone. Where too few
    such images exist, its images stay as they are, and `chosen` says so.
    """
    split = trial.split
    classes = np.eye(trial.num_classes)[split.labels[train]]
    combat = fit_combat(features[train], batches, classes)
    harmonised = features[train].copy()
    for batch, effect in combat.effects.items():
        harmonised[batches == batch] = combat.remove(features[train][batches == batch], effect)
    training = np.isin(split.folds, TRAIN_FOLDS[trial.evaluated_on])
    seen = np.isin(split.groups, split.groups[trial.test])
    unlabelled = np.flatnonzero(training & ~seen & (institutions == name))
    enough = len(unlabelled) >= config.min_images
    own = estimate_batch(combat, features[unlabelled]) if enough else None
    return harmonised, own, combat, {"num_unlabelled": len(unlabelled), "harmonised": enough}
