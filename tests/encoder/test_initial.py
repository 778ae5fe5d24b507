"""What a run may start from: addresses and checkpoint files, none of which can execute anything."""

import pickle
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from panfm.encoder.initial import read_initial, start_from
from panfm.encoder.weights import read_checkpoint
from panfm.errors import UserError
from panfm.models.vit import EncoderConfig, build_vit

CONFIG = EncoderConfig(name="test_vit", image_size=48)


def make_state() -> dict[str, torch.Tensor]:
    return build_vit(CONFIG, seed=3).state_dict()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"model": OrderedDict(state), "epoch": 3, "args": Namespace(lr=0.1), "scaler": {"scale": 1.0}},
        lambda state: {"student": {}, "teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {"model": {f"module.{name}": tensor for name, tensor in state.items()}}},
    ],
    ids=["flat", "mae", "dino", "nested"],
)
def test_a_checkpoint_file_is_unpacked_and_fits(tmp_path: Path, wrapped) -> None:
    torch.save(wrapped(make_state()), tmp_path / "weights.pth")
    vit = build_vit(CONFIG, seed=0)
    report = start_from(vit, read_initial(str(tmp_path / "weights.pth")), random=())
    assert all(torch.equal(tensor, make_state()[name]) for name, tensor in vit.state_dict().items())
    assert report.counts == {"copied": len(make_state())} and str(tmp_path) in report.source


def test_a_safetensors_file_and_an_address_fit_too(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "weights.safetensors")
    for init in (str(tmp_path / "weights.safetensors"), "timm:test_vit@random:3?image_size=48"):
        vit = build_vit(CONFIG, seed=0)
        start_from(vit, read_initial(init), random=())
        assert torch.equal(vit.blocks[5].mlp.fc1.weight, make_state()["blocks.5.mlp.fc1.weight"])


def test_positions_of_an_address_are_resized_from_its_own_grid() -> None:
    initial = read_initial("timm:test_vit@random:3")
    assert initial.grid == (10, 10)
    vit = build_vit(CONFIG, seed=0)
    report = start_from(vit, initial, random=())
    assert report.counts["resized"] == 1 and vit.pos_embed.shape == (1, 1 + 9, 64)
    resized = timm.create_model("test_vit", num_classes=0)
    resized.load_state_dict(initial.weights)
    resized.set_input_size(img_size=(48, 48))
    torch.testing.assert_close(vit.pos_embed, resized.pos_embed, rtol=0, atol=1e-6)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path: Path) -> None:
    torch.save({"model": make_state(), "more": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth: holds more than tensors.*getattr.*convert it where you trust it"):
        read_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged, or no checkpoint"),
        (b"not a checkpoint at all", "damaged, or no checkpoint|holds more than tensors"),
        ({"epoch": 3}, r"no state_dict found \(epoch is no tensor\)"),
        ({"model": {"weight": torch.ones(1), "epoch": 3}}, r"no state_dict found \(epoch is no tensor\)"),
        (torch.ones(3), r"no state_dict found \(no weights\)"),
    ],
    ids=range(5),
)
def test_a_file_without_weights_is_one_clear_line(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=words) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"weight": Trap(tmp_path / "sprung")}))
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "weights.pkl")
    assert not (tmp_path / "sprung").exists()


def test_what_is_neither_file_nor_address_says_what_is_supported(tmp_path: Path) -> None:
    for init in (str(tmp_path / "none.pth"), "tim:test_vit"):
        with pytest.raises(UserError, match=r"no such file, and no encoder address.*supported: panfm:DIR"):
            read_initial(init)
    with pytest.raises(UserError, match="timm has no model"):
        read_initial("timm:test_vitt")
