"""Loaders of small images for tests, and trainers that can be killed."""

import hashlib
import multiprocessing
import multiprocessing.forkserver
import time
import warnings
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from panfm.config import validate
from panfm.data.batch import Batch
from panfm.data.failures import FailureLog
from panfm.data.loader import DataConfig, Loader, LoaderState, build_loader
from panfm.data.masking import MaskConfig
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig

GLOBAL, MICRO = 12, 2
AUGMENT = AugmentConfig(image_size=16, views=2)
START = LoaderState(step=0)
DATA_KEYS = ("workers", "modalities", "max_failed_share", "use")


def make_loader(*shards: Path | str, mixture: MixtureConfig | None = None, **options: object) -> Loader:
    data = {"workers": 0, "shards": [str(path) for path in shards]}
    data |= {key: options.pop(key) for key in DATA_KEYS if key in options}
    arguments = {
        "mask": MaskConfig(kind="block", ratio=0.5),
        "mask_grid": (4, 4),
        "seed": 3,
        "global_batch_size": GLOBAL,
        "micro_batch_size": MICRO,
        "excluded": {},
    }
    augment = options.pop("augment", AUGMENT)
    return build_loader(
        validate(DataConfig, data, where="test"), mixture or MixtureConfig(), augment, **(arguments | options)
    )


def draw_steps(
    loader: Loader,
    num_steps: int,
    state: LoaderState = START,
    world_size: int = 1,
    failed: FailureLog | None = None,
) -> list[Batch]:
    """The micro batches of `num_steps` steps in the order of the stream, all ranks together."""
    with loader:
        ranks = [loader.iterate(state, rank=rank, world_size=world_size, failed=failed) for rank in range(world_size)]
        return [batch for _ in range(num_steps) for batches in ranks for batch in next(batches)]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in ("positions", "modalities", "sources", "lesions", "patients", "visits", "masks"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert len(one.views) == len(other.views)
        for view, other_view in zip(one.views, other.views, strict=True):
            assert torch.equal(view, other_view)


def compute_digest(batches: Iterable[Batch]) -> str:
    """Hash of all that a step's batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        assert batch.masks is not None
        for tensor in (batch.positions, batch.modalities, batch.lesions, batch.visits, batch.masks, *batch.views):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def start_trainer(shards: tuple[Path, ...], notes: Path, workers: int, num_steps: int) -> BaseProcess:
    """A process that takes batches and notes each step's digest, from the step behind the last note on.

    It is forked, and its workers come from this process's fork server: so it starts at once, without torch's import.
    """
    make_loader(*shards, workers=1).close()  # the fork server runs
    trainer = multiprocessing.get_context("fork").Process(target=_train, args=(shards, notes, workers, num_steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, none of which it needs
        trainer.start()
    return trainer


def _train(shards: tuple[Path, ...], notes: Path, workers: int, num_steps: int) -> None:
    server = multiprocessing.forkserver._forkserver
    multiprocessing.forkserver.ensure_running = server.ensure_running = lambda: None  # it is not this process's child
    mixture = MixtureConfig(weighting="uniform", group_share=0.3)
    done = len(read_notes(notes))
    with make_loader(*shards, mixture=mixture, workers=workers) as loader, notes.open("a") as file:
        steps = loader.iterate(LoaderState(done), rank=0, world_size=1)
        for _ in range(done, num_steps):
            file.write(compute_digest(next(steps)) + "\n")
            file.flush()


def read_notes(notes: Path) -> list[str]:
    """The whole lines of a trainer's notes; what a kill cut short is taken out of the file."""
    lines = notes.read_text().split("\n")[:-1] if notes.exists() else []
    notes.write_text("".join(line + "\n" for line in lines))
    return lines


def wait_for_notes(notes: Path, wanted: int, trainer: BaseProcess) -> None:
    """Return when a trainer has noted `wanted` steps."""
    deadline = time.monotonic() + 60
    while not notes.exists() or notes.read_bytes().count(b"\n") < wanted:
        assert trainer.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
