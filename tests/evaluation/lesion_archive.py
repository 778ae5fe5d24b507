"""A small drawn archive with what the pixels, pairs and words of a task need: masks, two modalities, visits, captions.

30 patients with 2 lesions each; a lesion has a clinical image (day 0) and dermoscopic ones on days 0 and 90, all of the
lesion's own colour and shape. The mask holds bits: 1 the lesion, 2 its core, drawn with a darker colour.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from panfm.config import validate
from panfm.encoder.load import load_encoder
from panfm.evaluation.protocol import Material, Trial, build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.splits import Split
from panfm.evaluation.tasks import TaskCard
from panfm.shards.cards import SourceCard
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import write_table
from tests.evaluation.conftest import SOURCE, TASK

ENCODER = "timm:test_vit@random:0?image_size=64"
WIDTH, HEIGHT = 64, 48
NUM_PATIENTS = 30
MODALITIES = (("clinical", 0), ("dermoscopic", 0), ("dermoscopic", 90))
CARD = {
    **SOURCE, "name": "lesions", "modality": None, "columns": {
        "path": "file", "patient_id": "patient", "lesion_id": "lesion", "official_split": "fold", "mask_path": "mask",
        "modality": "modality", "visit_day": "day", "caption": "caption"},
}  # fmt: skip
FOLDS = {"kind": "official", "train": ["learn"], "val": ["tune"], "test": ["exam"]}


def build_lesions(folder: Path) -> ShardSet:
    (folder / "raw").mkdir(parents=True)
    rows = []
    for patient in range(NUM_PATIENTS):
        for lesion in range(2):
            rng = np.random.default_rng([patient, lesion])
            colour, centre = rng.uniform(40, 140, 3), rng.uniform([20, 15], [44, 33])
            axes = rng.uniform(8, 14, 2)
            for image, (modality, day) in enumerate(MODALITIES):
                name = f"{patient}-{lesion}-{image}"
                x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
                distance = np.hypot((x - centre[0]) / axes[0], (y - centre[1]) / axes[1])
                skin = np.full((HEIGHT, WIDTH, 3), (225, 180, 150) if modality == "clinical" else (240, 200, 190))
                pixels = np.where((distance < 1)[..., None], colour, skin)
                pixels = np.where((distance < 0.5)[..., None], colour * 0.3, pixels)
                pixels = pixels + rng.normal(0, 6, pixels.shape)
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"raw/{name}.jpg", quality=92)
                bits = (distance < 1).astype(np.uint8) + 2 * (distance < 0.5).astype(np.uint8)
                Image.fromarray(bits).save(folder / f"raw/{name}.png")
                rows.append({
                    "file": f"{name}.jpg", "mask": f"{name}.png", "patient": f"P{patient}", "modality": modality,
                    "lesion": f"P{patient}-{lesion}", "day": day, "fold": ("learn", "learn", "exam")[patient % 3],
                    "diagnosis": ("naevus", "melanoma")[lesion], "caption": f"{modality} {patient} {lesion}",
                })  # fmt: skip
    write_table(folder / "raw" / "table.csv", rows)
    card = validate(SourceCard, {key: value for key, value in CARD.items() if value is not None}, where="test card")
    build_shards(card, folder / "raw", folder / "shards", options=BuildOptions(min_side=16))
    return open_shard_set(folder / "shards")


def make_card(family: str, target: dict[str, object], metric: str, **changes: object) -> TaskCard:
    """A task on the archive; families without classes lose theirs."""
    values = {**TASK, "name": f"lesions_{family}", "source": "lesions", "family": family, "target": target,
              "metrics": [metric], "primary_metric": metric, "split": FOLDS, "ignore": [], **changes}  # fmt: skip
    if family in ("segmentation", "retrieval"):
        values |= {"label": None, "classes": []}
    return validate(TaskCard, values, where="test task")


def make_material(shard_set: ShardSet, features: np.ndarray | None = None, address: str = ENCODER) -> Material:
    """features: of all rows of the shard set; None = zeros, for protocols that do not look at them."""
    encoder = load_encoder(address)
    if features is None:
        features = np.zeros((shard_set.num_samples, encoder.embed_dim))
    return Material(features.astype(np.float32), encoder, shard_set)


def make_trial(
    card: TaskCard, split: Split, material: Material, variant: str = "default", *, label_fraction: float = 1.0
) -> Trial:
    return build_trial(
        card, split, EncoderCard(**vars(material.encoder.card)), material.shard_set, protocol=card.family,
        recipe={"variant": variant}, evaluated_on="test", label_fraction=label_fraction, draw=0, seed=0,
        num_replicates=100,
    )  # fmt: skip


def list_column(shard_set: ShardSet, name: str) -> list[object]:
    return shard_set.table.column(name).to_pylist()
