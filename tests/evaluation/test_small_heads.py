"""Small trained heads: what can be learned is, rate and length are chosen inside, test labels take no part."""

import numpy as np
import pytest
import torch
from torch import nn

from panfm.errors import UserError
from panfm.evaluation.small_heads import HeadConfig, HeadScores, score_head

NUM = 60
GROUPS = np.array([f"P{number // 2}" for number in range(NUM)])
LABELS = (np.arange(NUM) // 2) % 2
TRAIN, TEST = np.arange(40), np.arange(40, NUM)


def make_values(strength: float = 2.0) -> torch.Tensor:
    noise = np.random.default_rng(1).normal(size=(NUM, 4))
    noise[:, 2] += strength * (2 * LABELS - 1)
    return torch.from_numpy(noise).float()


def score(
    config: HeadConfig, values: torch.Tensor | None = None, labels: np.ndarray = LABELS, num_classes: int = 2
) -> HeadScores:
    given = make_values() if values is None else values
    return score_head(
        lambda num: nn.Linear(4, num),
        lambda module, places, rng: module(given[torch.from_numpy(places)]),
        labels=labels, groups=GROUPS, train=TRAIN, test=TEST, num_classes=num_classes, seed=0, config=config,
        device=torch.device("cpu"), description="test",
    )  # fmt: skip


QUICK = HeadConfig(lrs=(1e-5, 0.1), max_epochs=6, num_seeds=2, num_folds=3)


def test_a_rate_that_learns_is_chosen_and_used() -> None:
    found = score(QUICK)
    assert (found.lr, found.num_folds) == (0.1, 3)
    np.testing.assert_allclose(found.scores.sum(axis=1), 1)
    assert (found.scores.argmax(axis=1) == LABELS[TEST]).mean() >= 0.9


def test_training_ends_early_where_there_is_nothing_to_learn() -> None:
    config = HeadConfig(lrs=(0.3,), max_epochs=12, num_seeds=1, num_folds=3)
    assert score(config, make_values(0.0)).num_epochs < 6 <= score(config, make_values(1.0)).num_epochs + 5


def test_equal_seeds_give_equal_scores_and_test_labels_take_no_part() -> None:
    first = score(QUICK)
    torch.manual_seed(5)  # whatever ran before
    other = LABELS.copy()
    other[TEST] = 1 - other[TEST]
    np.testing.assert_array_equal(first.scores, score(QUICK, labels=other).scores)


def test_a_class_that_training_has_not_gets_no_probability() -> None:
    found = score(QUICK, labels=2 * LABELS, num_classes=3)
    assert (found.scores[:, 1] == 0).all() and (found.scores[:, [0, 2]] > 0).all()


def test_a_class_of_one_group_is_trained_without_folds() -> None:
    labels = np.zeros(NUM, dtype=np.int64)
    labels[:2] = 1
    found = score(QUICK, labels=labels)
    assert (found.num_folds, found.lr, found.num_epochs) == (0, 0.1, 3)


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    with pytest.raises(UserError, match="the loss of the head is nan at a learning rate of 1e-05; lower `lrs`"):
        score(QUICK, make_values() * float("nan"))
