"""Encoder addresses: the one string by which a config, a command or a notebook names an encoder.

    timm:tf_efficientnet_lite0@weights.safetensors?image_size=112&dtype=bf16
    scheme  target             weights             options

In: the string. Out: an Address, or a UserError that says what is supported. Nothing is opened here.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, cast, get_args

from panfm.encoder.facts import Pooling
from panfm.errors import UserError

Scheme = Literal["panfm", "timm", "hf", "panderm", "open_clip", "python"]
Dtype = Literal["fp32", "bf16"]
SUPPORTED = (
    "supported: panfm:DIR (an export), panfm:DIR@random:SEED (its architecture, untrained), timm:NAME (local cache), "
    "timm:NAME@FILE.safetensors, timm:NAME@random:SEED, hf:DIR (config.json + model.safetensors), panderm:FILE, "
    "open_clip:NAME@FILE or NAME@TAG (local cache), python:MODULE:FUNCTION (your own code, if PANFM_ALLOW_PYTHON=1); "
    "options ?image_size=PIXELS&pooling=cls|mean|cls_mean|map&dtype=fp32|bf16"
)
OPTIONS = ("image_size", "pooling", "dtype")
_RANDOM = re.compile(r"random:(\d+)")


@dataclass(frozen=True)
class Address:
    """A parsed encoder address; options that were not given are None."""

    text: str  # as the user wrote it
    scheme: Scheme
    target: str  # a model's name (timm's with its tag, if given), a folder, a file, or MODULE:FUNCTION
    weights: Path | None  # timm:NAME@FILE, open_clip:NAME@FILE
    seed: int | None  # ...@random:SEED
    image_size: int | None  # pixels
    pooling: Pooling | None
    dtype: Dtype

    @property
    def name(self) -> str:
        """The encoder's name on a board: short, without folders, and different wherever the encoder differs."""
        if self.scheme in ("timm", "open_clip", "python"):
            name = self.target
        else:  # a folder, or a file without its ending
            name = Path(self.target).resolve().name if self.scheme != "panderm" else Path(self.target).stem
        if self.seed is not None:
            name += f"@random:{self.seed}"
        elif self.weights is not None:
            name += f"@{self.weights.stem}"
        options = self.text.partition("?")[2]
        return f"{name}?{options}" if options else name


def parse_address(text: str) -> Address:
    """Parse an encoder address; an unknown scheme, option or value is a UserError with the supported list."""
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in get_args(Scheme):
        raise UserError(f"encoder address {text!r}: {scheme + ':' if colon else 'no scheme'} is not known; {SUPPORTED}")
    body, _, options_text = rest.partition("?")
    target, at, weights_text = body.partition("@") if scheme in ("timm", "open_clip") else _split_seed(body)
    if not target:
        raise UserError(f"encoder address {text!r}: nothing stands behind {scheme}:; {SUPPORTED}")
    if at and not weights_text:
        raise UserError(f"encoder address {text!r}: nothing stands behind @; {SUPPORTED}")
    if weights_text.startswith("random:") and not _RANDOM.fullmatch(weights_text):
        raise UserError(f"encoder address {text!r}: {weights_text} has no seed; write @random:0 (a number from 0 on)")
    random = _RANDOM.fullmatch(weights_text)
    if scheme not in ("timm", "panfm") and random:
        raise UserError(
            f"encoder address {text!r}: {scheme}: is read with its weights; for random ones use timm:NAME@random:0"
        )
    options = _parse_options(text, options_text)
    return Address(
        text=text,
        scheme=cast(Scheme, scheme),
        target=target,
        weights=Path(weights_text).expanduser() if weights_text and not random else None,
        seed=int(random[1]) if random else None,
        image_size=_parse_image_size(text, options.get("image_size")),
        pooling=cast(Pooling | None, _choose(text, "pooling", options.get("pooling"), get_args(Pooling))),
        dtype=cast(Dtype, _choose(text, "dtype", options.get("dtype", "fp32"), get_args(Dtype))),
    )


def _split_seed(body: str) -> tuple[str, str, str]:
    """Split DIR@random:SEED; any other @ belongs to the folder's name."""
    target, at, seed = body.rpartition("@")
    return (target, at, seed) if seed.startswith("random:") else (body, "", "")


def _parse_options(text: str, options_text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in filter(None, options_text.split("&")):
        key, equals, value = part.partition("=")
        if key not in OPTIONS:
            near = get_close_matches(key, OPTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known options: {', '.join(OPTIONS)}"
            raise UserError(f"encoder address {text!r}: unknown option {key}; {hint}")
        if not equals or key in options:
            raise UserError(f"encoder address {text!r}: option {key} must be given once, as {key}=VALUE")
        options[key] = value
    return options


def _parse_image_size(text: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or not 16 <= int(value) <= 4096:
        raise UserError(f"encoder address {text!r}: image_size ({value}) must be a number of pixels from 16 to 4096")
    return int(value)


def _choose(text: str, key: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    if value is not None and value not in choices:
        raise UserError(f"encoder address {text!r}: {key} ({value}) must be one of {', '.join(choices)}")
    return value
