"""The vision tower of an open_clip checkpoint: its weights in, a timm model that computes the same out.

    open_clip:NAME@FILE   visual.*              --(open_clip's own ViT)-->  VisionTransformer + projection
                          visual.trunk.*        --(a tower of timm's)---->  that timm model + projection
    panderm:FILE          visual.* of DermLIP   --(PanDerm's ViT)-------->  VisionTransformer + second norm + projection

The feature is the image's embedding before its length is taken out: what is compared with a text's. Everything that is
of the text side in the file is left out, and nothing else: a weight of the tower that is missing, unknown or of another
shape is an error. open_clip itself (extra `text`) is asked for the architecture of NAME only; the tests compare with
what its own module computes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.encoder.facts import Pooling
from panfm.encoder.weights import load_strictly
from panfm.errors import UserError

VISUAL = "visual."
TRUNK, HEAD = "visual.trunk.", "visual.head.proj."
# What a tower of NAME is fed where its config says nothing else: open_clip's defaults.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RGB = tuple[float, float, float]
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip names them on hubs
HEAD_WIDTH = 64  # open_clip's default
# open_clip's names -> timm's, in this order: `ln_pre` is not one of the norms of a block.
_RENAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^positional_embedding$", "pos_embed"),
    (r"^class_embedding$", "cls_token"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^proj$", "fc_norm.weight"),
)


@dataclass(frozen=True, eq=False)
class Tower:
    """The vision side of a checkpoint, with its projection behind the pooling."""

    model: nn.Module
    pooling: Pooling
    image_size: int  # pixels, of the published tower
    mean: RGB
    std: RGB
    config: dict[str, Any]  # of the architecture, for the encoder's hash


def build_tower(name: str, weights: Mapping[str, Tensor], where: str) -> Tower:
    """Build the vision tower that open_clip calls `name` and put the checkpoint's weights into it.

    Raises UserError for a name that open_clip does not know, a kind of tower that is not read, and weights that are not
    its own to the last one.
    """
    config = _read_config(name, where)
    vision = config["vision_cfg"]
    if isinstance(vision.get("layers"), int) and "patch_size" in vision:
        model, pooling = _build_vit(config, vision, weights, where)
    elif vision.get("timm_model_name"):
        model, pooling = _build_trunk(config["embed_dim"], vision, weights, where)
    else:
        raise UserError(
            f"{where}: open_clip's {name} has a tower that panfm does not read; ViTs and towers of timm's are read, "
            "export others to timm's layout and give hf:DIR"
        )
    size = vision["image_size"]
    size = size if isinstance(size, int) else size[0]
    return Tower(model, pooling, size, *_read_colours(name, where), {"open_clip": name, "vision": dict(vision)})


def find_tag(name: str, tag: str, where: str) -> Path | None:
    """The checkpoint that open_clip publishes for `name` under `tag`, in the local Hugging Face cache; None: no tag.

    Raises UserError where it is not in the cache (nothing is downloaded), and where it was trained with another
    activation than `name` has: open_clip only warns, and the features would be wrong.
    """
    config = _read_config(name, where)
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    if tag not in open_clip.list_pretrained_tags_by_model(name):
        return None
    record = open_clip.get_pretrained_cfg(name, tag)
    if bool(record.get("quick_gelu")) != bool(config.get("quick_gelu")):
        kind = "QuickGELU" if record.get("quick_gelu") else "GELU"
        raise UserError(f"{where}: {tag} was trained with {kind}, which {name} has not; take the name that has it")
    repository = "/".join(str(record.get("hf_hub", "")).split("/")[:2])
    for file in HUB_FILES if repository else ():
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    way = f"run `hf download {repository} {HUB_FILES[0]}` where there is a network, or " if repository else ""
    raise UserError(
        f"{where}: its weights are not in the local cache, and panfm downloads nothing; {way}give a file: "
        f"open_clip:{name}@FILE"
    )


def _read_colours(name: str, where: str) -> tuple[RGB, RGB]:
    """Mean and standard deviation that images are normalised by: those of the published weights of this name.

    Raises UserError where images were squashed into the square: panfm crops the centre, and no encoder is measured with
    another's preprocessing.
    """
    import open_clip

    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    if any(tag.get("resize_mode") == "squash" for tag in tags):
        raise UserError(
            f"{where}: open_clip feeds {name} images squashed into a square, and panfm crops the centre; timm "
            "publishes such towers with a centre crop: take timm:NAME@FILE"
        )
    known = {(tuple(tag.get("mean") or MEAN), tuple(tag.get("std") or STD)) for tag in tags}
    return known.pop() if len(known) == 1 else (MEAN, STD)


def _read_config(name: str, where: str) -> dict[str, Any]:
    try:
        import open_clip
    except ImportError:
        raise UserError(f"{where}: reading it needs open_clip; run `pip install 'panfm[text]'`") from None
    config = open_clip.get_model_config(name)
    if config is None:
        from difflib import get_close_matches

        near = get_close_matches(name, open_clip.list_models(), n=3)
        raise UserError(f"{where}: open_clip knows no model {name}; nearest: {', '.join(near) or 'see list_models()'}")
    return dict(config)


def _build_vit(
    config: Mapping[str, Any], vision: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> tuple[nn.Module, Pooling]:
    """open_clip's own ViT: a norm before the blocks, the class token, a projection without bias."""
    strange = sorted(set(vision) - {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"})
    if strange:
        raise UserError(f"{where}: its tower has {', '.join(strange)}, which panfm does not read")
    width, embed_dim = int(vision["width"]), int(config["embed_dim"])
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(
            img_size=vision["image_size"],
            patch_size=vision["patch_size"],
            embed_dim=width,
            depth=vision["layers"],
            num_heads=width // vision.get("head_width", HEAD_WIDTH),
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            pre_norm=True,
            num_classes=0,
            global_pool="token",
            norm_layer=partial(LayerNorm, eps=1e-5),
            act_layer="quick_gelu" if config.get("quick_gelu") else "gelu",
        )
        model.fc_norm = nn.Linear(width, embed_dim, bias=False)
    tower = {key.removeprefix(VISUAL): value for key, value in weights.items() if key.startswith(VISUAL)}
    if not tower:
        raise UserError(f"{where}: no weight begins with {VISUAL}, so it is no checkpoint of open_clip")
    load_strictly(model, _rename(tower), where)
    return model, "cls"


def _rename(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in tower.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if key == "proj":
            value = value.T.contiguous()  # noqa: PLW2901  open_clip multiplies from the right
        elif key == "class_embedding":
            value = value[None, None]  # noqa: PLW2901
        elif key == "positional_embedding":
            value = value[None]  # noqa: PLW2901
        renamed[name] = value
    return renamed


def _build_trunk(
    embed_dim: int, vision: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> tuple[nn.Module, Pooling]:
    """A tower of timm's under open_clip's roof; its projection is a linear layer or none."""
    pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    pooling: dict[str, Pooling] = {"map": "map", "token": "cls", "avg": "mean"}
    if pool not in pooling or projection not in ("linear", "none", "", None):
        how = f"pools by {pool!r} and projects by {projection!r}"
        raise UserError(f"{where}: its tower {how}, which panfm does not read; export it to timm's layout, give hf:DIR")
    name, held = vision["timm_model_name"], weights.get(f"{TRUNK}pos_embed")
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(
            name, num_classes=0
        )  # its norm stays where it is; open_clip changes the pooling alone
        if held is not None and held.shape != model.pos_embed.shape:
            model = timm.create_model(name, num_classes=0, img_size=vision["image_size"])
    given = {key.removeprefix(TRUNK): value for key, value in weights.items() if key.startswith(TRUNK)}
    if f"{HEAD}weight" in weights:
        if pool == "map":
            raise UserError(f"{where}: its attention pooling is projected once more, which panfm does not read")
        head = weights[f"{HEAD}weight"]
        projection_layer = nn.Linear(head.shape[1], embed_dim, bias=f"{HEAD}bias" in weights)
        model.fc_norm = nn.Sequential(model.fc_norm, projection_layer)
        given = {re.sub(r"^fc_norm\.", "fc_norm.0.", key): value for key, value in given.items()}
        given |= {key.replace(HEAD, "fc_norm.1."): value for key, value in weights.items() if key.startswith(HEAD)}
    others = [key for key in weights if key.startswith(VISUAL) and not key.startswith((TRUNK, HEAD))]
    load_strictly(model, {**given, **{key: weights[key] for key in others}}, where)
    return model, pooling[pool]
