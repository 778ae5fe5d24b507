"""Twenty steps through the engine are twenty steps in plain PyTorch; the whole table is in docs/parallelism.md.

Two ranks are started once: they train real objectives at every stage, go past a step that fails on one of them, and
look at the model between steps. What may differ is the order of sums in float32. Here are samples of the table only.
"""

from typing import Any

import pytest
import torch

from panfm.distributed import get_rank
from tests.ranks import run_ranks
from tests.training.parity import CASES, CLIP, Training, compare, train, train_many, train_plainly
from tests.training.test_engine import FAULTS, build_engine, build_student, draw_batch, train_past_a_fault

PIXELS = "masked pixels"
SEVERAL = "masked pixels, latents and contrastive"
RUNS = [(PIXELS, 0, 6), (PIXELS, 1, 3), (PIXELS, 2, 6), (PIXELS, 3, 6)]
SHORT_RUNS, NUM_SHORT = [(SEVERAL, 3, 3)], 3  # runs of a few steps: each takes a second
FAILURES = [(0, "gradient"), (1, "loss alone"), (2, "gradient"), (3, "loss"), (3, "loss alone")]


def do_on_two_ranks() -> dict[str, Any]:
    # Stage by stage: ZeRO 3 puts another linear map in the place of torch's, which rounds otherwise.
    faults, without = [], []
    for zero_stage in range(4):
        faults += [train_past_a_fault(zero_stage, 2, fault) for stage, fault in FAILURES if stage == zero_stage]
        without.append(train_past_a_fault(zero_stage, 2, None))
    parity = (train_many(RUNS), train_many(SHORT_RUNS, NUM_SHORT))
    return {"faults": faults, "without": without, "looks": look_between_steps(), "parity": parity}


def look_between_steps() -> list[float]:
    """Losses of three steps under ZeRO 3, and of three after each of which rank 0 alone looks through the model."""
    losses = []
    for looks in (False, True):
        model = build_student()
        engine = build_engine(model, 3, 4)
        for step in range(3):
            batch = draw_batch(step * 8 + get_rank() * 4, 4)
            losses.append(engine.step([batch], step=step, lr=1e-2).loss)
            assert model.head.weight.numel() == 0
            if looks:
                state = engine.copy_state(model.encoder)
                with engine.whole(), torch.no_grad():
                    if get_rank() == 0:
                        for _ in range(2):  # the first must not take the weights along
                            assert model.encoder.blocks[0](torch.ones(1, 16)).isfinite().all()
                    assert all(torch.equal(state[name], found) for name, found in model.encoder.state_dict().items())
                with engine.gather([model.head]):
                    assert model.head.weight.shape == (2, 16) and model.encoder.patch_embed.weight.numel() == 0
                assert model.head.weight.numel() == 0
    return losses


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(do_on_two_ranks, 2)


def assert_same(ours: Training, plain: Training, name: str) -> None:
    deviation = compare(ours, plain, CASES[name])
    assert deviation.loss < 1e-5 and deviation.norm < 1e-4 and deviation.weights < 1e-4, (name, deviation)


@pytest.mark.slow
def test_two_ranks_train_as_plain_pytorch_does_at_every_stage(ranks: list[dict[str, Any]]) -> None:
    plain, short = train_plainly(CASES[PIXELS]), train_plainly(CASES[SEVERAL], NUM_SHORT)
    assert min(plain.norms) < CLIP < max(plain.norms), plain.norms  # some steps are clipped and some are not
    assert any(name.startswith("teacher.encoder.") for name in short.weights)
    for found in ranks:
        for results, expected, runs in zip(found["parity"], (plain, short), (RUNS, SHORT_RUNS), strict=True):
            for ours, (name, _, _) in zip(results, runs, strict=True):
                assert_same(ours, expected, name)


@pytest.mark.slow
def test_a_fault_on_one_rank_leaves_no_trace_on_any(ranks: list[dict[str, Any]]) -> None:
    assert {fault for _, fault in FAILURES} == set(FAULTS)
    for found in ranks:
        for (losses, weights), (zero_stage, fault) in zip(found["faults"], FAILURES, strict=True):
            expected, expected_weights = found["without"][zero_stage]
            assert losses == expected, (zero_stage, fault)
            assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_rank_0_may_look_at_sharded_weights_between_steps(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["looks"][:3] == found["looks"][3:]
        assert len(set(found["looks"])) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero_stage"),
    [
        ("masked pixels, gradient checkpointing", 3),
        ("masked pixels, rotary encoder", 3),
        ("self-distillation by Sinkhorn, KoLeo", 3),
        ("image and text", 3),
        ("masked pixels, fp16", 0),
    ],
)
def test_one_rank_trains_as_plain_pytorch_does(name: str, zero_stage: int) -> None:
    case, before = CASES[name], torch.get_num_threads()
    torch.set_num_threads(1)
    ours, plain = train(case, zero_stage, 12, NUM_SHORT), train_plainly(case, NUM_SHORT)
    torch.set_num_threads(before)
    if case.precision == "fp32":
        assert_same(ours, plain, name)
    else:
        assert 0 < compare(ours, plain, case).loss < 1e-2
