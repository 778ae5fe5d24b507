"""Loader: shard sets -> an endless stream of batches that resumes to the sample.

    shard sets --(selection)--> SampleTable --(mixture)--> MixturePlan --(columns)--> one mapped file
    LoaderState, rank, world size  ->  tasks: positions of a micro batch  ->  workers (examples)  ->  Batches

Step s draws the positions from s * global_batch_size on; rank r takes slice r of them. What a position holds follows
from (seed, salts, index, mixture, position): the number of workers, of ranks, or where a run was interrupted cannot
change a bit of it. The state of the stream is the step, and the salts that rollbacks brought.
"""

import multiprocessing
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from types import TracebackType
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch.utils.data import DataLoader

from panfm.config import config_class
from panfm.data import examples as examples_module
from panfm.data.batch import Batch
from panfm.data.captions import TokenizerConfig
from panfm.data.columns import MappedColumns, map_columns
from panfm.data.examples import MAX_ATTEMPTS, Examples, Failure, Item, Tasks, keep, start_worker
from panfm.data.failures import FailedSample, FailureLog, check_failed_share, describe_worst
from panfm.data.masking import MaskConfig
from panfm.data.mixture import MixtureConfig, Unit, build_mixture
from panfm.data.selection import COLUMNS, SourceFacts, build_table, select_samples
from panfm.data.stream import DrawCounter
from panfm.data.transforms import AugmentConfig
from panfm.errors import UserError
from panfm.shards.cards import Use
from panfm.shards.index import open_shard_set
from panfm.shards.schema import MODALITIES, Modality

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
    """Folders (or URLs) of built shard sets, one a source."""
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
    """Share of drawn samples, over all ranks and the whole run, that may fail to decode before the run stops. Each is
    replaced, and listed in the run folder (failed_samples-<rank>.jsonl)."""


@dataclass(frozen=True)
class LoaderState:
    """Where the stream stands: steps done, and the salts with the first step that each rules, ascending from 0."""

    step: int
    salts: tuple[tuple[int, int], ...] = ((0, 0),)

    def __post_init__(self) -> None:
        firsts = [first for first, _ in self.salts]
        assert firsts[:1] == [0] and firsts == sorted(set(firsts)), self.salts

    def roll_back(self, step: int, salt: int) -> "LoaderState":
        """Go back to `step` and draw on from there by another salt: one that this run has not used."""
        assert 0 <= step <= self.step, (step, self.step)
        return LoaderState(step, (*(ruled for ruled in self.salts if ruled[0] < step), (step, salt)))


@dataclass(frozen=True)
class DrawnSample:
    """What stands at a position of the stream; `row` is its row in the source's shard set."""

    position: int
    source: str
    row: int
    modality: Modality


@dataclass(frozen=True)
class Drawn:
    """What `Loader.draw` returns: a batch, the sample behind each of its examples, and what failed to decode."""

    batch: Batch
    samples: tuple[DrawnSample, ...]
    failures: tuple[FailedSample, ...]


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
    tokenizer: TokenizerConfig | None = None,
) -> "Loader":
    """Open the shard sets, keep what may be drawn, and plan the stream.

    mask: None draws no masks; mask_grid is (rows, columns) of patches in a view. excluded: source -> group_ids that are
    removed before anything is drawn; excluded_keys: source -> keys of single samples that are, too. data.use: the use
    that every sample's `permitted_uses` must name. tokenizer: None reads no captions.

    Raises UserError: a folder that is no whole shard set, two of one source, a use that is not permitted, batch sizes
    that do not divide, weights that do not fit, nothing left to draw, no captions, no room for the index in
    the temporary folder.
    """
    check_batch_sizes(global_batch_size, micro_batch_size, world_size=1)
    if mixture.group_share and micro_batch_size % mixture.group_size:
        raise UserError(
            f"micro_batch_size ({micro_batch_size}) must be divisible by mixture.group_size ({mixture.group_size}), or "
            f"a group would be cut; try {_round_up(micro_batch_size, mixture.group_size)}"
        )
    facts: list[SourceFacts] = []
    selections = []
    for path in data.shards:
        shard_set = open_shard_set(path, COLUMNS)
        source = shard_set.source
        if twin := [fact.path for fact in facts if fact.source == source]:
            raise UserError(
                f"data.shards: {twin[0]} and {path} both hold source {source}; each source may be named once"
            )
        groups, keys = excluded.get(source, frozenset()), (excluded_keys or {}).get(source, frozenset())
        fact, selection = select_samples(
            shard_set, data.modalities, groups, data.use, keys, with_captions=tokenizer is not None
        )
        facts.append(fact)
        selections.append(selection)
        del shard_set  # its table, the largest thing in this process
    if not any(fact.num_kept for fact in facts):
        counts = "; ".join(
            f"{fact.source}: {fact.num_samples} less {fact.num_excluded + fact.num_audited} excluded, "
            f"{fact.num_filtered} filtered"
            for fact in facts
        )
        raise UserError(f"data.shards: nothing is left to draw ({counts}); widen data.modalities or data.exclude.tasks")
    readers, table = tuple(selection.reader for selection in selections), build_table(selections)
    del selections
    plan = build_mixture(mixture, table)
    if tokenizer is not None and (table.columns["captions"]["offset"] < 0).all():
        raise UserError(
            f"data.shards: none of the {len(table.records)} samples that may be drawn has a caption, and image_text "
            "learns from nothing else; add a source whose card has a caption column, or take the objective out"
        )
    columns = map_columns({**table.columns, **plan.columns})
    examples = Examples(
        readers=readers,
        table=replace(table, columns=columns),
        plan=plan.with_columns(columns),
        augment=augment,
        mask=mask,
        mask_grid=mask_grid,
        seed=seed,
        tokenizer=tokenizer,
    )
    del table, plan
    return Loader(data, tuple(facts), examples, columns, global_batch_size, micro_batch_size)


class Loader:
    """Batches of a run: `iterate` them from any state. A context manager; `close` ends the workers."""

    def __init__(
        self,
        data: DataConfig,
        sources: tuple[SourceFacts, ...],
        examples: Examples,
        columns: MappedColumns,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        self.sources = sources
        self.num_samples = sum(fact.num_kept for fact in sources)
        self._data = data
        self._examples = examples
        self._columns = columns
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._running: list[Generator[tuple[Batch, ...], None, None]] = []
        self._counter: tuple[tuple[tuple[int, int], ...], DrawCounter] | None = None
        if data.workers:
            # The server imports this module once, while the caller builds its model; workers are forked from it.
            preload = [examples_module.__name__, *(["open_clip"] if examples.tokenizer is not None else [])]
            multiprocessing.get_context(START_METHOD).set_forkserver_preload(preload)
            forkserver.ensure_running()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers of every iteration; another may begin afterwards."""
        for batches in self._running:
            batches.close()
        self._running.clear()
        self._columns.unlink()

    @property
    def units(self) -> tuple[Unit, ...]:
        """What the mixture is made of: one modality of one source each, with its asked share."""
        return self._examples.plan.units

    def iterate(
        self, state: LoaderState, *, rank: int, world_size: int, failed: FailureLog | None = None
    ) -> Iterator[tuple[Batch, ...]]:
        """Yield this rank's micro batches, a tuple for each optimizer step from `state.step` on, without end.

        failed: where samples that do not decode are listed. Whether they are too many is for `check_failures` to say,
        which knows of all ranks. Raises UserError: a global batch that does not divide over the ranks; while iterating,
        a shard that is cut short, or a position for which no sample can be decoded.
        """
        check_batch_sizes(self._global_batch_size, self._micro_batch_size, world_size)
        self._columns.unlink()  # every rank of this machine has built its loader by now, and has the file open
        pa.default_memory_pool().release_unused()  # of the tables that were selected from
        batches = self._generate(state, rank, world_size, failed or FailureLog())
        self._running.append(batches)
        return batches

    def check_failures(self, failed: FailureLog, num_failed: int, num_drawn: int) -> None:
        """Raise UserError where the samples that failed, over all ranks and the whole run, are more than may."""
        check_failed_share(num_failed, num_drawn, self._data.max_failed_share, failed, self._paths)

    def draw(self, positions: range, state: LoaderState | None = None) -> Drawn:
        """Draw positions of the stream in this process: bit for bit what an iteration by `state` holds there.

        Only the salts of `state` matter; by default a run that was never rolled back. Raises UserError as an iteration
        does.
        """
        item = self._salt(state)[positions]
        failures = tuple(self._describe(failure) for failure in item.failures)
        batch = self._take_batch(item, failures)
        table = self._examples.table
        samples = tuple(
            DrawnSample(
                position=position,
                source=table.sources[record["source"]],
                row=int(record["row"]),
                modality=MODALITIES[record["modality"]],
            )
            for position, record in zip(positions, table.records[list(item.samples)], strict=True)
        )
        return Drawn(batch, samples, failures)

    def make_view_rngs(self, position: int, state: LoaderState | None = None) -> list[np.random.Generator]:
        """The fresh generators, one a view, that `augment_views` gets for the sample at `position`."""
        return self._salt(state).make_view_rngs(position)

    def count_drawn(self, state: LoaderState) -> Mapping[str, int]:
        """Images drawn of each unit before `state`, by all ranks: unit name -> number.

        Computed from the layout, not communicated; replacements count for the unit whose sample they replaced.
        """
        if self._counter is None or self._counter[0] != state.salts:
            self._counter = state.salts, DrawCounter(self._salt(state).stream)
        return self._counter[1].count(state.step * self._global_batch_size)

    def describe_drawn(self, state: LoaderState) -> list[str]:
        """Say in a line for each unit what was drawn of it before `state`, beside what was asked."""
        drawn = self.count_drawn(state)
        total = max(sum(drawn.values()), 1)
        return [
            f"drawn from {unit.section.name}: {number:,} images, {number / total:.2%} of all "
            f"(asked: {unit.share:.2%}), {number / unit.section.size:.2f} times its {unit.section.size:,}"
            for unit, number in zip(self.units, drawn.values(), strict=True)
        ]

    def _salt(self, state: LoaderState | None) -> Examples:
        if state is None:
            return self._examples
        salts = tuple((step * self._global_batch_size, salt) for step, salt in state.salts)
        return self._examples if salts == self._examples.salts else replace(self._examples, salts=salts)

    def _generate(
        self, state: LoaderState, rank: int, world_size: int, failed: FailureLog
    ) -> Generator[tuple[Batch, ...], None, None]:
        tasks = Tasks(state.step, rank, world_size, self._global_batch_size, self._micro_batch_size)
        workers = self._data.workers
        items = iter(
            DataLoader(
                self._salt(state),
                batch_size=None,
                sampler=tasks,
                num_workers=workers,
                collate_fn=keep,
                prefetch_factor=self._data.prefetch if workers else None,
                multiprocessing_context=START_METHOD if workers else None,
                worker_init_fn=start_worker,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # or DataLoader would draw from the global one, which the model uses
            )
        )
        try:
            while True:
                yield tuple(self._receive(next(items), failed) for _ in range(tasks.num_micro_batches))
        finally:
            del items  # the last reference: DataLoader ends its workers

    def _receive(self, item: Item, failed: FailureLog) -> Batch:
        failures = tuple(self._describe(failure) for failure in item.failures)
        failed.add(failures)
        return self._take_batch(item, failures)

    def _take_batch(self, item: Item, failures: Sequence[FailedSample]) -> Batch:
        if item.error is not None:
            raise UserError(item.error)
        if item.batch is None:
            raise UserError(
                f"{describe_worst(failures, self._paths)}, and {MAX_ATTEMPTS} that were drawn in the place of one did "
                "not decode either; build this source again, or take it out of data.shards"
            )
        return item.batch

    def _describe(self, failure: Failure) -> FailedSample:
        table = self._examples.table
        return FailedSample(
            position=failure.position,
            source=table.sources[table.records[failure.sample]["source"]],
            key=table.get_key(failure.sample),
            shard=table.get_shard(failure.sample),
            reason=failure.reason,
        )

    @property
    def _paths(self) -> dict[str, str]:
        return {fact.source: fact.path for fact in self.sources}


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


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
