"""What every scheme of addresses ends in: a model at its image size, and what was published with it."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from panfm.data.transforms import EvalTransform
from panfm.encoder.address import Address
from panfm.encoder.facts import EncoderFacts, Pooling
from panfm.errors import UserError

Contamination = Literal["excluded", "none", "unknown"]
NONE: Contamination = "none"
UNKNOWN: Contamination = "unknown"


@dataclass(frozen=True)
class EncoderParts:
    """What every scheme ends in, before pooling, freezing and hashing."""

    model: nn.Module  # at its final image size
    transform: EvalTransform
    config: dict[str, Any]  # of the architecture, for the hash
    pooling: Pooling | None  # None: as published
    training_data: str | None
    contamination: Contamination
    facts: EncoderFacts | None = None
    licence: str | None = None  # of the weights, as their publisher's record states it; None = not recorded


def set_image_size(address: Address, model: nn.Module) -> None:
    """Resample the position embedding to the image size of the address; models without one take any size."""
    if address.image_size is None or not hasattr(model, "set_input_size"):
        return
    check_tiling(address, model)
    try:
        model.set_input_size((address.image_size, address.image_size))  # type: ignore[operator]
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{address.text}: image_size ({address.image_size}) does not fit: {error}") from None


def check_tiling(address: Address, model: nn.Module) -> None:
    """Refuse a size that patches do not tile: timm would leave out a strip of the image without a word."""
    patch = int(getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))[0])
    if address.image_size is not None and address.image_size % patch:
        near = address.image_size // patch * patch
        raise UserError(
            f"{address.text}: image_size ({address.image_size}) must be divisible by the patch size ({patch}); "
            f"try {near or patch} or {near + patch}"
        )
