"""What is listed can be loaded: names that timm knows, schemes that exist, and 'here' only where the weights are."""

from pathlib import Path
from typing import get_args

import pytest
import timm
from safetensors.torch import save_file

from panfm.encoder.address import Scheme, parse_address
from panfm.encoder.catalogue import OTHERS, TIMM_NAMES, format_size, list_encoders
from panfm.encoder.load import load_encoder

SMALL = (("a small one", "test_vit.r160_in1k"),)


def test_every_listed_address_is_read_by_a_scheme_and_every_scheme_is_listed() -> None:
    addresses = [f"timm:{name}" for _, name in TIMM_NAMES] + [address for _, address, *_ in OTHERS]
    assert {parse_address(address).scheme for address in addresses} == set(get_args(Scheme))
    for _, name in TIMM_NAMES:
        record = timm.get_pretrained_cfg(name)
        assert record.hf_hub_id and record.license, name


def test_weights_are_here_when_they_are_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (offer, *others) = list_encoders(SMALL)
    assert not offer.ready and offer.fetch == "hf download timm/test_vit.r160_in1k model.safetensors"
    assert [one.address for one in others if one.ready] == ["timm:NAME@random:0", "panfm:DIR", "python:MODULE:FUNCTION"]
    snapshot = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), snapshot / "model.safetensors")
    (offer, *_) = list_encoders(SMALL)
    encoder = load_encoder(offer.address)
    assert offer.feature == f"{encoder.embed_dim}, {encoder.pooling}, {encoder.image_size} px" == "64, cls, 160 px"
    assert offer.ready and encoder.card.num_parameters == offer.num_parameters
    assert encoder.card.licence == offer.licence == "apache-2.0"
    assert format_size(offer) == f"{offer.num_parameters / 1e6:.0f} M, {offer.num_parameters * 4 / 1e6:.0f} MB"
