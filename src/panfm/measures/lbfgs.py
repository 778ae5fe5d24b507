"""L-BFGS for a batch of problems that know nothing of each other (Liu and Nocedal 1989), on any device.

    evaluate(variables [p, ...], places [p]) -> objective [p], gradient [p, ...]  --steps of each its own-->  optima

The two-loop recursion runs for all problems side by side, each with its own history, step length and end. Finished
problems leave the batch, so that the last slow ones do not pay for the others.
"""

from collections.abc import Callable

import torch
from torch import Tensor

HISTORY = 10  # pairs of steps and changes of gradient that are remembered
CHECK_EVERY = 10  # iterations between two looks at which problems are finished: a look waits for a GPU
SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring (Armijo)
MAX_HALVINGS = 30

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def minimise_batched(
    evaluate: Evaluate, start: Tensor, *, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise P problems from start [P, ...]; returns variables [P, ...], objectives [P] and converged (bool [P]).

    A problem ends when an accepted step lowers its objective by less than tolerance * max(|objective|, 1), or when no
    step along its direction lowers it at all: it then stands at the optimum to rounding. Variables should be scaled so
    that curvatures are near 1: the first step is as long as the gradient.
    """
    check_every = 1 if start.device.type == "cpu" else CHECK_EVERY
    shape, num_problems = start.shape[1:], len(start)
    x = start.reshape(num_problems, -1).clone()
    places = torch.arange(num_problems, device=x.device)
    f, g = _evaluate_flat(evaluate, x, places, shape)
    best_x, best_f = x.clone(), f.clone()
    converged = torch.zeros(num_problems, dtype=torch.bool, device=x.device)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    done = torch.zeros(num_problems, dtype=torch.bool, device=x.device)  # of the problems still in the batch
    for iteration in range(max_iterations):
        direction = -_apply_inverse_hessian(g, steps, changes)
        slope = (direction * g).sum(dim=1)
        uphill = slope >= 0  # a history that misleads is not used: down the gradient instead
        direction = torch.where(uphill[:, None], -g, direction)
        slope = torch.where(uphill, -(g * g).sum(dim=1), slope)
        length = torch.ones_like(f)  # from the first step on: the variables are in units of their curvature
        waiting = ~done
        new_x, new_f, new_g = x.clone(), f.clone(), g.clone()
        for _ in range(MAX_HALVINGS):
            at = waiting.nonzero()[:, 0]
            if len(at) == 0:
                break
            trial = x[at] + length[at, None] * direction[at]
            trial_f, trial_g = _evaluate_flat(evaluate, trial, places[at], shape)
            accepted = trial_f <= f[at] + SUFFICIENT * length[at] * slope[at]
            taken = at[accepted]
            new_x[taken], new_f[taken], new_g[taken] = trial[accepted], trial_f[accepted], trial_g[accepted]
            waiting[taken] = False
            length[at[~accepted]] /= 2
        gained = f - new_f
        done = done | (gained <= tolerance * torch.maximum(new_f.abs(), torch.ones_like(f)))
        _remember(steps, changes, new_x - x, new_g - g)
        x, f, g = new_x, new_f, new_g
        if (iteration + 1) % check_every == 0 or iteration + 1 == max_iterations:
            best_x[places], best_f[places], converged[places] = x, f, done
            keep = (~done).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < len(places):
                places, x, f, g, done = places[keep], x[keep], f[keep], g[keep], done[keep]
                steps = [pair[keep] for pair in steps]
                changes = [pair[keep] for pair in changes]
    return best_x.view(start.shape), best_f, converged


def _evaluate_flat(evaluate: Evaluate, x: Tensor, places: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    f, g = evaluate(x.view(len(x), *shape), places)
    return f, g.reshape(len(x), -1)


def _remember(steps: list[Tensor], changes: list[Tensor], step: Tensor, change: Tensor) -> None:
    """Keep a pair; where the curvature along it is not positive it is blanked, which takes it out of the recursion."""
    curved = (step * change).sum(dim=1) > 1e-14 * step.norm(dim=1) * change.norm(dim=1)
    steps.append(torch.where(curved[:, None], step, 0.0))
    changes.append(torch.where(curved[:, None], change, 0.0))
    if len(steps) > HISTORY:
        del steps[0], changes[0]


def _apply_inverse_hessian(g: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The two-loop recursion; a blanked pair counts for nothing."""
    q = g.clone()
    weights = []
    for step, change in zip(reversed(steps), reversed(changes), strict=True):
        product = (step * change).sum(dim=1)
        rho = torch.where(product > 0, 1 / product.clamp(min=1e-300), 0.0)
        alpha = rho * (step * q).sum(dim=1)
        q = q - alpha[:, None] * change
        weights.append((rho, alpha))
    scale = torch.ones(len(g), dtype=g.dtype, device=g.device)
    for step, change in zip(steps, changes, strict=True):  # the latest pair that is not blank
        size = (change * change).sum(dim=1)
        scale = torch.where(size > 0, (step * change).sum(dim=1) / size.clamp(min=1e-300), scale)
    q = q * scale[:, None]
    for (rho, alpha), step, change in zip(reversed(weights), steps, changes, strict=True):
        beta = rho * (change * q).sum(dim=1)
        q = q + (alpha - beta)[:, None] * step
    return q
