"""How long the whole measurement of one task takes, against scikit-learn in the same loop.

    python benchmarks/evaluation.py [--quick] [--json FILE]

    drawn features [8000, 1024], 7 classes, groups of images
      ours: 6 label fractions x 10 draws -> choose C of 23 by 5 grouped folds, refit -> 9 metrics, 2,000 replicates
      peer: the same fits, LogisticRegression for each of C x fold and for the refit, joblib on both cores
            -> the same metrics by scikit-learn, a call a metric and replicate

The peer would take hours: a random 2 % of its fits is timed and scaled, and so are its replicates. Its tolerance is the
loosest power of ten at which the objective of its fits is as near to the optimum as ours is, or nearer than 1e-6: ours
is looked at first, for the fits of folds (where only the log-loss matters) and for refits apart. With all labels there
is one choice of them, on both sides. Ours ends its path over C once three C in a row have made the log-loss of the
held-out folds worse; the peer, as the plain loop does, fits every C. How many of the 23 ours fitted is printed, and the
ratio for those alone, too.

Equality is asserted in the same run: metrics to 1e-12, objectives of refits to a gap of 1e-6.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from rows import Row, write_rows
from sklearn import metrics as sk
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from panfm.evaluation.label_subsets import compute_label_subset
from panfm.measures.metrics import compute_all_replicates
from panfm.measures.probe import (
    C_GRID,
    FINAL_TOLERANCE,
    FOLD_TOLERANCE,
    ProbeFit,
    build_basis,
    fit_probe,
    fit_probe_cv,
    make_group_folds,
    minimise,
)
from panfm.measures.statistics import draw_group_weights
from panfm.measures.threads import share_cores

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
DRAWS = 10
NUM_FOLDS = 5
METRICS = (
    "auroc", "auprc", "balanced_accuracy", "accuracy", "weighted_f1", "macro_f1", "kappa", "log_loss", "brier",
)  # fmt: skip
SHARES = (0.67, 0.111, 0.11, 0.051, 0.033, 0.014, 0.011)  # of the classes of HAM10000
# Such that the probe reaches the AUROC that encoders reach on HAM10000: 0.75 to 0.95 from 10 % to all of the labels.
SEPARATION = 0.08
GAP = 1e-6
SAMPLE = 0.02  # of the peer's fits that is timed
CORES = 2


@dataclass(frozen=True)
class Data:
    """Features, classes and groups of the training and of the test part."""

    train: Floats
    train_labels: Ints
    train_groups: NDArray[np.str_]
    test: Floats
    test_labels: Ints
    test_groups: NDArray[np.str_]


@dataclass(frozen=True)
class Choice:
    """One choice of labels and what was fitted to it."""

    fraction: float
    rows: Ints
    fit: ProbeFit
    scores: Floats  # of the test part


@dataclass(frozen=True)
class Task:
    """One fit of the peer."""

    rows: Ints
    C: float
    is_refit: bool


def draw_data(num_train: int, num_test: int, num_features: int, seed: int = 0) -> Data:
    """Draw features as encoders give them: a spectrum that falls like 1 / rank, classes apart in a few directions."""
    rng = np.random.default_rng(seed)
    num_rows = num_train + num_test
    labels = rng.choice(len(SHARES), num_rows, p=np.array(SHARES) / sum(SHARES))
    spectrum = 1 / np.sqrt(1 + np.arange(num_features))
    latent = rng.normal(size=(num_rows, num_features)) * spectrum
    latent += (rng.normal(size=(len(SHARES), num_features)) * spectrum * SEPARATION)[labels]
    rotation = np.linalg.qr(rng.normal(size=(num_features, num_features)))[0]
    features = (latent @ rotation).astype(np.float32).astype(np.float64)
    groups = np.array([f"P{row * 3 // 4}" for row in range(num_rows)])  # four images of three lesions
    parts = (features[:num_train], labels[:num_train], groups[:num_train])
    return Data(*parts, features[num_train:], labels[num_train:], groups[num_train:])


def measure_ours(data: Data, num_replicates: int, draws: int) -> tuple[list[Choice], float, float]:
    """Every fraction and draw: choices with their fits, seconds of the fits, seconds of the metrics.

    In two processes with one thread each, as `panfm evaluate run --executor processes` does it on two cores.
    """
    subsets = [
        (fraction, compute_label_subset(
            data.train_labels, data.train_groups, fraction=fraction, draw=draw, task="benchmark", split_hash="0"
        ))
        for fraction in sorted(FRACTIONS, reverse=True)  # the long ones first, so that both cores end together
        for draw in range(draws if fraction < 1 else 1)
    ]  # fmt: skip

    def fit_choice(fraction: float, rows: Ints) -> Choice:
        with threadpool_limits(1), share_cores(1):
            fit = fit_probe_cv(
                data.train[rows], data.train_labels[rows], data.train_groups[rows], num_classes=len(SHARES), seed=0,
                num_folds=NUM_FOLDS,
            )  # fmt: skip
            return Choice(fraction, rows, fit, fit.probe.predict(data.test))

    def measure_choice(choice: Choice) -> None:
        with threadpool_limits(1):
            weights = draw_group_weights(data.test_groups, num_replicates, 0)
            compute_all_replicates(METRICS, data.test_labels, choice.scores, weights)

    with Parallel(n_jobs=CORES) as processes:
        processes(delayed(len)(()) for _ in range(CORES))  # processes start before the clock does
        started = time.perf_counter()
        choices = processes(delayed(fit_choice)(fraction, rows) for fraction, rows in subsets)
        fitted = time.perf_counter()
        processes(delayed(measure_choice)(choice) for choice in choices)
        return choices[::-1], fitted - started, time.perf_counter() - fitted


def list_tasks(data: Data, choices: Sequence[Choice], *, tried_only: bool = False) -> list[Task]:
    """Every fit of the peer's loop; tried_only: of those C alone that ours fitted."""
    tasks = []
    for choice in choices:
        folds = make_group_folds(data.train_labels[choice.rows], data.train_groups[choice.rows], NUM_FOLDS, 0)
        for fold in range(choice.fit.num_folds):
            grid = choice.fit.log_losses if tried_only else C_GRID
            tasks += [Task(choice.rows[folds != fold], C, is_refit=False) for C in grid]
        tasks.append(Task(choice.rows, choice.fit.C, is_refit=True))
    return tasks


def standardise(features: Floats) -> Floats:
    """As both sides do before a fit."""
    spread = features.std(axis=0)
    return np.asarray((features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0))


def compute_objective(features: Floats, labels: Ints, C: float, weight: Floats, bias: Floats) -> float:
    """Sum of the losses and half the squared norm over C."""
    logits = features @ weight.T + bias
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return float(losses.sum() + 0.5 * np.square(weight).sum() / C)


def fit_peer(features: Floats, labels: Ints, C: float, tolerance: float) -> LogisticRegression:
    """Fit scikit-learn's regression to standardised features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=C, tol=tolerance, max_iter=10_000).fit(features, labels)


def find_tolerance(data: Data, tasks: Sequence[Task], gap: float) -> tuple[float, float]:
    """The loosest power of ten at which the median gap of some of the peer's fits is within `gap`, and that gap."""
    problems = []
    for task in tasks:
        features = standardise(data.train[task.rows])
        present, labels = np.unique(data.train_labels[task.rows], return_inverse=True)
        best = fit_probe(data.train[task.rows], data.train_labels[task.rows], num_classes=len(SHARES), C=task.C)
        problems.append((features, labels, task.C, best.objective, len(present)))
    reached = np.inf
    for exponent in range(1, 13):
        gaps = []
        for features, labels, C, optimum, _ in problems:
            model = fit_peer(features, labels, C, 10.0**-exponent)
            gaps.append(compute_objective(features, labels, C, model.coef_, model.intercept_) / optimum - 1)
        reached = float(np.median(gaps))
        if reached <= gap:
            return 10.0**-exponent, reached
    return 1e-12, reached


def measure_fold_gap(data: Data, choices: Sequence[Choice]) -> float:
    """The median relative gap to the optimum at which ours leaves the fits of folds."""
    gaps = []
    for choice in choices:
        labels = np.unique(data.train_labels[choice.rows], return_inverse=True)[1]
        basis = build_basis(data.train[choice.rows])
        kept = make_group_folds(labels, data.train_groups[choice.rows], NUM_FOLDS, 0) != 0
        optimum = None
        for C in choice.fit.log_losses:
            rows = basis.coordinates[kept]
            optimum = minimise(rows.astype(np.float32), labels[kept], basis.variances, C, optimum, FOLD_TOLERANCE)
            exact = minimise(rows, labels[kept], basis.variances, C, optimum, FINAL_TOLERANCE)
            gaps.append(optimum.objective / exact.objective - 1)
    return float(np.median(gaps))


def time_peer(data: Data, tasks: Sequence[Task], tolerances: tuple[float, float]) -> float:
    """Seconds that the peer takes for these fits on both cores."""

    def run(task: Task) -> None:
        features, labels = standardise(data.train[task.rows]), data.train_labels[task.rows]
        with threadpool_limits(1):
            fit_peer(features, labels, task.C, tolerances[task.is_refit])

    started = time.perf_counter()
    Parallel(n_jobs=CORES)(delayed(run)(task) for task in tasks)
    return time.perf_counter() - started


def compute_by_sklearn(labels: Ints, scores: Floats, weights: Floats) -> dict[str, float]:
    """The metrics as scikit-learn has them, one call each."""
    warnings.simplefilter("ignore")
    predicted = scores.argmax(axis=1)
    K = scores.shape[1]
    hot = np.eye(K)[labels]
    common: dict[str, Any] = {"sample_weight": weights}
    return {
        "auroc": float(np.mean([sk.roc_auc_score(hot[:, k], scores[:, k], **common) for k in range(K)])),
        "auprc": float(np.mean([sk.average_precision_score(hot[:, k], scores[:, k], **common) for k in range(K)])),
        "balanced_accuracy": float(sk.balanced_accuracy_score(labels, predicted, **common)),
        "accuracy": float(sk.accuracy_score(labels, predicted, **common)),
        "weighted_f1": float(sk.f1_score(labels, predicted, average="weighted", **common)),
        "macro_f1": float(sk.f1_score(labels, predicted, average="macro", labels=range(K), zero_division=0, **common)),
        "kappa": float(sk.cohen_kappa_score(labels, predicted, **common)),
        "log_loss": float(sk.log_loss(labels, scores, labels=range(K), **common)),
        "brier": float(np.average(np.square(scores - hot).sum(axis=1), weights=weights)),
    }


def main() -> None:
    """Time both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args()
    shape = (800, 400, 128) if options.quick else (8000, 2000, 1024)
    draws, num_replicates, timed = (2, 200, 5) if options.quick else (DRAWS, 2000, 20)
    data = draw_data(*shape)

    choices, fit_seconds, metric_seconds = measure_ours(data, num_replicates, draws)
    tasks = list_tasks(data, choices)
    rng = np.random.default_rng(1)
    probes = [task for task in tasks if not task.is_refit and task.C in (1e-4, 1e-3, 1e-2, 0.1)]
    sample = [probes[place] for place in rng.choice(len(probes), min(6, len(probes)), replace=False)]
    refits = [task for task in tasks if task.is_refit][-6:]
    fold_gap = measure_fold_gap(data, choices[-16::5])
    tolerances = (find_tolerance(data, sample, max(GAP, fold_gap)), find_tolerance(data, refits, GAP))
    print(f"median gap of our fits of folds {fold_gap:.1e}")
    print(f"peer's tolerance: folds {tolerances[0][0]:g} (gap {tolerances[0][1]:.1e}), refits {tolerances[1][0]:g} "
          f"(gap {tolerances[1][1]:.1e})")  # fmt: skip
    for choice in choices[-3:]:
        features = standardise(data.train[choice.rows])
        model = fit_peer(features, data.train_labels[choice.rows], choice.fit.C, 1e-9)
        theirs = compute_objective(
            features, data.train_labels[choice.rows], choice.fit.C, model.coef_, model.intercept_
        )
        gap = choice.fit.probe.objective / theirs - 1
        assert abs(gap) <= GAP, f"objectives differ by {gap:.1e}"

    picked = [tasks[place] for place in rng.choice(len(tasks), max(8, round(SAMPLE * len(tasks))), replace=False)]
    peer_fits = time_peer(data, picked, (tolerances[0][0], tolerances[1][0])) * len(tasks) / len(picked)
    tried = list_tasks(data, choices, tried_only=True)
    kept = [tried[place] for place in rng.choice(len(tried), max(8, round(SAMPLE * len(tried))), replace=False)]
    peer_tried = time_peer(data, kept, (tolerances[0][0], tolerances[1][0])) * len(tried) / len(kept)

    weights = draw_group_weights(data.test_groups, timed, 0)
    ours = compute_all_replicates(METRICS, data.test_labels, choices[-1].scores, weights)
    started = time.perf_counter()
    theirs = [compute_by_sklearn(data.test_labels, choices[-1].scores, row.astype(float)) for row in weights]
    one_core = (time.perf_counter() - started) / timed
    peer_metrics = one_core * num_replicates * len(choices) / CORES  # replicates are independent: both cores
    # Where a replicate has no image of a class, ours is undefined and scikit-learn warns and says 0.
    differences = np.array([[ours[name][row] - theirs[row][name] for name in METRICS] for row in range(timed)])
    difference = float(np.nanmax(np.abs(differences)))
    assert difference <= 1e-12, f"metrics differ by {difference:.1e}"

    num_tried = np.mean([len(choice.fit.log_losses) for choice in choices])
    print(f"{len(tasks)} fits of the peer, {len(picked)} timed; ours fitted {num_tried:.1f} of {len(C_GRID)} C; "
          f"largest difference of a metric {difference:.1e}")  # fmt: skip
    total, peer_total = fit_seconds + metric_seconds, peer_fits + peer_metrics
    rows = [
        Row("sweep of one task", total, peer_total, peer_total / total, "s"),
        Row("of it the fits", fit_seconds, peer_fits, peer_fits / fit_seconds, "s"),
        Row("the fits, C that ours tried", fit_seconds, peer_tried, peer_tried / fit_seconds, "s"),
        Row("of it the bootstrap", metric_seconds, peer_metrics, peer_metrics / metric_seconds, "s"),
    ]
    for row in rows:
        print(f"{row.name:28} {row.ours:9.1f} {row.peer:11.1f} {row.unit}   x {row.ratio:.1f}")
    # Thirty such tasks are independent pieces: what two cores do in `total` seconds, eight do in a quarter of it.
    print(f"thirty such tasks on eight cores: 30 x {total:.0f} s x 2 / 8 = {30 * total * CORES / 8 / 60:.1f} minutes")
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
