"""Micro batches through the engine: contrastive losses see the whole batch, metrics weigh by what they count."""

from typing import Any

import pytest
import torch
from timm.layers import DropPath

from panfm.config import validate
from panfm.distributed import process_group
from panfm.optim import OptimConfig
from panfm.training.engine import Engine, EngineConfig, StepOutput
from tests.objectives.conftest import SELF_DISTILLATION
from tests.objectives.ranks_worker import build, make_batch, take

VIEWS = {"kind": "contrastive", "visible_only": False, "hidden_dim": 32, "output_dim": 16}
CENTRED = SELF_DISTILLATION | {"centring": "mean", "koleo_weight": 0.0}


def train(
    objectives: list[dict[str, Any]], micro_batch_size: int, drop_path: float = 0.0
) -> tuple[list[StepOutput], list[torch.Tensor]]:
    """Three steps of eight images; also what the first objective's head gave, in the order of its calls."""
    seen: list[torch.Tensor] = []
    with process_group(torch.device("cpu")):
        model = build(objectives).float()
        for block in model.encoder.blocks:
            block.drop_path1 = DropPath(drop_path)
        head = next(iter(model.objectives.values())).head
        head.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        sizes = {"global_batch_size": 8, "micro_batch_size": micro_batch_size, "precision": "fp32", "zero_stage": 0}
        engine = Engine(model, model.encoder, validate(EngineConfig, sizes, "test"), OptimConfig(), {})
        outputs = []
        for step in range(3):
            model.begin_step(step)
            firsts = range(0, 8, micro_batch_size)
            batches = [take(make_batch(unequal=True), slice(first, first + micro_batch_size)) for first in firsts]
            outputs.append(engine.step(batches, step=step, lr=1e-2))
            model.after_step(step)
        engine.close()
    return outputs, seen


@pytest.mark.slow
def test_contrastive_and_centred_losses_do_not_depend_on_micro_batches() -> None:
    whole, _ = train([VIEWS, CENTRED], 8)
    parts, _ = train([VIEWS, CENTRED], 2)
    assert len({output.loss for output in whole}) == 3
    for one, four in zip(whole, parts, strict=True):
        assert four.loss == pytest.approx(one.loss, rel=1e-5)
        assert four.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        # Micro batches hold one, two or none of a modality; of the last there is no image at all.
        for name in ("contrastive_views", "self_distillation"):
            for modality in ("clinical", "dermoscopic", "total_body"):
                key = f"{name}/loss/{modality}"
                assert four.metrics[key] == pytest.approx(one.metrics[key], rel=1e-4), key
            assert four.metrics[f"{name}/loss/histopathology"] is None
            assert one.metrics[f"{name}/loss/histopathology"] is None


@pytest.mark.slow
def test_both_passes_of_gradient_caching_draw_the_same_random_numbers() -> None:
    _, seen = train([VIEWS], 4, drop_path=0.5)
    assert len(seen) == 3 * 2 * 2 * 2  # steps, passes, micro batches, views
    for first in range(0, len(seen), 8):
        for before, after in zip(seen[first : first + 4], seen[first + 4 : first + 8], strict=True):
            assert torch.equal(before, after)
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[8])
