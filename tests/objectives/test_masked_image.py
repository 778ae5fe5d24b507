"""MAE and CAE v2 against the numbers of their published code; float32 under autocast; the corners of a batch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from panfm.data.batch import NO_GROUP, Batch
from panfm.models.heads import Decoder, Regressor, TokenHead
from panfm.models.vit import encode_visible, split_mask
from panfm.objectives.interface import EncodedView, ObjectiveOutput
from panfm.objectives.masked_image import MaskedLatents, MaskedPixels
from panfm.objectives.targets import FrozenTargets
from tests.objectives.conftest import get_scalars

ATOL = 1e-9


class GivenTokens:
    """A teacher whose tokens (CLS first) were written down."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def forward_tokens(self, images: Tensor) -> Tensor:
        return self.tokens

    def token_grid(self, image_size: int) -> tuple[int, int]:
        return 4, 4


def read_golden(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}, config


def make_vit(layer_scale: float | None) -> VisionTransformer:
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, init_values=layer_scale
    ).double()


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def apply(objective: nn.Module, view: EncodedView) -> ObjectiveOutput:
    """The objective on one view of images of whose origin nothing is known."""
    size = len(view.images)
    unknown = torch.full((size,), NO_GROUP)
    batch = Batch((view.images,), None, torch.arange(size), unknown, unknown, unknown, unknown, unknown)
    return objective((view,), batch)


def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load exactly these tensors: the original has nothing more and nothing less."""
    assert sorted(state) == sorted(module.state_dict())
    module.load_state_dict(state)


def identity(pixels: Tensor) -> Tensor:
    return pixels


def name_mae(key: str) -> tuple[str, str] | None:
    """Where MAE's tensor lives here: (encoder or decoder, our key)."""
    renamed = {"decoder_embed": "embed", "decoder_pred": "predict", "decoder_norm": "norm", "decoder_blocks": "blocks"}
    first, _, rest = key.partition(".")
    if first == "decoder_pos_embed":
        return None
    if first in renamed:
        return "decoder", f"{renamed[first]}.{rest}"
    return ("decoder", key) if first == "mask_token" else ("encoder", key)


@pytest.fixture
def mae(golden: Path) -> tuple[dict[str, Tensor], VisionTransformer, MaskedPixels]:
    tensors, _ = read_golden(golden / "mae.safetensors")
    vit, decoder = make_vit(None), Decoder(32, 24, 1, 4, 192, (4, 4)).double()
    states: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in tensors.items():
        if key.startswith("state.") and (name := name_mae(key.removeprefix("state."))):
            states[name[0]][name[1]] = value
    fill(vit, states["encoder"])
    fill(decoder, states["decoder"])
    table = tensors["state.decoder_pos_embed"][0]
    assert not table[0].any()  # the CLS position is zero, which is why ours has no row for it
    decoder.positions = table[1:]  # the original's float32 table, in its order
    return tensors, vit, MaskedPixels(decoder, (8, 8), identity, patch_normalise=True)


def encode(vit: VisionTransformer, tensors: dict[str, Tensor], mask: Tensor) -> EncodedView:
    split = split_mask(mask)
    return EncodedView(tensors["in.images"], encode_visible(vit, tensors["in.images"], split), 1, split)


def test_mae_encoder_and_decoder_give_the_originals_numbers(mae) -> None:
    tensors, vit, objective = mae
    view = encode(vit, tensors, tensors["out.mask"])
    order = tensors["in.noise"].argsort(dim=1)[:, :4]  # the original keeps patches in the order of their noise
    place = order.argsort(dim=1).argsort(dim=1)
    kept = torch.stack([tokens[1:][row] for tokens, row in zip(view.tokens, place, strict=True)])
    torch.testing.assert_close(kept, tensors["out64.latent"][:, 1:], rtol=0, atol=ATOL)
    torch.testing.assert_close(view.tokens[:, 0], tensors["out64.latent"][:, 0], rtol=0, atol=ATOL)

    expected = torch.stack([p[m] for p, m in zip(tensors["out64.pred"], tensors["out.mask"], strict=True)])
    torch.testing.assert_close(objective.decoder(view.tokens, view.split), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("patch_normalise", "key"), [(True, "out64.loss_norm_pix"), (False, "out64.loss_raw_pix")])
def test_mae_loss_is_the_originals(mae, patch_normalise: bool, key: str) -> None:
    tensors, vit, objective = mae
    objective.patch_normalise = patch_normalise
    loss = apply(objective, encode(vit, tensors, tensors["out.mask"])).loss
    torch.testing.assert_close(loss, tensors[key], rtol=0, atol=ATOL)


# Relative errors: float32 rounds, and under autocast the networks before the loss compute in bfloat16.
PRECISIONS = [(False, 2e-6), (True, 5e-3)]


@pytest.mark.parametrize(("autocast", "tolerance"), PRECISIONS)
def test_mae_is_the_original_in_float32_and_under_autocast(mae, autocast: bool, tolerance: float) -> None:
    tensors, vit, objective = mae
    single = narrow(tensors)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = apply(objective.float(), encode(vit.float(), single, tensors["out.mask"])).loss
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(tensors["out64.loss_norm_pix"]), rel=tolerance)


def test_mae_gradients_are_the_originals(mae) -> None:
    tensors, vit, objective = mae
    apply(objective, encode(vit, tensors, tensors["out.mask"])).loss.backward()
    modules = {"encoder": vit, "decoder": objective.decoder}
    compared = 0
    for key, expected in tensors.items():
        if key.startswith("grad64.norm_pix.") and (name := name_mae(key.removeprefix("grad64.norm_pix."))):
            own = modules[name[0]].get_parameter(name[1]).grad
            torch.testing.assert_close(own, expected, rtol=0, atol=ATOL, msg=key)
            compared += 1
    assert compared == sum(key.startswith("grad64.norm_pix.") for key in tensors) == 14


BLOCK = {
    "norm1_q": "norm_q",
    "norm1_k": "norm_k",
    "norm1_v": "norm_v",
    "norm2_cross": "norm_2",
    "cross_attn.q_bias": "q.bias",
    "cross_attn.v_bias": "v.bias",
    "cross_attn.proj": "projection",
    "cross_attn.": "",
    "mlp_cross": "mlp",
    "gamma_1_cross": "scale_1",
    "gamma_2_cross": "scale_2",
}
CAE = {
    "encoder_to_regresser_norm.": "regressor.embed.1.",
    "encoder_to_regresser.": "regressor.embed.0.",
    "regresser.regressor_blocks.": "regressor.blocks.",
    "mask_token": "regressor.mask_token",
    "decoder.head.": "head.linear.",
    "decoder.norm.": "head.norm.",
}


def rename_cae(tensors: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """The original's tensors by module and key here; its q and v biases become timm's joint bias, k's being zero."""
    found: dict[str, dict[str, Tensor]] = {"encoder": {}, "regressor": {}, "head": {}}
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for key, value in tensors.items():
        if key.startswith(("rd_pos_embed", "regresser.norm.")):
            continue  # a fixed table; a norm that the original owns and never uses
        if key.startswith("encoder."):
            name = key.removeprefix("encoder.").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            if name.endswith("v_bias"):
                continue
            if name.endswith("q_bias"):
                v_bias = tensors[key.replace("q_bias", "v_bias")]
                found["encoder"][name.replace("q_bias", "qkv.bias")] = torch.cat([value, 0 * value, v_bias])
            else:
                found["encoder"][name] = value
            continue
        module, _, name = next(key.replace(old, new) for old, new in CAE.items() if key.startswith(old)).partition(".")
        if name.startswith("blocks."):
            for old, new in BLOCK.items():
                name = name.replace(f".{old}", f".{new}", 1) if f".{old}" in name else name
        found[module][name] = value
    return found


def make_cae(tensors: dict[str, Tensor], config: dict[str, float]) -> tuple[VisionTransformer, MaskedLatents]:
    width = int(config["decoder_embed_dim"])
    vit = make_vit(1.0)
    regressor = Regressor(32, width, int(config["regressor_depth"]), 4, 0.1, (4, 4)).double()
    head = TokenHead(width, int(config["num_out_dim"])).double()
    states = rename_cae(tensors, "state.")
    fill(vit, states["encoder"])
    fill(regressor, states["regressor"])
    fill(head, states["head"])
    regressor.positions = tensors["state.rd_pos_embed"][0, 1:]
    teacher = GivenTokens(tensors["in.teacher_tokens"])
    return vit, MaskedLatents(regressor, head, FrozenTargets(teacher, (4, 4), "none"), has_cls=True)


@pytest.mark.parametrize("case", ["cae_v2", "cae_v2_projection"])
def test_cae_v2_tokens_loss_and_gradients_are_the_originals(golden: Path, case: str) -> None:
    tensors, config = read_golden(golden / f"{case}.safetensors")
    vit, objective = make_cae(tensors, config)
    view = encode(vit, tensors, tensors["in.mask"])
    if "out64.encoder_tokens" in tensors:
        torch.testing.assert_close(view.tokens, tensors["out64.encoder_tokens"], rtol=0, atol=ATOL)
    hidden = objective.regressor(view.tokens, view.split)[:, view.tokens.shape[1] :]
    torch.testing.assert_close(hidden, tensors["out64.regressor_tokens"], rtol=0, atol=ATOL)

    loss = config["latent_alignment_loss_weight"] * apply(objective, view).loss
    torch.testing.assert_close(loss, tensors["out64.loss"], rtol=0, atol=ATOL)

    loss.backward()
    modules = {"encoder": vit, "regressor": objective.regressor, "head": objective.head}
    compared = 0
    for module, gradients in rename_cae(tensors, "grad64.").items():
        for name, expected in gradients.items():
            own = modules[module].get_parameter(name).grad
            if name.endswith("qkv.bias"):  # ours has a bias for k, which the original has not; attention ignores it
                torch.testing.assert_close(own[32:64], 0 * own[32:64], rtol=0, atol=ATOL)
            torch.testing.assert_close(own, expected, rtol=0, atol=ATOL, msg=f"{module} {name}")
            compared += 1
    assert compared >= 11


@pytest.mark.parametrize(("autocast", "tolerance"), PRECISIONS)
def test_cae_v2_is_the_original_in_float32_and_under_autocast(golden: Path, autocast: bool, tolerance: float) -> None:
    tensors, config = read_golden(golden / "cae_v2.safetensors")
    vit, objective = make_cae(narrow(tensors), config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = apply(objective.float(), encode(vit.float(), narrow(tensors), tensors["in.mask"])).loss
    assert loss.dtype == torch.float32
    expected = float(tensors["out64.loss"]) / config["latent_alignment_loss_weight"]
    assert float(loss.detach()) == pytest.approx(expected, rel=tolerance)


@pytest.fixture
def objectives(small_vit, teacher) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    targets = FrozenTargets(teacher, (4, 4), "layer_norm")
    latents = MaskedLatents(Regressor(64, 64, 2, 2, 0.1, (4, 4)), TokenHead(64, 12), targets, has_cls=True)
    return {
        "pixels": MaskedPixels(Decoder(64, 32, 2, 2, 192, (4, 4)), (8, 8), lambda x: x / 255, patch_normalise=True),
        "latents": latents,
    }


def encode_batch(vit: VisionTransformer, batch) -> EncodedView:
    split = split_mask(batch.masks[0])
    return EncodedView(batch.views[0], encode_visible(vit, batch.views[0] / 255, split), vit.num_prefix_tokens, split)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_loss_is_float32_under_autocast(objectives, small_vit, make_batch, kind: str) -> None:
    objective, seen = objectives[kind], {}
    last = objective.head if kind == "latents" else objective.decoder
    last.register_forward_hook(lambda module, args, output: seen.update(predictions=output))
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        view = encode_batch(small_vit, batch)
        loss = apply(objective, view).loss
    assert seen["predictions"].dtype == torch.bfloat16 and loss.dtype == torch.float32

    predictions, index = seen["predictions"].double(), torch.cat([view.split.visible, view.split.hidden], dim=1)
    if kind == "pixels":
        patches = (batch.views[0].double() / 255).unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 3, 5, 1)
        patches = patches.flatten(3).flatten(1, 2)  # [B, 16, 192], as (row, column, channel)
        patches = torch.stack([p[h] for p, h in zip(patches, view.split.hidden, strict=True)])
        target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        expected = (predictions - target).square().mean()
    else:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = objective.targets.teacher.forward_tokens(batch.views[0]).double()  # 8 x 8, halved to 4 x 4
        grid = tokens.transpose(1, 2).unflatten(2, (8, 8))
        coarse = nn.functional.interpolate(grid, (4, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        coarse = torch.stack([p[i] for p, i in zip(coarse, index, strict=True)])
        target = torch.cat([tokens.mean(dim=1, keepdim=True), coarse], dim=1)
        target = nn.functional.layer_norm(target, (12,), eps=1e-6)
        expected = (1 - nn.functional.cosine_similarity(predictions, target, dim=-1)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=2e-6)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
@pytest.mark.parametrize(("size", "ratio"), [(1, 0.5), (4, 0.0), (1, 0.0), (2, 0.9375)])
def test_corners_of_a_batch_are_finite_and_reach_every_parameter(
    objectives, small_vit, make_batch, kind: str, size: int, ratio: float
) -> None:
    output = apply(objectives[kind], encode_batch(small_vit, make_batch(size, ratio)))
    output.loss.backward()
    assert all(value.isfinite() for value in (output.loss, *get_scalars(output)))
    assert ("cosine_hidden" in output.metrics) == (kind == "latents" and ratio > 0)
    if kind == "pixels" and ratio == 0:
        assert float(output.loss.detach()) == 0.0  # nothing hidden, nothing to predict
    for module in (small_vit, objectives[kind]):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_duplicates_do_not_change_the_loss(objectives, small_vit, make_batch, kind: str) -> None:
    batch = make_batch(3)
    twice = replace(batch, views=tuple(v.repeat(2, 1, 1, 1) for v in batch.views), masks=batch.masks.repeat(1, 2, 1))
    one, two = (apply(objectives[kind], encode_batch(small_vit, b)).loss for b in (batch, twice))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


def test_a_flat_patch_and_a_silent_teacher_are_finite(objectives, small_vit, make_batch) -> None:
    batch = make_batch(2)
    batch = replace(batch, views=tuple(torch.full_like(view, 128) for view in batch.views))  # no variance anywhere
    objectives["latents"].targets.teacher.weight.zero_()  # cosine with a zero vector
    for objective in objectives.values():
        loss = apply(objective, encode_batch(small_vit, batch)).loss
        loss.backward()
        assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in small_vit.parameters())


def test_registers_and_a_missing_cls_take_no_part_in_the_alignment(teacher, make_batch) -> None:
    batch = make_batch()
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 0}
    for has_cls, num_registers in ((True, 3), (False, 0), (False, 2)):
        vit = VisionTransformer(
            **shape, class_token=has_cls, reg_tokens=num_registers, global_pool="avg", fc_norm=False
        )
        head = TokenHead(64, 12)
        seen = []
        head.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.shape))
        targets = FrozenTargets(teacher, (4, 4), "none")
        objective = MaskedLatents(Regressor(64, 64, 1, 2, 0.1, (4, 4)), head, targets, has_cls=has_cls)
        output = apply(objective, encode_batch(vit, batch))
        assert seen == [(8, int(has_cls) + 16, 12)]
        assert ("cosine_cls" in output.metrics) == has_cls
        output.loss.backward()


def test_the_teacher_is_no_part_of_the_module(objectives) -> None:
    objective = objectives["latents"]
    assert isinstance(objective.targets.teacher, nn.Module)
    names = [*objective.state_dict(), *(name for name, _ in objective.named_parameters())]
    assert {name.partition(".")[0] for name in names} == {"regressor", "head"}


def test_published_targets_on_the_students_own_grid_are_the_teachers_tokens(
    small_vit, teacher_of_stride_8, make_batch
) -> None:
    regressor, head = Regressor(64, 64, 1, 2, 0.1, (4, 4)), TokenHead(64, 12)
    objective = MaskedLatents(regressor, head, FrozenTargets(teacher_of_stride_8, (4, 4), "none"), has_cls=False)
    batch = make_batch()
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append(output))
    view = encode_batch(small_vit, batch)
    loss = apply(objective, view).loss
    loss.backward()  # the teacher ran in inference mode: its tokens may not be what backward has saved
    order = torch.cat([view.split.visible, view.split.hidden], dim=1)
    tokens = teacher_of_stride_8.forward_tokens(batch.views[0])
    targets = torch.stack([t[i] for t, i in zip(tokens, order, strict=True)])
    expected = (1 - nn.functional.cosine_similarity(seen[0], targets, dim=-1)).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


def test_the_teachers_feature_is_predicted_from_the_mean_of_the_visible_patches(
    small_vit, teacher_of_stride_8, make_batch
) -> None:
    torch.manual_seed(2)
    regressor, head, feature_head = Regressor(64, 64, 1, 2, 0.1, (4, 4)), TokenHead(64, 12), TokenHead(64, 24)
    batch, losses, metrics = make_batch(), {}, {}
    view = encode_batch(small_vit, batch)
    for weight in (0.0, 0.5):
        objective = MaskedLatents(
            regressor,
            head,
            FrozenTargets(teacher_of_stride_8, (4, 4), "layer_norm", with_feature=weight > 0),
            has_cls=True,
            feature_head=feature_head if weight else None,
            feature_weight=weight,
        )
        output = apply(objective, view)
        losses[weight], metrics[weight] = output.loss, output.metrics
    _, feature = teacher_of_stride_8.forward_tokens_and_feature(batch.views[0])
    target = nn.functional.layer_norm(feature, (24,), eps=1e-6)
    prediction = feature_head(view.tokens[:, 1:].mean(dim=1))  # CLS is no patch
    cosines = nn.functional.cosine_similarity(prediction, target, dim=1)
    torch.testing.assert_close(losses[0.5] - losses[0.0], 0.5 * (1 - cosines).mean(), rtol=0, atol=1e-6)
    torch.testing.assert_close(metrics[0.5]["cosine_feature"], cosines.detach().mean(), rtol=0, atol=1e-6)
    assert "cosine_feature" not in metrics[0.0]
