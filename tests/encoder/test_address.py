from pathlib import Path

import pytest

from panfm.encoder.address import parse_address
from panfm.errors import UserError


def test_every_part_of_an_address_is_read() -> None:
    address = parse_address("timm:resnet50.a1_in1k@/weights/some@file.safetensors?image_size=112&dtype=bf16")
    assert (address.scheme, address.target) == ("timm", "resnet50.a1_in1k")
    assert address.weights == Path("/weights/some@file.safetensors")
    assert (address.image_size, address.dtype, address.pooling, address.seed) == (112, "bf16", None, None)
    assert address.name == "resnet50.a1_in1k@some@file?image_size=112&dtype=bf16"


def test_a_seed_belongs_to_timm_and_panfm() -> None:
    assert parse_address("timm:resnet50@random:7").seed == 7
    random_export = parse_address("panfm:runs/me@home/export@random:3")
    assert (random_export.target, random_export.seed) == ("runs/me@home/export", 3)
    assert parse_address("panfm:runs/me@home/export").target == "runs/me@home/export"
    assert parse_address("panfm:runs/first").name == "first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet50", "no scheme is not known; supported: panfm:DIR"),
        ("openclip:ViT-B-16@file.pt", "openclip: is not known; supported: panfm:DIR"),
        ("panderm:file.pth@random:0", "panderm: is read with its weights"),
        ("timm:", "nothing stands behind timm:"),
        ("timm:resnet50@", "nothing stands behind @"),
        ("timm:resnet50@random:x", "has no seed; write @random:0"),
        ("hf:DIR@random:0", "hf: is read with its weights; for random ones use timm:NAME@random:0"),
        ("timm:resnet50?imagesize=3", "unknown option imagesize; did you mean image_size?"),
        ("timm:resnet50?image_size=8", r"image_size \(8\) must be a number of pixels from 16 to 4096"),
        ("timm:resnet50?image_size=²²", "must be a number of pixels"),
        ("timm:resnet50?pooling=max", r"pooling \(max\) must be one of cls, mean, cls_mean, map"),
        ("timm:resnet50?dtype=bf16&dtype=fp32", "option dtype must be given once"),
    ],
)
def test_a_wrong_address_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_address(text)
    assert text in str(error.value) and "\n" not in str(error.value)
