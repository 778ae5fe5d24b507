"""Weights files: read without executing anything, fitted to a model without forgiving anything, hashed.

In: a safetensors file, or a checkpoint of torch that is read as tensors only. Out: the tensors, in a model whose every
parameter came from the file. A file that is missing a weight, holds one too many, or one of another shape, is an error
with the list: a half-loaded encoder measures like a bad encoder, and nobody would notice.
"""

import hashlib
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from panfm.errors import UserError

# Where research checkpoints keep the state_dict; a teacher comes first, since that is what its paper evaluates.
CONTAINERS = ("teacher", "model_ema", "model", "state_dict", "module", "encoder")
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar"})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; anything else, and a damaged one, is a UserError with the way out."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(
            f"{path}: a {path.suffix} file is a pickle, which may execute code when it is read, so it is refused; "
            f"convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    if path.suffix.lower() != ".safetensors":
        raise UserError(
            f"{path}: weights are read from .safetensors files only; convert it with safetensors.torch.save_file"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); copy it again") from None


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


def load_strictly(model: nn.Module, weights: dict[str, Tensor], where: str, ignore: Iterable[str] = ()) -> None:
    """Copy `weights` into `model`, each and every one; what lies under the `ignore` prefixes is left out first.

    `ignore` is for the classifier of a published checkpoint: an encoder has none.

    Raises UserError that lists every missing, unexpected and reshaped weight (the first few, and their number).
    """
    prefixes = tuple(f"{prefix}." for prefix in ignore)
    given = {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}
    wanted = model.state_dict()
    # A step counter of batch normalisation that files before torch 0.4.1 lack; evaluation never reads it.
    missing = [name for name in wanted if name not in given and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    reshaped = [
        f"{name} {list(tensor.shape)} for {list(wanted[name].shape)}"
        for name, tensor in given.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    faults = [
        _list_some(kind, names)
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped))
        if names
    ]
    if faults:
        raise UserError(
            f"{where}: the weights are not those of {type(model).__name__} as it was built: {'; '.join(faults)}; "
            f"name the architecture and the image size that the file was made with"
        )
    model.load_state_dict(given, strict=False)


def compute_weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of every parameter and buffer: name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {flat.dtype} {list(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _list_some(kind: str, names: list[str], limit: int = 8) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {kind} ({', '.join(names[:limit])}{more})"


def _say(error: Exception) -> str:
    """What torch says went wrong, without the pages of advice that it adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "nsupported" in line]
    return (named or lines or [type(error).__name__])[0].partition(". ")[0]
