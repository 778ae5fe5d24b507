"""`panfm evaluate run`: encoders x tasks x protocols x label fractions x draws -> Result files.

    each encoder -> each shard set -> encode once (cached) -> each task, protocol, fraction, draw, seed: one Result

What exists and is fresh is skipped, what is stale is made again, a failing trial is recorded and does not stop the
others. Running the same command again therefore does exactly what is left.
"""

import itertools
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class, to_plain
from panfm.encoder.export import find_ancestors
from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.evaluation.compat import (
    Dinov2CompatConfig,
    PandermCompatConfig,
    score_dinov2_compat,
    score_panderm_compat,
)
from panfm.evaluation.families import Family
from panfm.evaluation.finetune import FinetuneConfig, score_finetune
from panfm.evaluation.knn import KnnConfig, score_knn
from panfm.evaluation.linear_probe import LinearProbeConfig, score_linear_probe
from panfm.evaluation.metadata_fusion import MetadataFusionConfig, score_metadata_fusion
from panfm.evaluation.protocol import EvaluatedOn, Protocol, Trial, build_trial, find_result, write_trial
from panfm.evaluation.prototype import PrototypeConfig, score_prototype
from panfm.evaluation.results import EncoderCard, TrainedOn, make_folder_name
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.task_rows import find_classes
from panfm.evaluation.tasks import TaskCard, list_tasks, load_task
from panfm.features import compute_features
from panfm.progress import progress_bar
from panfm.shards.index import ShardSet, open_shard_set

MEASURED_FAMILIES: tuple[Family, ...] = ("classification",)  # those that the protocols of this run can score


@config_class
class EncoderEntry:
    """An encoder and the name that it carries on the board."""

    address: str
    """panfm:DIR, timm:NAME, timm:NAME@FILE, timm:NAME@random:SEED, hf:DIR; parameters after `?`."""
    name: str | None = None
    """Unique among the encoders; null = made from the address."""


@config_class
class EvaluateConfig:
    """One evaluation run."""

    encoders: tuple[EncoderEntry | str, ...]
    """Addresses, or {address, name}."""
    shards: tuple[str, ...]
    """Folders of shard sets, one source each."""
    tasks: Literal["all"] | tuple[str, ...] = "all"
    """all = every known task on a source among the shards; else names or paths of cards."""
    task_dir: str | None = None
    """Folder with task cards of your own; they win over shipped ones of the same name."""
    protocols: tuple[Protocol, ...] = ("linear_probe", "knn")
    """linear_probe, knn, prototype (frozen features), finetune (the whole encoder is trained), metadata_fusion (frozen
    features beside age, sex, anatomic site and tabular columns, with its baselines); panderm_compat and
    dinov2_compat compute what those publications do, to compare with their numbers, and are ranked by themselves."""
    fractions: tuple[float, ...] = (0.1, 1.0)
    """Shares of the training GROUPS (patients) whose labels are used, each in (0, 1]."""
    draws: int = Field(default=5, ge=1)
    """Random choices of labels at each fraction below 1; all labels can be chosen in one way only."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the optimisation. kNN has none, and the probe's only cuts its folds: both use the first."""
    evaluate_on: EvaluatedOn = "test"
    """test: train + val folds -> test fold. development: train fold -> val fold, to choose recipes with."""
    num_replicates: int = Field(default=2000, ge=100)
    """Patient-clustered bootstrap replicates behind each interval."""
    out: str = "results"
    """Folder of the Result files."""
    cache_dir: str = "cache/features"
    """Folder of the cached features, keyed by encoder hash and data hash."""
    device: str = "auto"
    """auto = the GPU where there is one, else the CPU; or a torch device."""
    batch_size: int = Field(default=64, ge=1)
    """Images at once while encoding."""
    workers: int = Field(default=1, ge=0)
    """Threads that decode ahead of the encoder; fine-tuning has its own."""
    linear_probe: LinearProbeConfig = LinearProbeConfig()
    """Settings of protocol linear_probe."""
    knn: KnnConfig = KnnConfig()
    """Settings of protocol knn."""
    prototype: PrototypeConfig = PrototypeConfig()
    """Settings of protocol prototype."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Settings of protocol finetune."""
    metadata_fusion: MetadataFusionConfig = MetadataFusionConfig()
    """Settings of protocol metadata_fusion."""
    panderm_compat: PandermCompatConfig = PandermCompatConfig()
    """Settings of protocol panderm_compat."""
    dinov2_compat: Dinov2CompatConfig = Dinov2CompatConfig()
    """Settings of protocol dinov2_compat."""


@dataclass(frozen=True)
class Failure:
    """A trial, or a whole task, that could not be measured. `details` holds a traceback where the fault is panfm's."""

    task: str
    encoder: str | None
    what: str
    message: str
    details: str | None = None


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
            encoder = f", {failure.encoder}" if failure.encoder else ""
            lines.append(f"failed: {failure.task}{encoder}, {failure.what}: {failure.message}")
            if failure.details:
                lines.append(failure.details)
        lines.append(
            f"{self.out}: {len(self.written)} results written, {self.num_skipped} were there already, "
            f"{len(self.failures)} failed"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Task:
    card: TaskCard
    split: Split
    shard_set: ShardSet


def run_evaluation(config: EvaluateConfig) -> RunSummary:
    """Measure every encoder on every task and write the Results under `config.out`.

    Raises UserError for what makes the whole run pointless (no such shards, no task, an address that does not resolve,
    two encoders of one name); what concerns one task or trial is collected in the summary's failures.
    """
    _check_config(config)
    failures: list[Failure] = []
    notes: list[str] = []
    tasks = _load_tasks(config, failures, notes)
    notes += [f"{task.card.name}: left out: {'; '.join(task.split.notes)}" for task in tasks if task.split.notes]
    out = Path(config.out)
    written: list[Path] = []
    num_skipped = 0
    # Every address is resolved before any work starts: a typo in the last must not show after hours.
    names = _check_encoders(config)

    for entry, name in zip(_get_entries(config), names, strict=True):
        encoder = load_encoder(entry.address, device=_choose_device(config.device))
        for shard_set in {task.shard_set.source: task.shard_set for task in tasks}.values():
            todo: list[tuple[Trial, _Task]] = []
            for task in tasks:
                if task.shard_set is not shard_set:
                    continue
                for trial in _plan_trials(config, task, _describe_encoder(encoder, name, task.card), failures):
                    if find_result(out, trial):
                        num_skipped += 1
                    else:
                        todo.append((trial, task))
            if not todo:
                continue
            features = compute_features(
                encoder,
                shard_set,
                cache_dir=Path(config.cache_dir),
                batch_size=config.batch_size,
                workers=config.workers,
            )
            assert list(features.keys) == shard_set.table.column("key").to_pylist(), "features in the order of the rows"
            frozen = [(trial, task) for trial, task in todo if trial.protocol != "finetune"]
            description = f"{name} on {shard_set.source}"
            with progress_bar(f"evaluate {description}", len(frozen), unit="results") as advance:
                for trial, task in frozen:
                    score = _choose_score(config, trial, encoder, task)
                    _measure(out, trial, features.values[task.split.rows], score, written, failures)
                    advance(note=f"{trial.card.name} {trial.protocol}")
            for trial, task in todo:  # one bar each: a fine-tuning takes minutes
                if trial.protocol == "finetune":
                    score = _choose_score(config, trial, encoder, task)
                    _measure(out, trial, features.values[task.split.rows], score, written, failures)
    return RunSummary(
        out=out, written=tuple(written), num_skipped=num_skipped, failures=tuple(failures), notes=tuple(notes)
    )


Score = Callable[[Trial, NDArray[np.float32]], Any]


def _choose_score(config: EvaluateConfig, trial: Trial, encoder: Encoder, task: _Task) -> Score:
    """Bind a protocol to its settings: the result takes (trial, features [N, D] of the split's images)."""
    has_cls = encoder.module.has_cls
    scores: dict[Protocol, Score] = {
        "linear_probe": lambda trial, features: score_linear_probe(trial, features, config.linear_probe),
        "knn": lambda trial, features: score_knn(trial, features, config.knn),
        "prototype": lambda trial, features: score_prototype(trial, features, config.prototype),
        "finetune": lambda trial, features: score_finetune(trial, features, encoder, task.shard_set, config.finetune),
        "metadata_fusion": lambda trial, features: score_metadata_fusion(
            trial, features, task.shard_set, config.metadata_fusion
        ),
        "panderm_compat": lambda trial, features: score_panderm_compat(
            trial, features, config.panderm_compat, has_cls=has_cls
        ),
        "dinov2_compat": lambda trial, features: score_dinov2_compat(
            trial, features, config.dinov2_compat, has_cls=has_cls
        ),
    }
    return scores[trial.protocol]


def _measure(
    out: Path,
    trial: Trial,
    features: NDArray[np.float32],
    score: Score,
    written: list[Path],
    failures: list[Failure],
) -> None:
    started = time.monotonic()
    variant = trial.recipe["variant"]
    protocol = trial.protocol if variant == "default" else f"{trial.protocol} ({variant})"
    what = f"{protocol} at {trial.label_fraction:g} of the labels, draw {trial.draw}, seed {trial.seed}"
    try:
        scored = score(trial, features)
        written.append(write_trial(out, trial, scored, time.monotonic() - started))
    except UserError as error:
        failures.append(Failure(trial.card.name, trial.encoder.name, what, str(error)))
    except Exception as error:
        # A defect in one trial must not cost the night's other results; its traceback goes into the summary.
        message = f"{type(error).__name__}: {error}"
        failures.append(Failure(trial.card.name, trial.encoder.name, what, message, traceback.format_exc()))


def _plan_trials(config: EvaluateConfig, task: _Task, encoder: EncoderCard, failures: list[Failure]) -> list[Trial]:
    """List the trials of one encoder on one task; one that cannot be had (too few labels) becomes a failure."""
    trials = []
    planned = itertools.product(_list_recipes(config), config.fractions)
    for (protocol, recipe), fraction in planned:
        draws = range(config.draws if fraction < 1 else 1)
        seeds = config.seeds if protocol == "finetune" else config.seeds[:1]
        for draw, seed in itertools.product(draws, seeds):
            try:
                trials.append(
                    build_trial(
                        task.card,
                        task.split,
                        encoder,
                        task.shard_set,
                        protocol=protocol,
                        recipe=recipe,
                        evaluated_on=config.evaluate_on,
                        label_fraction=fraction,
                        draw=draw,
                        seed=seed,
                        num_replicates=config.num_replicates,
                    )
                )
            except UserError as error:
                what = f"{protocol} at {fraction:g} of the labels, draw {draw}"
                failures.append(Failure(task.card.name, encoder.name, what, str(error)))
    return trials


def _list_recipes(config: EvaluateConfig) -> list[tuple[Protocol, dict[str, Any]]]:
    """Every protocol with its settings as plain values, as often as it has variants."""
    recipes = []
    for protocol in config.protocols:
        settings = to_plain(getattr(config, protocol))
        variants = settings.pop("variants", None) or [settings["variant"]]
        recipes += [(protocol, {**settings, "variant": variant}) for variant in variants]
    return recipes


def _check_config(config: EvaluateConfig) -> None:
    way_out = "give --encoder ADDRESS" if not config.encoders else "give --shards DIR" if not config.shards else ""
    for key in ("encoders", "shards", "protocols", "fractions", "seeds"):
        if not getattr(config, key):
            raise UserError(f"{key} is empty; an evaluation needs at least one{': ' if way_out else ''}{way_out}")
    for fraction in config.fractions:
        if not 0 < fraction <= 1:
            raise UserError(f"fractions ({fraction:g}): a label fraction is above 0 and at most 1, for example 0.1")


def _load_tasks(config: EvaluateConfig, failures: list[Failure], notes: list[str]) -> list[_Task]:
    """Open the shard sets, choose the tasks on them and put every image into its fold.

    A task of a family without a protocol is a failure where it was asked for by name, a note among all tasks.
    """
    shard_sets: dict[str, ShardSet] = {}
    for path in config.shards:
        shard_set = open_shard_set(path)
        if shard_set.source in shard_sets:
            raise UserError(
                f"shards: {path} and {shard_sets[shard_set.source].path} both hold source {shard_set.source}; "
                f"evaluate them one at a time, into different results folders"
            )
        shard_sets[shard_set.source] = shard_set
    tasks = []
    unmeasured: dict[Family, list[str]] = {}
    known = list_tasks(config.task_dir)
    for name in known if config.tasks == "all" else config.tasks:
        card = load_task(name, config.task_dir)
        if card.source not in shard_sets:
            if config.tasks != "all":
                message = f"no shard set of source {card.source} was given (given: {', '.join(shard_sets)})"
                failures.append(Failure(card.name, None, "all trials", message))
            continue
        if card.family not in MEASURED_FAMILIES:
            unmeasured.setdefault(card.family, []).append(card.name)
            if config.tasks != "all":
                message = f"no protocol measures the family {card.family} yet; measured: {', '.join(MEASURED_FAMILIES)}"
                failures.append(Failure(card.name, None, "all trials", message))
            continue
        try:
            card = find_classes(card, shard_sets[card.source])
            split = load_split(card, shard_sets[card.source], config.task_dir)
        except UserError as error:
            failures.append(Failure(card.name, None, "all trials", str(error)))
            continue
        tasks.append(_Task(card, split, shard_sets[card.source]))
    if unmeasured and config.tasks == "all":
        families = "; ".join(f"{family} ({', '.join(names)})" for family, names in unmeasured.items())
        notes.append(f"tasks left out, no protocol measures their families yet: {families}")
    if not tasks and not failures and not notes:
        raise UserError(
            f"tasks: no known task is on the sources {', '.join(shard_sets)}; `panfm evaluate list` shows the tasks, "
            f"--task-dir adds your own"
        )
    return tasks


def _get_entries(config: EvaluateConfig) -> list[EncoderEntry]:
    return [EncoderEntry(address=entry) if isinstance(entry, str) else entry for entry in config.encoders]


def _check_encoders(config: EvaluateConfig) -> list[str]:
    """Resolve every address once and return the encoders' names, which must be unique as folder names too."""
    names: list[str] = []
    addresses: dict[str, str] = {}  # by folder name
    for entry in _get_entries(config):
        encoder = load_encoder(entry.address, device="cpu")
        name = entry.name or encoder.name
        folder = make_folder_name(name)
        if folder in addresses:
            raise UserError(
                f"encoders: {addresses[folder]} and {entry.address} are both named {name!r}; give one another name: "
                f"{{address: {entry.address}, name: ...}}"
            )
        addresses[folder] = entry.address
        names.append(name)
    return names


def _describe_encoder(encoder: Encoder, name: str, card: TaskCard) -> EncoderCard:
    """The encoder as this task's Results show it. Contamination is a fact about an encoder and a task together."""
    values = {**asdict(encoder.card), "name": name}
    if encoder.facts is not None:
        values["contamination"] = "excluded" if card.name in encoder.facts.excluded_tasks else "unknown"
        values["excluded_tasks"], values["audit"] = encoder.facts.excluded_tasks, encoder.facts.audit
        # What a network of unknown data began or learned from, it may have seen through its teacher.
        unknown = any(address.scheme != "timm" for address in find_ancestors(encoder.facts))
        values["sources"] = (
            None
            if unknown
            else tuple(
                TrainedOn(
                    source=source.source,
                    data_hash=source.data_hash,
                    num_kept=source.num_kept,
                    num_excluded=source.num_excluded,
                    num_audited=source.num_audited,
                )
                for source in encoder.facts.sources
            )
        )
    elif encoder.card.contamination == "none":
        values["sources"] = ()
    return EncoderCard(**values)


def _choose_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
