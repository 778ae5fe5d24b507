"""The one loop that all features come through: decode in threads, forward in batches.

In: an encoder and a function per image that returns its bytes. Out: float32 arrays [b, ...], in order. Decoding
(libjpeg, resizing) leaves the interpreter free, so threads overlap it with the forward pass.

    iterate_features    an image that cannot be read ends it, by name
    iterate_readable    such an image is left out of its batch and comes back with the reason
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.data.decode import DecodeError
from panfm.errors import UserError

if TYPE_CHECKING:
    from panfm.encoder.load import Encoder

LOOKAHEAD = 2  # decoded batches that may wait besides those in work: keeps the forward pass busy, and bounds memory

Read = Callable[[], bytes]


@dataclass(frozen=True)
class ReadableBatch:
    """The features of the images of a batch that can be read. numbers [b]: which they are; faults: number -> reason."""

    numbers: list[int]
    features: NDArray[np.float32]  # [b, D]
    faults: dict[int, str]


@dataclass(frozen=True)
class _Decoded:
    numbers: list[int]
    images: torch.Tensor | None  # uint8 [b, 3, S, S]; None where none can be read
    faults: dict[int, str]


def iterate_features(
    encoder: "Encoder",
    readers: Sequence[Read],
    names: Sequence[str],
    batch_size: int = 64,
    workers: int = 1,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Yield the features of consecutive batches, float32 [b, D].

    forward: what is computed of images uint8 [b, 3, S, S]; None: the encoder's feature.
    workers: threads that decode ahead; 0 decodes between the forward passes.

    Raises UserError that names the image: unreadable, undecodable, or with a feature that is not finite.
    """
    batches = [range(start, min(start + batch_size, len(readers))) for start in range(0, len(readers), batch_size)]
    for decoded in _run_ahead(lambda numbers: _decode_batch(encoder, readers, numbers), batches, workers):
        for number, reason in decoded.faults.items():
            raise UserError(f"{names[number]}: {reason}; restore the file, or leave it out")
        assert decoded.images is not None, "a batch without faults has images"
        yield _compute(encoder, decoded.images, [names[number] for number in decoded.numbers], forward)


def iterate_readable(
    encoder: "Encoder", readers: Sequence[Read], names: Sequence[str], batches: Sequence[Sequence[int]], workers: int
) -> Iterator[ReadableBatch]:
    """Yield the features of `batches`, lists of numbers into `readers`; an image that cannot be read is left out.

    Raises UserError that names the image where a feature is not finite: that is the encoder's fault, not the image's.
    """
    for decoded in _run_ahead(lambda numbers: _decode_batch(encoder, readers, numbers), batches, workers):
        features = np.empty((0, encoder.embed_dim), np.float32)
        if decoded.images is not None:
            features = _compute(encoder, decoded.images, [names[number] for number in decoded.numbers], None)
        yield ReadableBatch(decoded.numbers, features, decoded.faults)


def _compute(
    encoder: "Encoder",
    images: torch.Tensor,
    names: Sequence[str],
    forward: Callable[[torch.Tensor], torch.Tensor] | None,
) -> NDArray[np.float32]:
    features: NDArray[np.float32] = (forward or encoder.forward)(images).float().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(features.reshape(len(features), -1)).all(axis=1))
    if len(bad):
        raise UserError(f"{names[int(bad[0])]}: {encoder.name} gives a feature that is not finite; try dtype=fp32")
    return features


def _decode_batch(encoder: "Encoder", readers: Sequence[Read], numbers: Sequence[int]) -> _Decoded:
    readable, images, faults = [], [], {}
    for number in numbers:
        try:
            images.append(encoder.transform.apply(readers[number]()))
            readable.append(number)
        except OSError as error:
            faults[number] = f"cannot be read ({error.strerror or error})"
        except DecodeError as error:
            faults[number] = f"does not decode ({error})"
    return _Decoded(readable, torch.from_numpy(np.stack(images)) if images else None, faults)


def _run_ahead(
    decode: Callable[[Sequence[int]], _Decoded], batches: Sequence[Sequence[int]], workers: int
) -> Iterator[_Decoded]:
    """Yield the decoded batches in order; `workers` threads are some batches ahead of who takes them."""
    if workers <= 0:
        yield from map(decode, batches)
        return
    waiting: deque[Future[_Decoded]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for numbers in batches:
                waiting.append(pool.submit(decode, numbers))
                if len(waiting) > workers + LOOKAHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an error must not wait for images that nobody wants
