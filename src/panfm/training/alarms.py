"""Alarms: is something going wrong that a person should change? A function of the records in metrics.jsonl alone.

    AlarmConfig, advice (what to change in this run's config)  ->  Alarms
    one record after the other  ->  Alarms.judge  ->  Alarm: what was seen, since which step, what to change

A resumed run hands the records that it keeps to a new Alarms, so it rings where the unbroken run would have. An alarm
asks for the same fault at several looks in a row, since one batch says little.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from panfm.config import config_class
from panfm.objectives.masked_image import MaskedImageConfig
from panfm.objectives.self_distillation import SelfDistillationConfig
from panfm.objectives.targets import EmaTeacherConfig

if TYPE_CHECKING:
    from panfm.training.plan import PretrainConfig

MIN_RECORDS = 20  # before anything is compared with a window: the first steps of a run are like no others


@config_class
class AlarmConfig:
    """When a run is taken to be in trouble, and what then happens."""

    action: Literal["none", "warn", "stop", "rollback"] = "warn"
    """warn: say so. stop: end the run with exit code 5. rollback: go back to the last checkpoint from before the
    trouble and draw other samples from there on; also after more than max_skipped_steps that are not finite, which else
    end the run. Each but none keeps snapshots in the run folder, in alarms/."""
    patience: int = Field(default=3, ge=1)
    """Looks in a row at which the same thing must be wrong; of what every logged step has, logged steps."""
    min_std_ratio: float = Field(default=0.1, ge=0.0)
    """Least feature_std_ratio. Small runs that learned were at 0.2 to 0.9 all the time, collapsing ones fell from 0.6
    below 0.1 within tens of steps."""
    min_rankme: float = Field(default=2.0, ge=0.0)
    """Least RankMe, where 1 is a single direction. Small runs that learned may begin by falling from 10 to 3 (masked
    pixels do), so what counts is not the fall but where it ends."""
    min_teacher_information: float = Field(default=0.05, ge=0.0)
    """Least teacher_information of self_distillation, in nats: 0 where the teacher says the same of every image, be it
    one prototype (entropy near 0) or all of them (entropy near 1)."""
    min_target_std: float = Field(default=0.1, ge=0.0)
    """Least target_std of a masked_image objective with an EMA teacher: about 1, as targets are normalised; data2vec
    takes less than 0.1 for a collapse."""
    max_loss_rise: float = Field(default=1.0, gt=0.0)
    """How far the loss (mean of `patience` logged steps) may rise above its lowest in the window, in units of the
    window's median: 1 is about a doubling."""
    max_grad_rise: float = Field(default=20.0, gt=1.0)
    """Largest gradient norm before clipping, as a multiple of its median in the window."""
    window: int = Field(default=100, ge=MIN_RECORDS)
    """Logged steps that loss and gradient are compared with."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Steps of any hundred whose loss or gradient may be not finite. Such a step changes no weight; its samples count
    as drawn, and metrics.jsonl marks it `skipped`. With one more the run rolls back (action: rollback) or stops."""
    max_rollbacks: int = Field(default=2, ge=1)
    """Rollbacks after which the run stops instead: what comes back on other samples is not bad luck."""


@dataclass(frozen=True)
class Alarm:
    """What rings. `text` is one line: the number, the rule, what it means, and what to change."""

    metric: str
    since: int  # step of the first bad look: what was saved before it is good
    is_new: bool  # rings for the first time since all was well
    text: str


class Alarms:
    """What is wrong at the newest records of a run. advice: by metric (without the objective's name), what to do."""

    def __init__(self, config: AlarmConfig, advice: Mapping[str, str]) -> None:
        self.config = config
        self.advice = advice
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._bad: dict[str, tuple[int, int]] = {}  # metric -> (bad looks in a row, step of the first)

    def judge(self, record: Mapping[str, Any]) -> list[Alarm]:
        """Take the next record of metrics.jsonl, and return what rings at it.

        While something stays wrong it rings again after every `patience` looks. A metric that the record lacks, or that
        is null, is not looked at.
        """
        floors = {
            "feature_std_ratio": ("monitor.alarm.min_std_ratio", self.config.min_std_ratio),
            "rankme": ("monitor.alarm.min_rankme", self.config.min_rankme),
            "teacher_information": ("monitor.alarm.min_teacher_information", self.config.min_teacher_information),
            "target_std": ("monitor.alarm.min_target_std", self.config.min_target_std),
        }
        found: list[Alarm] = []
        for metric, value in record.items():
            if not isinstance(value, float) or not math.isfinite(value):
                continue
            kind = metric.rpartition("/")[2].removeprefix("ibot_")
            if kind in floors:
                key, least = floors[kind]
                found += self._count(record, metric, kind, value < least, f"{value:.3g} is below {key} ({least:g})")
            elif metric == "loss":
                found += self._judge_loss(record, value)
            elif metric == "grad_norm":
                found += self._judge_norm(record, value)
        return found

    def _judge_loss(self, record: Mapping[str, Any], loss: float) -> list[Alarm]:
        self._losses.append(loss)
        if len(self._losses) < MIN_RECORDS:
            return []
        sums = [0.0]
        for value in self._losses:
            sums.append(sums[-1] + value)
        width = self.config.patience
        means = [(later - earlier) / width for earlier, later in zip(sums, sums[width:], strict=False)]
        lowest, unit = min(means), median(map(abs, self._losses))
        limit = lowest + self.config.max_loss_rise * unit
        seen = (
            f"{means[-1]:.4g} (mean of {width}) has risen from {lowest:.4g}, further than monitor.alarm.max_loss_rise"
        )
        return self._count(record, "loss", "loss", means[-1] > limit, f"{seen} ({self.config.max_loss_rise:g}) allows")

    def _judge_norm(self, record: Mapping[str, Any], norm: float) -> list[Alarm]:
        if len(self._norms) < MIN_RECORDS:
            self._norms.append(norm)
            return []
        usual = median(self._norms)
        self._norms.append(norm)
        factor = self.config.max_grad_rise
        seen = f"{norm:.3g} is more than monitor.alarm.max_grad_rise ({factor:g}) times its median of {usual:.3g}"
        return self._count(record, "grad_norm", "grad_norm", norm > factor * usual, seen)

    def _count(self, record: Mapping[str, Any], metric: str, kind: str, is_bad: bool, seen: str) -> list[Alarm]:
        if not is_bad:
            self._bad.pop(metric, None)
            return []
        count, since = self._bad.get(metric, (0, record["step"]))
        self._bad[metric] = (count + 1, since)
        if (count + 1) % self.config.patience:
            return []
        text = f"{metric} {seen} at the last {count + 1} looks, since step {since}: {self.advice[kind]}"
        return [Alarm(metric, since, count + 1 == self.config.patience, text)]


def compute_advice(config: "PretrainConfig") -> dict[str, str]:
    """What each alarm means and what to change about this config, with a value; by metric."""
    optim, warmup = config.optim, config.schedule.warmup_samples
    slower = f"optim.base_lr={optim.base_lr / 2:g} (it is {optim.base_lr:g})"
    longer = f"schedule.warmup_samples={max(2 * warmup, config.schedule.total_samples // 20)} (it is {warmup})"
    again = "in a new run with another --out"
    collapse = "all images get nearly the same features"
    advice = {
        "feature_std_ratio": f"{collapse}; try {slower} {again}",
        "rankme": f"the features lie along one direction, whatever the image; try {slower} {again}",
        "loss": f"training goes backwards; try {slower} or {longer} {again}",
        "grad_norm": f"gradients explode; try {_advise_clipping(config)} {again}",
    }
    for number, objective in enumerate(config.objectives):
        if isinstance(objective, SelfDistillationConfig):
            where = f"in objectives[{number}]"
            if objective.centring == "mean":
                change = f"centring: sinkhorn_knopp {where} (it is mean)"
            else:
                cooler = objective.teacher_temperature * 0.75
                change = (
                    f"teacher_temperature: {cooler:.3g} {where} (it is {objective.teacher_temperature:g}), or {slower}"
                )
            advice["teacher_information"] = (
                f"the teacher says the same of every image, so there is nothing to learn from it; try {change} {again}"
            )
        if isinstance(objective, MaskedImageConfig) and isinstance(objective.target, EmaTeacherConfig):
            momentum = objective.target.ema.momentum
            advice["target_std"] = (
                "the teacher's tokens are nearly alike at all places, so they are easy to predict and teach nothing: "
                f"try ema.momentum: {1 - (1 - momentum) / 4:.6g} in the target of objectives[{number}] (it is "
                f"{momentum:g}), or {slower} {again}"
            )
    return advice


def _advise_clipping(config: "PretrainConfig") -> str:
    limit = config.engine.clip_grad_norm
    if limit is None or limit > 1.0:
        return f"engine.clip_grad_norm=1.0 (it is {'null' if limit is None else f'{limit:g}'})"
    return f"optim.base_lr={config.optim.base_lr / 2:g} (it is {config.optim.base_lr:g})"
