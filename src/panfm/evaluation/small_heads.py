"""Small trained heads on frozen features: rate and length chosen within the training units, then several seeds.

    build() -> module;  compute_logits(module, places, rng) -> [b, K]
      -> grouped folds: held-out log-loss of each learning rate after each epoch -> rate, number of epochs
      -> trained on all training units from `num_seeds` starts -> mean probabilities [M, K]

For heads that have no convex solution (`slides`: attention over tiles; `change`: a Siamese head). What a unit is, and
how it is read, is the caller's; nothing here sees a test label. The rate is constant: a number of epochs chosen in the
folds then means the same on all units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from panfm.config import config_class
from panfm.errors import UserError
from panfm.measures.probe import make_group_folds
from panfm.progress import Advance, progress_bar

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Logits [b, K] of the units at some places; the generator is there in training only, to draw parts of a unit with.
ComputeLogits = Callable[[nn.Module, Ints, np.random.Generator | None], Tensor]

MAX_GRAD_NORM = 5.0
SCORED_AT_ONCE = 64  # units


@config_class
class HeadConfig:
    """How a small head is trained."""

    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1e-4, 3e-4, 1e-3), min_length=1)
    """AdamW's learning rates to choose from, by log-loss in the inner folds; constant while training."""
    max_epochs: int = Field(default=20, ge=1)
    """Passes over the training units at most; as many are made as had the best log-loss in the inner folds."""
    batch_size: int = Field(default=8, ge=1)
    """Units a step."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's decoupled decay."""
    num_seeds: int = Field(default=5, ge=1)
    """Starts whose probabilities are averaged: one start alone is a matter of luck."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where the rarest class has fewer groups."""


@dataclass(frozen=True)
class HeadScores:
    """Probabilities of the scored units, float64 [M, K], and how rate and length came about (num_folds 0: preset)."""

    scores: Floats
    lr: float
    num_epochs: int
    num_folds: int

    def describe(self) -> dict[str, Any]:
        """What a reader of the Result needs to judge the training."""
        return {"lr": self.lr, "num_epochs": self.num_epochs, "num_folds": self.num_folds}


def score_head(
    build: Callable[[int], nn.Module],
    compute_logits: ComputeLogits,
    *,
    labels: Ints,
    groups: NDArray[np.str_],
    train: Ints,
    test: Ints,
    num_classes: int,
    seed: int,
    config: HeadConfig,
    device: torch.device,
    description: str,
) -> HeadScores:
    """Train heads on the units at `train` and score those at `test`.

    build: the number of classes that training has -> a fresh module. labels: int64 [N], groups: [N], of all units.
    Classes without a training unit get probability 0. Where no folds are possible (a class with one group), the middle
    rate and half of max_epochs. The same arguments and number of threads give the same scores.

    Raises UserError if a loss is no longer finite.
    """
    present, compact = np.unique(labels[train], return_inverse=True)
    target = np.full(len(labels), -1, dtype=np.int64)
    target[train] = compact
    folds = make_group_folds(compact, groups[train], config.num_folds, seed)
    num_folds = int(folds.max()) + 1 if folds.any() else 0

    def make() -> nn.Module:
        return build(len(present)).to(device)

    num_fits = len(config.lrs) * num_folds
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), progress_bar(description, None, unit="epochs") as advance:
        lr, num_epochs = sorted(config.lrs)[len(config.lrs) // 2], max(1, config.max_epochs // 2)
        if num_fits:
            losses = np.zeros((len(config.lrs), config.max_epochs))
            for number, rate in enumerate(config.lrs):
                for fold in range(num_folds):
                    held_out = train[folds == fold]
                    torch.manual_seed(_mix(seed, 1, number, fold))
                    rng = np.random.default_rng([seed, 1, number, fold])
                    module = make()
                    optimizer = _build_optimizer(module, rate, config)
                    for epoch in range(config.max_epochs):
                        _train_epoch(module, optimizer, compute_logits, train[folds != fold], target, rng, config)
                        log_probs = _predict(module, compute_logits, held_out)
                        losses[number, epoch] -= log_probs[np.arange(len(held_out)), target[held_out]].sum()
                        _say(advance, rate, losses[number, epoch])
            best = int(np.argmin(losses))  # of equals the first: in the order of lrs, then the fewer epochs
            lr, num_epochs = config.lrs[best // config.max_epochs], best % config.max_epochs + 1
        scores = np.zeros((len(test), num_classes))
        for start in range(config.num_seeds):
            torch.manual_seed(_mix(seed, 2, start))
            rng = np.random.default_rng([seed, 2, start])
            module = make()
            optimizer = _build_optimizer(module, lr, config)
            for _ in range(num_epochs):
                loss = _train_epoch(module, optimizer, compute_logits, train, target, rng, config)
                _say(advance, lr, loss)
            scores[:, present] += np.exp(_predict(module, compute_logits, test)) / config.num_seeds
    return HeadScores(scores, float(lr), num_epochs, num_folds)


def _build_optimizer(module: nn.Module, lr: float, config: HeadConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=config.weight_decay)


def _train_epoch(
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    compute_logits: ComputeLogits,
    places: Ints,
    target: Ints,
    rng: np.random.Generator,
    config: HeadConfig,
) -> float:
    """One pass in random order; returns the mean loss of a unit."""
    module.train()
    order = rng.permutation(places)
    total = 0.0
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        logits = compute_logits(module, batch, rng)
        loss = F.cross_entropy(logits, torch.from_numpy(target[batch]).to(logits.device))
        if not torch.isfinite(loss):
            rate = optimizer.param_groups[0]["lr"]
            raise UserError(f"the loss of the head is {loss.item()} at a learning rate of {rate:g}; lower `lrs`")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(order)


@torch.inference_mode()
def _predict(module: nn.Module, compute_logits: ComputeLogits, places: Ints) -> Floats:
    """Logarithms of the probabilities [M, K] of the units at `places`."""
    module.eval()
    blocks = [places[start : start + SCORED_AT_ONCE] for start in range(0, len(places), SCORED_AT_ONCE)]
    return np.concatenate(
        [compute_logits(module, block, None).double().log_softmax(dim=1).cpu().numpy() for block in blocks]
    )


def _mix(*numbers: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _say(advance: Advance, lr: float, loss: float) -> None:
    advance(note=f"rate {lr:g}, loss {loss:.3f}")
