"""Task cards: a benchmark task as one YAML file on one screen.

    evaluation/tasks/NAME.yaml, or a file of the user's own folder  ->  TaskCard (frozen, strict)  ->  task_rows

A card names the source, the family, the label and its classes in order (or the target of a family that has none), the
unit that no split may cut (patient, lesion, slide), the split, the metrics and what may be claimed from it. No code: a
file in a user's own folder is a task. Needs no torch.
"""

from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from panfm.config import read_yaml, validate
from panfm.errors import UserError
from panfm.evaluation.families import (
    BINARY_FAMILIES,
    WITHOUT_CLASSES,
    Family,
    OutOfDistributionTarget,
    Target,
    ZeroShotTarget,
    describe_target,
    list_metrics,
    read_target,
)
from panfm.files import find_resource, list_resources
from panfm.measures.metrics import METRICS
from panfm.shards.schema import Modality

TASK_FOLDER = "evaluation/tasks"
Group = Literal["patient", "lesion", "slide", "unknown"]
Fold = Literal["train", "val", "test"]
FOLDS: tuple[Fold, ...] = ("train", "val", "test")
Subgroup = Literal["sex", "age", "phototype", "anatomic_site", "institution", "device", "modality", "confirmed_by"]


class CommittedSplit(BaseModel):
    """The folds lie in evaluation/splits/<task>.parquet (or beside the card): everybody's numbers compare.

    `of` names another task on the same source whose folds these are: a lesion is on one side in both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["committed"]
    of: str | None = None


class OfficialSplit(BaseModel):
    """The folds are the source's own: which values of Sample.official_split make each of ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["official"]
    train: tuple[str, ...] = Field(min_length=1)
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_disjoint(self) -> "OfficialSplit":
        values = Counter([*self.train, *self.val, *self.test])
        twice = sorted(value for value, count in values.items() if count > 1)
        if twice:
            raise ValueError(f"official split value {twice[0]!r} is listed twice; a value belongs to one fold")
        return self


class RuleSplit(BaseModel):
    """The folds are a pure hash of (seed, group): a group keeps its fold however the archive grows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rule"]
    seed: int = 0
    test_share: float = Field(default=0.25, gt=0, lt=1)
    val_share: float = Field(default=0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_shares(self) -> "RuleSplit":
        if self.test_share + self.val_share >= 1:
            raise ValueError(f"test_share + val_share is {self.test_share + self.val_share:g}; leave some for training")
        return self


class NestedSplit(BaseModel):
    """No fixed test fold: cross-validation in which every group is scored by probes that did not see it.

    For sources of few groups, whose single test fold would say little. All groups count as test groups, so that
    pretraining leaves out all of them. Within each outer training part the protocol chooses its settings as always.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["nested"]
    seed: int = 0
    folds: int = Field(default=5, ge=2)
    repeats: int = Field(default=5, ge=1)  # with other folds each; the scores of a unit are averaged over them


class TaskCard(BaseModel):
    """One benchmark task. `version` grows whenever the same name would give other numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(ge=1)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    title: str
    source: str
    modality: Modality | None = None  # only rows of this modality; null = all
    family: Family = "classification"
    label: str | None = None  # name in Sample.labels; null for families without classes
    classes: tuple[str, ...] = ()  # order of the scores; binary: negative, then positive; ordinal: lowest first
    num_classes: int | None = Field(default=None, ge=2)  # in place of classes: the label's values, by alphabet
    merge: dict[str, tuple[str, ...]] | None = None  # class -> the label values that make it; null = value is class
    ignore: tuple[str, ...] = ()  # label values that are left out on purpose
    others: str = "error"  # what any further label value is: an error, or `ignore`, or the class of this name
    target: Target | None = None  # what only this family has: a section of evaluation/families.py
    group: Group  # the unit that no split and no label fraction may cut
    split: Annotated[CommittedSplit | OfficialSplit | RuleSplit | NestedSplit, Field(discriminator="kind")]
    metrics: tuple[str, ...] = Field(min_length=1)
    primary_metric: str
    subgroups: tuple[Subgroup, ...] = ()
    references: dict[Subgroup, str] = Field(default_factory=dict)  # level that others are compared with; null: largest
    claim: bool = True  # False: checks the pipeline, supports no claim about an encoder
    claim_note: str | None = None  # why not
    note: str | None = None  # how it differs from what was published, and what in it is a guess
    needs: str | None = None  # what is not there yet: a source card, or a label of it; null = runs on shipped cards
    access: Literal["open", "request", "private"] = "open"
    licence: str
    citation: str
    published: tuple[str, ...] = ()  # names in evaluation/published
    synthetic: bool = False

    @field_validator("target", mode="before")
    @classmethod
    def _read_target(cls, values: Any, info: ValidationInfo) -> Any:
        # By the family, not by trying one section after the other: the fault is then one of the section that was meant.
        return read_target(info.data["family"], values) if "family" in info.data else None

    @model_validator(mode="before")
    @classmethod
    def _add_target(cls, values: Any) -> Any:
        return {"target": None, **values} if isinstance(values, dict) else values  # so that an absent one is read, too

    @model_validator(mode="after")
    def _check(self) -> "TaskCard":
        self._check_classes()
        known = list_metrics(self.family)
        num_classes = self.num_classes or len(self.classes)
        for metric in self.metrics:
            if metric not in known:
                near = get_close_matches(metric, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                family = "" if self.family == "classification" else f" of family {self.family}"
                raise ValueError(f"unknown metric {metric!r}{family}; {hint}")
            if metric in METRICS and METRICS[metric].binary_only and num_classes != 2:
                raise ValueError(f"metric {metric!r} is defined for two classes; this task has {num_classes}")
        if self.primary_metric not in self.metrics:
            raise ValueError(f"primary_metric {self.primary_metric!r} must be one of metrics {list(self.metrics)}")
        for subgroup in self.references:
            if subgroup not in self.subgroups:
                raise ValueError(f"references names {subgroup!r}, which is not among subgroups {list(self.subgroups)}")
        if not self.claim and not self.claim_note:
            raise ValueError("claim is false without a claim_note; say why nothing may be claimed from this task")
        return self

    def _check_classes(self) -> None:
        given = [name for name in ("label", "classes", "num_classes", "merge", "ignore") if getattr(self, name)]
        if self.family in WITHOUT_CLASSES:
            if given:
                raise ValueError(f"{given[0]} has no place in family {self.family}; its target says what is asked")
            return
        if self.label is None:
            raise ValueError(f"label is missing; family {self.family} needs the name of a label")
        if bool(self.classes) == (self.num_classes is not None):
            raise ValueError(
                "give classes (their names, in order), or num_classes where the label's values are the classes"
            )
        if self.num_classes is not None and (self.merge is not None or self.others != "error"):
            raise ValueError("num_classes takes the label's values as they are; with merge or others, name the classes")
        if self.family == "ordinal" and not self.classes:
            raise ValueError("an ordinal task needs classes, from the lowest to the highest: their order is the task")
        if len(self.classes) == 1 or (self.family in BINARY_FAMILIES and len(self.classes) != 2):
            least = "exactly two (negative, then positive)" if self.family in BINARY_FAMILIES else "at least two"
            raise ValueError(f"classes {list(self.classes)}: family {self.family} needs {least}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {list(self.classes)}: a class is named twice")
        if self.merge is not None and not set(self.classes) - {self.others} <= set(self.merge) <= set(self.classes):
            raise ValueError(f"merge has the classes {sorted(self.merge)}; it must have those of `classes`")
        if self.others not in ("error", "ignore", *self.classes):
            raise ValueError(f"others is {self.others!r}; it is error, ignore, or one of classes {list(self.classes)}")
        unknown = self.target.unknown if isinstance(self.target, OutOfDistributionTarget) else ()
        values = Counter([*(value for group in self.get_values().values() for value in group), *self.ignore, *unknown])
        twice = sorted(value for value, count in values.items() if count > 1)
        if twice:
            raise ValueError(f"label value {twice[0]!r} is assigned twice; it makes one class or is ignored")
        if isinstance(self.target, ZeroShotTarget) and set(self.target.phrases) != set(self.classes):
            raise ValueError(f"target.phrases names {sorted(self.target.phrases)}; it must name the classes")

    def get_values(self) -> dict[str, tuple[str, ...]]:
        """Return which label values make each class, in the order of classes (a class of `others` may have none)."""
        if self.merge is None:
            return {name: () if name == self.others else (name,) for name in self.classes}
        return {name: self.merge.get(name, ()) for name in self.classes}

    @property
    def class_names(self) -> tuple[str, ...]:
        """What `TaskRows.labels` count: the classes; behind them `unknown` out of distribution; else `measured`."""
        if self.family in WITHOUT_CLASSES:
            return ("measured",)
        return (*self.classes, "unknown") if self.family == "out_of_distribution" else self.classes

    @property
    def target_words(self) -> str:
        """What an image must have to belong to the task, in words: "the label diagnosis", "a mask"."""
        return describe_target(self.target, self.label)

    @property
    def split_name(self) -> str:
        """The task whose committed split this one uses: its own name, or `split.of`."""
        return (self.split.of if isinstance(self.split, CommittedSplit) else None) or self.name


def list_tasks(task_dir: str | Path | None = None) -> dict[str, Path]:
    """List the known task cards by name: the shipped ones, and those of `task_dir`, which win."""
    tasks = list_resources(TASK_FOLDER)
    if task_dir is not None:
        folder = Path(task_dir)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such task folder; --task-dir names a folder of task cards (*.yaml)")
        tasks.update({path.stem: path for path in sorted(folder.glob("*.yaml"))})
    return dict(sorted(tasks.items()))


def load_task(name_or_path: str | Path, task_dir: str | Path | None = None) -> TaskCard:
    """Read a task card by name (the user's `task_dir` first, then the shipped ones) or by path.

    Raises UserError for an unknown name (with the nearest ones) and for a card that is not valid.
    """
    given = Path(name_or_path)
    known = list_tasks(task_dir)
    if str(name_or_path) in known:
        path = known[str(name_or_path)]
    elif given.is_file():
        path = given
    elif task_dir is not None:
        near = get_close_matches(given.stem, known, n=3) or list(known)[:8]
        raise UserError(f"{name_or_path}: no such task, shipped or in {task_dir}; nearest: {', '.join(near)}")
    else:
        path = find_resource(TASK_FOLDER, given)
    card = validate(TaskCard, read_yaml(path), where=str(path))
    if card.name != path.stem:
        raise UserError(
            f"{path}: name is {card.name!r}; a task carries the name of its file, {path.stem!r}: rename one"
        )
    return card
