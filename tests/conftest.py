"""Fixtures for every test: the folder of real images, where a checkout has it beside itself."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for a hub fails here as it would in a hospital

REAL_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, or a skip with the reason."""
    folder = Path(os.environ.get("PANFM_REAL_DATA") or REAL_DATA)
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real images: {folder} is absent (set PANFM_REAL_DATA to their folder)")
    return folder
