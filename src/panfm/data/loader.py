"""Loader: shard sets -> an endless stream of batches that resumes to the sample.

    shard sets --(permitted use, excluded groups, modalities)--> SampleTable --(mixture)--> SampleStream
    position --> sample --> bytes --> views, masks --> Batch      in worker processes, one task a micro batch

A task is a range of positions, and all that happens to a position follows from (seed, salt, position): the number of
workers, of ranks, or where a run was interrupted cannot change a bit of it. Step s draws the positions from
s * global_batch_size on; rank r takes slice r of them. The state of the stream is the step and the salt.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import forkserver
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from panfm.config import config_class
from panfm.data.batch import Batch
from panfm.data.decode import DecodeError
from panfm.data.masking import MaskConfig, sample_mask
from panfm.data.mixture import MixtureConfig, MixturePlan, SampleStream, build_mixture
from panfm.data.selection import SampleTable, SourceFacts, concatenate_tables, derive_key, select_samples
from panfm.data.transforms import AugmentConfig, augment_views
from panfm.errors import UserError
from panfm.shards.cards import Use
from panfm.shards.index import Places, ShardReader, ShardSet, open_shard_set
from panfm.shards.schema import MODALITIES, Modality

MAX_ATTEMPTS = 16  # replacements tried at one position; more fail only where most of a source is damaged
MIN_DRAWN = 256  # draws that a share of failures is taken of at least: one bad image at the start stops nothing
START_METHOD = "forkserver"  # fork copies locks that other threads hold; spawn imports torch anew for every worker


@config_class
class ExcludeConfig:
    """What is kept out of pretraining."""

    tasks: Literal["all", "none"] | tuple[str, ...] = "all"
    """Evaluation tasks whose test groups are never drawn: all known ones, none, or a list of names."""
    audit: str | None = None
    """Folder that `panfm audit` wrote for these shards: the images it lists are never drawn either."""


@config_class
class DataConfig:
    """Where samples come from and how they are read."""

    shards: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders of built shard sets, one a source."""
    use: Use = "research"
    """What the encoder is trained for; a source whose licence or consent does not permit it stops the run."""
    exclude: ExcludeConfig = Field(default_factory=ExcludeConfig)
    """Evaluation groups that pretraining must not see."""
    modalities: Annotated[tuple[Modality, ...], Field(min_length=1)] = MODALITIES
    """Modalities that are drawn; others in the shards are left out."""
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    """Loader processes a rank; 0 decodes in the training process. The number never changes what is drawn."""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 4
    """Micro batches each worker keeps ready: enough for a step to find its own while the next are being made."""
    max_failed_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Share of drawn samples that may fail to decode (each is replaced and reported) before the run stops."""


@dataclass(frozen=True)
class LoaderState:
    """Where the stream stands: number of optimizer steps done, and the salt that a rollback changes."""

    step: int
    salt: int


@dataclass(frozen=True)
class FailedSample:
    """A sample that did not decode; another one took its position."""

    position: int
    source: str
    key: str
    shard: str
    reason: str


def build_loader(
    data: DataConfig,
    mixture: MixtureConfig,
    augment: AugmentConfig,
    *,
    mask: MaskConfig | None,
    mask_grid: tuple[int, int],
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    excluded: Mapping[str, frozenset[str]],
    excluded_keys: Mapping[str, frozenset[str]] | None = None,
) -> "Loader":
    """Open the shard sets, keep what may be drawn, and plan the stream.

    mask: None draws no masks; mask_grid is (rows, columns) of patches in a view. excluded: source -> group_ids that are
    removed before anything is drawn; excluded_keys: source -> keys of single samples that are, too. data.use: the use
    that every sample's `permitted_uses` must name.

    Raises UserError: a folder that is no whole shard set, two of one source, a use that is not permitted, batch sizes
    that do not divide, weights that do not fit, nothing left to draw.
    """
    check_batch_sizes(global_batch_size, micro_batch_size, world_size=1)
    if mixture.group_share and micro_batch_size % mixture.group_size:
        raise UserError(
            f"micro_batch_size ({micro_batch_size}) must be divisible by mixture.group_size ({mixture.group_size}), or "
            f"a group would be cut; try {_round_up(micro_batch_size, mixture.group_size)}"
        )
    shard_sets = [open_shard_set(path) for path in data.shards]
    names = [shard_set.source for shard_set in shard_sets]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"data.shards: {count} folders hold source {name}; each source may be named once")
    facts, tables = [], []
    for shard_set in shard_sets:
        groups = excluded.get(shard_set.source, frozenset())
        keys = (excluded_keys or {}).get(shard_set.source, frozenset())
        fact, table = select_samples(shard_set, data.modalities, groups, data.use, keys)
        facts.append(fact)
        tables.append(table)
    if not any(fact.num_kept for fact in facts):
        counts = "; ".join(
            f"{fact.source}: {fact.num_samples} less {fact.num_excluded + fact.num_audited} excluded, "
            f"{fact.num_filtered} filtered"
            for fact in facts
        )
        raise UserError(f"data.shards: nothing is left to draw ({counts}); widen data.modalities or data.exclude.tasks")
    table = concatenate_tables(tables)
    examples = _Examples(
        readers=tuple(shard_set.reader for shard_set in shard_sets),
        places=tuple(shard_set.places for shard_set in shard_sets),
        table=table,
        plan=build_mixture(mixture, table),
        augment=augment,
        mask=mask,
        mask_grid=mask_grid,
        seed=seed,
    )
    return Loader(data, shard_sets, tuple(facts), examples, global_batch_size, micro_batch_size)


class Loader:
    """Batches of a run: `iterate` them from any state. A context manager; `close` ends the workers."""

    def __init__(
        self,
        data: DataConfig,
        shard_sets: Sequence[ShardSet],
        sources: tuple[SourceFacts, ...],
        examples: "_Examples",
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        self.sources = sources
        self.num_samples = sum(fact.num_kept for fact in sources)
        self.failures: list[FailedSample] = []  # of this rank, in the order of the stream
        self.num_drawn = 0  # examples that this rank has delivered
        self._data = data
        self._shard_sets = shard_sets
        self._examples = examples
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._running: list[Generator[tuple[Batch, ...], None, None]] = []
        if data.workers:
            # The server imports this module once, while the caller builds its model; workers are forked from it.
            multiprocessing.get_context(START_METHOD).set_forkserver_preload([__name__])
            forkserver.ensure_running()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers of every iteration."""
        for batches in self._running:
            batches.close()
        self._running.clear()

    def iterate(self, state: LoaderState, *, rank: int, world_size: int) -> Iterator[tuple[Batch, ...]]:
        """Yield this rank's micro batches, a tuple for each optimizer step from `state.step` on, without end.

        Raises UserError: a global batch that does not divide over the ranks; while iterating, a shard that is cut
        short, or more failed samples than data.max_failed_share.
        """
        check_batch_sizes(self._global_batch_size, self._micro_batch_size, world_size)
        batches = self._generate(state, rank, world_size)
        self._running.append(batches)
        return batches

    def _generate(self, state: LoaderState, rank: int, world_size: int) -> Generator[tuple[Batch, ...], None, None]:
        tasks = _Tasks(state.step, rank, world_size, self._global_batch_size, self._micro_batch_size)
        workers = self._data.workers
        items = iter(
            DataLoader(
                replace(self._examples, salt=state.salt),
                batch_size=None,
                sampler=tasks,
                num_workers=workers,
                collate_fn=_keep,
                prefetch_factor=self._data.prefetch if workers else None,
                multiprocessing_context=START_METHOD if workers else None,
                worker_init_fn=_start_worker,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # or DataLoader would draw from the global one, which the model uses
            )
        )
        try:
            while True:
                yield tuple(self._receive(next(items)) for _ in range(tasks.num_micro_batches))
        finally:
            del items  # the last reference: DataLoader ends its workers

    def _receive(self, item: "_Item") -> Batch:
        if item.error is not None:
            raise UserError(item.error)
        self.num_drawn += self._micro_batch_size
        table = self._examples.table
        for failure in item.failures:
            shard_set = self._shard_sets[table.source[failure.sample]]
            row = int(table.row[failure.sample])
            self.failures.append(
                FailedSample(
                    position=failure.position,
                    source=shard_set.source,
                    key=shard_set.table["key"][row].as_py(),
                    shard=shard_set.table["shard"][row].as_py(),
                    reason=failure.reason,
                )
            )
        allowed = self._data.max_failed_share * max(self.num_drawn, MIN_DRAWN)
        if item.batch is None or len(self.failures) > allowed:
            raise UserError(self._describe_failures())
        return item.batch

    def _describe_failures(self) -> str:
        (source, shard), count = Counter((failed.source, failed.shard) for failed in self.failures).most_common(1)[0]
        path = next(fact.path for fact in self.sources if fact.source == source)
        reasons = ", ".join(
            f"{number} {reason}" for reason, number in Counter(failed.reason for failed in self.failures).most_common()
        )
        return (
            f"{path}/{shard}: {count} of the {len(self.failures)} failed samples ({reasons}; {self.num_drawn} drawn) "
            f"lie in this shard, and more failed than data.max_failed_share ({self._data.max_failed_share}) allows; "
            "build this source again, or raise the share"
        )


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise UserError unless every rank gets the same number of whole micro batches."""
    for name, value in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    if global_batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"global_batch_size ({global_batch_size}) must be divisible by micro_batch_size ({micro_batch_size}) x "
            f"world_size ({world_size}); try {_round_up(global_batch_size, micro_batch_size * world_size)}"
        )


@dataclass(frozen=True)
class _Tasks:
    """The sampler of torch's DataLoader: one range of positions a micro batch, without end."""

    first_step: int
    rank: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __iter__(self) -> Iterator[range]:
        step = self.first_step
        while True:
            start = step * self.global_batch_size + self.rank * (self.global_batch_size // self.world_size)
            for number in range(self.num_micro_batches):
                first = start + number * self.micro_batch_size
                yield range(first, first + self.micro_batch_size)
            step += 1


@dataclass(frozen=True)
class _Failure:
    position: int
    sample: int  # in the SampleTable
    reason: str


@dataclass(frozen=True)
class _Item:
    """What a worker sends: a batch and its failures; no batch where no replacement decoded; or a user's error."""

    batch: Batch | None
    failures: tuple[_Failure, ...] = ()
    error: str | None = None  # raised in the main process, where it stays one line

    def pin_memory(self) -> "_Item":
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class _Examples(Dataset):
    """The dataset of torch's DataLoader: a range of positions -> _Item. Small arrays only, so that it pickles fast."""

    readers: tuple[ShardReader, ...]
    places: tuple[Places, ...]
    table: SampleTable
    plan: MixturePlan
    augment: AugmentConfig
    mask: MaskConfig | None
    mask_grid: tuple[int, int]
    seed: int
    salt: int = 0

    def __getitem__(self, positions: range) -> _Item:
        size, num_views = self.augment.image_size, self.augment.views
        views = torch.empty((num_views, len(positions), 3, size, size), dtype=torch.uint8)
        pixels = views.numpy()
        samples = self._stream.compute_samples(positions)
        failures: list[_Failure] = []
        for number, position in enumerate(positions):
            for attempt in range(MAX_ATTEMPTS):
                sample = int(samples[number])
                try:
                    pixels[:, number] = self._make_views(position, sample)
                    break
                except DecodeError as error:
                    failures.append(_Failure(position, sample, str(error)))
                    samples[number] = self._stream.compute_replacement(position, attempt)
                except UserError as error:
                    return _Item(None, tuple(failures), str(error))
            else:
                return _Item(None, tuple(failures))
        table = self.table
        batch = Batch(
            views=tuple(views),
            masks=None if self.mask is None else torch.from_numpy(self._make_masks(self.mask, positions)),
            positions=torch.arange(positions.start, positions.stop),
            modalities=torch.from_numpy(table.modality[samples].astype(np.int64)),
            sources=torch.from_numpy(table.source[samples].astype(np.int64)),
            lesions=torch.from_numpy(table.lesion[samples]),
            patients=torch.from_numpy(table.patient[samples]),
            visits=torch.from_numpy(table.visit[samples]),
        )
        return _Item(batch, tuple(failures))

    @cached_property
    def _stream(self) -> SampleStream:
        return SampleStream(self.plan, self.seed, self.salt)

    def _make_views(self, position: int, sample: int) -> list[NDArray[np.uint8]]:
        source, row = int(self.table.source[sample]), int(self.table.row[sample])
        places = self.places[source]
        shard = places.shard_names[places.shard[row]]
        data = self.readers[source].read(shard, int(places.offset[row]), int(places.length[row]))
        rngs = [self._make_rng("view", position, view) for view in range(self.augment.views)]
        return augment_views(data, MODALITIES[self.table.modality[sample]], rngs, self.augment)

    def _make_masks(self, mask: MaskConfig, positions: range) -> NDArray[np.bool_]:
        return np.stack(
            [
                [sample_mask(mask, self.mask_grid, self._make_rng("mask", position, view)) for position in positions]
                for view in range(self.augment.views)
            ]
        )

    def _make_rng(self, purpose: str, position: int, view: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(derive_key(self.seed, self.salt, purpose, position, view)))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _keep(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    # A worker's parent is the fork server, which outlives a trainer that is killed: torch's own watch never fires.
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=_end_with, args=(trainer.sentinel,), daemon=True).start()
    # Ctrl-C reaches the whole process group; the training process decides when its workers end.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with(sentinel: int) -> None:
    """End this process when the process behind `sentinel` has ended, however it did."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
