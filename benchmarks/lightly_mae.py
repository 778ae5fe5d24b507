"""lightly's MAE example on panfm's shards, for as many samples as it is given: the peer of `benchmarks/recipes.py`.

    python benchmarks/lightly_mae.py --shards DIR [DIR ...] --out RUN --samples 20000 [--precision bf16 --batch-size 64]

What the example for PyTorch alone does, with lightly 1.6's own parts: its transform (crops from 0.2 on, mirrored),
its masked ViT, which it initialises itself, a decoder of one block 512 wide with 16 heads, plain pixels as targets,
AdamW at a constant 1.5e-4, batches of 256, a DataLoader, float32. A copy of the example with eight decoder blocks also
circulates; one block is what its other versions have, and the faster of the two. Changed here: the encoder is the one
that all recipes train, at their image size; the loop ends after --samples instead of ten epochs; the loader has two
workers, since eight are not for two cores. The images are the same as panfm's recipes draw: test groups are left out.

In: shard sets. Out: RUN/export (an export of panfm, so that the same evaluation reads it) and RUN/done.json.
"""

import argparse
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.transforms import MAETransform
from PIL import Image
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from panfm import __version__
from panfm.encoder.export import export_encoder
from panfm.encoder.facts import EncoderFacts, SourceFacts, TransformFacts, write_facts
from panfm.evaluation.splits import compute_excluded
from panfm.files import compute_file_sha256, write_bytes, write_json
from panfm.models.vit import EncoderConfig, build_vit, get_timm_kwargs
from panfm.shards.index import ShardSet, open_shard_set

DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 512, 1, 16
MASK_RATIO = 0.75
LEARNING_RATE = 1.5e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of lightly's transform, and of our evaluation
RESIZE_RATIO = 256 / 224  # of the evaluation, as for every encoder that panfm trains


class Images(Dataset):
    """The images of shard sets whose group is not excluded, decoded by Pillow as an image folder would be."""

    def __init__(self, shard_sets: Sequence[ShardSet], excluded: Mapping[str, frozenset[str]], image_size: int) -> None:
        self.shard_sets = shard_sets
        self.transform = MAETransform(input_size=image_size)
        self.rows = [
            (number, row)
            for number, shard_set in enumerate(shard_sets)
            for row, group in enumerate(shard_set.table.column("group_id").to_pylist())
            if group not in excluded[shard_set.source]
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        number, row = self.rows[index]
        image = Image.open(io.BytesIO(self.shard_sets[number].read_image(row))).convert("RGB")
        return self.transform(image)[0]  # a list of one view


class MaskedAutoencoder(nn.Module):
    """lightly's parts, put together as in its example."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.patch_size = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)  # initialises the ViT anew
        self.embed = nn.Linear(vit.embed_dim, DECODER_WIDTH)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            embed_dim=DECODER_WIDTH,
            depth=DECODER_DEPTH,
            num_heads=DECODER_HEADS,
            num_prefix_tokens=vit.num_prefix_tokens,
        )
        self.predict = nn.Linear(DECODER_WIDTH, self.patch_size**2 * 3)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> mean squared error of hidden pixels."""
        length = self.backbone.sequence_length
        kept, hidden = utils.random_token_mask((len(images), length), mask_ratio=MASK_RATIO, device=images.device)
        encoded = self.embed(self.backbone.encode(images=images, idx_keep=kept))
        whole = utils.set_at_index(encoded.new_zeros(len(images), length, DECODER_WIDTH), kept, encoded)
        predictions = self.predict(utils.get_at_index(self.decoder(whole, idx_mask=hidden), hidden))
        targets = utils.get_at_index(utils.patchify(images, self.patch_size), hidden - 1)  # CLS is no patch
        return nn.functional.mse_loss(predictions.float(), targets)


def iterate_epochs(loader: DataLoader) -> Iterator[Tensor]:
    """Batches, one shuffled pass after another."""
    while True:
        yield from loader


def train(model: nn.Module, images: Images, arguments: argparse.Namespace) -> dict[str, float]:
    """Train on so many samples, and return what was done; the clock starts when the first batch is asked for."""
    loader = DataLoader(
        images,
        batch_size=min(arguments.batch_size, len(images)),
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=arguments.lr)
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16) if arguments.precision == "bf16" else nullcontext()
    started, samples, steps, loss = time.monotonic(), 0, 0, float("nan")
    for batch in iterate_epochs(loader):
        with bf16:
            output = model(batch)
        output.backward()
        optimizer.step()
        optimizer.zero_grad()
        samples, loss = samples + len(batch), float(output.detach())
        steps += 1
        print(f"step {steps}", flush=True)
        if samples >= arguments.samples:
            break
    return {"samples_seen": samples, "steps": steps, "seconds": time.monotonic() - started, "loss": loss}


def export(
    vit: VisionTransformer,
    encoder: EncoderConfig,
    done: dict[str, float],
    sources: tuple[SourceFacts, ...],
    tasks: tuple[str, ...],
    out: Path,
) -> None:
    """Write the encoder as panfm does: a checkpoint's two files and their hashes, and the export that is made of it."""
    size = encoder.image_size
    facts = EncoderFacts(
        timm_name=encoder.name,
        timm_kwargs=get_timm_kwargs(encoder),
        transform=TransformFacts(
            image_size=size, resize_size=round(size * RESIZE_RATIO), interpolation="bicubic", mean=MEAN, std=STD
        ),
        samples_seen=int(done["samples_seen"]),
        step=int(done["steps"]),
        sources=sources,
        excluded_tasks=tasks,
        code_version=__version__,
    )
    folder = out / "checkpoint"
    state = {name: tensor.detach().clone().contiguous() for name, tensor in vit.state_dict().items()}
    write_bytes(folder / "encoder.safetensors", save(state))
    write_facts(folder / "encoder.json", facts)
    files = {name: {"sha256": compute_file_sha256(folder / name)} for name in ("encoder.safetensors", "encoder.json")}
    write_json(folder / "manifest.json", {"files": files})
    export_encoder(folder, out / "export")


def main() -> None:
    """Train for the given length and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="shard sets to train on")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--samples", type=int, required=True, help="of training")
    parser.add_argument("--encoder", default="vit_small_patch16_224", help="a timm ViT")
    parser.add_argument("--image-size", type=int, default=128, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="the example has fp32")
    parser.add_argument("--batch-size", type=int, default=256, help="the example has 256")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="the example has 1.5e-4, constant")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    arguments = parser.parse_args()

    encoder = EncoderConfig(name=arguments.encoder, image_size=arguments.image_size)
    vit = build_vit(encoder, arguments.seed)
    shard_sets = [open_shard_set(path) for path in arguments.shards]
    excluded = compute_excluded("all", shard_sets)
    images = Images(shard_sets, excluded.groups, arguments.image_size)
    torch.manual_seed(arguments.seed)
    done = train(MaskedAutoencoder(vit), images, arguments)
    sources = tuple(describe(number, shard_set, images) for number, shard_set in enumerate(shard_sets))
    export(vit, encoder, done, sources, excluded.tasks, arguments.out)
    write_json(arguments.out / "done.json", done)
    print(json.dumps(done))


def describe(number: int, shard_set: ShardSet, images: Images) -> SourceFacts:
    """How much of a source was trained on, for the board."""
    num_kept = sum(place == number for place, _ in images.rows)
    return SourceFacts(
        source=shard_set.source,
        licence=shard_set.card.licence,
        num_kept=num_kept,
        num_excluded=len(shard_set.table) - num_kept,
        data_hash=shard_set.compute_data_hash(),
    )


if __name__ == "__main__":
    main()
