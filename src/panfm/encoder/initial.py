"""What a run starts from: an encoder at an address, or a published checkpoint file.

    encoder.init ("timm:NAME", "panfm:DIR", "hf:DIR", or FILE)  ->  read_initial  ->  InitialWeights
    InitialWeights, encoder  ->  start_from  ->  the encoder holds them, InitReport

In a checkpoint file nothing can execute: safetensors, or a pickle that is read as tensors only.
"""

from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args

import torch
from torch import Tensor

from panfm.encoder.address import SUPPORTED, Scheme
from panfm.encoder.facts import EncoderFacts
from panfm.encoder.load import load_encoder
from panfm.encoder.weights import PICKLE_SUFFIXES, read_weights
from panfm.errors import UserError
from panfm.models.vit import Vit
from panfm.models.weights import InitReport, fit_weights

# Where research checkpoints keep the state_dict; a teacher comes first, since that is what its paper evaluates.
CONTAINERS = ("teacher", "model_ema", "model", "state_dict", "module", "encoder")


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


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state_dict of a checkpoint file, unpacked from what research code wraps around it.

    Raises UserError for a file that holds anything besides tensors and plain values, and for one without a state_dict.
    """
    if path.suffix.lower() not in PICKLE_SUFFIXES:
        return read_weights(path)
    try:
        with torch.serialization.safe_globals([Namespace]):  # the arguments that MAE and others keep beside it
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, and reading that could execute code ({_say(error)}); convert it where "
            "you trust it with safetensors.torch.save_file, and give the .safetensors file"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged, or no checkpoint of torch ({_say(error)})") from None
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = next((found[name] for name in CONTAINERS if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = {str(name): value for name, value in found.items()} if isinstance(found, Mapping) else {}
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        what = f"{others[0]} is no tensor" if others else "no weights"
        raise UserError(
            f"{path}: no state_dict found ({what}); it is looked for in the file itself and under "
            f"{', '.join(CONTAINERS)}"
        )
    return tensors


def _say(error: Exception) -> str:
    """What torch says went wrong, without the pages of advice that it adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "nsupported" in line]
    return (named or lines or [type(error).__name__])[0].partition(". ")[0]
