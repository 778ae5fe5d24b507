"""What stands on the encoder during pretraining and is thrown away afterwards.

    tokens [B, prefix + visible, D]  ->  Decoder         ->  hidden patches [B, hidden, values]      (pixels)
                                     ->  Regressor       ->  hidden tokens  [B, hidden, width]       (latents)
    tokens [B, N, D]                 ->  TokenHead       ->  predictions    [B, N, output_dim]
    pooled [B, D]                    ->  ProjectionHead  ->  embeddings     [B, output_dim]
    tokens [n, D]                    ->  PrototypeHead   ->  logits         [n, num_prototypes]

Decoder and Regressor keep tokens in the order [prefix, visible, hidden] and look positions up by index. Attention does
not care about the order, so nothing is put back into the grid and cut out again. For that reason lightly's
MaskedVisionTransformerDecoderTIMM was not taken: it wants the whole grid in its place, and a square one.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from panfm.models.vit import MAX_EXPLICIT_TOKENS, TokenSplit, compute_sincos_positions, take_tokens

_Norm = partial(nn.LayerNorm, eps=1e-6)  # as in MAE, CAE and timm's ViTs; torch's default of 1e-5 changes the numbers


class Decoder(nn.Module):
    """MAE's decoder: self-attention over encoded visible tokens and mask tokens, then one linear map to pixels.

    He et al., "Masked autoencoders are scalable vision learners", CVPR 2022. Positions are fixed sine-cosine; prefix
    tokens have none. Only hidden patches are predicted, since the loss looks at no others.

    What does not depend on the image, or reaches no prediction, is left out; the mathematics is that of the whole. A
    mask token at a position is the same in every image, so the first block maps each to queries, keys and values once
    for the batch; in the last block only hidden tokens ask. With one block of width 512 at 14 x 14 patches, 75 %
    hidden, that is a third of the decoder's operations.
    """

    positions: Tensor

    def __init__(
        self, input_dim: int, width: int, depth: int, num_heads: int, output_dim: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(input_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", compute_sincos_positions(grid, width), persistent=False)  # [N, width]
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=True, norm_layer=_Norm) for _ in range(depth)))
        self.norm = _Norm(width)
        self.predict = nn.Linear(width, output_dim)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, split: TokenSplit) -> Tensor:
        """tokens [B, prefix + visible, input_dim] -> predictions for split.hidden [B, hidden, output_dim]."""
        num_prefix, num_hidden = tokens.shape[1] - split.visible.shape[1], split.hidden.shape[1]
        x = self.embed(tokens)
        visible = x[:, num_prefix:] + take_tokens(self.positions, split.visible)
        seen = torch.cat([x[:, :num_prefix].to(visible.dtype), visible], dim=1)  # [B, prefix + visible, width]
        blank = self.mask_token[0] + self.positions  # [N, width]: what hidden patches begin as, in every image
        x = torch.cat([seen, spread_rows(blank, split.hidden)], dim=1)  # [B, prefix + N, width]
        block: Any  # a timm Block, run by its parts
        for number, block in enumerate(self.blocks):
            attention = block.attn
            if number == 0:
                hidden = spread_rows(attention.qkv(block.norm1(blank)), split.hidden)
                qkv = torch.cat([attention.qkv(block.norm1(seen)), hidden], dim=1)
            else:
                qkv = attention.qkv(block.norm1(x))
            q, k, v = qkv.chunk(3, dim=-1)  # [B, prefix + N, width] each
            if number == len(self.blocks) - 1:
                first_hidden = x.shape[1] - num_hidden
                x, q = x[:, first_hidden:], q[:, first_hidden:]  # [B, hidden, width]
            x = x + attention.proj(compute_attention(q, k, v, attention.num_heads))
            x = x + block.mlp(block.norm2(x))
        predictions: Tensor = self.predict(self.norm(x))
        return predictions


class Regressor(nn.Module):
    """CAE v2's regressor: mask queries read the latents of hidden patches off the encoded visible ones.

    Zhang et al., "CAE v2: context autoencoder with CLIP latent alignment", TMLR 2023. A chain of cross-attention blocks
    whose keys and values are [visible, current hidden]; prefix tokens take no part. With another width than the
    encoder's, all tokens are first mapped to it (linear, norm), prefix tokens too, because one head serves all.
    """

    positions: Tensor

    def __init__(
        self, input_dim: int, width: int, depth: int, num_heads: int, layer_scale: float, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.embed = nn.Identity() if width == input_dim else nn.Sequential(nn.Linear(input_dim, width), _Norm(width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", compute_sincos_positions(grid, width), persistent=False)  # [N, width]
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, num_heads, layer_scale) for _ in range(depth))
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, split: TokenSplit) -> Tensor:
        """tokens [B, prefix + visible, input_dim] -> [B, prefix + visible + hidden, width], in that order."""
        num_prefix = tokens.shape[1] - split.visible.shape[1]
        x = self.embed(tokens)
        visible = x[:, num_prefix:]
        query_positions = take_tokens(self.positions, split.hidden)  # [B, H, width]
        key_positions = torch.cat([take_tokens(self.positions, split.visible), query_positions], dim=1)  # [B, N, width]
        hidden = self.mask_token.to(x.dtype).expand(*split.hidden.shape, -1)
        for block in self.blocks:
            hidden = block(hidden, visible, query_positions, key_positions)
        return torch.cat([x, hidden.to(x.dtype)], dim=1)


class CrossAttentionBlock(nn.Module):
    """One block of the regressor, with the published code's residual kept as it is.

        x = q + scale_1 * attention(norm_q(q + pos_q), norm_k(kv + pos_k), norm_v(kv))
        x = norm_2(x)
        x = x + scale_2 * mlp(x)

    The second residual starts from the normalised x, not from x: unusual, but it is what the numbers of CAE v2 and
    PanDerm were made with, and it is checked against the original. Positions enter queries and keys, never values.
    """

    def __init__(self, width: int, num_heads: int, layer_scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_k, self.norm_v = _Norm(width), _Norm(width), _Norm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.scale_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm_2 = _Norm(width)
        self.mlp = Mlp(width, 4 * width)
        self.scale_2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, hidden: Tensor, visible: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """hidden [B, H, width], visible [B, V, width], positions [B, H or V + H, width] -> hidden [B, H, width]."""
        context = torch.cat([visible, hidden], dim=1)
        q = self.q(self.norm_q(hidden + query_positions))
        k = self.k(self.norm_k(context + key_positions))
        v = self.v(self.norm_v(context))
        x = hidden + self.scale_1 * self.projection(compute_attention(q, k, v, self.num_heads))
        x = self.norm_2(x)
        result: Tensor = x + self.scale_2 * self.mlp(x)
        return result


class TokenHead(nn.Module):
    """Norm and one linear map, shared by every token that is aligned with a target."""

    def __init__(self, width: int, output_dim: int) -> None:
        super().__init__()
        self.norm = _Norm(width)
        self.linear = nn.Linear(width, output_dim)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, output_dim]."""
        predictions: Tensor = self.linear(self.norm(tokens))
        return predictions


class ProjectionHead(nn.Module):
    """Two-layer perceptron before a contrastive loss.

    lightly's SimCLRProjectionHead has batch norm: it fails on a batch of one, and couples ranks through statistics that
    are not gathered. A layer norm does the same service here.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), _Norm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, output_dim)
        )
        self.apply(_initialise)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, input_dim] -> [B, output_dim], not normalised."""
        embeddings: Tensor = self.layers(pooled)
        return embeddings


class PrototypeHead(nn.Module):
    """DINO's head: a perceptron of three layers, then the cosines with prototypes.

    Caron et al., ICCV 2021. The prototypes keep the length 1, DINO's own default and its stable choice; DINOv2 learns
    their lengths. The cosines are computed in float32 whatever the autocast: they are divided by some hundredths, which
    makes 0.05 in the exponent of the rounding of a cosine to bfloat16.

    lightly's DINOv2ProjectionHead was not taken: its deprecated weight norm warns, keeps a computed tensor among its
    attributes that cannot be copied for the teacher, and its cosines follow the autocast.
    """

    def __init__(self, input_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        # At DINO's widths this is close to its deviation of 0.02. In a narrow head, 0.02 would leave next to nothing of
        # the input, and the division by its length would make the gradients a thousand times as large.
        self.layers.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, input_dim] -> logits [n, num_prototypes] between -1 and 1, at least float32."""
        x = self.layers(tokens)  # [n, bottleneck_dim]
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
            return F.linear(x, F.normalize(self.prototypes.weight, dim=-1))


def spread_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table that all images share, [N, D], at index [B, K] -> [B, K, D].

    In backward the rows' gradients are summed over the images, in float32 at least: an embedding's own sum on a CPU
    would round after every image.
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    return take_tokens(wide, index).to(table.dtype)


def compute_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention of q [B, Q, D] on k, v [B, K, D] -> [B, Q, D], by the rule of `select_attention`."""
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, Q or K, D / heads]
    if q.device.type == "cpu" and k.shape[2] <= MAX_EXPLICIT_TOKENS:
        x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v)
    result: Tensor = x.transpose(1, 2).flatten(2)
    return result


def _initialise(module: nn.Module) -> None:
    """Xavier for linear maps, zero for biases, as MAE does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
