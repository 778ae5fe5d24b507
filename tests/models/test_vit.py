"""The encoder: hidden tokens really dropped, right for every layout that timm knows, and the same for the same seed."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from panfm.config import validate
from panfm.errors import UserError
from panfm.models.vit import (
    EncoderConfig,
    Vit,
    build_vit,
    compute_sincos_positions,
    encode_visible,
    get_patch_grid,
    get_timm_kwargs,
    select_attention,
    split_mask,
    take_tokens,
)

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
ROTARY = {"img_size": 32, "use_abs_pos_emb": False, "use_rot_pos_emb": True, "dynamic_img_size": True}
DINOV3 = ROTARY | {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "num_reg_tokens": 4}
LAYOUTS = {
    "cls": {"img_size": 32},
    "not square": {"img_size": (24, 40)},
    "registers": {"img_size": 32, "reg_tokens": 3},
    "registers, positions on patches only": {"img_size": 32, "reg_tokens": 4, "no_embed_class": True},
    "no prefix": {"img_size": 32, "class_token": False, "global_pool": "avg", "fc_norm": False},
    "norm before the blocks": {"img_size": 32, "pre_norm": True, "init_values": 0.1},
    "any image size": {"img_size": 32, "dynamic_img_size": True},
    "no positions": {"img_size": 32, "pos_embed": "none"},
}
ROTARY_LAYOUTS = {
    "dinov3": DINOV3 | {"init_values": 0.1},
    "dinov3, not square": DINOV3 | {"img_size": (24, 40), "qkv_bias": False},
    "rotary and absolute": ROTARY | {"use_abs_pos_emb": True, "class_token": True, "swiglu_mlp": True},
    "axial, attention of timm": ROTARY | {"attn_type": "rope", "rope_grid_indexing": "xy"},
    "mixed": ROTARY | {"attn_type": "rope", "rope_type": "mixed"},
    "rotary for one image size": ROTARY | {"dynamic_img_size": False},
}
ALL_LAYOUTS = [*LAYOUTS, *ROTARY_LAYOUTS]


def make_vit(layout: str) -> Vit:
    torch.manual_seed(0)
    if layout in LAYOUTS:
        vit: Vit = VisionTransformer(**(SMALL | LAYOUTS[layout]))
    else:
        norm = {"use_fc_norm": False, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
        vit = Eva(**(SMALL | norm | ROTARY_LAYOUTS[layout]))
    vit = vit.double()
    for parameter in vit.parameters():  # zero biases and unit scales would hide a mistake
        nn.init.normal_(parameter, std=0.2)
    return vit


def make_images(vit: Vit, number: int) -> torch.Tensor:
    rows, columns = get_patch_grid(vit)
    return torch.randn(number, 3, 8 * rows, 8 * columns, dtype=torch.float64)


def run_timms_blocks(vit: Vit, image: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """timm's own tokens of one image with those rows that `keep` [prefix + N] leaves, positions taken by timm."""
    x = vit._pos_embed(vit.patch_embed(image[None]))
    x, rotations = x if isinstance(x, tuple) else (x, None)
    x = vit.norm_pre(x)[:, keep]
    for number, block in enumerate(vit.blocks):
        if rotations is None:
            x = block(x)
        else:
            own = rotations[number] if vit.rope_mixed else rotations
            x = block(x, rope=own[..., keep[vit.num_prefix_tokens :], :])
    return vit.norm(x)[0]


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_visible_tokens_equal_timm_with_the_hidden_ones_cut_out(layout: str) -> None:
    vit = make_vit(layout)
    images = make_images(vit, 3)
    rows, columns = get_patch_grid(vit)
    mask = torch.rand(3, rows * columns).argsort(dim=1) < 5  # five hidden, in other places in each image
    tokens = encode_visible(vit, images, mask)

    for image, hidden, own in zip(images, mask, tokens, strict=True):
        keep = torch.cat([torch.ones(vit.num_prefix_tokens, dtype=torch.bool), ~hidden])
        torch.testing.assert_close(own, run_timms_blocks(vit, image, keep), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_without_hidden_patches_it_is_timms_forward(layout: str) -> None:
    vit = make_vit(layout)
    images = make_images(vit, 2)
    rows, columns = get_patch_grid(vit)
    expected = vit.forward_features(images)
    torch.testing.assert_close(encode_visible(vit, images, None), expected, rtol=0, atol=1e-11)
    nothing = torch.zeros(2, rows * columns, dtype=torch.bool)
    torch.testing.assert_close(encode_visible(vit, images, nothing), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["cls", "registers, positions on patches only", "dinov3", "rotary and absolute"])
def test_another_image_size_has_positions_of_its_own_as_in_timm(layout: str) -> None:
    vit, theirs = make_vit(layout), make_vit(layout)
    if not theirs.dynamic_img_size:
        theirs.set_input_size(img_size=(16, 48))  # timm resamples the table itself, bicubic and antialiased
    images = torch.randn(2, 3, 16, 48, dtype=torch.float64)  # a grid of 2 x 6 where the encoder's is 4 x 4
    expected = theirs.forward_features(images)
    tokens = encode_visible(vit, images, None)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)  # timm resamples in float32
    assert get_patch_grid(vit) == (4, 4)

    mask = torch.arange(12).expand(2, 12) % 3 == 0
    tokens = encode_visible(vit, images, mask)
    assert tokens.shape == (2, vit.num_prefix_tokens + 8, 32)
    tokens.square().sum().backward()
    assert [name for name, parameter in vit.named_parameters() if parameter.grad is None] == []


def test_an_image_that_patches_do_not_tile_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"\(32, 36\) pixels"):
        encode_visible(make_vit("cls"), torch.zeros(1, 3, 32, 36, dtype=torch.float64), None)


def test_rotary_positions_made_for_one_size_are_not_used_for_another() -> None:
    with pytest.raises(AssertionError, match="rotary positions for 16 patches"):
        encode_visible(make_vit("rotary for one image size"), torch.zeros(1, 3, 16, 16, dtype=torch.float64), None)


def test_hidden_pixels_have_no_influence_and_visible_ones_have() -> None:
    vit = make_vit("cls")
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # rows 8 to 15, columns 8 to 15
    tokens = encode_visible(vit, images, mask)
    images[:, :, 8:16, 8:16] = 7.0
    assert torch.equal(encode_visible(vit, images, mask), tokens)
    images[:, :, 8:16, 16] = 7.0
    assert not torch.equal(encode_visible(vit, images, mask), tokens)


def test_normalising_visible_patches_equals_normalising_images() -> None:
    vit = make_vit("not square").float()
    images = torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8)
    mask = torch.arange(15).expand(2, 15) % 2 == 0
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        return pixels / 255 - mean

    for choice in (mask, split_mask(mask), None):
        ours = encode_visible(vit, images, choice, normalise)
        torch.testing.assert_close(ours, encode_visible(vit, normalise(images), choice), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["cls", "dinov3", "mixed"])
def test_gradient_checkpointing_changes_no_gradient(layout: str) -> None:
    vit = make_vit(layout)
    images, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.arange(16).expand(2, 16) < 8
    gradients = []
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        vit.zero_grad()
        encode_visible(vit, images, mask).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layout", ["cls", "dinov3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_are_whole_graphs_and_change_nothing(layout: str, checkpointing: bool) -> None:
    vit = make_vit(layout)
    vit.set_grad_checkpointing(checkpointing)
    images = make_images(vit, 2)
    masks = [
        torch.arange(16).expand(2, 16) < number for number in (8, 4)
    ]  # two lengths, as masked and whole views have
    expected = [encode_visible(vit, images, mask) for mask in masks]
    for block in vit.blocks:
        block.compile(backend="eager", fullgraph=True)
    for mask, tokens in zip(masks, expected, strict=True):
        torch.testing.assert_close(encode_visible(vit, images, mask), tokens, rtol=0, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["cls", "dinov3", "mixed"])
def test_attention_is_explicit_on_a_cpu_unless_the_sequence_is_long(layout: str) -> None:
    vit = make_vit(layout)
    for num_tokens, fused in ((17, False), (2000, True)):
        select_attention(vit.blocks, torch.device("cpu"), num_tokens)
        assert [block.attn.fused_attn for block in vit.blocks] == [fused, fused]
    select_attention(vit.blocks, torch.device("cuda"), 17)
    assert vit.blocks[0].attn.fused_attn


def test_split_mask_lists_patches_in_order_and_wants_equal_rows() -> None:
    split = split_mask(torch.tensor([[True, False, True, False], [False, False, True, True]]))
    assert split.visible.tolist() == [[1, 3], [0, 1]]
    assert split.hidden.tolist() == [[0, 2], [2, 3]]
    with pytest.raises(AssertionError, match="1 to 3"):  # two rows of two on average
        split_mask(torch.tensor([[True, False, False, False], [False, True, True, True]]))


def test_take_tokens_gathers_rows_and_sends_gradients_back() -> None:
    tokens = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.tensor([[4, 0], [1, 3]])
    taken = take_tokens(tokens, index)
    assert torch.equal(taken, torch.stack([tokens[0, [4, 0]], tokens[1, [1, 3]]]))
    taken.sum().backward()
    assert tokens.grad.sum(dim=2).tolist() == [[3, 0, 0, 0, 3], [0, 3, 0, 3, 0]]


def test_position_table_is_caes_and_the_transpose_of_maes(golden) -> None:
    cae = load_file(golden / "cae_v2.safetensors")["state.rd_pos_embed"][0, 1:]  # [16, 32]
    mae = load_file(golden / "mae.safetensors")["state.decoder_pos_embed"][0, 1:]  # [16, 24]
    torch.testing.assert_close(compute_sincos_positions((4, 4), 32), cae, rtol=0, atol=1e-6)
    ours = compute_sincos_positions((4, 4), 24).unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(ours, mae, rtol=0, atol=1e-6)
    assert torch.equal(compute_sincos_positions((2, 3), 8), compute_sincos_positions((4, 3), 8)[:6])


def test_build_is_a_function_of_the_seed_and_leaves_the_global_state() -> None:
    config = EncoderConfig(name="test_vit", image_size=32, num_registers=2, layer_scale=0.1)
    before = torch.get_rng_state()
    first, again, other = (build_vit(config, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["blocks.3.attn.qkv.weight"], other["blocks.3.attn.qkv.weight"])
    assert first["reg_token"].shape == (1, 2, 64)
    assert float(first["blocks.0.ls1.gamma"][0]) == pytest.approx(0.1)


def test_every_parameter_is_trained_even_where_the_name_brings_a_pooling_head() -> None:
    vit = build_vit(EncoderConfig(name="test_vit3", image_size=32), seed=0)  # attention pooling, no CLS
    encode_visible(vit, torch.randn(1, 3, 32, 32), torch.tensor([[True, False, True, False]])).sum().backward()
    assert [name for name, parameter in vit.named_parameters() if parameter.grad is None] == []


def test_a_rotary_encoder_is_built_as_its_name_and_the_config_say() -> None:
    config = EncoderConfig(
        name="vit_tiny_patch16_dinov3_qkvb", image_size=64, patch_size=8, num_registers=2, layer_scale=0.1,
        drop_path_rate=0.2, grad_checkpointing=True,
    )  # fmt: skip
    vit = build_vit(config, seed=0)
    assert type(vit) is Eva and get_patch_grid(vit) == (8, 8) and vit.num_prefix_tokens == 3 and vit.grad_checkpointing
    assert float(vit.state_dict()["blocks.0.gamma_1"][0]) == pytest.approx(0.1)
    assert vit.blocks[11].drop_path1.drop_prob == pytest.approx(0.2)
    assert vit.pos_embed is None and not isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)
    encode_visible(vit.eval(), torch.randn(1, 3, 64, 64), torch.arange(64).expand(1, 64) < 60).sum().backward()
    assert [name for name, parameter in vit.named_parameters() if parameter.grad is None] == []


def test_timm_kwargs_are_plain_and_say_what_was_changed() -> None:
    config = EncoderConfig(name="test_vit", image_size=64, patch_size=8)
    assert get_timm_kwargs(config)["img_size"] == 64 and get_timm_kwargs(config)["patch_size"] == 8
    assert get_patch_grid(build_vit(config, 0)) == (8, 8)
    assert "reg_tokens" not in get_timm_kwargs(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "vit_tinny_patch16_224"}, "did you mean vit_tiny_patch16_224"),
        ({"name": "resnet18"}, "must be a plain timm VisionTransformer or Eva"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "must be a plain"),
        ({"name": "vit_tiny_patch16_224", "image_size": 100}, r"\(100\) must be a multiple .* \(16\); try 96"),
    ],
)
def test_a_wrong_encoder_is_one_clear_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        build_vit(EncoderConfig(**values), seed=0)
    assert "\n" not in str(error.value)


def test_a_wrong_value_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(UserError, match="drop_path_rate"):
        validate(EncoderConfig, {"drop_path_rate": 1.5}, "run.yaml")
