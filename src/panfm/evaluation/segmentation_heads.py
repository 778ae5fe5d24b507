"""The two heads of segmentation: from the frozen maps of places to one logit a structure and place.

    linear   [B, C, h, w]             -> standardised -> 1x1 convolution                                -> [B, O, h, w]
    upernet  4 depths [B, C, h, w]    -> 1x1 -> pyramid pooling of the deepest -> top-down sums -> 3x3  -> [B, O, g, g]

The first says what a place's own feature knows, and is the ranked one. The second is the head of UPerNet (Xiao et al.
2018, arXiv 1807.10221) with few channels, what a user would train on top.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLED_SIDES = (1, 2, 3, 6)  # of the pyramid pooling (PSPNet, Zhao et al. 2017)
GROUPS = 8  # of the norms: batches are small, so norms over the batch would differ between training and test


class LinearHead(nn.Module):
    """A linear classifier of each place; features are standardised by their mean and spread in training."""

    def __init__(self, num_channels: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        (channels,) = num_channels
        self.standardise = build_standardiser(channels)
        self.classify = nn.Conv2d(channels, num_outputs, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One map [B, C, h, w] -> logits [B, O, h, w]."""
        (values,) = maps
        return self.classify(self.standardise(values))  # type: ignore[no-any-return]


class PyramidHead(nn.Module):
    """UPerNet's head with `width` channels; all depths meet on a grid of `side` x `side` places."""

    def __init__(self, num_channels: Sequence[int], num_outputs: int, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.lateral = nn.ModuleList(
            nn.Sequential(build_standardiser(channels), _build_layer(channels, width, 1)) for channels in num_channels
        )
        self.pooled = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in POOLED_SIDES)
        self.deepest = _build_layer(width * (1 + len(POOLED_SIDES)), width, 3)
        self.smooth = nn.ModuleList(_build_layer(width, width, 3) for _ in num_channels[:-1])
        self.fuse = _build_layer(width * len(num_channels), width, 3)
        self.classify = nn.Conv2d(width, num_outputs, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C, h, w], shallow to deep -> logits [B, O, side, side]."""
        levels = [lateral(values) for lateral, values in zip(self.lateral, maps, strict=True)]  # [B, width, h, w]
        deepest = levels[-1]
        context = [
            _resize(pool(F.adaptive_avg_pool2d(deepest, side)), deepest.shape[-1])
            for side, pool in zip(POOLED_SIDES, self.pooled, strict=True)
        ]
        above = self.deepest(torch.cat([deepest, *context], dim=1))
        outputs = [_resize(above, self.side)]
        for level, smooth in zip(reversed(levels[:-1]), reversed(self.smooth), strict=True):
            above = level + _resize(above, level.shape[-1])
            outputs.append(smooth(_resize(above, self.side)))
        return self.classify(self.fuse(torch.cat(outputs, dim=1)))  # type: ignore[no-any-return]


def build_standardiser(channels: int) -> nn.BatchNorm2d:
    """Subtract the mean, divide by the spread: of the batch in training, of all batches together (not the last few)
    afterwards. The features are frozen, so both are the same but for chance.
    """
    return nn.BatchNorm2d(channels, affine=False, momentum=None)


def _build_layer(num_in: int, num_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(GROUPS, num_out), nn.ReLU()
    )


def _resize(values: Tensor, side: int) -> Tensor:
    if values.shape[-1] == side:
        return values
    return F.interpolate(values, (side, side), mode="bilinear", align_corners=False)
