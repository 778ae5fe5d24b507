"""The library's public face: three lines from an address to features.

from panfm.encoder import load_encoder
encoder = load_encoder("panfm:DIR")
features = encoder.embed(["a.jpg", "b.png"])  # float32 [2, D]
tokens, attention = encoder.embed_tokens(["a.jpg"]), encoder.attention_maps(["a.jpg"])  # [1, h, w, C], [1, heads, h, w]

PanfmFeatures("panfm:DIR") is the same as a step of a scikit-learn pipeline.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panfm.encoder.load import Encoder, load_encoder
    from panfm.encoder.sklearn import PanfmFeatures

__all__ = ["Encoder", "PanfmFeatures", "load_encoder"]


def __getattr__(name: str) -> Any:
    # Lazily, so that reading encoder.facts (plain JSON) does not load torch and timm.
    if name == "PanfmFeatures":
        from panfm.encoder.sklearn import PanfmFeatures

        return PanfmFeatures
    if name in __all__:
        from panfm.encoder import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
