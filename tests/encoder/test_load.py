import json
import pickle
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from panfm.encoder import Encoder, load_encoder
from panfm.encoder import load as load_module
from panfm.errors import UserError
from panfm.evaluation.results import EncoderCard
from panfm.objectives.targets import compute_teacher_targets

VIT = "timm:test_vit@random:0"


def make_images(number: int, size: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (number, 3, size, size), dtype=np.uint8))


def save_timm(path: Path, name: str, **kwargs: object) -> torch.nn.Module:
    """Save a timm model with every weight and buffer random, so that each one matters; return it in eval mode."""
    model = timm.create_model(name, **kwargs).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
    save_file(model.state_dict(), path)
    return model


def normalise(images: torch.Tensor, mean: float = 0.5, std: float = 0.5) -> torch.Tensor:
    return (images.float() / 255 - mean) / std


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_efficientnet", "test_resnet"])
def test_features_are_those_of_timm_at_its_own_pooling(name: str, tmp_path: Path) -> None:
    theirs = save_timm(tmp_path / "w.safetensors", name, num_classes=1000)
    theirs.reset_classifier(0)
    encoder = load_encoder(f"timm:{name}@{tmp_path / 'w.safetensors'}")
    images = make_images(3, encoder.image_size)
    cfg = theirs.pretrained_cfg
    x = (images.float() / 255 - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs(x)
    torch.testing.assert_close(encoder.forward(images), expected, rtol=1e-4, atol=1e-5)
    assert encoder.embed_dim == expected.shape[1]


def test_poolings_of_a_vit_are_those_of_its_normalised_tokens() -> None:
    images = make_images(2, 160)
    tokens = load_encoder(VIT).module.model.forward_features(normalise(images))  # [2, 1 + 100, 64]
    expected = {
        "cls": tokens[:, 0],
        "mean": tokens[:, 1:].mean(dim=1),
        "cls_mean": torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1),
    }
    for pooling, values in expected.items():
        encoder = load_encoder(f"{VIT}?pooling={pooling}")
        torch.testing.assert_close(encoder.forward(images), values, rtol=1e-4, atol=1e-5)
        assert (encoder.pooling, encoder.embed_dim) == (pooling, values.shape[1])
    torch.testing.assert_close(load_encoder(VIT).forward_tokens(images), tokens, rtol=1e-4, atol=1e-5)


def test_tokens_are_normalised_where_the_norm_lies_behind_the_pooling() -> None:
    tokens = load_encoder("timm:test_vit2@random:0").forward_tokens(make_images(2, 160))
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(2, 100), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.std(dim=-1, correction=0), torch.ones(2, 100), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("address", "has_cls", "num_registers"),
    [
        (VIT, True, 0),
        ("timm:vit_tiny_patch16_dinov3_qkvb@random:0?image_size=64", True, 4),
        ("timm:test_vit2@random:0", False, 1),
    ],
)
def test_a_teachers_class_token_is_the_target_of_the_whole_image(
    address: str, has_cls: bool, num_registers: int
) -> None:
    encoder = load_encoder(address)
    size = encoder.image_size
    images = make_images(2, size)
    network = encoder.module
    with torch.no_grad():
        tokens = network.norm_behind_pooling(network.model.forward_features(encoder.transform.normalise(images)))
    assert network.num_prefix_tokens == has_cls + num_registers and encoder.token_grid(size) == (size // 16, size // 16)
    targets = compute_teacher_targets(encoder, images, (size // 16, size // 16), "none")
    patches = tokens[:, has_cls + num_registers :]  # neither a register nor CLS is a place
    torch.testing.assert_close(targets.patches, patches, rtol=1e-4, atol=1e-5)
    whole = tokens[:, 0] if has_cls else patches.mean(dim=1)
    torch.testing.assert_close(targets.whole, whole, rtol=1e-4, atol=1e-5)


def test_a_cnn_teacher_gives_its_stride_16_map_row_by_row(tmp_path: Path) -> None:
    save_timm(tmp_path / "w.safetensors", "test_efficientnet", num_classes=0)
    encoder = load_encoder(f"timm:test_efficientnet@{tmp_path / 'w.safetensors'}")
    features = timm.create_model("test_efficientnet", features_only=True).eval()
    features.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=False)
    images = make_images(2, 96)[..., :80]  # 6 x 5 places: rows and columns must not be exchanged
    level = features.feature_info.reduction().index(16)
    with torch.no_grad():
        expected = features(encoder.transform.normalise(images))[level]  # [2, C, 6, 5]
    tokens = encoder.forward_tokens(images)
    torch.testing.assert_close(tokens[:, 5 * 2 + 3], expected[:, :, 2, 3], rtol=1e-4, atol=1e-5)
    assert tokens.shape == (2, 30, expected.shape[1])
    assert encoder.token_grid(112) == (7, 7)  # as it is: no image_size was given
    assert load_encoder("timm:test_efficientnet@random:0?image_size=160").token_grid(112) == (10, 10)


@pytest.mark.parametrize(
    "address", [VIT, f"{VIT}?pooling=cls", "timm:test_vit2@random:0", "timm:test_efficientnet@random:0"]
)
def test_a_teachers_tokens_and_feature_in_one_pass_are_those_of_two(address: str) -> None:
    encoder = load_encoder(address)
    images = make_images(2, encoder.image_size)
    tokens, feature = encoder.forward_tokens_and_feature(images)
    torch.testing.assert_close(tokens, encoder.forward_tokens(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(feature, encoder.forward(images), rtol=1e-5, atol=1e-6)


def test_a_vit_teacher_resizes_images_to_its_own_size() -> None:
    encoder = load_encoder(f"{VIT}?image_size=64")
    images = make_images(2, 96)
    x = F.interpolate(normalise(images), (64, 64), mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad():
        expected = encoder.module.model.forward_features(x)
    assert encoder.token_grid(96) == (4, 4)
    torch.testing.assert_close(encoder.forward_tokens(images), expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_is_frozen_and_its_target_may_enter_a_loss() -> None:
    encoder = load_encoder(VIT)
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    target = encoder.forward_tokens(make_images(1, 160))
    prediction = torch.zeros_like(target, requires_grad=True)
    F.smooth_l1_loss(prediction, target).backward()  # keeps the target for the backward pass
    assert prediction.grad is not None


def test_a_teacher_keeps_its_precision_inside_the_autocast_of_its_student() -> None:
    images = make_images(1, 160)
    for address, autocasts in ((VIT, False), (f"{VIT}?dtype=bf16", True)):
        encoder = load_encoder(address)
        outside = encoder.forward_tokens(images)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(encoder.forward_tokens(images), outside, rtol=0, atol=0)
        rounded = not torch.equal(outside, load_encoder(VIT).forward_tokens(images))
        assert rounded == autocasts and outside.dtype == torch.float32


def test_the_hash_changes_with_everything_that_changes_features_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_timm(tmp_path / "a.safetensors", "test_vit", num_classes=0)
    weights = load_file(tmp_path / "a.safetensors")
    weights["norm.bias"][0] += 1e-3
    save_file(weights, tmp_path / "b.safetensors")
    base = load_encoder(f"timm:test_vit@{tmp_path / 'a.safetensors'}").hash
    (tmp_path / "a.safetensors").rename(tmp_path / "renamed.safetensors")
    assert load_encoder(f"timm:test_vit@{tmp_path / 'renamed.safetensors'}").hash == base
    others = [
        load_encoder(f"timm:test_vit@{tmp_path / 'b.safetensors'}").hash,
        load_encoder(f"timm:test_vit@{tmp_path / 'renamed.safetensors'}?image_size=128").hash,
        load_encoder(f"timm:test_vit@{tmp_path / 'renamed.safetensors'}?pooling=mean").hash,
        load_encoder(f"timm:test_vit@{tmp_path / 'renamed.safetensors'}?dtype=bf16").hash,
    ]
    monkeypatch.setattr(load_module, "ENCODER_CODE_VERSION", 999)
    others.append(load_encoder(f"timm:test_vit@{tmp_path / 'renamed.safetensors'}").hash)
    assert len({base, *others}) == 6


def test_a_seed_gives_the_same_encoder_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, third = (load_encoder(f"timm:test_vit@random:{seed}").hash for seed in (3, 3, 4))
    assert first == second != third
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_transform_is_the_published_one_at_the_size_of_the_address() -> None:
    transform = load_encoder("timm:test_vit3@random:0?image_size=112").transform
    config = timm.create_model("test_vit3").pretrained_cfg
    assert (transform.image_size, transform.resize_size) == (112, int(112 / config["crop_pct"]))
    assert (transform.mean, transform.std) == (config["mean"], config["std"])
    assert transform.interpolation == config["interpolation"]


def test_the_card_of_an_encoder_is_one_of_the_board() -> None:
    encoder = load_encoder(VIT)
    card = EncoderCard(**asdict(encoder.card))
    assert card.num_parameters == sum(p.numel() for p in timm.create_model("test_vit", num_classes=0).parameters())
    assert (card.training_data, card.contamination) == ("none: random weights", "none")
    # 101 tokens of width 64, 2 heads: patches, then qkv, scores, mixing, projection and MLP of each block.
    model, tokens, width = encoder.module.model, 101, 64
    hidden = model.blocks[0].mlp.fc1.out_features
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens * tokens * width
    patches = 2 * 100 * 16 * 16 * 3 * width
    assert card.flops_per_image == patches + len(model.blocks) * block


def test_embed_reads_files_in_order_and_names_the_one_that_fails(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    encoder: Encoder = load_encoder(f"{VIT}?image_size=32")
    values = encoder.embed(paths, batch_size=2)
    assert values.shape == (5, 64) and values.dtype == np.float32
    np.testing.assert_allclose(encoder.embed(paths[::-1], batch_size=3, workers=0)[::-1], values, rtol=1e-4, atol=1e-6)
    assert not np.allclose(values[0], values[1])
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bad\.jpg: does not decode \(undecodable\)"):
        encoder.embed([*paths, tmp_path / "bad.jpg"])
    with pytest.raises(UserError, match=r"absent\.jpg: cannot be read"):
        encoder.embed([tmp_path / "absent.jpg"])


def test_weights_that_do_not_fit_are_an_error_with_the_list(tmp_path: Path) -> None:
    save_timm(tmp_path / "w.safetensors", "test_vit", num_classes=0)
    weights = load_file(tmp_path / "w.safetensors")
    weights["surplus"] = torch.zeros(1)
    del weights["norm.bias"]
    weights["norm.weight"] = torch.zeros(7)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        load_encoder(f"timm:test_vit@{tmp_path / 'w.safetensors'}")
    message = str(error.value)
    assert "1 missing (norm.bias); 1 unexpected (surplus); 1 reshaped (norm.weight [7] for [64])" in message


def test_a_checkpoint_under_its_publishers_names_is_read(tmp_path: Path) -> None:
    """As MAE writes it: a pickle of tensors, the decoder beside the encoder; and behind a prefix, with registers."""
    theirs = save_timm(tmp_path / "w.safetensors", "test_vit", num_classes=0)
    plain = load_encoder(f"timm:test_vit@{tmp_path / 'w.safetensors'}")
    assert plain.card.licence is None  # weights under a bare name may be anybody's
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 64)}
    torch.save({"model": {**theirs.state_dict(), **extra}}, tmp_path / "mae.pth")
    torch.save({"teacher": {f"backbone.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "prefixed.pth")
    for name in ("mae.pth", "prefixed.pth"):
        assert load_encoder(f"timm:test_vit@{tmp_path / name}").hash == plain.hash
    torch.save({"model": {**theirs.state_dict(), **extra, "surplus": torch.zeros(1)}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"surplus is unknown to the encoder; name the architecture and the image size"):
        load_encoder(f"timm:test_vit@{tmp_path / 'odd.pth'}")
    small = timm.create_model("test_vit", num_classes=0, img_size=96).state_dict()
    torch.save({"model": {**small, **extra}}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"does not fit as it is: pos_embed"):
        load_encoder(f"timm:test_vit@{tmp_path / 'small.pth'}")
    assert load_encoder(f"timm:test_vit@{tmp_path / 'small.pth'}?image_size=96").image_size == 96
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Path.cwd))
    with pytest.raises(UserError, match="holds more than tensors, and reading that could execute code"):
        load_encoder(f"timm:test_vit@{tmp_path / 'trap.pth'}")


def test_a_vit_file_of_another_size_loads_at_that_size_only(tmp_path: Path) -> None:
    theirs = save_timm(tmp_path / "w.safetensors", "test_vit", num_classes=0, img_size=96)
    with pytest.raises(UserError, match=r"1 reshaped \(pos_embed \[1, 37, 64\] for \[1, 101, 64\]\)"):
        load_encoder(f"timm:test_vit@{tmp_path / 'w.safetensors'}")
    encoder = load_encoder(f"timm:test_vit@{tmp_path / 'w.safetensors'}?image_size=96")
    assert torch.equal(encoder.module.model.pos_embed, theirs.pos_embed)
    resampled = load_encoder("timm:test_vit@random:0?image_size=96")  # drawn at that size, not resampled
    assert resampled.module.model.pos_embed.shape == (1, 37, 64)


def test_what_cannot_be_read_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text(json.dumps({"architecture": "test_vit"}))
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text(json.dumps({"architectures": ["ViTModel"]}))
    wrong = {
        f"timm:test_vit@{tmp_path / 'w.pt'}": r"78 missing .*1 unexpected \(x\); name the architecture",
        f"timm:test_vit@{tmp_path / 'torn.safetensors'}": "damaged or not a safetensors file",
        f"timm:test_vit@{tmp_path / 'absent.safetensors'}": "no such weights file",
        f"timm:test_vit@{tmp_path / 'w.npz'}": "read from .safetensors files only",
        f"hf:{tmp_path / 'pickled'}": r"pytorch_model.bin: no state_dict found \(no weights\)",
        f"hf:{tmp_path / 'foreign'}": "no key architecture, so it is not in timm's layout",
        f"hf:{tmp_path}": "config.json is missing; an encoder folder holds",
        f"panfm:{tmp_path}": "no panfm.json, so it is no export",
        f"panfm:{tmp_path / 'absent'}": "is not a folder",
        "timm:test_vitt@random:0": "timm has no model test_vitt; nearest: test_vit",
        "timm:test_vit.nonsense@random:0": "Invalid pretrained tag",
        f"{VIT}?image_size=100": r"image_size \(100\) must be divisible by the patch size \(16\); try 96 or 112",
        f"{VIT}?pooling=map": "needs a model with attention pooling",
        "timm:test_resnet@random:0?pooling=cls": "ResNet has no tokens to pool",
        "timm:test_vit3@random:0?pooling=cls": "has not; try pooling=mean",
    }
    for address, message in wrong.items():
        with pytest.raises(UserError, match=message):
            load_encoder(address)
    with pytest.raises(UserError, match="device 'tpu9' is not known"):
        load_encoder(VIT, device="tpu9")


def test_published_weights_come_from_the_local_cache_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"not in the local cache .*`hf download timm/test_vit.r160_in1k model.saf"):
        load_encoder("timm:test_vit")
    snapshot = tmp_path / "models--timm--test_vit.r160_in1k/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--timm--test_vit.r160_in1k/refs").mkdir()
    (tmp_path / "models--timm--test_vit.r160_in1k/refs/main").write_text("abc")
    theirs = save_timm(snapshot / "model.safetensors", "test_vit", num_classes=1000)
    encoder = load_encoder("timm:test_vit")
    assert torch.equal(encoder.module.model.norm.bias, theirs.norm.bias)
    assert encoder.card.training_data == "timm tag r160_in1k" and encoder.card.contamination == "unknown"


def test_a_folder_that_timm_wrote_is_read(tmp_path: Path) -> None:
    theirs = save_timm(tmp_path / "w.safetensors", "test_vit", num_classes=4, img_size=96)
    config = {
        "architecture": "test_vit",
        "num_classes": 4,
        "model_args": {"img_size": 96},
        "pretrained_cfg": {**theirs.pretrained_cfg, "input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "w.safetensors").rename(tmp_path / "model.safetensors")
    encoder = load_encoder(f"hf:{tmp_path}")
    assert (encoder.image_size, encoder.transform.mean) == (96, (0.1, 0.2, 0.3))
    with torch.no_grad():
        expected = theirs.forward_features(encoder.transform.normalise(make_images(2, 96)))[:, 0]
    torch.testing.assert_close(encoder.forward(make_images(2, 96)), expected, rtol=1e-4, atol=1e-5)


def test_facts_are_read_without_torch() -> None:
    code = "import sys, panfm.encoder, panfm.encoder.facts; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real
def test_the_imagenet_baseline_loads_strictly_and_gives_the_features_of_timm(real_data: Path) -> None:
    weights = real_data / "weights/tf_efficientnet_lite0.imagenet1k.safetensors"
    encoder = load_encoder(f"timm:tf_efficientnet_lite0.in1k@{weights}")
    card = encoder.card
    assert (card.embed_dim, card.image_size, card.num_parameters) == (1280, 224, 3_371_008)
    assert (card.training_data, card.contamination) == ("ImageNet-1k", "none")
    assert encoder.token_grid(224) == (14, 14) and encoder.transform.resize_size == 256

    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(load_file(weights), strict=True)
    theirs.reset_classifier(0)
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    paths = sorted((real_data / "dermoscopic/ham10000").rglob("*.jpg"))[:3]
    with torch.no_grad():
        expected = theirs(torch.stack([transform(Image.open(path)) for path in paths])).numpy()  # [3, 1280]
    values = encoder.embed(paths)
    for ours, reference in zip(values, expected, strict=True):  # the decoders and the rounding of the resize differ
        assert np.corrcoef(ours, reference)[0, 1] > 0.999
    assert np.corrcoef(values[0], values[1])[0, 1] < 0.99  # of two images
