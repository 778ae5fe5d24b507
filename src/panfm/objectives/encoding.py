"""Each view that an objective asks for, encoded once: by the student or by the teacher, whole or with patches hidden.

    Batch, ViewKeys  ->  encode_views  ->  {ViewKey: EncodedView}

Views of one size that are seen in the same way go through the encoder together: two views of 64 images are one pass of
128. What that costs in memory is the same (all is kept until backward), and short sequences fill the device better.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfm.data.batch import Batch
from panfm.models.vit import TokenSplit, Vit, encode_visible, split_mask
from panfm.objectives.interface import EncodedView, ViewKey
from panfm.objectives.targets import NORM_EPS, widen

Normalise = Callable[[Tensor], Tensor]


def encode_views(
    batch: Batch,
    keys: Iterable[ViewKey],
    student: Vit,
    normalise: Normalise,
    *,
    teacher: Vit | None = None,
    mask_token: Tensor | None = None,
) -> dict[ViewKey, EncodedView]:
    """Encode every view of `batch` that `keys` name, each once.

    normalise: from uint8 to what the encoder takes, pixel by pixel. teacher: needed where a key names it; mask_token
    [D]: needed where a key asks for patches to be replaced.
    """
    groups: dict[tuple[object, ...], list[ViewKey]] = {}
    for key in dict.fromkeys(keys):
        groups.setdefault((key._replace(view=0), batch.views[key.view].shape), []).append(key)
    encoded: dict[ViewKey, EncodedView] = {}
    for group in groups.values():
        encoded |= _encode_alike(batch, group, student, normalise, teacher, mask_token)
    return encoded


def _encode_alike(
    batch: Batch,
    keys: list[ViewKey],
    student: Vit,
    normalise: Normalise,
    teacher: Vit | None,
    mask_token: Tensor | None,
) -> dict[ViewKey, EncodedView]:
    """Encode views of one size, [V, B, 3, H, W], in one pass; `keys` differ in the number of the view only."""
    key, views, size = keys[0], [batch.views[key.view] for key in keys], batch.size
    images = views[0] if len(views) == 1 else torch.cat(views)  # [V * B, 3, H, W]
    mask = None
    if key.masked and batch.masks is not None:
        mask = torch.cat([batch.masks[key.view] for key in keys])  # [V * B, N]

    splits: list[TokenSplit | None] = [None] * len(keys)
    hidden: list[Tensor | None] = [None] * len(keys)
    if key.encoder == "teacher":
        assert teacher is not None, f"{key} without a teacher"
        assert mask is None, f"{key}: the teacher sees whole views"
        tokens = encode_by_teacher(teacher, images, normalise, key.num_blocks)
    elif key.replaced and mask is not None:
        assert mask_token is not None, f"{key} without a mask token"
        # Before the encoder is put to work: on a GPU each of these waits for all that was asked of it before.
        hidden = [part.flatten().nonzero().squeeze(1) for part in mask.split(size)]
        tokens = encode_replaced(student, images, mask, mask_token, normalise)
    else:
        split = None if mask is None else split_mask(mask)
        if split is not None:
            halves = zip(split.visible.split(size), split.hidden.split(size), strict=True)
            splits = [TokenSplit(visible=visible, hidden=left_out) for visible, left_out in halves]
        tokens = encode_visible(student, images, split, normalise)
    parts = zip(keys, views, tokens.split(size), splits, hidden, strict=True)
    return {key: EncodedView(own, part, student.num_prefix_tokens, split, at) for key, own, part, split, at in parts}


@torch.no_grad()
def encode_by_teacher(vit: Vit, images: Tensor, normalise: Normalise | None, num_blocks: int = 0) -> Tensor:
    """Encode whole images [B, 3, H, W] without gradient -> [B, prefix + N, D].

    num_blocks: 0 gives the tokens after the final norm. K > 0 gives data2vec's target (Baevski et al., ICML 2022): the
    mean of the outputs of the last K blocks, each layer-normalised without weights so that none outweighs the others,
    and that mean layer-normalised again; at least float32.
    """
    if not num_blocks:
        return encode_visible(vit, images, None, normalise)
    outputs: list[Tensor] = []
    blocks = list(vit.blocks)[-num_blocks:]
    handles = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in blocks]
    try:
        encode_visible(vit, images, None, normalise)
    finally:
        for handle in handles:
            handle.remove()
    assert len(outputs) == num_blocks, (len(outputs), num_blocks)
    width = (outputs[0].shape[-1],)
    with torch.autocast(images.device.type, enabled=False):
        total = torch.stack([F.layer_norm(widen(output), width, eps=NORM_EPS) for output in outputs]).sum(dim=0)
        return F.layer_norm(total / num_blocks, width, eps=NORM_EPS)


def encode_replaced(vit: Vit, images: Tensor, mask: Tensor, mask_token: Tensor, normalise: Normalise | None) -> Tensor:
    """Encode every place of images [B, 3, H, W], with `mask_token` [D] for the patches where mask [B, N] is True.

    The token takes the place of the embedded patch, before the position is added (BEiT, iBOT, DINOv2). Rows may hide
    different numbers of patches. Returns [B, prefix + N, D].
    """
    places = mask.flatten().unsqueeze(1)  # [B * N, 1]
    seen: list[torch.Size] = []

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        seen.append(embedded.shape)
        return torch.where(places, mask_token.to(embedded.dtype), embedded)

    # The last module that embedded patches pass before positions are added.
    handle = vit.patch_embed.norm.register_forward_hook(replace)
    try:
        tokens = encode_visible(vit, images, None, normalise)
    finally:
        handle.remove()
    assert seen == [(places.shape[0], mask_token.shape[-1])], f"{seen} embedded for a mask of {tuple(mask.shape)}"
    return tokens
