"""The one loop that all features come through: decode in threads, forward in batches.

In: an encoder, a function per image that returns its bytes, and a name per image for errors. Out: float32 arrays
[b, ...], in order. Decoding (libjpeg, resizing) leaves the interpreter free, so threads overlap it with the forward
pass.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.data.decode import DecodeError
from panfm.errors import UserError

if TYPE_CHECKING:
    from panfm.encoder.load import Encoder

LOOKAHEAD = 3  # decoded batches that may wait: enough to keep the forward pass busy, and a bound on memory


def iterate_features(
    encoder: "Encoder",
    readers: Sequence[Callable[[], bytes]],
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

    def decode(start: int) -> torch.Tensor:
        stop = min(start + batch_size, len(readers))
        return torch.from_numpy(np.stack([_decode(encoder, readers[i], names[i]) for i in range(start, stop)]))

    for start, images in _run_ahead(decode, range(0, len(readers), batch_size), workers):
        features = (forward or encoder.forward)(images).float().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(features.reshape(len(features), -1)).all(axis=1))
        if len(bad):
            raise UserError(
                f"{names[start + int(bad[0])]}: {encoder.name} gives a feature that is not finite; try dtype=fp32"
            )
        yield features


def _decode(encoder: "Encoder", read: Callable[[], bytes], name: str) -> NDArray[np.uint8]:
    try:
        return encoder.transform.apply(read())
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None
    except DecodeError as error:
        raise UserError(f"{name}: does not decode ({error}); restore the file, or leave it out") from None


def _run_ahead(
    decode: Callable[[int], torch.Tensor], starts: Sequence[int], workers: int
) -> Iterator[tuple[int, torch.Tensor]]:
    if workers <= 0:
        for start in starts:
            yield start, decode(start)
        return
    waiting: deque[tuple[int, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for start in starts:
                waiting.append((start, pool.submit(decode, start)))
                if len(waiting) > LOOKAHEAD:
                    ready, future = waiting.popleft()
                    yield ready, future.result()
            while waiting:
                ready, future = waiting.popleft()
                yield ready, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an error must not wait for images that nobody wants
