import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from panfm.config import validate
from panfm.data.batch import Batch
from panfm.distributed import get_rank, get_world_size, process_group
from panfm.errors import UserError
from panfm.optim import OptimConfig, build_optimizer, build_param_groups, set_lr
from panfm.training.engine import Engine, StepOutput, compute_step_seed
from panfm.training.engine_config import (
    EngineConfig,
    compute_deepspeed_config,
    compute_num_micro_batches,
    compute_num_threads,
    compute_zero_stage,
)
from panfm.training.loss_scale import GROWTH_STEPS, LossScale, compute_next_loss_scale

OPTIM = OptimConfig(base_lr=1e-2, lr_scaling="none", layer_decay=0.8, weight_decay=0.1)
LRS = (1e-2, 2e-2, 1e-2, 5e-3, 1e-3)
GLOBAL_BATCH_SIZE = 8


class Output(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss": lambda loss: loss * math.nan,
    "loss alone": lambda loss: loss + math.inf,  # the gradient is as it was
    "gradient": lambda loss: loss + (loss * 0).sqrt(),
}


class Student(nn.Module):
    """Two blocks, a norm, dropout if asked, and a head that is thrown away. fault: what goes wrong, if anything."""

    fault: str | None = None
    factor = 1.0  # of the loss

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
        loss = loss * self.factor
        if self.fault is not None:
            loss = FAULTS[self.fault](loss)
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


def build_engine(model: Student, zero_stage: int, micro_batch_size: int = 4, **values: object) -> Engine:
    """An engine that runs at this stage on any number of ranks, and under ZeRO 3 shards the smallest parameter."""
    sizes = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": micro_batch_size, "zero_stage": zero_stage}
    config = validate(EngineConfig, {"precision": "fp32", "clip_grad_norm": 5.0, **sizes, **values}, "test")
    # A section of its own keeps the stage on one rank, where 1 to 3 would else run as 0.
    section = {"stage3_param_persistence_threshold": 0} if zero_stage == 3 else {"round_robin_gradients": False}
    engine = Engine(model, model.encoder, config, OPTIM, {"zero_optimization": section})
    assert engine.zero_stage == zero_stage
    return engine


def close(engine: Engine) -> None:
    """Close it; on several ranks the group that it would end serves the next one too."""
    if get_world_size() == 1:
        engine.close()


def train_with_engine(zero_stage: int, precision: str = "fp32", micro_batch_size: int = 4, clip: float | None = 5.0):
    """Losses, gradient norms and final weights of five steps; this rank takes its slice of every global batch."""
    with process_group(torch.device("cpu")):
        model = build_student()
        engine = build_engine(model, zero_stage, micro_batch_size, precision=precision, clip_grad_norm=clip)
        share = GLOBAL_BATCH_SIZE // get_world_size()
        outputs = []
        for step, lr in enumerate(LRS):
            first = step * GLOBAL_BATCH_SIZE + get_rank() * share
            batches = [draw_batch(first + offset, micro_batch_size) for offset in range(0, share, micro_batch_size)]
            outputs.append(engine.step(batches, step=step, lr=lr))
        weights = {name: tensor.tolist() for name, tensor in engine.copy_state(model).items()}
        close(engine)
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
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_stage_agrees_with_plain_pytorch(zero_stage: int) -> None:
    plain = train_plainly()
    assert min(plain[1]) < 5.0 < max(plain[1]), plain[1]  # some steps are clipped and some are not
    assert_same_training(train_with_engine(zero_stage), plain, rel=1e-5)


def train_past_a_fault(
    zero_stage: int, micro_batch_size: int, fault: str | None
) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps, one with a fault on the last rank, if any, two more; losses of the four and the weights after them."""
    with process_group(torch.device("cpu")):
        model = build_student()
        engine = build_engine(model, zero_stage, micro_batch_size)

        def train(step: int) -> StepOutput:
            share = GLOBAL_BATCH_SIZE // get_world_size()
            first = step * GLOBAL_BATCH_SIZE + get_rank() * share
            starts = range(first, first + share, micro_batch_size)
            return engine.step([draw_batch(n, micro_batch_size) for n in starts], step=step, lr=1e-2)

        losses = [train(step).loss for step in range(2)]
        if fault is not None:
            before = engine.copy_state(model)
            model.fault = fault if get_rank() == get_world_size() - 1 else None
            failed = train(2)
            model.fault = None
            assert not failed.applied and failed.grad_norm is None and not failed.skipped_by_scaler, failed
            assert math.isfinite(failed.loss) == (fault == "gradient"), failed
            assert all(torch.equal(tensor, before[name]) for name, tensor in engine.copy_state(model).items())
        losses += [train(step).loss for step in range(2, 4)]
        weights = engine.copy_state(model)
        close(engine)
    return losses, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "micro_batch_size", "fault"),
    [
        (0, 8, "loss"),
        (0, 4, "gradient"),
        (1, 4, "loss alone"),
        (1, 8, "gradient"),
        (2, 4, "loss alone"),
        (3, 4, "loss"),
        (3, 4, "loss alone"),
        (3, 8, "gradient"),
    ],
)
def test_nothing_stays_of_a_step_that_was_not_applied(zero_stage: int, micro_batch_size: int, fault: str) -> None:
    (losses, weights), (others, other_weights) = (
        train_past_a_fault(zero_stage, micro_batch_size, one) for one in (fault, None)
    )
    assert losses == others and all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_without_clipping_the_norm_is_still_measured() -> None:
    plain = train_plainly(clip=None)
    for zero_stage in (0, 1):
        assert_same_training(train_with_engine(zero_stage, clip=None), plain, rel=1e-5)


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
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_fp16_finds_its_loss_scale_and_learns_nearly_the_same(zero_stage: int, tmp_path: Path) -> None:
    """The gradient of the scaled loss overflows at first: such steps change nothing but the scale."""
    with process_group(torch.device("cpu")):
        model = build_student()
        model.factor = 64.0
        engine = build_engine(model, zero_stage, precision="fp16", clip_grad_norm=64 * 5.0)
        ours: list[StepOutput] = []
        num_skipped = 0
        while len(ours) < len(LRS):
            step, before, scale = len(ours), engine.copy_state(model), engine.loss_scale
            assert scale is not None
            first = step * GLOBAL_BATCH_SIZE
            output = engine.step([draw_batch(first, 4), draw_batch(first + 4, 4)], step=step, lr=LRS[step])
            assert output.metrics["loss_scale"] == scale.value
            if output.applied:
                ours.append(output)
                assert engine.loss_scale == LossScale(scale.value, scale.num_applied + 1)
            else:
                assert output.skipped_by_scaler and output.grad_norm is None
                assert all(torch.equal(tensor, before[name]) for name, tensor in engine.copy_state(model).items())
                assert engine.loss_scale == LossScale(scale.value / 2)
                num_skipped += 1
        assert 0 < num_skipped < 16
        weights, scale = engine.copy_state(model), engine.loss_scale
        engine.copy_part().write(tmp_path)
        engine.loss_scale = LossScale()
        engine.load(tmp_path)
        assert engine.loss_scale == scale != LossScale()
        engine.close()
    plain = train_plainly()
    assert [output.loss / 64 for output in ours] == pytest.approx(plain[0], rel=5e-3)
    assert [output.grad_norm / 64 for output in ours] == pytest.approx(plain[1], rel=5e-2)
    assert all(tensor.dtype is torch.float32 for tensor in weights.values())


def test_the_loss_scale_halves_at_an_overflow_and_doubles_when_all_went_well_for_long() -> None:
    scale = compute_next_loss_scale(LossScale(2.0**16, num_applied=7), overflowed=True)
    assert scale == LossScale(2.0**15, num_applied=0)
    for _ in range(GROWTH_STEPS):
        scale = compute_next_loss_scale(scale, overflowed=False)
    assert scale == LossScale(2.0**16, num_applied=0)
    for _ in range(20):
        scale = compute_next_loss_scale(scale, overflowed=True)
    assert scale == LossScale(1.0)


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
        compute_deepspeed_config(config, 4, {"fp16": {"loss_scale": 128}})
    for key in ("stage3_max_live_parameters", "offload_param"):
        with pytest.raises(UserError, match=rf"{key}: only ZeRO 3 looks at it and engine\.zero_stage is 2; set .*=3"):
            compute_deepspeed_config(config, 4, {"zero_optimization": {key: 1}})
    sharded = compute_deepspeed_config(
        EngineConfig(zero_stage=3, precision="fp16"), 4, {"zero_optimization": {"stage3_max_live_parameters": 10**6}}
    )
    assert sharded["zero_optimization"] == {"stage3_max_live_parameters": 10**6, "stage": 3}
    for key in ("offload_optimizer", "offload_param"):
        with pytest.raises(UserError, match=rf"{key}\.device: nvme keeps .* device: cpu"):
            compute_deepspeed_config(EngineConfig(zero_stage=3), 4, {"zero_optimization": {key: {"device": "nvme"}}})
    with pytest.raises(
        UserError, match=r"engine\.compile=true with engine\.zero_stage=3: .* set engine\.compile=false"
    ):
        compute_deepspeed_config(EngineConfig(zero_stage=3, compile=True), 4, {})
    autocast = sharded["torch_autocast"]
    assert (autocast["enabled"], autocast["dtype"], autocast["lower_precision_safe_modules"]) == (True, "float16", [])


def test_on_one_rank_there_is_nothing_to_shard() -> None:
    def stage(zero_stage: int, world_size: int, extra: dict[str, object]) -> int:
        return compute_zero_stage(validate(EngineConfig, {"zero_stage": zero_stage}, "test"), world_size, extra)

    assert [stage(number, 1, {}) for number in range(4)] == [0, 0, 0, 0]
    assert [stage(number, 2, {}) for number in range(4)] == [0, 1, 2, 3]
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
