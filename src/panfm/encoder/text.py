"""The text side of an export: what naming classes in words, or searching by words, needs beside the encoder.

    checkpoint/text.safetensors, EncoderFacts.config  ->  export_text  ->  DIR/text/{model.safetensors, config.json}
    DIR  ->  load_text  ->  TextSide: texts -> embeddings; the encoder's features -> embeddings; compared by cosine

A run with an image_text objective has it; of several the first is taken. The weights are those of the last step also
where the exported encoder is a moving average of it, which the map of its features then was not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save

from panfm.config import to_plain, validate
from panfm.data.captions import TokenizerConfig, tokenise
from panfm.encoder.facts import EncoderFacts
from panfm.encoder.weights import load_strictly, read_weights
from panfm.errors import UserError
from panfm.files import read_json, write_bytes, write_json
from panfm.objectives.image_text import ImageText, ImageTextConfig

FOLDER = "text"  # of an export
FORMAT = 1
TOKENIZER = "clip"  # open_clip's SimpleTokenizer: byte pairs, 49,408 ids
# A module's name here, and the same in the file: there the tower bears the names of open_clip's CustomTextCLIP.
_OURS, _THEIRS = "text.network.", "text."


@dataclass(frozen=True, eq=False)
class TextSide:
    """Texts and images in one space. The score of a pair is scale * cosine + bias; bias is 0 for CLIP."""

    objective: ImageText
    tokenizer: TokenizerConfig
    scale: float
    bias: float

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed N texts -> float32 [N, D] of length 1; a blank one is a UserError."""
        if blank := [number for number, text in enumerate(texts) if not text.strip()]:
            raise UserError(f"text {blank[0]} is blank; give each class or query in words")
        return F.normalize(self.objective.text(tokenise(texts, self.tokenizer)).float(), dim=1).numpy()

    @torch.inference_mode()
    def embed_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bring the encoder's features [N, embed_dim], as `Encoder.embed` gives them, there -> [N, D] of length 1."""
        return F.normalize(self.objective.project(torch.from_numpy(features)).float(), dim=1).numpy()


def export_text(weights: Path, facts: EncoderFacts, embed_dim: int, out: Path) -> None:
    """Write the export folder `out`/text from a checkpoint's text.safetensors, and read it back.

    Raises UserError where the weights are not those of the config's objective, or open_clip is not installed.
    """
    config = next(
        validate(ImageTextConfig, values, str(weights))
        for values in facts.config["objectives"]
        if values["kind"] == "image_text"
    )
    config = replace(config, text=replace(config.text, init=None))  # they are in the file
    folder = out / FOLDER
    folder.mkdir()
    tensors = read_weights(weights)
    write_bytes(
        folder / "model.safetensors", save({name.replace(_OURS, _THEIRS): value for name, value in tensors.items()})
    )
    values = {"format": FORMAT, "tokenizer": TOKENIZER, "embed_dim": embed_dim, "objective": to_plain(config)}
    write_json(folder / "config.json", values)
    load_text(out)


def load_text(export: str | Path) -> TextSide:
    """Load the text side of an export folder, on the CPU.

    Raises UserError: an export without one, damaged files, another format, open_clip missing.
    """
    folder = Path(export).expanduser() / FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{export}: has no {FOLDER}/config.json, so it was trained without texts; take an export of a run with an "
            "image_text objective"
        )
    values = read_json(folder / "config.json")
    found = (values.get("format"), values.get("tokenizer")) if isinstance(values, dict) else None
    if found != (FORMAT, TOKENIZER):
        raise UserError(
            f"{folder / 'config.json'}: format and tokenizer are {found}; this panfm reads {(FORMAT, TOKENIZER)}: use "
            "the panfm that wrote it"
        )
    config = validate(ImageTextConfig, values["objective"], str(folder / "config.json"))
    with torch.random.fork_rng(devices=[]):
        objective = ImageText(config, values["embed_dim"]).eval().requires_grad_(False)
    file = folder / "model.safetensors"
    weights = {
        f"{_OURS}{name.removeprefix(_THEIRS)}" if name.startswith(_THEIRS) else name: value
        for name, value in read_weights(file).items()
    }
    load_strictly(objective, weights, str(file))
    bias = 0.0 if objective.bias is None else float(objective.bias)
    tokenizer = TokenizerConfig(context_length=config.text.context_length)
    return TextSide(objective, tokenizer, scale=float(objective.log_scale.exp().clamp(max=100.0)), bias=bias)
