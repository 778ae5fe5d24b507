"""For every test: the order of the files, and the folder of real images, where a checkout has it beside itself."""

import os
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for a hub fails here as it would in a hospital

REAL_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: pytest-xdist hands out whole files, and a long one at the end would leave
    the other processes idle. (Its own order, most tests first, leaves files of one long test to the end.)
    """
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, or a skip with the reason."""
    folder = Path(os.environ.get("PANFM_REAL_DATA") or REAL_DATA)
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real images: {folder} is absent (set PANFM_REAL_DATA to their folder)")
    return folder
