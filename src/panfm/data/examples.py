"""Examples: what a loader worker does with a range of positions, one micro batch a time.

    positions --(stream)--> samples --(in the order of the disk)--> bytes --> views, masks --> Batch --> Item

All that happens to a position follows from (seed, the salt that rules there, position): which process does it, after
how many interruptions, cannot change a bit of it.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from panfm.data.batch import Batch
from panfm.data.captions import TokenizerConfig, number_texts, tokenise
from panfm.data.decode import DecodeError
from panfm.data.hashing import Indices, derive_key
from panfm.data.masking import MaskConfig, sample_mask
from panfm.data.mixture import MixturePlan
from panfm.data.selection import SampleTable
from panfm.data.stream import SampleStream
from panfm.data.transforms import AugmentConfig, augment_views
from panfm.data.walk import Salts, find_salt
from panfm.errors import UserError
from panfm.shards.index import ShardReader
from panfm.shards.schema import MODALITIES

MAX_ATTEMPTS = 16  # replacements tried at one position; more fail only where most of a source is damaged


@dataclass(frozen=True)
class Failure:
    """A sample that did not decode, and the position at which it was drawn."""

    position: int
    sample: int  # in the SampleTable
    reason: str


@dataclass(frozen=True)
class Item:
    """What a worker sends: a batch and its failures; no batch where no replacement decoded; or a user's error."""

    batch: Batch | None
    failures: tuple[Failure, ...] = ()
    samples: tuple[int, ...] = ()  # behind each example, in the SampleTable
    error: str | None = None  # raised in the main process, where it stays one line

    def pin_memory(self) -> "Item":
        """Pin the batch (DataLoader calls this when pin_memory is on)."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Tasks:
    """The sampler of torch's DataLoader: one range of positions a micro batch, without end."""

    first_step: int
    rank: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int

    @property
    def num_micro_batches(self) -> int:
        """Micro batches of this rank in a step; the same on every rank."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __iter__(self) -> Iterator[range]:
        """Yield the positions of each micro batch: rank r takes slice r of every global batch."""
        step = self.first_step
        while True:
            start = step * self.global_batch_size + self.rank * (self.global_batch_size // self.world_size)
            for number in range(self.num_micro_batches):
                first = start + number * self.micro_batch_size
                yield range(first, first + self.micro_batch_size)
            step += 1


@dataclass(frozen=True)
class Examples(Dataset):
    """The dataset of torch's DataLoader: a range of positions -> Item.

    Nothing in it is as long as the data set but the columns, which are mapped: it pickles small and fast.
    """

    readers: tuple[ShardReader, ...]  # by source
    table: SampleTable
    plan: MixturePlan
    augment: AugmentConfig
    mask: MaskConfig | None
    mask_grid: tuple[int, int]
    seed: int
    salts: Salts = ((0, 0),)  # (first position, salt)
    tokenizer: TokenizerConfig | None = None  # None: captions are not read

    def __getitem__(self, positions: range) -> Item:
        """Draw, read, decode and augment; a sample that fails is replaced, and reported."""
        samples = self.stream.compute_samples(positions)
        views = _allocate_views(self.augment, len(positions))
        pixels = [view.numpy() for view in views]
        failures: list[Failure] = []
        captions: list[str | None] = [None] * len(positions)
        order = self._sort_by_disk(samples)
        try:
            for place in order:  # all are asked for before one is waited for
                reader, where = self._find(int(samples[place]))
                reader.prefetch(*where)
        except UserError as error:
            return Item(None, error=str(error))
        for place in order:
            position = positions[place]
            for attempt in range(MAX_ATTEMPTS):
                try:
                    drawn = self._make_views(position, int(samples[place]))
                    if self.tokenizer is not None:
                        captions[place] = self._read_caption(int(samples[place]))
                    break
                except DecodeError as error:
                    failures.append(Failure(position, int(samples[place]), str(error)))
                    samples[place] = self.stream.compute_replacement(position, attempt)
                except UserError as error:
                    return Item(None, _sort(failures), error=str(error))
            else:
                return Item(None, _sort(failures))
            for view, image in zip(pixels, drawn, strict=True):
                view[place] = image
        records = self.table.records[samples]
        texts = None if self.tokenizer is None else tokenise(captions, self.tokenizer)
        batch = Batch(
            views=views,
            masks=None if self.mask is None else torch.from_numpy(self._make_masks(self.mask, positions)),
            positions=torch.arange(positions.start, positions.stop),
            **{
                name: torch.from_numpy(records[column].astype(np.int64))
                for name, column in (
                    ("modalities", "modality"),
                    ("sources", "source"),
                    ("lesions", "lesion"),
                    ("patients", "patient"),
                    ("visits", "visit"),
                )
            },
            captions=None if texts is None else number_texts(texts),
            texts=texts,
        )
        return Item(batch, _sort(failures), tuple(samples.tolist()))

    @cached_property
    def stream(self) -> SampleStream:
        """The stream of samples; each process has its own."""
        return SampleStream(self.plan, self.seed, self.salts)

    def make_view_rngs(self, position: int) -> list[np.random.Generator]:
        """Fresh generators for the views of the sample at `position`, one a view."""
        return [self._make_rng("view", position, view) for view in range(self.augment.num_views)]

    def _sort_by_disk(self, samples: Indices) -> list[int]:
        """The places of `samples` in the order of their bytes: a disk that turns reads forward."""
        records = self.table.records[samples]
        return np.lexsort((records["offset"], records["shard"], records["source"])).tolist()  # type: ignore[no-any-return]

    def _make_views(self, position: int, sample: int) -> Sequence[NDArray[np.uint8]]:
        reader, where = self._find(sample)
        modality = MODALITIES[self.table.records[sample]["modality"]]
        return augment_views(reader.read(*where), modality, self.make_view_rngs(position), self.augment)

    def _find(self, sample: int) -> tuple[ShardReader, tuple[str, int, int]]:
        """The reader of a sample's source; and its shard, offset and length."""
        record = self.table.records[sample]
        where = self.table.get_shard(sample), int(record["offset"]), int(record["length"])
        return self.readers[int(record["source"])], where

    def _read_caption(self, sample: int) -> str | None:
        """The caption of a sample, None where it has none: one read more, shortly behind the image's bytes."""
        caption = self.table.columns["captions"][sample]
        if caption["offset"] < 0:
            return None
        reader = self.readers[self.table.records[sample]["source"]]
        data: bytes = reader.read(self.table.get_shard(sample), int(caption["offset"]), int(caption["length"]))
        return data.decode(errors="replace")

    def _make_masks(self, mask: MaskConfig, positions: range) -> NDArray[np.bool_]:
        return np.stack(
            [
                [sample_mask(mask, self.mask_grid, self._make_rng("mask", position, view)) for position in positions]
                for view in range(self.augment.views)
            ]
        )

    def _make_rng(self, purpose: str, position: int, view: int) -> np.random.Generator:
        key = derive_key(self.seed, find_salt(self.salts, position), purpose, position, view)
        return np.random.Generator(np.random.PCG64(key))


def _allocate_views(augment: AugmentConfig, num_examples: int) -> tuple[Tensor, ...]:
    """One uint8 tensor [B, 3, H, W] a view; views of one size share their memory, so that one piece crosses over."""
    views: list[Tensor] = []
    for count, size in ((augment.views, augment.image_size), (augment.local_views, augment.local_size)):
        if count:
            views += torch.empty((count, num_examples, 3, size, size), dtype=torch.uint8)
    return tuple(views)


def _sort(failures: list[Failure]) -> tuple[Failure, ...]:
    return tuple(sorted(failures, key=lambda failure: failure.position))


def keep(item: Any) -> Any:
    """Collate nothing: a worker's item is a batch already."""
    return item


def start_worker(number: int) -> None:
    """Bind a worker's life to the trainer's.

    Its parent is the fork server, which outlives a trainer that is killed: torch's own watch never fires.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=_end_with, args=(trainer.sentinel,), daemon=True).start()
    # Ctrl-C reaches the whole process group, and so does what torchrun and schedulers send to stop a run: the training
    # process decides when its workers end, and needs them until its step is done.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        with suppress(ValueError):
            signal.signal(name, signal.SIG_IGN)


def _end_with(sentinel: int) -> None:
    """End this process when the process behind `sentinel` has ended, however it did."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
