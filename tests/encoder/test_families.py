"""The families that are measured beside ours: what their papers compute, from files as their publishers lay them out.

Weights are random, every one of them, so that each matters; the references are written out here by hand (ViTs) or are
torchvision's (ResNet-50), never the module under test.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from panfm.encoder import load_encoder
from panfm.encoder.address import parse_address
from panfm.encoder.catalogue import TIMM_NAMES
from panfm.encoder.network import EncoderNetwork
from panfm.encoder.schemes import _read_transform
from panfm.errors import UserError

Weights = dict[str, Tensor]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SMALL = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}


# ---------------------------------------------------------------------------------------- files as they are published


def draw(name: str, **kwargs: object) -> Weights:
    """Random weights of the shapes that timm's model has: none zero, none one, variances positive."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in timm.create_model(name, **kwargs).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(1)
        elif key.endswith(("running_var", "gamma")) or (len(shape) == 1 and key.endswith("weight")):
            weights[key] = 0.5 + torch.rand(shape, generator=generator)
        else:
            fan_in = max(1, int(torch.tensor(shape[1:]).prod())) if len(shape) > 1 else 100
            weights[key] = torch.randn(shape, generator=generator) / fan_in**0.5
    return weights


def write_mae(folder: Path) -> tuple[str, Weights]:
    """facebookresearch/mae: a pickle with the arguments of the run, the decoder beside the encoder."""
    weights = draw("vit_tiny_patch16_224", num_classes=0, img_size=64)
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 192)}
    torch.save({"model": weights | decoder, "args": Namespace(lr=0.1), "epoch": 3}, folder / "mae.pth")
    return f"timm:vit_tiny_patch16_224@{folder / 'mae.pth'}?image_size=64", weights


def write_dinov2(folder: Path) -> tuple[str, Weights]:
    """facebookresearch/dinov2: registers under their own name, CLS with a row among the positions, a mask token."""
    weights = draw("vit_small_patch14_reg4_dinov2", img_size=56)
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([torch.full((1, 1, 384), 0.7), weights["pos_embed"]], dim=1)
    torch.save(weights | {"mask_token": torch.zeros(1, 384)}, folder / "dinov2.pth")
    return f"timm:vit_small_patch14_reg4_dinov2.lvd142m@{folder / 'dinov2.pth'}?image_size=56", weights


def write_dinov3(folder: Path) -> tuple[str, Weights]:
    """facebookresearch/dinov3: storage tokens, periods of the rotation, a mask on the bias of the keys."""
    weights = draw("vit_small_patch16_dinov3_qkvb")
    for number in range(12):
        stem = f"blocks.{number}."
        q, v = weights.pop(f"{stem}attn.q_bias"), weights.pop(f"{stem}attn.v_bias")
        weights[f"{stem}attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 5.0), v])
        weights[f"{stem}attn.qkv.bias_mask"] = torch.cat([torch.ones(384), torch.zeros(384), torch.ones(384)])
        for scale in "12":
            weights[f"{stem}ls{scale}.gamma"] = weights.pop(f"{stem}gamma_{scale}")
    weights["storage_tokens"] = weights.pop("reg_token")
    weights["rope_embed.periods"] = 100 ** (2 * torch.arange(16) / 32)
    torch.save(weights | {"mask_token": torch.zeros(1, 384)}, folder / "dinov3.pth")
    return f"timm:vit_small_patch16_dinov3_qkvb.lvd1689m@{folder / 'dinov3.pth'}?image_size=64", weights


def write_folder(folder: Path, name: str, **more: object) -> tuple[str, Weights]:
    """A folder in timm's layout, of a small sister of the named model, with that model's preprocessing."""
    arguments = {**SMALL, **more}
    weights = draw(name, num_classes=0, **arguments)
    record = timm.get_pretrained_cfg(name).to_dict() | {"input_size": [3, 64, 64]}
    config = {"architecture": name.partition(".")[0], "model_args": arguments, "pretrained_cfg": record}
    (folder / "config.json").write_text(json.dumps(config, default=list))
    save_file(weights, folder / "model.safetensors")
    return f"hf:{folder}", weights


def write_clip(folder: Path) -> tuple[str, Weights]:
    return write_folder(folder, "vit_base_patch16_clip_quickgelu_224.openai")


def write_siglip(folder: Path) -> tuple[str, Weights]:
    return write_folder(folder, "vit_base_patch16_siglip_224.webli")


def write_uni(folder: Path) -> tuple[str, Weights]:
    """UNI: LayerScale, positions that stretch; its authors publish a pickle of tensors."""
    address, weights = write_folder(folder, "vit_large_patch16_224", init_values=1e-5, dynamic_img_size=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": IMAGENET[0], "std": IMAGENET[1], "crop_pct": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return address, weights


def write_resnet(folder: Path) -> tuple[str, Weights]:
    weights = draw("resnet50")
    save_file(weights, folder / "resnet50.safetensors")
    return f"timm:resnet50.a1_in1k@{folder / 'resnet50.safetensors'}?image_size=64", weights


def write_efficientnet(folder: Path) -> tuple[str, Weights]:
    weights = draw("tf_efficientnet_lite0")
    save_file(weights, folder / "lite0.safetensors")
    return f"timm:tf_efficientnet_lite0.in1k@{folder / 'lite0.safetensors'}?image_size=64", weights


# ------------------------------------------------------------------------------------------------- forward, by hand


def norm(x: Tensor, w: Weights, stem: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{stem}.weight"], w[f"{stem}.bias"], eps)


def linear(x: Tensor, w: Weights, stem: str) -> Tensor:
    return F.linear(x, w[f"{stem}.weight"], w.get(f"{stem}.bias"))


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, N, d]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)  # [B, N, C]


def run_blocks(
    x: Tensor,
    w: Weights,
    heads: int,
    eps: float = 1e-6,
    act: Callable[[Tensor], Tensor] = F.gelu,
    rotate: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))
    for stem in (f"blocks.{number}." for number in range(depth)):
        bias = w.get(f"{stem}attn.qkv.bias")
        if (mask := w.get(f"{stem}attn.qkv.bias_mask")) is not None:
            bias = bias * mask
        q, k, v = F.linear(norm(x, w, f"{stem}norm1", eps), w[f"{stem}attn.qkv.weight"], bias).chunk(3, dim=-1)
        found = attend(rotate(split_heads(q, heads)), rotate(split_heads(k, heads)), split_heads(v, heads))
        x = x + linear(found, w, f"{stem}attn.proj") * w.get(f"{stem}ls1.gamma", 1)
        hidden = act(linear(norm(x, w, f"{stem}norm2", eps), w, f"{stem}mlp.fc1"))
        x = x + linear(hidden, w, f"{stem}mlp.fc2") * w.get(f"{stem}ls2.gamma", 1)
    return x


def cut_patches(images: Tensor, w: Weights) -> Tensor:
    kernel = w["patch_embed.proj.weight"]
    return F.conv2d(images, kernel, w.get("patch_embed.proj.bias"), stride=kernel.shape[-1]).flatten(2).mT


def prepend(x: Tensor, *tokens: Tensor) -> Tensor:
    return torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)


def run_vit(images: Tensor, w: Weights, heads: int) -> Tensor:
    x = prepend(cut_patches(images, w), w["cls_token"]) + w["pos_embed"]
    return norm(run_blocks(x, w, heads), w, "norm", 1e-6)[:, 0]


def run_dinov2(images: Tensor, w: Weights) -> Tensor:
    x = prepend(cut_patches(images, w), w["cls_token"]) + w["pos_embed"]
    x = torch.cat([x[:, :1], w["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    return norm(run_blocks(x, w, 6), w, "norm", 1e-6)[:, 0]


def run_dinov3(images: Tensor, w: Weights) -> Tensor:
    """Rotary positions on the patches alone: half of a head's numbers by row, half by column, as sine and cosine."""
    places = (torch.arange(4) + 0.5) / 4 * 2 - 1
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    angles = 2 * torch.pi * torch.stack([rows, columns], -1).reshape(16, 2, 1) / w["rope_embed.periods"]
    angles = angles.flatten(1).tile(2)  # [16, 64]

    def rotate(x: Tensor) -> Tensor:
        first, second = x[:, :, 5:].chunk(2, dim=-1)
        turned = x[:, :, 5:] * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        return torch.cat([x[:, :, :5], turned], dim=2)

    x = prepend(cut_patches(images, w), w["cls_token"], w["storage_tokens"])
    return norm(run_blocks(x, w, 6, eps=1e-5, rotate=rotate), w, "norm", 1e-5)[:, 5:].mean(1)


def run_clip(images: Tensor, w: Weights) -> Tensor:
    x = norm(prepend(cut_patches(images, w), w["cls_token"]) + w["pos_embed"], w, "norm_pre", 1e-5)
    return norm(run_blocks(x, w, 2, 1e-5, lambda x: x * torch.sigmoid(1.702 * x)), w, "norm", 1e-5)[:, 0]


def run_siglip(images: Tensor, w: Weights) -> Tensor:
    """No class token: a learned query looks at the patches, then an MLP."""
    x = norm(run_blocks(cut_patches(images, w) + w["pos_embed"], w, 2), w, "norm", 1e-6)
    heads = 2
    query = linear(w["attn_pool.latent"].expand(len(x), -1, -1), w, "attn_pool.q")
    k, v = linear(x, w, "attn_pool.kv").chunk(2, dim=-1)
    found = attend(split_heads(query, heads), split_heads(k, heads), split_heads(v, heads))
    x = linear(found, w, "attn_pool.proj")
    hidden = F.gelu(linear(norm(x, w, "attn_pool.norm", 1e-6), w, "attn_pool.mlp.fc1"))
    return (x + linear(hidden, w, "attn_pool.mlp.fc2"))[:, 0]


def run_resnet(images: Tensor, w: Weights) -> Tensor:
    from torchvision.models import resnet50

    theirs = resnet50().eval()
    theirs.load_state_dict(w)
    theirs.fc = torch.nn.Identity()
    return theirs(images)


def run_efficientnet(images: Tensor, w: Weights) -> Tensor:
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(w)
    theirs.reset_classifier(0)
    return theirs(images)


FAMILIES = {
    # name: file, reference, (mean, std), side after resizing, pooling, dimension
    "mae": (write_mae, lambda images, w: run_vit(images, w, heads=3), HALF, 71, "cls", 192),
    "dinov2": (write_dinov2, run_dinov2, IMAGENET, 56, "cls", 384),
    "dinov3": (write_dinov3, run_dinov3, IMAGENET, 64, "mean", 384),
    "clip": (write_clip, run_clip, CLIP, 71, "cls", 64),
    "siglip": (write_siglip, run_siglip, HALF, 71, "map", 64),
    "uni": (write_uni, lambda images, w: run_vit(images, w, heads=2), IMAGENET, 64, "cls", 64),
    "resnet50": (write_resnet, run_resnet, IMAGENET, 67, "mean", 2048),
    "efficientnet": (write_efficientnet, run_efficientnet, HALF, 73, "mean", 1280),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_features_of_its_paper(family: str, tmp_path: Path) -> None:
    write, run, (mean, std), resize_size, pooling, dimension = FAMILIES[family]
    address, weights = write(tmp_path)
    encoder = load_encoder(address)
    assert (encoder.pooling, encoder.embed_dim, encoder.transform.resize_size) == (pooling, dimension, resize_size)
    assert f"{dimension} dimensions, pooling {pooling}; shorter side to {resize_size} px" in encoder.describe()
    generator = torch.Generator().manual_seed(1)
    size = encoder.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    x = (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = run(x, weights)
    found = encoder.forward(images)
    assert (found[0] - found[1]).abs().max() > 1e-3 * found.abs().max()  # else anything would agree
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["mae", "dinov3", "siglip", "uni", "efficientnet"])
def test_a_familys_file_that_is_not_whole_is_refused_with_the_list(family: str, tmp_path: Path) -> None:
    address, weights = FAMILIES[family][0](tmp_path)
    (file,) = (path for path in tmp_path.iterdir() if path.suffix != ".json")
    stem = "bn2" if family == "efficientnet" else "norm"
    wrong = weights | {f"{stem}.bias": torch.zeros(7), "surplus.weight": torch.zeros(1)}
    del wrong[f"{stem}.weight"]
    (save_file if file.suffix == ".safetensors" else torch.save)(wrong, file)
    with pytest.raises(UserError) as error:
        load_encoder(address)
    for name in (f"{stem}.weight", f"{stem}.bias", "surplus.weight"):
        assert name in str(error.value)


@pytest.mark.slow
def test_what_is_published_of_each_is_declared() -> None:
    """Side after resizing, crop, colours, pooling, dimension of every name that the catalogue lists."""
    declared = {
        "resnet50.a1_in1k": (235, 224, IMAGENET, "mean", 2048),
        "tf_efficientnet_lite0.in1k": (256, 224, HALF, "mean", 1280),
        "inception_v3.tv_in1k": (341, 299, HALF, "mean", 2048),
        "vit_base_patch16_224.augreg_in21k": (248, 224, HALF, "cls", 768),
        "vit_base_patch16_224.mae": (248, 224, IMAGENET, "cls", 768),
        "vit_large_patch16_224.mae": (248, 224, IMAGENET, "cls", 1024),
        "vit_small_patch14_reg4_dinov2.lvd142m": (518, 518, IMAGENET, "cls", 384),
        "vit_base_patch14_reg4_dinov2.lvd142m": (518, 518, IMAGENET, "cls", 768),
        "vit_large_patch14_reg4_dinov2.lvd142m": (518, 518, IMAGENET, "cls", 1024),
        "vit_small_patch16_dinov3.lvd1689m": (256, 256, IMAGENET, "mean", 384),
        "vit_base_patch16_dinov3.lvd1689m": (256, 256, IMAGENET, "mean", 768),
        "vit_large_patch16_dinov3.lvd1689m": (256, 256, IMAGENET, "mean", 1024),
        "vit_base_patch16_clip_quickgelu_224.openai": (248, 224, CLIP, "cls", 768),
        "vit_large_patch14_clip_quickgelu_224.openai": (224, 224, CLIP, "cls", 1024),
        "vit_base_patch16_siglip_224.webli": (248, 224, HALF, "map", 768),
    }
    assert {name for _, name in TIMM_NAMES} == set(declared)
    for name, (resize_size, size, (mean, std), pooling, dimension) in declared.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        transform = _read_transform(parse_address(f"timm:{name}"), model)
        assert (transform.resize_size, transform.image_size) == (resize_size, size), name
        assert (transform.mean, transform.std, transform.interpolation) == (mean, std, "bicubic"), name
        assert (EncoderNetwork(model, None, name).pooling, model.num_features) == (pooling, dimension), name


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "it ran")


@pytest.mark.parametrize("scheme", ["timm", "hf", "panderm", "open_clip"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(scheme: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    file = tmp_path / "pytorch_model.bin"
    torch.save({"model": {"x": torch.zeros(1), "trap": Trap(mark)}}, file)
    address = {
        "timm": f"timm:test_vit@{file}",
        "hf": f"hf:{tmp_path}",
        "panderm": f"panderm:{file}",
        "open_clip": f"open_clip:ViT-B-16@{file}",
    }[scheme]
    with pytest.raises(UserError, match="holds more than tensors, and reading that could execute code"):
        load_encoder(address)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.read_text() == "it ran"  # the trap was one


def test_transposed_and_half_precision_weights_are_read_as_they_are(tmp_path: Path) -> None:
    address, weights = write_mae(tmp_path)
    plain = load_encoder(address)
    views = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    torch.save({"model": views}, tmp_path / "mae.pth")
    assert load_encoder(address).hash == plain.hash
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "half.safetensors")
    half = load_encoder(f"timm:vit_tiny_patch16_224@{tmp_path / 'half.safetensors'}?image_size=64")
    kept = load_file(tmp_path / "half.safetensors")["norm.weight"].float()
    assert torch.equal(half.module.model.norm.weight, kept) and half.module.model.norm.weight.dtype == torch.float32
