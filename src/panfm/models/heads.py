"""What stands on the encoder during pretraining and is thrown away afterwards.

    tokens [B, prefix + visible, D]  ->  Decoder         ->  hidden patches [B, hidden, values]      (pixels)
                                     ->  Regressor       ->  hidden tokens  [B, hidden, width]       (latents)
    tokens [B, N, D]                 ->  TokenHead       ->  predictions    [B, N, output_dim]
    pooled [B, D]                    ->  ProjectionHead  ->  embeddings     [B, output_dim]

Decoder and Regressor keep tokens in the order [prefix, visible, hidden] and look positions up by index. Attention does
not care about the order, so nothing is put back into the grid and cut out again. For that reason lightly's
MaskedVisionTransformerDecoderTIMM was not taken: it wants the whole grid in its place, and a square one.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from panfm.models.vit import MAX_EXPLICIT_TOKENS, TokenSplit, compute_sincos_positions, select_attention, take_tokens

_Norm = partial(nn.LayerNorm, eps=1e-6)  # as in MAE, CAE and timm's ViTs; torch's default of 1e-5 changes the numbers


class Decoder(nn.Module):
    """MAE's decoder: self-attention over encoded visible tokens and mask tokens, then one linear map to pixels.

    He et al., "Masked autoencoders are scalable vision learners", CVPR 2022. Positions are fixed sine-cosine; prefix
    tokens have none. Only hidden patches are predicted, since the loss looks at no others.
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
        hidden = self.mask_token + take_tokens(self.positions, split.hidden)
        x = torch.cat([x[:, :num_prefix].to(visible.dtype), visible, hidden], dim=1)  # [B, prefix + N, width]
        select_attention(self.blocks, x.device, x.shape[1])
        x = self.blocks(x)[:, x.shape[1] - num_hidden :]
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
