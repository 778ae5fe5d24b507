"""From an address to a frozen encoder, which brings its own transform, pooling and dimension.

    address -> timm model + weights, strictly -> EncoderNetwork -> Encoder -> features [N, D], or a teacher's tokens

Used by evaluation (features of frozen encoders), by training (teachers), and by whoever writes three lines of Python.
No network, no pickle: what is not on this machine as safetensors is an error with the way out.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from panfm.data.transforms import EvalTransform
from panfm.encoder.address import Dtype, parse_address
from panfm.encoder.embedding import iterate_features
from panfm.encoder.facts import EncoderFacts, Pooling
from panfm.encoder.network import EncoderNetwork
from panfm.encoder.parts import Contamination
from panfm.encoder.schemes import BUILDERS
from panfm.encoder.weights import compute_weights_hash
from panfm.errors import UserError
from panfm.files import compute_json_hash
from panfm.models.attention import read_last_attention, select_rows
from panfm.models.vit import select_attention

# Raise it when a change of this room or of EvalTransform changes features: every cache then misses.
ENCODER_CODE_VERSION = 1


@dataclass(frozen=True)
class EncoderDescription:
    """What a leaderboard says about an encoder: the fields of evaluation.results.EncoderCard."""

    name: str
    address: str
    hash: str
    num_parameters: int
    flops_per_image: float | None  # one forward, multiplications and additions counted apart
    embed_dim: int
    image_size: int
    pooling: Pooling
    training_data: str | None  # None = unknown to us
    contamination: Contamination  # can it have seen the tests: excluded (kept out by panfm), none, unknown
    energy_kwh: float | None
    licence: str | None = None  # of the weights; None = not recorded


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen encoder. Not a module, so that a teacher stays out of the parameters and checkpoints of its student."""

    address: str
    name: str  # short, as shown on a board
    module: (
        EncoderNetwork  # eval mode, no gradients; normalised images [B, 3, S, S] -> [B, D]. A copy can be fine-tuned
    )
    transform: EvalTransform
    dtype: Dtype
    device: torch.device
    hash: str  # weights + config + transform + pooling + dtype + code version
    card: EncoderDescription
    facts: EncoderFacts | None  # of a panfm export
    has_fixed_size: bool  # images of another size are resized before forward_tokens
    _grids: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def pooling(self) -> Pooling:
        """How tokens become one feature."""
        return self.module.pooling

    @property
    def embed_dim(self) -> int:
        """Dimension D of a feature."""
        return self.card.embed_dim

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the evaluation transform delivers."""
        return self.transform.image_size

    def describe(self) -> str:
        """Say in one line how it sees an image and what it gives: dimension, pooling, preprocessing, size, licence."""
        transform, card = self.transform, self.card
        return (
            f"{self.name}: {self.embed_dim} dimensions, pooling {self.pooling}; shorter side to "
            f"{transform.resize_size} px ({transform.interpolation}), centre crop of {transform.image_size} px, mean "
            f"{_format_colours(transform.mean)}, std {_format_colours(transform.std)}; {self.dtype} on {self.device}; "
            f"{card.num_parameters / 1e6:.1f} million parameters, licence {card.licence or 'not recorded'}"
        )

    def list_facts(self) -> dict[str, str]:
        """What a file of its features must say of it, as strings: address, hash, pooling, transform."""
        return {
            "encoder": self.address,
            "encoder_hash": self.hash,
            "pooling": self.pooling,
            "transform": json.dumps(self.transform.to_plain()),
        }

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Compute features: images uint8 [B, 3, S, S] as the transform delivers them -> float32 [B, D]."""
        assert images.dtype == torch.uint8 and images.shape[-1] == self.image_size, (images.dtype, images.shape)
        with self._precision():
            return self.module(self._prepare(images)).float()  # type: ignore[no-any-return]

    @torch.no_grad()  # not inference_mode: a loss may have to keep its target for the backward pass
    def forward_tokens(self, images: Tensor) -> Tensor:
        """Compute one feature a place, as a frozen teacher: images uint8 [B, 3, H, W] -> float32 [B, h * w, C].

        A model with a class token gives it before the places: [B, 1 + h * w, C].

        Images come at the student's size. They are resized (bilinear, antialiased) to this encoder's own size if its
        address gives image_size or its position embedding is tied to one; otherwise they are used as they are.
        """
        normalised = self._resize(self._prepare(images))
        with self._precision():
            return self.module.forward_tokens(normalised).float()

    @torch.no_grad()
    def forward_tokens_and_feature(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `forward_tokens` and, in the same pass, the pooled feature [B, D] of the same images."""
        normalised = self._resize(self._prepare(images))
        with self._precision():
            tokens, feature = self.module.forward_tokens_and_feature(normalised)
        return tokens.float(), feature.float()

    def token_grid(self, image_size: int) -> tuple[int, int]:
        """Return (h, w) of forward_tokens for square images of `image_size` pixels."""
        if image_size not in self._grids:
            blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=self.device)
            side = math.isqrt(self.forward_tokens(blank).shape[1] - int(self.module.has_cls))
            self._grids[image_size] = (side, side)
        return self._grids[image_size]

    def embed(self, paths: Sequence[str | Path], *, batch_size: int = 64, workers: int = 1) -> NDArray[np.float32]:
        """Compute the features of image files -> [N, D], in the order of `paths`.

        A file that is missing or does not decode is a UserError that names it.
        """
        if not paths:
            return np.empty((0, self.embed_dim), dtype=np.float32)
        return self._collect(paths, self.forward, batch_size, workers)

    def embed_tokens(
        self, paths: Sequence[str | Path], *, batch_size: int = 16, workers: int = 1
    ) -> NDArray[np.float32]:
        """Compute one feature a place of image files -> [N, h, w, C], rows from the top, as a teacher gives them."""
        rows, columns = self.token_grid(self.image_size)

        def forward(images: Tensor) -> Tensor:
            tokens = self.forward_tokens(images)  # [b, cls + h * w, C]
            places: Tensor = tokens[:, tokens.shape[1] - rows * columns :].unflatten(1, (rows, columns))
            return places

        return self._collect(paths, forward, batch_size, workers)

    def attention_maps(
        self, paths: Sequence[str | Path], *, batch_size: int = 16, workers: int = 1
    ) -> NDArray[np.float32]:
        """Compute what the last block looks at in image files -> [N, heads, h, w].

        The row of the class token (without one the mean over the patches' rows), its weights on the patches; with those
        on the other tokens, which are left out, they sum to 1. UserError for an encoder without attention.
        """
        if not self.module.is_token_model or not hasattr(self.module.model, "blocks"):
            raise UserError(f"{self.address}: {type(self.module.model).__name__} has no attention to show; take a ViT")
        rows, columns = self.token_grid(self.image_size)
        num_prefix = self.module.num_prefix_tokens

        def forward(images: Tensor) -> Tensor:
            with torch.inference_mode(), self._precision():
                weights = read_last_attention(self.module.model, lambda: self.module(self._prepare(images)))
            found = select_rows(weights, num_prefix, has_cls=self.module.has_cls)
            maps: Tensor = found[:, :, num_prefix:].unflatten(2, (rows, columns))
            return maps

        return self._collect(paths, forward, batch_size, workers)

    def _collect(
        self, paths: Sequence[str | Path], forward: Callable[[Tensor], Tensor], batch_size: int, workers: int
    ) -> NDArray[np.float32]:
        if not paths:
            raise UserError("no images are given; name at least one file")
        readers, names = [Path(path).read_bytes for path in paths], [str(path) for path in paths]
        values: NDArray[np.float32] | None = None
        done = 0
        for batch in iterate_features(self, readers, names, batch_size, workers, forward):
            if values is None:
                values = np.empty((len(paths), *batch.shape[1:]), dtype=np.float32)
            values[done : done + len(batch)] = batch
            done += len(batch)
        assert values is not None, "at least one image is given"
        return values

    def _prepare(self, images: Tensor) -> Tensor:
        return self._lay_out(self.transform.normalise(images.to(self.device, non_blocking=True)))

    def _resize(self, normalised: Tensor) -> Tensor:
        if not self.has_fixed_size or normalised.shape[-1] == self.image_size:
            return normalised
        size = (self.image_size, self.image_size)
        return self._lay_out(F.interpolate(normalised, size, mode="bilinear", antialias=True, align_corners=False))

    def _lay_out(self, images: Tensor) -> Tensor:
        layout = torch.contiguous_format if self.module.is_token_model else torch.channels_last
        return images.contiguous(memory_format=layout)

    def _precision(self) -> torch.autocast:
        # enabled=False matters: it keeps a teacher of fp32 out of the autocast of the training step around it.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16")


def load_encoder(address: str, device: str | torch.device = "cpu") -> Encoder:
    """Load a frozen encoder from its address (see panfm.encoder.address) onto `device`.

    Raises UserError for an unknown scheme or option, a missing or damaged file, a file that would execute code, and
    weights that do not fit to the last one.
    """
    parsed = parse_address(address)
    place = _parse_device(device)
    parts = BUILDERS[parsed.scheme](parsed)

    network = EncoderNetwork(parts.model, parsed.pooling or parts.pooling, where=address)
    network.eval().requires_grad_(False)
    select_attention(network, torch.device("cpu"), num_tokens=0)  # explicit: the counter knows matrix products
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        size = parts.transform.image_size
        embed_dim = int(network(torch.zeros(1, 3, size, size)).shape[-1])
    identity = {
        "weights": compute_weights_hash(network.model),
        "config": parts.config,
        "transform": parts.transform.to_plain(),
        "pooling": network.pooling,
        "dtype": parsed.dtype,
        "code_version": ENCODER_CODE_VERSION,
    }
    description = EncoderDescription(
        name=parsed.name,
        address=address,
        hash=compute_json_hash(identity),
        num_parameters=sum(parameter.numel() for parameter in network.model.parameters()),
        flops_per_image=float(counter.get_total_flops()) or None,
        embed_dim=embed_dim,
        image_size=size,
        pooling=network.pooling,
        training_data=parts.training_data,
        contamination=parts.contamination,
        energy_kwh=parts.facts.energy_kwh if parts.facts else None,
        licence=parts.licence,
    )
    select_attention(network, place, network.num_tokens)
    if not network.is_token_model:
        network.to(memory_format=torch.channels_last)
    return Encoder(
        address=address,
        name=parsed.name,
        module=network.to(place),
        transform=parts.transform,
        dtype=parsed.dtype,
        device=place,
        hash=description.hash,
        card=description,
        facts=parts.facts,
        has_fixed_size=network.is_token_model or parsed.image_size is not None,
    )


def _format_colours(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3f}" for value in values)


def _parse_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is not known; use cpu, cuda or cuda:0") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this machine has no usable GPU; use cpu")
    return place
