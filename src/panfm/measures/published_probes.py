"""The linear probes of two publications, as their code computes them: to compare with their numbers, never for ranking.

    features [N, D], labels [N]  ->  fit_panderm_probe  ->  CompatProbe  ->  [M, K]     (PanDerm, and UNI before it)
                                 ->  fit_dinov2_probe   ->  CompatProbe  ->  [M, K]     (DINOv2)

What is wrong with them is the reason for `probe.py`: PanDerm penalises the norm itself where its text says the squared
norm, so that few labels or a narrow encoder switch the probe off, and its penalty is not tuned; DINOv2 chooses C by
accuracy on a tenth of the images, whoever the patients are.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from panfm.errors import UserError
from panfm.measures.threads import narrow_products

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DINOV2_C_GRID: tuple[float, ...] = tuple(float(10**power) for power in np.linspace(-6, 5, 45))
DINOV2_MAX_ITERATIONS = 1000
HELD_OUT_SHARE = 10  # one image in ten chooses DINOv2's C
GRADIENT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class CompatProbe:
    """Linear weights on features as they are; classes without a training row have probability 0."""

    weight: Floats  # [K', D]: of the classes that training has
    bias: Floats  # [K']
    classes: Ints  # [K']
    num_classes: int
    C: float
    converged: bool  # False: its solver ran out of iterations, as the publication's may have

    def predict(self, features: ArrayLike) -> Floats:
        """Predict class probabilities [M, K] of features [M, D]."""
        scores = np.zeros((len(np.asarray(features)), self.num_classes))
        scores[:, self.classes] = softmax(np.asarray(features, np.float64) @ self.weight.T + self.bias, axis=1)
        return scores


@narrow_products()
def fit_panderm_probe(features: ArrayLike, labels: ArrayLike, *, num_classes: int) -> CompatProbe:
    """Fit PanDerm's probe to features [N, D] as they are and labels [N].

        mean over images of -log softmax(W x + b)_y  +  |W| / (2 C),   C = D K / 100

    |W| is the Frobenius norm, not squared: W is 0 wherever the gradient of the first term at W = 0 is not longer than
    1 / (2 C). K counts the classes that the labels hold. The published optimiser stops a little before this optimum.
    """
    values, compact, classes = _check(features, labels)
    num_rows, width = values.shape
    K = len(classes)
    C = width * K / 100
    right = np.eye(K)[compact]  # [N, K]
    bias = np.log(right.mean(axis=0))  # the optimum at W = 0
    gradient = (right.mean(axis=0) - right).T @ values / num_rows  # [K, D]
    length = float(np.linalg.norm(gradient))
    if length <= 0.5 / C:
        return CompatProbe(np.zeros((K, width)), bias, classes, num_classes, C, True)

    def evaluate(variables: Floats) -> tuple[float, Floats]:
        weight, offset = variables[:-K].reshape(K, width), variables[-K:]
        logits = values @ weight.T + offset
        norm = float(np.linalg.norm(weight))
        loss = float((logsumexp(logits, axis=1) - logits[np.arange(num_rows), compact]).mean()) + 0.5 / C * norm
        residual = (softmax(logits, axis=1) - right) / num_rows
        slope = residual.T @ values + 0.5 / C * weight / max(norm, np.finfo(float).tiny)
        return loss, np.concatenate([slope.ravel(), residual.sum(axis=0)])

    # A first step against the gradient: at W = 0 itself the norm has none.
    first = np.concatenate([(-1e-2 / length * gradient).ravel(), bias])
    options = {"maxiter": 20_000, "maxfun": 40_000, "maxcor": 30, "ftol": 0.0, "gtol": GRADIENT_TOLERANCE}
    found = minimize(evaluate, first, jac=True, method="L-BFGS-B", options=options)
    weight, bias = found.x[:-K].reshape(K, width), found.x[-K:]
    return CompatProbe(weight, bias, classes, num_classes, C, found.nit < options["maxiter"])


@narrow_products()
def fit_dinov2_probe(features: ArrayLike, labels: ArrayLike, *, num_classes: int, seed: int) -> CompatProbe:
    """Fit DINOv2's logistic regression to features [N, D] as they are and labels [N].

    Of 45 C from 1e-6 to 1e5 the smallest with the best accuracy on a random tenth of the images, fitted to the others;
    then fitted to all. Sum of losses + |W|^2 / (2 C) (scikit-learn's convention, and cuML's, which the publication
    ran); the tenth is drawn by numpy here and by torch there.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    values, compact, classes = _check(features, labels)
    order = np.random.default_rng(seed).permutation(len(values))
    held_out, rest = np.split(order, [len(values) // HELD_OUT_SHARE])
    if len(held_out) == 0 or len(np.unique(compact[rest])) < 2:
        raise UserError(
            f"dinov2_compat: {len(values)} labelled images leave {len(held_out)} to choose C with and "
            f"{len(np.unique(compact[rest]))} class to fit; take a larger label fraction"
        )

    def fit(rows: Ints, C: float) -> LogisticRegression:
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # `converged` says so
            return LogisticRegression(C=C, tol=1e-12, max_iter=DINOV2_MAX_ITERATIONS).fit(values[rows], compact[rows])

    accuracies = [float(fit(rest, C).score(values[held_out], compact[held_out])) for C in DINOV2_C_GRID]
    chosen = DINOV2_C_GRID[int(np.argmax(accuracies))]  # the first of the best
    final = fit(order, chosen)
    weight, bias = final.coef_, final.intercept_
    if len(classes) == 2:  # one vector for the second class
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return CompatProbe(weight, bias, classes, num_classes, chosen, int(final.n_iter_.max()) < DINOV2_MAX_ITERATIONS)


def _check(features: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints, Ints]:
    """Features in float64, labels as places among the classes present, and those classes."""
    values = np.asarray(features, dtype=np.float64)
    classes, compact = np.unique(np.asarray(labels, dtype=np.int64), return_inverse=True)
    assert values.ndim == 2 and compact.shape == values.shape[:1], "features are [N, D], labels [N]"
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"features of training row {row} are not finite; compute the features again")
    if len(classes) < 2:
        raise UserError(
            f"training labels hold {len(classes)} class; a probe needs rows of at least two classes, take a larger "
            "label_fraction"
        )
    return values, compact.astype(np.int64), classes
