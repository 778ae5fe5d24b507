"""What the harness trains: a tiny archive, a tiny config, and how the end of an interrupted run is judged.

make_setting(folder)  ->  shards, config.yaml
compare(run, whole)   ->  "bit-identical", "within tolerance", or what differs
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from panfm.files import read_json
from panfm.tracking import read_metrics
from panfm.training.checkpoint import list_checkpoints
from tests.training.conftest import build_labelled

NUM_STEPS = 27
BATCH_SIZE = 8
SAVE_EVERY = 3
# Relative, of every loss: what another number of ranks may change over a run of this length. Sums of a handful of fp32
# numbers in another order differ by 1e-7; AdamW and some hundred steps make more of it.
TOLERANCE = 1e-3
EXACT = ("step", "samples_seen", "loss", "lr", "grad_norm", "drawn")
CONFIG = """
data: {{shards: [{shards}], exclude: {{tasks: none}}, workers: 0}}
augment: {{image_size: 32}}
encoder: {{name: test_vit, image_size: 32, patch_size: 8, drop_path_rate: 0.2}}
objectives:
  - kind: masked_image
    mask: {{kind: random, ratio: 0.5}}
    target: {{kind: ema_teacher, ema: {{momentum: 0.9}}}}
    predictor: {{depth: 1, width: 32}}
optim: {{base_lr: 1.0e-2}}
schedule: {{total_samples: {total}, warmup_samples: 32}}
engine: {{global_batch_size: {batch}, micro_batch_size: 4, num_threads: 1, precision: fp32}}
checkpoint: {{save_every: {save_every}}}
monitor: {{every: 0, pictures_every: 0, hang_seconds: 300}}
tracking: {{log_every: 1, wandb: disabled}}
"""


@dataclass(frozen=True)
class Setting:
    """Where the config and its only shard lie, and a whole copy of the shard."""

    config: Path
    shard: Path
    copy: Path

    def restore_shard(self) -> None:
        """Put the shard back as it was; in place, since ranks may have it open."""
        shutil.copyfile(self.copy, self.shard)


def make_setting(folder: Path) -> Setting:
    """Forty-eight drawn pictures of twenty-four patients, and a config with half a ViT of toy size."""
    rows = [
        {"patient": f"p{number // 2}", "modality": "dermoscopic", "diagnosis": ("nevus", "melanoma")[number % 2]}
        for number in range(48)
    ]
    shards = build_labelled(folder, "drawn", rows)
    (shard,) = shards.glob("*.tar")
    copy = folder / "whole.tar"
    shutil.copyfile(shard, copy)
    config = folder / "tiny.yaml"
    config.write_text(
        CONFIG.format(shards=shards, total=NUM_STEPS * BATCH_SIZE, batch=BATCH_SIZE, save_every=SAVE_EVERY)
    )
    return Setting(config, shard, copy)


def hash_state(run: Path) -> dict[str, str]:
    """SHA-256 of every file with numbers in the newest checkpoint: weights, optimizer, teacher."""
    files = read_json(list_checkpoints(run)[-1] / "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".safetensors", ".pt"))}


def compare(run: Path, whole: Path) -> str:
    """How a run that was interrupted ended, measured by `whole`, which nothing interrupted."""
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, whole))
    if list_checkpoints(run)[-1].name != list_checkpoints(whole)[-1].name:
        return f"its newest checkpoint is {list_checkpoints(run)[-1].name}"
    if [[record.get(key) for key in EXACT] for record in mine] == [[r.get(key) for key in EXACT] for r in theirs]:
        return "bit-identical" if hash_state(run) == hash_state(whole) else "same losses, but other weights"
    for key in ("step", "samples_seen", "drawn"):  # no sample lost or repeated
        if [record[key] for record in mine] != [record[key] for record in theirs]:
            return f"{key} of metrics.jsonl differs"
    worst = max(abs(m["loss"] - t["loss"]) / abs(t["loss"]) for m, t in zip(mine, theirs, strict=True))
    return "within tolerance" if math.isfinite(worst) and worst <= TOLERANCE else f"losses differ by {worst:.1e}"
