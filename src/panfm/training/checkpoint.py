"""Everything a bit-exact resume needs, in one folder that is either whole or not there: finding and reading it.

    run/checkpoints/step-00001234/
        state/               every rank's part of weights and optimizer (checkpoint_state.py)
        training.json        step, samples_seen, loader state, world size, ZeRO stage, resolved config, code version
        extra.safetensors    the EMA teacher and the centres of its heads, where the run has a teacher
        encoder.safetensors  the encoder alone, under timm's names: the teacher's or the student's, as configured
        text.safetensors     the text tower and its maps, where an objective has one, for exports
        encoder.json         EncoderFacts: how to build it, feed it, and what it was trained on
        manifest.json        SHA-256 and size of every file above, written last

A checkpoint is written (checkpoint_writer.py) as `step-00001234.tmp`, flushed to disk and renamed after its manifest.
The random state needs no file: the engine seeds every step from (seed, step, rank), the loader draws from (seed, salts,
position). With the same ranks a resumed run is the one that never stopped, to the bit. With more ranks or fewer, or
under another ZeRO stage, it goes on with the same samples; its losses differ by the order in which numbers are added
up, and by stochastic depth, which draws by rank.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from panfm.config import config_class
from panfm.encoder.facts import EncoderFacts, SourceFacts, read_facts
from panfm.errors import UserError
from panfm.files import compute_file_sha256, read_json
from panfm.training.engine import Engine

# 1 had one salt; its sample stream was another one, which no later panfm can go on with. 2 held DeepSpeed's own files,
# which only the same number of ranks could read.
FORMAT = 3
MANIFEST = "manifest.json"
EXTRA = "extra.safetensors"
TEXT = "text.safetensors"

# Config keys that may differ between a run and its resumption: they decide neither the weights nor the sample stream.
# data.shards may move; what it holds is compared by data hash instead.
# data.use only refuses sources; runs that were begun before there was such a key resume too.
# The ZeRO stage and the size of a micro batch are what another number of ranks may need; objectives that compare the
# images of a micro batch refuse one that is not the whole global batch.
FREE_KEYS = (
    "checkpoint",
    "monitor",
    "tracking",
    "data.shards",
    "data.use",
    "data.workers",
    "data.prefetch",
    "data.max_failed_share",
    "engine.micro_batch_size",
    "engine.num_threads",
    "engine.world_sizes",
    "engine.zero_stage",
)


@config_class
class CheckpointConfig:
    """When a checkpoint is written and how many stay."""

    save_every: int = Field(default=1000, ge=1)
    """Steps between two checkpoints; one more is written at the end and on SIGTERM or SIGUSR1."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that stay; with 2, a torn disk still leaves one to go back to."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints that stay for ever, besides the newest: what a curve of probes or a later branch of
    the run starts from; a multiple of save_every. null: none."""
    background: bool = True
    """Write while training goes on. The loop waits only until the state is copied, which takes host memory until it is
    on disk: 12 bytes a parameter over all ranks, and 4 for each parameter of encoder and EMA teacher on rank 0. false:
    the loop waits for the disk, and the same copy is gone sooner."""

    def __post_init__(self) -> None:
        if self.keep_every is not None and self.keep_every % self.save_every:
            better = max(round(self.keep_every / self.save_every), 1) * self.save_every
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of save_every ({self.save_every}), else what would "
                f"stay is never written; try {better}"
            )


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands: all that changes from step to step, besides weights and optimizer."""

    step: int  # optimizer steps done
    samples_seen: int
    salts: tuple[tuple[int, int], ...] = ((0, 0),)  # of the sample stream: (first step, salt), one more a rollback


def find_checkpoint(run: Path, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run (None: there is none), and a line about each newer one passed over.

    before: look at checkpoints of earlier steps only.
    """
    passed_over: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        if before is not None and folder >= compute_folder(run, before):
            continue
        fault = check_checkpoint(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"passing over {folder.name}: {fault}")
    return None, passed_over


def check_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest must be there with its size and hash."""
    try:
        manifest = read_json(folder / MANIFEST)
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (UserError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged, so the checkpoint was never completed"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {entry['size']}"
        if compute_file_sha256(path) != entry["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs from the manifest)"
    extra = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {*files, MANIFEST}
    return f"{min(extra)} is not in the manifest" if extra else None


def load_checkpoint(folder: Path, engine: Engine, config: Mapping[str, Any], facts: EncoderFacts) -> TrainingState:
    """Bring `engine` to the state of a whole checkpoint; every rank must call it.

    The number of ranks and the ZeRO stage may be others than when it was written. Raises UserError where the run that
    is about to go on differs from the one that was saved in what matters: another config key, other shards.
    """
    training = read_json(folder / "training.json")
    if training["format"] != FORMAT:
        raise UserError(
            f"{folder}: format {training['format']}; this panfm reads {FORMAT}: use the panfm that wrote it"
        )
    if (difference := find_difference(training["config"], config)) is not None:
        key, old, new = difference
        raise UserError(
            f"{folder}: {key} was {old!r} and is now {new!r}; a run resumes with the config it began with: set it "
            "back, or start a new run with another --out"
        )
    saved_sources = [_identify(source) for source in read_facts(folder / "encoder.json").sources]
    sources = [_identify(source) for source in facts.sources]
    if saved_sources != sources:
        saved, now = next(pair for pair in zip_longest(saved_sources, sources) if pair[0] != pair[1])
        raise UserError(
            f"{folder}: the samples changed since the run began: (source, num_kept, data_hash) was {saved} and is "
            f"now {now}; resume with the same shards in the same order, or start a new run with another --out"
        )
    engine.load(folder)
    salts = tuple((int(first), int(salt)) for first, salt in training["salts"])
    return TrainingState(step=training["step"], samples_seen=training["samples_seen"], salts=salts)


def read_extra_state(folder: Path) -> dict[str, Tensor]:
    """The model's extra state in a whole checkpoint; {} where it was written by a run without any."""
    path = folder / EXTRA
    return load_file(path) if path.is_file() else {}


def find_difference(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first config key, in order of `now`, whose value matters and differs: (key, saved value, new value)."""
    for name in [*now, *(name for name in saved if name not in now)]:
        key = f"{prefix}{name}"
        if key in FREE_KEYS:
            continue
        old, new = saved.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if (difference := find_difference(old, new, f"{key}.")) is not None:
                return difference
        elif old != new:
            return key, old, new
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not; unfinished `.tmp` folders are not among them."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir() and path.suffix != ".tmp")


def remove_checkpoints(run: Path, after: int) -> None:
    """Remove the checkpoints of steps later than `after`: they belong to steps that were thrown away."""
    for folder in list_checkpoints(run):
        if folder > compute_folder(run, after):
            shutil.rmtree(folder)


def link_checkpoint(checkpoint: Path, run: Path) -> None:
    """Keep a checkpoint in `run` too, where its own run will not remove it; as links, which take no room."""
    target = run / "checkpoints" / checkpoint.name
    if not target.exists():
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(checkpoint, temporary, copy_function=_link)
        temporary.rename(target)


def compute_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def read_step(folder: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def describe_writers(folder: Path) -> str:
    """Which ranks wrote a whole checkpoint, in words."""
    training = read_json(folder / "training.json")
    return f"written by {training['world_size']} ranks under ZeRO {training['zero_stage']}"


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _identify(source: SourceFacts) -> tuple[str, int, str]:
    return source.source, source.num_kept, source.data_hash[:12]
