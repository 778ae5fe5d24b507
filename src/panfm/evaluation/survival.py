"""Protocol `survival`: who has the event first, from images at time zero; one row a patient.

    images of a patient's first visit --mean of features--> [N, D] --penalised Cox--> risk, probabilities     cox
                         age, sex, anatomic site, ... [N, E]       --penalised Cox--> risk, probabilities     covariates
                                                       [N, D + E]  --penalised Cox--> risk, probabilities     both

The three are made together: images that foretell what age and site foretell anyway have foretold nothing. Days for
which probabilities are predicted belong to the task, not to the trial: they come from the training fold as a whole, so
that every encoder and every label fraction is measured on the same ones. What the chosen model says of its own training
patients when it has not seen them (out of fold) gives a cut-off, and the curves of both sides of it.
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.families import SurvivalTarget, read_numbers
from panfm.evaluation.metadata import encode_metadata, read_metadata
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.files import compute_json_hash
from panfm.measures.cox import CoxFit, fit_cox_cv
from panfm.measures.survival import CENSORED, COMPETING, EVENT, compute_event_free
from panfm.shards.index import ShardSet

Floats = NDArray[np.float64]
Inputs = Literal["cox", "covariates", "both"]

NUM_DAYS = 10  # predicted for where the settings name none
FIRST_DAY_SHARE = 0.1  # of the training events lie before the first of them
LAST_DAY_SHARE = 0.2  # of the training patients are followed beyond the last: a test set needs some of those, too


@config_class
class SurvivalConfig:
    """Settings of the Cox model."""

    variants: tuple[Inputs, ...] = ("cox", "covariates", "both")
    """What is looked at, a section on the board each: cox = the images; covariates = age, sex, anatomic site and
    tabular columns without the images; both = side by side."""
    days: tuple[float, ...] = ()
    """Days since time zero, ascending, for which the probability of being event-free is predicted and scored; empty =
    ten, evenly spread over where the training fold has events and still follows patients."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where fewer groups have the event."""

    @field_validator("days")
    @classmethod
    def _check_days(cls, days: tuple[float, ...]) -> tuple[float, ...]:
        if any(day <= 0 for day in days) or list(days) != sorted(set(days)):
            raise ValueError(f"days ({', '.join(f'{day:g}' for day in days)}) must be above 0 and ascending")
        return days


def build_patients(card: TaskCard, split: Split, shard_set: ShardSet) -> Split:
    """Make the patients of a survival task from the split of its images: one unit a group.

    Members are the images of the patient's first visit, since only they were there at time zero; where no visit is
    dated, all of them. Where these carry several courses (lesions that were each followed), the patient's ends when the
    first of them ends: with the event if that one did. Targets are [N, 2]: days, event. Patients without a day of
    follow-up are left out and counted. Raises UserError for an event that the card does not declare.
    """
    assert isinstance(card.target, SurvivalTarget), "a survival task"
    days = read_numbers(shard_set.table, card.target.days)[split.rows]
    event = read_numbers(shard_set.table, card.target.event)[split.rows]
    visit = read_numbers(shard_set.table, "visit_day")[split.rows]
    _check_events(card, card.target, event)
    by_group = np.argsort(split.groups, kind="stable")
    starts = np.unique(split.groups[by_group], return_index=True)[1][1:]
    at_zero: list[NDArray[np.int64]] = []  # places of each patient's images at time zero
    targets: list[tuple[float, int]] = []
    num_later = num_several = num_unfollowed = 0
    for places in np.split(by_group, starts):
        dated = visit[places][~np.isnan(visit[places])]
        # An undated image beside dated ones may be of any visit.
        seen = places if len(dated) == 0 else places[visit[places] == dated.min()]
        num_later += len(places) - len(seen)
        last_day = float(days[seen].min())
        if last_day <= 0:
            num_unfollowed += 1
            continue
        num_several += len(set(zip(days[seen].tolist(), event[seen].tolist(), strict=True))) > 1
        ends = event[seen][days[seen] == last_day]
        targets.append((last_day, EVENT if EVENT in ends else COMPETING if (ends > EVENT).any() else CENSORED))
        at_zero.append(seen)
    if not at_zero:
        raise UserError(
            f"task {card.name} on {shard_set.path}: none of its {num_unfollowed} patients has a day of follow-up in "
            f"{card.target.days}; check the column in the source card"
        )
    first = np.array([seen[0] for seen in at_zero], dtype=np.int64)
    order = np.argsort(split.keys[first], kind="stable")
    first, at_zero = first[order], [at_zero[place] for place in order]
    ordered = np.array(targets, dtype=np.float64)[order]
    notes = [
        (num_later, "images of later visits, which were not there at time zero"),
        (num_unfollowed, "patients without a day of follow-up"),
    ]
    left_out = [f"{count} {text}" for count, text in notes if count]
    if num_several:
        left_out.append(f"of {num_several} patients with several courses all but the first to end")
    keys = [split.keys[seen].tolist() for seen in at_zero]
    return replace(
        split,
        rows=split.rows[first],
        keys=split.keys[first],
        groups=split.groups[first],
        labels=split.labels[first],
        folds=split.folds[first],
        hash=compute_json_hash([split.hash, "patients", keys, ordered.tolist()]),
        notes=(*split.notes, *left_out),
        members=tuple(split.rows[seen] for seen in at_zero),
        targets=ordered,
    )


def score_survival(trial: Trial, material: Material, config: SurvivalConfig) -> Scored:
    """Return risk and probabilities of being event-free for the trial's test part: [M, 1 + H].

    What is looked at is the variant of the trial's recipe. Raises UserError where training has no event, and where no
    covariate is known.
    """
    split, train = trial.split, trial.train
    inputs, columns = _build_inputs(trial, material)
    days, event = split.targets.T
    fit = fit_cox_cv(
        inputs[train], days[train], event[train], split.groups[train], seed=trial.seed, num_folds=config.num_folds
    )
    grid = config.days or choose_days(split)
    test = inputs[trial.test]
    scores = np.concatenate([fit.model.predict_risk(test)[:, None], fit.model.predict_event_free(test, grid)], axis=1)
    chosen = _describe_fit(fit, days[train], event[train], grid)
    return Scored(scores=scores, chosen={**chosen, "covariates": columns}, grid=tuple(grid))


def choose_days(split: Split) -> tuple[float, ...]:
    """Choose the days to predict for, by the training fold: from a tenth of its events to where a fifth is followed.

    A property of the task: not of the labels that a trial may use, so that numbers compare. Under a nested split, where
    everything is tested in turn, all patients say where there is follow-up; the model sees none of it.
    """
    places = split.find("train")
    days, event = (split.targets[places] if len(places) else split.targets).T
    happened = days[event == EVENT]
    if len(happened) == 0:
        raise UserError(
            f"task {split.task}: none of the {len(days)} patients of the training fold has the event; use more patients"
        )
    last = float(np.floor(np.quantile(days, 1 - LAST_DAY_SHARE)))
    first = float(np.ceil(np.quantile(happened, FIRST_DAY_SHARE)))
    if first >= last:  # nearly all events lie at the end of follow-up
        return (max(last, float(happened.min())),)
    return tuple(float(day) for day in np.unique(np.round(np.linspace(first, last, NUM_DAYS))))


def _check_events(card: TaskCard, target: SurvivalTarget, event: Floats) -> None:
    known = np.arange(2 + len(target.competing_events))
    strange = np.setdiff1d(event, known)
    if len(strange):
        competing = ", ".join(f"{2 + place} = {name}" for place, name in enumerate(target.competing_events))
        raise UserError(
            f"task {card.name}: {target.event} has the value {strange[0]:g}; it is 0 = none, 1 = {target.outcome}"
            f"{', ' + competing if competing else ''}; name further ones in target.competing_events"
        )


def _build_inputs(trial: Trial, material: Material) -> tuple[Floats, list[str]]:
    """What the model looks at [N, D + E], and the names of the covariates among it."""
    split, variant = trial.split, trial.recipe["variant"]
    parts: list[Floats] = []
    columns: list[str] = []
    if variant != "covariates":
        features = np.asarray(material.features, dtype=np.float64)
        parts.append(np.stack([features[rows].mean(axis=0) for rows in split.members]))
    if variant != "cox":
        metadata = read_metadata(material.shard_set, split.rows)
        encoded = encode_metadata(metadata, trial.train)
        if encoded.shape[1] == 0:
            raise UserError(
                f"task {trial.card.name}: no age, sex, anatomic site or tabular column of source {trial.card.source} "
                f"differs between its patients, so there is nothing for survival ({variant}); map columns in the "
                "source card, or leave the variant out"
            )
        parts.append(encoded)
        columns = list(metadata.columns)
    return np.concatenate(parts, axis=1), columns


def _describe_fit(fit: CoxFit, days: Floats, event: Floats, grid: tuple[float, ...]) -> dict[str, Any]:
    """What a reader of the Result needs to judge the fit, and what becomes of training patients by their risk.

    The risks are out of fold: those of the fitted model would part its own training patients far too well. Without
    folds there are no curves.
    """
    cut_off = float(np.median(fit.held_out_risk))
    high = fit.held_out_risk > cut_off
    sides = {}
    for name, side in (("low_risk", ~high), ("high_risk", high)):
        sides[name] = {
            "num_patients": int(side.sum()),
            "num_events": int((event[side] == EVENT).sum()),
            "event_free": compute_event_free(days[side], event[side]).read(grid).tolist() if side.any() else None,
        }
    return {
        "C": float(fit.C),
        "at_boundary": bool(fit.at_boundary),
        "num_folds": int(fit.num_folds),
        "converged": bool(fit.converged),
        "num_events": int((event == EVENT).sum()),
        "num_competing": int((event == COMPETING).sum()),
        "cut_off": cut_off,
        "training_curves": sides if fit.num_folds else None,
    }
