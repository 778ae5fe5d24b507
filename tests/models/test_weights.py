"""Continuing from weights: the numbers of the original, every key accounted for, nothing forgiven."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as filter_eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as filter_vit
from torch import Tensor, nn

from panfm.errors import UserError
from panfm.models.vit import Vit, encode_visible
from panfm.models.weights import InitReport, fit_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
NORM = {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}


def make_vit(seed: int = 0, **more: object) -> VisionTransformer:
    return fill(VisionTransformer(**(SMALL | NORM | more)), seed)


def make_eva(seed: int = 0, **more: object) -> Eva:
    rotary = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "dynamic_img_size": True}
    rotary |= {"num_reg_tokens": 2, "init_values": 0.1, "use_fc_norm": False, "rope_rotate_half": True}
    return fill(Eva(**(SMALL | NORM | rotary | more)), seed)


def fill(vit: Vit, seed: int) -> Vit:
    """Every weight random: zero biases and unit scales would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return vit.eval()


def copy_state(vit: Vit) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in vit.state_dict().items()}


def describe(report: InitReport) -> dict[str, str]:
    return {entry.name: entry.how for entry in report.entries}


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_panderms_features_are_reproduced_from_its_checkpoint(golden: Path, prefix: str) -> None:
    path = golden / "panderm_vit.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    checkpoint = {prefix + name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
    sizes = {key: config[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "init_values")}
    vit = make_vit(**sizes)
    report = fit_weights(vit, checkpoint, "panderm")
    tokens = encode_visible(vit.double(), tensors["in.images"].double(), None)
    torch.testing.assert_close(tokens[:, 0], tensors["out64.feature_cls"], rtol=0, atol=1e-9)
    assert report.counts == {"copied": 28, "converted": 2, "renamed": 4}
    assert describe(report)["blocks.1.attn.qkv.bias"] == "converted"
    assert "  renamed blocks.*.ls1.gamma (x 2): from blocks.*.gamma_1" in report.to_lines()


def test_maes_encoder_is_taken_and_its_decoder_left(golden: Path) -> None:
    state = load_file(golden / "mae.safetensors")
    state = {name[6:]: tensor for name, tensor in state.items() if name.startswith("state.")}
    num_patches, width = state["pos_embed"].shape[1] - 1, state["pos_embed"].shape[2]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    side = state["patch_embed.proj.weight"].shape[2]
    vit = make_vit(img_size=side * round(num_patches**0.5), patch_size=side, embed_dim=width, depth=depth)
    report = fit_weights(vit, state, "mae")
    assert all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())
    ignored = [name for name, how in describe(report).items() if how == "ignored"]
    assert set(ignored) == {name for name in state if name.startswith("decoder_") or name == "mask_token"} != set()


def make_dinov2(vit: VisionTransformer) -> dict[str, Tensor]:
    """What facebookresearch/dinov2 would have written of this model: CLS has a position, registers have none."""
    state = copy_state(vit)
    row = torch.full((1, 1, 32), 0.7)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - row
    state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 32)
    return state


def make_dinov3(vit: Eva) -> dict[str, Tensor]:
    """What facebookresearch/dinov3 would have written: a bias for the keys too, and a mask that takes it away."""
    state = copy_state(vit)
    for number in range(2):
        stem = f"blocks.{number}."
        q, v = state.pop(f"{stem}attn.q_bias"), state.pop(f"{stem}attn.v_bias")
        state[f"{stem}attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 5.0), v])
        state[f"{stem}attn.qkv.bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
        for scale in "12":
            state[f"{stem}ls{scale}.gamma"] = state.pop(f"{stem}gamma_{scale}")
    state["storage_tokens"] = state.pop("reg_token")
    state["rope_embed.periods"] = torch.ones(4)
    state["mask_token"] = torch.zeros(1, 32)
    return state


@pytest.mark.parametrize("more", [{}, {"img_size": 48}, {"img_size": 64, "patch_size": 16}], ids=str)
@pytest.mark.parametrize("publisher", ["dinov2", "dinov3"])
def test_dino_checkpoints_are_read_as_timm_reads_them(publisher: str, more: dict[str, int]) -> None:
    if publisher == "dinov2":
        layout = {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1}
        checkpoint, vit, read = make_dinov2(make_vit(1, **layout)), make_vit(2, **layout, **more), filter_vit
    else:
        checkpoint, vit, read = make_dinov3(make_eva(1)), make_eva(2, **more), filter_eva
    expected = read({name: tensor.clone() for name, tensor in checkpoint.items()}, vit)
    fit_weights(vit, {f"backbone.{name}": tensor for name, tensor in checkpoint.items()}, publisher)
    own = vit.state_dict()
    assert set(own) == set(expected)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_bias_that_the_encoder_has_not_is_left_out_only_where_it_is_zero() -> None:
    vit, checkpoint = make_eva(2, qkv_bias=False), make_dinov3(make_eva(1))
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.bias is unknown"):
        fit_weights(vit, checkpoint, "dinov3")
    for number in range(2):
        checkpoint[f"blocks.{number}.attn.qkv.bias"][:32] = 0
        checkpoint[f"blocks.{number}.attn.qkv.bias"][64:] = 0
    report = fit_weights(vit, checkpoint, "dinov3")
    assert describe(report)["blocks.1.attn.qkv.bias"] == "ignored"
    del checkpoint["blocks.1.attn.qkv.bias_mask"]  # then the keys have a bias of 5, which timm's class cannot hold
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.bias is unknown"):
        fit_weights(make_eva(2), checkpoint, "dinov3")


def test_positions_are_resized_and_the_row_of_cls_is_not() -> None:
    weights = copy_state(make_vit(1))
    weights["pos_embed"][0, 1:] = torch.arange(4.0).repeat_interleave(4).unsqueeze(1)  # the row of a 4 x 4 grid
    vit = make_vit(img_size=16)
    report = fit_weights(vit, weights, "larger")
    assert describe(report)["pos_embed"] == "resized" and report.counts == {"copied": 29, "resized": 1}
    assert torch.equal(vit.pos_embed[:, 0], weights["pos_embed"][:, 0])
    rows = vit.pos_embed.detach()[0, 1:, 0]  # of a 2 x 2 grid
    torch.testing.assert_close(rows, torch.tensor([0.5, 0.5, 2.5, 2.5]), rtol=0, atol=0.1)

    flat = make_vit(1, img_size=(16, 64))  # 2 x 8 patches, as many as 4 x 4
    vit = make_vit()
    fit_weights(vit, flat.state_dict(), "flat", grid=(2, 8))
    assert not torch.equal(vit.pos_embed, flat.pos_embed) and torch.equal(vit.pos_embed[:, 0], flat.pos_embed[:, 0])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"no_embed_class": True}),  # the row of CLS goes into CLS
        ({"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}),
        ({"reg_tokens": 2, "no_embed_class": True}, {"reg_tokens": 2}),  # rows of zero
    ],
    ids=str,
)
def test_another_layout_of_positions_computes_the_same(theirs: dict[str, object], ours: dict[str, object]) -> None:
    source, vit = make_vit(1, **theirs), make_vit(2, **ours)
    report = fit_weights(vit, source.state_dict(), "other layout")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit.forward_features(images), source.forward_features(images), rtol=1e-5, atol=1e-5)
    assert describe(report)["pos_embed"] == "converted"


def test_what_may_stay_random_is_named_and_reported() -> None:
    weights = make_vit(1).state_dict()
    vit = make_vit(2, reg_tokens=2, init_values=0.5)
    before = copy_state(vit)
    with pytest.raises(
        UserError, match=r"reg_token is missing; blocks\.0\.ls1\.gamma is missing.*encoder\.init_random"
    ):
        fit_weights(vit, weights, "plain")
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())  # left alone
    report = fit_weights(vit, weights, "plain", random=("reg_token", "ls1", "ls2"))
    random = [name for name, how in describe(report).items() if how == "random"]
    assert random == ["reg_token", *(f"blocks.{n}.ls{i}.gamma" for n in range(2) for i in (1, 2))]
    assert torch.equal(vit.reg_token, before["reg_token"])
    assert torch.equal(vit.pos_embed[:, :1], weights["pos_embed"][:, :1]) and not bool(vit.pos_embed[:, 1:3].any())
    with pytest.raises(UserError, match=r"registers of encoder\.init_random names no weight that is missing"):
        fit_weights(make_vit(), weights, "plain", random=("registers",))


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop("norm.bias"), "norm.bias is missing"),
        (lambda w: w.update(more=torch.ones(1)), "more is unknown to the encoder"),
        (lambda w: w.update({"norm.bias": torch.ones(3)}), r"norm.bias is \[3\] where the encoder has \[32\]"),
        (
            lambda w: w.update({"pos_embed": torch.ones(1, 12, 32)}),
            r"pos_embed is \[1, 12, 32\] where .* \[1, 17, 32\]",
        ),
        (lambda w: w["norm.bias"].fill_(torch.nan), "norm.bias is not finite"),
        (lambda w: w.update({"blocks.0.attn.relative_position_bias_table": torch.ones(9, 2)}), "bias_table is unknown"),
        (drop("patch_embed.proj.weight"), "has no patch_embed.proj.weight, so it is no checkpoint of one ViT"),
        (lambda w: w.update({f"student.{n}": t for n, t in w.items()}), r"holds 2 encoders \(, student\.\)"),
        (lambda w: [w.pop(name) for name in list(w) if "blocks.1" in name], r"is missing \(and 8 more\)"),
    ],
    ids=range(9),
)
def test_what_does_not_fit_is_one_clear_line(spoil: Callable[[dict[str, Tensor]], object], words: str) -> None:
    weights = copy_state(make_vit(1))
    spoil(weights)
    with pytest.raises(UserError, match=words) as error:
        fit_weights(make_vit(), weights, "encoder.init here")
    assert str(error.value).startswith("encoder.init here: ") and "\n" not in str(error.value)


def test_a_norm_behind_the_pooling_becomes_the_final_norm_and_a_head_is_left() -> None:
    source = fill(VisionTransformer(**(SMALL | NORM | {"global_pool": "avg", "fc_norm": True, "num_classes": 5})), 1)
    vit = make_vit(global_pool="avg", fc_norm=False)
    report = fit_weights(vit, source.state_dict(), "classifier")
    assert torch.equal(vit.norm.weight, source.fc_norm.weight)
    assert report.counts == {"copied": 28, "renamed": 2, "ignored": 2}
    plain = json.loads(json.dumps(report.to_plain()))
    assert plain["counts"] == report.counts and len(plain["weights"]) == 32
    assert {"name": "head.bias", "how": "ignored", "detail": "a head"} in plain["weights"]
