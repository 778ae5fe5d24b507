"""The loader over a network: the batches of a set at a URL are those of the same set in a folder, bit for bit."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
import torch

from panfm.data.batch import Batch
from panfm.data.loader import DataConfig, Loader, LoaderState, build_loader
from panfm.data.masking import MaskConfig
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig
from panfm.errors import UserError
from panfm.shards import piece_cache
from panfm.shards.index import open_shard_set
from tests.data.conftest import build_source
from tests.shards.range_server import serve
from tests.shards.test_storage_cache import READ_ONE

NUM_STEPS = 12  # more than a pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"patient": f"p{n // 2}", "lesion": f"l{n // 2}", "day": "", "modality": "clinical"} for n in range(40)]
    return build_source(tmp_path_factory.mktemp("built"), "alpha", rows, shard=15)


def build(*shards: Path | str, workers: int) -> Loader:
    return build_loader(
        DataConfig(shards=tuple(map(str, shards)), workers=workers),
        MixtureConfig(),
        AugmentConfig(image_size=16, views=2),
        mask=MaskConfig(kind="block", ratio=0.5),
        mask_grid=(4, 4),
        seed=3,
        global_batch_size=4,
        micro_batch_size=2,
        excluded={},
    )


def draw(*shards: Path | str, workers: int) -> list[Batch]:
    with build(*shards, workers=workers) as loader:
        batches = loader.iterate(LoaderState(step=0), rank=0, world_size=1)
        return [batch for _ in range(NUM_STEPS) for batch in next(batches)]


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others) == 2 * NUM_STEPS
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.positions, other.positions) and torch.equal(one.patients, other.patients)
        assert all(map(torch.equal, one.views, other.views)) and torch.equal(one.masks, other.masks)


def test_batches_from_memory_are_those_of_the_folder(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PANFM_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for path in built.iterdir():
        store.pipe(f"/loader/alpha/{path.name}", path.read_bytes())
    assert_same(draw(built, workers=0), draw("memory://loader/alpha", workers=0))


@pytest.mark.slow
def test_batches_over_http_are_those_of_the_folder(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two workers, a store that fails now and then, and after a process was killed in the middle of a download."""
    monkeypatch.setenv("PANFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(piece_cache, "PIECE_ROWS", 4)
    with serve(built.parent) as server:
        url = f"{server.url}/alpha"
        open_shard_set(url)
        server.stalled = threading.Event()
        child = subprocess.Popen([sys.executable, "-c", READ_ONE, url, "9"], stdout=subprocess.PIPE)
        assert server.stalled.wait(60)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        server.stalled, server.fail_every = None, 5
        server.forget()
        assert_same(draw(built, workers=0), draw(url, workers=2))
        assert server.num_failed >= 2 and set(server.pieces.values()) == {1}  # each piece once, for both workers


def test_a_store_that_goes_away_ends_a_run_in_one_line(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PANFM_CACHE", str(tmp_path / "cache"))
    with serve(built.parent) as server, build(f"{server.url}/alpha", workers=0) as loader:
        server.fail_every, server.status = 1, 403
        with pytest.raises(UserError, match=rf"{server.url}/alpha/shard-\d+.tar: refused \(HTTP 403\)") as error:
            next(loader.iterate(LoaderState(step=0), rank=0, world_size=1))
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
