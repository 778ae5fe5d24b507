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

FACTS_FORMAT: Literal[2] = 2  # 1, which is still read, had neither `use` nor `permitted_uses`
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
    num_audited: int = 0  # further images kept out, because an audit lists them: copies of test images
    data_hash: str  # ordered (key, sha256) of the shard set
    synthetic: bool = False
    permitted_uses: tuple[str, ...] | None = None  # null = not recorded (format 1)


class EncoderFacts(BaseModel):
    """The content of `encoder.json` in a checkpoint and of `panfm.json` in an export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = FACTS_FORMAT
    timm_name: str  # architecture, without a pretrained tag
    timm_kwargs: dict[str, Any] = Field(default_factory=dict)  # img_size, patch_size, num_classes: 0, reg_tokens, ...
    transform: TransformFacts
    pooling: Pooling = "mean"
    samples_seen: int
    step: int
    config: dict[str, Any] = Field(default_factory=dict)  # the resolved pretraining config
    sources: tuple[SourceFacts, ...] = ()
    excluded_tasks: tuple[str, ...] = ()  # tasks whose test groups were kept out of pretraining
    audit: str | None = None  # SHA-256 of the audit.json whose images were kept out of pretraining
    use: str = "research"  # what it was trained for; in an export, what it was exported for
    code_version: str  # panfm version that trained it
    energy_kwh: float | None = None  # null = not measured
    training_flops: float | None = None  # of all samples seen, heads and teachers included; null = not counted
    hardware: str | None = None  # of the run's last part: "8 x NVIDIA H100 80GB HBM3"; null = not recorded
    weights_sha256: str | None = None  # of model.safetensors; set by the export


def read_facts(path: str | Path) -> EncoderFacts:
    """Read `encoder.json` or `panfm.json`; a missing, damaged or foreign file is a UserError that names the key."""
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if found not in (1, FACTS_FORMAT):
        raise UserError(
            f"{path}: format is {found!r}; this panfm reads formats 1 and {FACTS_FORMAT}: use the panfm that wrote it"
        )
    try:
        return EncoderFacts.model_validate(values | {"format": FACTS_FORMAT})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path}: {key} ({fault['input']!r}): {fault['msg']}; export or train it again") from None


def check_use(facts: EncoderFacts, use: str, where: str) -> None:
    """Raise UserError where `use` is not permitted by a source that the encoder was trained on.

    Where it is not recorded what a source permits, only the use that it was trained for is taken as permitted.
    """
    for source in facts.sources:
        if source.permitted_uses is None:
            if use == facts.use:
                continue
            permitted = f"it is not recorded what its terms permit besides {facts.use}"
        elif use in source.permitted_uses:
            continue
        else:
            permitted = f"its card permits {', '.join(source.permitted_uses) or 'nothing'}"
        raise UserError(
            f"{where}: was trained on {source.source} (licence {source.licence}), which does not permit the use {use}: "
            f"{permitted}; choose a permitted use, or train without this source"
        )


def write_facts(path: str | Path, facts: EncoderFacts) -> None:
    """Write the facts as JSON, atomically."""
    write_json(path, facts.model_dump(mode="json"))
