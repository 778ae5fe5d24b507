"""Two ranks have the loss, gradients and teacher of one rank with the joined batch; their runs resume to the bit."""

from typing import Any

import pytest
import torch

from tests.objectives.ranks_worker import MODELS, compute_steps, do_both
from tests.ranks import run_ranks

# Of what a rank has by itself: its own images alone say how much the teacher tells images apart.
OF_ONE_RANK = ("teacher_information", "ibot_teacher_information", "ibot_teacher_entropy", "target_std")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(do_both, 2, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_the_joined_batch(ranks: list[Any]) -> None:
    alone = compute_steps()
    for together, _ in ranks:
        for name in MODELS:
            ours, expected = together[name], alone[name]
            assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-12), name
            for part in ("gradients", "extra"):
                assert ours[part].keys() == expected[part].keys()
                for key, tensor in expected[part].items():
                    # timm resamples the table of positions for local views in float32
                    atol = 1e-8 if key == "encoder.pos_embed" and "distillation" in name else 1e-12
                    torch.testing.assert_close(ours[part][key], tensor, rtol=0, atol=atol, msg=f"{name}: {key}")
            for key, value in expected["metrics"].items():
                if not key.endswith(OF_ONE_RANK):
                    assert ours["metrics"][key] == pytest.approx(value, abs=1e-12), f"{name}: {key}"
    gradients = alone["masked and contrastive"]["gradients"]
    assert float(gradients["objectives.contrastive_lesion.log_scale"].abs()) > 1e-3
    assert alone["self-distillation by Sinkhorn"]["metrics"]["self_distillation/loss/histopathology"] is None
    centre = alone["self-distillation by centres"]["extra"]["objectives.self_distillation.patch_centre.value"]
    assert float(centre.abs().max()) > 1e-2


@pytest.mark.slow
def test_two_ranks_resume_exactly_under_zero_1_and_2(ranks: list[Any]) -> None:
    of_rank_0 = ranks[0][1]
    for _, found in ranks:
        for zero_stage in (1, 2):
            (losses, whole), (again, resumed) = (found[zero_stage, name] for name in ("whole", "resumed"))
            assert losses == again and losses[0] != losses[1]
            assert whole.keys() == resumed.keys() and any(name.startswith("teacher.encoder.") for name in whole)
            for name, tensor in whole.items():
                assert torch.equal(tensor, resumed[name]), name
                assert torch.equal(tensor, of_rank_0[zero_stage, "whole"][1][name]), name
