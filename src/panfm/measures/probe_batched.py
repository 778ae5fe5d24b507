"""Many linear probes at once, for GPUs: every C of every fold of every choice of labels in the same matrix products.

    features [N, D] on the device -> one rotation for all -> problems (labelled rows, fold, C) as masks and penalties
    -> batched L-BFGS, finished problems leave the batch -> held-out log-loss -> C of each choice of labels -> refit

The same objective, grid, folds and rule as `probe.fit_probe_cv`, which is quicker on CPUs: there each C starts at the
optimum of the one before and the path ends early, whereas a GPU is idle unless hundreds of problems run side by side.
Each choice of labels is standardised by its own mean and spread; in the common coordinates that is a constant in the
bias and a scale in the penalty, so that one copy of the features serves all. Everything is float64, in which the
GPUs of data centres are quick. Never run on a GPU yet; on CPUs held to `fit_probe_cv`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from torch import Tensor

from panfm.measures.lbfgs import HISTORY, minimise_batched
from panfm.measures.probe import (
    C_GRID,
    CONSTANT_SPREAD,
    FINAL_TOLERANCE,
    FOLD_TOLERANCE,
    MAX_ITERATIONS,
    PATIENCE,
    TIE,
    Probe,
    ProbeFit,
    check_training,
    compute_preset_c,
    make_group_folds,
)

Ints = NDArray[np.int64]
MAX_VALUES = 2**27  # logits, or variables of the history, held at once: 1 GiB in float64


@dataclass(frozen=True)
class Labelled:
    """One choice of labels: rows [n] of the common features, their classes [n] and groups [n]; seed of its folds."""

    rows: Ints
    labels: Ints
    groups: NDArray[np.str_]
    seed: int


@dataclass(frozen=True)
class _Common:
    """The features in coordinates that all problems share: standardised over all rows, rotated to principal axes."""

    coordinates: Tensor  # [N, D]
    mean: Tensor  # [D]
    scale: Tensor  # [D]
    rotation: Tensor  # [D, D], standardised features = coordinates @ rotation.T
    variances: Tensor  # [D]


@dataclass(frozen=True)
class _Problem:
    labelled: int  # place in the list of choices
    rows: Ints  # it is fitted to
    C: float


@dataclass(frozen=True)
class _Fitted:
    weight: Tensor  # [K, D] in the common coordinates; classes that do not occur are 0
    bias: Tensor  # [K]; -inf where a class does not occur
    objective: float
    converged: bool


def fit_probes_cv(
    features: ArrayLike | Tensor,
    choices: Sequence[Labelled],
    *,
    num_classes: int,
    num_folds: int = 5,
    device: torch.device | str = "cpu",
) -> list[ProbeFit]:
    """Choose C for every choice of labels by its own cross-validation and fit to it: one ProbeFit each, in order.

    features: [N, D] of all rows that the choices name. Raises UserError as `fit_probe_cv` does.
    """
    values = np.asarray(features, dtype=np.float64)
    for choice in choices:
        check_training(values[choice.rows], choice.labels, num_classes)
    common = _build_common(torch.as_tensor(values, device=device))
    scales = [_measure_spread(values[choice.rows]) for choice in choices]
    folds = [make_group_folds(choice.labels, choice.groups, num_folds, choice.seed) for choice in choices]
    labels = np.full((len(choices), len(values)), -1, dtype=np.int64)
    for place, choice in enumerate(choices):
        labels[place, choice.rows] = choice.labels
    solver = _Solver(common, torch.as_tensor(labels, device=device), scales, num_classes)

    problems = [
        _Problem(place, choice.rows[folds[place] != fold], C)
        for place, choice in enumerate(choices)
        for fold in range(int(folds[place].max()) + 1)
        for C in C_GRID
        if folds[place].max() > 0
    ]
    losses_at: dict[tuple[int, float], float] = {}
    logits_at: dict[tuple[int, float], NDArray[np.float64]] = {}  # held-out logits [n, K] of a choice of labels
    for problem, fitted in zip(problems, solver.solve(problems, FOLD_TOLERANCE), strict=True):
        choice = choices[problem.labelled]
        out = ~np.isin(choice.rows, problem.rows)
        key = (problem.labelled, problem.C)
        logits, loss = solver.hold_out(fitted, problem.labelled, choice.rows[out])
        losses_at[key] = losses_at.get(key, 0.0) + loss
        logits_at.setdefault(key, np.empty((len(choice.rows), num_classes)))[out] = logits

    chosen, losses = [], []
    for place, choice in enumerate(choices):
        of_path = {C: losses_at[place, C] / len(choice.rows) for C in C_GRID if (place, C) in losses_at}
        losses.append(_end_path(of_path))
        best = min(losses[-1].values(), default=0.0)
        chosen.append(
            min(C for C, loss in losses[-1].items() if loss <= best * (1 + TIE))
            if losses[-1]
            else compute_preset_c(values.shape[1])
        )
    finals = solver.solve(
        [_Problem(place, choice.rows, chosen[place]) for place, choice in enumerate(choices)], FINAL_TOLERANCE
    )
    return [
        ProbeFit(
            probe := _make_probe(common, fitted, scales[place], chosen[place]),
            chosen[place],
            int(folds[place].max()) + 1 if losses[place] else 0,
            bool(losses[place]) and chosen[place] in (C_GRID[0], C_GRID[-1]),
            probe.converged,
            losses[place],
            softmax(logits_at[place, chosen[place]], axis=1) if losses[place] else None,
        )
        for place, fitted in enumerate(finals)
    ]


def _end_path(losses: dict[float, float]) -> dict[float, float]:
    """The part of a path that `fit_probe_cv` walks: it ends when the log-loss has worsened PATIENCE times in a row."""
    walked: dict[float, float] = {}
    num_worse = 0
    for C, loss in losses.items():
        num_worse = num_worse + 1 if walked and loss > min(walked.values()) else 0
        walked[C] = loss
        if num_worse == PATIENCE:
            break
    return walked


def _measure_spread(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and spread [D] by which one choice of labels is standardised; constant features keep a spread of 1."""
    mean, spread = features.mean(axis=0), features.std(axis=0)
    scale = np.where(spread > CONSTANT_SPREAD * np.abs(mean), spread, 1.0)
    scale[scale == 0] = 1.0
    return mean, scale


def _build_common(features: Tensor) -> _Common:
    mean = features.mean(dim=0)
    spread = features.std(dim=0, correction=0)
    scale = torch.where(spread > CONSTANT_SPREAD * mean.abs(), spread, 1.0)
    scale[scale == 0] = 1.0
    standardised = (features - mean) / scale
    eigenvalues, rotation = torch.linalg.eigh(standardised.T @ standardised)
    variances = eigenvalues.clamp(min=0) / len(features)
    return _Common(standardised @ rotation, mean, scale, rotation, variances)


def _make_probe(
    common: _Common, fitted: _Fitted, spread: tuple[NDArray[np.float64], NDArray[np.float64]], C: float
) -> Probe:
    """The probe of features standardised by its own choice of labels."""
    mean, scale = spread
    per_feature = (fitted.weight @ common.rotation.T / common.scale).cpu().numpy()  # of features as they come
    bias = fitted.bias.cpu().numpy() + per_feature @ (mean - common.mean.cpu().numpy())
    present = np.isfinite(bias)
    bias[present] -= bias[present].mean()  # a constant common to all classes is free
    return Probe(mean, scale, per_feature * scale, bias, C, fitted.objective, fitted.converged)


class _Solver:
    """Fits problems on common coordinates; memory is bounded by solving them in chunks."""

    def __init__(
        self,
        common: _Common,
        labels: Tensor,  # [choices, N], -1 where a row has no label
        spreads: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
        num_classes: int,
    ) -> None:
        self.common, self.labels, self.num_classes = common, labels, num_classes
        device = common.coordinates.device
        # Weights of a choice's own standardised features = stretch * weights of the common ones.
        self.stretch = torch.stack([torch.as_tensor(scale, device=device) / common.scale for _, scale in spreads])

    def solve(self, problems: Sequence[_Problem], tolerance: float) -> list[_Fitted]:
        """Fit every problem; chunks hold problems of neighbouring choices, and only the rows that these need."""
        if not problems:
            return []
        num_axes = self.common.coordinates.shape[1]
        most_rows = max(len(problem.rows) for problem in problems)
        size = max(1, MAX_VALUES // (self.num_classes * max(most_rows, 2 * HISTORY * num_axes)))
        fitted: list[_Fitted] = []
        for start in range(0, len(problems), size):
            fitted += self._solve_chunk(problems[start : start + size], tolerance)
        return fitted

    def hold_out(self, fitted: _Fitted, labelled: int, rows: Ints) -> tuple[NDArray[np.float64], float]:
        """Logits [n, K] of rows that a problem was not fitted to, and the sum of their log-losses."""
        places = torch.as_tensor(rows, device=self.labels.device)
        logits = self.common.coordinates[places] @ fitted.weight.T + fitted.bias
        loss = torch.nn.functional.cross_entropy(logits, self.labels[labelled, places], reduction="sum")
        return logits.cpu().numpy(), float(loss)

    def _solve_chunk(self, problems: Sequence[_Problem], tolerance: float) -> list[_Fitted]:
        device, K = self.labels.device, self.num_classes
        used = np.unique(np.concatenate([problem.rows for problem in problems]))
        place_of = np.full(self.labels.shape[1], -1, dtype=np.int64)
        place_of[used] = np.arange(len(used))
        rows = torch.as_tensor(used, device=device)
        X = self.common.coordinates[rows]  # [n, D]
        mask = torch.zeros(len(problems), len(used), device=device, dtype=X.dtype)
        for place, problem in enumerate(problems):
            mask[place, torch.as_tensor(place_of[problem.rows], device=device)] = 1
        of = torch.as_tensor([problem.labelled for problem in problems], device=device)
        target = torch.nn.functional.one_hot(self.labels[of][:, rows].clamp(min=0), K).to(X.dtype)  # [P, n, K]
        target *= mask[..., None]
        counts = target.sum(dim=1)  # [P, K]
        present = counts > 0
        num_rows = mask.sum(dim=1, keepdim=True)
        shares = counts / num_rows
        # Two classes have half the penalty each (see `probe`); that is by the classes that occur.
        factor = torch.where(present.sum(dim=1) == 2, 2.0, 1.0)
        penalty = factor / torch.as_tensor([problem.C for problem in problems], device=device, dtype=X.dtype)
        stretch = self.stretch[of]  # [P, D]
        spread = (shares * (1 - shares)).clamp(min=1e-9)
        mean_stretch = (stretch**2).mean(dim=1)
        weight_scale = torch.sqrt(
            num_rows[..., None] * spread[..., None] * self.common.variances + (penalty * mean_stretch)[:, None, None]
        )
        bias_scale = torch.sqrt(num_rows * spread)
        hidden = torch.where(present, 0.0, -torch.inf).to(X.dtype)  # logits of classes that do not occur
        start = torch.zeros(len(problems), K, X.shape[1] + 1, device=device, dtype=X.dtype)
        start[..., -1] = torch.where(present, shares.clamp(min=1e-12).log(), 0.0) * bias_scale

        def evaluate(variables: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            """Objective [p] and gradient [p, K, D + 1] of the problems `at` (places [p])."""
            weight = variables[..., :-1] / weight_scale[at]  # [p, K, D]
            bias = variables[..., -1] / bias_scale[at]
            logits = torch.matmul(X, weight.reshape(-1, X.shape[1]).T).view(len(X), len(at), K).transpose(0, 1)
            logits = logits + (bias + hidden[at])[:, None, :]  # [p, n, K]
            log_total = torch.logsumexp(logits, dim=2)
            right = torch.where(target[at] > 0, logits, 0.0).sum(dim=(1, 2))
            own = torch.matmul(weight, self.common.rotation.T) * stretch[at][:, None, :]  # per own feature
            objective = (log_total * mask[at]).sum(dim=1) - right + 0.5 * penalty[at] * own.square().sum(dim=(1, 2))
            error = (logits - log_total[..., None]).exp() * mask[at][..., None] - target[at]  # [p, n, K]
            fitted = torch.matmul(error.transpose(1, 2).reshape(-1, len(X)), X).view(len(at), K, -1)
            shrink = torch.matmul(own * stretch[at][:, None, :], self.common.rotation) * penalty[at][:, None, None]
            gradient = torch.cat(
                [(fitted + shrink) / weight_scale[at], (error.sum(dim=1) / bias_scale[at])[..., None]], dim=2
            )
            return objective, gradient * present[at][..., None]

        variables, objective, converged = minimise_batched(
            evaluate, start, tolerance=tolerance, max_iterations=MAX_ITERATIONS
        )
        weight = variables[..., :-1] / weight_scale
        bias = variables[..., -1] / bias_scale + hidden
        found = zip(weight, bias, objective.tolist(), converged.tolist(), strict=True)
        return [_Fitted(*values) for values in found]
