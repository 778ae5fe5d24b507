import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from panfm.config import validate
from panfm.data.batch import Batch
from panfm.distributed import get_rank, get_world_size, process_group
from panfm.errors import UserError
from panfm.optim import OptimConfig, build_optimizer, build_param_groups, set_lr
from panfm.training.engine import (
    Engine,
    EngineConfig,
    compute_deepspeed_config,
    compute_num_micro_batches,
    compute_num_threads,
    compute_step_seed,
    compute_zero_stage,
)
from tests.ranks import run_ranks

OPTIM = OptimConfig(base_lr=1e-2, lr_scaling="none", layer_decay=0.8, weight_decay=0.1)
LRS = (1e-2, 2e-2, 1e-2, 5e-3, 1e-3)
GLOBAL_BATCH_SIZE = 8


@dataclass(frozen=True)
class Output:
    loss: Tensor
    metrics: dict[str, Tensor]


class Student(nn.Module):
    """Two blocks, a norm, dropout if asked, and a head that is thrown away."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.patch_embed = nn.Linear(3 * 4 * 4, 16)
        self.encoder.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2)])
        self.head = nn.Linear(16, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Output:
        x = self.encoder.patch_embed(batch.views[0].flatten(1).float() / 255)
        for block in self.encoder.blocks:
            x = x + self.dropout(block(x).tanh())
        prediction = self.head(x).float()
        loss = (prediction - batch.positions[:, None].float() / 10).square().mean()
        return Output(loss, {"spread": prediction.std(correction=0)})


def build_student(dropout: float = 0.0) -> Student:
    torch.manual_seed(0)
    return Student(dropout)


def draw_batch(first: int, size: int) -> Batch:
    """Samples `first` to `first + size` of a fixed stream."""
    images = [
        torch.randint(256, (3, 4, 4), generator=torch.Generator().manual_seed(n)) for n in range(first, first + size)
    ]
    positions = torch.arange(first, first + size)
    none = torch.full((size,), -1)
    views = (torch.stack(images).to(torch.uint8),)
    return Batch(views, None, positions, none, none, none, none, none)


def train_with_engine(zero_stage: int, precision: str = "fp32", micro_batch_size: int = 4, clip: float | None = 5.0):
    """Losses, gradient norms and final weights of five steps; this rank takes its slice of every global batch."""
    with process_group(torch.device("cpu")):
        values = {
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "micro_batch_size": micro_batch_size,
            "zero_stage": zero_stage,
            "precision": precision,
            "clip_grad_norm": clip,
        }
        model = build_student()
        # A section of its own keeps the stage on one rank, where 1 and 2 would else run as 0.
        extra = {"zero_optimization": {"round_robin_gradients": False}}
        engine = Engine(model, model.encoder, validate(EngineConfig, values, "test"), OPTIM, extra)
        assert engine.zero_stage == zero_stage
        share = GLOBAL_BATCH_SIZE // get_world_size()
        outputs = []
        for step, lr in enumerate(LRS):
            first = step * GLOBAL_BATCH_SIZE + get_rank() * share
            batches = [draw_batch(first + offset, micro_batch_size) for offset in range(0, share, micro_batch_size)]
            outputs.append(engine.step(batches, step=step, lr=lr))
        weights = {name: tensor.tolist() for name, tensor in engine.copy_state(model).items()}
        engine.close()
    return [output.loss for output in outputs], [output.grad_norm for output in outputs], weights


def train_plainly(clip: float | None = 5.0):
    """The same in plain PyTorch on the whole batch."""
    model = build_student()
    optimizer = build_optimizer(build_param_groups(model, model.encoder, OPTIM), OPTIM)
    losses, norms = [], []
    for step, lr in enumerate(LRS):
        set_lr(optimizer.param_groups, lr)
        loss = model(draw_batch(step * GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE)).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def assert_same_training(ours, plain, rel: float) -> None:
    assert ours[0] == pytest.approx(plain[0], rel=rel)
    assert ours[1] == pytest.approx(plain[1], rel=10 * rel)
    for name, tensor in plain[2].items():
        torch.testing.assert_close(torch.tensor(ours[2][name]), torch.tensor(tensor), rtol=10 * rel, atol=10 * rel)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_every_zero_stage_agrees_with_plain_pytorch(zero_stage: int) -> None:
    plain = train_plainly()
    assert min(plain[1]) < 5.0 < max(plain[1]), plain[1]  # some steps are clipped and some are not
    assert_same_training(train_with_engine(zero_stage), plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "micro_batch_size"), [(0, 8), (0, 4), (1, 4)])
def test_nothing_stays_of_a_step_that_was_not_applied(zero_stage: int, micro_batch_size: int, tmp_path: Path) -> None:
    """As in a rollback: a loss that is not finite, an earlier checkpoint, and on."""

    def train(engine: Engine, steps: range) -> list[float]:
        losses = []
        for step in steps:
            first = step * GLOBAL_BATCH_SIZE
            starts = range(first, first + GLOBAL_BATCH_SIZE, micro_batch_size)
            losses.append(engine.step([draw_batch(n, micro_batch_size) for n in starts], step=step, lr=1e-2).loss)
        return losses

    runs = []
    for fails in (True, False):
        with process_group(torch.device("cpu")):
            model = build_student()
            sizes = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": micro_batch_size}
            settings = EngineConfig(**sizes, zero_stage=zero_stage, precision="fp32", clip_grad_norm=5.0)
            extra = {"zero_optimization": {"round_robin_gradients": False}}
            engine = Engine(model, model.encoder, settings, OPTIM, extra)
            if fails:
                train(engine, range(2))
                (tmp_path / "saved").mkdir()
                assert engine.save(tmp_path / "saved") is None
                model.head.weight.data[0, 0] = torch.nan
                assert math.isnan(train(engine, range(2, 3))[0])
            engine.load(tmp_path / "saved")
            runs.append((train(engine, range(2, 5)), engine.copy_state(model)))
            engine.close()
    (losses, weights), (others, other_weights) = runs
    assert losses == others and all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_without_clipping_the_norm_is_still_measured() -> None:
    plain = train_plainly(clip=None)
    for zero_stage in (0, 1):
        assert_same_training(train_with_engine(zero_stage, clip=None), plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_two_ranks_agree_with_plain_pytorch(zero_stage: int) -> None:
    plain = train_plainly()
    for ours in run_ranks(train_with_engine, 2, zero_stage, "fp32", 2):
        assert_same_training(ours, plain, rel=1e-5)


@pytest.mark.slow
def test_bf16_keeps_fp32_weights_and_learns_nearly_the_same() -> None:
    plain, ours = train_plainly(), train_with_engine(1, precision="bf16")
    assert ours[0] == pytest.approx(plain[0], rel=2e-2)
    assert ours[0] != plain[0]  # autocast was on
    weight = torch.tensor(ours[2]["head.weight"])
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.slow
def test_dropout_repeats_by_step_whatever_came_before() -> None:
    """The random state is a function of (seed, step, rank): nothing drawn between two steps changes them."""
    losses = []
    for disturb in (False, True):
        with process_group(torch.device("cpu")):
            model = build_student(dropout=0.5)
            config = EngineConfig(global_batch_size=4, micro_batch_size=4, zero_stage=0, precision="fp32")
            engine = Engine(model, model.encoder, config, OPTIM, {})
            outputs = []
            for step in range(3):
                if disturb:
                    torch.rand(7)
                outputs.append(engine.step([draw_batch(0, 4)], step=step, lr=0.0).loss)
            engine.close()
        losses.append(outputs)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    with process_group(torch.device("cpu")):
        model = build_student()
        config = EngineConfig(global_batch_size=4, micro_batch_size=4, precision="fp32")
        engine = Engine(model, model.encoder, config, OPTIM, {})
        before = engine.copy_state(model)
        with torch.no_grad():
            model.head.bias.fill_(float("nan"))
        output = engine.step([draw_batch(0, 4)], step=0, lr=1.0)
        assert not output.applied
        assert output.grad_norm is None
        assert torch.equal(engine.copy_state(model)["head.weight"], before["head.weight"])
        engine.close()


def test_sizes_that_do_not_divide_name_a_size_that_does() -> None:
    config = EngineConfig(global_batch_size=1000, micro_batch_size=64)
    with pytest.raises(UserError, match=r"\(1000\) must be divisible .* \(64\) x world_size \(8\); try .*=1024"):
        compute_num_micro_batches(config, world_size=8)
    assert compute_num_micro_batches(EngineConfig(global_batch_size=1024, micro_batch_size=64), 8) == 2


def test_the_deepspeed_section_adds_but_does_not_contradict() -> None:
    config = EngineConfig(global_batch_size=64, micro_batch_size=8, zero_stage=2, clip_grad_norm=1.5)
    computed = compute_deepspeed_config(
        config, 4, {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    )
    assert computed["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert computed["wall_clock_breakdown"] is True
    assert (computed["train_batch_size"], computed["gradient_accumulation_steps"]) == (64, 2)
    assert computed["gradient_clipping"] == 1.5
    with pytest.raises(UserError, match=r"deepspeed\.zero_optimization\.stage: .* from engine\.zero_stage"):
        compute_deepspeed_config(config, 4, {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"deepspeed\.fp16: this is computed from engine\.precision"):
        compute_deepspeed_config(config, 4, {"fp16": {"enabled": True}})


def test_on_one_rank_there_is_nothing_to_shard() -> None:
    def stage(zero_stage: int, world_size: int, extra: dict[str, object]) -> int:
        return compute_zero_stage(validate(EngineConfig, {"zero_stage": zero_stage}, "test"), world_size, extra)

    assert [stage(number, 1, {}) for number in range(3)] == [0, 0, 0]
    assert [stage(number, 2, {}) for number in range(3)] == [0, 1, 2]
    assert stage(2, 1, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}) == 2


def test_threads_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert compute_num_threads(EngineConfig()) == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert compute_num_threads(EngineConfig()) == 1
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert compute_num_threads(EngineConfig()) == max(cores // 2, 1)  # the 1 is torchrun's, not the user's
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert compute_num_threads(EngineConfig()) == 3
    assert compute_num_threads(EngineConfig(num_threads=1)) == 1


def test_step_seeds_differ_by_seed_step_and_rank() -> None:
    seeds = {compute_step_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
