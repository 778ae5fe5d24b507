"""The encoder: a timm ViT, built from a config, that can look at the visible patches only.

    EncoderConfig  ->  build_vit  ->  timm VisionTransformer or Eva, whose state_dict checkpoints and exports hold
    images [B, 3, H, W], mask [B, num_patches] (True = hidden)  ->  encode_visible  ->  tokens [B, prefix + visible, D]

Prefix tokens are the CLS token and the registers, as far as the model has them. VisionTransformer adds a table of
positions to its patches; Eva, which is timm's class of DINOv3, turns queries and keys by rotary ones.

lightly's MaskedVisionTransformerTIMM does the same work and was not taken: it embeds and normalises every patch before
it drops the hidden ones, fails on grids that are not square and on rotary encoders, owns a mask token that never gets
a gradient here (ZeRO and DDP want one for every parameter), and re-initialises a pretrained encoder unless told not
to. On two CPU cores dropping the patches first halves the cost of the embedding (10.5 against 21.4 ms for 64 images of
128 px).
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import checkpoint, is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.config import config_class
from panfm.errors import UserError

Vit: TypeAlias = VisionTransformer | Eva
MAX_EXPLICIT_TOKENS = 1025  # 32 x 32 patches and CLS: beyond, the gain is not worth the memory of the scores


@config_class
class EncoderConfig:
    """What is pretrained and shipped: a timm model name and what is changed about it."""

    name: str = "vit_small_patch16_224"
    """A timm model of class VisionTransformer (vit_base_patch16_224), or Eva for rotary positions
    (vit_base_patch16_dinov3); its width, depth, heads and prefix tokens come from the name."""
    image_size: int = Field(default=224, gt=0)
    """Height and width of the images in pixels; a multiple of the patch size."""
    patch_size: int | None = Field(default=None, gt=0)
    """Side of a patch in pixels; None: as the name says."""
    num_registers: int | None = Field(default=None, ge=0)
    """Register tokens beside CLS: they take up the outliers that long training writes into patches. None: as named."""
    drop_path_rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of samples that skip the last block's branches (linear over blocks); 0.1 for long runs from Base on."""
    layer_scale: float | None = Field(default=None, gt=0.0)
    """Initial factor of each residual branch (1e-5 to 0.1 steady deep encoders); None: as the name says."""
    grad_checkpointing: bool = False
    """Compute each block again in backward: about a third more time, activations of one block instead of all."""
    init: str | None = None
    """What the run starts from: an encoder address (timm:NAME, hf:DIR, panfm:DIR), or a checkpoint file of MAE, DINOv2,
    DINOv3, PanDerm or timm (.safetensors, or .pth that holds tensors only). None: random, drawn from the run's seed."""
    init_random: tuple[str, ...] = ()
    """Weights that `init` lacks and that may start at random, by name or by a part of it, for example reg_token with
    num_registers, or ls1 and ls2 with layer_scale. Everything else must be in `init`."""


@dataclass(frozen=True)
class TokenSplit:
    """Which patches of each image are visible and which are hidden, as indices in ascending order."""

    visible: Tensor  # int64 [B, num_visible]
    hidden: Tensor  # int64 [B, num_hidden]


def get_timm_kwargs(config: EncoderConfig) -> dict[str, Any]:
    """The arguments with which `timm.create_model(config.name, **kwargs)` builds this encoder (plain JSON values).

    Pooling is the mean of the patch tokens after the final norm whatever the name says: so every parameter that the
    model has is also used in pretraining (no classifier, no pooling head), and the state_dict has the same keys.
    """
    kwargs: dict[str, Any] = {"img_size": config.image_size, "num_classes": 0, "global_pool": "avg"}
    is_eva = is_model_in_modules(config.name, ["eva"])  # the same things, by other names
    if is_eva:
        # Without it, rotary positions are made for one size of image only, and silently used for all.
        kwargs |= {"use_fc_norm": False, "dynamic_img_size": True}
    else:
        kwargs["fc_norm"] = False
    if config.patch_size is not None:
        kwargs["patch_size"] = config.patch_size
    if config.num_registers is not None:
        kwargs["num_reg_tokens" if is_eva else "reg_tokens"] = config.num_registers
    if config.layer_scale is not None:
        kwargs["init_values"] = config.layer_scale
    return kwargs


def build_vit(config: EncoderConfig, seed: int) -> Vit:
    """Build the encoder, the same for the same (config, seed); the global random state is left as it was.

    Its weights are random: where `config.init` is set, `panfm.models.weights.fit_weights` puts the others in.
    Raises UserError for a name that is not a plain timm ViT and a size that patches do not tile.
    """
    if not timm.is_model(config.name):
        near = get_close_matches(config.name, timm.list_models("vit_*"), n=1)
        raise UserError(
            f"encoder.name {config.name!r}: timm {timm.__version__} has no such model; "
            f"{f'did you mean {near[0]}?' if near else 'see timm.list_models()'}"
        )
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed the GPU generators, which fork_rng(devices=[]) does not restore.
        torch.default_generator.manual_seed(seed)
        try:
            vit = timm.create_model(
                config.name, pretrained=False, drop_path_rate=config.drop_path_rate, **get_timm_kwargs(config)
            )
        except (TypeError, AssertionError) as error:  # what timm's other families say to a ViT's arguments
            raise UserError(
                f"encoder.name {config.name!r}: must be a plain timm VisionTransformer or Eva, for example "
                f"vit_small_patch16_224 or vit_small_patch16_dinov3 ({type(error).__name__} when it was built as one: "
                f"{error})"
            ) from None
    if type(vit) not in (VisionTransformer, Eva) or type(vit.patch_embed) is not PatchEmbed:
        raise UserError(
            f"encoder.name {config.name!r} is a {type(vit).__name__} with {type(vit.patch_embed).__name__}; "
            "must be a plain VisionTransformer or Eva with PatchEmbed, for example vit_small_patch16_224"
        )
    side = vit.patch_embed.patch_size[0]
    if config.image_size % side:
        raise UserError(
            f"encoder.image_size ({config.image_size}) must be a multiple of the patch size ({side}); "
            f"try {max(1, round(config.image_size / side)) * side}"
        )
    vit.set_grad_checkpointing(config.grad_checkpointing)
    return vit


def get_patch_grid(vit: Vit) -> tuple[int, int]:
    """Rows and columns of patches at the image size that the encoder was built for."""
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)


def split_mask(mask: Tensor) -> TokenSplit:
    """Turn a mask, bool [B, N] with True = hidden and the same number of True in each row, into indices."""
    counts = mask.sum(dim=1)
    fewest, most = torch.stack(torch.aminmax(counts)).tolist()  # on a GPU the one wait of a step for its input
    assert fewest == most, f"every image must hide the same number of patches, not {fewest} to {most}"
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    num_visible = mask.shape[1] - most
    return TokenSplit(visible=order[:, :num_visible], hidden=order[:, num_visible:])


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather rows: tokens [B, N, D] (or [N, D], the same for every image) at index [B, K] -> [B, K, D].

    An embedding look-up, because it is the fastest of torch's gathers on a CPU (0.9 ms forward and backward where
    take_along_dim takes 2.1 and index_select 1.3) and its backward adds in a fixed order on a GPU.
    """
    if tokens.ndim == 2:
        return F.embedding(index, tokens)
    size, length, width = tokens.shape
    offset = torch.arange(size, device=index.device).unsqueeze(1) * length
    return F.embedding(index + offset, tokens.reshape(size * length, width))


def take_patches(images: Tensor, index: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Cut images [B, C, H, W] into patches and keep those at index [B, K], or all K = N -> [B * K, C, p, p]."""
    batch, channels, height, width = images.shape
    rows, columns = height // size[0], width // size[1]
    patches = images.reshape(batch, channels, rows, size[0], columns, size[1]).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch * rows * columns, channels, *size)
    if index is None:
        return patches
    offset = torch.arange(batch, device=index.device).unsqueeze(1) * (rows * columns)
    return patches.index_select(0, (index + offset).flatten())


def select_attention(blocks: nn.Module, device: torch.device, num_tokens: int) -> None:
    """Choose the faster implementation of attention in timm's blocks: fused on a GPU, explicit on a CPU if short.

    Forward and backward of scaled_dot_product_attention in bfloat16, relative to explicit attention, on one core with
    six heads of 64: 3.9 times the time at 65 tokens, 2.0 at 197, 1.9 at 400, 1.5 at 577 and 1025, 1.1 at 2049.
    """
    fused = device.type != "cpu" or num_tokens > MAX_EXPLICIT_TOKENS
    for module in blocks.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused)  # noqa: B010  mypy sees modules as holding modules only


def encode_visible(
    vit: Vit,
    images: Tensor,
    mask: Tensor | TokenSplit | None,
    normalise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Encode what is visible: the prefix tokens and the visible patches in ascending order, after the final norm.

    images: [B, 3, H, W], normalised; or raw with `normalise`, a function of [*, 3, h, w] that works pixel by pixel and
        is then called for visible patches only. H and W are any multiples of the patch size: for another grid than the
        encoder's own, rotary positions are computed, and a table of positions is resampled (bicubic, antialiased).
    mask: bool [B, num_patches], True = hidden, the same number in every row; or the split that was made of it; or None.
    Returns [B, num_prefix_tokens + num_visible, D]; with mask None it equals `vit.forward_features(images)`.
    """
    size = vit.patch_embed.patch_size
    grid = (images.shape[2] // size[0], images.shape[3] // size[1])
    assert tuple(images.shape[2:]) == (grid[0] * size[0], grid[1] * size[1]), (
        f"images of {tuple(images.shape[2:])} pixels, which patches of {size} do not tile"
    )
    split = split_mask(mask) if isinstance(mask, Tensor) else mask
    visible = None if split is None else split.visible  # [B, V]; None: every patch, V = N
    patches = take_patches(images, visible, size)  # [B * V, 3, p, p]
    if normalise is not None:
        patches = normalise(patches)
    # The convolution of the patch embedding, whose windows do not overlap, as the matrix product that it is.
    projection = vit.patch_embed.proj
    x = F.linear(patches.flatten(1), projection.weight.flatten(1), projection.bias)
    x = vit.patch_embed.norm(x).unflatten(0, (images.shape[0], -1))  # [B, V, D]
    prefix, x = _add_positions(vit, x, grid, visible)
    x = vit.pos_drop(torch.cat([*prefix, x], dim=1))  # [B, prefix + V, D]
    x = vit.norm_pre(x)
    select_attention(vit.blocks, x.device, x.shape[1])
    rotations = _get_rotations(vit, grid, visible)
    for number, block in enumerate(vit.blocks):
        how = {} if rotations is None else {"rope": rotations[number]}
        x = checkpoint(block, x, **how) if vit.grad_checkpointing else block(x, **how)
    tokens: Tensor = vit.norm(x)
    return tokens


def compute_sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position table float32 [rows * columns, width]: sin and cos of the row, then of the column (CAE's order).

    Each half holds sin then cos at width/4 wavelengths from 2 pi to 20000 pi patches. Width must divide by 4.
    """
    assert width % 4 == 0, f"a sine-cosine table needs a width that divides by 4, not {width}"
    frequencies = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def _add_positions(vit: Vit, x: Tensor, grid: tuple[int, int], visible: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Add the table of positions to patches [B, V, D] and, in timm's older layout, to the prefix tokens."""
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    if vit.pos_embed is not None:
        num_rows = 0 if vit.no_embed_class else vit.num_prefix_tokens  # the table starts with a row for each
        table = resample_abs_pos_embed(vit.pos_embed, grid, get_patch_grid(vit), num_prefix_tokens=num_rows)[0]
        if num_rows:
            prefix = [torch.cat(prefix, dim=1) + table[:num_rows]]
        table = table[num_rows:]  # [N, D]
        x = x + (table if visible is None else take_tokens(table, visible))
    return [token.to(x.dtype).expand(x.shape[0], -1, -1) for token in prefix], x


def _get_rotations(vit: Vit, grid: tuple[int, int], visible: Tensor | None) -> list[Tensor] | None:
    """Sine and cosine of the rotary positions of visible patches, for each block; None where there are none.

    Each is [N, 2 d] or, gathered for each image, [B, 1, V, 2 d]; where every block and head has frequencies of its own
    (timm's "mixed"), [heads, N, 2 d] or [B, heads, V, 2 d]. The random shifts of training are drawn once a call.
    """
    if getattr(vit, "rope", None) is None:
        return None
    table = vit.rope.get_embed(shape=list(grid))
    assert table.shape[-2] == grid[0] * grid[1], f"rotary positions for {table.shape[-2]} patches, images have {grid}"
    if vit.rope_mixed:
        return [own if visible is None else own[:, visible].transpose(0, 1) for own in table]
    return [table if visible is None else take_tokens(table, visible).unsqueeze(1)] * len(vit.blocks)
