"""Other people's checkpoints: the same features as their own modules give, every weight accounted for, no code run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panfm.encoder.load import load_encoder
from panfm.encoder.network import EncoderNetwork
from panfm.encoder.open_clip_tower import build_tower
from panfm.encoder.panderm import PREFIX, convert_panderm
from panfm.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "panderm_vit.safetensors"
WIDTH, DEPTH, PATCH, SIDE = 128, 2, 8, 4  # two heads of 64; 4 x 4 patches of 8 pixels


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def get_state(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}


def make_weights(seed: int = 0) -> dict[str, Tensor]:
    """A PanDerm state_dict of a small published kind, no weight zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    weights = {
        "cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 1 + SIDE**2, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH), "norm.bias": draw(WIDTH),
    }  # fmt: skip
    for block in range(DEPTH):
        shapes = {
            "gamma_1": (WIDTH,), "gamma_2": (WIDTH,), "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,),
            "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,), "attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
            "mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,),
            "mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,),
        }  # fmt: skip
        weights |= {f"blocks.{block}.{name}": draw(*shape) for name, shape in shapes.items()}
    return weights


def tune(weights: dict[str, Tensor], tables: float | None = None) -> dict[str, Tensor]:
    """The same as its fine-tuning stores it: the norm behind the pooling, a head, tables of relative positions."""
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: x for name, x in weights.items()}
    tuned["head.weight"], tuned["head.bias"] = torch.zeros(7, WIDTH), torch.zeros(7)
    if tables is not None:
        for block in range(DEPTH):
            shape = ((2 * SIDE - 1) ** 2 + 3, WIDTH // 64)
            values = tables * torch.randn(*shape, generator=torch.Generator().manual_seed(block))
            tuned[f"blocks.{block}.attn.relative_position_bias_table"] = values
            tuned[f"blocks.{block}.attn.relative_position_index"] = torch.zeros(1 + SIDE**2, 1 + SIDE**2).long()
    return tuned


def compute(weights: dict[str, Tensor], images: Tensor, **options: object) -> Tensor:
    model, pooling, _ = convert_panderm(weights, "file", **options)
    return EncoderNetwork(model, pooling, "file").eval()(images)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(("pooling", "feature"), [("cls", "feature_cls"), ("mean", "feature_mean_pool")])
def test_panderm_computes_what_its_own_module_does(
    golden: dict[str, Tensor], prefix: str, pooling: str, feature: str
) -> None:
    weights = {prefix + name: value for name, value in get_state(golden).items()}
    model, found, _ = convert_panderm(weights, "file", pooling=pooling, num_heads=4)
    network = EncoderNetwork(model, found, "file").eval().double()
    torch.testing.assert_close(network(golden["in.images"].double()), golden[f"out64.{feature}"], atol=1e-9, rtol=0)


def test_a_panderm_file_is_an_encoder(tmp_path: Path) -> None:
    weights = make_weights()
    torch.save({"model": weights, "epoch": 3}, tmp_path / "panderm_small.pth")
    save_file({PREFIX + name: value for name, value in weights.items()}, tmp_path / "prefixed.safetensors")
    encoder = load_encoder(f"panderm:{tmp_path / 'panderm_small.pth'}")
    assert (encoder.name, encoder.pooling, encoder.embed_dim, encoder.image_size) == ("panderm_small", "cls", 128, 32)
    plain = encoder.transform.to_plain()
    assert plain["std"][0] == 0.228 and (plain["resize_size"], plain["interpolation"]) == (37, "bilinear")
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prefixed = load_encoder(f"panderm:{tmp_path / 'prefixed.safetensors'}")
    assert torch.equal(encoder.forward(images), prefixed.forward(images)) and encoder.hash == prefixed.hash
    tuned = load_encoder(f"panderm:{tmp_path / 'panderm_small.pth'}?pooling=mean")
    assert tuned.hash != encoder.hash and not torch.allclose(tuned.forward(images), encoder.forward(images))
    assert load_encoder(f"panderm:{tmp_path / 'panderm_small.pth'}?image_size=64").image_size == 64


def test_a_fine_tuned_file_reads_its_relative_positions(tmp_path: Path) -> None:
    weights, images = make_weights(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = compute(weights, images, pooling="mean")
    torch.testing.assert_close(compute(tune(weights), images), plain)
    torch.testing.assert_close(compute(tune(weights, tables=0.0), images), plain, atol=1e-5, rtol=1e-5)
    assert (compute(tune(weights, tables=3.0), images) - plain).abs().max() > 1e-2
    with pytest.raises(UserError, match=r"fine-tuned with the mean .* leave out \?pooling="):
        compute(tune(weights), images, pooling="cls")


def test_dermlip_puts_the_norm_twice_and_projects() -> None:
    weights, images = make_weights(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    head = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(2))
    given = {f"visual.{name}": value for name, value in weights.items()} | {"visual.head.weight": head}
    given |= {"text.transformer.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    model, _, _ = convert_panderm(weights, "file")
    tokens = model.eval().forward_features(images)[:, 1:]  # behind the final norm
    norm = nn.functional.layer_norm(tokens.mean(1), (WIDTH,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    torch.testing.assert_close(compute(given, images), norm @ head.T, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"head\.weight missing; DermLIP's tower ends in"):
        compute({name: value for name, value in given.items() if name != "visual.head.weight"}, images)
    with pytest.raises(UserError, match=r"pooling \(cls\) must be mean"):
        compute(given, images, pooling="cls")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.v_bias"), r"1 missing \(blocks.1.attn.qkv.bias\)"),
        (lambda w: w.pop("blocks.0.attn.q_bias"), "no PanDerm encoder: blocks.0.attn.q_bias missing"),
        (lambda w: w.update(surprise=torch.zeros(3)), r"1 unexpected \(surprise\)"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), r"1 reshaped \(norm.bias \[3\] for \[128\]\)"),
        (lambda w: w.update({"encoder.norm.bias": w.pop("norm.bias")}), "1 missing .norm.bias.*1 unexpected"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(change: object, message: str) -> None:
    weights = make_weights()
    change(weights)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        convert_panderm(weights, "file")


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small models under open_clip's roof: its own ViT, the same with QuickGELU, towers of timm's."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    vit = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
    trunk = {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False}
    for name, values in (
        ("panfm-vit", {"vision_cfg": vit}),
        ("panfm-quick", {"vision_cfg": vit, "quick_gelu": True}),
        ("panfm-trunk", {"vision_cfg": trunk | {"timm_pool": "token", "timm_proj": "linear"}}),
        ("panfm-mean", {"vision_cfg": trunk | {"timm_pool": "avg", "timm_proj": "linear"}}),
        ("panfm-odd", {"vision_cfg": vit | {"attentional_pool": True}}),
        ("panfm-cnn", {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}),
    ):
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "text_cfg": text, **values}))
    open_clip.add_model_config(folder)


@pytest.mark.parametrize("name", ["panfm-vit", "panfm-quick", "panfm-trunk", "panfm-mean"])
def test_an_open_clip_tower_gives_the_embedding_of_its_own_module(small_models: None, name: str) -> None:
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.create_model(name, load_weights=False).eval()
    theirs.load_state_dict({key: value + 0.05 * torch.randn_like(value) for key, value in theirs.state_dict().items()})
    tower = build_tower(name, theirs.state_dict(), "file")
    images = torch.randn(2, 3, tower.image_size, tower.image_size)
    ours = EncoderNetwork(tower.model, tower.pooling, "file").eval()
    torch.testing.assert_close(ours(images), theirs.encode_image(images), atol=1e-5, rtol=1e-5)


def test_an_open_clip_file_is_an_encoder_or_refused(small_models: None, tmp_path: Path) -> None:
    import open_clip

    state = open_clip.create_model("panfm-vit", load_weights=False).state_dict()
    torch.save({"state_dict": state}, tmp_path / "epoch_30.pt")
    encoder = load_encoder(f"open_clip:panfm-vit@{tmp_path / 'epoch_30.pt'}")
    assert (encoder.name, encoder.pooling, encoder.embed_dim) == ("panfm-vit@epoch_30", "cls", 24)
    assert encoder.transform.to_plain()["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    with pytest.raises(UserError, match="knows no model panfm-vit2; nearest: panfm-vit"):
        load_encoder(f"open_clip:panfm-vit2@{tmp_path / 'epoch_30.pt'}")
    with pytest.raises(UserError, match=r"downloads nothing; .* open_clip:panfm-vit@FILE"):
        load_encoder("open_clip:panfm-vit")
    with pytest.raises(UserError, match="its tower has attentional_pool, which panfm does not read"):
        build_tower("panfm-odd", state, "file")
    with pytest.raises(UserError, match="has a tower that panfm does not read"):
        build_tower("panfm-cnn", state, "file")
    with pytest.raises(UserError, match=r"1 missing \(fc_norm.weight\)"):
        build_tower("panfm-vit", {key: value for key, value in state.items() if key != "visual.proj"}, "file")
    with pytest.raises(UserError, match=r"no weight begins with visual\."):
        build_tower("panfm-vit", {"cls_token": torch.zeros(1)}, "file")


def test_a_tag_of_open_clips_is_found_in_the_cache_or_not_at_all(
    small_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from open_clip import pretrained

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    record = {"hf_hub": "lab/small/", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setitem(pretrained._PRETRAINED, "panfm-vit", {"ours": record, "quick": record | {"quick_gelu": True}})
    with pytest.raises(UserError, match=r"not in the local cache.*`hf download lab/small open_clip_model.safetensors`"):
        load_encoder("open_clip:panfm-vit@ours")
    snapshot = tmp_path / "models--lab--small/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--lab--small/refs").mkdir()
    (tmp_path / "models--lab--small/refs/main").write_text("abc")
    state = open_clip.create_model("panfm-vit", load_weights=False).state_dict()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()}, snapshot / "open_clip_model.safetensors"
    )
    encoder = load_encoder("open_clip:panfm-vit@ours")
    assert (encoder.name, encoder.transform.mean) == ("panfm-vit@ours", (0.1, 0.2, 0.3))
    assert torch.equal(encoder.module.model.norm.weight, state["visual.ln_post.weight"])
    with pytest.raises(UserError, match="quick was trained with QuickGELU, which panfm-vit has not"):
        load_encoder("open_clip:panfm-vit@quick")
    with pytest.raises(UserError, match="other is no file"):
        load_encoder("open_clip:panfm-vit@other")


@pytest.mark.parametrize(
    ("width", "depth", "prefix", "num_tensors", "num_parameters"),
    [(768, 12, "", 186, 85_807_872), (1024, 24, PREFIX, 366, 303_326_208)],
)
def test_the_published_sizes_load_to_the_last_tensor(
    width: int, depth: int, prefix: str, num_tensors: int, num_parameters: int
) -> None:
    """PanDerm's ViT-B (names as they are) and ViT-L (behind `encoder.`), by the names and shapes of their files."""
    wide = {key: tuple(size // WIDTH * width if size % WIDTH == 0 else size for size in value.shape)
            for key, value in make_weights().items()}  # fmt: skip
    block = {key.removeprefix("blocks.0."): shape for key, shape in wide.items() if key.startswith("blocks.0.")}
    shapes = {key: shape for key, shape in wide.items() if not key.startswith("blocks.")}
    shapes |= {"pos_embed": (1, 197, width), "patch_embed.proj.weight": (width, 3, 16, 16)}
    shapes |= {f"blocks.{number}.{key}": shape for number in range(depth) for key, shape in block.items()}
    with torch.device("meta"):
        weights = {prefix + key: torch.empty(shape) for key, shape in shapes.items()}
        model, pooling, shape = convert_panderm(weights, "file")
    assert len(weights) == num_tensors and pooling == "cls"
    assert (shape.image_size, shape.num_heads, shape.depth) == (224, width // 64, depth)
    assert sum(tensor.numel() for tensor in weights.values()) == num_parameters
    zeros = depth * width  # the biases of the keys, which the file leaves out
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters + zeros


def test_code_of_the_users_own_runs_only_where_that_was_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_encoder.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    transform = {'image_size': 16, 'resize_size': 16, 'interpolation': 'bilinear',\n"
        "                 'mean': [0, 0, 0], 'std': [1, 1, 1]}\n"
        "    return {'model': nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), 'transform': transform}\n"
        "def nothing():\n"
        "    return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set PANFM_ALLOW_PYTHON=1"):
        load_encoder("python:own_encoder:make")
    monkeypatch.setenv("PANFM_ALLOW_PYTHON", "1")
    encoder = load_encoder("python:own_encoder:make")
    images = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    expected = nn.functional.avg_pool2d(images.float() / 255, 8).flatten(1)
    assert encoder.embed_dim == 12
    np.testing.assert_allclose(encoder.forward(images).numpy(), expected.numpy(), atol=1e-6)
    for address, message in (
        ("python:own_encoder", "write python:MODULE:FUNCTION"),
        ("python:own_encoder:absent", "has no attribute 'absent'"),
        ("python:no_such_module:make", "No module named 'no_such_module'"),
        ("python:own_encoder:nothing", "must return a dict with model"),
        ("python:own_encoder:make?image_size=32", "leave out .image_size="),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder(address)
