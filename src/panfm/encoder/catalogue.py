"""Which encoders can be loaded, and what must be fetched first: `panfm encoders`.

    NAMED (addresses that people ask for) + timm's own records of licence, size and place -> Offer
    a local Hugging Face cache, the user's files --looked at, nothing is downloaded--> ready, or how to fetch it

Licences are as the publisher's records here state them; what binds is the publisher's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch

from panfm.encoder.network import EncoderNetwork
from panfm.encoder.panderm import LICENCE as PANDERM_LICENCE
from panfm.encoder.schemes import TRAINING_DATA, find_in_cache

BYTES = 4  # a weight in fp32


@dataclass(frozen=True)
class Offer:
    """An encoder that panfm reads.

    num_parameters: None where only the file tells. feature: its dimension, pooling and image size.
    ready: its weights are in the local cache. fetch: the way there.
    """

    title: str
    address: str
    licence: str
    num_parameters: int | None
    feature: str
    training_data: str
    ready: bool
    fetch: str


# title, timm's name with its tag
TIMM_NAMES = (
    ("ResNet-50", "resnet50.a1_in1k"),
    ("EfficientNet-Lite0", "tf_efficientnet_lite0.in1k"),
    ("Inception v3 (Esteva et al. 2017)", "inception_v3.tv_in1k"),
    ("ViT-B/16, supervised", "vit_base_patch16_224.augreg_in21k"),
    ("MAE ViT-B/16", "vit_base_patch16_224.mae"),
    ("MAE ViT-L/16", "vit_large_patch16_224.mae"),
    ("DINOv2 ViT-S/14, registers", "vit_small_patch14_reg4_dinov2.lvd142m"),
    ("DINOv2 ViT-B/14, registers", "vit_base_patch14_reg4_dinov2.lvd142m"),
    ("DINOv2 ViT-L/14, registers", "vit_large_patch14_reg4_dinov2.lvd142m"),
    ("DINOv3 ViT-S/16", "vit_small_patch16_dinov3.lvd1689m"),
    ("DINOv3 ViT-B/16", "vit_base_patch16_dinov3.lvd1689m"),
    ("DINOv3 ViT-L/16", "vit_large_patch16_dinov3.lvd1689m"),
    ("CLIP ViT-B/16", "vit_base_patch16_clip_quickgelu_224.openai"),
    ("CLIP ViT-L/14", "vit_large_patch14_clip_quickgelu_224.openai"),
    ("SigLIP ViT-B/16", "vit_base_patch16_siglip_224.webli"),
)
AS_THE_FILE = "as the file"  # or as the model, for what has none
_PANDERM_DATA = "PanDerm's archive, not public"
_FROM_AUTHORS = "from the authors; then give the file"
# title, address, licence, parameters, feature, training data
OTHERS = (
    ("PanDerm ViT-B/16", "panderm:FILE", PANDERM_LICENCE, 85_807_872, "768, cls, 224 px", _PANDERM_DATA),
    ("PanDerm ViT-L/16", "panderm:FILE", PANDERM_LICENCE, 303_326_208, "1024, cls, 224 px", _PANDERM_DATA),
    (
        "DermLIP ViT-B/16", "open_clip:ViT-B-16-quickgelu@FILE", "as its authors state", None, "512, cls, 224 px",
        "Derm1M",
    ),
    (
        "DermLIP on PanDerm-B", "panderm:FILE", "as its authors state", None, "512, mean, 224 px",
        "Derm1M; PanDerm's archive",
    ),
    (
        "UNI and others in timm's layout", "hf:DIR", "as each states; mostly on request", None, AS_THE_FILE,
        "histopathology",
    ),
    ("any timm model with your weights", "timm:NAME@FILE", "yours", None, AS_THE_FILE, "yours"),
    ("any timm model, untrained", "timm:NAME@random:0", "none needed", None, AS_THE_FILE, "nothing"),
    ("an export of panfm", "panfm:DIR", "in its README.md", None, AS_THE_FILE, "in its panfm.json"),
    ("a function of your own", "python:MODULE:FUNCTION", "yours", None, AS_THE_FILE, "yours"),
)  # fmt: skip


def list_encoders(names: Sequence[tuple[str, str]] = TIMM_NAMES) -> tuple[Offer, ...]:
    """List what can be loaded; timm's models are measured without building their weights."""
    offers = []
    for title, name in names:
        record = timm.get_pretrained_cfg(name)
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        pooling = EncoderNetwork(model, None, where=name).pooling
        offers.append(
            Offer(
                title=title,
                address=f"timm:{name}",
                licence=record.license or "not recorded",
                num_parameters=sum(parameter.numel() for parameter in model.parameters()),
                feature=f"{model.num_features}, {pooling}, {record.input_size[-1]} px",
                training_data=TRAINING_DATA.get(record.tag, f"timm tag {record.tag}"),
                ready=find_in_cache(record.hf_hub_id) is not None,
                fetch=f"hf download {record.hf_hub_id} model.safetensors",
            )
        )
    ready = {"timm:NAME@random:0", "panfm:DIR", "python:MODULE:FUNCTION"}
    for title, address, licence, number, feature, data in OTHERS:
        is_ready = address in ready
        fetch = "" if is_ready else _FROM_AUTHORS
        offers.append(Offer(title, address, licence, number, feature, data, is_ready, fetch))
    return tuple(offers)


def format_size(offer: Offer) -> str:
    """Parameters and the size of the file in fp32: '86 M, 343 MB'."""
    if offer.num_parameters is None:
        return AS_THE_FILE
    return f"{offer.num_parameters / 1e6:.0f} M, {offer.num_parameters * BYTES / 1e6:.0f} MB"
