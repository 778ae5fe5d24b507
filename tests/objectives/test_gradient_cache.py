"""Contrastive losses over micro batches: the loss and the gradients of one batch, to rounding."""

import torch

from panfm.objectives.demands import find_coupling
from panfm.objectives.interface import Mean
from panfm.objectives.pretraining import PretrainingModel
from tests.objectives.conftest import SELF_DISTILLATION, get_scalars, read
from tests.objectives.ranks_worker import build, make_batch, take

OBJECTIVES = [
    {"kind": "contrastive", "positives": "lesion", "num_views": 1, "hidden_dim": 32, "output_dim": 16, "weight": 2.0},
    {"kind": "contrastive", "visible_only": False, "hidden_dim": 32, "output_dim": 16, "learnable_temperature": False},
    {"kind": "masked_image", "mask": {"ratio": 0.5}, "target": {"kind": "pixels"}, "predictor": {"depth": 1}},
]


def accumulate(model: PretrainingModel, num_micro_batches: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients as the engine accumulates them: the mean over micro batches."""
    size = 8 // num_micro_batches
    batches = [take(make_batch(unequal=False), slice(first, first + size)) for first in range(0, 8, size)]
    caches = model.cache_gradients([model.represent(batch) for batch in batches], batches)
    assert all(parameter.grad is None for parameter in model.parameters())
    losses = []
    for batch, cache in zip(batches, caches, strict=True):
        output = model(batch, cache)
        (output.loss / num_micro_batches).backward()
        losses.append(float(output.loss.detach()))
        assert not any(scalar.requires_grad for scalar in get_scalars(output))
        counted = output.metrics["contrastive_lesion/loss/clinical"]
        assert isinstance(counted, Mean) and float(counted.count) == 3  # of all micro batches: lesions 1, 1 and 2
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sum(losses) / len(losses), gradients


def test_micro_batches_have_the_gradients_of_the_whole_batch() -> None:
    plain = build(OBJECTIVES)
    output = plain(make_batch(unequal=False))
    output.loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert float(expected["objectives.contrastive_lesion.log_scale"].abs()) > 1e-3
    for num_micro_batches in (2, 4):
        loss, gradients = accumulate(build(OBJECTIVES), num_micro_batches)
        torch.testing.assert_close(loss, float(output.loss.detach()), rtol=0, atol=1e-12)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)


def test_only_what_compares_is_cached(build, make_batch) -> None:
    model = build(SELF_DISTILLATION, {"kind": "contrastive", "num_views": 1})
    assert list(model.comparing) == ["contrastive_views"]
    assert list(model.represent(make_batch(4))) == ["contrastive_views"]
    assert find_coupling(read({"kind": "contrastive"})) is None
