"""Repeated nested cross-validation: every unit is scored by probes that saw neither it nor its group.

    trial + outer folds --a trial a fold, its own inner selection--> scores of the fold --mean over repeats--> Scored

Where a source has too few groups for a test fold of its own (the card's split: {kind: nested}). A unit's scores are
averaged over the repeats before metrics are computed, and intervals are those of one such test set: how much the choice
of training groups moves a number shows in the repeats, which are stored.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from panfm.evaluation.protocol import Scored, Trial, choose_labelled
from panfm.evaluation.splits import find_outer_folds
from panfm.evaluation.tasks import NestedSplit


def score_nested(trial: Trial, score: Callable[[Trial], Scored]) -> Scored:
    """Score every unit of the trial's test part by `score`, a fold at a time, as often as the card's split says."""
    nested = trial.card.split
    assert isinstance(nested, NestedSplit) and len(trial.test) == len(trial.split.keys), "everything is scored"
    repeats, outer_folds, chosen = [], [], []
    targets = None
    grid: tuple[float, ...] = ()
    for repeat in range(nested.repeats):
        folds = find_outer_folds(trial.split, nested, repeat)
        parts: list[tuple[np.ndarray, Scored]] = []
        for fold in range(int(folds.max()) + 1):
            pool, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            train = choose_labelled(trial.card, trial.split, pool, trial.label_fraction, trial.draw, trial.unit)
            parts.append((test, score(replace(trial, train=train, test=test))))
        order = np.argsort(np.concatenate([test for test, _ in parts]), kind="stable")
        repeats.append(np.concatenate([scored.scores for _, scored in parts])[order])
        outer_folds.append(folds)
        chosen.append([scored.chosen for _, scored in parts])
        if parts[0][1].targets is not None:
            targets = np.concatenate([scored.targets for _, scored in parts if scored.targets is not None])[order]
        grid = parts[0][1].grid
    stacked = np.stack(repeats)
    return Scored(stacked.mean(axis=0), {"outer": chosen}, targets, grid, stacked, np.stack(outer_folds))
