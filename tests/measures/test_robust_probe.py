import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from panfm.errors import UserError
from panfm.measures.probe import fit_probe
from panfm.measures.robust_probe import fit_robust_probe, fit_robust_probe_cv

FloatArray = np.ndarray


def draw(
    seed: int = 0, num_classes: int = 3, num_rows: int = 240, num_features: int = 10
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Features, labels, institutions of unequal size, groups of two rows; the small one's classes lie elsewhere."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    institutions = np.where(np.arange(num_rows) % 8 == 0, "small", np.where(np.arange(num_rows) % 2, "big", "middle"))
    centers = rng.normal(size=(num_classes, num_features))
    elsewhere = rng.normal(size=(num_classes, num_features))
    features = np.where((institutions == "small")[:, None], elsewhere[labels], centers[labels])
    return features + rng.normal(size=features.shape), labels, institutions, np.arange(num_rows) // 2


def compute_losses(probe: object, features: FloatArray, labels: FloatArray) -> FloatArray:
    return -np.log(probe.predict(features)[np.arange(len(labels)), labels])  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_balanced_is_scikit_learns_optimum_under_the_same_weights(num_classes: int) -> None:
    features, labels, institutions, _ = draw(1, num_classes)
    C = 0.05
    probe = fit_robust_probe(features, labels, institutions, num_classes=num_classes, C=C, aim="balanced")
    names, number, counts = np.unique(institutions, return_inverse=True, return_counts=True)
    weights = len(labels) / (len(names) * counts[number])
    model = LogisticRegression(C=C, tol=1e-10, max_iter=5000)
    model.fit((features - probe.mean) / probe.scale, labels, sample_weight=weights)
    expected = model.predict_proba((features - probe.mean) / probe.scale)
    np.testing.assert_allclose(probe.predict(features), expected, atol=1e-4)
    with_few_rows = features[:8], labels[:8], institutions[:8]
    wide = fit_robust_probe(*with_few_rows, num_classes=num_classes, C=C, aim="balanced")
    assert np.isfinite(wide.predict(features)).all()


def test_one_institution_is_the_plain_probe() -> None:
    features, labels, _, _ = draw(2)
    plain = fit_probe(features, labels, num_classes=3, C=0.1)
    for aim in ("balanced", "worst_case"):
        probe = fit_robust_probe(features, labels, ["one"] * len(labels), num_classes=3, C=0.1, aim=aim)
        np.testing.assert_allclose(probe.predict(features), plain.predict(features), atol=1e-4)


def test_the_worst_case_is_at_its_optimum() -> None:
    features, labels, institutions, _ = draw(3)
    C, num = 0.05, len(labels)
    probe = fit_robust_probe(features, labels, institutions, num_classes=3, C=C, aim="worst_case")
    losses = compute_losses(probe, features, labels)
    means = {name: losses[institutions == name].mean() for name in np.unique(institutions)}
    ours = num * max(means.values()) + (probe.weight**2).sum() / (2 * C)
    # Whatever shares the institutions get, the probe that is best under them costs no more than the best worst case:
    # so each is a lower bound, and the highest must nearly reach our value from below.
    bounds = []
    for share in np.linspace(0.2, 0.8, 13):
        for middle in (0.0, 0.5, 1.0):
            shares = {"small": share, "middle": (1 - share) * middle, "big": (1 - share) * (1 - middle)}
            weights = np.array([num * shares[name] / (institutions == name).sum() for name in institutions])
            scaled = (features - probe.mean) / probe.scale
            model = LogisticRegression(C=C, tol=1e-8, max_iter=2000).fit(scaled, labels, sample_weight=weights)
            row_losses = -np.log(model.predict_proba(scaled)[np.arange(num), labels])
            bounds.append(weights @ row_losses + (model.coef_**2).sum() / (2 * C))
    assert max(bounds) <= ours * (1 + 1e-3)
    assert ours - max(bounds) < 0.01 * ours
    plain = fit_probe(features, labels, num_classes=3, C=C)
    worst_before = max(
        compute_losses(plain, features[institutions == name], labels[institutions == name]).mean() for name in means
    )
    assert max(means.values()) < 0.9 * worst_before


def test_c_is_chosen_for_what_is_aimed_at_and_groups_are_not_cut() -> None:
    features, labels, institutions, groups = draw(4)
    for aim in ("balanced", "worst_case"):
        fit = fit_robust_probe_cv(features, labels, institutions, groups, num_classes=3, seed=0, aim=aim)
        assert fit.num_folds == 5 and min(fit.log_losses, key=lambda C: fit.log_losses[C]) == fit.C
    # Labels that are noise, but the same in both rows of a group: only cut groups could make a weak penalty look good.
    rng = np.random.default_rng(5)
    twins = np.repeat(rng.normal(size=(60, 30)), 2, axis=0)
    noise = np.repeat(rng.integers(0, 2, 60), 2)
    fit = fit_robust_probe_cv(twins, noise, ["a", "b"] * 60, np.arange(120) // 2, num_classes=2, seed=0, aim="balanced")
    assert fit.C <= 1e-3
    alone = fit_robust_probe_cv(
        features[:20], labels[:20], institutions[:20], ["one"] * 20, num_classes=3, seed=0, aim="balanced"
    )
    assert alone.num_folds == 0 and 1 / features.shape[1] == alone.C


def test_a_class_without_rows_has_probability_zero_and_one_class_is_refused() -> None:
    features, labels, institutions, _ = draw(6, num_classes=2)
    probe = fit_robust_probe(features, labels, institutions, num_classes=3, C=0.1, aim="worst_case")
    assert (probe.predict(features)[:, 2] == 0).all()
    with pytest.raises(UserError, match="training labels hold one class"):
        fit_robust_probe(features, np.zeros(len(labels)), institutions, num_classes=2, C=0.1, aim="balanced")
