"""What an evaluation has to measure: tasks on the shards at hand, their units, and the trials of each encoder.

    EvaluateConfig + shard sets -> tasks, each with its images in folds -> units of a protocol -> trials

What concerns one task or trial only (a label that is not there, too few patients) becomes a Failure beside the others.
"""

import itertools
from dataclasses import asdict, dataclass, field
from typing import Any

from panfm.encoder.export import find_ancestors
from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError
from panfm.evaluation.families import Family
from panfm.evaluation.protocol import Protocol, Trial, build_trial
from panfm.evaluation.protocols import PROTOCOLS
from panfm.evaluation.results import EncoderCard, TrainedOn, make_folder_name
from panfm.evaluation.run_config import (
    EncoderEntry,
    EvaluateConfig,
    count_draws,
    get_entries,
    list_protocols,
    list_recipes,
)
from panfm.evaluation.splits import Split, load_split
from panfm.evaluation.task_rows import find_classes
from panfm.evaluation.tasks import TaskCard, list_tasks, load_task
from panfm.shards.index import ShardSet, open_shard_set


@dataclass(frozen=True)
class Failure:
    """A trial, or a whole task, that could not be measured. `details` holds a traceback where the fault is panfm's."""

    task: str
    encoder: str | None
    what: str
    message: str
    details: str | None = None

    @property
    def is_absence(self) -> bool:
        """Whether an encoder could not be measured by a protocol, rather than a whole task or because of a defect."""
        return self.encoder is not None and self.details is None

    def describe(self) -> str:
        """One line."""
        encoder = f", {self.encoder}" if self.encoder else ""
        return f"{self.task}{encoder}, {self.what}: {self.message}"


@dataclass(frozen=True)
class PlannedTask:
    """A task on its shard set, every image in its fold; units of protocols are made when first asked for."""

    card: TaskCard
    split: Split
    shard_set: ShardSet
    _units: dict[str, Split | UserError] = field(default_factory=dict)

    def get_units(self, protocol: Protocol) -> Split:
        """The split over what `protocol` scores; raises UserError where there is nothing of the kind."""
        entry = PROTOCOLS[protocol]
        if entry.build_units is None:
            return self.split
        if protocol not in self._units:
            try:
                self._units[protocol] = entry.build_units(self.card, self.split, self.shard_set)
            except UserError as error:
                self._units[protocol] = error
        units = self._units[protocol]
        if isinstance(units, UserError):
            raise units
        return units


def find_protocols(config: EvaluateConfig, card: TaskCard) -> list[Protocol]:
    """Those of the run's protocols that measure tasks of the card's family."""
    return [name for name in list_protocols(config) if card.family in PROTOCOLS[name].families]


def load_tasks(config: EvaluateConfig, failures: list[Failure], notes: list[str]) -> list[PlannedTask]:
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
        if not find_protocols(config, card):
            unmeasured.setdefault(card.family, []).append(card.name)
            if config.tasks != "all":
                able = [name for name, entry in PROTOCOLS.items() if card.family in entry.families]
                message = (
                    f"none of the protocols {', '.join(list_protocols(config))} measures a task of family "
                    f"{card.family}; those that do: {', '.join(able)}"
                )
                failures.append(Failure(card.name, None, "all trials", message))
            continue
        try:
            card = find_classes(card, shard_sets[card.source])
            split = load_split(card, shard_sets[card.source], config.task_dir)
        except UserError as error:
            failures.append(Failure(card.name, None, "all trials", str(error)))
            continue
        tasks.append(PlannedTask(card, split, shard_sets[card.source]))
    if unmeasured and config.tasks == "all":
        families = "; ".join(f"{family} ({', '.join(names)})" for family, names in unmeasured.items())
        notes.append(f"tasks left out, none of the protocols asked for measures their families: {families}")
    if not tasks and not failures and not notes:
        raise UserError(
            f"tasks: no known task is on the sources {', '.join(shard_sets)}; `panfm evaluate list` shows the tasks, "
            f"--task-dir adds your own"
        )
    return tasks


def plan_trials(
    config: EvaluateConfig, task: PlannedTask, protocol: Protocol, encoder: EncoderCard, failures: list[Failure]
) -> list[Trial]:
    """List the trials of one encoder by one protocol on one task; one that cannot be had becomes a failure."""
    entry = PROTOCOLS[protocol]
    try:
        units = task.get_units(protocol)
    except UserError as error:
        failures.append(Failure(task.card.name, encoder.name, protocol, str(error)))
        return []
    trials = []
    fractions = config.fractions if entry.is_trained else (0.0,)
    recipes = [recipe for name, recipe in list_recipes(config) if name == protocol]
    for recipe, fraction in itertools.product(recipes, fractions):
        draws = range(count_draws(config, fraction))
        seeds = config.seeds if entry.has_seed else config.seeds[:1]
        for draw, seed in itertools.product(draws, seeds):
            try:
                trials.append(
                    build_trial(
                        task.card,
                        units,
                        encoder,
                        task.shard_set,
                        protocol=protocol,
                        recipe=recipe,
                        evaluated_on=config.evaluate_on,
                        label_fraction=fraction,
                        draw=draw,
                        seed=seed,
                        num_replicates=config.num_replicates,
                        unit=entry.unit,
                    )
                )
            except UserError as error:
                what = f"{describe_recipe(protocol, recipe)} at {fraction:g} of the labels, draw {draw}"
                failures.append(Failure(task.card.name, encoder.name, what, str(error)))
    return trials


def describe_recipe(protocol: Protocol, recipe: dict[str, Any]) -> str:
    """A protocol and its variant in words."""
    return protocol if recipe["variant"] == "default" else f"{protocol} ({recipe['variant']})"


def check_encoders(config: EvaluateConfig) -> list[str]:
    """Resolve every address once and return the encoders' names, which must be unique as folder names too."""
    names: list[str] = []
    addresses: dict[str, str] = {}  # by folder name
    for entry in get_entries(config):
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


def describe_encoder(encoder: Encoder, entry: EncoderEntry, name: str, card: TaskCard) -> EncoderCard:
    """The encoder as this task's Results show it. Contamination is a fact about an encoder and a task together."""
    values = {
        **asdict(encoder.card),
        "name": name,
        "licence": entry.licence or encoder.card.licence,
        "access": entry.access,
    }
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
