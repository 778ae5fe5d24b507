"""PanDerm's published files: their names for a ViT's weights in, a timm model that computes the same out.

    state_dict, with `encoder.` before every key (Large) or without (Base)  --convert_panderm-->  VisionTransformer
    a fine-tuned one, with tables of relative positions                     ------------------>  Beit
    DermLIP's, `visual.` before every key of the tower                      ------------------>  + a norm, a projection

Read from SiyuanYan1/PanDerm @ 97e09d0, classification/models/modeling_finetune.py; `tests/golden/panderm_vit` holds
what that module computes. There, loading forgives everything: a prefixed file into the Base loader loads nothing, and
says nothing. Here a weight that is missing, unknown or of another shape is an error.

Which feature: a file with `norm` is read by its class token after that norm, as the publication's linear probe does;
pooling=mean takes the mean of the patch tokens and puts the same norm behind it, as its fine-tuning does. A fine-tuned
file has `fc_norm` and is read by the mean. The publication's `lin_probe=True, use_mean_pooling=True` returns a class
token without any norm: a slip, which no option here repeats. DermLIP reads the mean of the patch tokens, puts the final
norm behind it a second time and projects it: the feature is that projection, which texts are compared with.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.encoder.facts import Pooling
from panfm.encoder.weights import load_strictly
from panfm.errors import UserError

HEAD_WIDTH = 64  # of every published size: 12 heads of Base's 768, 16 of Large's 1024
PREFIX = "encoder."
VISUAL = "visual."  # DermLIP's tower among the weights of its texts
TABLE = "attn.relative_position_bias_table"
INDEX = "attn.relative_position_index"  # computed; a file may hold it
# Of the transform of its linear probe: the first is 0.228, where everybody else has ImageNet's 0.229.
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
IMAGE_SIZE, RESIZE_SIZE = 224, 256  # pixels
LICENCE = "CC BY-NC-ND 4.0"
TRAINING_DATA = "PanDerm's archive: 2.1 million skin images of 11 institutions, not public"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class PandermShape:
    """The architecture as the file's own weights tell it."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int  # pixels
    image_size: int  # pixels
    hidden_dim: int  # of the MLPs
    has_relative_positions: bool


def convert_panderm(
    weights: Mapping[str, Tensor], where: str, *, pooling: Pooling | None = None, num_heads: int | None = None
) -> tuple[nn.Module, Pooling, PandermShape]:
    """Build the timm model of a PanDerm state_dict and put the weights into it: model, its pooling, its shape.

    pooling: None reads the file as it was published. num_heads: None takes heads of 64, as all published sizes have.

    Raises UserError for a file that is no PanDerm ViT, or not whole.
    """
    given = strip_prefix(weights)
    shape = read_shape(given, where, num_heads)
    if any(name.startswith(VISUAL) for name in weights):
        return _convert_dermlip(given, shape, where, pooling)
    is_tuned = "fc_norm.weight" in given
    pooling = pooling or ("mean" if is_tuned else "cls")
    if pooling not in ("cls", "mean"):
        raise UserError(f"{where}: pooling ({pooling}) must be cls or mean: PanDerm was published with these two")
    if is_tuned and pooling == "cls":
        raise UserError(
            f"{where}: fine-tuned with the mean of its patch tokens (fc_norm), its class token was never read; leave "
            "out ?pooling="
        )
    given = {name: tensor for name, tensor in given.items() if not name.endswith(INDEX)}
    if pooling == "mean":
        given = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in given.items()}
    model = _build(shape, pooling)
    load_strictly(model, given if shape.has_relative_positions else _rename(given), where, ignore=("head",))
    return model, pooling, shape


def _convert_dermlip(
    given: Mapping[str, Tensor], shape: PandermShape, where: str, pooling: Pooling | None
) -> tuple[nn.Module, Pooling, PandermShape]:
    """PanDerm's ViT as DermLIP's vision tower: modeling_finetune.py of Derm1M, its `norm` used twice, then its head."""
    if pooling not in (None, "mean"):
        raise UserError(f"{where}: pooling ({pooling}) must be mean: DermLIP's projection was trained behind it")
    if shape.has_relative_positions:
        raise UserError(f"{where}: a tower with tables of relative positions, which DermLIP's has not")
    if missing := [name for name in ("norm.weight", "norm.bias", "head.weight") if name not in given]:
        raise UserError(f"{where}: {', '.join(missing)} missing; DermLIP's tower ends in a norm and a projection")
    num_features, bias = int(given["head.weight"].shape[0]), "head.bias" in given
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(**_list_arguments(shape, "avg"), fc_norm=False)
        norm = LayerNorm(shape.embed_dim, eps=1e-6)
        model.fc_norm = nn.Sequential(norm, nn.Linear(shape.embed_dim, num_features, bias=bias))
    renamed = _rename(given)
    renamed |= {f"fc_norm.0.{kind}": renamed[f"norm.{kind}"] for kind in ("weight", "bias")}
    renamed = {re.sub(r"^head\.", "fc_norm.1.", name): tensor for name, tensor in renamed.items()}
    load_strictly(model, renamed, where)
    return model, "mean", shape


def strip_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take `encoder.` off the keys where all of them have it; a file with some is left as it is, and refused.

    Of a checkpoint with a text side, keep what is under `visual.`.
    """
    if any(name.startswith(VISUAL) for name in weights):
        return {name.removeprefix(VISUAL): tensor for name, tensor in weights.items() if name.startswith(VISUAL)}
    if all(name.startswith(PREFIX) for name in weights):
        return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    return dict(weights)


def read_shape(weights: Mapping[str, Tensor], where: str, num_heads: int | None = None) -> PandermShape:
    """Read the architecture off the shapes of its weights; UserError where the ones that tell it are not there."""
    wanted = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in wanted if name not in weights]:
        raise UserError(
            f"{where}: no PanDerm encoder: {', '.join(missing)} missing among its {len(weights)} weights (e.g. "
            f"{next(iter(weights))}); timm's own names are read by timm:NAME@FILE"
        )
    embed_dim = int(weights["cls_token"].shape[-1])
    patch_size = int(weights["patch_embed.proj.weight"].shape[-1])
    side = math.isqrt(int(weights["pos_embed"].shape[1]) - 1)
    tables = [tensor for name, tensor in weights.items() if name.endswith(TABLE)]
    numbers = {int(found[1]) for name in weights if (found := _BLOCK.match(name))}
    if num_heads is None:
        num_heads = int(tables[0].shape[1]) if tables else embed_dim // HEAD_WIDTH
    if num_heads < 1 or embed_dim % num_heads:
        raise UserError(
            f"{where}: a width of {embed_dim} does not divide into heads of {HEAD_WIDTH}, which every published "
            "PanDerm has; the file is of another model"
        )
    return PandermShape(
        embed_dim=embed_dim,
        depth=max(numbers) + 1,
        num_heads=num_heads,
        patch_size=patch_size,
        image_size=side * patch_size,
        hidden_dim=int(weights["blocks.0.mlp.fc1.weight"].shape[0]),
        has_relative_positions=bool(tables),
    )


def _build(shape: PandermShape, pooling: Pooling) -> nn.Module:
    """An untrained timm model of this shape, its norm before the pooling (cls) or behind it (mean)."""
    arguments = _list_arguments(shape, "token" if pooling == "cls" else "avg")
    with torch.random.fork_rng(devices=[]):
        if shape.has_relative_positions:
            tuned: nn.Module = Beit(**arguments, use_abs_pos_emb=True, use_rel_pos_bias=True)
            return tuned
        model: nn.Module = VisionTransformer(**arguments, fc_norm=pooling == "mean")
        return model


def _list_arguments(shape: PandermShape, global_pool: str) -> dict[str, Any]:
    return {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": shape.hidden_dim / shape.embed_dim,
        "init_values": 0.1,  # whatever: the file holds the gammas
        "num_classes": 0,
        "global_pool": global_pool,
        "norm_layer": partial(LayerNorm, eps=1e-6),
    }


def _rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PanDerm's names -> those of timm's VisionTransformer; the keys of attention have no bias, there it is zero."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("attn.v_bias"):
            continue
        if name.endswith("attn.q_bias"):
            values = weights.get(name.replace("q_bias", "v_bias"))
            if values is not None:  # else load_strictly says which bias is missing
                renamed[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), values])
        else:
            renamed[re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)] = tensor
    return renamed
