"""A learnable temperature that stays within bounds and finds back from them.

log_scale = log(1 / temperature), a parameter  ->  bound_log_scale  ->  the value that a loss uses
"""

import math

from torch import Tensor

MAX_SCALE = 100.0  # as CLIP: beyond it one hard pair decides a step


def bound_log_scale(log_scale: Tensor, *, lowest: float = -math.inf) -> Tensor:
    """Keep exp(log_scale) from exp(lowest) to 100, as open_clip does by setting the parameter back after each step.

    An optimizer that shards its parameters holds its own copy of them, so they cannot be set back here: the value is
    bounded, and a gradient passes unless it pushes further out. (A plain clamp gives no gradient at all outside of the
    bounds: a parameter that once stepped over one never came back.)
    """
    inside = log_scale.detach().clamp(lowest, math.log(MAX_SCALE))
    bounded = log_scale + (inside - log_scale.detach())
    if bounded.requires_grad:
        too_high, too_low = log_scale.detach() > inside, log_scale.detach() < inside
        bounded.register_hook(
            lambda gradient: gradient.masked_fill((too_high & (gradient < 0)) | (too_low & (gradient > 0)), 0.0)
        )
    return bounded
