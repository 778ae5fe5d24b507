"""The checkpoints of one run, as its loop sees them: start one, go on, finish it; go back to one.

    TrainingState, FailureLog  --start-->  pending (written by a thread)  --finish-->  newest
    checkpoint                 --load-->   weights, optimizer, EMA teachers; its TrainingState

At most one is being written at a time. Every rank has a Saver and calls the same methods in the same order.
"""

from pathlib import Path
from typing import Any

from panfm.data.failures import FailureLog
from panfm.distributed import is_main
from panfm.encoder.facts import EncoderFacts
from panfm.training.build import BuiltRun
from panfm.training.checkpoint import TrainingState, load_checkpoint, read_extra_state
from panfm.training.checkpoint_writer import PendingCheckpoint, start_checkpoint
from panfm.training.meters import Meters
from panfm.training.plan import PretrainConfig
from panfm.training.watchdog import Watchdog


class Saver:
    """newest: the newest whole checkpoint of the run folder `out`, None before there is one."""

    def __init__(
        self,
        config: PretrainConfig,
        plain: dict[str, Any],
        built: BuiltRun,
        out: Path,
        newest: Path | None,
        *,
        facts: EncoderFacts,
        meters: Meters,
        watchdog: Watchdog,
    ) -> None:
        """plain: the config as plain values. facts: of the encoder, but for what a step changes."""
        self.out, self.newest = out, newest
        self._config, self._plain = config.checkpoint, plain
        self._model, self._engine = built.model, built.engine
        self._facts, self._meters, self._watchdog = facts, meters, watchdog
        self._pending: PendingCheckpoint | None = None

    @property
    def has_written(self) -> bool:
        """Whether a checkpoint is pending of which this rank has written its part."""
        return self._pending is not None and self._pending.is_done

    def load(self, checkpoint: Path) -> TrainingState:
        """Put model and optimizer where a checkpoint left them. UserError where it is of another run."""
        state = load_checkpoint(checkpoint, self._engine, self._plain, self._facts)
        self._model.load_extra_state(read_extra_state(checkpoint), str(checkpoint))
        return state

    def start(self, state: TrainingState, failed: FailureLog) -> None:
        """Copy the run as it is at `state` and begin to write it, after the one before is whole."""
        self._pending = self._start(state, failed, self.out, self._config.keep_last, self._config.keep_every)

    def finish(self) -> None:
        """Wait for the pending checkpoint, if there is one, and complete it: it is the newest."""
        if self._pending is not None:
            self._watchdog.begin("the checkpoint that is being written", slow=True)
            pending, self._pending = self._pending, None
            self.newest = pending.finish()

    def save(self, state: TrainingState, failed: FailureLog) -> Path:
        """Start one and finish it."""
        self.start(state, failed)
        self.finish()
        assert self.newest is not None
        return self.newest

    def save_aside(self, state: TrainingState, failed: FailureLog, folder: Path, keep_last: int) -> None:
        """The same into another folder, of which the newest `keep_last` stay; not what the run goes on from."""
        self._start(state, failed, folder, keep_last, None).finish()

    def wait(self) -> None:
        """Let the thread end that still writes, and complete nothing: for a run that ends with an error."""
        if self._pending is not None:
            self._pending.wait()

    def _start(
        self, state: TrainingState, failed: FailureLog, folder: Path, keep_last: int, keep_every: int | None
    ) -> PendingCheckpoint:
        self.finish()
        self._watchdog.begin(f"checkpoint of step {state.step}", slow=True)
        facts = self._facts.model_copy(
            update={
                "step": state.step,
                "samples_seen": state.samples_seen,
                "energy_kwh": self._meters.energy_kwh,
                "training_flops": self._meters.sample_flops * state.samples_seen,
                "hardware": self._meters.hardware,
            }
        )
        failed.sync()
        text = self._model.text_objective
        return start_checkpoint(
            folder,
            self._engine,
            state,
            config=self._plain,
            facts=facts,
            keep_last=keep_last,
            keep_every=keep_every,
            extra=self._model.copy_extra_state() if is_main() else None,
            text=None if text is None else self._engine.copy_state(text),
            encoder=self._model.exported_encoder,
        )
