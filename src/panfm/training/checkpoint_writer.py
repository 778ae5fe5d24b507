"""Writing a checkpoint: the state is copied while the loop waits, and written by a thread while it goes on.

    engine, state, facts, ...  ->  start_checkpoint     every rank: copies its part, starts its thread
                                   step-00001234.tmp    every rank's thread: files, flushed to disk, and their hashes
    PendingCheckpoint.is_done  ->  .finish              every rank: manifest, the final name, older ones removed

What training does after `start_checkpoint` is in no file, so a checkpoint written in the background has the bytes of
one that was waited for. The ranks meet in `finish` only, on the main thread of each: the threads need no process group,
and a rank that could not write keeps no other waiting. Until then the folder is a `.tmp`, which nothing reads and the
next start removes.
"""

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from panfm import __version__
from panfm.distributed import barrier, broadcast_object, gather_objects, get_world_size, is_main
from panfm.encoder.facts import EncoderFacts, write_facts
from panfm.errors import UserError
from panfm.files import compute_file_sha256, sync_folder, write_json
from panfm.training.checkpoint import (
    EXTRA,
    FORMAT,
    MANIFEST,
    TEXT,
    TrainingState,
    compute_folder,
    list_checkpoints,
    read_step,
)
from panfm.training.engine import Engine

Entries = dict[str, dict[str, Any]]  # of the manifest: file name -> {"sha256", "size"}


def start_checkpoint(
    run: Path,
    engine: Engine,
    state: TrainingState,
    *,
    config: Mapping[str, Any],
    facts: EncoderFacts,
    keep_last: int,
    keep_every: int | None = None,
    extra: Mapping[str, Tensor] | None = None,
    text: Mapping[str, Tensor] | None = None,
    encoder: nn.Module | None = None,
) -> "PendingCheckpoint":
    """Copy what a checkpoint of `run` at `state` holds and start to write it; every rank must call it, and `finish`.

    `config` is the resolved config as plain values. `extra` is what the model needs beside its weights, on rank 0
    (`PretrainingModel.copy_extra_state`), `text` the state of its text tower, on rank 0 too, both copies; `encoder` the
    one to ship, None for the one that the engine trains. keep_last, keep_every: as in CheckpointConfig.
    """
    final = compute_folder(run, state.step)
    temporary = final.with_name(final.name + ".tmp")
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    part = engine.copy_part()
    whole = {"encoder.safetensors": engine.copy_state(encoder or engine.encoder), EXTRA: extra, TEXT: text}
    training = {
        **asdict(state),
        "format": FORMAT,
        "world_size": get_world_size(),
        "zero_stage": engine.zero_stage,
        "config": dict(config),
        "code_version": __version__,
    }

    def write() -> list[Path]:
        temporary.mkdir(parents=True, exist_ok=True)
        paths = [part.write(temporary)]
        if is_main():
            for name, tensors in whole.items():
                if tensors:
                    save_file(dict(tensors), temporary / name)
                    paths.append(temporary / name)
            write_facts(temporary / "encoder.json", facts)
            write_json(temporary / "training.json", training)
            paths += [temporary / "encoder.json", temporary / "training.json"]
        return paths

    return PendingCheckpoint(final, temporary, write, keep_last, keep_every)


def write_checkpoint(
    run: Path, engine: Engine, state: TrainingState, *, config: Mapping[str, Any], facts: EncoderFacts, **rest: Any
) -> Path:
    """`start_checkpoint` with all its arguments, waited for. Returns the folder."""
    return start_checkpoint(run, engine, state, config=config, facts=facts, **rest).finish()


class PendingCheckpoint:
    """A checkpoint that this rank's thread is writing."""

    def __init__(
        self, final: Path, temporary: Path, write: Callable[[], list[Path]], keep_last: int, keep_every: int | None
    ) -> None:
        self._final = final
        self._temporary = temporary
        self._keep_last, self._keep_every = keep_last, keep_every
        self._entries: Entries = {}
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name=final.name)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank has written its files, or failed to: `finish` need not wait for it."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for this rank's thread, without completing anything; for a run that ends with an error."""
        self._thread.join()

    def finish(self) -> Path:
        """Complete the checkpoint when every rank has written; every rank must call it. Returns the folder.

        A checkpoint that could not be written is a UserError on every rank; the ones before it stay, nothing of it is
        left.
        """
        self.wait()
        told = gather_objects((self._entries, self._failure))
        failures = [failure for _, failure in told if failure]
        if not failures and is_main():
            entries = {name: entry for part, _ in told for name, entry in part.items()}
            failures = _complete(self._temporary, self._final, entries)
        failures = broadcast_object(failures)
        if failures:
            if is_main():
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise UserError(
                f"checkpoint of step {read_step(self._final)} not written: {failures[0]}; the ones before it are "
                "whole: free some space and start the same command again"
            )
        if is_main():
            remove_old(self._final.parent.parent, self._keep_last, self._keep_every)
        barrier()
        return self._final

    def _run(self, write: Callable[[], list[Path]]) -> None:
        try:
            for path in write():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                name = str(path.relative_to(self._temporary))
                self._entries[name] = {"sha256": compute_file_sha256(path), "size": path.stat().st_size}
        except Exception as error:  # whatever it was: a thread that dies in silence would leave a half checkpoint
            self._failure = f"{self._temporary}: {' '.join(str(error).split()) or type(error).__name__}"


def remove_old(run: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove the checkpoints of a run but the newest `keep_last` and those of every `keep_every`-th step."""
    for old in list_checkpoints(run)[:-keep_last]:
        if keep_every is None or read_step(old) % keep_every:
            shutil.rmtree(old, ignore_errors=True)  # what could not go now is tried again at the next


def _complete(temporary: Path, final: Path, entries: Entries) -> list[str]:
    """Write the manifest of a folder whose files are all on disk, and give it its name; returns what went wrong."""
    try:
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            sync_folder(folder)
        write_json(temporary / MANIFEST, {"format": FORMAT, "files": entries})
        if final.exists():
            shutil.rmtree(final)  # torn or tampered, else the run would have resumed from it
        temporary.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        return [f"{temporary}: {error}"]
    return []
