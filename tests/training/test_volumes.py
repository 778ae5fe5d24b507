"""Bytes that DeepSpeed hands to the process group in a step, beside those of the model behind docs/scaling.md.

One process and torch's fake process group, which sends nothing: what is counted does not depend on who is at the other
end, and three ranks cost as little as one.
"""
# ruff: noqa: TID251  the volumes are counted where torch.distributed gets the tensors

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panfm.data.batch import NO_GROUP, Batch
from panfm.data.masking import MaskConfig
from panfm.models.vit import EncoderConfig, build_vit
from panfm.objectives.masked_image import MaskedImageConfig, PredictorConfig
from panfm.objectives.pretraining import build_pretraining_model
from panfm.objectives.targets import PixelTargetConfig
from panfm.optim import OptimConfig
from panfm.training.engine import Engine, EngineConfig
from panfm.training.memory import STAGES
from panfm.training.scaling import compute_volume

WORLD_SIZE = 3
SMALL_SHARE = 0.01  # means of losses, norms, whether all is finite, what fills a shard up


class CountBytes(TorchDispatchMode):
    """Adds up what the tensors that pass through a process group make a rank of a ring send."""

    total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind, gather = func._schema.name, (WORLD_SIZE - 1) / WORLD_SIZE
        if kind == "c10d::allreduce_":
            self.total += 2 * gather * count_bytes(args[0])
        elif kind.startswith("c10d::") and "reduce_scatter" in kind:
            self.total += gather * count_bytes(args[1])
        elif kind.startswith("c10d::") and ("allgather" in kind or kind == "c10d::broadcast_"):
            self.total += gather * count_bytes(args[0])
        return func(*args, **(kwargs or {}))


def count_bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def make_batch() -> Batch:
    zeros = torch.zeros(2, dtype=torch.int64)
    masks = torch.zeros(1, 2, 16, dtype=torch.bool)
    masks[:, :, :12] = True
    return Batch(
        views=(torch.zeros(2, 3, 32, 32, dtype=torch.uint8),),
        masks=masks,
        positions=zeros,
        modalities=zeros,
        sources=zeros,
        lesions=zeros + NO_GROUP,
        patients=zeros + NO_GROUP,
        visits=zeros + NO_GROUP,
    )


@pytest.fixture
def fake_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 0 of three that are not there."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_step_sends_what_the_model_says(fake_group: None, stage: int, num_micro_batches: int) -> None:
    vit = build_vit(EncoderConfig(name="test_vit", image_size=32, patch_size=8), seed=0)
    objective = MaskedImageConfig(
        mask=MaskConfig(kind="random", ratio=0.75),
        target=PixelTargetConfig(),
        predictor=PredictorConfig(depth=1, width=64),
    )
    half = (0.5, 0.5, 0.5)
    model = build_pretraining_model(vit, (objective,), image_size=32, mean=half, std=half, teachers={})
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    config = EngineConfig(
        global_batch_size=2 * WORLD_SIZE * num_micro_batches,
        micro_batch_size=2,
        num_threads=1,
        zero_stage=stage,
        precision="fp32",
    )
    engine = Engine(model, model.encoder, config, OptimConfig(), {})
    batches = [make_batch()] * num_micro_batches
    engine.step(batches, step=0, lr=1e-4)
    with CountBytes() as counted:
        engine.step(batches, step=1, lr=1e-4)
    engine.close()
    said = compute_volume(num_parameters, stage, WORLD_SIZE, num_micro_batches)
    assert counted.total == pytest.approx(said, rel=SMALL_SHARE)
