"""One export, the same photographs, four readers: timm, panfm, a Hugging Face folder and ONNX give equal features."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from panfm.cli import export
from panfm.encoder import load_encoder
from panfm.encoder.onnx import FP32, run_onnx
from panfm.errors import UserError
from tests.encoder.test_export import SMALL, make_checkpoint

pytestmark = pytest.mark.slow


def draw_photograph(path: Path, seed: int) -> Path:
    """Something like a mole on skin: colours, a soft edge, hairs of noise, any size, landscape or portrait."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(70, 190, 2))
    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot((x - width * rng.uniform(0.3, 0.7)) / width, (y - height * rng.uniform(0.3, 0.7)) / height)
    mole = 1 / (1 + np.exp(40 * (distance - rng.uniform(0.1, 0.3))))[..., None]
    pixels = rng.uniform([190, 140, 110], [240, 190, 170]) * (1 - mole) + rng.uniform(20, 110, 3) * mole
    pixels = np.clip(pixels + rng.normal(0, 6, (height, width, 1)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7)).save(path, quality=90)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    return [draw_photograph(folder / f"{seed}.{'png' if seed % 3 else 'jpg'}", seed) for seed in range(7)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"
    make_checkpoint(run / "checkpoints/step-00000007", SMALL, "mean")
    return run


def assert_equal(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """As different photographs are not: within 1e-4 of the largest feature."""
    assert np.abs(expected[1:] - expected[0]).max() > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_timm_panfm_hugging_face_and_onnx_give_the_same(run: Path, photographs: list[Path], tmp_path: Path) -> None:
    for to in ("timm", "hf", "onnx"):
        export.run(str(run), tmp_path / to, to=to)
    expected = load_encoder(f"panfm:{tmp_path / 'timm'}").embed(photographs)

    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    with torch.no_grad():
        found = theirs(torch.stack([transform(Image.open(path).convert("RGB")) for path in photographs])).numpy()
    assert_equal(found, expected)

    folder = tmp_path / "hf"  # what a hub or a wrapper of timm's models asks of a folder
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_vit" and config["num_features"] == 64
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48] and (folder / "model.safetensors").is_file()
    # In these words transformers' TimmWrapperModel builds it.
    wrapped = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **config["model_args"]).eval()
    wrapped.load_state_dict(load_file(folder / "model.safetensors"))
    images = np.stack([load_encoder(f"panfm:{folder}").transform.apply(path.read_bytes()) for path in photographs])
    mean, std = (torch.tensor(config["pretrained_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert_equal(wrapped((torch.from_numpy(images) / 255 - mean) / std).numpy(), expected)
    assert "AutoModel.from_pretrained" in (folder / "README.md").read_text()
    (folder / "panfm.json").unlink()  # config.json and the weights are enough
    hugging_face = load_encoder(f"hf:{folder}")
    assert hugging_face.pooling == "mean"
    assert_equal(hugging_face.embed(photographs), expected)

    facts = json.loads((tmp_path / "onnx/panfm_onnx.json").read_text())
    assert facts["name"] == "onnx" and facts["licences"] == ["CC BY-NC 4.0"] and facts["use"] == "research"
    assert_equal(run_onnx(tmp_path / "onnx" / FP32, images), expected)


def test_what_is_no_run_and_no_address_is_refused(run: Path, tmp_path: Path) -> None:
    for given, options, message in (
        (str(tmp_path / "absent"), {"to": "onnx"}, "no such run, and no encoder address"),
        ("timm:test_vit@random:0", {"to": "onnx", "use": "education"}, "--use is decided when a run is exported"),
        (str(run), {"to": "timm", "shards": ["a"]}, "--shards calibrates int8"),
        (str(run), {"to": "onnx", "use": "commercial"}, "not recorded what its terms permit besides research"),
    ):
        with pytest.raises(UserError, match=message):
            export.run(given, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
