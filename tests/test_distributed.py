import pytest
import torch
from torch import Tensor

from panfm import distributed
from panfm.errors import UserError
from tests.ranks import run_ranks


def test_without_a_group_there_is_one_rank() -> None:
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not distributed.is_initialised()
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.get_local_rank()) == (0, 1, 0)
    assert distributed.is_main()
    distributed.barrier()
    assert distributed.all_reduce_mean(tensor).tolist() == [1.0, 2.0]
    assert distributed.gather_with_gradient(tensor) is tensor
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.gather_objects("x") == ["x"]


def test_a_single_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group(torch.device("cpu")):
        assert distributed.is_initialised()
        assert distributed.get_world_size() == 1
    assert not distributed.is_initialised()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="MASTER_ADDR is not; start with torchrun"):
        distributed.initialise(torch.device("cpu"))


def contrast(x: Tensor, everything: Tensor, first: int) -> Tensor:
    """A loss of this rank's rows against all rows, as contrastive objectives have it."""
    return torch.nn.functional.cross_entropy(x @ everything.T, torch.arange(first, first + len(x)))


def compute_gradient_on_rank() -> dict[str, object]:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    x = data.chunk(world_size)[rank] @ weight
    loss = contrast(x, distributed.gather_with_gradient(x), first=rank * len(x))
    loss.backward()
    assert weight.grad is not None
    return {
        "gradient": distributed.all_reduce_mean(weight.grad).tolist(),
        "loss": float(distributed.all_reduce_mean(loss)),
        "largest": float(distributed.all_reduce_max(torch.tensor(float(rank)))),
        "ranks": distributed.gather_objects(rank),
        "from_main": distributed.broadcast_object(f"rank {rank}"),
    }


@pytest.mark.slow
def test_gradients_over_ranks_equal_one_process() -> None:
    world_size = 3
    one = compute_gradient_on_rank()
    for result in run_ranks(compute_gradient_on_rank, world_size):
        torch.testing.assert_close(
            torch.tensor(result["gradient"]), torch.tensor(one["gradient"]), rtol=1e-5, atol=1e-7
        )
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert result["largest"] == world_size - 1
        assert result["ranks"] == list(range(world_size))
        assert result["from_main"] == "rank 0"
