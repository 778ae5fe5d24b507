"""The text tower: CLIP's text transformer, from open_clip, with the tokenizer that ships with it.

    token ids int64 [B, L]  ->  TextTower  ->  embeddings [B, output_dim]

It stands on the encoder's other side during pretraining and may be exported beside it. Weights are random or come from
a local safetensors file in one of open_clip's layouts; nothing is ever downloaded. open_clip is the extra `text`,
imported when a tower is built.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from panfm.config import config_class
from panfm.errors import UserError

VOCABULARY_SIZE = 49408  # of CLIP's byte-pair encoding; its last id ends a text
PREFIX = "text."  # of the tower's weights in open_clip's layout of two towers
# What a file of a whole CLIP, and the text side of an export of ours, holds besides the tower.
OTHER_WEIGHTS = ("visual.", "logit_scale", "logit_bias", "project.", "log_scale", "bias")


@config_class
class TextConfig:
    """The text tower. The defaults are CLIP's beside a ViT-B (Radford et al., ICML 2021)."""

    width: int = Field(default=512, ge=1)
    """Width of its tokens; a multiple of `heads`."""
    layers: int = Field(default=12, ge=1)
    """Number of blocks."""
    heads: int = Field(default=8, ge=1)
    """Attention heads."""
    context_length: int = Field(default=77, ge=3)
    """Longest text in tokens, with its start and its end; what is longer is cut."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """quick_gelu is x * sigmoid(1.702 x), with which OpenAI's weights were trained: it must be named for them."""
    init: str | None = None
    """Local .safetensors file whose weights it starts from: a text tower alone, a whole CLIP of open_clip's, or an
    export's text/model.safetensors. None: random, drawn from the run's seed."""


class TextTower(nn.Module):
    """CLIP's text transformer: causal attention; the embedding is read off the token that ends the text.

    network: open_clip's TextTransformer, under whose names the weights are exported.
    """

    def __init__(self, config: TextConfig, output_dim: int) -> None:
        super().__init__()
        try:
            from open_clip.transformer import QuickGELU, TextTransformer
        except ImportError:
            raise UserError(
                'a text tower needs open_clip, which is not installed; run pip install "panfm[text]"'
            ) from None
        if config.width % config.heads:
            raise UserError(
                f"text.width ({config.width}) must be a multiple of text.heads ({config.heads}); "
                f"try {-(-config.width // config.heads) * config.heads}"
            )
        self.network = TextTransformer(
            context_length=config.context_length,
            vocab_size=VOCABULARY_SIZE,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=output_dim,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, L], L at most context_length -> embeddings [B, output_dim], not normalised.

        The numbers are those of `network(tokens)`, which wants every text padded to context_length: attention is
        causal, so what would stand behind the longest text of a batch changes nothing and is left out here.
        """
        network, length = self.network, tokens.shape[1]
        x = network.token_embedding(tokens) + network.positional_embedding[:length]  # [B, L, width]
        x = network.ln_final(network.transformer(x, attn_mask=network.attn_mask[:length, :length]))
        ends = tokens.argmax(dim=1)  # the end has the largest id
        embeddings: Tensor = x[torch.arange(len(x), device=x.device), ends] @ network.text_projection
        return embeddings


def build_text_tower(config: TextConfig, output_dim: int) -> TextTower:
    """Build the tower, from `config.init` or at random from torch's default generator.

    Raises UserError without open_clip, for heads that do not divide the width, and for a file that is missing, no
    safetensors file, or not that of such a tower.
    """
    tower = TextTower(config, output_dim)
    if config.init is not None:
        path = Path(config.init).expanduser()
        load_text_weights(tower, _read_weights(path), str(path))
    return tower


def load_text_weights(tower: TextTower, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights of one of open_clip's layouts into the tower; any that is missing or left over is a UserError.

    The layouts: a TextTransformer's own names; the same under "text."; and those names beside "visual." and the scale,
    as files of CLIP have them.
    """
    found = {name: tensor for name, tensor in weights.items() if not name.startswith(OTHER_WEIGHTS)}
    if any(name.startswith(PREFIX) for name in found):
        found = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    wanted = tower.network.state_dict()
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unknown to the tower" for name in found if name not in wanted]
    faults += [
        f"{name} is {tuple(tensor.shape)} where the tower has {tuple(wanted[name].shape)}"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(
            f"{where}: {faults[0]}{more}; text.width, layers and context_length and the objective's output_dim must be "
            "those that the weights were trained with"
        )
    tower.network.load_state_dict(found)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise UserError(
            f"text.init {path}: must be a local .safetensors file; convert another one with "
            "safetensors.torch.save_file where you trust it"
        )
    if not path.is_file():
        raise UserError(f"text.init {path}: no such file; nothing is downloaded, so put the weights there")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"text.init {path}: damaged or not a safetensors file ({error}); copy it again") from None
