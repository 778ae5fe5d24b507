"""Builders of schemes that read others' files and code: panderm:FILE, open_clip:NAME@FILE, python:MODULE:FUNCTION.

In: an Address. Out: EncoderParts (encoder.parts), as those of `schemes`. Files are safetensors, or checkpoints of torch
read as tensors only. Code of the user's own runs only where PANFM_ALLOW_PYTHON=1 says so: an address may come from a
config that somebody else wrote.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import nn

from panfm.data.transforms import EvalTransform
from panfm.encoder import open_clip_tower, panderm
from panfm.encoder.address import Address
from panfm.encoder.facts import Pooling
from panfm.encoder.parts import UNKNOWN, EncoderParts, set_image_size
from panfm.encoder.weights import read_checkpoint
from panfm.errors import UserError
from panfm.files import compute_file_sha256

ALLOW_PYTHON = "PANFM_ALLOW_PYTHON"


def build_panderm(address: Address) -> EncoderParts:
    """panderm:FILE, a published PanDerm (ViT-B or ViT-L, for a probe or fine-tuned) or DermLIP's tower of it."""
    path = _find_file(address, Path(address.target).expanduser())
    model, pooling, shape = panderm.convert_panderm(read_checkpoint(path), address.text, pooling=address.pooling)
    set_image_size(address, model)
    size = address.image_size or shape.image_size
    transform = EvalTransform(
        image_size=size,
        resize_size=round(size * panderm.RESIZE_SIZE / panderm.IMAGE_SIZE),
        interpolation="bilinear",
        mean=panderm.MEAN,
        std=panderm.STD,
    )
    config = {"panderm": type(model).__name__, **vars(shape)}
    return EncoderParts(model, transform, config, pooling, panderm.TRAINING_DATA, UNKNOWN, licence=panderm.LICENCE)


def build_open_clip(address: Address) -> EncoderParts:
    """open_clip:NAME@FILE, the vision tower of a checkpoint of open_clip; NAME@TAG, one that is in the local cache."""
    if address.weights is None:
        raise UserError(
            f"{address.text}: panfm downloads nothing; fetch the checkpoint where there is a network, and give "
            f"its file: open_clip:{address.target}@FILE"
        )
    path = open_clip_tower.find_tag(address.target, str(address.weights), address.text)
    weights = read_checkpoint(path or _find_file(address, address.weights))
    tower = open_clip_tower.build_tower(address.target, weights, address.text)
    set_image_size(address, tower.model)
    size = address.image_size or tower.image_size
    transform = EvalTransform(
        image_size=size, resize_size=size, interpolation="bicubic", mean=tower.mean, std=tower.std
    )
    return EncoderParts(tower.model, transform, tower.config, tower.pooling, None, UNKNOWN)


def build_python(address: Address) -> EncoderParts:
    """python:MODULE:FUNCTION, a function of the user's own: () -> {model, transform, pooling?, training_data?}.

    model: a timm ViT, or any module that maps images float [B, 3, S, S] to features [B, D]. transform: the fields of
    EvalTransform.
    """
    if os.environ.get(ALLOW_PYTHON) != "1":
        raise UserError(
            f"{address.text}: runs code of that module, which an address may not do by itself; if you trust it, set "
            f"{ALLOW_PYTHON}=1"
        )
    module_name, colon, name = address.target.partition(":")
    if not colon or not name:
        raise UserError(f"{address.text}: write python:MODULE:FUNCTION")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the module mostly lies where the command is given
    try:
        module = importlib.import_module(module_name)
        function: Callable[[], Mapping[str, Any]] = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{address.text}: {error}; MODULE is imported as Python does it, from this folder too"
        ) from None
    made = dict(function())
    model, transform = made.get("model"), made.get("transform")
    if not isinstance(model, nn.Module) or not isinstance(transform, Mapping):
        raise UserError(f"{address.text}: must return a dict with model (a torch module) and transform (a dict)")
    pooling = address.pooling or made.get("pooling")
    if pooling is not None and pooling not in get_args(Pooling):
        raise UserError(f"{address.text}: pooling ({pooling}) must be one of {', '.join(get_args(Pooling))}")
    if address.image_size is not None:
        raise UserError(f"{address.text}: its image size is what the function says; leave out ?image_size=")
    config = {"python": address.target, "source_sha256": compute_file_sha256(Path(str(module.__file__)))}
    return EncoderParts(
        model, EvalTransform.from_plain(dict(transform)), config, pooling, made.get("training_data"), UNKNOWN
    )


def _find_file(address: Address, path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{address.text}: {path} is no file; give the checkpoint (.safetensors, or torch's .pth)")
    return path
