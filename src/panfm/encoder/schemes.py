"""One builder a scheme: from a parsed address to a timm model that holds its weights, and what was published with it.

In: an Address. Out: EncoderParts, at the address's image size, before pooling, freezing and hashing (encoder.load).
A new scheme is one function here (or a file beside this one) and one entry in BUILDERS.
"""

import math
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from panfm.data.transforms import EvalTransform
from panfm.encoder.address import Address, Scheme
from panfm.encoder.facts import Interpolation, read_facts
from panfm.encoder.parts import NONE, UNKNOWN, Contamination, EncoderParts, check_tiling, set_image_size
from panfm.encoder.schemes_published import build_open_clip, build_panderm, build_python
from panfm.encoder.weights import load_strictly, read_checkpoint, read_weights
from panfm.errors import UserError
from panfm.files import compute_file_sha256, read_json
from panfm.models.vit import Vit
from panfm.models.weights import fit_weights, has_published_names

# What timm's tags say. ImageNet was collected before any image of our tasks was published; web collections were not.
TRAINING_DATA = {
    "in1k": "ImageNet-1k",
    "a1_in1k": "ImageNet-1k",
    "tv_in1k": "ImageNet-1k",
    "tf_in1k": "ImageNet-1k",
    "augreg_in1k": "ImageNet-1k",
    "dino": "ImageNet-1k, self-supervised",
    "mae": "ImageNet-1k, self-supervised",
    "augreg_in21k": "ImageNet-21k",
    "augreg_in21k_ft_in1k": "ImageNet-21k, then ImageNet-1k",
}
_WAY_OUT = "name the architecture and the image size that the file was made with"
PICKLED = "pytorch_model.bin"  # what UNI and others publish: read as tensors only
_TIMM_LAYOUT = "an encoder folder holds config.json (architecture, model_args, pretrained_cfg) and model.safetensors"


def _build_timm(address: Address) -> EncoderParts:
    """timm:NAME, timm:NAME@FILE, timm:NAME@random:SEED."""
    name, _, tag = address.target.partition(".")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"{address.text}: timm has no model {name}; nearest: {', '.join(near) or 'see timm.list_models()'}"
        )
    if address.seed is not None:
        model = _create(address, address.target, address.image_size, seed=address.seed)
        training_data: str | None = "none: random weights"
        contamination, licence = NONE, None
    else:
        native = _create(address, address.target, None)
        published = _get_published(native)
        found = read_weights(_find_cached(address, published)) if address.weights is None else None
        model = _fit(address, native, found or read_checkpoint(cast(Path, address.weights)))
        if address.weights is None:
            tag = published["tag"]
        training_data = TRAINING_DATA.get(tag) or (f"timm tag {tag}" if tag else None)
        contamination = NONE if tag in TRAINING_DATA else UNKNOWN
        licence = published.get("license") if tag else None  # a file under a bare name may be anybody's
    config = {"timm_name": name, "timm_kwargs": {}}
    transform = _read_transform(address, model)
    return EncoderParts(model, transform, config, None, training_data, contamination, licence=licence)


def _build_hf(address: Address) -> EncoderParts:
    """hf:DIR, a folder in timm's layout: safetensors, else a pickle of tensors."""
    folder = _find_folder(address)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: config.json is missing; {_TIMM_LAYOUT}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "architecture" not in config:
        raise UserError(f"{folder / 'config.json'}: no key architecture, so it is not in timm's layout; {_TIMM_LAYOUT}")
    weights = read_checkpoint(_find_weights(folder, tolerated=PICKLED))
    model = _fit(address, _create(address, f"local-dir:{folder}", None), weights)
    kept = {"timm_name": config["architecture"], "timm_kwargs": config.get("model_args", {})}
    return EncoderParts(model, _read_transform(address, model), kept, None, None, UNKNOWN)


def _build_panfm(address: Address) -> EncoderParts:
    """panfm:DIR, an export; panfm:DIR@random:SEED, the same architecture and transform with random weights."""
    folder = _find_folder(address)
    if (folder / "checkpoints").is_dir() or (folder / "encoder.safetensors").is_file():
        raise UserError(f"{folder}: a run or a checkpoint, not an export; run `panfm export {folder} --out DIR` first")
    if not (folder / "panfm.json").is_file():
        raise UserError(f"{folder}: no panfm.json, so it is no export of panfm; if timm reads it, write hf:{folder}")
    facts = read_facts(folder / "panfm.json")
    kwargs = {**facts.timm_kwargs, "num_classes": 0}
    transform = EvalTransform.from_plain(facts.transform.model_dump())
    if address.image_size is not None:
        scale = transform.resize_size / transform.image_size
        transform = EvalTransform.from_plain(
            {**transform.to_plain(), "image_size": address.image_size, "resize_size": round(address.image_size * scale)}
        )
    config = {"timm_name": facts.timm_name, "timm_kwargs": kwargs}
    if address.seed is not None:
        model = _create(address, facts.timm_name, address.image_size, seed=address.seed, **kwargs)
        return EncoderParts(model, transform, config, facts.pooling, "none: random weights", NONE)
    path = _find_weights(folder)
    if facts.weights_sha256 is not None and compute_file_sha256(path) != facts.weights_sha256:
        raise UserError(
            f"{path}: its hash is not the one in panfm.json: the file is damaged or was changed; export it again"
        )
    model = _create(address, facts.timm_name, None, **kwargs)
    load_strictly(model, read_weights(path), str(path))
    set_image_size(address, model)
    sources = [f"{source.source} ({source.licence}): {source.num_kept:,} images" for source in facts.sources]
    contamination: Contamination = "excluded" if facts.excluded_tasks else UNKNOWN
    return EncoderParts(model, transform, config, facts.pooling, "; ".join(sources) or None, contamination, facts)


def _create(address: Address, name: str, image_size: int | None, seed: int = 0, **kwargs: Any) -> nn.Module:
    """Build a timm model without classifier, its random weights a function of `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = timm.create_model(name, **{"num_classes": 0, **kwargs})
            if image_size is not None and hasattr(model, "set_input_size"):
                check_tiling(address, model)
                torch.default_generator.manual_seed(seed)
                model = timm.create_model(name, **{"num_classes": 0, **kwargs, "img_size": image_size})
        except UserError:
            raise
        except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
            raise UserError(f"{address.text}: timm cannot build it: {' '.join(str(error).split())}") from None
    return cast(nn.Module, model)


def _fit(address: Address, model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load published weights strictly: at the model's own size, or at the address's if that is what the file holds."""
    classifier = _get_published(model).get("classifier") or ()
    ignore = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    theirs, ours = weights.get("pos_embed"), model.state_dict().get("pos_embed")
    if theirs is not None and ours is not None and theirs.shape != ours.shape:
        set_image_size(address, model)
    if getattr(model, "AuxLogits", ...) is None:  # Inception's second classifier, which timm leaves out as we do
        ignore = (*ignore, "AuxLogits")
    where = str(address.weights or address.text)
    if isinstance(model, get_args(Vit)) and has_published_names(weights):
        _fit_published(cast(Vit, model), weights, where)
    else:
        load_strictly(model, weights, where, ignore)
    set_image_size(address, model)
    return model


def _fit_published(model: Vit, weights: dict[str, Tensor], where: str) -> None:
    """Load a checkpoint under its publisher's names (MAE, DINOv2, DINOv3, BEiT, ...): every key accounted for.

    Nothing is resized: that would make a wrong architecture fit.
    """
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fit_weights(model, weights, where, way_out=_WAY_OUT)
    resized = [f"{entry.name} ({entry.detail})" for entry in report.entries if entry.how == "resized"]
    if resized:
        model.load_state_dict(kept)
        raise UserError(f"{where}: does not fit as it is: {', '.join(resized)}; {_WAY_OUT}")


def _get_published(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's published weights."""
    return dict(model.pretrained_cfg)  # type: ignore[arg-type]


def _read_transform(address: Address, model: nn.Module) -> EvalTransform:
    """Take the preprocessing that the model was published with, at the image size of the address."""
    data = resolve_model_data_config(model)
    channels, height, width = data["input_size"]
    known = data["crop_mode"] == "center" and data["interpolation"] in get_args(Interpolation)
    if channels != 3 or height != width or not known:
        raise UserError(
            f"{address.text}: it was published for input {data['input_size']}, {data['interpolation']}, crop mode "
            f"{data['crop_mode']}; panfm resizes ({', '.join(get_args(Interpolation))}) and crops the centre of "
            f"square RGB images, and no encoder is measured with another's preprocessing"
        )
    size = address.image_size or height
    return EvalTransform(
        image_size=size,
        resize_size=math.floor(size / data["crop_pct"]),
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _find_cached(address: Address, config: dict[str, Any]) -> Path:
    """Find a published model's safetensors in the local Hugging Face cache; nothing is downloaded."""
    repository = config.get("hf_hub_id")
    if not repository:
        raise UserError(f"{address.text}: timm knows no published weights for it; give a file: {address.target}@FILE")
    found = find_in_cache(repository)
    if found is None:
        cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"{address.text}: its weights are not in the local cache ({cache}), and panfm downloads nothing; run "
            f"`hf download {repository} model.safetensors` where there is a network, or give a file: "
            f"timm:{address.target}@FILE"
        )
    return found


def find_in_cache(repository: str) -> Path | None:
    """The safetensors of a published model in the local Hugging Face cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def _find_folder(address: Address) -> Path:
    folder = Path(address.target).expanduser()
    if not folder.is_dir():
        raise UserError(f"{address.text}: {folder} is not a folder; {_TIMM_LAYOUT}")
    return folder


def _find_weights(folder: Path, tolerated: str | None = None) -> Path:
    """The folder's model.safetensors, or the file that is tolerated in its place."""
    for name in filter(None, ("model.safetensors", tolerated)):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: model.safetensors is missing; {_TIMM_LAYOUT}")


BUILDERS: Mapping[Scheme, Callable[[Address], EncoderParts]] = {
    "panfm": _build_panfm,
    "timm": _build_timm,
    "hf": _build_hf,
    "panderm": build_panderm,
    "open_clip": build_open_clip,
    "python": build_python,
}
