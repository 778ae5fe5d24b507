import numpy as np
import pytest
from scipy.optimize import minimize

from panfm.measures.combat import _shrink, estimate_batch, fit_combat


def draw(seed: int = 0, num_features: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three batches of different size, case mix, shift and spread: features, batches, classes as columns, the truth."""
    rng = np.random.default_rng(seed)
    batches = np.repeat(["a", "b", "c"], [60, 150, 90])
    labels = (rng.random(300) < np.repeat([0.2, 0.5, 0.8], [60, 150, 90])).astype(int)
    shift = {name: rng.normal(offset, 0.5, num_features) for name, offset in (("a", 2.0), ("b", 0.0), ("c", -1.5))}
    spread = {"a": 2.0, "b": 1.0, "c": 0.5}
    effect = rng.normal(0, 3, num_features)  # of the class
    clean = rng.normal(size=(300, num_features)) + labels[:, None] * effect
    features = 10 + clean.copy()
    for name in "abc":
        noise = features[batches == name] - 10 - labels[batches == name][:, None] * effect
        features[batches == name] += shift[name] + noise * (spread[name] - 1)
    return features, batches, np.eye(2)[labels], 10 + clean


def test_shift_and_spread_are_taken_out_and_the_class_stays() -> None:
    features, batches, classes, _ = draw()
    combat = fit_combat(features, batches, classes)
    out = np.concatenate([combat.remove(features[batches == name], combat.effects[name]) for name in "abc"])
    labels = classes[:, 1].astype(bool)

    def residual(values: np.ndarray, name: str) -> np.ndarray:
        rows = batches == name
        return np.concatenate([values[rows & kind] - values[kind].mean(axis=0) for kind in (labels, ~labels)])

    for name in "ac":  # within a class they stood out by a standard deviation
        before, after = (np.abs(residual(values, name).mean(axis=0)).mean() for values in (features, out))
        assert before > 1.0 and after < 0.35 * before
    spreads = [combat.effects[name].spread.mean() for name in "abc"]
    assert spreads[0] > 1.4 * spreads[1] > 1.4 * 1.4 * spreads[2]
    # Without the classes as covariates their unequal shares would pass for an effect of the batch.
    blind = fit_combat(features, batches, np.zeros((300, 0)))
    wrong = np.concatenate([blind.remove(features[batches == name], blind.effects[name]) for name in "abc"])
    gap = np.abs(out[labels].mean(axis=0) - out[~labels].mean(axis=0)).mean()
    assert gap > 1.2 * np.abs(wrong[labels].mean(axis=0) - wrong[~labels].mean(axis=0)).mean()


def test_the_estimates_are_those_of_the_paper_feature_by_feature() -> None:
    features, batches, classes, _ = draw(1)
    combat = fit_combat(features, batches, classes)
    names, counts = np.unique(batches, return_counts=True)
    design = np.column_stack([*(batches == name for name in names), classes[:, 1] - classes[:, 1].mean()]).astype(float)
    raw = {}
    for g in range(features.shape[1]):
        beta = np.linalg.solve(design.T @ design, design.T @ features[:, g])
        mean = (counts * beta[:3]).sum() / 300
        scale = np.sqrt(np.mean((features[:, g] - design @ beta) ** 2))
        assert combat.mean[g] == pytest.approx(mean) and combat.scale[g] == pytest.approx(scale)
        z = (features[:, g] - mean - design[:, 3] * beta[3]) / scale
        raw[g] = {name: z[batches == name] for name in names}
    for name, n in zip(names, counts, strict=True):
        shifts = np.array([raw[g][name].mean() for g in raw])
        variances = np.array([raw[g][name].var(ddof=1) for g in raw])
        center, tau = shifts.mean(), shifts.var(ddof=1)
        m, s2 = variances.mean(), variances.var(ddof=1)
        a, b = m**2 / s2 + 2, m * (m**2 / s2 + 1)  # mean b / (a - 1) = m, variance m^2 / (a - 2) = s2
        for g in raw:
            # The iteration's fixed point maximises the posterior of (gamma, delta^2) up to one power of delta^2.
            shift, variance = combat.effects[name].shift[g], combat.effects[name].spread[g] ** 2
            assert shift == pytest.approx((n * tau * shifts[g] + variance * center) / (n * tau + variance), abs=1e-5)
            squares = ((raw[g][name] - shift) ** 2).sum()
            assert variance == pytest.approx((squares / 2 + b) / (n / 2 + a - 1), rel=1e-5)


def test_the_estimates_are_those_of_the_published_program() -> None:
    # neuroCombat 0.2.12 on the same features: gamma.star and delta.star of the first three.
    features, batches, classes, _ = draw(1)
    combat = fit_combat(features, batches, classes)
    golden = {
        "a": ([1.621777, 1.390114, 1.821636], [3.002349, 2.998100, 3.014079]),
        "b": ([-0.087839, 0.204513, 0.226979], [0.700318, 0.702931, 0.689249]),
        "c": ([-0.909017, -1.241298, -1.617135], [0.194967, 0.206284, 0.177275]),
    }
    for name, (shift, variance) in golden.items():
        np.testing.assert_allclose(combat.effects[name].shift[:3], shift, atol=2e-6)
        np.testing.assert_allclose(combat.effects[name].spread[:3] ** 2, variance, atol=2e-6)


def test_shrinking_is_the_mean_of_the_posterior_where_the_spread_is_known() -> None:
    rng = np.random.default_rng(2)
    shift, variance = rng.normal(1, 0.5, 50), rng.gamma(20, 0.05, 50)
    shrunk, spread = _shrink(5, shift, variance)
    assert shrunk.var() < shift.var() and spread.var() < variance.var()
    tau, center = shift.var(ddof=1), shift.mean()

    def loss(x: np.ndarray) -> float:
        return float(5 * (x[0] - shift[0]) ** 2 / spread[0] + (x[0] - center) ** 2 / tau)

    assert shrunk[0] == pytest.approx(minimize(loss, [0.0]).x[0], abs=1e-4)
    many, _ = _shrink(10_000, shift, variance)
    np.testing.assert_allclose(many, shift, atol=1e-2)


def test_a_batch_that_was_not_there_is_brought_to_the_others() -> None:
    features, batches, classes, _ = draw(3)
    known = batches != "c"
    combat = fit_combat(features[known], batches[known], classes[known])
    effect = estimate_batch(combat, features[~known])
    moved = combat.remove(features[~known], effect)
    assert (
        np.abs(moved.mean(axis=0) - combat.mean).max() < 0.3 * np.abs(features[~known].mean(axis=0) - combat.mean).max()
    )
    np.testing.assert_allclose(  # rows are moved one by one: nothing hangs on which others are scored beside them
        combat.remove(features[~known][:1], effect), moved[:1]
    )


def test_a_constant_feature_stays_and_one_feature_alone_is_not_shrunk() -> None:
    features, batches, classes, _ = draw(4)
    features[:, 0] = 7.0
    combat = fit_combat(features, batches, classes)
    out = combat.remove(features[batches == "a"], combat.effects["a"])
    np.testing.assert_allclose(out[:, 0], 7.0)
    assert np.isfinite(out).all()
    single = fit_combat(features[:, 1:2], batches, np.zeros((300, 0)))
    z = (features[batches == "a", 1] - single.mean) / single.scale
    assert single.effects["a"].shift[0] == pytest.approx(z.mean())
