"""PanDerm's probe against the minimiser of the published objective, DINOv2's against scikit-learn; both in corners."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression

from panfm.errors import UserError
from panfm.measures.published_probes import DINOV2_C_GRID, fit_dinov2_probe, fit_panderm_probe

GOLDEN = Path(__file__).parents[1] / "golden"


def draw(num: int, num_classes: int, width: int = 6, spread: float = 1.0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(0)
    labels = np.arange(num) % num_classes
    return rng.normal(size=(num, width)) + spread * np.eye(num_classes, width)[labels], labels


@pytest.mark.parametrize(("case", "num_classes", "C"), [("multiclass", 4, 1.28), ("binary", 2, 0.64)])
def test_panderms_probe_is_the_minimiser_of_its_objective(case: str, num_classes: int, C: float) -> None:
    golden = load_file(GOLDEN / f"panderm_probe_{case}.safetensors")
    probe = fit_panderm_probe(golden["in.train_features"], golden["in.train_labels"], num_classes=num_classes)
    assert pytest.approx(C) == probe.C
    np.testing.assert_allclose(probe.weight, golden["optimum64.weight"], atol=1e-5)
    np.testing.assert_allclose(probe.bias - probe.bias.mean(), golden["optimum64.bias_centred"], atol=1e-5)
    scores = probe.predict(golden["in.test_features"])
    np.testing.assert_allclose(scores, golden["optimum64.test_probabilities"], atol=1e-5)


def test_panderms_penalty_switches_a_narrow_probe_off() -> None:
    features, labels = draw(30, 2, width=2, spread=0.3)
    probe = fit_panderm_probe(features, labels, num_classes=2)
    assert not probe.weight.any()  # 1 / (2 C) is 12.5, longer than any gradient here
    np.testing.assert_allclose(probe.predict(features), 0.5)


def test_classes_without_a_training_row_have_no_probability_and_do_not_count() -> None:
    features, labels = draw(60, 2)
    for fit in (fit_panderm_probe, lambda *args, **more: fit_dinov2_probe(*args, **more, seed=0)):
        probe = fit(features, labels * 3, num_classes=5)
        scores = probe.predict(features)
        np.testing.assert_allclose(scores.sum(axis=1), 1)
        assert not scores[:, [1, 2, 4]].any() and scores[:, [0, 3]].all()
    assert pytest.approx(6 * 2 / 100) == fit_panderm_probe(features, labels * 3, num_classes=5).C


@pytest.mark.parametrize("num_classes", [2, 3])
def test_dinov2s_probe_is_the_regression_at_the_first_best_c(num_classes: int) -> None:
    features, labels = draw(80, num_classes)
    probe = fit_dinov2_probe(features, labels, num_classes=num_classes, seed=3)
    order = np.random.default_rng(3).permutation(80)
    held_out, rest = order[:8], order[8:]

    def fit(C: float, rows: NDArray) -> LogisticRegression:
        return LogisticRegression(C=C, tol=1e-12, max_iter=1000).fit(features[rows], labels[rows])

    accuracies = [fit(C, rest).score(features[held_out], labels[held_out]) for C in DINOV2_C_GRID]
    best = [C for C, accuracy in zip(DINOV2_C_GRID, accuracies, strict=True) if accuracy == max(accuracies)]
    assert best[0] == probe.C and len(best) > 1
    np.testing.assert_allclose(probe.predict(features), fit(best[0], order).predict_proba(features), atol=1e-9)


def test_what_cannot_be_fitted_is_one_clear_line() -> None:
    features, labels = draw(8, 2)
    with pytest.raises(UserError, match="hold 1 class"):
        fit_panderm_probe(features, labels * 0, num_classes=2)
    with pytest.raises(UserError, match="8 labelled images leave 0 to choose C with"):
        fit_dinov2_probe(features, labels, num_classes=2, seed=0)
    features[5, 0] = np.nan
    with pytest.raises(UserError, match="row 5 are not finite"):
        fit_panderm_probe(features, labels, num_classes=2)
