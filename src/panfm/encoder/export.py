"""From a checkpoint to a folder that can be shared: weights, configuration, transform, and where it came from.

    run/checkpoints/step-*/ {encoder.safetensors, encoder.json, manifest.json}
      -> DIR/ {model.safetensors, config.json, panfm.json, README.md}, with text/ where it was trained with captions

`timm.create_model("local-dir:DIR", pretrained=True, num_classes=0)` and `panfm:DIR` read it; before the folder gets its
name, both are loaded and must give the same features. Safetensors only: nothing in it can execute.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.models.eva import Eva
from torch import nn

from panfm.encoder.address import Address, Scheme, parse_address
from panfm.encoder.facts import EncoderFacts, Pooling, TransformFacts, check_use, read_facts, write_facts
from panfm.encoder.network import EncoderNetwork
from panfm.encoder.text import export_text
from panfm.encoder.weights import load_strictly, read_weights
from panfm.errors import UserError
from panfm.files import compute_file_sha256, read_json, sync_folder, write_json, write_text

# How timm's own forward gives our pooling, with the final norm before it; cls_mean is not among timm's poolings.
_TIMM_POOLING: Mapping[Pooling, dict[str, Any]] = {
    "mean": {"global_pool": "avg", "fc_norm": False},
    "cls": {"global_pool": "token"},
    "cls_mean": {"global_pool": "token"},
    "map": {},
}

# Both are timm's. In hf the arguments lack num_classes, which transformers' TimmWrapperModel adds by itself and must
# not find; timm needs it there to build an encoder, not a classifier, where its user names none.
Layout = Literal["timm", "hf"]
TEXT = "text.safetensors"  # in the checkpoint of a run with an image_text objective
_TERMS = {
    "research": "For research only.",
    "education": "For education.",
    "commercial": "For commercial use as the licences below permit it.",
}


def export_encoder(checkpoint: Path, out: Path, *, use: str | None = None, layout: Layout = "timm") -> Path:
    """Write the encoder of a checkpoint, or of a run's newest whole checkpoint, as an export folder; return `out`.

    An earlier export at `out` is replaced; any other folder with something in it is left alone. use: research,
    education or commercial; None: what it was trained for. layout: hf is read by transformers, too.

    Raises UserError for a checkpoint that is missing, not whole, or differs from its manifest, and for a use that a
    source of its training data, or of an encoder that it began from or learned from, does not permit.
    """
    checkpoint, out = _find_checkpoint(Path(checkpoint)), Path(out)
    if out.exists() and not (out / "panfm.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an export; name a new or empty folder")
    weights_sha256 = _verify(checkpoint, "encoder.safetensors")
    _verify(checkpoint, "encoder.json")
    facts = read_facts(checkpoint / "encoder.json")
    use = use or facts.use
    check_use(facts, use, str(checkpoint))
    if use != facts.use:  # for the use it was trained for, pretraining has looked at these
        _check_ancestors(facts, use, str(checkpoint), known=set())
    facts = facts.model_copy(update={"weights_sha256": weights_sha256, "use": use})

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
    try:
        shutil.copyfile(checkpoint / "encoder.safetensors", temporary / "model.safetensors")
        network = _build_network(facts, temporary / "model.safetensors")
        write_json(temporary / "config.json", _make_timm_config(facts, network.model, layout))
        write_facts(temporary / "panfm.json", facts)
        has_text = TEXT in read_json(checkpoint / "manifest.json")["files"]
        if has_text:
            _verify(checkpoint, TEXT)
            export_text(checkpoint / TEXT, facts, int(network.model.num_features), temporary)  # type: ignore[arg-type]
        write_text(temporary / "README.md", _make_readme(facts, out.name, layout, has_text=has_text))
        _check_round_trip(temporary, facts, network)
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide the export from colleagues
        _replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def find_ancestors(facts: EncoderFacts) -> tuple[Address, ...]:
    """The trained encoders that an encoder began from or learned from, as its config names them."""
    addresses = []
    for text in _iterate_texts([facts.config.get("encoder"), facts.config.get("objectives")]):
        try:
            address = parse_address(text)
        except UserError:
            continue  # a text of the config that is no encoder address
        if address.seed is None:  # else untrained
            addresses.append(address)
    return tuple(addresses)


def find_newest_checkpoint(run: Path) -> Path:
    """Return a run's newest whole checkpoint (its manifest is written last); none is a UserError."""
    folders = sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".tmp")
    whole = [folder for folder in folders if (folder / "manifest.json").is_file()]
    if not whole:
        raise UserError(f"{run}: no whole checkpoint in {run / 'checkpoints'} ({len(folders)} begun); resume the run")
    return whole[-1]


def _find_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run, or one of its checkpoints/step-* folders")
    if (path / "checkpoints").is_dir():
        return find_newest_checkpoint(path)
    if not (path / "manifest.json").is_file():
        raise UserError(
            f"{path}: no manifest.json, so it is no whole checkpoint; name the run, and its newest is taken"
        )
    return path


def _iterate_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _iterate_texts(inner)


def _check_ancestors(facts: EncoderFacts, use: str, where: str, known: set[str]) -> None:
    """Check the use against the training data of every panfm encoder up the line; others' terms are for the user."""
    for address in find_ancestors(facts):
        if address.scheme != "panfm" or address.text in known:
            continue
        path = Path(address.target).expanduser() / "panfm.json"
        if not path.is_file():
            raise UserError(
                f"{where}: learned from {address.text}, which is not there, so it cannot be told whether its training "
                f"data permit the use {use}; put it back, or export for {facts.use}"
            )
        ancestor = read_facts(path)
        check_use(ancestor, use, f"{where}: learned from {address.text}")
        _check_ancestors(ancestor, use, where, known | {address.text})


def _verify(checkpoint: Path, name: str) -> str:
    """Compare a file with the checkpoint's manifest and return its SHA-256."""
    path = checkpoint / name
    try:
        expected = read_json(checkpoint / "manifest.json")["files"][name]["sha256"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: not in manifest.json, so this is no whole checkpoint; take another") from None
    if not path.is_file():
        raise UserError(f"{path}: missing, though manifest.json lists it; take another checkpoint")
    found = compute_file_sha256(path)
    if found != expected:
        raise UserError(f"{path}: not the file that manifest.json lists, so it is damaged; take another checkpoint")
    return found


def _build_network(facts: EncoderFacts, weights: Path) -> EncoderNetwork:
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(facts.timm_name, **{**facts.timm_kwargs, "num_classes": 0})
    load_strictly(model, read_weights(weights), str(weights))
    network = EncoderNetwork(model, facts.pooling, where=str(weights))
    network.eval().requires_grad_(False)
    return network


def _make_timm_config(facts: EncoderFacts, model: nn.Module, layout: Layout) -> dict[str, Any]:
    """The config.json of timm's layout, with the image size and the preprocessing of this encoder."""
    size = facts.transform.image_size
    norm_is_behind = not isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity)
    # An encoder built with the norm behind its pooling says so in its own arguments; its weights bear that name.
    pooling = {} if norm_is_behind or not hasattr(model, "fc_norm") else dict(_TIMM_POOLING[facts.pooling])
    if isinstance(model, Eva) and "fc_norm" in pooling:
        pooling["use_fc_norm"] = pooling.pop("fc_norm")
    arguments = {**facts.timm_kwargs, "num_classes": 0, **pooling}
    if layout == "hf":
        del arguments["num_classes"]
    return {
        "architecture": facts.timm_name,
        "num_classes": 0,
        "num_features": int(model.num_features),  # type: ignore[arg-type]
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "panfm",
            "input_size": [3, size, size],
            "fixed_input_size": hasattr(model, "set_input_size"),
            "num_classes": 0,
            "pool_size": None,
            "crop_pct": _compute_crop_share(facts.transform),
            "crop_mode": "center",
            "interpolation": facts.transform.interpolation,
            "mean": list(facts.transform.mean),
            "std": list(facts.transform.std),
            "first_conv": model.pretrained_cfg.get("first_conv"),  # type: ignore[union-attr, operator]
            "classifier": model.pretrained_cfg.get("classifier"),  # type: ignore[union-attr, operator]
        },
    }


def _compute_crop_share(transform: TransformFacts) -> float:
    """The share of the shorter side that timm crops, such that timm's floor(size / share) is our resize_size."""
    share = transform.image_size / transform.resize_size
    while math.floor(transform.image_size / share) < transform.resize_size:
        share = math.nextafter(share, 0)
    return share


def _check_round_trip(folder: Path, facts: EncoderFacts, network: EncoderNetwork) -> None:
    """Load the folder as a colleague would and compare one image: a wrong folder must not leave the house."""
    with torch.random.fork_rng(devices=[]):
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    size = facts.transform.image_size
    image = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    with torch.inference_mode():
        if facts.pooling == "cls_mean":  # timm gives the tokens; the class token alone is its feature
            difference = theirs.forward_features(image) - network.model.forward_features(image)  # type: ignore[operator]
        else:
            difference = theirs(image) - network(image)
    assert float(difference.abs().max()) < 1e-4, f"timm reads {folder} differently: {float(difference.abs().max())}"


def _replace_folder(temporary: Path, out: Path) -> None:
    """Give the finished folder its name; an earlier export steps aside until the new one stands."""
    for path in temporary.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(temporary)
    aside = None
    if out.exists():
        aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
        out.replace(aside / out.name)
    temporary.replace(out)
    sync_folder(out.parent)
    if aside is not None:
        shutil.rmtree(aside)


def _make_readme(facts: EncoderFacts, name: str, layout: Layout, *, has_text: bool) -> str:
    """The model card: what it is, what it saw, what it did not see, what it is not for."""
    transform, size = facts.transform, facts.transform.image_size
    rows = [
        f"| {source.source}{' (synthetic)' if source.synthetic else ''} | {source.licence} | {source.num_kept:,} | "
        f"{source.num_excluded:,} |"
        for source in facts.sources
    ]
    synthetic = facts.sources and all(source.synthetic for source in facts.sources)
    others = ", ".join(_name_strangers(facts))
    ancestry = f"\nIt began from or learned from {others}, whose own terms bind it too.\n" if others else ""
    warning = "\n**Every image it was trained on is synthetic: it shows that the software works, nothing more.**\n"
    excluded = ", ".join(facts.excluded_tasks) or "none: do not report its results on tasks drawn from these sources"
    return f"""---
library_name: timm
license: other
tags: [dermatology, self-supervised, panfm]
---
# {name}

A frozen image encoder for skin images, pretrained with panfm {facts.code_version}: {facts.timm_name},
{size} px, {facts.samples_seen:,} samples seen in {facts.step:,} steps.
{warning if synthetic else ""}
**{_TERMS[facts.use]} It is not a medical device and gives no diagnosis.**

## Use

```python
from panfm.encoder import load_encoder
features = load_encoder("panfm:DIR").embed(["image.jpg"])

import timm
model = timm.create_model("local-dir:DIR", pretrained=True, num_classes=0)
{_TRANSFORMERS if layout == "hf" else ""}```

Preprocessing: shorter side to {transform.resize_size} px ({transform.interpolation}), centre crop of {size} px, scale
to [0, 1], mean {list(transform.mean)}, std {list(transform.std)}.
Pooling: {facts.pooling} of the normalised tokens{_pooling_note(facts)}.
{_TEXT_NOTE if has_text else ""}
## Training data

| source | licence | images trained on | images kept out |
|---|---|---|---|
{chr(10).join(rows) or "| not recorded | | | |"}

The licences of the sources bind the use of these weights; exported for: {facts.use}.
{ancestry}Test groups kept out of pretraining, by task: {excluded}.

The whole training configuration, the hashes of the data and of the weights are in `panfm.json`.
"""


_TRANSFORMERS = """
from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained("DIR"), AutoModel.from_pretrained("DIR").eval()
features = model(**processor(image, return_tensors="pt")).pooler_output
"""
_TEXT_NOTE = """
`text/` holds the text tower that it was trained with (weights under open_clip's names, CLIP's tokenizer):

```python
from panfm.encoder.text import load_text
text = load_text("DIR")
scores = text.scale * text.embed_features(features) @ text.embed_texts(["a melanoma", "a nevus"]).T
```
"""


def _name_strangers(facts: EncoderFacts) -> list[str]:
    """The encoders of others that it began from or learned from: addresses, and the name of a checkpoint file."""
    names = [address.text for address in find_ancestors(facts) if address.scheme != "panfm"]
    initial = (facts.config.get("encoder") or {}).get("init")
    if initial is not None and initial.partition(":")[0] not in get_args(Scheme):
        names.append(Path(initial).name)
    return names


def _pooling_note(facts: EncoderFacts) -> str:
    return " (timm's own forward gives cls alone)" if facts.pooling == "cls_mean" else ""
