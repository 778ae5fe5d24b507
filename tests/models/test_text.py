"""The text tower: open_clip's numbers whatever the padding, weights of its layouts, and clear errors."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from panfm.errors import UserError
from panfm.models.text import VOCABULARY_SIZE, TextConfig, TextTower, build_text_tower

pytestmark = pytest.mark.skipif(find_spec("open_clip") is None, reason='no open_clip: pip install "panfm[text]"')
SMALL = TextConfig(width=32, layers=2, heads=2, context_length=12)


@pytest.fixture
def tower() -> TextTower:
    torch.manual_seed(0)
    return build_text_tower(SMALL, output_dim=16)


@pytest.fixture
def tokens() -> Tensor:
    """Three texts of 3, 5 and 4 tokens, cut at the longest."""
    rows = [[49406, 320, 49407, 0, 0], [49406, 7, 0, 512, 49407], [49406, 9, 9, 49407, 0]]
    return torch.tensor(rows)


def test_the_numbers_are_open_clips_without_the_padding(tower: TextTower, tokens: Tensor) -> None:
    tower.double()
    padded = torch.cat([tokens, torch.zeros(3, 7, dtype=torch.int64)], dim=1)
    expected = tower.network(padded)
    assert expected.shape == (3, 16)
    torch.testing.assert_close(tower(padded), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tower(tokens), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tower(tokens[:1, :3]), expected[:1], rtol=0, atol=1e-12)


def test_every_parameter_gets_a_gradient_under_autocast(tower: TextTower, tokens: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = tower(tokens)
    embeddings.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_the_defaults_are_clips_beside_a_vit_b() -> None:
    with torch.device("meta"):
        tower = TextTower(TextConfig(), output_dim=512)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 63_428_096
    assert tower.network.token_embedding.num_embeddings == VOCABULARY_SIZE


@pytest.mark.parametrize("prefix", ["", "text.", "clip"])
def test_weights_of_every_layout_are_read(tower: TextTower, tokens: Tensor, tmp_path: Path, prefix: str) -> None:
    weights = {f"{prefix.removeprefix('clip')}{name}": value for name, value in tower.network.state_dict().items()}
    if prefix:  # as in a file of a whole CLIP
        weights |= {"visual.proj": torch.zeros(3, 3), "logit_scale": torch.zeros(())}
    save_file(weights, tmp_path / "clip.safetensors")
    torch.manual_seed(9)
    again = build_text_tower(
        TextConfig(width=32, layers=2, heads=2, context_length=12, init=str(tmp_path / "clip.safetensors")), 16
    )
    assert torch.equal(again(tokens), tower(tokens))


def test_quick_gelu_is_another_function(tower: TextTower, tokens: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "text.safetensors"
    save_file(tower.network.state_dict(), file)
    quick = TextConfig(width=32, layers=2, heads=2, context_length=12, init=str(file), activation="quick_gelu")
    with torch.no_grad():
        ours, quickly = tower(tokens), build_text_tower(quick, 16)(tokens)
    assert 1e-5 < float((quickly - ours).abs().max()) < 0.1 * float(ours.abs().max())


def test_files_that_do_not_fit_are_one_clear_line(tower: TextTower, tmp_path: Path) -> None:
    whole = tower.network.state_dict()

    def attempt(weights: dict[str, Tensor] | bytes, name: str = "w.safetensors", **changes: int) -> str:
        path = tmp_path / name
        path.write_bytes(weights) if isinstance(weights, bytes) else save_file(weights, path)
        config = TextConfig(**{"width": 32, "layers": 2, "heads": 2, "context_length": 12, **changes}, init=str(path))
        with pytest.raises(UserError) as error:
            build_text_tower(config, 16)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    assert "resblocks.2.ln_1.weight is missing (and 11 more)" in attempt(whole, layers=3)
    assert "positional_embedding is (12, 32) where the tower has (20, 32)" in attempt(whole, context_length=20)
    without = {name: value for name, value in whole.items() if name != "ln_final.bias"}
    assert "ln_final.bias is missing" in attempt(without)
    assert "extra is unknown to the tower" in attempt(whole | {"extra": torch.zeros(1)})
    assert "damaged" in attempt(b"nothing of the kind")
    assert "must be a local .safetensors file" in attempt(b"", name="w.pt")
    with pytest.raises(UserError, match="nothing is downloaded"):
        build_text_tower(TextConfig(init="hub/model.safetensors"), 16)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match=r"text.width \(33\) .* text.heads \(2\); try 34"):
        build_text_tower(TextConfig(width=33, layers=1, heads=2), 16)


def test_without_open_clip_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.transformer", None)
    with pytest.raises(UserError, match=r'pip install "panfm\[text\]"'):
        build_text_tower(SMALL, 16)
