"""Protocol `zero_shot`: classes named in words, for encoders with a text tower; nothing is trained.

    each phrase in each template -> text tower -> mean direction of a class [K, D]
    features [M, D'] -> the tower's space [M, D] -> scale * cosine -> softmax -> scores [M, K]

The embeddings of all prompts of a class are averaged, as CLIP does (Radford et al. 2021, section 3.1.4).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from panfm.config import config_class
from panfm.encoder.text import TextSide
from panfm.evaluation.families import ZeroShotTarget
from panfm.evaluation.protocol import Material, Scored, Trial
from panfm.evaluation.text_tower import load_text_side


@config_class
class ZeroShotConfig:
    """Settings of zero-shot classification; phrases and templates are the card's."""

    variant: str = "default"
    """Name on the board."""


def score_zero_shot(trial: Trial, material: Material, config: ZeroShotConfig) -> Scored:
    """Return probabilities [M, K] for the trial's test part.

    Raises UserError for an encoder without a text tower.
    """
    target = trial.card.target
    assert isinstance(target, ZeroShotTarget)
    text = load_text_side(material.encoder, trial.card.name)
    prompts = [list_prompts(target, name) for name in trial.card.classes]
    classes = np.stack([embed_class(text, of_class) for of_class in prompts])  # [K, D]
    images = text.embed_features(material.features[trial.split.rows[trial.test]])  # [M, D]
    logits = text.scale * (images.astype(np.float64) @ classes.T) + text.bias
    return Scored(
        softmax(logits, axis=1), {"scale": text.scale, "num_prompts": [len(of_class) for of_class in prompts]}
    )


def list_prompts(target: ZeroShotTarget, name: str) -> list[str]:
    """List what a class is called: each of its phrases in each template."""
    return [template.format(phrase) for phrase in target.phrases[name] for template in target.templates]


def embed_class(text: TextSide, prompts: list[str]) -> NDArray[np.float64]:
    """Embed a class as the direction of the mean of its prompts' embeddings: [D], length 1."""
    mean = text.embed_texts(prompts).astype(np.float64).mean(axis=0)
    return np.asarray(mean / max(np.linalg.norm(mean), 1e-12))
