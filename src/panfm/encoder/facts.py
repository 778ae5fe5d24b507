"""What a file of encoder weights cannot say about itself: how to build it, how to feed it, what it was trained on.

training.checkpoint writes `encoder.json` beside `encoder.safetensors`; encoder.export copies it as `panfm.json` into
the shared folder and adds the hash of the weights; encoder.load builds the encoder from it. One model, so that the
three rooms cannot drift apart.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from panfm.errors import UserError
from panfm.files import read_json, write_json

FACTS_FORMAT: Literal[1] = 1
Interpolation = Literal["bilinear", "bicubic"]
Pooling = Literal["cls", "mean", "cls_mean", "map"]


class TransformFacts(BaseModel):
    """The evaluation transform: resize the shorter side, crop the centre, scale to 0..1, subtract mean, divide by std.

    The fields of panfm.data.transforms.EvalTransform, readable without torch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = Field(ge=1)  # pixels, side of the square that the encoder sees
    resize_size: int = Field(ge=1)  # pixels, short side before the centre crop
    interpolation: Interpolation
    mean: tuple[float, float, float]  # RGB, images in [0, 1]
    std: tuple[float, float, float]


class SourceFacts(BaseModel):
    """One source of the pretraining data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    licence: str
    num_kept: int  # images that pretraining could draw
    num_excluded: int  # images kept out, because they belong to the test groups of a task
    data_hash: str  # ordered (key, sha256) of the shard set
    synthetic: bool = False


class EncoderFacts(BaseModel):
    """The content of `encoder.json` in a checkpoint and of `panfm.json` in an export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = FACTS_FORMAT
    timm_name: str  # architecture, without a pretrained tag
    timm_kwargs: dict[str, Any] = Field(default_factory=dict)  # img_size, patch_size, num_classes: 0, reg_tokens, ...
    transform: TransformFacts
    pooling: Pooling = "mean"
    samples_seen: int
    step: int
    config: dict[str, Any] = Field(default_factory=dict)  # the resolved pretraining config
    sources: tuple[SourceFacts, ...] = ()
    excluded_tasks: tuple[str, ...] = ()  # tasks whose test groups were kept out of pretraining
    code_version: str  # panfm version that trained it
    energy_kwh: float | None = None  # null = not measured
    weights_sha256: str | None = None  # of model.safetensors; set by the export


def read_facts(path: str | Path) -> EncoderFacts:
    """Read `encoder.json` or `panfm.json`; a missing, damaged or foreign file is a UserError that names the key."""
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if found != FACTS_FORMAT:
        raise UserError(
            f"{path}: format is {found!r}; this panfm reads format {FACTS_FORMAT}: use the panfm that wrote it"
        )
    try:
        return EncoderFacts.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path}: {key} ({fault['input']!r}): {fault['msg']}; export or train it again") from None


def write_facts(path: str | Path, facts: EncoderFacts) -> None:
    """Write the facts as JSON, atomically."""
    write_json(path, facts.model_dump(mode="json"))
