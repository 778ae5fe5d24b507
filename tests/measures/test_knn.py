"""kNN equals the numbers of DINOv2's KnnModule (tests/golden/dinov2_knn.safetensors)."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from panfm.errors import UserError
from panfm.measures.knn import predict_knn

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dinov2_knn.safetensors"


@pytest.mark.parametrize(("k", "name"), [(10, "probabilities_alone.k10"), (20, "probabilities.k20")])
@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), [(np.float64, "out64", 1e-12), (np.float32, "out", 1e-5)])
def test_probabilities_equal_the_original(k: int, name: str, dtype: type, prefix: str, tolerance: float) -> None:
    golden = load_file(GOLDEN)
    predicted = predict_knn(
        golden["in.train_features_raw"].astype(dtype),
        golden["in.train_labels"],
        golden["in.test_features_raw"].astype(dtype),
        num_classes=5,
        k=k,
    )
    np.testing.assert_allclose(predicted, golden[f"{prefix}.{name}"], atol=tolerance, rtol=0)
    np.testing.assert_array_equal(predicted.argmax(axis=1), golden[f"out.prediction.k{k}"])


def test_k_is_clamped_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    train, test = generator.normal(size=(6, 4)), generator.normal(size=(9, 4))
    labels = np.array([0, 1, 2, 0, 1, 2])
    whole = predict_knn(train, labels, test, num_classes=4, k=50)
    np.testing.assert_allclose(whole, predict_knn(train, labels, test, num_classes=4, k=6))
    np.testing.assert_allclose(whole.sum(axis=1), 1)
    assert (whole[:, 3] == 0).all()
    monkeypatch.setattr("panfm.measures.knn.CHUNK_VALUES", 12)
    np.testing.assert_allclose(predict_knn(train, labels, test, num_classes=4, k=50), whole)


def test_bad_features_are_named() -> None:
    with pytest.raises(UserError, match="test features of row 1"):
        predict_knn(np.ones((2, 2)), [0, 1], np.array([[1.0, 0.0], [np.inf, 0.0]]), num_classes=2)
    with pytest.raises(UserError, match="no training rows"):
        predict_knn(np.ones((0, 2)), [], np.ones((1, 2)), num_classes=2)
