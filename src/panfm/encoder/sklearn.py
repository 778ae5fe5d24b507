"""An encoder as a step of a scikit-learn pipeline: image files in, features out.

make_pipeline(PanfmFeatures("panfm:DIR"), StandardScaler(), LogisticRegression()).fit(paths, labels)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin

from panfm.encoder.load import Encoder, load_encoder
from panfm.errors import UserError


class PanfmFeatures(TransformerMixin, BaseEstimator):
    """Frozen features of image files: X [N] paths -> float32 [N, D]. Nothing is fitted.

    address: any encoder address. batch_size: images a forward pass. device: cpu, cuda, cuda:1.

    Whoever cross-validates with it must still keep a patient's images together (GroupKFold).
    """

    def __init__(self, address: str, batch_size: int = 64, device: str = "cpu") -> None:
        self.address = address
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Sequence[str | Path], y: Any = None) -> "PanfmFeatures":
        """Load the encoder; X and y are not looked at."""
        self._load()
        return self

    def transform(self, X: Sequence[str | Path]) -> NDArray[np.float32]:
        """Compute the features of N image files."""
        return self._load().embed(_list_paths(X), batch_size=self.batch_size)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the D features, as scikit-learn asks for them."""
        return np.array([f"{self._load().name}_{place}" for place in range(self._load().embed_dim)], dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        """Whether the encoder is loaded; `transform` alone loads it, too."""
        return getattr(self, "_encoder", None) is not None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: the address, not the weights."""
        return {key: value for key, value in super().__getstate__().items() if key != "_encoder"}

    def _load(self) -> Encoder:
        known: Encoder | None = getattr(self, "_encoder", None)
        if known is None or (known.address, str(known.device)) != (self.address, self.device):
            self._encoder = load_encoder(self.address, self.device)
        return self._encoder


def _list_paths(X: Any) -> list[str | Path]:
    values = np.asarray(X, dtype=object)
    if values.ndim == 2 and values.shape[1] == 1:  # a column of a table
        values = values[:, 0]
    if values.ndim != 1:
        raise UserError(f"X has the shape {values.shape}; PanfmFeatures takes paths of image files, one a row")
    return [value if isinstance(value, Path) else str(value) for value in values]
