"""What a run starts from: an encoder at an address, or a published checkpoint file.

    encoder.init ("timm:NAME", "panfm:DIR", "hf:DIR", or FILE)  ->  read_initial  ->  InitialWeights
    InitialWeights, encoder  ->  start_from  ->  the encoder holds them, InitReport

In a checkpoint file nothing can execute: safetensors, or a pickle that is read as tensors only.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from panfm.encoder.address import SUPPORTED, Scheme
from panfm.encoder.facts import EncoderFacts
from panfm.encoder.load import load_encoder
from panfm.encoder.weights import read_checkpoint
from panfm.errors import UserError
from panfm.models.vit import Vit
from panfm.models.weights import InitReport, fit_weights


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from, under their publisher's names."""

    source: str  # as the config names it
    weights: dict[str, Tensor]
    grid: tuple[int, int] | None  # of their position embedding; None: square
    facts: EncoderFacts | None  # of a panfm export


def read_initial(init: str) -> InitialWeights:
    """Read what `encoder.init` names; UserError for what is neither an address nor a readable checkpoint."""
    scheme, colon, _ = init.partition(":")
    if colon and scheme in get_args(Scheme):
        encoder = load_encoder(init)
        model: Any = encoder.module.model
        grid = tuple(model.patch_embed.grid_size) if encoder.module.is_token_model else None
        return InitialWeights(init, model.state_dict(), grid, encoder.facts)
    path = Path(init).expanduser()
    if not path.is_file():
        raise UserError(
            f"encoder.init {init!r}: no such file, and no encoder address; give a checkpoint file (.safetensors, .pth) "
            f"or an address; {SUPPORTED}"
        )
    return InitialWeights(init, read_checkpoint(path), None, None)


def start_from(vit: Vit, initial: InitialWeights, random: Collection[str]) -> InitReport:
    """Put the weights into the encoder (`panfm.models.weights.fit_weights`), all but those named in `random`."""
    source = f"encoder.init {initial.source}"
    return fit_weights(vit, initial.weights, source, random=random, grid=initial.grid)
