"""What is looked at while a run trains, what it costs, and what follows: a few calls of the loop.

    step, its micro batches  ->  Watch.look           ->  numbers of features, probe, pictures: what is due then
    record of metrics.jsonl  ->  Watch.judge          ->  the alarms that ring
    alarms                   ->  Watch.keep_snapshot  ->  checkpoints from before and at the alarm, in alarms/
                             ->  Watch.find_way_back  ->  the checkpoint to roll back to, if any

Nothing here changes what is trained: everything runs in eval mode without gradients, draws no random number, and takes
no sample out of the stream. A run with all of it on has the losses and checkpoints of one with all of it off.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from pydantic import Field

from panfm.config import config_class
from panfm.data.batch import Batch
from panfm.data.loader import Loader
from panfm.data.transforms import EvalTransform
from panfm.distributed import broadcast_object, is_main
from panfm.encoder.facts import TransformFacts
from panfm.files import write_bytes
from panfm.objectives.pretraining import PretrainingModel
from panfm.shards.index import Exclusion
from panfm.tracking import read_metrics
from panfm.training.alarms import Alarm, AlarmConfig, Alarms, compute_advice
from panfm.training.checkpoint import find_checkpoint, link_checkpoint
from panfm.training.monitor import (
    compute_alignment,
    compute_attention,
    compute_attention_entropy,
    compute_feature_std_ratio,
    compute_pooled_features,
    compute_rankme,
    compute_uniformity,
)
from panfm.training.pictures import Examples, choose_examples, compute_panels, draw_sheet
from panfm.training.probe import Probe, ProbeConfig, build_probe

if TYPE_CHECKING:
    from panfm.training.plan import PretrainConfig

SNAPSHOTS = "alarms"  # in the run folder: itself like a run's, with the checkpoints from before and at an alarm
NUM_SNAPSHOTS = 4  # that stay
SKIP_WINDOW = 100  # steps in which so many skipped ones are bad luck (monitor.alarm.max_skipped_steps)
NUM_ATTENTION_IMAGES = 16  # a look: one attention matrix of ViT-L/16 at 224 px is 0.6 million numbers a head


@config_class
class MonitorConfig:
    """What is looked at, how often, and when a line about it is due."""

    every: int = Field(default=200, ge=0)
    """Steps between two looks at features and attention; 0 never looks."""
    num_images: int = Field(default=256, ge=2)
    """Images a look, at most this rank's share of a global batch: RankMe cannot exceed it."""
    probe: ProbeConfig | None = None
    """Nearest neighbours on held-out images; null: no probe."""
    pictures_every: int = Field(default=1000, ge=0)
    """Steps between two pictures of one image of each modality in the run folder, pictures/step-*.png (about 0.5 MB
    each); the first is drawn after step 1. 0 draws none."""
    pictures_to_wandb: Literal["open", "all", "none"] = "open"
    """Which pictures wandb gets too, beyond the run folder. They show photographs of patients: open sends those whose
    sources' cards all say `access: open`; all sends those of private archives as well."""
    alarm: AlarmConfig = Field(default_factory=AlarmConfig)
    """What counts as trouble, and what then happens."""
    hang_seconds: float | None = Field(default=600.0, gt=0, le=1000.0)
    """Seconds that a step, with the wait for its data, may take before the rank is taken to hang: every rank writes its
    stacks and ends with code 6. Three times as long for the first step, checkpoints and looks. Far above any step, so
    that only what never ends is ended; the upper bound lies below the timeout of collectives. null: wait for ever."""


@dataclass(frozen=True)
class Look:
    """What a step brought to look at, on rank 0; both empty where nothing was due."""

    numbers: dict[str, float | None] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)  # what wandb may have


class Watch:
    """Looks at a run while it trains. Every rank has one; `look` meets the others in the probe."""

    def __init__(
        self,
        config: "PretrainConfig",
        model: PretrainingModel,
        loader: Loader,
        excluded: Exclusion,
        transform: TransformFacts,
        out: Path,
    ) -> None:
        """Choose and decode what will be looked at; UserError where the probe's images may be drawn.

        transform: the encoder's evaluation transform. out: the run folder.
        """
        self.config = config.monitor
        self.model = model
        self.out = out
        self._device = next(model.parameters()).device
        self._advice = compute_advice(config)
        self.alarms = Alarms(self.config.alarm, self._advice)
        evaluation = EvalTransform(**transform.model_dump())
        probe = self.config.probe
        self.probe: Probe | None = None
        if probe is not None:
            self.probe = build_probe(probe, config.data, excluded, evaluation)
        self.examples: Examples | None = None
        if is_main() and self.config.pictures_every:
            self.examples = choose_examples(loader, evaluation)
        self._started, self._seconds = time.monotonic(), 0.0
        self._skipped: list[int] = []  # steps that were not finite, of the last SKIP_WINDOW

    def resume(self) -> int:
        """Judge anew from the records that metrics.jsonl holds: at a start, and after a rollback.

        Returns how many samples rollbacks had thrown away by the last of them.
        """
        self.alarms = Alarms(self.config.alarm, self._advice)
        records = read_metrics(self.out / "metrics.jsonl") if is_main() else []
        for record in records:
            self.alarms.judge(record)
        self._skipped = broadcast_object([r["step"] for r in records if r.get("skipped") == "not finite"])
        return int(records[-1].get("discarded_samples", 0)) if records else 0

    def describe(self) -> list[str]:
        """What will be looked at besides features and attention, in a line each."""
        lines = [] if self.probe is None else self.probe.describe()
        if self.examples is not None:
            lines.append(
                f"pictures of one training image of each modality ({', '.join(self.examples.modalities)}) after step 1 "
                f"and every {self.config.pictures_every:,}: {self.out / 'pictures'}"
            )
        return lines

    def is_due(self, step: int) -> bool:
        """Whether any rank looks at anything after `step`; the same on all. Under ZeRO 3 `look` needs whole weights."""
        probe_every = 0 if self.config.probe is None else self.config.probe.every
        at_first = probe_every or self.config.pictures_every
        distances = (self.config.every, probe_every, self.config.pictures_every)
        return bool(at_first and step == 1) or any(every(step, distance) for distance in distances)

    def look(self, step: int, micro_batches: Sequence[Batch]) -> Look:
        """Do what is due after `step`; every rank must call it. micro_batches: what this rank trained on in it.

        The numbers say what each part cost, and watch_share which share of the run's time all looks took so far.
        """
        numbers: dict[str, float | None] = {}
        pictures: dict[str, Image.Image] = {}
        if is_main() and every(step, self.config.every):
            began = time.monotonic()
            numbers |= self._look_at_features(micro_batches)
            numbers["look_seconds"] = self._take_time(began)
        if self.probe is not None and (step == 1 or every(step, self.probe.config.every)):
            began = time.monotonic()
            encoder, normalise = self.model.exported_encoder, self.model.normalise
            numbers |= self.probe.run(
                lambda images: compute_pooled_features(encoder, images.to(self._device), normalise)
            )
            numbers["probe/seconds"] = self._take_time(began)
        if self.examples is not None and (step == 1 or every(step, self.config.pictures_every)):
            began = time.monotonic()
            sheet = self._draw(self.examples, step)
            wanted = self.config.pictures_to_wandb
            if wanted == "all" or (wanted == "open" and self.examples.are_open):
                pictures["pictures"] = sheet
            numbers["pictures_seconds"] = self._take_time(began)
        if numbers:
            numbers["watch_share"] = self._seconds / (time.monotonic() - self._started)
        return Look(numbers, pictures)

    def judge(self, record: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that ring at a record that was just written to metrics.jsonl; none where they have no action."""
        ringing = self.alarms.judge(record)
        return [] if self.config.alarm.action == "none" else ringing

    def keep_snapshot(self, alarms: Sequence[Alarm], save: Callable[[Path, int], None]) -> None:
        """Where an alarm is new, keep what the run came from and what it came to, in alarms/; every rank must call it.

        save: writes a checkpoint of the run as it is into a folder, of which so many stay.
        """
        if not any(alarm.is_new for alarm in alarms):
            return
        if is_main():
            earlier, _ = find_checkpoint(self.out, before=min(alarm.since for alarm in alarms))
            if earlier is not None:
                link_checkpoint(earlier, self.out / SNAPSHOTS)
        save(self.out / SNAPSHOTS, NUM_SNAPSHOTS)

    def may_skip(self, step: int) -> bool:
        """Whether the run goes on where `step` changed nothing since it was not finite; the same on every rank."""
        self._skipped = [*(skipped for skipped in self._skipped if skipped > step - SKIP_WINDOW), step]
        return len(self._skipped) <= self.config.alarm.max_skipped_steps

    def find_way_back(self, since: int, *, num_rollbacks: int) -> Path | None:
        """The newest whole checkpoint from before step `since`, where a rollback is wanted and there were not too many.

        Every rank must call it, and gets the same.
        """
        if self.config.alarm.action != "rollback" or num_rollbacks >= self.config.alarm.max_rollbacks:
            return None
        return broadcast_object(find_checkpoint(self.out, before=since)[0] if is_main() else None)

    def _look_at_features(self, micro_batches: Sequence[Batch]) -> dict[str, float | None]:
        encoder, normalise = self.model.exported_encoder, self.model.normalise
        num_images = self.config.num_images

        def compute(view: int) -> torch.Tensor:
            images = torch.cat([batch.views[view] for batch in micro_batches])[:num_images]
            parts = images.split(micro_batches[0].size)  # no more at once than a training step holds
            return torch.cat([compute_pooled_features(encoder, part.to(self._device), normalise) for part in parts])

        features = compute(0)
        views = micro_batches[0].views
        numbers = {
            "rankme": compute_rankme(features),
            "feature_std_ratio": compute_feature_std_ratio(features),
            "uniformity": compute_uniformity(features),
        }
        if len(views) > 1 and views[1].shape == views[0].shape:  # and no small local view
            numbers["alignment"] = compute_alignment(features, compute(1))
        few = views[0][:NUM_ATTENTION_IMAGES].to(self._device)
        numbers["attention_entropy"] = compute_attention_entropy(compute_attention(encoder, few, normalise))
        return numbers

    def _draw(self, examples: Examples, step: int) -> Image.Image:
        title = f"{self.out.resolve().name}, step {step:,}"
        sheet = draw_sheet(compute_panels(self.model, examples), examples.modalities, title)
        buffer = BytesIO()
        sheet.save(buffer, format="PNG")
        (self.out / "pictures").mkdir(exist_ok=True)
        write_bytes(self.out / "pictures" / f"step-{step:08d}.png", buffer.getvalue())
        return sheet

    def _take_time(self, began: float) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        self._seconds += seconds
        return seconds


def every(step: int, distance: int) -> bool:
    """Whether something that happens every `distance` steps (0: never) happens after `step`."""
    return distance > 0 and step % distance == 0
