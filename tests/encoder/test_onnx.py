"""An encoder as ONNX: any batch, the same features as PyTorch, int8 close to them, nothing half-written."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from panfm.encoder.load import Encoder, load_encoder
from panfm.encoder.onnx import FACTS, FP32, INT8, check_onnx, export_onnx, run_onnx
from panfm.errors import UserError
from panfm.files import compute_file_sha256

pytestmark = pytest.mark.slow


def write_weights(path: Path, seed: int) -> str:
    """A ViT whose weights are as large as trained ones: with those of an initialisation rounding is all there is."""
    torch.manual_seed(seed)  # its initialisation counts, too
    model = timm.create_model("test_vit", num_classes=0, img_size=48)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    save_file(model.state_dict(), path)
    return f"timm:test_vit@{path}?image_size=48"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", 0))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth pictures: random pixels look alike to any network."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (12, 3, 6, 6)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear").to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def folder(encoder: Encoder, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "export"
    export_onnx(encoder, out, images)
    return out


def test_any_batch_gives_the_features_of_pytorch(encoder: Encoder, images: np.ndarray, folder: Path) -> None:
    expected = encoder.forward(torch.from_numpy(images)).numpy()
    for number in (1, 2, 7, 12):
        np.testing.assert_allclose(run_onnx(folder / FP32, images[:number]), expected[:number], atol=1e-5, rtol=1e-4)
    assert run_onnx(folder / FP32, images).dtype == np.float32


def test_int8_is_smaller_and_close(encoder: Encoder, images: np.ndarray, folder: Path) -> None:
    expected, found = encoder.forward(torch.from_numpy(images)).numpy(), run_onnx(folder / INT8, images)
    ours, theirs = found - expected.mean(0), expected - expected.mean(0)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.99 and not np.allclose(expected, found, atol=1e-6)
    assert (folder / INT8).stat().st_size < 0.5 * (folder / FP32).stat().st_size
    stated = json.loads((folder / FACTS).read_text())["check"]
    assert stated["int8_cosine_mean"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert stated["int8_cosine_min"] == pytest.approx(cosine.min(), abs=1e-5) and stated["num_images"] == 12


def test_the_facts_are_all_that_a_reader_needs(encoder: Encoder, folder: Path) -> None:
    facts = json.loads((folder / FACTS).read_text())
    assert sorted(path.name for path in folder.iterdir()) == [INT8, FP32, FACTS]
    assert facts["transform"] == encoder.transform.to_plain() and facts["encoder_hash"] == encoder.hash
    assert facts["files"] == {name: compute_file_sha256(folder / name) for name in (FP32, INT8)}
    assert "gives no diagnosis" in facts["warning"] and str(folder) not in (folder / FACTS).read_text()


def test_a_graph_of_other_weights_is_noticed(images: np.ndarray, folder: Path, tmp_path: Path) -> None:
    other = load_encoder(write_weights(tmp_path / "other.safetensors", 1))
    assert check_onnx(other, folder, images).fp32_difference > 1e-2


def test_what_cannot_be_exported_leaves_nothing(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exported in fp32 from the CPU; leave out \?dtype="):
        export_onnx(load_encoder("timm:test_vit@random:0?dtype=bf16"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no ONNX export"):
        export_onnx(encoder, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
