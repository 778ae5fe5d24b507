"""`panfm evaluate run`: encoders x tasks x protocols x label fractions -> Result files.

    each encoder -> each shard set -> encode once (cached) -> pieces (encoder, task, protocol) -> one Result a trial

What exists and is fresh is skipped, what is stale is made again, a failing trial is recorded and does not stop the
others. Running the same command again therefore does exactly what is left. Pieces are measured one after the other, in
processes, or on a cluster: what they write does not depend on it.
"""

import os
import time
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.evaluation.nested import score_nested
from panfm.evaluation.planning import (
    Failure,
    PlannedTask,
    check_encoders,
    describe_encoder,
    describe_recipe,
    find_protocols,
    load_tasks,
    plan_trials,
)
from panfm.evaluation.protocol import Material, Protocol, Scored, Trial, find_result, write_trial
from panfm.evaluation.protocols import PROTOCOLS
from panfm.evaluation.run_config import EvaluateConfig, check_config, count_processes, get_entries
from panfm.evaluation.tasks import NestedSplit
from panfm.executor import run_tasks
from panfm.features import compute_features
from panfm.measures.threads import share_cores
from panfm.progress import muted


@dataclass(frozen=True)
class RunSummary:
    """What a run did: paths of the Results that it wrote, how many it found fresh, and what failed."""

    out: Path
    written: tuple[Path, ...]
    num_skipped: int
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]  # images and tasks left out, in words

    def __str__(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{note}" for note in self.notes]
        for failure in self.failures:
            lines.append(f"failed: {failure.describe()}")
            if failure.details:
                lines.append(failure.details)
        lines.append(
            f"{self.out}: {len(self.written)} results written, {self.num_skipped} were there already, "
            f"{len(self.failures)} failed"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class PieceStatus:
    """How far one encoder is on one task by one protocol. failures: trials that cannot be had."""

    encoder: str
    task: str
    protocol: Protocol
    num_done: int
    num_open: int  # missing or stale
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class EvaluationStatus:
    """How far a run is; failures concern whole tasks."""

    out: Path
    pieces: tuple[PieceStatus, ...]
    failures: tuple[Failure, ...]

    def __str__(self) -> str:
        """A table for the terminal: one line an encoder, task and protocol that has something left."""
        lines = [f"failed: {failure.task}: {failure.message}" for failure in self.failures]
        for piece in self.pieces:
            if piece.num_open or piece.failures:
                cannot = f", {len(piece.failures)} cannot be had: {piece.failures[0].message}" if piece.failures else ""
                total = piece.num_done + piece.num_open
                lines.append(f"{piece.encoder}  {piece.task}  {piece.protocol}: {piece.num_done} of {total}{cannot}")
        done, left = sum(p.num_done for p in self.pieces), sum(p.num_open for p in self.pieces)
        lines.append(f"{self.out}: {done} results are there, {left} are missing or stale")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Run:
    """One run, told apart from every other by its id: what a process keeps open is of one run only."""

    id: str
    config: EvaluateConfig = field(compare=False)
    names: tuple[str, ...] = field(compare=False)  # of the encoders


@dataclass(frozen=True)
class _Piece:
    """The trials of one encoder on one task by one protocol: what a process does at a time."""

    run: _Run
    encoder: int  # place in config.encoders
    task: str
    protocol: Protocol
    num_trials: int
    alone: bool  # in a process of its own kind: without bars, and with its share of the cores


@dataclass(frozen=True)
class _Answer:
    written: tuple[Path, ...]
    failures: tuple[Failure, ...]


def run_evaluation(config: EvaluateConfig) -> RunSummary:
    """Measure every encoder on every task and write the Results under `config.out`.

    Raises UserError for what makes the whole run pointless (no such shards, no task, an address that does not resolve,
    two encoders of one name); what concerns one task or trial is collected in the summary's failures.
    """
    run, tasks, failures, notes = _prepare(config)
    written: list[Path] = []
    num_skipped = 0
    shared = config.executor != "local"
    waiting: list[_Piece] = []
    for place in range(len(run.names)):
        pieces = []
        for task in tasks:
            for protocol in find_protocols(config, task.card):
                status = _check_piece(run, place, task, protocol)
                num_skipped += status.num_done
                failures += status.failures
                if status.num_open:
                    pieces.append(_Piece(run, place, task.card.name, protocol, status.num_open, alone=shared))
        if not pieces:
            continue
        for source in dict.fromkeys(task.card.source for task in tasks if task.card.name in {p.task for p in pieces}):
            if config.executor != "dask":
                _load_features(run, place, source)  # before the pieces: every process then finds them in the cache
        if shared:
            waiting += pieces
            continue
        quick = [piece for piece in pieces if not PROTOCOLS[piece.protocol].shows_progress]
        answers = run_tasks(
            _measure_piece, quick, description=f"evaluate {run.names[place]}", unit="results", size=_count_trials
        )
        # One bar each: a fine-tuning takes minutes.
        answers += [_measure_piece(piece) for piece in pieces if PROTOCOLS[piece.protocol].shows_progress]
        for answer in answers:
            written += answer.written
            failures += answer.failures
    for answer in run_tasks(
        _measure_piece,
        waiting,
        description="evaluate",
        unit="results",
        size=_count_trials,
        processes=count_processes(config),
        executor="dask" if waiting and config.executor == "dask" else "local",
        scheduler=config.scheduler,
    ):
        written += answer.written
        failures += answer.failures
    if config.protocols == "all":  # everything that these data and encoders allow: what they do not is no failure
        notes += [f"not measured: {failure.describe()}" for failure in failures if failure.is_absence]
        failures = [failure for failure in failures if not failure.is_absence]
    return RunSummary(Path(config.out), tuple(written), num_skipped, tuple(failures), tuple(notes))


def check_evaluation(config: EvaluateConfig) -> EvaluationStatus:
    """Say what of a run is measured and what is left, without measuring anything."""
    run, tasks, failures, _ = _prepare(config)
    pieces = [
        _check_piece(run, place, task, protocol)
        for place in range(len(run.names))
        for task in tasks
        for protocol in find_protocols(config, task.card)
    ]
    return EvaluationStatus(Path(config.out), tuple(pieces), tuple(failures))


def _prepare(config: EvaluateConfig) -> tuple[_Run, list[PlannedTask], list[Failure], list[str]]:
    check_config(config)
    # Every address is resolved before any work starts: a typo in the last must not show after hours.
    run = _Run(uuid.uuid4().hex, config, ())
    tasks, failures, notes = _open_tasks(run)
    run = _Run(run.id, config, tuple(check_encoders(config)))
    notes = [*notes, *(f"{t.card.name}: left out: {'; '.join(t.split.notes)}" for t in tasks if t.split.notes)]
    return run, tasks, list(failures), notes


@lru_cache(maxsize=1)
def _open_tasks(run: _Run) -> tuple[list[PlannedTask], list[Failure], list[str]]:
    failures: list[Failure] = []
    notes: list[str] = []
    return load_tasks(run.config, failures, notes), failures, notes


@lru_cache(maxsize=1)
def _load_encoder(run: _Run, place: int) -> Encoder:
    return load_encoder(get_entries(run.config)[place].address, device=_choose_device(run.config.device))


@lru_cache(maxsize=1)
def _load_features(run: _Run, place: int, source: str) -> NDArray[np.float32]:
    """Features of every row of the source's shard set, [rows, D]."""
    config = run.config
    shard_set = next(task.shard_set for task in _open_tasks(run)[0] if task.card.source == source)
    features = compute_features(
        _load_encoder(run, place),
        shard_set,
        cache_dir=Path(config.cache_dir),
        batch_size=config.batch_size,
        workers=config.workers,
    )
    assert list(features.keys) == shard_set.table.column("key").to_pylist(), "features in the order of the rows"
    return features.values


def _count_trials(piece: _Piece) -> int:
    return piece.num_trials


def _check_piece(run: _Run, place: int, task: PlannedTask, protocol: Protocol) -> PieceStatus:
    failures: list[Failure] = []
    encoder = describe_encoder(_load_encoder(run, place), get_entries(run.config)[place], run.names[place], task.card)
    trials = plan_trials(run.config, task, protocol, encoder, failures)
    num_done = sum(find_result(Path(run.config.out), trial) is not None for trial in trials)
    return PieceStatus(encoder.name, task.card.name, protocol, num_done, len(trials) - num_done, tuple(failures))


def _measure_piece(piece: _Piece) -> _Answer:
    """Measure what is open of a piece; runs in this process, in one of several, or on a cluster's worker."""
    if not piece.alone:
        return _measure_trials(piece)
    # Processes that each take all cores wait for each other; on a cluster, how many share a machine is the cluster's.
    num_threads = max(1, (os.cpu_count() or 1) // count_processes(piece.run.config))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(before, num_threads))
        with threadpool_limits(num_threads), share_cores(num_threads), muted():
            return _measure_trials(piece)
    finally:
        torch.set_num_threads(before)


def _measure_trials(piece: _Piece) -> _Answer:
    run = piece.run
    written: list[Path] = []
    failures: list[Failure] = []
    task = next(task for task in _open_tasks(run)[0] if task.card.name == piece.task)
    encoder = _load_encoder(run, piece.encoder)
    material = Material(_load_features(run, piece.encoder, task.card.source), encoder, task.shard_set)
    card = describe_encoder(encoder, get_entries(run.config)[piece.encoder], run.names[piece.encoder], task.card)
    trials = [
        trial
        for trial in plan_trials(run.config, task, piece.protocol, card, [])  # what fails there was counted by the plan
        if find_result(Path(run.config.out), trial) is None
    ]
    together = _score_together(run.config, piece.protocol, trials, material)
    for place, trial in enumerate(trials):
        scored = together[place] if together else None
        _measure(run.config, trial, material, scored, written, failures)
    return _Answer(tuple(written), tuple(failures))


def _score_together(
    config: EvaluateConfig, protocol: Protocol, trials: Sequence[Trial], material: Material
) -> list[Scored]:
    """Score all trials at once where the protocol can and the device gains by it; else none."""
    score_many = PROTOCOLS[protocol].score_many
    if score_many is None or material.encoder.device.type != "cuda":
        return []
    if not trials or isinstance(trials[0].card.split, NestedSplit):
        return []
    try:
        return score_many(trials, material, getattr(config, protocol))
    except UserError:  # one by one then: the fault is that of one trial
        return []


def _measure(
    config: EvaluateConfig,
    trial: Trial,
    material: Material,
    scored: Scored | None,
    written: list[Path],
    failures: list[Failure],
) -> None:
    """Score a trial, unless that is done, and write its Result; a fault becomes a failure."""
    started = time.monotonic()
    settings = getattr(config, trial.protocol)
    score = PROTOCOLS[trial.protocol].score
    what = (
        f"{describe_recipe(trial.protocol, trial.recipe)} at {trial.label_fraction:g} of the labels, "
        f"draw {trial.draw}, seed {trial.seed}"
    )
    try:
        if scored is None:
            is_nested = isinstance(trial.card.split, NestedSplit) and trial.label_fraction > 0
            scored = (
                score_nested(trial, lambda inner: score(inner, material, settings))
                if is_nested
                else score(trial, material, settings)
            )
        written.append(write_trial(Path(config.out), trial, scored, material.shard_set, time.monotonic() - started))
    except UserError as error:
        failures.append(Failure(trial.card.name, trial.encoder.name, what, str(error)))
    except Exception as error:
        # A defect in one trial must not cost the night's other results; its traceback goes into the summary.
        message = f"{type(error).__name__}: {error}"
        failures.append(Failure(trial.card.name, trial.encoder.name, what, message, traceback.format_exc()))


def _choose_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
