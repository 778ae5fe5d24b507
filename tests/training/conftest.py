"""A small archive built by the real writer, a small config, and `panfm pretrain` as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfm.shards.packing import BuildOptions
from panfm.shards.writer import build_shards
from tests.archives import make_source_card, write_table
from tests.forks import Forked, be_panfm, start
from tests.ranks import run_panfm_ranks

CONFIG = """
data: {{shards: [{shards}], exclude: {{tasks: none}}, workers: 1}}
augment: {{image_size: 32}}
encoder: {{name: vit_tiny_patch16_224, image_size: 32, drop_path_rate: 0.2}}
objectives:
  - kind: masked_image
    mask: {{kind: random, ratio: 0.5}}
    target: {{kind: pixels}}
    predictor: {{depth: 1, width: 64}}
optim: {{base_lr: 1.0e-2}}
schedule: {{total_samples: 128, warmup_samples: 32}}
engine: {{global_batch_size: 16, micro_batch_size: 8, num_threads: 1, precision: fp32}}
checkpoint: {{save_every: 2}}
monitor: {{every: 4, num_images: 16}}
tracking: {{log_every: 1, wandb: disabled}}
"""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty coloured pictures of twenty patients."""
    root = tmp_path_factory.mktemp("archive")
    rows = []
    for number in range(40):
        coarse = np.random.default_rng(number).integers(30, 226, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC).save(root / f"{number}.jpg", quality=90)
        rows.append({"path": f"{number}.jpg", "patient": f"p{number // 2}"})
    write_table(root / "table.csv", rows)
    card = make_source_card("drawn", modality="dermoscopic", columns={"path": "path", "patient_id": "patient"})
    out = tmp_path_factory.mktemp("shards") / "drawn"
    build_shards(card, root, out, options=BuildOptions())
    return out


@pytest.fixture(scope="session")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of sixteen images, two micro batches each, a checkpoint every two steps."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG.format(shards=shards))
    return path


def build_labelled(folder: Path, name: str, rows: list[dict[str, str]], **changes: object) -> Path:
    """A shard set with a row's patient, modality and diagnosis; equal diagnoses have images of one hue."""
    root = folder / f"{name}-raw"
    root.mkdir(parents=True)
    for number, row in enumerate(rows):
        rng = np.random.default_rng(1000 * hash_text(name) + number)
        coarse = rng.integers(0, 60, (5, 6, 3), dtype=np.uint8)
        coarse[:, :, hash_text(row["diagnosis"]) % 3] += 150
        row["path"] = f"{number}.png"
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(root / row["path"])
    write_table(root / "table.csv", rows)
    columns = {"path": "path", "patient_id": "patient", "modality": "modality"}
    labels = {"diagnosis": {"column": "diagnosis"}}
    card = make_source_card(name, id_namespace="drawn", columns=columns, labels=labels, **changes)
    out = folder / name
    build_shards(card, root, out, options=BuildOptions())
    return out


def hash_text(text: str) -> int:
    return sum(map(ord, text))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """81 patients that no other set has, 161 images of two modalities, two diagnoses; clinical ones all of one."""
    rows = [
        {
            "patient": f"held{number // 2}",
            "modality": ("dermoscopic", "clinical")[number % 2],
            "diagnosis": "nevus" if number % 2 else ("nevus", "melanoma")[number // 2 % 2],
        }
        for number in range(161)
    ]
    return build_labelled(tmp_path_factory.mktemp("held_out"), "held", rows)


def start_pretrain(config: Path, out: Path, *overrides: str) -> Forked:
    """Start `panfm pretrain` as one process, forked (see tests.forks)."""
    return start(be_panfm, list_words(config, out, *overrides), log=out.with_name(f"{out.name}.log"))


def run_pretrain(config: Path, out: Path, *overrides: str, ranks: int = 0) -> tuple[int, str]:
    """Run it, forked, to its end, on so many ranks if any; returns the exit code and all that it printed."""
    return run_panfm_ranks(list_words(config, out, *overrides), ranks, out.with_name(f"{out.name}.log"))


def list_words(config: Path, out: Path, *overrides: str) -> list[str]:
    return ["pretrain", str(config), *overrides, "--out", str(out)]


def launch_pretrain(
    config: Path, out: Path, *overrides: str, ranks: int = 0, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """The same as a user has it, with an interpreter that imports everything: directly (ranks 0) or under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "panfm", *list_words(config, out, *overrides)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return ended.returncode, ended.stdout
