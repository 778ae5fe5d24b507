"""What the last block of a ViT looks at: a forward pass in, its attention weights out.

The block's own attention runs a second time, explicitly: so the weights are right for every kind of it (rotary
positions, normalised queries and keys, relative positions), though a fused kernel would not give them away.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def read_last_attention(vit: nn.Module, forward: Callable[[], object]) -> Tensor:
    """Run `forward`, which calls `vit` (timm's ViT, Eva or Beit, in eval mode) once -> weights [N, heads, T, T]."""
    attention: Any = vit.blocks[-1].attn  # type: ignore[index, union-attr]
    seen: dict[str, Any] = {}
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    try:
        forward()
    finally:
        handle.remove()
    # What goes through the dropout behind the softmax are the weights; in eval mode it leaves them alone.
    handle = attention.attn_drop.register_forward_hook(lambda _, args, output: seen.update(weights=output))
    was_fused, attention.fused_attn = attention.fused_attn, False
    try:
        attention(*seen["args"], **seen["kwargs"])
    finally:
        attention.fused_attn = was_fused
        handle.remove()
    weights: Tensor = seen["weights"]
    return weights.float()


def select_rows(weights: Tensor, num_prefix_tokens: int, *, has_cls: bool) -> Tensor:
    """The row of the class token, or without one the mean over the patches' rows: [N, heads, T, T] -> [N, heads, T]."""
    return weights[:, :, 0] if has_cls else weights[:, :, num_prefix_tokens:].mean(dim=2)
