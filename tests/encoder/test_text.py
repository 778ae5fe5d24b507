"""The text side of an export: written from a checkpoint, read back, compared with what was trained."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from panfm.config import to_plain
from panfm.encoder import load_encoder
from panfm.encoder.export import export_encoder
from panfm.encoder.facts import EncoderFacts, TransformFacts, write_facts
from panfm.encoder.text import load_text
from panfm.errors import UserError
from panfm.files import compute_file_sha256, write_json
from panfm.models.text import TextConfig, build_text_tower
from panfm.models.vit import EncoderConfig, build_vit, get_timm_kwargs
from panfm.objectives.image_text import ImageText, ImageTextConfig

pytestmark = pytest.mark.skipif(find_spec("open_clip") is None, reason='no open_clip: pip install "panfm[text]"')
ENCODER = EncoderConfig(name="test_vit", image_size=48, patch_size=8)
TEXT = TextConfig(width=32, layers=1, heads=2, context_length=12, init="where/it/was.safetensors")
TEXTS = ["a melanoma", "a nevus on the trunk, 4 mm"]


def write_checkpoint(folder: Path, config: ImageTextConfig) -> ImageText:
    """What a run with this objective leaves behind, as far as an export reads it; and the objective."""
    folder.mkdir()
    torch.manual_seed(0)
    vit = build_vit(ENCODER, 0)
    objective = ImageText(
        ImageTextConfig(**(to_plain(config) | {"text": to_plain(TEXT) | {"init": None}})), vit.embed_dim
    )
    save_file(vit.state_dict(), folder / "encoder.safetensors")
    save_file(objective.state_dict(), folder / "text.safetensors")
    size = ENCODER.image_size
    transform = TransformFacts(
        image_size=size, resize_size=size, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
    )
    other = {"kind": "masked_image", "target": {"kind": "pixels"}}
    facts = EncoderFacts(
        timm_name=ENCODER.name,
        timm_kwargs=get_timm_kwargs(ENCODER),
        transform=transform,
        samples_seen=1,
        step=1,
        config={"objectives": [other, to_plain(config)]},
        code_version="0.1.0",
    )
    write_facts(folder / "encoder.json", facts)
    names = ("encoder.safetensors", "encoder.json", "text.safetensors")
    write_json(folder / "manifest.json", {"files": {n: {"sha256": compute_file_sha256(folder / n)} for n in names}})
    return objective.eval()


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_an_export_compares_images_and_texts_as_the_objective_did(tmp_path: Path, loss: str) -> None:
    objective = write_checkpoint(tmp_path / "step-1", ImageTextConfig(loss=loss, output_dim=16, text=TEXT))
    out = export_encoder(tmp_path / "step-1", tmp_path / "out")
    assert sorted(path.name for path in (out / "text").iterdir()) == ["config.json", "model.safetensors"]
    assert "load_text" in (out / "README.md").read_text()
    assert "where/it/was" not in (out / "text" / "config.json").read_text()

    text = load_text(out)
    assert text.scale == pytest.approx({"clip": 1 / 0.07, "siglip": 10.0}[loss], rel=1e-5)
    assert text.bias == {"clip": 0.0, "siglip": -10.0}[loss]
    embeddings = text.embed_texts(TEXTS)
    assert embeddings.shape == (2, 16) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    from panfm.data.captions import tokenise

    with torch.no_grad():
        expected = torch.nn.functional.normalize(objective.text(tokenise(TEXTS, text.tokenizer)), dim=1)
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=1e-6)

    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = load_encoder(f"panfm:{out}").forward(images)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(objective.project(features), dim=1)
    np.testing.assert_allclose(text.embed_features(features.numpy()), expected.numpy(), atol=1e-6)


def test_the_tower_goes_on_training_from_an_export(tmp_path: Path) -> None:
    objective = write_checkpoint(tmp_path / "step-1", ImageTextConfig(output_dim=16, text=TEXT))
    out = export_encoder(tmp_path / "step-1", tmp_path / "out")
    names = set(load_file(out / "text" / "model.safetensors"))
    assert {"text.token_embedding.weight", "text.text_projection", "project.weight", "log_scale"} <= names
    config = TextConfig(width=32, layers=1, heads=2, context_length=12, init=str(out / "text" / "model.safetensors"))
    tower = build_text_tower(config, output_dim=16)
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), objective.text.parameters(), strict=True))


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-1", ImageTextConfig(output_dim=16, text=TEXT))
    out = export_encoder(tmp_path / "step-1", tmp_path / "out")
    with pytest.raises(UserError, match="text 1 is blank"):
        load_text(out).embed_texts(["a nevus", " "])

    values = json.loads((out / "text" / "config.json").read_text())
    write_json(out / "text" / "config.json", values | {"tokenizer": "another"})
    with pytest.raises(UserError, match=r"\(1, 'another'\); this panfm reads \(1, 'clip'\)"):
        load_text(out)
    write_json(out / "text" / "config.json", values)
    weights = load_file(out / "text" / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if name != "project.weight"}, out / "text" / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"1 missing \(project.weight\)"):
        load_text(out)
    (out / "text" / "config.json").unlink()
    with pytest.raises(UserError, match="was trained without texts"):
        load_text(out)

    file = tmp_path / "step-1" / "text.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"text.safetensors: not the file that manifest.json lists"):
        export_encoder(tmp_path / "step-1", tmp_path / "again")
    assert not (tmp_path / "again").exists()
