"""Floating-point operations of what a model does, counted and not computed.

    function that calls a model (forward, backward, losses)  ->  count_flops  ->  multiplications and additions

Every matrix product and convolution is counted where it happens, so the count holds for whatever the code does: hidden
patches that are left out, a teacher beside the student, blocks that are computed again in backward. Nothing is
computed in floating point: a product gives memory of the right shape that is never filled, so a ViT-Large counts in a
second on a laptop. Indices and masks are computed as ever, because the number of tokens follows from them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
# torch's table leaves out the fused attention of CPUs, whose arguments are those of the GPU's.
FORMULAS = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


def count_flops(function: Callable[[], object]) -> int:
    """Count the operations of `function()`, multiplications and additions apart; floats in it mean nothing.

    Its tensors live on the CPU; parameters need no values, `module.to_empty(device="cpu")` of one built on the meta
    device will do. Elementwise operations, norms and softmax are not counted: of a ViT's operations they are some 2 %,
    and published counts and peak rates leave them out too.
    """
    with _ShapesOnly() as counter:
        function()
    return int(counter.total)


class _ShapesOnly(TorchDispatchMode):
    """Runs operations on integers and truth values, and gives unfilled memory for those on floats."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0
        self._shapes: dict[Any, Any] = {}  # what an operation makes of which shapes: the blocks of a ViT are alike

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # in inference mode a linear layer arrives whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = self._imitate(func, args, kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result

    def _imitate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func` where it is of integers, a view, or written in place; else memory of its shapes."""
        leaves, structure = tree_flatten((args, kwargs))
        makes_memory = not (func.is_view or func._schema.is_mutable or "device" in kwargs)
        if not makes_memory or not any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
            return func(*args, **kwargs)
        key = (func, str(structure), *(_describe(leaf) for leaf in leaves))
        if key not in self._shapes:
            self._shapes[key] = _plan(func, args, kwargs)
        planned = self._shapes[key]
        if planned is None:
            return func(*args, **kwargs)
        return tree_map(_make_memory, planned)


def _describe(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)


def _plan(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives on the meta device; None where it gives integers, or needs to see the values for its shape."""
    meta_args, meta_kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        planned = func(*meta_args, **meta_kwargs)
    except (RuntimeError, NotImplementedError):
        return None
    floats = all(leaf.is_floating_point() for leaf in tree_leaves(planned) if isinstance(leaf, Tensor))
    return planned if floats else None


def _make_memory(leaf: Any) -> Any:
    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf
