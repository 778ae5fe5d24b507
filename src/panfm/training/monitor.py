"""Is the encoder still learning many directions, or collapsing onto few? Numbers from its features and its attention.

    images  ->  compute_pooled_features   ->  features [N, D]          ->  RankMe, std ratio, uniformity
            ->  the same of another view  ->  features, row for row    ->  alignment
            ->  compute_attention         ->  attention [N, heads, T]  ->  attention entropy, and a picture of it

The numbers are pure functions of a matrix; watch.py computes them every few steps on images that are trained on.
Compare them within a run and between runs of one recipe, not between methods or batch sizes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfm.models.attention import read_last_attention, select_rows
from panfm.models.vit import Vit, encode_visible

Normalise = Callable[[Tensor], Tensor]
UNIFORMITY_TEMPERATURE = 2.0  # as Wang and Isola use it


def compute_rankme(features: Tensor) -> float | None:
    """Effective rank of features [N, D] (RankMe: Garrido et al. 2023, arXiv:2210.02885), between 1 and min(N, D).

    exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7, s the singular values. None where the features are not
    finite or all zero.
    """
    singular_values = _singular_values(features)
    if singular_values is None or float(singular_values.sum()) == 0.0:
        return None
    shares = singular_values / singular_values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def compute_feature_std_ratio(features: Tensor) -> float | None:
    """Mean over dimensions of the standard deviation of L2-normalised features [N, D], times sqrt(D).

    1 for features spread evenly over the sphere, 0 for a collapse onto one point (Chen and He 2021,
    arXiv:2011.10566, section 4.1). None where the features are not finite.
    """
    if not bool(torch.isfinite(features).all()):
        return None
    return float(_normalise(features).std(dim=0, correction=0).mean() * features.shape[1] ** 0.5)


def compute_alignment(features: Tensor, mates: Tensor) -> float | None:
    """Mean squared distance of L2-normalised features [N, D] to those of another view of the same images [N, D].

    0 where views of one image fall together, 2 where they are as far apart as any two: lower is better, but 0 for all
    is a collapse, which uniformity tells (Wang and Isola 2020, arXiv:2005.10242, with alpha = 2). None where a feature
    is not finite.
    """
    if not bool(torch.isfinite(features).all() and torch.isfinite(mates).all()):
        return None
    return float((_normalise(features) - _normalise(mates)).square().sum(dim=1).mean())


def compute_uniformity(features: Tensor) -> float | None:
    """log of the mean over pairs of exp(-2 |x - y|^2), x and y L2-normalised features out of [N, D].

    0 where all features are one point; -4 is about the least that many dimensions allow: lower is more evenly spread
    (Wang and Isola 2020, arXiv:2005.10242, with t = 2). None for fewer than two features or one that is not finite.
    """
    if len(features) < 2 or not bool(torch.isfinite(features).all()):
        return None
    distances = F.pdist(_normalise(features)).square()  # [N (N - 1) / 2]
    return float((-UNIFORMITY_TEMPERATURE * distances).exp().mean().log())


def compute_attention_entropy(attention: Tensor) -> float | None:
    """Mean over images and heads of the entropy of attention [N, heads, T], divided by log T.

    1 where every token gets the same weight (nothing is looked at), near 0 where one token gets all of it. Training
    that is about to diverge often shows itself here first (Zhai et al. 2023, arXiv:2303.06296). None where it is not
    finite.
    """
    if not bool(torch.isfinite(attention).all()):
        return None
    entropy = torch.special.entr(attention.double()).sum(dim=-1)  # [N, heads]
    return float(entropy.mean() / torch.log(torch.tensor(float(attention.shape[-1]))))


def compute_pooled_features(encoder: Vit, images: Tensor, normalise: Normalise) -> Tensor:
    """Mean patch token of whole images, uint8 [N, 3, H, W] -> float32 [N, D]: what an export gives as its features.

    normalise: from uint8 to what the encoder takes.
    """
    with evaluating(encoder):
        tokens = encode_visible(encoder, images, None, normalise)  # [N, prefix + num_patches, D]
        return tokens[:, encoder.num_prefix_tokens :].mean(dim=1).float()


def compute_attention(encoder: Vit, images: Tensor, normalise: Normalise) -> Tensor:
    """What the last block looks at in whole images, uint8 [N, 3, H, W] -> float32 [N, heads, T] over all T tokens.

    The row of the CLS token, or, where the encoder has none, the mean over the rows of the patches.
    """
    with evaluating(encoder):
        weights = read_last_attention(encoder, lambda: encode_visible(encoder, images, None, normalise))
    return select_rows(weights, encoder.num_prefix_tokens, has_cls=encoder.cls_token is not None)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for the length of a `with`; every part then gets back the mode that it had.

    Compiled blocks run as they are written: hooks would not be seen, and a compilation for a few images is no use.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _normalise(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=1)


def _singular_values(features: Tensor) -> Tensor | None:
    if not bool(torch.isfinite(features).all()):
        return None
    values: Tensor = torch.linalg.svdvals(features.double())
    return values
