"""Captions: the text beside an image, as the token ids that a text tower reads.

    "<key>.txt" of each sample  ->  tokenise, in a loader worker  ->  int64 [B, L], a row of zeros where there is none
                                ->  number_texts                  ->  int64 [B], the same for the same text

The tokenizer is CLIP's byte-pair encoding; its file ships with open_clip (the extra `text`), nothing is downloaded.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from panfm.data.batch import NO_GROUP
from panfm.errors import UserError


@dataclass(frozen=True)
class TokenizerConfig:
    """How captions become token ids."""

    context_length: int = 77
    """Longest text in tokens, with its start and its end; of a longer one the rest is cut off."""


def tokenise(captions: Sequence[str | None], config: TokenizerConfig) -> Tensor:
    """Token ids int64 [B, L] of B captions, L being the length of the longest; a row of zeros for None or a blank one.

    Every other row is: start (49406), text, end (49407, the largest id), zeros. Lower-cased; broken Unicode is mended.
    """
    numbers = [number for number, caption in enumerate(captions) if caption is not None and caption.strip()]
    if not numbers:
        return torch.zeros(len(captions), 1, dtype=torch.int64)
    rows: Tensor = load_tokenizer()([captions[number] for number in numbers], config.context_length)
    length = int(rows.argmax(dim=1).max()) + 1
    texts = torch.zeros(len(captions), length, dtype=torch.int64)
    texts[numbers] = rows[:, :length]
    return texts


def number_texts(texts: Tensor) -> Tensor:
    """A 63-bit number of each row of token ids [B, L], the same for the same ids however padded; NO_GROUP for zeros."""
    lengths = (texts.argmax(dim=1) + 1).tolist()  # the end has the largest id
    rows = [row[:length].tobytes() for row, length in zip(texts.numpy(), lengths, strict=True)]
    digests = [hashlib.blake2b(row, digest_size=8).digest() for row in rows]
    numbers = torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)
    return numbers.masked_fill(texts[:, 0] == 0, NO_GROUP)


@cache
def load_tokenizer() -> Any:
    """CLIP's tokenizer, read once a process; a missing open_clip is a UserError that says what to install."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise UserError('captions need open_clip, which is not installed; run pip install "panfm[text]"') from None
    return SimpleTokenizer()
